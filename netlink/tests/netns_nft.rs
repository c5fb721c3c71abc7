//! nf_tables against the real kernel, with `nft list ruleset` as the independent oracle. Run as root.

#![allow(clippy::unwrap_used)]

mod nft_lab;

use std::{sync::Arc, time::Duration};

use cali_netlink::{
    nft::{
        Base, BaseHook, Chain, ChainType, CmpOp, Ct, DataType, Elem, Expr, Family, FibResult, Hook,
        Key, KeyType, Meta, NatKind, Object, Policy, Position, Reg, Reject, Rt, Rule, Set,
        TableName, Transaction, Verdict, ct_state, fib_flag, nat_flag,
    },
    testing::TestNs,
};

use nft_lab::{begin, name, open, table};

const R1: Reg = Reg::R1;

/// What `nft` prints, without indentation, one line per line.
fn listing(ns: &TestNs) -> Vec<String> {
    ns.run("nft", &["list", "ruleset"])
        .lines()
        .map(|line| line.trim().to_owned())
        .collect()
}

fn expect(ns: &TestNs, wanted: &[&str]) {
    let seen = listing(ns);
    for line in wanted {
        assert!(
            seen.iter().any(|seen| seen == line),
            "missing {line:?} in\n{}",
            seen.join("\n")
        );
    }
}

fn meta(key: Meta) -> Expr {
    Expr::Meta { key, dreg: R1 }
}

fn is(value: Key) -> Expr {
    Expr::Cmp {
        op: CmpOp::Eq,
        sreg: R1,
        value,
    }
}

fn nfproto(number: u8) -> [Expr; 2] {
    [meta(Meta::NfProto), is(Key::byte(number))]
}

fn l4proto(number: u8) -> [Expr; 2] {
    [meta(Meta::L4Proto), is(Key::byte(number))]
}

fn saddr4() -> Expr {
    Expr::Payload {
        base: Base::Network,
        offset: 12,
        len: 4,
        dreg: R1,
    }
}

fn rule(parts: &[&[Expr]]) -> Rule {
    Rule::new(parts.concat())
}

const COUNTER: Expr = Expr::Counter {
    packets: 0,
    bytes: 0,
};

#[test]
fn chains_print_as_meant() {
    let (ns, nft) = open("chains");
    let mut tx = begin();
    let base = |chain_type, hook, priority, policy| BaseHook {
        chain_type,
        hook,
        priority,
        policy,
    };
    tx.add_chain(&Chain::base(
        "cali-forward",
        base(ChainType::Filter, Hook::Forward, 0, Policy::Accept),
    ));
    tx.add_chain(&Chain::base(
        "cali-raw",
        base(ChainType::Filter, Hook::Prerouting, -300, Policy::Drop),
    ));
    tx.add_chain(&Chain::base(
        "cali-nat",
        base(ChainType::Nat, Hook::Postrouting, 110, Policy::Accept),
    ));
    tx.add_chain(&Chain {
        comment: Some("to the pod".into()),
        ..Chain::regular("cali-tw-1")
    });
    tx.switch_table(TableName::new(Family::Arp, "calico"));
    tx.add_table();
    tx.add_chain(&Chain::base(
        "cali-arp",
        base(ChainType::Filter, Hook::Input, 0, Policy::Accept),
    ));
    nft.commit(tx).unwrap();
    expect(
        &ns,
        &[
            "table inet calico {",
            "type filter hook forward priority filter; policy accept;",
            "type filter hook prerouting priority raw; policy drop;",
            "type nat hook postrouting priority srcnat + 10; policy accept;",
            "comment \"to the pod\"",
            "table arp calico {",
            "type filter hook input priority filter; policy accept;",
        ],
    );
    let chains = nft.chains(Some(&table())).unwrap();
    assert_eq!(chains.len(), 4);
    assert_eq!(
        chains[1].chain.base,
        Some(base(
            ChainType::Filter,
            Hook::Prerouting,
            -300,
            Policy::Drop
        ))
    );
    assert_eq!(chains[3].chain.comment.as_deref(), Some("to the pod"));
    assert_eq!(nft.tables().unwrap().len(), 2);
}

