//! Carries a plan out, step by step. What is gone already is no error, and a step that fails does not stop the next.

use super::plan::Step;
use anyhow::{Context, Result, bail};
use cali_netlink::ipset::IpSets;
use cali_netlink::nft::Transaction;
use cali_netlink::{Change, Netlink, Nft};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The kernel lets go of a set a moment after the rules that looked it up are gone.
const SETS_LIMIT: Duration = Duration::from_secs(5);

pub(super) async fn apply(netlink: &Netlink, root: &Path, steps: &[Step]) -> Vec<Result<()>> {
    let mut results = Vec::with_capacity(steps.len());
    for step in steps {
        results.push(one(netlink, root, step).await);
    }
    results
}

async fn one(netlink: &Netlink, root: &Path, step: &Step) -> Result<()> {
    match step {
        Step::Link { index, .. } => gone(netlink.delete_link(*index).await),
        Step::Idle {
            index, addresses, ..
        } => {
            for address in addresses {
                gone(netlink.delete_address(address).await)?;
            }
            gone(netlink.set_link_up(*index, false).await)
        }
        Step::Route(route) => all_gone(netlink.apply_routes(&[Change::Delete(route.clone())])),
        Step::Rule(rule) => gone(netlink.delete_rule(rule).await),
        Step::Nexthop(nexthop) => {
            all_gone(netlink.apply_nexthops(&[Change::Delete(nexthop.clone())]))
        }
        Step::Iptables { program, removal } => {
            for input in removal.inputs.iter().filter(|input| !input.is_empty()) {
                restore(program, input)?;
            }
            Ok(())
        }
        Step::Table(table) => {
            let nft = Nft::open(netlink.netns())?;
            if !nft.tables()?.iter().any(|there| there.name == *table) {
                return Ok(());
            }
            let mut transaction = Transaction::new(table.clone());
            transaction.delete_table();
            nft.commit(transaction)?;
            Ok(())
        }
        Step::Set(name) => {
            let sets = IpSets::open(netlink.netns())?;
            let end = Instant::now() + SETS_LIMIT;
            loop {
                let result = all_gone(sets.destroy(std::slice::from_ref(name)));
                if result.is_ok() || Instant::now() > end {
                    return result;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Step::File(path) => file(&root.join(path.strip_prefix("/").unwrap_or(path))),
    }
}

fn gone(result: cali_netlink::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        result => Ok(result?),
    }
}

fn all_gone(results: Vec<cali_netlink::Result<()>>) -> Result<()> {
    results.into_iter().try_for_each(gone)
}

fn restore(program: &str, input: &str) -> Result<()> {
    let program = format!("{program}-restore");
    let mut child = Command::new(&program)
        .args(["--noflush", "--wait", "10"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    // A program that ends early closes the pipe: its own words say why. It reads all before it writes a word.
    let fed = child
        .stdin
        .take()
        .map(|mut pipe| pipe.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program}: {}: {}", output.status, said.trim());
    }
    fed.transpose()
        .with_context(|| format!("cannot feed {program}"))?;
    Ok(())
}

fn file(path: &Path) -> Result<()> {
    let Ok(found) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    let removed = if found.is_dir() {
        std::fs::remove_dir(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        // Mounted into a container: what was in it is gone.
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => Ok(()),
        result => Ok(result?),
    }
}
