//! Changes under traffic: of the mode, of the pools, of a node's addresses.

use super::{
    IPIP, IPIP_CROSS, LIMIT, Mode, NODES, NONE, PAIRS, VXLAN, VXLAN_CROSS, addresses, kernel_has,
    mtu, ping, pod, settle,
};
use anyhow::{Context, Result, ensure};
use cali_tests::lab::{Lab, checked};
use cali_tests::traffic::Ping;
use cali_tests::wire::{Capture, Outer};
use cali_tests::{eventually, patient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How long one node hears of an edit later than the others.
const HELD_BACK: Duration = Duration::from_secs(5);

/// Every mode once, in an order in which every kind of change happens: none to tunnel and back, tunnel to tunnel, encryption on
/// over one, from one to the next below it, and off.
fn modes() -> Vec<Mode> {
    let all = [
        NONE,
        VXLAN,
        IPIP,
        VXLAN_CROSS,
        IPIP_CROSS,
        IPIP_CROSS.encrypted(),
        VXLAN_CROSS.encrypted(),
        IPIP.encrypted(),
        VXLAN.encrypted(),
        NONE.encrypted(),
        NONE,
    ];
    let mut modes: Vec<Mode> = all.into_iter().filter(|mode| kernel_has(*mode)).collect();
    modes.dedup();
    modes
}

/// A numbered probe on every pair, in both families. A ping covers both directions of its pair.
struct Probes(Vec<Probe>);

struct Probe {
    pair: String,
    ping: Ping,
    missing: BTreeSet<u64>,
}

impl Probes {
    fn start(lab: &Lab) -> Result<Self> {
        let mut probes = Vec::new();
        for v4 in [true, false] {
            let pods = addresses(lab, v4)?;
            for (from, to) in PAIRS {
                let ping = Ping::every(
                    &lab.netns(&pod(from)),
                    &pods[to].to_string(),
                    patient(Duration::from_millis(20)),
                    Duration::from_secs(900),
                )?;
                probes.push(Probe {
                    pair: format!("{} - {}", pod(from), pods[to]),
                    ping,
                    missing: BTreeSet::new(),
                });
            }
        }
        Ok(Self(probes))
    }

    /// Which change lost something, is what one wants to know first.
    fn report(&mut self) -> Result<()> {
        for probe in &mut self.0 {
            probe.ping.flow(5)?;
            let now = probe.ping.missing();
            let new: Vec<&u64> = now.difference(&probe.missing).collect();
            if !new.is_empty() {
                println!("     {}: nothing came of number {new:?}", probe.pair);
            }
            for error in probe.ping.errors() {
                println!("     {}: {error}", probe.pair);
            }
            probe.missing = now;
        }
        Ok(())
    }

    /// Nothing may have been lost.
    fn end(self) -> Result<()> {
        let (mut lost, mut sent) = (Vec::new(), 0);
        for Probe { pair, ping, .. } in self.0 {
            ping.flow(20)?;
            let count = ping.stop()?;
            sent += count.sent;
            if count.lost > 0 {
                lost.push(format!("{pair}: {} of {}", count.lost, count.sent));
            }
        }
        ensure!(lost.is_empty(), "packets were lost: {}", lost.join("; "));
        println!("     {sent} packets on all pairs, none lost");
        Ok(())
    }
}

pub(crate) fn modes_under_traffic(lab: &Lab) -> Result<()> {
    lab.apply(&NONE.manifest())?;
    settle(lab, NONE)?;
    let mut probes = Probes::start(lab)?;
    for (at, mode) in modes().into_iter().skip(1).enumerate() {
        let late = NODES[at % NODES.len()].0;
        let daemon = Pid::from_raw(lab.pid(&format!("{late}/cali-node"))?);
        kill(daemon, Signal::SIGSTOP)?;
        let applied = lab.apply(&mode.manifest());
        let start = Instant::now();
        std::thread::sleep(HELD_BACK);
        kill(daemon, Signal::SIGCONT)?;
        applied?;
        settle(lab, mode)?;
        println!(
            "     {mode:?}, {late} late: in force after {:.1} s, MTU of a pod {}",
            start.elapsed().as_secs_f32(),
            mtu(lab, 0)?
        );
        probes.report()?;
    }
    probes.end()
}

/// Pools beside those of a mode, in the same mode.
fn other_pools(mode: Mode) -> String {
    format!(
        "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: other-v4\nspec:\n  cidr: 10.40.0.0/16\n  blockSize: 26\n  \
         vxlanMode: {0}\n  ipipMode: {1}\n---\napiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: other-v6\nspec:\n  \
         cidr: fd00:40::/48\n  blockSize: 122\n  vxlanMode: {0}\n---\n",
        mode.vxlan, mode.ipip
    )
}

/// As a cluster is moved: other pools, then the former are disabled, which takes the nodes' tunnel addresses to the others while the
/// pods keep theirs; and back.
pub(crate) fn to_other_pools(lab: &Lab) -> Result<()> {
    for (mode, devices) in [
        (
            VXLAN,
            &[("vxlan.calico", true), ("vxlan-v6.calico", false)][..],
        ),
        (IPIP, &[("tunl0", true)][..]),
    ] {
        if !kernel_has(mode) {
            continue;
        }
        lab.apply(&mode.manifest())?;
        settle(lab, mode)?;
        let mut probes = Probes::start(lab)?;
        let (here, there) = (["10.30.", "fd00:30:"], ["10.40.", "fd00:40:"]);
        let disabled = mode
            .manifest()
            .replace("  blockSize", "  disabled: true\n  blockSize");
        lab.apply(&(other_pools(mode) + &disabled))?;
        moved(lab, mode, devices, there, here)?;
        probes.report()?;
        lab.apply(
            &mode
                .manifest()
                .replace("  blockSize", "  disabled: false\n  blockSize"),
        )?;
        for pool in ["other-v4", "other-v6"] {
            checked(lab.calictl(&["delete", "ippool", pool]).output()?, || {
                format!("delete {pool}")
            })?;
        }
        moved(lab, mode, devices, here, there)?;
        probes.report()?;
        probes.end()?;
    }
    Ok(())
}

/// Every node's tunnel addresses are among `to` and no route leads over those of `from` any more.
fn moved(
    lab: &Lab,
    mode: Mode,
    devices: &[(&str, bool)],
    to: [&str; 2],
    from: [&str; 2],
) -> Result<()> {
    let is_moved = || -> Result<()> {
        for (node, ..) in NODES {
            for (device, v4) in devices {
                let family = if *v4 { "-4" } else { "-6" };
                let own = lab.exec(
                    node,
                    &[
                        "ip", family, "-br", "addr", "show", device, "scope", "global",
                    ],
                )?;
                let routes = lab.exec(node, &["ip", family, "route", "show", "dev", device])?;
                let at = usize::from(!*v4);
                ensure!(
                    own.contains(to[at])
                        && !own.contains(from[at])
                        && !routes.contains(&format!("via {}", from[at])),
                    "{node}: {own}\n{routes}"
                );
            }
        }
        Ok(())
    };
    eventually(patient(LIMIT), || {
        is_moved().map_err(|error| format!("{error:#}"))
    })
    .map_err(anyhow::Error::msg)?;
    settle(lab, mode).map(drop)
}

/// IPIP's routes come from the block affinities, and from BGP where `programClusterRoutes` says so: from the one to the other and
/// back, under traffic.
pub(crate) fn other_supplier(lab: &Lab) -> Result<()> {
    for mode in [IPIP, IPIP_CROSS] {
        if !kernel_has(mode) {
            continue;
        }
        let by = |felix: &str, bgp: &str| {
            let felix = format!("spec:\n  programClusterRoutes: {felix}\n  wireguardEnabled:");
            mode.manifest()
                .replace("spec:\n  wireguardEnabled:", &felix)
                + &format!(
                    "---\napiVersion: projectcalico.org/v3\nkind: BGPConfiguration\nmetadata:\n  name: default\nspec:\n  \
                     asNumber: 64512\n  nodeToNodeMeshEnabled: true\n  programClusterRoutes: {bgp}\n"
                )
        };
        // Both, which is said to be wrong, would be resolved to the affinities; so is nothing at all.
        let sides = [
            ("Disabled", "Enabled", "proto bird"),
            ("EnabledIPIPOnly", "EnabledNoEncapOnly", "proto 80"),
        ];
        lab.apply(&mode.manifest())?;
        settle(lab, mode)?;
        let mut probes = Probes::start(lab)?;
        for (felix, bgp, protocol) in sides {
            lab.apply(&by(felix, bgp))?;
            let is_so = || -> Result<()> {
                for (node, ..) in NODES {
                    let routes = lab.exec(node, &["ip", "-4", "route", "show", "dev", "tunl0"])?;
                    let blocks: Vec<&str> = routes
                        .lines()
                        .filter(|line| line.contains("/26 ") && line.contains(" via "))
                        .collect();
                    ensure!(
                        !blocks.is_empty() && blocks.iter().all(|line| line.contains(protocol)),
                        "{node}: not all are {protocol}: {routes}"
                    );
                }
                Ok(())
            };
            eventually(patient(LIMIT), || {
                is_so().map_err(|error| format!("{error:#}"))
            })
            .map_err(anyhow::Error::msg)?;
            settle(lab, mode)?;
            probes.report()?;
        }
        probes.end()?;
        println!("     {mode:?}: routes by BGP, and by the block affinities again");
    }
    Ok(())
}

fn set_address(lab: &Lab, node: &str, address: &str) -> Result<()> {
    let patch = format!("{{\"spec\":{{\"bgp\":{{\"ipv4Address\":\"{address}\"}}}}}}");
    let output = lab
        .calictl(&["patch", "node", node, "-p", &patch])
        .output()?;
    checked(output, || format!("patch {node}")).map(drop)
}

/// The route of a node to a pod, in one line.
fn route(lab: &Lab, node: &str, to: &str) -> Result<String> {
    lab.exec(node, &["ip", "route", "get", to])
}

/// Another subnet turns a direct way into a tunnel where pools say `CrossSubnet`; another address moves the tunnel's end.
pub(crate) fn addresses_of_a_node(lab: &Lab) -> Result<()> {
    let pods = addresses(lab, true)?;
    for (mode, device) in [(VXLAN_CROSS, "vxlan.calico"), (IPIP_CROSS, "tunl0")] {
        if !kernel_has(mode) {
            continue;
        }
        lab.apply(&mode.manifest())?;
        settle(lab, mode)?;
        let leads = |node: usize, to: usize, device: &str| -> Result<()> {
            let found = eventually(patient(LIMIT), || {
                let route = route(lab, NODES[node].0, &pods[to].to_string())
                    .map_err(|error| format!("{error:#}"))?;
                if route.contains(&format!("dev {device} ")) {
                    Ok(())
                } else {
                    Err(format!("{} does not use {device}: {route}", NODES[node].0))
                }
            });
            found.map(drop).map_err(anyhow::Error::msg)
        };
        let reached = |from: usize, to: usize| {
            eventually(patient(LIMIT), || {
                ping(lab, from, pods[to], 56).map_err(|error| format!("{error:#}"))
            })
            .map(drop)
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("{} -> {}", pod(from), pod(to)))
        };
        leads(0, 1, "eth1")?;
        for (node, address, ..) in &NODES[..2] {
            set_address(lab, node, &format!("{address}/32"))?;
        }
        leads(0, 1, device)?;
        leads(1, 0, device)?;
        reached(0, 1)?;
        for (node, address, ..) in &NODES[..2] {
            set_address(lab, node, &format!("{address}/24"))?;
        }
        leads(0, 1, "eth1")?;
        leads(1, 0, "eth1")?;
        reached(0, 1)?;
        println!("     {mode:?}: the way between two nodes follows their subnets");
        moves(lab, mode, device)?;
    }
    Ok(())
}