/// Every expression, as `nft` prints it, and as it comes back from the kernel.
#[test]
fn expressions_print_as_meant_and_read_back() {
    let (ns, nft) = open("exprs");
    let mut tx = begin();
    let (plain, forward, nat, snat, raw) = (
        name("cali-x"),
        name("cali-forward"),
        name("cali-dnat"),
        name("cali-snat"),
        name("cali-raw"),
    );
    tx.add_chain(&Chain::regular(Arc::clone(&plain)));
    tx.add_chain(&Chain::regular("cali-y"));
    for (chain, chain_type, hook) in [
        (&forward, ChainType::Filter, Hook::Forward),
        (&nat, ChainType::Nat, Hook::Prerouting),
        (&snat, ChainType::Nat, Hook::Postrouting),
        (&raw, ChainType::Filter, Hook::Prerouting),
    ] {
        let base = BaseHook {
            chain_type,
            hook,
            priority: -150,
            policy: Policy::Accept,
        };
        tx.add_chain(&Chain::base(Arc::clone(chain), base));
    }
    let verdict = |verdict| [Expr::Verdict(verdict)];
    let ct = |key, dreg| Expr::Ct {
        key,
        original: None,
        dreg,
    };
    let bits = |mask: u32| Expr::Bitwise {
        sreg: R1,
        dreg: R1,
        mask: Key::host32(mask),
        xor: Key::host32(0),
    };
    let some_set = |value: u32| Expr::Cmp {
        op: CmpOp::Neq,
        sreg: R1,
        value: Key::host32(value),
    };
    let dport = Expr::Payload {
        base: Base::Transport,
        offset: 2,
        len: 2,
        dreg: R1,
    };
    let set = |value: Key| Expr::Immediate { dreg: R1, value };
    let cases: Vec<(&Arc<str>, Rule, &str)> = vec![
        (
            &plain,
            rule(&[&verdict(Verdict::Accept)]).comment("hello"),
            "accept comment \"hello\"",
        ),
        (
            &plain,
            rule(&[&verdict(Verdict::Jump(name("cali-y")))]),
            "jump cali-y",
        ),
        (
            &plain,
            rule(&[&verdict(Verdict::Goto(name("cali-y")))]),
            "goto cali-y",
        ),
        (&plain, rule(&[&verdict(Verdict::Return)]), "return"),
        (
            &plain,
            rule(&[
                &nfproto(2),
                &[
                    saddr4(),
                    Expr::Bitwise {
                        sreg: R1,
                        dreg: R1,
                        mask: Key::bytes(&[255, 255, 0, 0]),
                        xor: Key::bytes(&[0; 4]),
                    },
                    is(Key::bytes(&[10, 65, 0, 0])),
                    COUNTER,
                ],
                &verdict(Verdict::Drop),
            ]),
            "ip saddr 10.65.0.0/16 counter packets 0 bytes 0 drop",
        ),
        (
            &plain,
            rule(&[&[meta(Meta::IifName), is(Key::ifname("cali123")), COUNTER]]),
            "iifname \"cali123\" counter packets 0 bytes 0",
        ),
        (
            &plain,
            rule(&[
                &[
                    ct(Ct::State, R1),
                    bits(ct_state::ESTABLISHED | ct_state::RELATED),
                    some_set(0),
                ],
                &verdict(Verdict::Accept),
            ]),
            "ct state established,related accept",
        ),
        (
            &plain,
            rule(&[
                &[ct(Ct::Mark, R1), is(Key::host32(0x10))],
                &verdict(Verdict::Accept),
            ]),
            "ct mark 0x00000010 accept",
        ),
        (
            &plain,
            rule(&[&[
                meta(Meta::Mark),
                bits(0x100),
                is(Key::host32(0x100)),
                COUNTER,
            ]]),
            "meta mark & 0x00000100 == 0x00000100 counter packets 0 bytes 0",
        ),
        (
            &plain,
            rule(&[&[
                set(Key::host32(0x20)),
                Expr::MetaSet {
                    key: Meta::Mark,
                    sreg: R1,
                },
            ]]),
            "meta mark set 0x00000020",
        ),
        (
            &plain,
            rule(&[&[
                set(Key::host32(0x30)),
                Expr::CtSet {
                    key: Ct::Mark,
                    sreg: R1,
                },
            ]]),
            "ct mark set 0x00000030",
        ),
        (
            &plain,
            rule(&[
                &l4proto(6),
                &[
                    dport.clone(),
                    Expr::Range {
                        negated: false,
                        sreg: R1,
                        from: Key::port(1000),
                        to: Key::port(2000),
                    },
                ],
                &verdict(Verdict::Drop),
            ]),
            "tcp dport 1000-2000 drop",
        ),
        (
            &plain,
            rule(&[&[
                Expr::Limit {
                    rate: 10,
                    per: Duration::from_secs(1),
                    burst: 5,
                    bytes: false,
                    over: false,
                },
                Expr::NfLog {
                    group: 2,
                    prefix: "A|drop".into(),
                    snaplen: 80,
                },
            ]]),
            "limit rate 10/second log prefix \"A|drop\" group 2 snaplen 80",
        ),
        (
            &plain,
            rule(&[
                &[Expr::ConnLimit {
                    count: 5,
                    over: true,
                }],
                &verdict(Verdict::Drop),
            ]),
            "ct count over 5 drop",
        ),
        (
            &forward,
            rule(&[&l4proto(6), &[Expr::Reject(Reject::TcpReset)]]),
            "meta l4proto tcp reject with tcp reset",
        ),
        (
            &forward,
            rule(&[&[Expr::Reject(Reject::Icmpx(3))]]),
            "reject with icmpx admin-prohibited",
        ),
        (
            &forward,
            rule(&[
                &l4proto(6),
                &[
                    Expr::Payload {
                        base: Base::Transport,
                        offset: 13,
                        len: 1,
                        dreg: R1,
                    },
                    Expr::Bitwise {
                        sreg: R1,
                        dreg: R1,
                        mask: Key::byte(2),
                        xor: Key::byte(0),
                    },
                    Expr::Cmp {
                        op: CmpOp::Neq,
                        sreg: R1,
                        value: Key::byte(0),
                    },
                    Expr::Rt {
                        key: Rt::TcpMss,
                        dreg: R1,
                    },
                    Expr::Byteorder {
                        sreg: R1,
                        dreg: R1,
                        to_network: true,
                        len: 2,
                        size: 2,
                    },
                    Expr::TcpOptionSet {
                        kind: 2,
                        offset: 2,
                        len: 2,
                        sreg: R1,
                    },
                ],
            ]),
            "tcp flags syn tcp option maxseg size set rt mtu",
        ),
        (
            &forward,
            rule(&[
                &nfproto(2),
                &[
                    Expr::Payload {
                        base: Base::Network,
                        offset: 0,
                        len: 2,
                        dreg: R1,
                    },
                    Expr::Bitwise {
                        sreg: R1,
                        dreg: R1,
                        mask: Key::bytes(&[0xff, 0x03]),
                        xor: Key::bytes(&[0, 46 << 2]),
                    },
                    Expr::PayloadSet {
                        base: Base::Network,
                        offset: 0,
                        len: 2,
                        sreg: R1,
                        checksum: Some(10),
                    },
                ],
            ]),
            "ip dscp set ef",
        ),
        (
            &raw,
            rule(&[
                &[
                    Expr::Fib {
                        result: FibResult::Oif,
                        flags: fib_flag::SADDR | fib_flag::MARK | fib_flag::IIF,
                        dreg: R1,
                    },
                    is(Key::host32(0)),
                ],
                &verdict(Verdict::Drop),
            ]),
            "fib saddr . mark . iif oif 0 drop",
        ),
        (
            &raw,
            rule(&[&l4proto(17), &[dport, is(Key::port(4789)), Expr::Notrack]]),
            "udp dport 4789 notrack",
        ),
        (
            &nat,
            rule(&[
                &nfproto(2),
                &l4proto(6),
                &[
                    Expr::Immediate {
                        dreg: R1,
                        value: Key::bytes(&[10, 65, 0, 5]),
                    },
                    Expr::Immediate {
                        dreg: Reg::R2,
                        value: Key::port(8080),
                    },
                    Expr::Nat {
                        kind: NatKind::Dnat,
                        family: Family::Ip,
                        addr: Some((R1, R1)),
                        port: Some((Reg::R2, Reg::R2)),
                        flags: 0,
                    },
                ],
            ]),
            "meta nfproto ipv4 meta l4proto tcp dnat ip to 10.65.0.5:8080",
        ),
        (
            &snat,
            rule(&[&[Expr::Masquerade {
                port: None,
                flags: nat_flag::PROTO_RANDOM_FULLY,
            }]]),
            "masquerade fully-random",
        ),
        (
            &snat,
            rule(&[&[Expr::Masquerade {
                port: None,
                flags: 0,
            }]])
            .comment("last"),
            "masquerade comment \"last\"",
        ),
    ];
    for (index, (chain, rule, _)) in cases.iter().enumerate() {
        tx.append_rule(chain, &rule.clone().tag(index as u64));
    }
    nft.commit(tx).unwrap();
    let text = listing(&ns);
    for (index, (chain, rule, wanted)) in cases.iter().enumerate() {
        assert!(
            text.iter().any(|line| line == wanted),
            "missing {wanted:?} in\n{}",
            text.join("\n")
        );
        let seen = nft.rules(&table(), Some(chain)).unwrap();
        let seen = seen
            .into_iter()
            .find(|seen| seen.rule.tag == Some(index as u64))
            .unwrap();
        assert_eq!(seen.rule, rule.clone().tag(index as u64));
    }
}

