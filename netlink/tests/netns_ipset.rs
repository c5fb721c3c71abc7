//! IP sets against the kernel, with the `ipset` program as the second opinion.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use cali_netlink::{
    Errno,
    ipset::{IpSet, IpSets, SetMember, SetType},
    testing::{TestNs, eventually},
};

const LIMIT: Duration = Duration::from_secs(20);

fn set(name: &str, kind: SetType, v6: bool) -> IpSet {
    IpSet {
        name: name.into(),
        kind: Some(kind),
        v6,
        max: 1 << 20,
        timeout: None,
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn net(text: &str) -> SetMember {
    let (address, length) = text.split_once('/').expect("a network");
    SetMember::Net(ip(address), length.parse().expect("a length"))
}

/// The members as `ipset save` prints them.
fn saved(ns: &TestNs, name: &str) -> BTreeSet<String> {
    let text = ns.run("ipset", &["save", name]);
    let prefix = format!("add {name} ");
    text.lines()
        .filter_map(|line| line.strip_prefix(&prefix))
        .map(str::to_owned)
        .collect()
}

fn texts(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

/// A set's name, type and family, its members, and what `ipset` prints of these.
type Case = (
    &'static str,
    SetType,
    bool,
    Vec<SetMember>,
    &'static [&'static str],
);

#[test]
fn sets_of_each_type_and_family_read_as_ipset_prints_them() {
    let ns = TestNs::new("ipset");
    let sets = IpSets::open(ns.netns()).expect("open");
    let cases: [Case; 6] = [
        (
            "t-ip4",
            SetType::Ip,
            false,
            vec![SetMember::address(ip("10.0.0.1")), net("10.0.0.2/32")],
            &["10.0.0.1", "10.0.0.2"],
        ),
        (
            "t-ip6",
            SetType::Ip,
            true,
            vec![SetMember::address(ip("fd00::1"))],
            &["fd00::1"],
        ),
        (
            "t-net4",
            SetType::Net,
            false,
            vec![net("10.1.0.0/16"), net("10.1.2.3/32"), net("128.0.0.0/1")],
            &["10.1.0.0/16", "10.1.2.3", "128.0.0.0/1"],
        ),
        (
            "t-net6",
            SetType::Net,
            true,
            vec![net("fd00::/8"), net("fd00::1/128")],
            &["fd00::/8", "fd00::1"],
        ),
        (
            "t-port4",
            SetType::IpPort,
            false,
            vec![
                SetMember::Port(ip("10.0.0.1"), 6, 80),
                SetMember::Port(ip("10.0.0.1"), 17, 53),
                SetMember::Port(ip("10.0.0.2"), 132, 65535),
            ],
            &["10.0.0.1,tcp:80", "10.0.0.1,udp:53", "10.0.0.2,sctp:65535"],
        ),
        (
            "t-port6",
            SetType::IpPort,
            true,
            vec![SetMember::Port(ip("fd00::1"), 6, 8080)],
            &["fd00::1,tcp:8080"],
        ),
    ];
    for (name, kind, v6, members, printed) in &cases {
        let wanted = set(name, *kind, *v6);
        sets.create(&wanted).expect("create");
        sets.create(&wanted).expect("the same again is no error");
        sets.change(name, &[], members).expect("add");
        sets.change(name, &[], members).expect("twice is no error");
        assert_eq!(saved(&ns, name), texts(printed), "{name}");
        let listed = sets.get(name).expect("list").expect("a set");
        assert_eq!(listed.set, wanted);
        assert_eq!(listed.members, members.iter().copied().collect());
    }
    let all = sets.list("t-").expect("list");
    assert_eq!(all.len(), cases.len());
    let names = sets.names("t-port").expect("names");
    assert_eq!(names, ["t-port4", "t-port6"].map(Arc::from).into());
    for (name, _, _, members, _) in &cases {
        sets.change(name, members, &[]).expect("delete");
        sets.change(name, members, &[]).expect("twice is no error");
        assert_eq!(saved(&ns, name), BTreeSet::new(), "{name}");
    }
    let names: Vec<Arc<str>> = cases.iter().map(|(name, ..)| Arc::from(*name)).collect();
    assert!(sets.destroy(&names).iter().all(Result::is_ok));
    assert_eq!(ns.run("ipset", &["list", "-name"]), "");
    assert_eq!(sets.get("t-ip4").expect("list"), None);
}

#[test]
fn what_ipset_made_is_read() {
    let ns = TestNs::new("ipsetread");
    for words in [
        "create theirs hash:net family inet hashsize 64 maxelem 5000",
        "add theirs 192.0.2.0/24",
        "add theirs 192.0.2.7",
        "create other bitmap:port range 0-1023",
    ] {
        ns.run("ipset", &words.split(' ').collect::<Vec<_>>());
    }
    let sets = IpSets::open(ns.netns()).expect("open");
    let theirs = sets.get("theirs").expect("list").expect("a set");
    assert_eq!(
        (theirs.set.kind, theirs.set.max),
        (Some(SetType::Net), 5000)
    );
    assert_eq!(
        theirs.members,
        [net("192.0.2.0/24"), net("192.0.2.7/32")].into()
    );
    let other = sets.get("other").expect("list").expect("a set");
    assert_eq!(other.set.kind, None, "a type that is not ours to make");
}

#[test]
fn swapped_sets_exchange_their_members_under_the_rules_that_use_them() {
    let ns = TestNs::new("ipsetswap");
    let sets = IpSets::open(ns.netns()).expect("open");
    sets.create(&set("a", SetType::Net, false)).expect("create");
    sets.create(&set("b", SetType::Net, false)).expect("create");
    sets.change("a", &[], &[net("10.0.0.0/8")]).expect("add");
    sets.change("b", &[], &[net("11.0.0.0/8")]).expect("add");
    let rule = "-A INPUT -m set --match-set a src -j ACCEPT";
    ns.run("iptables-legacy", &rule.split(' ').collect::<Vec<_>>());
    sets.swap("a", "b").expect("swap");
    assert_eq!(saved(&ns, "a"), texts(&["11.0.0.0/8"]));
    assert_eq!(saved(&ns, "b"), texts(&["10.0.0.0/8"]));
    let results = sets.destroy(&["a".into(), "b".into(), "c".into()]);
    let busy = results[0].as_ref().expect_err("a rule refers to it");
    assert_eq!(busy.code(), Some(Errno::EBUSY), "{busy}");
    assert!(results[1].is_ok());
    // Kernels differ on whether a set that is not there can be destroyed.
    let gone = |error: &cali_netlink::Error| error.is_not_found();
    assert!(results[2].as_ref().err().is_none_or(gone));
    let clash = sets.create(&set("a", SetType::IpPort, false));
    let clash = clash.expect_err("another type under this name");
    assert!(clash.is_exists(), "{clash}");
    let families = set("six", SetType::Net, true);
    sets.create(&families).expect("create");
    let mixed = sets.swap("a", "six").expect_err("families differ");
    assert!(mixed.to_string().contains("do not match"), "{mixed}");
}

#[test]
fn a_large_set_is_filled_and_emptied_in_batches() {
    let ns = TestNs::new("ipsetlarge");
    let sets = IpSets::open(ns.netns()).expect("open");
    sets.create(&set("large", SetType::Net, false))
        .expect("create");
    let members: Vec<SetMember> = (0..20_000_u32)
        .map(|number| SetMember::address(IpAddr::V4((0x0a00_0000 + number).into())))
        .collect();
    sets.change("large", &[], &members).expect("add");
    let listed = sets.get("large").expect("list").expect("a set");
    assert_eq!(listed.members, members.iter().copied().collect());
    assert_eq!(saved(&ns, "large").len(), members.len());
    sets.change("large", &members[1..], &[]).expect("delete");
    assert_eq!(saved(&ns, "large"), texts(&["10.0.0.0"]));
}

#[test]
fn a_full_set_and_a_wrong_member_are_said_in_words() {
    let ns = TestNs::new("ipsetfull");
    let sets = IpSets::open(ns.netns()).expect("open");
    let small = IpSet {
        max: 2,
        timeout: None,
        ..set("small", SetType::Ip, false)
    };
    sets.create(&small).expect("create");
    let three = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|text| SetMember::address(ip(text)));
    let full = sets.change("small", &[], &three).expect_err("full");
    assert!(full.to_string().contains("full"), "{full}");
    let wrong = [SetMember::address(ip("fd00::1"))];
    let wrong = sets.change("small", &[], &wrong).expect_err("IPv6");
    assert!(wrong.to_string().contains("small"), "{wrong}");
    let long = set(&"x".repeat(32), SetType::Ip, false);
    assert!(sets.create(&long).is_err());
}

#[test]
fn members_of_a_timed_set_go_by_themselves_and_keep_their_type() {
    let ns = TestNs::new("ipsettime");
    let sets = IpSets::open(ns.netns()).expect("open");
    for (name, v6, from, to) in [
        ("t-time4", false, "10.0.0.1", "10.0.0.2"),
        ("t-time6", true, "fd00::1", "fd00::2"),
    ] {
        let timed = IpSet {
            timeout: Some(1),
            ..set(name, SetType::IpPortIp, v6)
        };
        sets.create(&timed).expect("create");
        let member = SetMember::PortBetween(ip(from), 17, 53, ip(to));
        sets.change(name, &[], &[member]).expect("add");
        let listed = sets.get(name).expect("list").expect("a set");
        assert_eq!(listed.set, timed);
        assert_eq!(listed.members, BTreeSet::from([member]));
        let printed = saved(&ns, name).into_iter().next().expect("a member");
        assert!(
            printed.starts_with(&format!("{from},udp:53,{to} timeout ")),
            "{printed}"
        );
        eventually(LIMIT, || {
            let listed = sets.get(name).expect("list").expect("a set");
            listed.members.is_empty().then_some(()).ok_or("a member")
        });
    }
}
