//! WireGuard as an encryption layer over every pool: the decision what the device, its peers, the rule and the routes of
//! its table are to be. Pure; [`apply`] carries it out.
//!
//! The table is asked before the main one (rule 99, for packets without the device's own mark), so a peer with a key gets
//! its pods' packets through WireGuard whatever their pool's mode, and everything else falls through (`throw`).
//!
//! # Invariants
//! - A prefix is routed into the device only after a handshake with its peer: only then has the peer our key and takes our
//!   packets. Until then the pool's own way carries it, and nothing is lost.
//! - A key that two nodes have published is used for neither.
//! - The private key is made by the process that puts it into the kernel's device, and is written nowhere else.

pub(crate) mod apply;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use cali_api::v3::FelixConfigurationSpec;
use cali_api::{Cidr, NodeName};
use cali_netlink::{IpNetwork, WgKey, WgPeer};

use crate::plan::Underlay;
use crate::{Overhead, Resolver};

/// A handshake that is older counts as none where the underlay's own addresses are encrypted (`REJECT_AFTER_TIME` is
/// 180 s): a peer that lost its key must be reachable again without us.
const HOST_HANDSHAKE_LIFE: i64 = 195;
/// Keepalive towards peers whose host addresses are encrypted: it keeps handshakes young.
const HOST_KEEPALIVE: u16 = 25;
/// Keepalive towards a peer without a handshake: what makes the kernel try one without any traffic.
const FIRST_KEEPALIVE: u16 = 1;

/// Settings of FelixConfiguration for one family, with Calico's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FamilySettings {
    /// `wireguardEnabled`.
    pub enabled: bool,
    /// `wireguardInterfaceName`.
    pub device: String,
    /// `wireguardListeningPort`.
    pub port: u16,
    /// `wireguardMTU`; none follows the underlay.
    pub mtu: Option<u32>,
}

/// Settings of FelixConfiguration, with Calico's defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardSettings {
    /// IPv4.
    pub v4: FamilySettings,
    /// IPv6.
    pub v6: FamilySettings,
    /// `wireguardRoutingRulePriority`.
    pub priority: u32,
    /// The routing table, of both families.
    pub table: u32,
    /// The mark of outer packets: one bit.
    pub mark: u32,
    /// `wireguardHostEncryptionEnabled`.
    pub hosts: bool,
    /// `wireguardKeepAlive`, in seconds.
    pub keepalive: u16,
}

impl Default for WireguardSettings {
    fn default() -> Self {
        let family = |device: &str, port| FamilySettings {
            enabled: false,
            device: device.to_owned(),
            port,
            mtu: None,
        };
        Self {
            v4: family("wireguard.cali", 51820),
            v6: family("wg-v6.cali", 51821),
            priority: 99,
            table: 1,
            mark: 0x0020_0000,
            hosts: false,
            keepalive: 0,
        }
    }
}

/// The part of the settings that is about encryption.
impl From<&FelixConfigurationSpec> for WireguardSettings {
    fn from(spec: &FelixConfigurationSpec) -> Self {
        let defaults = Self::default();
        let family =
            |default: FamilySettings, enabled: Option<bool>, device: &Option<String>, port, mtu| {
                FamilySettings {
                    enabled: enabled.unwrap_or(default.enabled),
                    device: device.clone().unwrap_or(default.device),
                    port: Option::unwrap_or(port, default.port),
                    mtu: Option::filter(mtu, |mtu: &u32| *mtu != 0),
                }
            };
        let table = spec.route_table_ranges.as_ref();
        let table = table
            .and_then(|ranges| ranges.first().copied())
            .or(spec.route_table_range);
        let keepalive = spec.wireguard_persistent_keep_alive;
        Self {
            v4: family(
                defaults.v4,
                spec.wireguard_enabled,
                &spec.wireguard_interface_name,
                spec.wireguard_listening_port,
                spec.wireguard_mtu,
            ),
            v6: family(
                defaults.v6,
                spec.wireguard_enabled_v6,
                &spec.wireguard_interface_name_v6,
                spec.wireguard_listening_port_v6,
                spec.wireguard_mtu_v6,
            ),
            priority: spec
                .wireguard_routing_rule_priority
                .unwrap_or(defaults.priority),
            table: table.map_or(defaults.table, |range| range.min),
            // Calico's: accept, pass, drop and two of scratch come before.
            mark: spec
                .mark_bits()
                .nth(5)
                .or_else(|| spec.mark_bits().last())
                .unwrap_or(defaults.mark),
            hosts: spec.wireguard_host_encryption_enabled.unwrap_or(false),
            keepalive: keepalive.map_or(0, |keepalive| {
                u16::try_from(keepalive.0.as_secs()).unwrap_or(u16::MAX)
            }),
        }
    }
}

