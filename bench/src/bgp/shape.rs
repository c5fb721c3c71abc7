//! What the neighbours of a daemon under test send, and what each of them must receive.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bgpd::wire::{
    AsPath, Attributes, Codec, Family, FamilySet, NextHop, Nlri, Packer, PeerKind, Prefix,
};
use bytes::Bytes;

/// The AS of the daemon under test.
pub const DEVICE_AS: u32 = 65000;
/// The IPv4 address and identifier of the daemon under test.
pub const DEVICE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Prefix length of the IPv4 network that joins all of them.
pub const NETWORK_LEN: u8 = 16;
/// Prefix length of the IPv6 network that joins all of them.
pub const NETWORK_V6_LEN: u8 = 64;

/// The IPv6 address of whoever has this IPv4 address.
#[must_use]
pub const fn v6_of(address: Ipv4Addr) -> Ipv6Addr {
    let [_, _, a, b] = address.octets();
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, a as u16, b as u16)
}

/// The role of a neighbour, as the daemon is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// An ordinary iBGP neighbour.
    Internal,
    /// An iBGP neighbour that is a route reflector client (RFC 4456).
    Client,
    /// An eBGP neighbour.
    External,
    /// An eBGP neighbour served as by a route server (RFC 7947).
    Served,
}

/// What is measured after the sessions stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// Nothing more: the sessions themselves, and what they cost while nothing happens.
    Sessions,
    /// Everything is announced, then withdrawn.
    Withdraw,
    /// Everything is announced, then the first neighbour's connection ends.
    PeerDown,
    /// Everything is announced, then again and again a hundredth of it is withdrawn and announced.
    Churn,
    /// Everything is announced while a neighbour does not read; then it reads.
    Stalled,
    /// Everything is announced, and written into the kernel.
    Kernel,
}

/// How often [`Course::Churn`] withdraws and announces.
pub const FLAPS: u32 = 20;

impl Course {
    /// What the time of the second phase is the time of; `None` where there is no such phase.
    #[must_use]
    pub const fn second(self) -> Option<&'static str> {
        match self {
            Self::Sessions => None,
            Self::Withdraw => Some("all withdrawn"),
            Self::PeerDown => Some("routes of the lost peer gone"),
            Self::Churn => Some("20 times 1 % withdrawn and announced"),
            Self::Stalled => Some("the peer that had not read has all"),
            Self::Kernel => Some("all in the kernel"),
        }
    }
}

/// One neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its BGP identifier, and its address if the sessions are over IPv4.
    pub id: Ipv4Addr,
    /// Its AS.
    pub asn: u32,
    /// What the daemon takes it for.
    pub role: Role,
    /// The numbers of the prefixes that it sends.
    pub sends: std::ops::Range<u32>,
    /// How many prefixes of others must arrive; 0 where it is not measured.
    pub expects: u32,
    /// It does not read before it is told to.
    pub stalls: bool,
}

/// How prefix numbers become prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    base: u32,
    len: u8,
    v6: bool,
}

impl Layout {
    /// The prefix with this number.
    #[must_use]
    pub fn prefix(self, number: u32) -> Prefix {
        let bits = self.base + (number << (32 - u32::from(self.len)));
        if self.v6 {
            Prefix::v6(V6_BASE | u128::from(bits) << 64, self.len + 32)
        } else {
            Prefix::v4(bits, self.len)
        }
    }

    /// The number of a prefix, if it is one of ours.
    #[must_use]
    pub fn number(self, prefix: &Prefix) -> Option<u32> {
        let (bits, len) = match prefix.addr() {
            IpAddr::V4(address) => (u32::from(address), self.len),
            IpAddr::V6(address) => ((u128::from(address) >> 64) as u32, self.len + 32),
        };
        (prefix.len() == len && prefix.addr().is_ipv6() == self.v6)
            .then(|| bits.wrapping_sub(self.base) >> (32 - u32::from(self.len)))
    }

    /// The only family of the load.
    #[must_use]
    pub const fn family(self) -> Family {
        if self.v6 {
            Family::IPV6_UNICAST
        } else {
            Family::IPV4_UNICAST
        }
    }

    /// Whether sessions and prefixes are IPv6.
    #[must_use]
    pub const fn is_v6(self) -> bool {
        self.v6
    }
}

/// 2001:db8::/32; the 32 bits behind it are those that an IPv4 prefix would have.
const V6_BASE: u128 = 0x2001_0db8 << 96;

/// A whole load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in words.
    pub title: String,
    /// All neighbours.
    pub neighbours: Vec<Neighbour>,
    /// How many prefixes there are in all.
    pub prefixes: u32,
    /// Their form.
    pub layout: Layout,
    /// How many prefixes share one attribute set.
    pub per_set: u32,
    /// What happens.
    pub course: Course,
}

