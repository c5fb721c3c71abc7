//! Which tunnel addresses the node should have. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_api::selector::Selector;
use cali_api::v3::{AllowedUse, EncapMode, IPPool, Node};
use cali_ipam::tunnel::Tunnel;

/// How long an address is kept after the last pool that asked for it stopped doing so. Longer than devices and routes outlive it (peers
/// see an edit of a pool later than this node), so that the address is not given to a pod while a tunnel still has it.
pub const LINGER: Duration = Duration::from_secs(120);

/// All tunnels, in Calico's order. Pools ask for most of them; WireGuard is asked for by its device.
pub const TUNNELS: [Tunnel; 5] = [
    Tunnel::Wireguard,
    Tunnel::WireguardV6,
    Tunnel::Ipip,
    Tunnel::Vxlan,
    Tunnel::VxlanV6,
];

/// Where the address of a tunnel stands in the Node resource.
pub fn published(tunnel: Tunnel, node: &Node) -> Option<IpAddr> {
    let wireguard = node.spec.wireguard.as_ref();
    match tunnel {
        Tunnel::Ipip => node
            .spec
            .bgp
            .as_ref()?
            .ipv4_ipip_tunnel_addr
            .map(IpAddr::V4),
        Tunnel::Vxlan => node.spec.ipv4_vxlan_tunnel_addr.map(IpAddr::V4),
        Tunnel::VxlanV6 => node.spec.ipv6_vxlan_tunnel_addr.map(IpAddr::V6),
        Tunnel::Wireguard => wireguard?.interface_ipv4_address.map(IpAddr::V4),
        Tunnel::WireguardV6 => wireguard?.interface_ipv6_address.map(IpAddr::V6),
    }
}

/// Writes the address into the Node resource. The MAC address is left to the derivation from the node's name.
pub fn publish(tunnel: Tunnel, node: &mut Node, address: Option<IpAddr>) {
    let v4 = address.and_then(|address| match address {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    });
    let v6 = address.and_then(|address| match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => Some(v6),
    });
    match tunnel {
        Tunnel::Ipip => node.spec.bgp.get_or_insert_default().ipv4_ipip_tunnel_addr = v4,
        Tunnel::Vxlan => node.spec.ipv4_vxlan_tunnel_addr = v4,
        Tunnel::VxlanV6 => node.spec.ipv6_vxlan_tunnel_addr = v6,
        Tunnel::Wireguard => {
            node.spec
                .wireguard
                .get_or_insert_default()
                .interface_ipv4_address = v4
        }
        Tunnel::WireguardV6 => {
            node.spec
                .wireguard
                .get_or_insert_default()
                .interface_ipv6_address = v6
        }
    }
}

fn wanted_by(tunnel: Tunnel, pool: &IPPool, encrypts: [bool; 2]) -> bool {
    let wanted = match tunnel {
        Tunnel::Ipip => pool.spec.ipip() != EncapMode::Never,
        Tunnel::Vxlan | Tunnel::VxlanV6 => pool.spec.vxlan() != EncapMode::Never,
        Tunnel::Wireguard => encrypts[0],
        Tunnel::WireguardV6 => encrypts[1],
    };
    wanted && pool.spec.cidr.is_v4() == tunnel.is_v4()
}

/// What is to be done for one tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// All is as it should be.
    Nothing,
    /// Write this address, which IPAM already holds for us, into the Node resource.
    Publish(IpAddr),
    /// Take an address from one of these pools, publish it, and then return these.
    Assign {
        /// Names of the pools.
        pools: Vec<String>,
        /// What is held and no longer right.
        instead_of: Vec<IpAddr>,
    },
    /// Take the address out of the Node resource, then return these.
    Release(Vec<IpAddr>),
    /// Nothing yet: ask again at this time.
    Wait(Instant),
}

/// Decides, and remembers since when a tunnel has not been wanted.
#[derive(Debug, Default)]
pub struct Planner {
    /// The WireGuard devices for IPv4 and IPv6 stand and are to encrypt. Their public keys are told only once they have their
    /// addresses, so those cannot be waited for here.
    pub encrypts: [bool; 2],
    unwanted_since: BTreeMap<Tunnel, Instant>,
}

impl Planner {
    /// What to do for a tunnel. `held` is what IPAM holds under the tunnel's handle.
    pub fn plan(
        &mut self,
        tunnel: Tunnel,
        pools: &[IPPool],
        node: &Node,
        held: &[IpAddr],
        now: Instant,
    ) -> Action {
        let eligible: Vec<&IPPool> = pools
            .iter()
            .filter(|pool| is_eligible(tunnel, pool, node, self.encrypts))
            .collect();
        let current = published(tunnel, node);
        if eligible.is_empty() {
            if current.is_none() && held.is_empty() {
                self.unwanted_since.remove(&tunnel);
                return Action::Nothing;
            }
            let since = *self.unwanted_since.entry(tunnel).or_insert(now);
            let due = since + LINGER;
            return if now < due {
                Action::Wait(due)
            } else {
                Action::Release(held.to_vec())
            };
        }
        self.unwanted_since.remove(&tunnel);
        let right = |address: &IpAddr| {
            eligible
                .iter()
                .any(|pool| pool.spec.cidr.contains(*address))
        };
        if let Some(current) = current
            && held.contains(&current)
            && right(&current)
        {
            return Action::Nothing;
        }
        // Left by a start that ended between allocation and publication.
        if let Some(address) = held.iter().find(|address| right(address)) {
            return Action::Publish(*address);
        }
        let pools = eligible
            .iter()
            .map(|pool| pool.metadata.name.clone())
            .collect();
        Action::Assign {
            pools,
            instead_of: held.to_vec(),
        }
    }
}