#[test]
fn sets_and_maps_print_as_meant_and_read_back() {
    let (ns, nft) = open("sets");
    let mut tx = begin();
    tx.add_chain(&Chain::regular("cali-tw-1"));
    let v4 = KeyType::one(DataType::Ipv4Addr);
    let concat = KeyType::concat(&[
        DataType::Ipv4Addr,
        DataType::InetProto,
        DataType::InetService,
    ]);
    let address = |text: &str| Key::ip(text.parse().unwrap());
    let tuple = |ip: &str, port: u16| Key::concat([&address(ip), &Key::byte(6), &Key::port(port)]);
    let sets = [
        (
            Set {
                comment: Some("pods".into()),
                ..Set::exact("cali40s", v4.clone())
            },
            vec![
                Elem::new(address("10.0.0.1")),
                Elem::new(address("10.0.0.2")),
            ],
            "elements = { 10.0.0.1, 10.0.0.2 }",
        ),
        (
            Set::interval("cali40n", v4.clone()),
            vec![
                Elem::prefix("10.1.0.0/16".parse().unwrap()),
                Elem::prefix("10.2.0.0/16".parse().unwrap()),
                Elem::prefix("192.0.2.7/32".parse().unwrap()),
                Elem::prefix("240.0.0.0/4".parse().unwrap()),
            ],
            "elements = { 10.1.0.0/16, 10.2.0.0/16,",
        ),
        (
            Set::interval("cali60n", KeyType::one(DataType::Ipv6Addr)),
            vec![Elem::prefix("fd00::/8".parse().unwrap())],
            "elements = { fd00::/8 }",
        ),
        (
            Set::exact("cali40c", concat.clone()),
            vec![Elem::new(tuple("10.0.0.1", 80))],
            "elements = { 10.0.0.1 . tcp . 80 }",
        ),
        (
            Set::interval("cali40p", concat),
            vec![Elem::range(
                tuple("10.3.0.0", 1000),
                tuple("10.3.255.255", 2000),
            )],
            "elements = { 10.3.0.0/16 . tcp . 1000-2000 }",
        ),
        (
            Set {
                counter: true,
                ..Set::verdict_map("cali-fw", KeyType::one(DataType::IfName))
            },
            vec![Elem::new(Key::ifname("cali1")).verdict(Verdict::Goto(name("cali-tw-1")))],
            "elements = { \"cali1\" counter packets 0 bytes 0 : goto cali-tw-1 }",
        ),
        (
            Set::verdict_map(
                "cali-port",
                KeyType::concat(&[DataType::InetProto, DataType::InetService]),
            ),
            vec![Elem::new(Key::concat([&Key::byte(17), &Key::port(53)])).verdict(Verdict::Accept)],
            "elements = { udp . 53 : accept }",
        ),
        (
            Set::map("cali-nat", v4.clone(), DataType::Ipv4Addr),
            vec![Elem::new(address("203.0.113.1")).value(address("10.0.0.9"))],
            "elements = { 203.0.113.1 : 10.0.0.9 }",
        ),
        (
            Set::exact(
                "cali-ifip",
                KeyType::concat(&[DataType::IfName, DataType::Mark, DataType::Ipv4Addr]),
            ),
            vec![Elem::new(Key::concat([
                &Key::ifname("cali1"),
                &Key::host32(0x10),
                &address("10.0.0.1"),
            ]))],
            "elements = { \"cali1\" . 0x00000010 . 10.0.0.1 }",
        ),
        (
            Set::exact("cali-mark", KeyType::one(DataType::Mark)),
            vec![Elem::new(Key::host32(0x10))],
            "elements = { 0x00000010 }",
        ),
    ];
    for (set, elements, _) in &sets {
        tx.add_set(set);
        tx.add_elements(set, elements);
    }
    let timed = Set {
        timeout: true,
        ..Set::exact("cali-held", v4)
    };
    tx.add_set(&timed);
    let held = Elem {
        comment: Some("why".into()),
        ..Elem::new(address("10.9.9.9")).timeout(Duration::from_secs(600))
    };
    tx.add_elements(&timed, [&held]);
    nft.commit(tx).unwrap();

    let text = listing(&ns);
    let listed = nft.sets(&table()).unwrap();
    for (set, elements, wanted) in &sets {
        assert!(
            text.iter().any(|line| line == wanted),
            "missing {wanted:?} in\n{}",
            text.join("\n")
        );
        assert!(
            listed.iter().any(|listed| listed.set == *set),
            "{set:?} in {listed:#?}"
        );
        let mut seen = nft.elements(&table(), set).unwrap();
        seen.sort();
        for elem in &mut seen {
            elem.counter = None;
        }
        assert_eq!(seen, *elements);
    }
    let seen = nft.elements(&table(), &timed).unwrap();
    assert_eq!(
        (seen[0].timeout, seen[0].comment.as_deref()),
        (held.timeout, Some("why"))
    );
    assert!(
        seen[0]
            .expires
            .is_some_and(|left| left <= Duration::from_secs(600))
    );

    // Members come and go, one by one.
    let (set, elements, _) = &sets[1];
    let mut tx = Transaction::new(table());
    tx.delete_elements(set, [&elements[0]]);
    tx.add_elements(set, [&Elem::prefix("10.7.0.0/24".parse().unwrap())]);
    nft.commit(tx).unwrap();
    let seen: Vec<String> = nft
        .elements(&table(), set)
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        seen,
        [
            "10.2.0.0-10.2.255.255",
            "10.7.0.0-10.7.0.255",
            "192.0.2.7",
            "240.0.0.0-255.255.255.255"
        ]
    );
}

