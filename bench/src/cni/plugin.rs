//! The plugin, called as a runtime calls it.

use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::NAMESPACE;
use crate::bgp::cost::of_process;

/// A pod to be: its name, and the name of its network namespace.
#[derive(Debug, Clone, Copy)]
pub struct Pod<'a> {
    /// Name in Kubernetes.
    pub name: &'a str,
    /// Name of the network namespace.
    pub netns: &'a str,
}

/// What one call cost.
#[derive(Debug, Clone, Copy)]
pub struct Called {
    /// From before the process was started until it had ended.
    pub took: Duration,
    /// Its highest resident memory as it was seen, in octets; 0 where nobody looked.
    pub peak: u64,
    /// The address of an `ADD`.
    pub address: Option<IpAddr>,
}

/// A runtime on the node whose folders are in this one.
#[derive(Debug)]
pub struct Runtime {
    /// The plugin.
    pub program: PathBuf,
    /// Folder of the node.
    pub folder: PathBuf,
}

impl Runtime {
    fn start(&self, verb: &str, pod: Pod<'_>) -> Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .env_clear()
            .env("CALI_RUN_DIR", self.folder.join("run"))
            .env("CALI_STATE_DIR", self.folder.join("lib"))
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", format!("sandbox-{}", pod.name))
            .env("CNI_NETNS", Path::new("/run/netns").join(pod.netns))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/opt/cni/bin")
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={}",
                    pod.name
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))
    }

    /// One call. `watched`: look at the process's memory meanwhile, which costs it some time.
    ///
    /// # Errors
    /// The plugin says no.
    pub fn call(&self, verb: &str, pod: Pod<'_>, watched: bool) -> Result<Called> {
        let config = json!({"cniVersion": "1.1.0", "name": "k8s-pod-network", "type": "calico",
            "ipam": {"type": "calico-ipam"}})
        .to_string();
        let started = Instant::now();
        let mut child = self.start(verb, pod)?;
        child
            .stdin
            .take()
            .context("no stdin")?
            .write_all(config.as_bytes())?;
        let mut peak = 0;
        // The kernel says it only of a process that has not ended; the last look is less than a millisecond before that.
        while watched && child.try_wait()?.is_none() {
            peak = of_process(child.id()).peak.max(peak);
        }
        let (mut said, mut complained) = (String::new(), String::new());
        child
            .stdout
            .take()
            .context("no stdout")?
            .read_to_string(&mut said)?;
        let status = child.wait()?;
        let took = started.elapsed();
        child
            .stderr
            .take()
            .context("no stderr")?
            .read_to_string(&mut complained)?;
        if !status.success() {
            bail!("{verb} of {}: {said}{complained}", pod.name);
        }
        let result: Value = serde_json::from_str(&said).unwrap_or_default();
        let address = result["ips"][0]["address"]
            .as_str()
            .and_then(|text| text.split('/').next()?.parse().ok());
        Ok(Called {
            took,
            peak,
            address,
        })
    }
}
