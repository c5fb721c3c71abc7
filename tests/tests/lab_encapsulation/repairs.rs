//! What somebody else removes, and how soon it is back.

use super::{IPIP, Mode, NODES, NONE, VXLAN, addresses, kernel_has, ping, settle};
use anyhow::{Context, Result, ensure};
use cali_tests::lab::Lab;
use cali_tests::{eventually, patient};
use std::time::Duration;

/// The product's promise.
const PROMISE: Duration = Duration::from_secs(1);
/// A busy machine may take longer once or twice; then the same is removed again.
const LIMIT: Duration = Duration::from_secs(5);
const ATTEMPTS: usize = 3;
/// The node at which things are removed.
const NODE: &str = NODES[0].0;

/// A tunnel device of one family.
#[derive(Debug, Clone, Copy)]
struct Device {
    mode: Mode,
    name: &'static str,
    v4: bool,
}

const fn device(mode: Mode, name: &'static str, v4: bool) -> Device {
    Device { mode, name, v4 }
}

/// Removes one object after another; it must be back, and traffic with it.
pub(crate) fn all(lab: &Lab) -> Result<()> {
    let devices = [
        device(VXLAN, "vxlan.calico", true),
        device(VXLAN, "vxlan-v6.calico", false),
        device(NONE.encrypted(), "wireguard.cali", true),
        device(NONE.encrypted(), "wg-v6.cali", false),
        // Not next to the other whose routes are in the main table.
        device(IPIP, "tunl0", true),
    ];
    for device in devices {
        if !kernel_has(device.mode) {
            continue;
        }
        lab.apply(&device.mode.manifest())?;
        settle(lab, device.mode)?;
        for what in 0..device.removals(lab)?.len() {
            device.repair(lab, what)?;
        }
    }
    Ok(())
}