#[test]
fn a_refused_transaction_changes_nothing_and_names_every_culprit() {
    let (ns, nft) = open("refused");
    let mut tx = begin();
    let good = name("cali-good");
    tx.add_chain(&Chain::regular(Arc::clone(&good)));
    let jump = |to: &str, tag| Rule::new([Expr::Verdict(Verdict::Jump(name(to)))]).tag(tag);
    tx.append_rule(&good, &jump("cali-nowhere", 1));
    tx.append_rule(&name("cali-missing"), &jump("cali-good", 2));
    let rejected = nft.commit(tx).unwrap_err();
    let objects: Vec<Object> = rejected
        .failures
        .iter()
        .map(|failure| failure.object.clone())
        .collect();
    assert_eq!(
        objects,
        [
            Object::Rule(table(), good, Some(1)),
            Object::Rule(table(), name("cali-missing"), Some(2)),
        ],
        "{rejected}"
    );
    assert!(
        rejected
            .to_string()
            .contains("add rule 0000000000000001 in inet calico cali-good"),
        "{rejected}"
    );
    assert_eq!(ns.run("nft", &["list", "ruleset"]), "");
}

#[test]
fn a_bad_element_is_named() {
    let (_ns, nft) = open("badelem");
    let set = Set::exact("cali40s", KeyType::one(DataType::Ipv4Addr));
    let mut tx = begin();
    tx.add_set(&set);
    nft.commit(tx).unwrap();
    let elements: Vec<Elem> = (0..10_000_u32)
        .map(|i| Elem::new(Key::bytes(&(0x0a00_0000 + i).to_be_bytes())))
        .collect();
    let mut tx = Transaction::new(table());
    tx.add_elements(&set, &elements);
    tx.delete_elements(
        &set,
        [
            &elements[7],
            &Elem::new(Key::bytes(&[1, 2, 3, 4])),
            &elements[8],
        ],
    );
    let rejected = nft.commit(tx).unwrap_err();
    assert_eq!(rejected.failures.len(), 1);
    let failure = &rejected.failures[0];
    assert_eq!(failure.object, Object::Elements(table(), name("cali40s")));
    assert_eq!(
        failure.element,
        Some(Key::bytes(&[1, 2, 3, 4])),
        "{rejected}"
    );
    assert!(failure.error.is_not_found());
    assert_eq!(nft.elements(&table(), &set).unwrap(), []);
}

