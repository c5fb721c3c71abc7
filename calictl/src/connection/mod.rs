//! Which datastore this run talks to, decided once: flags over the configuration file, or flags over the environment.
//!
//! As `calicoctl`: a configuration file that is there counts instead of the environment, not together with it. As a plugin of
//! `kubectl` (called `kubectl-calico`) the datastore is the cluster of the kubeconfig unless something else is said.

mod file;
mod skew;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use cali_datastore::Datastore;
use clap::Args;

use crate::output;

/// Read where no other file is named.
const DEFAULT_FILE: &str = "/etc/calico/calicoctl.cfg";

/// The name under which `kubectl` finds this program as its plugin.
const PLUGIN: &str = "kubectl-calico";

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Flags {
    /// File with the datastore's settings (CalicoAPIConfig); without it /etc/calico/calicoctl.cfg, or the environment
    #[arg(
        short,
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    config: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, global = true, value_name = "NAME", help_heading = "Connection")]
    context: Option<String>,
    /// Kubeconfig of the cluster that is the datastore
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    kubeconfig: Option<String>,
    /// Do not warn when the cluster runs another version
    #[arg(long, global = true, help_heading = "Connection")]
    allow_version_mismatch: bool,
    /// What is logged on standard error: panic (nothing), error, warn, info, debug
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        default_value = "panic",
        hide_default_value = true,
        help_heading = "Connection"
    )]
    pub(crate) log_level: String,
}

static FLAGS: OnceLock<Flags> = OnceLock::new();

/// Keeps the flags for [`open`].
pub(crate) fn settle(flags: Flags) {
    // Only the first counts, and there is only one.
    let _ = FLAGS.set(flags);
}

/// Whether this program was called by `kubectl`.
pub(crate) fn is_plugin() -> bool {
    let name = std::env::args_os().next().map(PathBuf::from);
    name.as_deref()
        .and_then(Path::file_stem)
        .is_some_and(|name| name == PLUGIN || name == "kubectl_calico")
}

/// The datastore. Warns if the cluster runs another version than this program.
pub(crate) async fn open() -> Result<Arc<dyn Datastore>> {
    let flags = FLAGS.get().cloned().unwrap_or_default();
    let settings = settings(&flags)?;
    let store = cali_datastore::open_with(|name| settings.get(name).cloned())?;
    if !flags.allow_version_mismatch
        && let Some(warning) = skew::of(store.as_ref()).await
    {
        output::warning(warning);
    }
    Ok(store)
}

/// The Kubernetes cluster that is the datastore.
pub(crate) struct Cluster {
    /// Its API server.
    pub(crate) client: kube::Client,
    /// How `kubectl` is called for it.
    pub(crate) kubectl: Vec<String>,
}

/// The cluster; `None` if the datastore is none of Kubernetes.
pub(crate) async fn cluster() -> Result<Option<Cluster>> {
    let settings = settings(&FLAGS.get().cloned().unwrap_or_default())?;
    if settings
        .get("DATASTORE_TYPE")
        .is_none_or(|kind| kind != "kubernetes")
    {
        return Ok(None);
    }
    let client =
        cali_datastore::kubernetes::Settings::from_variables(|name| settings.get(name).cloned())?
            .connect()
            .await?;
    Ok(Some(Cluster {
        client,
        kubectl: kubectl(&settings),
    }))
}

fn kubectl(settings: &BTreeMap<String, String>) -> Vec<String> {
    let mut words = vec!["kubectl".to_owned()];
    for (flag, name) in [
        ("--kubeconfig", "KUBECONFIG"),
        ("--context", "K8S_CURRENT_CONTEXT"),
    ] {
        if let Some(value) = settings.get(name).filter(|value| !value.is_empty()) {
            words.push(format!("{flag}={value}"));
        }
    }
    words
}

fn settings(flags: &Flags) -> Result<BTreeMap<String, String>> {
    let file = match &flags.config {
        Some(file) => Some(file.as_path()),
        None => Some(Path::new(DEFAULT_FILE)).filter(|file| file.exists()),
    };
    let base = match file {
        Some(file) => {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("cannot read {}", file.display()))?;
            file::variables(&file.display().to_string(), &text)?
        }
        None => std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect(),
    };
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let kubeconfig = home
        .map(|home| home.join(".kube/config"))
        .filter(|file| file.exists());
    Ok(with_flags(base, flags, is_plugin(), kubeconfig.as_deref()))
}

/// The settings with the flags over them. `kubeconfig` is the user's own. Pure.
fn with_flags(
    mut settings: BTreeMap<String, String>,
    flags: &Flags,
    is_plugin: bool,
    kubeconfig: Option<&Path>,
) -> BTreeMap<String, String> {
    if let Some(file) = &flags.kubeconfig {
        settings.insert("KUBECONFIG".to_owned(), file.clone());
        settings.remove("K8S_KUBECONFIG_INLINE");
    }
    if let Some(context) = &flags.context {
        settings.insert("K8S_CURRENT_CONTEXT".to_owned(), context.clone());
    }
    // Whoever names a cluster means it.
    let names_cluster = flags.kubeconfig.is_some() || flags.context.is_some();
    if names_cluster || is_plugin {
        settings
            .entry("DATASTORE_TYPE".to_owned())
            .or_insert_with(|| "kubernetes".to_owned());
    }
    let wants_cluster = settings
        .get("DATASTORE_TYPE")
        .is_some_and(|kind| kind == "kubernetes");
    let says_where = [
        "KUBECONFIG",
        "K8S_KUBECONFIG_INLINE",
        "K8S_API_ENDPOINT",
        "KUBERNETES_SERVICE_HOST",
    ]
    .iter()
    .any(|name| settings.get(*name).is_some_and(|value| !value.is_empty()));
    if let (true, false, Some(file)) = (wants_cluster, says_where, kubeconfig) {
        settings.insert("KUBECONFIG".to_owned(), file.display().to_string());
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(pairs: &[(&str, &str)], flags: &Flags, plugin: bool) -> Vec<String> {
        let base = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        with_flags(
            base.collect(),
            flags,
            plugin,
            Some(Path::new("/home/u/.kube/config")),
        )
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect()
    }

    #[test]
    fn flags_count_over_everything_and_a_plugin_means_its_cluster() {
        let none = Flags::default();
        assert_eq!(settled(&[("A", "b")], &none, false), ["A=b"]);
        assert_eq!(
            settled(&[], &none, true),
            [
                "DATASTORE_TYPE=kubernetes",
                "KUBECONFIG=/home/u/.kube/config"
            ]
        );
        assert_eq!(
            settled(&[("DATASTORE_TYPE", "sqlite")], &none, true),
            ["DATASTORE_TYPE=sqlite"]
        );
        assert_eq!(
            settled(
                &[
                    ("DATASTORE_TYPE", "kubernetes"),
                    ("K8S_API_ENDPOINT", "https://a")
                ],
                &none,
                false
            ),
            ["DATASTORE_TYPE=kubernetes", "K8S_API_ENDPOINT=https://a"]
        );
        let flags = Flags {
            context: Some("blue".to_owned()),
            kubeconfig: Some("/k".to_owned()),
            ..Flags::default()
        };
        assert_eq!(
            settled(&[("KUBECONFIG", "/other")], &flags, false),
            [
                "DATASTORE_TYPE=kubernetes",
                "K8S_CURRENT_CONTEXT=blue",
                "KUBECONFIG=/k"
            ]
        );
    }
}
