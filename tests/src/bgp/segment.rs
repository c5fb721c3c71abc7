//! One Ethernet segment with a namespace per speaker, and both address families on it.

use cali_netlink::testing::TestNs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// A bridge in a namespace of its own; speakers are plugged into it.
#[derive(Debug)]
pub struct Segment {
    bridge: TestNs,
    plugged: u8,
}

/// The interface of every host.
pub const INTERFACE: &str = "eth0";

/// A speaker's place on the segment: a namespace with [`INTERFACE`].
#[derive(Debug)]
pub struct Host {
    pub ns: TestNs,
    number: u8,
}

impl Segment {
    pub fn new() -> Self {
        let bridge = TestNs::new("bgp");
        bridge.ip("link add br0 type bridge");
        bridge.ip("link set br0 up");
        Self { bridge, plugged: 0 }
    }

    /// A new host, with the next address: 10.77.0.N/24 and fd77::N/64 and fe80::N/64.
    pub fn host(&mut self) -> Arc<Host> {
        self.plugged += 1;
        let number = self.plugged;
        let ns = TestNs::new(&format!("bgp{number}"));
        let bridge = self.bridge.name();
        ns.ip(&format!(
            "link add eth0 type veth peer name port{number} netns {bridge}"
        ));
        let host = Host { ns, number };
        host.ns
            .ip(&format!("addr add {}/24 dev eth0", host.address(true)));
        host.ns.ip("link set eth0 addrgenmode none");
        // Nobody else has these addresses: the wait of duplicate address detection would only cost time.
        for address in [host.address(false), host.link_local()] {
            host.ns.ip(&format!("addr add {address}/64 dev eth0 nodad"));
        }
        self.bridge
            .ip(&format!("link set port{number} master br0 up"));
        host.ns.ip("link set eth0 up");
        Arc::new(host)
    }
}

impl Default for Segment {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// The address of one family.
    pub fn address(&self, v4: bool) -> IpAddr {
        if v4 {
            IpAddr::V4(self.router_id())
        } else {
            IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number.into()))
        }
    }

    /// The link-local address, `fe80::N`.
    pub fn link_local(&self) -> IpAddr {
        IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, self.number.into()))
    }

    /// The IPv4 address, which is the BGP identifier as well.
    pub fn router_id(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number)
    }

    /// The kernel's routes to a prefix, as `ip route` prints them; empty if there is none.
    pub fn kernel_route(&self, prefix: &cali_api::Cidr) -> String {
        let family = if prefix.is_v4() { "-4" } else { "-6" };
        self.ns.ip(&format!("{family} route show exact {prefix}"))
    }

    /// A counter of the kernel's TCP, for example `TcpExtTCPMD5Failure`.
    pub fn tcp_counter(&self, name: &str) -> u64 {
        let text = self.ns.run("nstat", &["-asz", name]);
        text.lines()
            .filter_map(|line| line.strip_prefix(name))
            .find_map(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap_or_else(|| panic!("no counter {name} in {text}"))
    }
}