#[test]
fn rules_are_placed_replaced_and_deleted_by_handle() {
    let (_ns, nft) = open("place");
    let chain = name("cali-x");
    let tagged = |tag| Rule::new([Expr::Verdict(Verdict::Return)]).tag(tag);
    let mut tx = begin();
    tx.add_chain(&Chain::regular(Arc::clone(&chain)));
    tx.echo_handles();
    for tag in [10, 20, 30] {
        tx.append_rule(&chain, &tagged(tag));
    }
    let handles = nft.commit(tx).unwrap().rule_handles;
    let tags = || -> Vec<u64> {
        nft.rules(&table(), Some("cali-x"))
            .unwrap()
            .iter()
            .filter_map(|listed| listed.rule.tag)
            .collect()
    };
    let listed: Vec<u64> = nft
        .rules(&table(), None)
        .unwrap()
        .iter()
        .map(|rule| rule.handle)
        .collect();
    assert_eq!(handles, listed);
    let mut tx = Transaction::new(table());
    tx.add_rule(&chain, Position::First, &tagged(5));
    tx.add_rule(&chain, Position::Before(handles[1]), &tagged(15));
    tx.add_rule(&chain, Position::After(handles[1]), &tagged(25));
    tx.replace_rule(&chain, handles[2], &tagged(31));
    tx.delete_rule(&chain, handles[0]);
    nft.commit(tx).unwrap();
    assert_eq!(tags(), [5, 15, 20, 25, 31]);
    let mut tx = Transaction::new(table());
    tx.flush_chain(&chain);
    tx.append_rule(&chain, &tagged(99));
    nft.commit(tx).unwrap();
    assert_eq!(tags(), [99]);
}