const SENDERS: u32 = u32::from_be_bytes([10, 77, 1, 1]);
const MONITOR: Ipv4Addr = Ipv4Addr::new(10, 77, 200, 1);

/// Addresses that end in neither 0 nor 255.
fn sender(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(SENDERS + index / 250 * 256 + index % 250)
}

impl Shape {
    /// iBGP senders with prefixes of their own, and one eBGP monitor: a node in a full mesh with a router above it.
    #[must_use]
    pub fn fan_in(senders: u32, each: u32) -> Self {
        let neighbour = |id, asn, role| Neighbour {
            id,
            asn,
            role,
            sends: 0..0,
            expects: 0,
            stalls: false,
        };
        let mut neighbours: Vec<Neighbour> = (0..senders)
            .map(|n| Neighbour {
                sends: n * each..(n + 1) * each,
                ..neighbour(sender(n), DEVICE_AS, Role::Internal)
            })
            .collect();
        neighbours.push(Neighbour {
            expects: senders * each,
            ..neighbour(MONITOR, 64900, Role::External)
        });
        Self {
            name: "fan-in",
            title: format!("{senders} iBGP peers x {each} prefixes, one monitor"),
            neighbours,
            prefixes: senders * each,
            layout: Layout {
                base: u32::from_be_bytes([16, 0, 0, 0]),
                len: 24,
                v6: false,
            },
            per_set: 100,
            course: Course::Withdraw,
        }
    }

    /// The same load under another name, with another course.
    #[must_use]
    pub fn then(mut self, name: &'static str, course: Course, what: &str) -> Self {
        self.name = name;
        self.course = course;
        self.title = format!("{}{what}", self.title);
        self
    }

    /// The same over IPv6, with IPv6 prefixes.
    #[must_use]
    pub fn over_v6(mut self, name: &'static str) -> Self {
        self.name = name;
        self.layout.v6 = true;
        self.title = format!("{}, all IPv6", self.title);
        self
    }

    /// With one more eBGP monitor, which stops reading when its session stands. Few prefixes share an attribute set, so that
    /// the kernel's buffers cannot hold what is sent to it: what does not fit waits in the daemon, or is not made yet.
    #[must_use]
    pub fn with_stalled_monitor(mut self) -> Self {
        let stalled = self.neighbours.last().map(|monitor| Neighbour {
            id: sender(self.neighbours.len() as u32),
            stalls: true,
            ..monitor.clone()
        });
        self.neighbours.extend(stalled);
        self.per_set = 4;
        self
    }

    /// Everybody sends and everybody must receive what the others sent.
    fn all_to_all(name: &'static str, title: String, count: u32, each: u32, role: Role) -> Self {
        let external = role == Role::Served;
        let neighbours = (0..count)
            .map(|n| Neighbour {
                id: sender(n),
                asn: if external { 64000 + n } else { DEVICE_AS },
                role,
                sends: n * each..(n + 1) * each,
                expects: (count - 1) * each,
                stalls: false,
            })
            .collect();
        Self {
            name,
            title,
            neighbours,
            prefixes: count * each,
            layout: Layout {
                base: u32::from_be_bytes([20, 0, 0, 0]),
                len: 26,
                v6: false,
            },
            per_set: 100,
            course: if each > 0 {
                Course::Withdraw
            } else {
                Course::Sessions
            },
        }
    }

    /// A route reflector and its clients, each with blocks of pods.
    #[must_use]
    pub fn reflector(clients: u32, each: u32) -> Self {
        let title = format!("route reflector, {clients} clients x {each} prefixes");
        Self::all_to_all("reflector", title, clients, each, Role::Client)
    }

    /// A route server and its eBGP peers.
    #[must_use]
    pub fn server(peers: u32, each: u32) -> Self {
        let title = format!("route server, {peers} eBGP peers x {each} prefixes");
        Self::all_to_all("server", title, peers, each, Role::Served)
    }

    /// Sessions without routes: how fast they come up, and what they cost afterwards.
    #[must_use]
    pub fn sessions(name: &'static str, count: u32) -> Self {
        let title = format!("{count} iBGP sessions without routes");
        Self::all_to_all(name, title, count, 0, Role::Internal)
    }

    /// The address of a neighbour.
    #[must_use]
    pub fn address(&self, neighbour: &Neighbour) -> IpAddr {
        self.address_of(neighbour.id)
    }

    /// The address of the daemon under test.
    #[must_use]
    pub fn device(&self) -> IpAddr {
        self.address_of(DEVICE)
    }

