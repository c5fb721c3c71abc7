//! The table `inet calico-nat`: translations of this node's containers.
//!
//! | chain | hook, priority | duty |
//! |---|---|---|
//! | `guard` | prerouting -300 | nobody but this host reaches its loopback addresses through a container's interface |
//! | `in`, `out` | prerouting, output nat -105 | destination: host ports and floating addresses, before kube-proxy |
//! | `back` | postrouting nat 105 | source: of a container that reaches itself through the host, and of `127.0.0.1` |
//!
//! Each translation is an element of a map, so a packet costs one lookup for each kind of mapping, however many there
//! are, and only the first packet of a flow pays. It is a table of its own, so it is the same beside either backend of
//! policy, and on a node where nobody asks for anything it does not exist. Every change writes the whole table in one
//! transaction: flows that are translated already stay so.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use cali_netlink::nft::{
    Base, BaseHook, Chain, ChainType, CmpOp, Data, DataType, Elem, Expr, Family, FibResult, Hook,
    Key, KeyType, Meta, NatKind, Policy, Reg, Rule, Set, TableName, Transaction, Verdict, fib_flag,
    nat_flag,
};

use cali_netlink::nft::matching::{cmp, family, load_address};

use super::Translation;

const DESTINATION_PRIORITY: i32 = -105;
const SOURCE_PRIORITY: i32 = 105;
const GUARD_PRIORITY: i32 = -300;
/// `RTN_LOCAL` (`include/uapi/linux/rtnetlink.h`).
const LOCAL: u32 = 2;

/// Our table.
pub(crate) fn table() -> TableName {
    TableName::new(Family::Inet, "calico-nat")
}

/// What the elements of a map stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Protocol and port, at any address of this host.
    AnyAddress,
    /// Address, protocol and port.
    OneAddress,
    /// Address, with all ports.
    Floating,
    /// Source and destination of a container's packet to itself: masqueraded.
    Hairpin,
    /// The same through a floating address, which becomes the source.
    FloatingHairpin,
    /// Targets of mappings, which this host may reach from `127.0.0.1`.
    Target,
}

const KINDS: [Kind; 6] = [
    Kind::AnyAddress,
    Kind::OneAddress,
    Kind::Floating,
    Kind::Hairpin,
    Kind::FloatingHairpin,
    Kind::Target,
];

/// The kernel's set or map for a kind and family.
pub(crate) fn set(kind: Kind, v4: bool) -> Set {
    use DataType::{InetProto, InetService};
    let address = if v4 {
        DataType::Ipv4Addr
    } else {
        DataType::Ipv6Addr
    };
    let family = if v4 { 4 } else { 6 };
    // A concatenation's number has 6 bits for each field.
    let address_and_port = DataType::Other(
        address.number() << 6 | InetService.number(),
        address.size() + 4,
    );
    let map = |name: &str, fields: &[DataType], data| {
        Set::map(format!("{name}{family}"), KeyType::concat(fields), data)
    };
    match kind {
        Kind::AnyAddress => map("ports", &[InetProto, InetService], address_and_port),
        Kind::OneAddress => map(
            "bound-ports",
            &[address, InetProto, InetService],
            address_and_port,
        ),
        Kind::Floating => map("floating", &[address], address),
        Kind::FloatingHairpin => map("floating-hairpin", &[address, address], address),
        Kind::Hairpin => Set::exact(
            format!("hairpin{family}"),
            KeyType::concat(&[address, address]),
        ),
        Kind::Target => Set::exact(format!("targets{family}"), KeyType::one(address)),
    }
}

/// All elements: by kind and family. Of two translations that ask for the same, the younger has it.
pub(crate) fn elements<'a>(
    translations: impl IntoIterator<Item = &'a Translation>,
) -> BTreeMap<(Kind, bool), BTreeMap<Key, Option<Key>>> {
    let mut ordered: Vec<&Translation> = translations.into_iter().collect();
    ordered.sort_by_key(|t| t.sequence);
    let mut all: BTreeMap<(Kind, bool), BTreeMap<Key, Option<Key>>> = BTreeMap::new();
    let mut put = |kind, v4, key, value| {
        all.entry((kind, v4)).or_default().insert(key, value);
    };
    let twice = |ip: IpAddr| Key::concat(&[Key::ip(ip), Key::ip(ip)]);
    for translation in ordered {
        for mapping in &translation.ports {
            let service = [
                Key::byte(mapping.transport.number()),
                Key::port(mapping.host_port),
            ];
            for target in translation.targets(mapping) {
                let v4 = target.is_ipv4();
                let value = Key::concat(&[Key::ip(target), Key::port(mapping.container_port)]);
                match mapping.host_ip.filter(|ip| !ip.is_unspecified()) {
                    None => put(Kind::AnyAddress, v4, Key::concat(&service), Some(value)),
                    Some(ip) => {
                        let [protocol, port] = &service;
                        let key = Key::concat([&Key::ip(ip), protocol, port]);
                        put(Kind::OneAddress, v4, key, Some(value));
                    }
                }
                put(Kind::Hairpin, v4, twice(target), None);
                put(Kind::Target, v4, Key::ip(target), None);
            }
        }
        for (external, internal) in &translation.floating {
            let v4 = internal.is_ipv4();
            put(
                Kind::Floating,
                v4,
                Key::ip(*external),
                Some(Key::ip(*internal)),
            );
            put(
                Kind::FloatingHairpin,
                v4,
                twice(*internal),
                Some(Key::ip(*external)),
            );
        }
    }
    all
}