#[test]
fn a_hundred_thousand_elements_and_ten_thousand_rules_are_one_transaction() {
    let (_ns, nft) = open("big");
    let set = Set::exact("cali40s", KeyType::one(DataType::Ipv4Addr));
    let elements: Vec<Elem> = (0..100_000_u32)
        .map(|i| Elem::new(Key::bytes(&(0x0a00_0000 + i).to_be_bytes())))
        .collect();
    let mut tx = begin();
    tx.add_set(&set);
    tx.add_elements(&set, &elements);
    let chain = name("cali-x");
    tx.add_chain(&Chain::regular(Arc::clone(&chain)));
    for tag in 0..10_000 {
        tx.append_rule(
            &chain,
            &rule(&[
                &nfproto(2),
                &[saddr4(), is(Key::bytes(&[10, 0, 0, 1])), COUNTER],
            ])
            .tag(tag),
        );
    }
    nft.commit(tx).unwrap();
    let mut seen = nft.elements(&table(), &set).unwrap();
    seen.sort();
    assert!(seen == elements, "{} of {}", seen.len(), elements.len());
    let tags: Vec<u64> = nft
        .rules(&table(), Some("cali-x"))
        .unwrap()
        .iter()
        .filter_map(|rule| rule.rule.tag)
        .collect();
    assert!(
        tags == (0..10_000).collect::<Vec<_>>(),
        "{} of 10000",
        tags.len()
    );
}