/// The former address stays the first of its interface: what the system would choose.
fn moves(lab: &Lab, mode: Mode, device: &str) -> Result<()> {
    let eth1 = |what: &str| {
        let words = ["ip", "addr", what, "10.0.1.22/24", "dev", "eth1"];
        lab.exec("node2", &words)
    };
    eth1("add")?;
    set_address(lab, "node2", "10.0.1.22/24")?;
    let pods = addresses(lab, true)?;
    let at_node3 = || -> Result<()> {
        let (ways, new, former) = if mode == VXLAN_CROSS {
            let entries = lab.exec("node3", &["bridge", "fdb", "show", "dev", device])?;
            (entries, " dst 10.0.1.22 ", " dst 10.0.1.2 ")
        } else {
            let way = route(lab, "node3", &pods[1].to_string())?;
            (way, " via 10.0.1.22 ", " via 10.0.1.2 ")
        };
        ensure!(ways.contains(new) && !ways.contains(former), "{ways}");
        let capture = Capture::start(&lab.netns("node3"), "eth1")?;
        ping(lab, 2, pods[1], 56)?;
        ping(lab, 1, pods[2], 56)?;
        let seen = capture.take();
        let ends: BTreeSet<_> = seen
            .iter()
            .filter(|seen| seen.inner.0 == pods[1] && seen.inner.1 == pods[2])
            .map(|seen| seen.ends.0.to_string())
            .collect();
        ensure!(ends == BTreeSet::from(["10.0.1.22".to_owned()]), "{ends:?}");
        Ok(())
    };
    let moved = eventually(patient(LIMIT), || {
        at_node3().map_err(|error| format!("{error:#}"))
    });
    moved.map_err(anyhow::Error::msg)?;
    println!("     {mode:?}: the tunnel follows a node's address");
    set_address(lab, "node2", "10.0.1.2/24")?;
    settle(lab, mode)?;
    eth1("del").map(drop)
}

