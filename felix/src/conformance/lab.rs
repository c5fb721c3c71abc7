//! A node and its pods as network namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use cali_netlink::testing::TestNs;

const HOST_MAC: &str = "ee:ee:ee:ee:ee:ee";

/// A place that packets come from and go to: a pod, or somebody outside.
#[derive(Debug)]
pub struct Place {
    /// Its namespace.
    pub ns: TestNs,
    /// The node's side of the way to it.
    pub interface: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Place {
    /// Its address of a family.
    #[must_use]
    pub fn address(&self, v4: bool) -> IpAddr {
        if v4 { self.v4.into() } else { self.v6.into() }
    }
}

/// A node, its pods and the world.
#[derive(Debug)]
pub struct Lab {
    /// The node.
    pub node: TestNs,
    /// Its pods.
    pub pods: Vec<Place>,
    /// Beyond `eth0`.
    pub world: Place,
    /// Beyond `eth1`.
    pub lan: Place,
}

impl Lab {
    /// A lab with so many pods.
    #[must_use]
    pub fn new(pods: u8) -> Self {
        let node = TestNs::new("node");
        for setting in [
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            // Refusals are answers of the test: none may be withheld.
            "net.ipv4.icmp_ratelimit=0",
            "net.ipv6.icmp.ratelimit=0",
        ] {
            node.run("sysctl", &["-qw", setting]);
        }
        let pods = (1..=pods).map(|number| pod(&node, number)).collect();
        let world = outside(
            &node,
            "eth0",
            (Ipv4Addr::new(192, 0, 2, 0), "2001:db8::".parse().ok()),
        );
        let lan = outside(
            &node,
            "eth1",
            (Ipv4Addr::new(198, 51, 100, 0), "2001:db8:1::".parse().ok()),
        );
        node.run("sysctl", &["-qw", "net.ipv4.ping_group_range=0 0"]);
        Self {
            node,
            pods,
            world,
            lan,
        }
    }

    /// The node's own address towards somebody outside.
    #[must_use]
    pub fn host_address(&self, towards: &Place, v4: bool) -> IpAddr {
        match (v4, towards.interface == self.lan.interface) {
            (true, false) => Ipv4Addr::new(192, 0, 2, 1).into(),
            (true, true) => Ipv4Addr::new(198, 51, 100, 1).into(),
            (false, lan) => Ipv6Addr::new(0x2001, 0xdb8, u16::from(lan), 0, 0, 0, 0, 1).into(),
        }
    }

    /// The node's interfaces outside with their addresses.
    #[must_use]
    pub fn interfaces(&self) -> BTreeMap<Arc<str>, BTreeSet<IpAddr>> {
        [&self.world, &self.lan]
            .into_iter()
            .map(|place| {
                let addresses = [true, false].map(|v4| self.host_address(place, v4));
                (place.interface.as_str().into(), addresses.into())
            })
            .collect()
    }
}

fn pod(node: &TestNs, number: u8) -> Place {
    let ns = TestNs::new("pod");
    let interface = format!("calipod{number}");
    let v4 = Ipv4Addr::new(10, 65, 0, number);
    let v6 = Ipv6Addr::new(0xfd65, 0, 0, 0, 0, 0, 0, number.into());
    let mac = format!("02:00:00:00:00:{number:02x}");
    node.ip(&format!(
        "link add {interface} type veth peer name eth0 netns {}",
        ns.name()
    ));
    node.ip(&format!("link set {interface} address {HOST_MAC} up"));
    ns.ip(&format!("link set eth0 address {mac} up"));
    ns.ip(&format!("addr add {v4}/32 dev eth0"));
    ns.ip(&format!("-6 addr add {v6}/128 dev eth0 nodad"));
    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        ns.ip(&format!(
            "{family} neigh add {gateway} lladdr {HOST_MAC} dev eth0 nud permanent"
        ));
        ns.ip(&format!(
            "{family} route add default via {gateway} dev eth0 onlink"
        ));
    }
    for address in [IpAddr::from(v4), v6.into()] {
        node.ip(&format!(
            "neigh add {address} lladdr {mac} dev {interface} nud permanent"
        ));
        node.ip(&format!("route add {address} dev {interface}"));
    }
    ns.run("sysctl", &["-qw", "net.ipv4.ping_group_range=0 0"]);
    Place {
        ns,
        interface,
        v4,
        v6,
    }
}

fn outside(node: &TestNs, interface: &str, nets: (Ipv4Addr, Option<Ipv6Addr>)) -> Place {
    let ns = TestNs::new(if interface == "eth0" { "world" } else { "lan" });
    let v4 = |host: u32| Ipv4Addr::from_bits(nets.0.to_bits() + host);
    let base = nets.1.unwrap_or(Ipv6Addr::UNSPECIFIED).to_bits();
    let v6 = |host: u128| Ipv6Addr::from_bits(base + host);
    node.ip(&format!(
        "link add {interface} type veth peer name eth0 netns {}",
        ns.name()
    ));
    node.ip(&format!("link set {interface} up"));
    ns.ip("link set eth0 up");
    node.ip(&format!("addr add {}/24 dev {interface}", v4(1)));
    node.ip(&format!("-6 addr add {}/64 dev {interface} nodad", v6(1)));
    ns.ip(&format!("addr add {}/24 dev eth0", v4(2)));
    ns.ip(&format!("-6 addr add {}/64 dev eth0 nodad", v6(2)));
    ns.ip(&format!("route add default via {}", v4(1)));
    ns.ip(&format!("-6 route add default via {}", v6(1)));
    ns.run("sysctl", &["-qw", "net.ipv4.ping_group_range=0 0"]);
    Place {
        ns,
        interface: interface.to_owned(),
        v4: v4(2),
        v6: v6(2),
    }
}
