//! `ipam configure`: the settings of address management, each by a flag of its own.

use anyhow::{Context, Result};
use cali_api::v3::{IPAMConfiguration, IPAMConfigurationSpec, Toggle};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::Error;
use clap::Args;

use crate::change::change;
use crate::{connection, output};

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Configure {
    /// Nodes use addresses of their own blocks only
    #[arg(long, value_name = "BOOL", action = clap::ArgAction::Set)]
    strictaffinity: Option<bool>,
    /// Blocks that a node may have; 0 means the built-in limit of 20
    #[arg(long, value_name = "NUMBER")]
    max_blocks_per_host: Option<u32>,
    /// Virtual machines of KubeVirt keep their address: Enabled or Disabled
    #[arg(long, value_name = "WORD")]
    kubevirt_ip_persistence: Option<Toggle>,
    /// How long a released address is not given to anybody
    #[arg(long, value_name = "SECONDS")]
    ip_cooldown_seconds: Option<u32>,
}

pub(super) async fn run(configure: &Configure) -> Result<()> {
    let store = connection::open().await?;
    let key = Key::cluster(Kind::IPAMConfiguration, "default");
    change(store.as_ref(), &key, |stored| {
        let mut config = match stored {
            Some(AnyResource::IPAMConfiguration(config)) => (**config).clone(),
            _ => IPAMConfiguration::named("default", IPAMConfigurationSpec::default()),
        };
        configure.change(&mut config.spec);
        Ok::<_, Error>(config.into())
    })
    .await
    .context("the settings were not changed")?;
    for (name, value) in configure.set() {
        output::line(format!("Successfully set {name} to: {value}"));
    }
    Ok(())
}

impl Configure {
    fn change(&self, spec: &mut IPAMConfigurationSpec) {
        if let Some(strict) = self.strictaffinity {
            spec.strict_affinity = strict;
        }
        if let Some(limit) = self.max_blocks_per_host {
            spec.max_blocks_per_host = limit;
        }
        if let Some(toggle) = self.kubevirt_ip_persistence {
            spec.kube_virt_vm_address_persistence = Some(toggle);
        }
        if let Some(seconds) = self.ip_cooldown_seconds {
            spec.ip_cooldown_seconds = Some(seconds);
        }
    }

    /// What was set, in Calico's words.
    fn set(&self) -> Vec<(&'static str, String)> {
        let mut set = Vec::new();
        let mut say = |name, value: Option<String>| set.extend(value.map(|value| (name, value)));
        say(
            "StrictAffinity",
            self.strictaffinity.map(|strict| strict.to_string()),
        );
        say(
            "MaxBlocksPerHost",
            self.max_blocks_per_host.map(|limit| limit.to_string()),
        );
        say(
            "KubeVirtVMAddressPersistence",
            self.kubevirt_ip_persistence
                .map(|toggle| toggle.to_string()),
        );
        say(
            "IPCooldownSeconds",
            self.ip_cooldown_seconds.map(|seconds| seconds.to_string()),
        );
        set
    }
}