/// `wireguardHostEncryptionEnabled`: what the nodes send each other goes through the tunnel, and in plain again afterwards.
pub(crate) fn hosts_encrypted(lab: &Lab) -> Result<()> {
    const SIZE: usize = 1000;
    let mode = NONE.encrypted();
    if !kernel_has(mode) {
        return Ok(());
    }
    let switched = |on: bool| {
        let asked = format!("spec:\n  wireguardHostEncryptionEnabled: {on}\n  wireguardEnabled:");
        mode.manifest()
            .replace("spec:\n  wireguardEnabled:", &asked)
    };
    for (on, wanted) in [(true, Outer::Wireguard), (false, Outer::Plain)] {
        lab.apply(&switched(on))?;
        for v4 in [true, false] {
            let ends = [0, 2].map(|at| if v4 { NODES[at].1 } else { NODES[at].2 });
            let [from, to]: [IpAddr; 2] = [ends[0].parse()?, ends[1].parse()?];
            let is_so = || -> Result<()> {
                let capture = Capture::start(&lab.netns(NODES[0].0), "eth1")?;
                let wait = patient(Duration::from_secs(1)).as_secs().to_string();
                let size = SIZE.to_string();
                let ping = ["ping", "-n", "-c", "1", "-W", &wait, "-s", &size, ends[1]];
                lab.exec(NODES[0].0, &ping)?;
                let seen = capture.take();
                for pair in [(from, to), (to, from)] {
                    let of_pair = seen
                        .iter()
                        .filter(|seen| seen.ends == pair && seen.len > SIZE);
                    let outers: BTreeSet<Outer> = of_pair.map(|seen| seen.outer).collect();
                    ensure!(
                        outers == BTreeSet::from([wanted]),
                        "{pair:?}: {outers:?} instead of {wanted:?}"
                    );
                }
                Ok(())
            };
            let (_, time) = eventually(patient(LIMIT), || {
                is_so().map_err(|error| format!("{error:#}"))
            })
            .map_err(anyhow::Error::msg)?;
            println!(
                "     {from} - {to}: {wanted:?} after {:.1} s",
                time.as_secs_f32()
            );
        }
    }
    Ok(())
}

