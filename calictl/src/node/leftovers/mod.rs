//! `calictl node takeover` and `calictl node cleanup`: what Calico, flannel or Cali itself has left on this host, removed.
//!
//! [`host`] reads what is there, [`plan`] decides (pure: what goes, in which order, and what stays for which reason), [`apply`]
//! does it. What is nobody's known left-over stays and, where it looks like one, is named with the reason.
//!
//! Without `--yes` nothing is changed. Both commands can be repeated: what is gone already is no error. They refuse to start
//! while the programs whose traces they remove still run in this host's network: those would only write them again.

mod apply;
mod host;
mod iptables;
mod owner;
mod plan;

use crate::output::{self, Style};
use anyhow::{Context, Result, bail};
use cali_netlink::{IpNetwork, Netlink};
use clap::{Args, ValueEnum};
use owner::Owner;
use plan::{Plan, Wish};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(crate) struct Takeover {
    /// Whose left-overs
    #[arg(value_enum, value_name = "PREDECESSOR")]
    from: Predecessor,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
pub(crate) struct Cleanup {
    /// Remove the embedded datastore (cali.db) as well, and with it every resource of the cluster
    #[arg(long)]
    datastore: bool,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Predecessor {
    /// Chains, sets, tables, routes, rules, devices and files of a Calico node that was stopped
    Calico,
    /// Devices, chains, host-gw routes and files of a flannel daemon that was stopped
    Flannel,
}

#[derive(Debug, Args)]
struct How {
    /// Do it; without this flag it is only shown what would be done
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
    /// Only show what would be done, as without any flag
    #[arg(long)]
    dry_run: bool,
    /// Cut off running pods too: remove their interfaces
    #[arg(long)]
    pods: bool,
    /// A range of pods' addresses whose routes may go, beside those that the datastore and the left-overs name
    #[arg(long = "pool", value_name = "CIDR")]
    pools: Vec<IpNetwork>,
    /// Where the host's files are seen
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    root: PathBuf,
    /// How to show it
    #[arg(short, long, value_enum, default_value = "table")]
    output: super::Output,
}

pub(super) async fn takeover(arguments: &Takeover) -> Result<ExitCode> {
    let owner = match arguments.from {
        Predecessor::Calico => Owner::Calico,
        Predecessor::Flannel => Owner::Flannel,
    };
    run(owner, &arguments.how, false).await
}

pub(super) async fn cleanup(arguments: &Cleanup) -> Result<ExitCode> {
    run(Owner::Cali, &arguments.how, arguments.datastore).await
}

async fn run(owner: Owner, how: &How, datastore: bool) -> Result<ExitCode> {
    let netlink = Netlink::current().context("cannot talk to the kernel")?;
    let host = host::read(owner, &netlink, &how.root)
        .context("cannot read what is on this host (that takes root privileges)")?;
    if let Some(running) = host.running.first() {
        bail!(
            "{running} still runs here and would write again what is removed: stop it first ({})",
            owner.how_to_stop()
        );
    }
    let known = host::known(owner, &how.pools, &host, &how.root).await;
    let wish = Wish {
        pods: how.pods,
        datastore,
    };
    let plan = plan::plan(owner, &host, &known, &wish);
    let results = if how.yes {
        apply::apply(&netlink, &how.root, &plan.steps).await
    } else {
        Vec::new()
    };
    let failed = results.iter().filter(|result| result.is_err()).count();
    match how.output {
        super::Output::Table => show(owner, how.yes, &plan, &results),
        super::Output::Json => output::line(json(owner, &plan, &results)),
    }
    if failed > 0 {
        bail!("{failed} of {} could not be removed", plan.steps.len());
    }
    Ok(ExitCode::SUCCESS)
}

fn show(owner: Owner, done: bool, plan: &Plan, results: &[Result<()>]) {
    if plan.steps.is_empty() {
        output::line(format!("Nothing of {owner} is left to remove."));
    }
    for (at, step) in plan.steps.iter().enumerate() {
        let word = match results.get(at) {
            None => Style::TITLE.paint("would remove"),
            Some(Ok(())) => Style::GOOD.paint("removed"),
            Some(Err(error)) => {
                output::line(format!("{}  {step}: {error:#}", Style::BAD.paint("FAILED")));
                continue;
            }
        };
        output::line(format!("{word}  {step}"));
    }
    for kept in &plan.kept {
        output::line(format!(
            "{}  {}: {}",
            Style::DIM.paint("stays"),
            kept.object,
            kept.reason
        ));
    }
    for note in &plan.notes {
        output::line(note);
    }
    if !done && !plan.steps.is_empty() {
        output::line("Nothing was changed. Do it with --yes.");
    }
}

fn json(owner: Owner, plan: &Plan, results: &[Result<()>]) -> String {
    let steps = plan.steps.iter().enumerate().map(|(at, step)| {
        let (state, error) = match results.get(at) {
            None => ("planned", None),
            Some(Ok(())) => ("removed", None),
            Some(Err(error)) => ("failed", Some(format!("{error:#}"))),
        };
        serde_json::json!({"object": step.to_string(), "state": state, "error": error})
    });
    let kept = plan
        .kept
        .iter()
        .map(|kept| serde_json::json!({"object": kept.object, "reason": kept.reason}));
    let all = serde_json::json!({
        "of": owner.to_string(),
        "steps": steps.collect::<Vec<_>>(),
        "kept": kept.collect::<Vec<_>>(),
        "notes": plan.notes,
    });
    format!("{all:#}")
}
