//! Every encapsulation between three nodes in two subnets, with the built programs: the outer header of every pair's
//! packets, packets of the full MTU, the change from any to the next under traffic, and repair.
//!
//! What the kernel lacks cannot be tried: `CALI_TEST_ENCAPSULATIONS` says what it has (`ipip,vxlan,wireguard`). Without it
//! only what needs no module beyond VXLAN is; in the virtual machine it is everything. `CALI_TEST_SHORT=1` leaves out what takes
//! long on an emulated machine: changes under traffic and repair.

#[path = "lab_encapsulation/by_hand.rs"]
mod by_hand;
#[path = "lab_encapsulation/changes.rs"]
mod changes;
#[path = "lab_encapsulation/repairs.rs"]
mod repairs;

use anyhow::{Context, Result, ensure};
use cali_tests::lab::{Check, Lab};
use cali_tests::wire::{Capture, Outer, Seen};
use cali_tests::{eventually, patient};
use std::net::IpAddr;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
/// MTU of the lab's links.
const UNDERLAY: u32 = 1500;

/// Node, its addresses, and whether it is in the first subnet.
const NODES: [(&str, &str, &str, bool); 3] = [
    ("node1", "10.0.1.1", "fd00:0:0:1::1", true),
    ("node2", "10.0.1.2", "fd00:0:0:1::2", true),
    ("node3", "10.0.2.3", "fd00:0:0:2::3", false),
];
/// What is looked at on the link of the first shows both directions.
const PAIRS: [(usize, usize); 3] = [(0, 1), (0, 2), (1, 2)];

/// What the pools and the settings say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mode {
    vxlan: &'static str,
    ipip: &'static str,
    wireguard: bool,
}

const fn mode(vxlan: &'static str, ipip: &'static str) -> Mode {
    Mode {
        vxlan,
        ipip,
        wireguard: false,
    }
}

const NONE: Mode = mode("Never", "Never");
const VXLAN: Mode = mode("Always", "Never");
const VXLAN_CROSS: Mode = mode("CrossSubnet", "Never");
const IPIP: Mode = mode("Never", "Always");
const IPIP_CROSS: Mode = mode("Never", "CrossSubnet");

impl Mode {
    const fn encrypted(self) -> Self {
        Self {
            wireguard: true,
            ..self
        }
    }

    fn has(self, what: &str) -> bool {
        match what {
            "vxlan" => self.vxlan != "Never",
            "ipip" => self.ipip != "Never",
            _ => self.wireguard,
        }
    }

    /// IPIP carries no IPv6: the IPv6 pool has no encapsulation then.
    fn outer(self, from: usize, to: usize, v4: bool) -> Outer {
        let near = NODES[from].3 == NODES[to].3;
        let tunnelled = |mode: &str| mode == "Always" || (mode == "CrossSubnet" && !near);
        if self.wireguard {
            Outer::Wireguard
        } else if tunnelled(self.vxlan) {
            Outer::Vxlan
        } else if v4 && tunnelled(self.ipip) {
            Outer::Ipip
        } else {
            Outer::Plain
        }
    }

    /// The largest MTU that a pod may have.
    fn mtu(self) -> u32 {
        let vxlan = if self.has("vxlan") { 70 } else { 0 };
        let ipip = if self.has("ipip") { 20 } else { 0 };
        let wireguard = if self.wireguard { 80 } else { 0 };
        UNDERLAY - vxlan.max(ipip).max(wireguard)
    }

    fn manifest(self) -> String {
        format!(
            "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: v4\nspec:\n  cidr: 10.30.0.0/16\n  blockSize: 26\n  \
             vxlanMode: {0}\n  ipipMode: {1}\n---\napiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: v6\nspec:\n  \
             cidr: fd00:30::/48\n  blockSize: 122\n  vxlanMode: {0}\n---\napiVersion: projectcalico.org/v3\nkind: FelixConfiguration\n\
             metadata:\n  name: default\nspec:\n  wireguardEnabled: {2}\n  wireguardEnabledV6: {2}\n",
            self.vxlan, self.ipip, self.wireguard
        )
    }
}

fn kernel_has(mode: Mode) -> bool {
    let has = std::env::var("CALI_TEST_ENCAPSULATIONS").unwrap_or_else(|_| "vxlan".to_owned());
    ["ipip", "vxlan", "wireguard"]
        .into_iter()
        .all(|what| !mode.has(what) || has.split(',').any(|word| word == what))
}

#[test]
fn lab_encapsulation() {
    let (lab, printed) = Lab::up("encap.clab.yml").unwrap_or_else(|error| panic!("{error:#}"));
    println!("{printed}");
    let short: &[(&str, Check)] = &[(
        "every mode gives every pair its header at full size",
        headers,
    )];
    let whole: &[(&str, Check)] = &[
        (
            "every mode gives every pair its header at full size, and the change to it loses nothing, one node being late",
            changes::modes_under_traffic,
        ),
        (
            "pods and tunnels go on without a loss while other pools take the place of theirs",
            changes::to_other_pools,
        ),
        (
            "the routes of IPIP pools come from block affinities or BGP, and change hands without a loss",
            changes::other_supplier,
        ),
        (
            "other addresses and subnets of a node are followed",
            changes::addresses_of_a_node,
        ),
        (
            "packets between the nodes themselves are encrypted where that is asked for",
            changes::hosts_encrypted,
        ),
        ("a node's new key is followed", changes::key_of_a_node),
        ("what a stranger removes is back", repairs::all),
        (
            "a peer that was set up by hand as Calico's is understood",
            by_hand::peer,
        ),
    ];
    let is_short = std::env::var_os("CALI_TEST_SHORT").is_some();
    lab.check_all(if is_short { short } else { whole });
}