/// Writes the table anew for these translations; removes it if there are none.
pub(crate) fn transaction<'a>(
    translations: impl IntoIterator<Item = &'a Translation>,
) -> Transaction {
    let elements = elements(translations);
    let mut transaction = Transaction::new(table());
    // Added first, so that there is one to delete.
    transaction.add_table();
    transaction.delete_table();
    if elements.is_empty() {
        return transaction;
    }
    transaction.add_table();
    for ((kind, v4), members) in &elements {
        let set = set(*kind, *v4);
        transaction.add_set(&set);
        let members: Vec<Elem> = members
            .iter()
            .map(|(key, value)| {
                let mut elem = Elem::new(key.clone());
                elem.data = value.clone().map(Data::Value);
                elem
            })
            .collect();
        transaction.add_elements(&set, &members);
    }
    let has = |kind, v4| elements.contains_key(&(kind, v4));
    let destination: Arc<str> = "destination".into();
    transaction.add_chain(&Chain::regular(Arc::clone(&destination)));
    for (name, chain_type, hook, priority) in [
        ("guard", ChainType::Filter, Hook::Prerouting, GUARD_PRIORITY),
        ("in", ChainType::Nat, Hook::Prerouting, DESTINATION_PRIORITY),
        ("out", ChainType::Nat, Hook::Output, DESTINATION_PRIORITY),
        ("back", ChainType::Nat, Hook::Postrouting, SOURCE_PRIORITY),
    ] {
        if name == "guard" && !has(Kind::Target, true) {
            continue;
        }
        let name: Arc<str> = name.into();
        let base = BaseHook {
            chain_type,
            hook,
            priority,
            policy: Policy::Accept,
        };
        transaction.add_chain(&Chain::base(Arc::clone(&name), base));
        match &*name {
            "guard" => transaction.append_rule(&name, &guard()),
            "back" => {
                for rule in sources(has) {
                    transaction.append_rule(&name, &rule);
                }
            }
            _ => {
                let jump = Expr::Verdict(Verdict::Jump(Arc::clone(&destination)));
                transaction.append_rule(&name, &Rule::new([jump]));
            }
        }
    }
    for kind in KINDS {
        for v4 in [true, false] {
            if has(kind, v4)
                && let Some(rule) = destination_rule(kind, v4)
            {
                transaction.append_rule(&destination, &rule);
            }
        }
    }
    transaction
}

/// Loads protocol and destination port into two words.
fn service(first: u8) -> [Expr; 2] {
    [
        Expr::Meta {
            key: Meta::L4Proto,
            dreg: Reg::word(first),
        },
        Expr::Payload {
            base: Base::Transport,
            offset: 2,
            len: 2,
            dreg: Reg::word(first + 1),
        },
    ]
}

fn words(v4: bool) -> u8 {
    if v4 { 1 } else { 4 }
}

fn nat_family(v4: bool) -> Family {
    if v4 { Family::Ip } else { Family::Ip6 }
}

fn lookup(kind: Kind, v4: bool, yields: bool) -> Expr {
    Expr::Lookup {
        set: set(kind, v4).name,
        sreg: Reg::R1,
        dreg: yields.then_some(Reg::R1),
        negated: false,
    }
}

/// A packet to a mapped destination gets the one of the container.
fn destination_rule(kind: Kind, v4: bool) -> Option<Rule> {
    let mut exprs = family(v4).to_vec();
    match kind {
        Kind::AnyAddress => {
            if !v4 {
                // A packet that comes from ::1 can never leave on another interface.
                exprs.push(load_address(false, false, Reg::R1));
                exprs.push(cmp(
                    CmpOp::Neq,
                    Key::ip(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])),
                ));
            }
            exprs.push(Expr::Fib {
                result: FibResult::AddrType,
                flags: fib_flag::DADDR,
                dreg: Reg::R1,
            });
            exprs.push(cmp(CmpOp::Eq, Key::host32(LOCAL)));
            exprs.extend(service(0));
        }
        Kind::OneAddress => {
            exprs.push(load_address(false, v4, Reg::R1));
            exprs.extend(service(words(v4)));
        }
        Kind::Floating => exprs.push(load_address(false, v4, Reg::R1)),
        Kind::Hairpin | Kind::FloatingHairpin | Kind::Target => return None,
    }
    exprs.push(lookup(kind, v4, true));
    let port = (kind != Kind::Floating).then(|| Reg::word(words(v4)));
    exprs.push(Expr::Nat {
        kind: NatKind::Dnat,
        family: nat_family(v4),
        addr: Some((Reg::R1, Reg::R1)),
        port: port.map(|port| (port, port)),
        flags: 0,
    });
    Some(Rule::new(exprs))
}

