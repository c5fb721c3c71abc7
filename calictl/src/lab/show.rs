//! What a person wants to see of a lab: sessions, routes, and who reaches whom, measured with real packets.

mod matrix;

use crate::bgp_table;
use crate::output::{self, Style};
use anyhow::{Context, Result, bail};
use cali_control::status::{BgpRequest, BgpResponse, BgpStatus};
use cali_lab::plan::PlannedNode;
use cali_lab::pods::{RunningPod, Runtime};
use cali_lab::state::Folder;
use cali_netlink::NetNs;
use matrix::Family;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// Prints everything; the exit code says whether the matrix is as the policies say.
pub(super) fn run(folder: &Folder) -> Result<ExitCode> {
    let plan = folder.plan().context("cannot read the lab's plan")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let nodes: Vec<(&String, &PlannedNode)> = plan
        .nodes
        .iter()
        .filter(|(_, node)| node.hosts_pods)
        .collect();
    for (name, node) in &nodes {
        title(format_args!("calictl node status    ({name})"));
        let status = runtime
            .block_on(bgp_status(node))
            .with_context(|| format!("bgpd of {name}"))?;
        output::line("Calico process is running.\n");
        output::write(bgp_table::render(&status, now(), false));
    }
    if let Some((name, node)) = nodes.first() {
        title(format_args!("ip route    ({name})"));
        output::line(routes(node, "-4")?);
    }
    let programs = super::programs()?;
    let pods = Runtime {
        plan: &plan,
        folder,
        programs: &programs,
    }
    .list()
    .context("cannot read the lab's pods")?;
    let has_ipv6 = |pod: &RunningPod| pod.addresses.iter().any(IpAddr::is_ipv6);
    let dual = pods.iter().any(has_ipv6);
    if let Some((name, node)) = nodes.first().filter(|_| dual) {
        title(format_args!("ip -6 route    ({name})"));
        output::line(routes(node, "-6")?);
    }
    let store = runtime.block_on(async { super::up::open_store(&plan) })?;
    let mut agrees = true;
    let families: &[Family] = if dual {
        &[Family::Ipv4, Family::Ipv6]
    } else {
        &[Family::Ipv4]
    };
    for family in families {
        let matrix = runtime.block_on(matrix::measure(&store, &pods, *family))?;
        title(format_args!(
            "{} connections, measured with real packets, beside what the policies say",
            family.name()
        ));
        output::write(matrix.render());
        agrees &= matrix.agrees();
    }
    Ok(if agrees {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn title(text: impl std::fmt::Display) {
    output::line(Style::TITLE.paint(format_args!("── {text} ──")));
}

fn routes(node: &PlannedNode, family: &'static str) -> Result<String> {
    let namespace = NetNs::open(&node.namespace)?;
    let output = namespace
        .run(|| {
            std::process::Command::new("ip")
                .args([family, "route"])
                .output()
        })?
        .context("cannot run ip route")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn run_dir(node: &PlannedNode) -> PathBuf {
    node.env
        .get("CALI_RUN_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(cali_control::paths::run_dir)
}

pub(super) async fn bgp_status(node: &PlannedNode) -> Result<BgpStatus> {
    match crate::sockets::bgp(&run_dir(node), BgpRequest::Status).await? {
        BgpResponse::Status(status) => Ok(status),
        other => bail!("bgpd answered {other:?}"),
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
