//! The hostile host: what other programs do to a machine that we share with them.
//!
//! [`Fixture`]s are rule sets of kube-proxy, firewalld, ufw, Docker and of a Calico that was stopped, loaded by the
//! tools that those programs use (`nft -f`, `iptables-restore`, `ipset restore`); foreign routes, some of them under
//! our own protocol numbers; strict reverse path filters. [`Churn`] changes foreign chains all the time, [`Remover`]
//! deletes what it did not make, as systemd-networkd does. [`dump`] says what is on the host that is not ours, so
//! that a test can show that it was left alone.
//!
//! firewalld, ufw and Docker were recorded from Debian 12's packages, run in a namespace with their defaults. The
//! others have the form that those programs give them, with services and pods of our own.

mod actors;
mod dump;

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

pub use actors::{Churn, Removed, Remover, RemoverPlan};
pub use dump::{Foreign, Ours, dump};

use super::TestNs;
use crate::sysctl;

/// Something that another program has done to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fixture {
    /// kube-proxy in iptables mode, over iptables-nft.
    KubeProxyIptables,
    /// The same over the legacy kernel interface (`ip_tables`).
    KubeProxyLegacy,
    /// kube-proxy in nftables mode.
    KubeProxyNftables,
    /// kube-proxy in IPVS mode: its iptables and ipset part, and its device with the service addresses.
    KubeProxyIpvs,
    /// firewalld with its defaults: refuses what is forwarded.
    Firewalld,
    /// ufw with its defaults: input and forward are dropped.
    Ufw,
    /// Docker with two networks: forward is dropped.
    Docker,
    /// Chains and ipsets of a Calico node in iptables mode that was stopped.
    CalicoIptables,
    /// Tables of a Calico node in nftables mode that was stopped.
    CalicoNftables,
    /// Routes, rules and nexthop objects of other programs, also under our protocol numbers and inside our pools.
    Routes,
    /// `rp_filter=1` for every device, present and future.
    StrictReversePath,
}

/// All fixtures, one by one.
pub fn all() -> &'static [Fixture] {
    &[
        Fixture::KubeProxyIptables,
        Fixture::KubeProxyLegacy,
        Fixture::KubeProxyNftables,
        Fixture::KubeProxyIpvs,
        Fixture::Firewalld,
        Fixture::Ufw,
        Fixture::Docker,
        Fixture::CalicoIptables,
        Fixture::CalicoNftables,
        Fixture::Routes,
        Fixture::StrictReversePath,
    ]
}

/// A host on which everything is installed at once (one kube-proxy only).
pub fn crowded() -> &'static [Fixture] {
    &[
        Fixture::StrictReversePath,
        Fixture::Routes,
        Fixture::CalicoIptables,
        Fixture::CalicoNftables,
        Fixture::KubeProxyIptables,
        Fixture::Docker,
        Fixture::Ufw,
        Fixture::Firewalld,
    ]
}

const IPTABLES: &str = "iptables-nft-restore";
const IP6TABLES: &str = "ip6tables-nft-restore";
const IPTABLES_LEGACY: &str = "iptables-legacy-restore";

impl Fixture {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::KubeProxyIptables => "kube-proxy (iptables)",
            Self::KubeProxyLegacy => "kube-proxy (legacy iptables)",
            Self::KubeProxyNftables => "kube-proxy (nftables)",
            Self::KubeProxyIpvs => "kube-proxy (ipvs)",
            Self::Firewalld => "firewalld",
            Self::Ufw => "ufw",
            Self::Docker => "docker",
            Self::CalicoIptables => "left-over Calico (iptables)",
            Self::CalicoNftables => "left-over Calico (nftables)",
            Self::Routes => "foreign routes",
            Self::StrictReversePath => "rp_filter=1",
        }
    }

    /// Does it to the namespace. Panics if the host's tools refuse it.
    pub fn apply(self, ns: &TestNs) {
        match self {
            Self::KubeProxyIptables => {
                restore(ns, IPTABLES, include_str!("hostile/kube-proxy.rules"));
            }
            Self::KubeProxyLegacy => restore(
                ns,
                IPTABLES_LEGACY,
                include_str!("hostile/kube-proxy.rules"),
            ),
            Self::KubeProxyNftables => nft(ns, include_str!("hostile/kube-proxy.nft")),
            Self::KubeProxyIpvs => {
                ipset(ns, include_str!("hostile/kube-proxy-ipvs.ipset"));
                restore(ns, IPTABLES, include_str!("hostile/kube-proxy-ipvs.rules"));
                // kube-proxy makes a dummy; not every kernel has one, and to others any device with the addresses is
                // the same.
                bridge(
                    ns,
                    "kube-ipvs0",
                    &["10.96.0.1/32", "10.96.0.10/32", "10.96.33.7/32"],
                );
            }
            Self::Firewalld => nft(ns, include_str!("hostile/firewalld.nft")),
            Self::Ufw => {
                restore(ns, IPTABLES, include_str!("hostile/ufw.rules"));
                restore(ns, IP6TABLES, include_str!("hostile/ufw.rules6"));
            }
            Self::Docker => {
                restore(ns, IPTABLES, include_str!("hostile/docker.rules"));
                bridge(ns, "docker0", &["172.17.0.1/16"]);
                bridge(ns, "br-85d47ab4ec2e", &["172.18.0.1/16"]);
                setting(ns, "ipv4/ip_forward", "1");
            }
            Self::CalicoIptables => {
                ipset(ns, include_str!("hostile/calico.ipset"));
                restore(ns, IPTABLES, include_str!("hostile/calico.rules"));
            }
            Self::CalicoNftables => nft(ns, include_str!("hostile/calico.nft")),
            Self::Routes => routes(ns),
            Self::StrictReversePath => {
                setting(ns, "ipv4/conf/all/rp_filter", "1");
                setting(ns, "ipv4/conf/default/rp_filter", "1");
            }
        }
    }
}

