//! `calictl cluster diags`: what the datastore holds, and, where the cluster is Kubernetes, what `kubectl` shows and logs.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use cali_api::{AnyResource, Kind};
use cali_datastore::Datastore;
use clap::{Args, Subcommand};
use futures::StreamExt;
use serde_json::{Value, json};

use super::{Archive, begin, commands, conclude, duration};
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
    since: Option<Duration>,
    /// Logs and node archives of at most so many pods of each component
    #[arg(long, default_value_t = 5, value_name = "COUNT")]
    max_logs: usize,
    /// So many pods are asked at the same time
    #[arg(long, default_value_t = 10, value_name = "COUNT")]
    max_parallelism: usize,
    /// The pods of these nodes come first: n1,n2
    #[arg(long, value_delimiter = ',', value_name = "NODES")]
    focus_nodes: Vec<String>,
    /// Accepted as `calicoctl` does; there is no temporary folder
    #[arg(long)]
    skip_temp_dir_cleanup: bool,
    /// The archive, or the folder that it goes to; `-` is standard output
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
}

/// What `kubectl` is asked, beside logs.
const KUBECTL: [(&str, &str); 6] = [
    ("kubernetes/version.txt", "version"),
    ("kubernetes/nodes.txt", "get nodes -o wide"),
    ("kubernetes/nodes.yaml", "get nodes -o yaml"),
    ("kubernetes/pods.txt", "get pods -A -o wide"),
    (
        "kubernetes/events.txt",
        "get events -A --sort-by=.metadata.creationTimestamp",
    ),
    (
        "kubernetes/workloads.yaml",
        "get daemonsets,deployments,configmaps -A -l app.kubernetes.io/part-of=cali -o yaml",
    ),
];

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
    if let Some(kubectl) = connection::kubectl()? {
        cluster(&mut archive, &kubectl, diags).await?;
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
    let mut value = object.to_json();
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

async fn cluster<W: std::io::Write>(
    archive: &mut Archive<W>,
    kubectl: &[String],
    diags: &Diags,
) -> Result<()> {
    for (name, line) in KUBECTL {
        let words: Vec<&str> = line.split(' ').collect();
        let octets = ask(kubectl, &words).await;
        archive.result(name, octets.map(text))?;
    }
    let selector = ["get", "pods", "-A", "-l", "app.kubernetes.io/part-of=cali"];
    let listed = ask(kubectl, &[&selector[..], &["-o", "json"]].concat()).await;
    let pods = match listed.and_then(|octets| Ok(serde_json::from_slice::<Value>(&octets)?)) {
        Ok(list) => chosen(&list, &diags.focus_nodes, diags.max_logs),
        Err(error) => {
            archive.lacks("logs of Cali's pods", &format!("{error:#}"));
            return Ok(());
        }
    };
    let asked = pods.iter().map(|pod| of_pod(kubectl, pod, diags));
    let mut answers =
        futures::stream::iter(asked).buffer_unordered(diags.max_parallelism.clamp(1, 100));
    while let Some(pieces) = answers.next().await {
        for (name, octets) in pieces {
            match octets {
                Ok(octets) if name.ends_with(".tar.gz") => archive.octets(&name, &octets)?,
                other => archive.result(&name, other.map(text))?,
            }
        }
    }
    Ok(())
}

fn text(octets: Vec<u8>) -> String {
    String::from_utf8_lossy(&octets).into_owned()
}

async fn ask(kubectl: &[String], words: &[&str]) -> Result<Vec<u8>> {
    let all: Vec<&str> = kubectl
        .iter()
        .map(String::as_str)
        .chain(words.iter().copied())
        .collect();
    commands::argv(&all).await
}

/// A pod of Cali.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pod {
    namespace: String,
    name: String,
    component: String,
    node: String,
}

/// The pods of each component, those of the nodes in focus first, `limit` of each component. Pure.
fn chosen(list: &Value, focus: &[String], limit: usize) -> Vec<Pod> {
    let word = |pod: &Value, pointer: &str| {
        let found = pod.pointer(pointer).and_then(Value::as_str);
        found.unwrap_or_default().to_owned()
    };
    let items = list["items"].as_array().map_or(&[][..], Vec::as_slice);
    let mut pods: Vec<Pod> = items
        .iter()
        .map(|pod| Pod {
            namespace: word(pod, "/metadata/namespace"),
            name: word(pod, "/metadata/name"),
            component: word(pod, "/metadata/labels/app.kubernetes.io~1name"),
            node: word(pod, "/spec/nodeName"),
        })
        .collect();
    pods.sort_by_key(|pod| {
        let place = focus.iter().position(|node| *node == pod.node);
        (
            pod.component.clone(),
            place.unwrap_or(focus.len()),
            pod.name.clone(),
        )
    });
    let mut taken: std::collections::BTreeMap<String, usize> = std::collections::BTreeMap::new();
    pods.retain(|pod| {
        let count = taken.entry(pod.component.clone()).or_default();
        *count += 1;
        *count <= limit
    });
    pods
}

/// Its logs; of a node's pod also that node's own archive.
async fn of_pod(kubectl: &[String], pod: &Pod, diags: &Diags) -> Vec<(String, Result<Vec<u8>>)> {
    let since = diags
        .since
        .map(|since| format!("--since={}s", since.as_secs()));
    let at = ["-n", &pod.namespace];
    let mut words = vec!["logs"];
    words.extend(at);
    words.extend([pod.name.as_str(), "--all-containers", "--tail=20000"]);
    words.extend(since.as_deref());
    let mut pieces = vec![(
        format!("logs/{}/{}.txt", pod.component, pod.name),
        ask(kubectl, &words).await,
    )];
    if pod.component == "cali-node" {
        let mut words = vec!["exec"];
        words.extend(at);
        words.extend([&pod.name, "--", "calictl", "node", "diags", "--output", "-"]);
        words.extend(since.as_deref());
        pieces.push((
            format!("nodes/{}.tar.gz", pod.node),
            ask(kubectl, &words).await,
        ));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_of_nodes_in_focus_come_first_and_each_component_has_its_limit() {
        let pod = |name: &str, component: &str, node: &str| {
            json!({
                "metadata": {"namespace": "kube-system", "name": name, "labels": {"app.kubernetes.io/name": component}},
                "spec": {"nodeName": node},
            })
        };
        let list = json!({"items": [
            pod("node-a", "cali-node", "n1"),
            pod("node-b", "cali-node", "n2"),
            pod("node-c", "cali-node", "n3"),
            pod("typha-a", "cali-typha", "n1"),
        ]});
        let names = |focus: &[&str], limit| {
            let focus: Vec<String> = focus.iter().map(|node| (*node).to_owned()).collect();
            chosen(&list, &focus, limit)
                .into_iter()
                .map(|pod| pod.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&["n3", "n2"], 2), ["node-c", "node-b", "typha-a"]);
        assert_eq!(names(&[], 1), ["node-a", "typha-a"]);
    }
}
