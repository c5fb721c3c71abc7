//! The Kubernetes part of `cluster diags`, through the API server: nodes, pods and events as `kubectl get` shows them, and of the
//! pods of Cali all that `kubectl describe` and `kubectl logs` would say. Only a node's own archive needs `kubectl` itself (exec).

use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use kube::Client;
use kube::core::Request;
use kube::core::params::ListParams;
use kube::core::subresource::LogParams;
use serde_json::Value;

use super::cluster::{Diags, shown_value};
use super::{Archive, PIECE_LIMIT, commands};
use crate::columns;
use crate::connection::Cluster;

/// One answer of the API server.
const LIMIT: Duration = Duration::from_secs(30);
/// Objects in one page of a list.
const PAGE: u32 = 500;
/// Lines of one container's log.
const LINES: i64 = 20_000;
/// What all objects of Cali carry.
const LABEL: &str = "app.kubernetes.io/part-of=cali";
/// Asks for what `kubectl get` prints.
const AS_TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

/// A piece of the archive, or why it is missing.
type Piece = (String, Result<Vec<u8>>);

pub(super) async fn collect<W: std::io::Write>(
    archive: &mut Archive<W>,
    cluster: &Cluster,
    diags: &Diags,
) -> Result<()> {
    let client = &cluster.client;
    let version = within(client.apiserver_version()).await;
    let version = version.and_then(|version| Ok(serde_json::to_string_pretty(&version)?));
    archive.result("kubernetes/version.json", version)?;
    for (name, path) in [
        ("nodes", "/api/v1/nodes"),
        ("pods", "/api/v1/pods"),
        ("events", "/api/v1/events"),
    ] {
        let table = table(client, path, "").await;
        archive.result(&format!("kubernetes/{name}.txt"), table)?;
    }
    for (name, path, label) in [
        ("nodes", "/api/v1/nodes", ""),
        ("daemonsets", "/apis/apps/v1/daemonsets", LABEL),
        ("deployments", "/apis/apps/v1/deployments", LABEL),
        ("configmaps", "/api/v1/configmaps", LABEL),
    ] {
        let found = list(client, path, label).await;
        let text = found.and_then(|items| yaml(&items));
        archive.result(&format!("kubernetes/{name}.yaml"), text)?;
    }
    let pods = match list(client, "/api/v1/pods", LABEL).await {
        Ok(pods) => chosen(&pods, &diags.focus_nodes, diags.max_logs),
        Err(error) => {
            archive.lacks("logs of Cali's pods", &format!("{error:#}"));
            return Ok(());
        }
    };
    let asked = pods.iter().map(|pod| of_pod(cluster, pod, diags));
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

async fn within<T>(answer: impl Future<Output = kube::Result<T>>) -> Result<T> {
    let answer = tokio::time::timeout(cali_lab::patient(LIMIT), answer).await;
    let answer = answer.with_context(|| format!("no answer within {LIMIT:?}"))?;
    answer.map_err(|error| match error {
        // Its words alone; the rest is how it was transported.
        kube::Error::Api(status) => anyhow::anyhow!("{}", status.message),
        other => other.into(),
    })
}

/// Page after page of a list, until all is there or more than an archive takes.
async fn pages(
    client: &Client,
    path: &str,
    label: &str,
    accept: Option<&'static str>,
) -> Result<Vec<Value>> {
    let (mut pages, mut size, mut next) = (Vec::new(), 0, None);
    loop {
        let mut parameters = ListParams::default().limit(PAGE).labels(label);
        parameters.continue_token = next;
        let mut request = Request::new(path).list(&parameters)?;
        if let Some(accept) = accept {
            request.headers_mut().insert("accept", accept.parse()?);
        }
        let answer = within(client.request_text(request)).await?;
        size += answer.len();
        let page: Value = serde_json::from_str(&answer).context("the answer is no JSON")?;
        let token = page.pointer("/metadata/continue").and_then(Value::as_str);
        next = token.filter(|token| !token.is_empty()).map(str::to_owned);
        pages.push(page);
        if next.is_none() || size > PIECE_LIMIT {
            return Ok(pages);
        }
    }
}

async fn list(client: &Client, path: &str, label: &str) -> Result<Vec<Value>> {
    let pages = pages(client, path, label, None).await?;
    let items = pages
        .into_iter()
        .filter_map(|mut page| match page["items"].take() {
            Value::Array(items) => Some(items),
            _ => None,
        });
    Ok(items.flatten().collect())
}

/// As `kubectl get -A -o wide` prints it, the oldest first.
async fn table(client: &Client, path: &str, label: &str) -> Result<String> {
    let pages = pages(client, path, label, Some(AS_TABLE)).await?;
    Ok(render(&pages))
}

/// The pages of a table as text. Pure.
fn render(pages: &[Value]) -> String {
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let columns = pages.first().map(|page| array(&page["columnDefinitions"]));
    let columns = columns.unwrap_or_default();
    let headings = columns
        .iter()
        .map(|column| columns::text(&column["name"]).to_uppercase());
    let mut headings: Vec<String> = std::iter::once("NAMESPACE".to_owned())
        .chain(headings)
        .collect();
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    for row in pages.iter().flat_map(|page| array(&page["rows"])) {
        let metadata = &row["object"]["metadata"];
        let cells = array(&row["cells"]);
        let cells = cells.iter().map(columns::text);
        let namespace = metadata["namespace"].as_str().unwrap_or_default();
        rows.push((
            columns::text(&metadata["creationTimestamp"]),
            std::iter::once(namespace.to_owned()).chain(cells).collect(),
        ));
    }
    rows.sort();
    let mut rows: Vec<Vec<String>> = rows.into_iter().map(|(_, cells)| cells).collect();
    if rows.iter().all(|cells| cells[0].is_empty()) {
        headings.remove(0);
        for cells in &mut rows {
            cells.remove(0);
        }
    }
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    columns::render(&headings, &rows)
}

fn yaml(items: &[Value]) -> Result<String> {
    let mut text = String::new();
    for item in items {
        let item = serde_saphyr::to_string(&shown_value(item.clone()));
        text.push_str("---\n");
        text.push_str(&item.context("cannot write YAML")?);
    }
    Ok(text)
}

/// A pod of Cali.
#[derive(Debug, Clone, PartialEq)]
struct Pod {
    namespace: String,
    name: String,
    component: String,
    node: String,
    /// Whether each container runs for the first time, by name.
    containers: Vec<(String, bool)>,
    object: Value,
}

/// The pods of each component, those of the nodes in focus first, `limit` of each component. Pure.
fn chosen(items: &[Value], focus: &[String], limit: usize) -> Vec<Pod> {
    let word = |pod: &Value, pointer: &str| {
        let found = pod.pointer(pointer).and_then(Value::as_str);
        found.unwrap_or_default().to_owned()
    };
    let mut pods: Vec<Pod> = items
        .iter()
        .map(|pod| Pod {
            namespace: word(pod, "/metadata/namespace"),
            name: word(pod, "/metadata/name"),
            component: word(pod, "/metadata/labels/app.kubernetes.io~1name"),
            node: word(pod, "/spec/nodeName"),
            containers: containers(pod),
            object: pod.clone(),
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

fn containers(pod: &Value) -> Vec<(String, bool)> {
    let all = |pointer: &str| pod.pointer(pointer).and_then(Value::as_array);
    let started_once = |name: &str, states: &str| {
        let states = all(states).into_iter().flatten();
        let mut own = states.filter(|state| state["name"] == name);
        own.all(|state| state["restartCount"].as_u64().unwrap_or(0) == 0)
    };
    let mut found = Vec::new();
    for (specs, states) in [
        ("/spec/initContainers", "/status/initContainerStatuses"),
        ("/spec/containers", "/status/containerStatuses"),
    ] {
        for container in all(specs).into_iter().flatten() {
            let name = columns::text(&container["name"]);
            let once = started_once(&name, states);
            found.push((name, once));
        }
    }
    found
}

/// Its description and logs; of a node's pod also that node's own archive.
async fn of_pod(cluster: &Cluster, pod: &Pod, diags: &Diags) -> Vec<Piece> {
    let folder = format!("pods/{}/{}", pod.component, pod.name);
    let description = describe(&cluster.client, pod).await.map(String::into_bytes);
    let mut pieces = vec![(format!("{folder}/description.txt"), description)];
    for (container, started_once) in &pod.containers {
        let log = |previous| log(&cluster.client, pod, container, previous, diags.since);
        let file = format!("{folder}/{container}");
        pieces.push((format!("{file}.log"), log(false).await));
        if !started_once {
            pieces.push((format!("{file}.previous.log"), log(true).await));
        }
    }
    if pod.component == "cali-node" {
        let since = diags
            .since
            .map(|since| format!("--since={}s", since.as_secs()));
        let mut words: Vec<&str> = cluster.kubectl.iter().map(String::as_str).collect();
        words.extend(["exec", "-n", &pod.namespace, &pod.name, "--"]);
        words.extend(["calictl", "node", "diags", "--output", "-"]);
        words.extend(since.as_deref());
        let archive = commands::argv(&words).await;
        pieces.push((format!("nodes/{}.tar.gz", pod.node), archive));
    }
    pieces
}

/// The pod as it is wanted and as it is, and what happened to it.
async fn describe(client: &Client, pod: &Pod) -> Result<String> {
    let path = format!("/api/v1/namespaces/{}/events", pod.namespace);
    let fields = format!("involvedObject.kind=Pod,involvedObject.name={}", pod.name);
    let mut request = Request::new(path).list(&ListParams::default().fields(&fields))?;
    request.headers_mut().insert("accept", AS_TABLE.parse()?);
    let events: Value = within(client.request(request)).await?;
    let object = yaml(std::slice::from_ref(&pod.object))?;
    Ok(format!("{object}---\n{}", render(&[events])))
}

async fn log(
    client: &Client,
    pod: &Pod,
    container: &str,
    previous: bool,
    since: Option<Duration>,
) -> Result<Vec<u8>> {
    let parameters = LogParams {
        container: Some(container.to_owned()),
        previous,
        since_seconds: since.and_then(|since| i64::try_from(since.as_secs()).ok()),
        tail_lines: Some(LINES),
        limit_bytes: i64::try_from(PIECE_LIMIT).ok(),
        timestamps: true,
        ..LogParams::default()
    };
    let path = format!("/api/v1/namespaces/{}/pods", pod.namespace);
    let request = Request::new(path).logs(&pod.name, &parameters)?;
    Ok(within(client.request_text(request)).await?.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_pods_of_nodes_in_focus_come_first_and_each_component_has_its_limit() {
        let pod = |name: &str, component: &str, node: &str| {
            json!({
                "metadata": {"namespace": "kube-system", "name": name, "labels": {"app.kubernetes.io/name": component}},
                "spec": {"nodeName": node},
            })
        };
        let list = [
            pod("node-a", "cali-node", "n1"),
            pod("node-b", "cali-node", "n2"),
            pod("node-c", "cali-node", "n3"),
            pod("typha-a", "cali-typha", "n1"),
        ];
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

    #[test]
    fn a_table_is_that_of_kubectl_and_a_container_that_was_restarted_has_two_logs() {
        let page = |name: &str, at: &str| {
            json!({
                "columnDefinitions": [{"name": "Name"}, {"name": "Restarts"}],
                "rows": [{
                    "cells": [name, 3],
                    "object": {"metadata": {"namespace": "shop", "creationTimestamp": at}},
                }],
            })
        };
        let pages = [
            page("late", "2026-01-02T00:00:00Z"),
            page("early", "2026-01-01T00:00:00Z"),
        ];
        let expected = "\
NAMESPACE   NAME    RESTARTS
shop        early   3
shop        late    3
";
        assert_eq!(render(&pages), expected);
        let pod = json!({
            "spec": {"initContainers": [{"name": "install"}], "containers": [{"name": "node"}]},
            "status": {"containerStatuses": [{"name": "node", "restartCount": 2}]},
        });
        let expected = [("install".to_owned(), true), ("node".to_owned(), false)];
        assert_eq!(containers(&pod), expected);
    }
}