impl WireguardSettings {
    /// Settings of one family.
    #[must_use]
    pub const fn family(&self, v4: bool) -> &FamilySettings {
        if v4 { &self.v4 } else { &self.v6 }
    }

    /// Either family is encrypted.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.v4.enabled || self.v6.enabled
    }
}

/// Which node holds which prefix: blocks and borrowed addresses.
pub type Holders = BTreeMap<Cidr, NodeName>;

/// One family's objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WgPlan {
    pub(crate) mtu: u32,
    pub(crate) address: Option<Cidr>,
    pub(crate) peers: BTreeMap<WgKey, WgPeer>,
    /// Who has the key.
    pub(crate) nodes: BTreeMap<WgKey, NodeName>,
    /// Prefixes of the table: through the peer with this key, or past the table.
    pub(crate) routes: BTreeMap<Cidr, Option<WgKey>>,
    /// Those of the routes that are hosts' own addresses.
    pub(crate) hosts: BTreeSet<Cidr>,
    pub(crate) problems: Vec<String>,
}

/// Plans one family; none while this node has no address of it.
pub(crate) fn plan(
    resolver: &Resolver,
    holders: &Holders,
    settings: &WireguardSettings,
    underlay: &Underlay,
    v4: bool,
) -> Option<WgPlan> {
    let local = resolver.local()?;
    local.underlay(v4)?;
    let (overhead, link) = if v4 {
        (Overhead::WireguardV4, underlay.mtu_v4)
    } else {
        (Overhead::WireguardV6, underlay.mtu_v6)
    };
    let family = settings.family(v4);
    let mut plan = WgPlan {
        mtu: family.mtu.unwrap_or_else(|| {
            overhead.device_mtu(link.unwrap_or(crate::plan::FALLBACK_UNDERLAY_MTU))
        }),
        address: local.wireguard(v4).address.map(Cidr::host),
        ..WgPlan::default()
    };
    let keys = unique_keys(resolver, v4, &mut plan.problems);
    for (node, key) in &keys {
        let Some(underlay) = resolver.node(node).and_then(|node| node.underlay(v4)) else {
            continue;
        };
        let peer = WgPeer {
            endpoint: Some(SocketAddr::new(underlay.ip(), family.port)),
            keepalive: settings.keepalive,
            prefixes: BTreeSet::new(),
        };
        plan.peers.insert(*key, peer);
        plan.nodes.insert(*key, node.clone());
    }
    let mut add = |prefix: Cidr, node: &NodeName| {
        let key = keys.get(node).filter(|key| plan.peers.contains_key(*key));
        if let Some(key) = key
            && let Some(peer) = plan.peers.get_mut(key)
        {
            peer.prefixes.insert(network(&prefix));
        }
        plan.routes.insert(prefix, key.copied());
    };
    for (prefix, node) in holders.iter().filter(|(prefix, _)| prefix.is_v4() == v4) {
        add(*prefix, node);
    }
    for remote in resolver.remotes() {
        if let Some(address) = remote.wireguard(v4).address {
            add(Cidr::host(address), &remote.name);
        }
        if settings.hosts
            && keys.contains_key(&remote.name)
            && let Some(host) = remote.underlay(v4)
        {
            let host = Cidr::host(host.ip());
            add(host, &remote.name);
            plan.hosts.insert(host);
        }
    }
    if settings.hosts {
        for peer in plan.peers.values_mut() {
            peer.keepalive = peer.keepalive.max(HOST_KEEPALIVE);
        }
    }
    Some(plan)
}