/// A key is changed where it is kept: in the kernel's device. The node sees it there and tells it, and the others follow.
pub(crate) fn key_of_a_node(lab: &Lab) -> Result<()> {
    let mode = NONE.encrypted();
    if !kernel_has(mode) {
        return Ok(());
    }
    lab.apply(&mode.manifest())?;
    settle(lab, mode)?;
    let node = NODES[0].0;
    for device in ["wireguard.cali", "wg-v6.cali"] {
        let public = |node: &str| lab.exec(node, &["wg", "show", device, "public-key"]);
        let former = public(node)?;
        let new_key = format!("wg genkey | wg set {device} private-key /dev/stdin");
        lab.exec(node, &["sh", "-c", &new_key])?;
        let key = public(node)?;
        ensure!(key != former, "{device} of {node} still has {key}");
        let followed = || -> Result<()> {
            for (other, ..) in &NODES[1..] {
                let peers = lab.exec(other, &["wg", "show", device, "peers"])?;
                ensure!(
                    peers.contains(key.trim()) && !peers.contains(former.trim()),
                    "{other} has {peers} instead of {key}"
                );
            }
            Ok(())
        };
        let ((), time) = eventually(patient(LIMIT), || {
            followed().map_err(|error| format!("{error:#}"))
        })
        .map_err(anyhow::Error::msg)?;
        println!(
            "     {device}: a new key is everywhere after {:.1} s",
            time.as_secs_f32()
        );
    }
    settle(lab, mode).map(drop)
}
