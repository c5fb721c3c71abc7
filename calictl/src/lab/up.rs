//! `calictl lab up`: from a topology file to pods that talk, a line for each step.

use super::{places, root, show};
use crate::manifests::{self, Document};
use crate::output::{self, Style};
use anyhow::{Context, Result, bail};
use cali_api::{AnyResource, Kind};
use cali_control::status::{BgpStatus, NodeRequest, NodeResponse, NodeStatus, SessionState};
use cali_datastore::Datastore;
use cali_lab::plan::{Plan, missing_peers, plan};
use cali_lab::pods::{Pod, Runtime};
use cali_lab::state::Folder;
use cali_lab::{bring_up, supervise, topology};
use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long nodes may take to become ready, and sessions to be established.
const READY_LIMIT: Duration = Duration::from_secs(40);

/// Progress on one line per step.
struct Steps {
    start: Instant,
}

impl Steps {
    fn done(&self, what: &str, result: impl std::fmt::Display) {
        let seconds = self.start.elapsed().as_secs_f32();
        let mark = if std::io::stdout().is_terminal() {
            Style::GOOD.paint("✓")
        } else {
            "ok".to_owned()
        };
        output::line(format_args!(
            "{mark} {what:<12} {result} {}",
            Style::DIM.paint(format_args!("({seconds:.1} s)"))
        ));
    }
}

pub(super) fn run(file: &Path, then_show: bool) -> Result<()> {
    let steps = Steps {
        start: Instant::now(),
    };
    let topology = topology::read(file)?;
    let places = places()?;
    unpack_peers(&missing_peers(&topology, &places), &steps)?;
    let plan = plan(&topology, &places).with_context(|| format!("{}", file.display()))?;
    bring_up::check_host()?;
    // All manifests are read before anything is made: a bad one leaves nothing behind.
    let documents = manifests::read(&plan.manifests, false, None)?;
    steps.done(
        "topology",
        format_args!(
            "{}: {} nodes, {} links, {} objects",
            plan.lab,
            plan.nodes.len(),
            plan.cables.len(),
            documents.len()
        ),
    );

    let folder = Folder::new(&root(), &plan.lab);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(async {
        let made = bring_up::namespaces(&plan).await?;
        bring_up::management(&plan).await?;
        let laid = bring_up::cables(&plan).await?;
        let ran = bring_up::exec(&plan, &folder)?;
        steps.done(
            "network",
            format_args!("{made} namespaces, {laid} links, {ran} commands"),
        );

        let store = open_store(&plan)?;
        manifests::check(store.as_ref(), &documents).await?;
        let (created, changed) = apply(store.as_ref(), &documents).await?;
        steps.done(
            "datastore",
            format_args!(
                "{created} objects created, {changed} changed, {} as they were",
                documents.len() - created - changed
            ),
        );

        folder
            .save_plan(&plan)
            .context("cannot write the lab's plan")?;
        let outdated = supervise::end_outdated(&folder).context("cannot end outdated programs")?;
        bring_up::supervisor(&plan, &folder, &places.programs.join("calictl"))?;
        wait_for_nodes(&plan).await?;
        let renewed = if outdated.is_empty() {
            String::new()
        } else {
            format!(", {} renewed", outdated.len())
        };
        steps.done(
            "programs",
            format_args!("{} running{renewed}", plan.processes.len()),
        );

        let pods = pods(store.as_ref(), &plan).await?;
        let count = pods.len();
        let (lab, lab_folder, programs) = (plan.clone(), folder.clone(), places.programs.clone());
        tokio::task::spawn_blocking(move || run_pods(&lab, &lab_folder, &programs, &pods))
            .await
            .context("cannot run pods")??;
        steps.done("pods", format_args!("{count} running"));

        let sessions = wait_for_sessions(&plan, has_mesh(store.as_ref()).await?).await?;
        steps.done("bgp", format_args!("{sessions} sessions established"));
        anyhow::Ok(())
    })?;
    let name = &plan.lab;
    output::line(format_args!(
        "lab {name} is up: calictl lab status | exec NODE -- COMMAND | show | down"
    ));
    if then_show {
        output::line("");
        show::run(&folder)?;
    }
    Ok(())
}