fn is_eligible(tunnel: Tunnel, pool: &IPPool, node: &Node, encrypts: [bool; 2]) -> bool {
    let selects = |selector: &str| {
        selector.is_empty()
            || Selector::parse(selector).is_ok_and(|s| s.matches(&node.metadata.labels))
    };
    wanted_by(tunnel, pool, encrypts)
        && !pool.spec.disabled
        && pool.metadata.deletion_timestamp.is_none()
        && pool.spec.allows(AllowedUse::Tunnel)
        && selects(&pool.spec.node_selector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::v3::{IPPoolSpec, NodeSpec};

    fn pool(name: &str, cidr: &str, vxlan: EncapMode) -> IPPool {
        let spec = IPPoolSpec {
            vxlan_mode: Some(vxlan),
            ..IPPoolSpec::new(cidr.parse().unwrap())
        };
        IPPool::named(name, spec)
    }

    fn node(address: Option<&str>) -> Node {
        let mut node = Node::named("n1", NodeSpec::default());
        publish(
            Tunnel::Vxlan,
            &mut node,
            address.map(|a| a.parse().unwrap()),
        );
        node
    }

    fn plan(pools: &[IPPool], node: &Node, held: &[&str]) -> Action {
        let held: Vec<IpAddr> = held.iter().map(|a| a.parse().unwrap()).collect();
        Planner::default().plan(Tunnel::Vxlan, pools, node, &held, Instant::now())
    }

    #[test]
    fn a_tunnel_gets_an_address_of_a_pool_that_asks_for_it() {
        let pools = [
            pool("a", "10.1.0.0/16", EncapMode::Never),
            pool("b", "10.2.0.0/16", EncapMode::CrossSubnet),
        ];
        let assign = |old: &[&str]| Action::Assign {
            pools: vec!["b".into()],
            instead_of: old.iter().map(|a| a.parse().unwrap()).collect(),
        };
        assert_eq!(plan(&pools, &node(None), &[]), assign(&[]));
        assert_eq!(
            plan(&pools, &node(Some("10.2.0.1")), &["10.2.0.1"]),
            Action::Nothing
        );
        assert_eq!(
            plan(&pools, &node(Some("10.2.0.1")), &[]),
            assign(&[]),
            "lost in IPAM"
        );
        assert_eq!(
            plan(&pools, &node(Some("10.1.0.1")), &["10.1.0.1"]),
            assign(&["10.1.0.1"]),
            "wrong pool"
        );
        assert_eq!(
            plan(&pools, &node(None), &["10.2.0.9"]),
            Action::Publish("10.2.0.9".parse().unwrap())
        );
    }

    #[test]
    fn wireguard_gets_an_address_of_any_pool_once_its_device_stands() {
        let pools = [pool("a", "10.1.0.0/16", EncapMode::Never)];
        let (mut planner, node) = (Planner::default(), node(None));
        let mut plan = |encrypts| {
            planner.encrypts = encrypts;
            planner.plan(Tunnel::Wireguard, &pools, &node, &[], Instant::now())
        };
        assert_eq!(plan([false, true]), Action::Nothing);
        assert!(matches!(plan([true, false]), Action::Assign { .. }));
    }

    #[test]
    fn a_pool_that_is_disabled_not_for_tunnels_or_for_other_nodes_does_not_count() {
        for change in [
            |pool: &mut IPPool| pool.spec.disabled = true,
            |pool: &mut IPPool| pool.spec.allowed_uses = vec![AllowedUse::Workload],
            |pool: &mut IPPool| pool.spec.node_selector = "rack == '1'".into(),
        ] {
            let mut pool = pool("b", "10.2.0.0/16", EncapMode::Always);
            change(&mut pool);
            assert_eq!(plan(&[pool], &node(None), &[]), Action::Nothing);
        }
    }

    #[test]
    fn an_address_is_returned_only_when_it_has_not_been_wanted_for_a_while() {
        let now = Instant::now();
        let address: IpAddr = "10.2.0.1".parse().unwrap();
        let (with, without) = (
            pool("b", "10.2.0.0/16", EncapMode::Always),
            pool("b", "10.2.0.0/16", EncapMode::Never),
        );
        let mut planner = Planner::default();
        let mut at = |pool: &IPPool, seconds| {
            let now = now + Duration::from_secs(seconds);
            planner.plan(
                Tunnel::Vxlan,
                std::slice::from_ref(pool),
                &node(Some("10.2.0.1")),
                &[address],
                now,
            )
        };
        assert!(matches!(at(&without, 0), Action::Wait(_)));
        assert_eq!(at(&with, 100), Action::Nothing);
        assert!(
            matches!(at(&without, 130), Action::Wait(_)),
            "wanted in between"
        );
        assert_eq!(at(&without, 250), Action::Release(vec![address]));
    }
}