/// One mode after the other; what is on the way while it changes is not looked at.
fn headers(lab: &Lab) -> Result<()> {
    for mode in [IPIP, IPIP_CROSS, VXLAN_CROSS.encrypted(), IPIP.encrypted()] {
        if kernel_has(mode) {
            lab.apply(&mode.manifest())?;
            let took = settle(lab, mode)?;
            println!("     {mode:?}: in force after {:.1} s", took.as_secs_f32());
        }
    }
    Ok(())
}

fn pod(at: usize) -> String {
    format!("shop/pod-{}", at + 1)
}

fn addresses(lab: &Lab, v4: bool) -> Result<Vec<IpAddr>> {
    (0..NODES.len())
        .map(|at| {
            Ok(if v4 {
                lab.pod_address(&pod(at))?.parse()?
            } else {
                lab.pod_address_v6(&pod(at))?.into()
            })
        })
        .collect()
}

/// MTU of a pod's interface.
fn mtu(lab: &Lab, at: usize) -> Result<u32> {
    let text = lab.exec(&pod(at), &["ip", "-j", "link", "show", "eth0"])?;
    let value: serde_json::Value = serde_json::from_str(&text)?;
    u32::try_from(value[0]["mtu"].as_u64().context("no MTU")?).context("not an MTU")
}

/// One packet, which has to be answered.
fn ping(lab: &Lab, from: usize, to: IpAddr, size: u32) -> Result<()> {
    let (size, to) = (size.to_string(), to.to_string());
    let wait = patient(Duration::from_secs(1)).as_secs().to_string();
    let words = [
        "ping", "-n", "-c", "1", "-W", &wait, "-M", "do", "-s", &size, &to,
    ];
    lab.exec(&pod(from), &words).map(drop)
}

/// Packets of the full MTU for each pair; what the links of the nodes showed must be the mode's headers and no other.
fn look(lab: &Lab, mode: Mode) -> Result<()> {
    let sizes: Vec<u32> = (0..NODES.len())
        .map(|at| mtu(lab, at))
        .collect::<Result<_>>()?;
    for (at, size) in sizes.iter().enumerate() {
        ensure!(
            *size <= mode.mtu(),
            "{} has an MTU of {size}, but {mode:?} allows {}",
            pod(at),
            mode.mtu()
        );
    }
    for v4 in [true, false] {
        let pods = addresses(lab, v4)?;
        for (from, to) in PAIRS {
            let capture = Capture::start(&lab.netns(NODES[from].0), "eth1")?;
            // IP and ICMP header.
            let size = sizes[from].min(sizes[to]) - if v4 { 28 } else { 48 };
            ping(lab, from, pods[to], size)
                .with_context(|| format!("{} -> {}", pod(from), pod(to)))?;
            let seen = capture.take();
            judge(&seen, mode, (from, to), &pods, v4, size as usize)
                .with_context(|| format!("{} -> {} of {:?}", pod(from), pod(to), seen))?;
        }
    }
    Ok(())
}

fn judge(
    seen: &[Seen],
    mode: Mode,
    (from, to): (usize, usize),
    pods: &[IpAddr],
    v4: bool,
    size: usize,
) -> Result<()> {
    let wanted = mode.outer(from, to, v4);
    let node =
        |at: usize| -> Result<IpAddr> { Ok(if v4 { NODES[at].1 } else { NODES[at].2 }.parse()?) };
    let of_pods: Vec<&Seen> = seen
        .iter()
        .filter(|seen| {
            let pair = [seen.inner.0, seen.inner.1];
            pair.contains(&pods[from]) && pair.contains(&pods[to])
        })
        .collect();
    if let Some(wrong) = of_pods.iter().find(|seen| seen.outer != wanted) {
        anyhow::bail!("{wrong:?} instead of {wanted:?}");
    }
    // There and back.
    for ends in [(from, to), (to, from)] {
        let outer_ends = if wanted == Outer::Plain {
            (pods[ends.0], pods[ends.1])
        } else {
            (node(ends.0)?, node(ends.1)?)
        };
        let whole = |seen: &&Seen| {
            seen.outer == wanted && seen.ends == outer_ends && !seen.fragment && seen.len > size
        };
        ensure!(
            seen.iter().any(|seen| whole(&seen)),
            "no whole packet in {wanted:?} from {} to {}",
            NODES[ends.0].0,
            NODES[ends.1].0
        );
    }
    Ok(())
}

fn settle(lab: &Lab, mode: Mode) -> Result<Duration> {
    let looked = || look(lab, mode).map_err(|error| format!("{error:#}"));
    eventually(patient(LIMIT), looked)
        .map(|(_, time)| time)
        .map_err(anyhow::Error::msg)
        .with_context(|| {
            let routes: Vec<String> = NODES
                .iter()
                .map(|(node, ..)| {
                    let table = |args: &[&str]| lab.exec(node, args).unwrap_or_default();
                    format!(
                        "{node}\n{}{}{}",
                        table(&["ip", "route"]),
                        table(&["ip", "-6", "route", "show", "proto", "80"]),
                        table(&["wg"])
                    )
                })
                .collect();
            format!("{mode:?}\n{}", routes.join("\n"))
        })
}
