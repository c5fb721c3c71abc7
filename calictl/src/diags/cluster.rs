//! `calictl cluster diags`: what the datastore holds, and, where that is Kubernetes, what runs there.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use cali_api::{AnyResource, Kind};
use cali_datastore::Datastore;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Archive, begin, conclude, duration, kubernetes};
use crate::{connection, converted};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Collect what somebody needs who is to find a fault of the cluster: one archive, secrets masked
    Diags(Diags),
}

#[derive(Debug, Args)]
pub(crate) struct Diags {
    /// Only logs of the last 90s, 30m, 2h, 3d
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(super) since: Option<Duration>,
    /// Logs and node archives of at most so many pods of each component
    #[arg(long, default_value_t = 5, value_name = "COUNT")]
    pub(super) max_logs: usize,
    /// So many pods are asked at the same time
    #[arg(long, default_value_t = 10, value_name = "COUNT")]
    pub(super) max_parallelism: usize,
    /// The pods of these nodes come first: n1,n2
    #[arg(long, value_delimiter = ',', value_name = "NODES")]
    pub(super) focus_nodes: Vec<String>,
    /// Accepted as `calicoctl` does; there is no temporary folder
    #[arg(long)]
    skip_temp_dir_cleanup: bool,
    /// The archive, or the folder that it goes to; `-` is standard output
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
}

pub(crate) async fn run(command: &Command) -> Result<()> {
    let Command::Diags(diags) = command;
    let store = connection::open().await?;
    let (mut archive, target) = begin(
        "calico-diagnostics",
        diags.output.as_deref(),
        SystemTime::now(),
    )?;
    archive.text("version.txt", &crate::version::client())?;
    resources(&mut archive, store.as_ref()).await?;
    if let Some(cluster) = connection::cluster().await? {
        kubernetes::collect(&mut archive, &cluster, diags).await?;
    }
    conclude(archive, &target)
}

/// Every kind as the daemons see it. Pods are there as WorkloadEndpoints: their own form has the environment of programs.
async fn resources<W: std::io::Write>(
    archive: &mut Archive<W>,
    store: &dyn Datastore,
) -> Result<()> {
    for kind in Kind::ALL.iter().copied() {
        if kind == Kind::K8sPod {
            continue;
        }
        let name = format!("resources/{}.yaml", kind.plural());
        match converted::list(store, kind, None).await {
            Ok(found) if found.is_empty() => {}
            Ok(found) => {
                let items: Vec<Value> = found.iter().map(|object| shown(object)).collect();
                let list = json!({
                    "apiVersion": kind.api_version(), "kind": format!("{kind}List"), "metadata": {}, "items": items
                });
                let text = serde_saphyr::to_string(&list).context("cannot write YAML");
                archive.result(&name, text)?;
            }
            Err(error) => archive.lacks(&name, &error.to_string()),
        }
    }
    Ok(())
}

/// An object without what nobody reads here: the managed fields, and the manifest that it was applied with.
fn shown(object: &AnyResource) -> Value {
    shown_value(object.to_json())
}

/// The same of its JSON.
pub(super) fn shown_value(mut value: Value) -> Value {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    value
}