/// The kernel counts elements in its own way for each kind of set; large dumps of all kinds must be complete.
#[test]
fn large_sets_of_every_kind_read_back() {
    let (_ns, nft) = open("large");
    let v4 = KeyType::one(DataType::Ipv4Addr);
    let pair = KeyType::concat(&[DataType::Ipv4Addr, DataType::InetService]);
    let ip = |i: u32| Key::bytes(&(0x0a00_0000 + (i << 8)).to_be_bytes());
    let single = |i| Elem::new(ip(i));
    let range = |i| Elem::range(ip(i), Key::bytes(&(0x0a00_007f + (i << 8)).to_be_bytes()));
    let tuple = |i, port| Key::concat([&ip(i), &Key::port(port)]);
    let sets = [
        (
            Set::exact("cali-a", v4.clone()),
            (0..500).map(single).collect::<Vec<_>>(),
        ),
        (
            Set {
                size: Some(1000),
                ..Set::exact("cali-b", v4.clone())
            },
            (0..500).map(single).collect(),
        ),
        (
            Set::interval("cali-c", v4.clone()),
            (0..500).map(range).collect(),
        ),
        (
            Set::exact("cali-d", pair.clone()),
            (0..500).map(|i| Elem::new(tuple(i, 80))).collect(),
        ),
        (
            Set::interval("cali-e", pair),
            (0..500)
                .map(|i| Elem::range(tuple(i, 80), tuple(i, 90)))
                .collect(),
        ),
        (
            Set {
                counter: true,
                ..Set::verdict_map("cali-f", v4)
            },
            (0..500)
                .map(|i| Elem {
                    counter: Some((0, 0)),
                    ..single(i).verdict(Verdict::Accept)
                })
                .collect(),
        ),
    ];
    let mut tx = begin();
    for (set, elements) in &sets {
        tx.add_set(set);
        tx.add_elements(set, elements);
    }
    nft.commit(tx).unwrap();
    for (set, elements) in &sets {
        let mut seen = nft.elements(&table(), set).unwrap();
        seen.sort();
        assert!(
            seen == *elements,
            "{}: {} of {}, {:?} {:?}",
            set.name,
            seen.len(),
            elements.len(),
            seen.first(),
            elements.first()
        );
    }
}

#[test]
fn counters_count_packets() {
    let (ns, nft) = open("count");
    let mut tx = begin();
    let chain = name("cali-in");
    let base = BaseHook {
        chain_type: ChainType::Filter,
        hook: Hook::Input,
        priority: 0,
        policy: Policy::Accept,
    };
    tx.add_chain(&Chain::base(Arc::clone(&chain), base));
    let map = Set {
        counter: true,
        ..Set::verdict_map("cali-if", KeyType::one(DataType::IfName))
    };
    tx.add_set(&map);
    tx.add_elements(
        &map,
        [&Elem::new(Key::ifname("lo")).verdict(Verdict::Accept)],
    );
    tx.append_rule(
        &chain,
        &Rule::new([
            COUNTER,
            meta(Meta::IifName),
            Expr::VerdictMap {
                map: name("cali-if"),
                sreg: R1,
            },
        ]),
    );
    nft.commit(tx).unwrap();
    ns.run("ping", &["-c", "3", "-i", "0.01", "127.0.0.1"]);
    let rules = nft.rules(&table(), None).unwrap();
    assert_eq!(
        rules[0].rule.counter(),
        Some((6, 504)),
        "three requests and three replies of 84 bytes"
    );
    assert_eq!(
        nft.elements(&table(), &map).unwrap()[0].counter,
        Some((6, 504))
    );
}