fn sources(has: impl Fn(Kind, bool) -> bool) -> Vec<Rule> {
    let masquerade = Expr::Masquerade {
        port: None,
        flags: nat_flag::PROTO_RANDOM_FULLY,
    };
    let mut rules = Vec::new();
    for v4 in [true, false] {
        let ends = |kind, yields| {
            let mut exprs = family(v4).to_vec();
            exprs.push(load_address(true, v4, Reg::word(0)));
            exprs.push(load_address(false, v4, Reg::word(words(v4))));
            exprs.push(lookup(kind, v4, yields));
            exprs
        };
        if has(Kind::Hairpin, v4) {
            let mut exprs = ends(Kind::Hairpin, false);
            exprs.push(masquerade.clone());
            rules.push(Rule::new(exprs).comment("a container reaches itself through the host"));
        }
        if has(Kind::FloatingHairpin, v4) {
            let mut exprs = ends(Kind::FloatingHairpin, true);
            exprs.push(Expr::Nat {
                kind: NatKind::Snat,
                family: nat_family(v4),
                addr: Some((Reg::R1, Reg::R1)),
                port: None,
                flags: 0,
            });
            rules.push(
                Rule::new(exprs).comment("a container reaches itself by its floating address"),
            );
        }
    }
    if has(Kind::Target, true) {
        let mut exprs = family(true).to_vec();
        exprs.extend(loopback(true));
        exprs.push(load_address(false, true, Reg::R1));
        exprs.push(lookup(Kind::Target, true, false));
        exprs.push(masquerade);
        rules.push(Rule::new(exprs).comment("this host by 127.0.0.1"));
    }
    rules
}

/// The address is in 127.0.0.0/8.
fn loopback(source: bool) -> [Expr; 3] {
    [
        load_address(source, true, Reg::R1),
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::bytes(&[255, 0, 0, 0]),
            xor: Key::bytes(&[0; 4]),
        },
        cmp(CmpOp::Eq, Key::bytes(&[127, 0, 0, 0])),
    ]
}

/// Answers to `127.0.0.1` need `route_localnet` on the container's interface; what a container itself sends there is
/// dropped before any translation is undone.
fn guard() -> Rule {
    let mut exprs = vec![
        Expr::Meta {
            key: Meta::IifName,
            dreg: Reg::R1,
        },
        cmp(
            CmpOp::Eq,
            Key::bytes(cali_api::kubernetes::INTERFACE_PREFIX.as_bytes()),
        ),
    ];
    exprs.extend(family(true));
    exprs.extend(loopback(false));
    exprs.push(Expr::Verdict(Verdict::Drop));
    Rule::new(exprs).comment("loopback addresses are not for containers")
}

#[cfg(test)]
mod tests {
    use super::super::{PortMapping, Transport};
    use super::*;

    fn translation(sequence: u64, address: &str, host_ip: Option<&str>) -> Translation {
        Translation {
            sequence,
            addresses: vec![address.parse().unwrap(), "fd00::1".parse().unwrap()],
            ports: vec![PortMapping {
                host_ip: host_ip.map(|ip| ip.parse().unwrap()),
                host_port: 80,
                container_port: 8080,
                transport: Transport::Tcp,
            }],
            floating: Vec::new(),
        }
    }

    fn target(elements: &BTreeMap<(Kind, bool), BTreeMap<Key, Option<Key>>>, kind: Kind) -> Key {
        let members = &elements[&(kind, true)];
        members.values().next().unwrap().clone().unwrap()
    }

    #[test]
    fn the_younger_of_two_has_the_port_and_the_older_gets_it_back() {
        let (old, young) = (
            translation(1, "10.0.0.1", None),
            translation(2, "10.0.0.2", None),
        );
        let value = |ip: &str| Key::concat(&[Key::ip(ip.parse().unwrap()), Key::port(8080)]);
        assert_eq!(
            target(&elements([&young, &old]), Kind::AnyAddress),
            value("10.0.0.2")
        );
        assert_eq!(
            target(&elements([&old]), Kind::AnyAddress),
            value("10.0.0.1")
        );
    }

    #[test]
    fn an_address_of_the_host_limits_a_mapping_to_itself_or_its_family() {
        let one = elements([&translation(1, "10.0.0.1", Some("192.0.2.1"))]);
        assert!(one.contains_key(&(Kind::OneAddress, true)));
        assert!(
            !one.keys()
                .any(|(kind, v4)| *kind == Kind::AnyAddress || !v4)
        );
        let family = elements([&translation(1, "10.0.0.1", Some("0.0.0.0"))]);
        assert!(family.contains_key(&(Kind::AnyAddress, true)));
        assert!(!family.contains_key(&(Kind::AnyAddress, false)));
        let both = elements([&translation(1, "10.0.0.1", None)]);
        assert!(both.contains_key(&(Kind::AnyAddress, false)));
    }
}
