//! What the neighbours of a daemon under test send, and what each of them must receive.

use std::net::Ipv4Addr;

use bgpd::wire::{
    AsPath, Attributes, Codec, Family, FamilySet, NextHop, Nlri, Packer, PeerKind, Prefix,
};
use bytes::Bytes;

/// The AS of the daemon under test.
pub const DEVICE_AS: u32 = 65000;
/// The address of the daemon under test.
pub const DEVICE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Prefix length of the network that joins all of them.
pub const NETWORK_LEN: u8 = 16;

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

/// One neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address and BGP identifier.
    pub address: Ipv4Addr,
    /// Its AS.
    pub asn: u32,
    /// What the daemon takes it for.
    pub role: Role,
    /// The numbers of the prefixes that it sends.
    pub sends: std::ops::Range<u32>,
    /// How many prefixes of others must arrive; 0 where it is not measured.
    pub expects: u32,
}

/// How prefix numbers become prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    base: u32,
    len: u8,
}

impl Layout {
    /// The prefix with this number.
    #[must_use]
    pub fn prefix(self, number: u32) -> Prefix {
        Prefix::v4(self.base + (number << (32 - u32::from(self.len))), self.len)
    }

    /// The number of a prefix, if it is one of ours.
    #[must_use]
    pub fn number(self, prefix: &Prefix) -> Option<u32> {
        let std::net::IpAddr::V4(address) = prefix.addr() else {
            return None;
        };
        (prefix.len() == self.len)
            .then(|| u32::from(address).wrapping_sub(self.base) >> (32 - u32::from(self.len)))
    }
}

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
        let mut neighbours: Vec<Neighbour> = (0..senders)
            .map(|n| Neighbour {
                address: sender(n),
                asn: DEVICE_AS,
                role: Role::Internal,
                sends: n * each..(n + 1) * each,
                expects: 0,
            })
            .collect();
        neighbours.push(Neighbour {
            address: MONITOR,
            asn: 64900,
            role: Role::External,
            sends: 0..0,
            expects: senders * each,
        });
        Self {
            name: "fan-in",
            title: format!("{senders} iBGP peers x {each} prefixes, one monitor"),
            neighbours,
            prefixes: senders * each,
            layout: Layout {
                base: u32::from_be_bytes([16, 0, 0, 0]),
                len: 24,
            },
            per_set: 100,
        }
    }

    /// Everybody sends and everybody must receive what the others sent.
    fn all_to_all(name: &'static str, title: String, count: u32, each: u32, role: Role) -> Self {
        let external = role == Role::Served;
        let neighbours = (0..count)
            .map(|n| Neighbour {
                address: sender(n),
                asn: if external { 64000 + n } else { DEVICE_AS },
                role,
                sends: n * each..(n + 1) * each,
                expects: (count - 1) * each,
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
            },
            per_set: 100,
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

    /// The UPDATEs of a neighbour, and those that take everything back.
    #[must_use]
    pub fn messages(&self, neighbour: &Neighbour) -> (Vec<Bytes>, Vec<Bytes>) {
        let packer = Packer::new(codec(neighbour));
        let next_hop = NextHop::V4(neighbour.address);
        let (mut announce, mut withdraw) = (Vec::new(), Vec::new());
        let mut from = neighbour.sends.start;
        while from < neighbour.sends.end {
            let to = (from + self.per_set).min(neighbour.sends.end);
            let routes: Vec<Nlri> = (from..to)
                .map(|n| Nlri::new(self.layout.prefix(n)))
                .collect();
            let set = 1 + (from - neighbour.sends.start) / self.per_set;
            let mut path = vec![64700, set, 1 + (u32::from(neighbour.address) & 0xffff)];
            if neighbour.asn != DEVICE_AS {
                path.insert(0, neighbour.asn);
            }
            let attributes = Attributes {
                as_path: AsPath::from_sequence(&path),
                local_pref: (neighbour.asn == DEVICE_AS).then_some(100),
                ..Attributes::default()
            };
            let family = Family::IPV4_UNICAST;
            packer.announce(family, &attributes, &next_hop, &routes, &mut announce);
            packer.withdraw(family, &routes, &mut withdraw);
            from = to;
        }
        (announce, withdraw)
    }
}

/// What a neighbour's messages are written and read with.
#[must_use]
pub fn codec(neighbour: &Neighbour) -> Codec {
    let kind = if neighbour.asn == DEVICE_AS {
        PeerKind::Ibgp
    } else {
        PeerKind::Ebgp
    };
    Codec {
        four_octet_as: true,
        families: FamilySet::IPV4,
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
            let Ok(Message::Update(update)) = Message::decode(&frame, &codec(neighbour)) else {
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
        for shape in [Shape::fan_in(3, 250), Shape::server(4, 120)] {
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
            shape.neighbours.iter().map(|n| n.address).collect();
        assert_eq!(addresses.len(), 1000);
        assert!(addresses.iter().all(|a| !matches!(a.octets()[3], 0 | 255)));
    }
}
