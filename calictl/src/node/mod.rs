//! `calictl node`: the node that this command runs on.

mod checksystem;
mod path;

use crate::{bgp_table, output, sockets};
use anyhow::{Context, Result, bail};
use cali_control::paths::run_dir;
use cali_control::status::{
    BgpRequest, BgpResponse, BgpStatus, NodeRequest, NodeResponse, NodeStatus,
};
use clap::{Subcommand, ValueEnum};
use serde_json::json;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Whether Cali runs here, and its BGP peers
    Status {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Try out whether this host, and the paths to the other nodes, can do what Cali asks of them
    Checksystem {
        /// Accepted as `calicoctl` does and not read: what the kernel can do is tried out
        #[arg(short = 'f', long, value_name = "PATH")]
        kernel_config: Option<std::path::PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

pub(crate) async fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Status { output } => status(*output).await,
        Command::Checksystem { .. } => checksystem::run().await,
    }
}

async fn status(format: Output) -> Result<ExitCode> {
    let run_dir = run_dir();
    let node = match sockets::node(&run_dir, NodeRequest::Status).await {
        Ok(NodeResponse::Status(status)) => Some(status),
        Ok(other) => bail!("the node answered {other:?}"),
        Err(error) if refused(&error) => None,
        Err(error) => return Err(error.context("cali-node does not answer")),
    };
    let bgp = match sockets::bgp(&run_dir, BgpRequest::Status).await {
        Ok(BgpResponse::Status(status)) => Some(status),
        Ok(other) => bail!("bgpd answered {other:?}"),
        Err(error) if refused(&error) => None,
        Err(error) => return Err(error.context("bgpd does not answer")),
    };
    if format == Output::Json {
        output::line(serde_json::to_string_pretty(
            &json!({"node": node, "bgp": bgp}),
        )?);
        return Ok(if node.is_some() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let Some(node) = node else {
        bail!("Calico process is not running.");
    };
    output::write(render(&node, bgp.as_ref(), now()?));
    Ok(ExitCode::SUCCESS)
}

/// Nobody listens: the daemon does not run (as opposed to: it does not answer).
fn refused(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind as Kind;
    let kinds = [Kind::NotFound, Kind::ConnectionRefused];
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|error| kinds.contains(&error.kind()))
}

/// First what scripts know, then what only we can say.
fn render(node: &NodeStatus, bgp: Option<&BgpStatus>, now: u64) -> String {
    let mut text = "Calico process is running.\n\n".to_owned();
    match bgp {
        Some(bgp) => text.push_str(&bgp_table::render(bgp, now)),
        None => text.push_str("The BGP backend process (bgpd) is not running.\n\n"),
    }
    for part in node.readiness.iter().filter(|part| !part.ready) {
        text.push_str(&format!(
            "Not ready: {}: {}\n",
            part.part,
            part.reason.as_deref().unwrap_or("no reason given")
        ));
    }
    for object in &node.quarantined {
        let causes = if object.caused_by.is_empty() {
            String::new()
        } else {
            format!(" (from {})", object.caused_by.join(", "))
        };
        text.push_str(&format!(
            "Quarantined: {}: {}{causes}\n",
            object.object, object.reason
        ));
    }
    for notice in &node.notices {
        text.push_str(&format!("Note: {notice}\n"));
    }
    text
}

pub(crate) fn now() -> Result<u64> {
    Ok(SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock stands before 1970")?
        .as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_control::status::{Quarantined, Readiness};

    #[test]
    fn what_is_wrong_stands_below_the_tables() {
        let node = NodeStatus {
            node: "n".into(),
            version: "0".into(),
            pid: 1,
            started_at: 0,
            ipv4: None,
            ipv6: None,
            readiness: vec![
                Readiness {
                    part: "policy".into(),
                    ready: true,
                    reason: None,
                },
                Readiness {
                    part: "datastore".into(),
                    ready: false,
                    reason: Some("not in sync".into()),
                },
            ],
            quarantined: vec![Quarantined {
                object: "route 10.0.0.0/26".into(),
                reason: "no such device".into(),
                caused_by: vec!["BlockAffinity(n-10-0-0-0-26)".into()],
            }],
            notices: vec!["a kernel without nexthop objects".into()],
            bgpd_pid: None,
        };
        let expected = "\
Calico process is running.

The BGP backend process (bgpd) is not running.

Not ready: datastore: not in sync
Quarantined: route 10.0.0.0/26: no such device (from BlockAffinity(n-10-0-0-0-26))
Note: a kernel without nexthop objects
";
        assert_eq!(render(&node, None, 0), expected);
    }
}
