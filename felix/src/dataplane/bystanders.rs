//! Other programs' base chains that drop what ours accept: found at the start and when nf_tables of others change,
//! and told as notices. Nothing of theirs is ever changed.

use std::time::{Duration, Instant};

use cali_netlink::NetNs;
use cali_netlink::nft::foreign::{Dropper, Drops, legacy_droppers};
use cali_netlink::nft::{Changed, Family, Nft, NftEvent, TableName};
use tracing::warn;

/// Between two looks: a busy host changes its chains many times a second, and a look reads all of them.
const PAUSE: Duration = Duration::from_secs(5);
/// A calm host is looked at this long after a change, when the rest of it has come.
const SETTLE: Duration = Duration::from_millis(200);

/// What others drop.
#[derive(Debug)]
pub(super) struct Bystanders {
    nft: Nft,
    ours: Vec<TableName>,
    /// Of the legacy `ip_tables`, which tell of no change: read once.
    legacy: Vec<String>,
    notices: Vec<String>,
    looked: Option<Instant>,
    look_at: Option<Instant>,
}

impl Bystanders {
    /// Reads the legacy tables; nf_tables are read by the first [`Self::look`], which is due at once.
    pub(super) fn new(nft: Nft, netns: &NetNs, now: Instant) -> Self {
        Self {
            nft,
            ours: vec![
                TableName::new(Family::Inet, "calico"),
                TableName::new(Family::Arp, "calico"),
                // Host ports, of the CNI server.
                TableName::new(Family::Inet, "calico-nat"),
            ],
            legacy: legacy(netns),
            notices: Vec::new(),
            looked: None,
            look_at: Some(now),
        }
    }

    /// Takes in one notification.
    pub(super) fn on_event(&mut self, event: &NftEvent, now: Instant) {
        if let NftEvent::Change { table, object, .. } = event
            && matches!(
                object,
                Changed::Table | Changed::Chain(_) | Changed::Rule(..)
            )
            && !self.ours.contains(table)
        {
            let earliest = self.looked.map_or(now, |looked| looked + PAUSE);
            self.look_at.get_or_insert(earliest.max(now + SETTLE));
        }
    }

    /// Notifications were lost.
    pub(super) fn on_overflow(&mut self, now: Instant) {
        self.look_at.get_or_insert(now + PAUSE);
    }

    /// When to look.
    pub(super) const fn next_due(&self) -> Option<Instant> {
        self.look_at
    }

    /// Reads what others have, if that is due.
    pub(super) fn look(&mut self, now: Instant) {
        if self.look_at.is_none_or(|at| at > now) {
            return;
        }
        self.look_at = None;
        self.looked = Some(now);
        match self.nft.droppers(&self.ours) {
            Ok(found) => {
                let found: Vec<String> = self.legacy.iter().cloned().chain(told(&found)).collect();
                for notice in found.iter().filter(|new| !self.notices.contains(new)) {
                    warn!(%notice, "other rules on this host");
                }
                self.notices = found;
            }
            // They change while they are read; the next change, or this, leads to another look.
            Err(error) => {
                warn!(%error, "what others drop cannot be read");
                self.look_at = Some(now + PAUSE);
            }
        }
    }

    /// What to tell.
    pub(super) fn notices(&self) -> &[String] {
        &self.notices
    }
}

/// Those that drop what no rule of theirs accepts. Rules for some packets are everyday; but those of an earlier Calico
/// drop whatever comes from interfaces with our names.
fn told(found: &[Dropper]) -> impl Iterator<Item = String> {
    found
        .iter()
        .filter(|dropper| {
            dropper.drops > Drops::Some
                || dropper.programs.iter().any(|name| name.contains("Calico"))
        })
        .map(ToString::to_string)
}

/// Runs the tool once, and only where a legacy table is in use: there is no other way to read them.
fn legacy(netns: &NetNs) -> Vec<String> {
    let mut all = Vec::new();
    for (family, names, tool) in [
        (Family::Ip, "ip_tables_names", "iptables-legacy-save"),
        (Family::Ip6, "ip6_tables_names", "ip6tables-legacy-save"),
    ] {
        let path = format!("/proc/thread-self/net/{names}");
        let in_use = netns.run(|| std::fs::read_to_string(path));
        if !in_use.is_ok_and(|read| read.is_ok_and(|names| !names.trim().is_empty())) {
            continue;
        }
        match netns.command(tool).output() {
            Ok(output) if output.status.success() => {
                let text = String::from_utf8_lossy(&output.stdout);
                all.extend(told(&legacy_droppers(family, &text)));
            }
            _ => all.push(format!(
                "legacy {family} tables are in use, and without {tool} it cannot be said what they drop"
            )),
        }
    }
    all
}