/// Keys of other nodes; one that is published twice (or is our own) belongs to nobody.
fn unique_keys(
    resolver: &Resolver,
    v4: bool,
    problems: &mut Vec<String>,
) -> BTreeMap<NodeName, WgKey> {
    let mut nodes: BTreeMap<WgKey, Vec<NodeName>> = BTreeMap::new();
    for node in resolver.local().into_iter().chain(resolver.remotes()) {
        if let Some(key) = node.wireguard(v4).key {
            nodes.entry(key).or_default().push(node.name.clone());
        }
    }
    let mut unique = BTreeMap::new();
    for (key, nodes) in nodes {
        match &nodes[..] {
            [only] if only != resolver.local_name() => {
                unique.insert(only.clone(), key);
            }
            [_] => {}
            several => {
                let names: Vec<&str> = several.iter().map(NodeName::as_str).collect();
                problems.push(format!(
                    "nodes {} have published one WireGuard key: it is used for none of them",
                    names.join(", ")
                ));
            }
        }
    }
    unique
}

impl WgPlan {
    /// The peers as they are to be set, given when each last shook hands (seconds since the epoch; 0: never).
    pub(crate) fn peers_now(&self, handshakes: &BTreeMap<WgKey, i64>) -> BTreeMap<WgKey, WgPeer> {
        let mut peers = self.peers.clone();
        for (key, peer) in &mut peers {
            if handshakes.get(key).copied().unwrap_or(0) == 0 {
                peer.keepalive = FIRST_KEEPALIVE;
            }
        }
        peers
    }

    /// Where each prefix of the table goes: true into the device, false past the table.
    pub(crate) fn routes_now(
        &self,
        handshakes: &BTreeMap<WgKey, i64>,
        now: i64,
    ) -> BTreeMap<Cidr, bool> {
        let proven = |prefix: &Cidr, key: &WgKey| {
            let last = handshakes.get(key).copied().unwrap_or(0);
            last != 0 && (!self.hosts.contains(prefix) || now - last < HOST_HANDSHAKE_LIFE)
        };
        self.routes
            .iter()
            .map(|(prefix, key)| (*prefix, key.is_some_and(|key| proven(prefix, &key))))
            .collect()
    }

    /// Peers that have not answered yet.
    pub(crate) fn waiting(&self, handshakes: &BTreeMap<WgKey, i64>) -> Vec<&NodeName> {
        self.nodes
            .iter()
            .filter(|(key, _)| handshakes.get(key).copied().unwrap_or(0) == 0)
            .map(|(_, node)| node)
            .collect()
    }
}