impl Device {
    const fn family(self) -> &'static str {
        if self.v4 { "-4" } else { "-6" }
    }

    /// Length of a block of the pool.
    const fn block(self) -> &'static str {
        if self.v4 { "/26" } else { "/122" }
    }

    /// One object, removed until it was back in time once.
    fn repair(self, lab: &Lab, what: usize) -> Result<()> {
        let to = addresses(lab, self.v4)?[1];
        let mut took = Vec::new();
        for _ in 0..ATTEMPTS {
            // A new device has other entries.
            let words = self.removals(lab)?.swap_remove(what);
            let before = self.state(lab)?;
            lab.exec(NODE, &words.split(' ').collect::<Vec<_>>())?;
            let back = || -> Result<(), String> {
                let now = self.state(lab).map_err(|error| format!("{error:#}"))?;
                if now != before {
                    return Err(format!("{now}\ninstead of\n{before}"));
                }
                // Not through another way: over this device.
                ping(lab, 0, to, 56).map_err(|error| format!("{error:#}"))
            };
            let ((), time) = eventually(patient(LIMIT), back)
                .map_err(anyhow::Error::msg)
                .with_context(|| words.clone())?;
            println!("     {words}: back after {} ms", time.as_millis());
            if time < patient(PROMISE) {
                return Ok(());
            }
            took.push(format!("{words} ({} ms)", time.as_millis()));
        }
        anyhow::bail!(
            "never back within {:?}: {}",
            patient(PROMISE),
            took.join(", ")
        )
    }

    /// Commands, of which each takes something away that the device needs.
    fn removals(self, lab: &Lab) -> Result<Vec<String>> {
        let Self { name, .. } = self;
        let ip = format!("ip {}", self.family());
        let own = [
            "ip",
            self.family(),
            "-br",
            "addr",
            "show",
            name,
            "scope",
            "global",
        ];
        let own = lab.exec(NODE, &own)?;
        let own = own.split_whitespace().nth(2).context("no address")?;
        let routes = self.routes(lab)?;
        let route = routes
            .first()
            .with_context(|| format!("no route over {name}"))?;
        let prefix = route.split(' ').next().unwrap_or_default();
        let mut removals = vec![
            format!("ip link set {name} down"),
            format!("ip addr del {own} dev {name}"),
        ];
        if self.mode.wireguard {
            let (peer, _) = lab
                .exec(NODE, &["wg", "show", name, "allowed-ips"])?
                .split_once('\t')
                .map(|(peer, rest)| (peer.to_owned(), rest.to_owned()))
                .context("no peer")?;
            removals.extend([
                format!("{ip} route del {prefix} table 1"),
                format!("{ip} rule del priority 99"),
                format!("wg set {name} fwmark 0"),
                format!("wg set {name} peer {peer} remove"),
            ]);
        } else {
            removals.push(format!("{ip} route del {prefix}"));
            // It takes those of both families. Whoever removes one thing five times in a minute is taken for a rival, and
            // waited for.
            if self.v4 {
                removals.push("ip nexthop flush".to_owned());
            }
        }
        if self.mode == VXLAN {
            let node = if self.v4 { NODES[1].1 } else { NODES[1].2 };
            let entries = self.entries(lab)?;
            let entry = entries
                .iter()
                .find(|line| line.contains(&format!(" dst {node} ")))
                .context("no forwarding entry for node2")?;
            let mac = entry.split(' ').next().unwrap_or_default();
            let neighbour = entries
                .iter()
                .find(|line| line.contains(&format!(" lladdr {mac} ")))
                .context("no neighbour for node2")?;
            let gateway = neighbour.split(' ').next().unwrap_or_default();
            removals.extend([
                format!("bridge fdb del {mac} dev {name} dst {node}"),
                format!("{ip} neigh del {gateway} dev {name}"),
            ]);
        }
        if name != "tunl0" {
            // The fall-back device of ipip cannot be deleted.
            removals.push(format!("ip link del {name}"));
        }
        Ok(removals)
    }

    /// Forwarding entries and permanent neighbours.
    fn entries(self, lab: &Lab) -> Result<Vec<String>> {
        if self.mode != VXLAN {
            return Ok(Vec::new());
        }
        let fdb = lab.exec(NODE, &["bridge", "fdb", "show", "dev", self.name])?;
        let neighbours = [
            "ip",
            self.family(),
            "neigh",
            "show",
            "dev",
            self.name,
            "nud",
            "permanent",
        ];
        let neighbours = lab.exec(NODE, &neighbours)?;
        let fdb = fdb.lines().filter(|line| line.contains(" dst "));
        let lines = fdb
            .chain(neighbours.lines())
            .map(|line| line.trim().to_owned());
        let mut lines: Vec<String> = lines.collect();
        lines.sort();
        Ok(lines)
    }

    /// Routes to blocks over the device, without the numbers of nexthop objects, which others have after a repair.
    fn routes(self, lab: &Lab) -> Result<Vec<String>> {
        let routes = lab.exec(
            NODE,
            &["ip", self.family(), "route", "show", "table", "all"],
        )?;
        let over = format!("dev {} ", self.name);
        let mut routes: Vec<String> = routes
            .lines()
            .filter(|line| format!("{line} ").contains(&over) && line.contains(self.block()))
            .map(|line| {
                let mut words: Vec<&str> = line.split_whitespace().collect();
                if let Some(at) = words.iter().position(|word| *word == "nhid") {
                    words.drain(at..at + 2);
                }
                words.join(" ")
            })
            .collect();
        routes.sort();
        Ok(routes)
    }

    /// What the kernel has of the device: itself, addresses, routes, rule, entries, peers. Without indices, which a new
    /// device has anew.
    fn state(self, lab: &Lab) -> Result<String> {
        let link = lab.exec(NODE, &["ip", "-br", "addr", "show", self.name])?;
        // A new device has another link-local address.
        let link: Vec<&str> = link
            .split_whitespace()
            .filter(|word| !word.starts_with("fe80"))
            .collect();
        let rules = lab.exec(
            NODE,
            &["ip", self.family(), "rule", "show", "priority", "99"],
        )?;
        let mut state = vec![link.join(" "), rules];
        state.extend(self.routes(lab)?);
        state.extend(self.entries(lab)?);
        if self.mode.wireguard {
            for what in ["allowed-ips", "fwmark"] {
                let text = lab.exec(NODE, &["wg", "show", self.name, what])?;
                // A peer's key, and its prefixes in any order.
                let mut words: Vec<&str> = text.split_whitespace().collect();
                words.sort_unstable();
                state.push(words.join(" "));
            }
        }
        ensure!(state.len() > 2, "nothing of {} is there", self.name);
        Ok(state.join("\n"))
    }
}
