//! What a pass found, for people and programs.

use std::collections::BTreeMap;
use std::fmt;

use cali_ipam::collect::Inventory;
use serde::Serialize;

use super::plan::{self, Leak, Plan};
use crate::facts::Facts;
use crate::judge::Orphan;

/// Version of the report's form.
const VERSION: u32 = 1;

/// The report of a pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Of this form.
    pub version: u32,
    /// Number of blocks.
    pub blocks: usize,
    /// Held addresses by kind of use.
    pub addresses: BTreeMap<&'static str, usize>,
    /// What is or would be released.
    pub leaks: Vec<Finding>,
    /// What will be, if it still looks so when the grace period is over.
    pub candidates: Vec<Finding>,
    /// Blocks of deleted nodes.
    pub deserted_blocks: Vec<String>,
    /// Blocks without an owner.
    pub ownerless_blocks: Vec<String>,
    /// Empty blocks and unfinished claims of live nodes.
    pub idle_blocks: Vec<String>,
    /// Handles that name a block in which they hold nothing.
    pub stale_handles: Vec<String>,
    /// Objects that cannot be read; while there are any, no address is collected.
    pub unreadable: Vec<String>,
}

/// Addresses of one handle that nobody uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The handle, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
    /// The addresses.
    pub addresses: Vec<String>,
    /// Why nobody uses them.
    #[serde(flatten)]
    pub orphan: Orphan,
    /// For how long they have been seen so.
    pub seconds: u64,
}

impl Finding {
    fn new(leak: &Leak) -> Self {
        let handle = leak.addresses.first().and_then(|a| a.owner.handle());
        Self {
            handle: handle.map(str::to_owned),
            addresses: leak
                .addresses
                .iter()
                .map(|a| a.address.to_string())
                .collect(),
            orphan: leak.orphan.clone(),
            seconds: leak.waited.as_secs(),
        }
    }
}

impl Report {
    /// Of what was read and planned.
    pub fn new(inventory: &Inventory, facts: &Facts, plan: &Plan) -> Self {
        let of_node = |list: &[(String, cali_api::Cidr)]| -> Vec<String> {
            list.iter().map(|(n, c)| format!("{c} of {n}")).collect()
        };
        Self {
            version: VERSION,
            blocks: inventory.blocks.len(),
            addresses: plan::uses(inventory, facts),
            leaks: plan.leaks.iter().map(Finding::new).collect(),
            candidates: plan.candidates.iter().map(Finding::new).collect(),
            deserted_blocks: of_node(&plan.deserted),
            ownerless_blocks: plan.ownerless.iter().map(ToString::to_string).collect(),
            idle_blocks: of_node(&plan.idle),
            stale_handles: plan
                .stale_handles
                .iter()
                .map(|(handle, cidr)| match cidr {
                    Some(cidr) => format!("{handle} in {cidr}"),
                    None => handle.clone(),
                })
                .collect(),
            unreadable: plan.blind.clone(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: usize = self.addresses.values().sum();
        write!(f, "{} blocks, {total} addresses held", self.blocks)?;
        let kinds: Vec<String> = self
            .addresses
            .iter()
            .map(|(kind, count)| format!("{kind} {count}"))
            .collect();
        if !kinds.is_empty() {
            write!(f, " ({})", kinds.join(", "))?;
        }
        writeln!(f)?;
        for (title, findings) in [
            ("leaked, to be released", &self.leaks),
            ("not used, still within the grace period", &self.candidates),
        ] {
            if findings.is_empty() {
                continue;
            }
            writeln!(f, "{title}:")?;
            for finding in findings {
                let handle = finding.handle.as_deref().unwrap_or("no handle");
                let addresses = finding.addresses.join(", ");
                writeln!(
                    f,
                    "  {addresses}  {handle}  {} (for {} s)",
                    finding.orphan, finding.seconds
                )?;
            }
        }
        for (title, lines) in [
            ("blocks of deleted nodes", &self.deserted_blocks),
            ("blocks without owner", &self.ownerless_blocks),
            ("idle blocks", &self.idle_blocks),
            ("stale handles", &self.stale_handles),
            (
                "cannot be read, so no address is collected",
                &self.unreadable,
            ),
        ] {
            if !lines.is_empty() {
                writeln!(f, "{title}:")?;
                for line in lines {
                    writeln!(f, "  {line}")?;
                }
            }
        }
        Ok(())
    }
}