pub(crate) fn network(prefix: &Cidr) -> IpNetwork {
    // A Cidr's length is within its family's bounds, which is all that can be refused here.
    IpNetwork::new(prefix.addr(), prefix.prefix_len())
        .unwrap_or_else(|_| IpNetwork::from(prefix.addr()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Endpoint, WgNode};

    fn node(id: u8, key: Option<u8>) -> Endpoint {
        Endpoint {
            v4: Some(format!("10.1.0.{id}/24").parse().unwrap()),
            wireguard_v4: WgNode {
                key: key.map(|key| WgKey([key; 32])),
                address: Some([192, 168, id, 9].into()),
            },
            ..Endpoint::named(NodeName::from(format!("node{id}").as_str()))
        }
    }

    fn planned(nodes: &[Endpoint], settings: &WireguardSettings) -> WgPlan {
        let mut resolver = Resolver::new(NodeName::from("node1"));
        for node in nodes {
            resolver.set_node(node.clone());
        }
        let holders = Holders::from([
            ("192.168.2.0/26".parse().unwrap(), NodeName::from("node2")),
            ("192.168.3.0/26".parse().unwrap(), NodeName::from("node3")),
            ("fd00::/122".parse().unwrap(), NodeName::from("node2")),
        ]);
        let underlay = Underlay {
            mtu_v4: Some(1500),
            mtu_v6: None,
        };
        plan(&resolver, &holders, settings, &underlay, true).unwrap()
    }

    fn routes(plan: &WgPlan, handshakes: &[(u8, i64)], now: i64) -> Vec<String> {
        let handshakes = handshakes
            .iter()
            .map(|(key, at)| (WgKey([*key; 32]), *at))
            .collect();
        let routes = plan.routes_now(&handshakes, now);
        routes
            .into_iter()
            .map(|(prefix, device)| format!("{prefix} {}", if device { "device" } else { "throw" }))
            .collect()
    }

    #[test]
    fn a_peer_with_a_key_and_a_handshake_is_encrypted_and_others_are_not() {
        let plan = planned(
            &[node(1, Some(1)), node(2, Some(2)), node(3, None)],
            &WireguardSettings::default(),
        );
        assert_eq!(plan.mtu, 1440);
        assert_eq!(plan.peers.len(), 1);
        let peer = &plan.peers[&WgKey([2; 32])];
        assert_eq!(peer.endpoint, Some("10.1.0.2:51820".parse().unwrap()));
        let prefixes: Vec<String> = peer.prefixes.iter().map(ToString::to_string).collect();
        assert_eq!(prefixes, ["192.168.2.0/26", "192.168.2.9/32"]);
        let before = [
            "192.168.2.0/26 throw",
            "192.168.2.9/32 throw",
            "192.168.3.0/26 throw",
            "192.168.3.9/32 throw",
        ];
        assert_eq!(routes(&plan, &[], 100), before, "no handshake yet");
        let mut after = before;
        after[0] = "192.168.2.0/26 device";
        after[1] = "192.168.2.9/32 device";
        assert_eq!(routes(&plan, &[(2, 50)], 100_000), after);
    }

    #[test]
    fn a_key_of_two_nodes_is_used_for_neither() {
        let plan = planned(
            &[node(1, Some(1)), node(2, Some(7)), node(3, Some(7))],
            &WireguardSettings::default(),
        );
        assert!(plan.peers.is_empty());
        assert!(
            plan.problems[0].contains("node2, node3"),
            "{:?}",
            plan.problems
        );
    }

    #[test]
    fn without_a_handshake_the_kernel_is_made_to_try() {
        let plan = planned(
            &[node(1, Some(1)), node(2, Some(2))],
            &WireguardSettings::default(),
        );
        let keepalive = |at| {
            let peers = plan.peers_now(&BTreeMap::from([(WgKey([2; 32]), at)]));
            peers[&WgKey([2; 32])].keepalive
        };
        assert_eq!((keepalive(0), keepalive(1)), (FIRST_KEEPALIVE, 0));
        assert_eq!(plan.waiting(&BTreeMap::new()), [&NodeName::from("node2")]);
    }

    #[test]
    fn a_hosts_own_address_is_encrypted_only_while_handshakes_are_young() {
        let settings = WireguardSettings {
            hosts: true,
            ..WireguardSettings::default()
        };
        let plan = planned(&[node(1, Some(1)), node(2, Some(2))], &settings);
        let host = |now| routes(&plan, &[(2, 1000)], now)[0].clone();
        assert_eq!(host(1100), "10.1.0.2/32 device");
        assert_eq!(host(1200), "10.1.0.2/32 throw");
        assert_eq!(plan.peers[&WgKey([2; 32])].keepalive, HOST_KEEPALIVE);
    }
}