    fn address_of(&self, id: Ipv4Addr) -> IpAddr {
        if self.layout.v6 {
            v6_of(id).into()
        } else {
            id.into()
        }
    }

    /// The UPDATEs of a neighbour, and those that take everything back.
    #[must_use]
    pub fn messages(&self, neighbour: &Neighbour) -> (Vec<Bytes>, Vec<Bytes>) {
        self.messages_of(neighbour, neighbour.sends.clone())
    }

    /// The same of the first hundredth of a neighbour's prefixes.
    #[must_use]
    pub fn flap(&self, neighbour: &Neighbour) -> (Vec<Bytes>, Vec<Bytes>) {
        let std::ops::Range { start, end } = neighbour.sends;
        self.messages_of(neighbour, start..start + (end - start) / 100)
    }

    fn messages_of(
        &self,
        neighbour: &Neighbour,
        numbers: std::ops::Range<u32>,
    ) -> (Vec<Bytes>, Vec<Bytes>) {
        let packer = Packer::new(codec(neighbour, self.layout));
        let next_hop = NextHop::from(self.address(neighbour));
        let (mut announce, mut withdraw) = (Vec::new(), Vec::new());
        let mut from = numbers.start;
        while from < numbers.end {
            let to = (from + self.per_set).min(numbers.end);
            let routes: Vec<Nlri> = (from..to)
                .map(|n| Nlri::new(self.layout.prefix(n)))
                .collect();
            let set = 1 + (from - neighbour.sends.start) / self.per_set;
            let mut path = vec![64700, set, 1 + (u32::from(neighbour.id) & 0xffff)];
            if neighbour.asn != DEVICE_AS {
                path.insert(0, neighbour.asn);
            }
            let attributes = Attributes {
                as_path: AsPath::from_sequence(&path),
                local_pref: (neighbour.asn == DEVICE_AS).then_some(100),
                ..Attributes::default()
            };
            let family = self.layout.family();
            packer.announce(family, &attributes, &next_hop, &routes, &mut announce);
            packer.withdraw(family, &routes, &mut withdraw);
            from = to;
        }
        (announce, withdraw)
    }
}

/// What a neighbour's messages are written and read with.
#[must_use]
pub fn codec(neighbour: &Neighbour, layout: Layout) -> Codec {
    let kind = if neighbour.asn == DEVICE_AS {
        PeerKind::Ibgp
    } else {
        PeerKind::Ebgp
    };
    Codec {
        four_octet_as: true,
        families: FamilySet::from_iter([layout.family()]),
        ..Codec::basic(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bgpd::wire::{Framer, Message};
    use bytes::BytesMut;

    fn routes(messages: &[Bytes], neighbour: &Neighbour, layout: Layout) -> (Vec<u32>, Vec<u32>) {
        let (mut announced, mut withdrawn) = (Vec::new(), Vec::new());
        for bytes in messages {
            let frame = Framer::new().next(&mut BytesMut::from(&bytes[..]));
            let frame = frame.expect("a header").expect("a whole message");
            let Ok(Message::Update(update)) = Message::decode(&frame, &codec(neighbour, layout))
            else {
                panic!("not an UPDATE");
            };
            let number = |nlri: Nlri| layout.number(&nlri.prefix).expect("one of ours");
            announced.extend(
                update
                    .announcements()
                    .flat_map(|(_, b)| b.iter())
                    .map(number),
            );
            withdrawn.extend(update.withdrawals().map(number));
        }
        (announced, withdrawn)
    }

    #[test]
    fn a_neighbour_sends_its_own_prefixes_once_and_takes_the_same_back() {
        for shape in [
            Shape::fan_in(3, 250),
            Shape::server(4, 120),
            Shape::fan_in(2, 150).over_v6("v6"),
        ] {
            let neighbour = &shape.neighbours[1];
            let (announce, withdraw) = shape.messages(neighbour);
            let own: Vec<u32> = neighbour.sends.clone().collect();
            assert_eq!(
                routes(&announce, neighbour, shape.layout),
                (own.clone(), vec![])
            );
            assert_eq!(routes(&withdraw, neighbour, shape.layout), (vec![], own));
        }
    }

    #[test]
    fn neighbours_have_addresses_of_their_own() {
        let shape = Shape::sessions("idle", 1000);
        let addresses: std::collections::BTreeSet<_> =
            shape.neighbours.iter().map(|n| n.id).collect();
        assert_eq!(addresses.len(), 1000);
        assert!(addresses.iter().all(|a| !matches!(a.octets()[3], 0 | 255)));
    }
}