impl std::fmt::Display for Fixture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A host with fixtures, and what it looked like before we came.
#[derive(Debug)]
pub struct Host {
    before: Foreign,
    ours: Ours,
}

impl Host {
    /// Does all of it to the namespace, and remembers what is there that is not ours.
    pub fn apply(ns: &TestNs, fixtures: &[Fixture], ours: Ours) -> Self {
        for fixture in fixtures {
            fixture.apply(ns);
        }
        let before = dump(ns, &ours);
        Self { before, ours }
    }

    /// Panics with the difference if something foreign was changed since.
    pub fn assert_untouched(&self, ns: &TestNs) {
        self.before.assert_same(&dump(ns, &self.ours));
    }
}

fn setting(ns: &TestNs, key: &str, value: &str) {
    sysctl::write_if_different(ns.netns(), key, value).expect("write a setting");
}

/// A bridge without ports; without IPv6, whose addresses would come and go on their own.
fn bridge(ns: &TestNs, name: &str, addresses: &[&str]) {
    ns.ip(&format!("link add {name} type bridge"));
    setting(ns, &format!("ipv6/conf/{name}/disable_ipv6"), "1");
    for address in addresses {
        ns.ip(&format!("address add {address} dev {name}"));
    }
    ns.ip(&format!("link set {name} up"));
}

fn routes(ns: &TestNs) {
    bridge(ns, "br-foreign", &["172.30.0.1/24"]);
    for route in [
        "172.31.0.0/24 via 172.30.0.2 proto bird",
        "172.31.1.0/24 via 172.30.0.2 proto 80",
        "blackhole 172.31.2.0/24 proto 80",
        "192.168.200.0/24 via 172.30.0.2 proto static",
        "192.168.201.7/32 dev br-foreign scope link proto boot",
        "203.0.113.0/24 via 172.30.0.2 table 1000 proto static",
        "10.96.0.0/12 via 172.30.0.2 metric 50 proto zebra",
    ] {
        ns.ip(&format!("route add {route}"));
    }
    ns.ip("nexthop add id 77 via 172.30.0.3 dev br-foreign proto static");
    ns.ip("nexthop add id 78 blackhole proto bird");
    ns.ip("route add 172.31.3.0/24 nhid 77 proto static");
    ns.ip("rule add pref 31000 from 172.30.0.0/24 lookup 1000 proto static");
    ns.ip("-6 rule add pref 31001 from fd30::/64 lookup 1000");
}

fn nft(ns: &TestNs, rules: &str) {
    feed(ns.command("nft").args(["-f", "-"]), rules);
}

fn ipset(ns: &TestNs, sets: &str) {
    feed(ns.command("ipset").arg("restore"), sets);
}

fn restore(ns: &TestNs, program: &str, rules: &str) {
    feed(ns.command(program).args(["--noflush", "--wait"]), rules);
}

fn feed(command: &mut Command, input: &str) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    let fed = child
        .stdin
        .take()
        .expect("a pipe to the program")
        .write_all(input.as_bytes());
    let output = child.wait_with_output().expect("wait for the program");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    fed.expect("feed the program");
}