/// Unpacks the packages of other routing daemons that the topology needs, with the script of the repository that this
/// executable was built in. Without the script nothing is done, and planning says what to run.
fn unpack_peers(missing: &BTreeSet<&'static str>, steps: &Steps) -> Result<()> {
    let own = super::programs()?;
    let script = own
        .ancestors()
        .map(|folder| folder.join("scripts/peers"))
        .find(|script| script.is_file());
    let Some(script) = script.filter(|_| !missing.is_empty()) else {
        return Ok(());
    };
    let names: Vec<&str> = missing.iter().copied().collect();
    let output = std::process::Command::new(&script)
        .args(&names)
        .output()
        .with_context(|| format!("cannot run {}", script.display()))?;
    if !output.status.success() {
        bail!(
            "{} {} failed: {}",
            script.display(),
            names.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    steps.done("peers", format_args!("unpacked {}", names.join(", ")));
    Ok(())
}

/// The lab's datastore, as its nodes have it.
pub(super) fn open_store(plan: &Plan) -> Result<Arc<dyn Datastore>> {
    let path = plan
        .datastore_env
        .get("CALI_SQLITE_PATH")
        .context("the topology names no CALI_SQLITE_PATH")?;
    let store = cali_datastore::sqlite::Sqlite::open(Path::new(path))
        .context("cannot open the lab's datastore")?;
    Ok(Arc::new(store))
}

async fn apply(store: &dyn Datastore, documents: &[Document]) -> Result<(usize, usize)> {
    let (mut created, mut changed) = (0, 0);
    for Document { value: object, .. } in documents {
        let object = match object.kind() {
            Kind::Node => beside_what_runs(store, object).await?,
            _ => object.clone(),
        };
        let key = object.key();
        let applied = store
            .apply(object)
            .await
            .with_context(|| format!("cannot apply {key}"))?;
        match applied.outcome {
            cali_datastore::Outcome::Created => created += 1,
            cali_datastore::Outcome::Updated => changed += 1,
            cali_datastore::Outcome::Unchanged => {}
        }
    }
    Ok((created, changed))
}

/// A node as the topology's manifests have it, over what the node that runs has written of itself: its addresses stay.
async fn beside_what_runs(store: &dyn Datastore, node: &AnyResource) -> Result<AnyResource> {
    let key = node.key();
    match store.get(&key).await {
        Ok(found) => laid_over(&found.object, node).with_context(|| format!("cannot apply {key}")),
        Err(cali_datastore::Error::NotFound { .. }) => Ok(node.clone()),
        Err(error) => Err(anyhow::Error::new(error).context(format!("cannot read {key}"))),
    }
}

fn laid_over(stored: &AnyResource, manifest: &AnyResource) -> Result<AnyResource> {
    let mut merged = stored.to_json();
    json_patch::merge(&mut merged, &manifest.to_json());
    let mut merged = AnyResource::from_json(merged)?;
    merged.metadata_mut().resource_version = None;
    Ok(merged)
}

/// Pods of the datastore that belong on a node of this lab.
async fn pods(store: &dyn Datastore, plan: &Plan) -> Result<Vec<Pod>> {
    let list = store
        .list(Kind::K8sPod, None)
        .await
        .context("cannot list the pods")?;
    let mut pods = Vec::new();
    for item in &list.items {
        let AnyResource::K8sPod(pod) = item.object.as_ref() else {
            continue;
        };
        let spec = &pod.spec;
        let Some(node) = spec
            .node_name
            .as_ref()
            .filter(|node| plan.nodes.get(*node).is_some_and(|node| node.hosts_pods))
        else {
            continue;
        };
        let ports = |protocol: &str| {
            let of_container = |ports: &Vec<k8s_openapi::api::core::v1::ContainerPort>| {
                let wanted = ports
                    .iter()
                    .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == protocol);
                wanted
                    .filter_map(|port| u16::try_from(port.container_port).ok())
                    .collect::<Vec<_>>()
            };
            spec.containers
                .iter()
                .filter_map(|container| container.ports.as_ref())
                .flat_map(of_container)
                .collect()
        };
        pods.push(Pod {
            namespace: pod
                .metadata
                .namespace
                .clone()
                .unwrap_or_else(|| "default".to_owned()),
            name: pod.metadata.name.clone(),
            node: node.clone(),
            tcp: ports("TCP"),
            udp: ports("UDP"),
        });
    }
    Ok(pods)
}

fn run_pods(plan: &Plan, folder: &Folder, programs: &Path, pods: &[Pod]) -> Result<()> {
    let runtime = Runtime {
        plan,
        folder,
        programs,
    };
    for running in runtime.list().context("cannot read the lab's pods")? {
        if !pods.contains(&running.pod) {
            runtime.remove(&running.pod)?;
        }
    }
    for pod in pods {
        runtime.ensure(pod)?;
    }
    Ok(())
}

/// Asks until every node says it is ready, and says what is missing when the limit is reached.
async fn wait_for_nodes(plan: &Plan) -> Result<()> {
    let limit = Instant::now() + cali_lab::patient(READY_LIMIT);
    for (name, node) in plan.nodes.iter().filter(|(_, node)| node.hosts_pods) {
        loop {
            let missing = match node_status(node).await {
                Ok(status) => {
                    let missing: Vec<String> = status
                        .readiness
                        .iter()
                        .filter(|part| !part.ready)
                        .map(|part| {
                            format!(
                                "{}: {}",
                                part.part,
                                part.reason.as_deref().unwrap_or("not ready")
                            )
                        })
                        .collect();
                    if missing.is_empty() {
                        break;
                    }
                    missing.join("; ")
                }
                Err(error) => format!("{error:#}"),
            };
            if Instant::now() >= limit {
                bail!(
                    "{name} is not ready after {} s: {missing}; its log is in {}",
                    cali_lab::patient(READY_LIMIT).as_secs(),
                    plan.folder.join(name).join("log").display()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

pub(super) async fn node_status(node: &cali_lab::plan::PlannedNode) -> Result<NodeStatus> {
    match crate::sockets::node(&show::run_dir(node), NodeRequest::Status).await? {
        NodeResponse::Status(status) => Ok(status),
        other => bail!("the node answered {other:?}"),
    }
}

/// Whether the nodes peer with each other without being told to (the default).
async fn has_mesh(store: &dyn Datastore) -> Result<bool> {
    let list = store
        .list(Kind::BGPConfiguration, None)
        .await
        .context("cannot list the BGP configurations")?;
    let disabled = |item: &cali_datastore::Versioned| {
        matches!(item.object.as_ref(), AnyResource::BGPConfiguration(config)
            if config.metadata.name == "default" && config.spec.node_to_node_mesh_enabled == Some(false))
    };
    Ok(!list.items.iter().any(disabled))
}

/// Waits until every configured session of every node is established. Returns their number.
async fn wait_for_sessions(plan: &Plan, mesh: bool) -> Result<usize> {
    let limit = Instant::now() + cali_lab::patient(READY_LIMIT);
    let nodes: Vec<_> = plan
        .nodes
        .iter()
        .filter(|(_, node)| node.hosts_pods)
        .collect();
    loop {
        let mut established = 0;
        let mut waiting = Vec::new();
        for (name, node) in &nodes {
            match show::bgp_status(node).await {
                Ok(status) => {
                    established += sessions(&status, SessionState::Established).count();
                    let down = status
                        .peers
                        .iter()
                        .filter(|peer| peer.state != SessionState::Established);
                    waiting.extend(
                        down.map(|peer| {
                            format!("{name} – {} {}", peer.address, peer.state.as_str())
                        }),
                    );
                    // In a mesh every node peers with every other one; without it, with somebody.
                    let least = if mesh { nodes.len() - 1 } else { 1 };
                    if status.peers.len() < least {
                        waiting.push(format!("{name} has {} peers", status.peers.len()));
                    }
                }
                Err(error) => waiting.push(format!("{name}: {error:#}")),
            }
        }
        if waiting.is_empty() {
            return Ok(established);
        }
        if Instant::now() >= limit {
            bail!(
                "not all sessions are established after {} s: {}",
                cali_lab::patient(READY_LIMIT).as_secs(),
                waiting.join("; ")
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn sessions(
    status: &BgpStatus,
    state: SessionState,
) -> impl Iterator<Item = &cali_control::status::PeerStatus> {
    status.peers.iter().filter(move |peer| peer.state == state)
}
