//! Removal of devices against the real kernel. Run as root.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use cali_netlink::testing::TestNs;
use cali_netlink::{
    Address, Change, Errno, FollowedLinks, Group, IfIndex, LinkChange, LinkRemover, MacAddr,
    Netlink, NewLink, NewLinkKind, VethPeer,
};

/// The number of the group in which the remover gathers what is to go.
const GROUP: u32 = 0x4361_6c69;

fn pairs(ns: &TestNs, count: usize) -> Vec<IfIndex> {
    for number in 0..count {
        ns.ip(&format!(
            "link add v{number} up type veth peer name p{number}"
        ));
    }
    let index = |number| ns.netlink().link_by_name(&format!("v{number}")).unwrap();
    (0..count)
        .map(|number| index(number).unwrap().index)
        .collect()
}

fn names(ns: &TestNs) -> Vec<String> {
    let mut names: Vec<String> = ns
        .netlink()
        .dump_links()
        .unwrap()
        .into_iter()
        .map(|link| link.name)
        // The second is in each namespace where the module of IPIP is loaded.
        .filter(|name| !matches!(name.as_str(), "lo" | "tunl0"))
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn many_devices_go_at_once_and_each_has_its_result() {
    let ns = TestNs::new("remove");
    let devices = pairs(&ns, 20);
    ns.ip("link add stays type bridge");
    let mut remover = LinkRemover::open(ns.netns()).unwrap();
    let mut asked = devices.clone();
    asked.push(99_999);
    let results: Vec<bool> = remover
        .remove(&asked)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let mut expected = vec![true; 20];
    expected.push(false);
    assert_eq!(results, expected);
    assert_eq!(names(&ns), ["stays"]);
    assert_eq!(remover.remove(&devices[..1]), [Ok(false)]);
    assert_eq!(remover.remove(&[]), []);
}

#[test]
fn a_foreign_device_in_the_same_group_stays() {
    let ns = TestNs::new("group");
    let devices = pairs(&ns, 3);
    ns.ip("link add foreign type bridge");
    ns.ip(&format!("link set foreign group {GROUP}"));
    let mut remover = LinkRemover::open(ns.netns()).unwrap();
    assert_eq!(remover.remove(&devices), [Ok(true), Ok(true), Ok(true)]);
    assert_eq!(names(&ns), ["foreign"]);
}

#[test]
fn one_thread_makes_a_pair_with_its_addresses_and_takes_it_away() {
    let (host, pod) = (TestNs::new("once"), TestNs::new("oncepod"));
    let peer = VethPeer {
        name: "outer".into(),
        mac: Some(MacAddr([0xee; 6])),
        mtu: Some(1400),
        netns: Some(host.netns().fd()),
        up: false,
    };
    let new = NewLink {
        mtu: Some(1400),
        ..NewLink::new("inner", NewLinkKind::Veth(peer))
    };
    let change = LinkChange {
        alias: Some("c1/eth0".into()),
        up: Some(true),
        ..LinkChange::default()
    };
    let index = Netlink::visit(pod.netns(), |pod| {
        let index = pod.add_link_at_once(&new)?;
        let refused = pod.add_link_at_once(&new).unwrap_err();
        assert_eq!(refused.code(), Some(Errno::EEXIST), "{refused}");
        let held = ["10.0.0.1/32", "2001:db8::1/128"]
            .map(|text| Address::new(index, text.parse().unwrap()));
        let twice = held.iter().chain(&held).cloned().map(Change::Replace);
        for result in pod.apply_addresses(&twice.collect::<Vec<_>>()) {
            result?;
        }
        let gone = Address::new(index, "10.0.0.2/32".parse().unwrap());
        let gone = pod.apply_addresses(&[Change::Delete(gone)]);
        assert_eq!(
            gone[0].as_ref().unwrap_err().code(),
            Some(Errno::EADDRNOTAVAIL)
        );
        Ok(index)
    })
    .unwrap();
    let outer = host.netlink().link_by_name("outer").unwrap().unwrap();
    host.netlink()
        .change_link_at_once(outer.index, &change)
        .unwrap();
    let shown = host.ip("-d link show outer");
    for part in ["ee:ee:ee:ee:ee:ee", "mtu 1400", "alias c1/eth0", ",UP"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let shown = pod.ip("address show inner");
    for part in [
        "inet 10.0.0.1/32 scope global",
        "inet6 2001:db8::1/128 scope global",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    pod.netlink().delete_link_at_once(index).unwrap();
    let refused = pod.netlink().delete_link_at_once(index).unwrap_err();
    assert!(refused.is_not_found(), "{refused}");
    assert_eq!(names(&host), [""; 0]);
}

#[tokio::test]
async fn followed_devices_are_those_that_a_dump_shows() {
    let ns = TestNs::new("follow");
    let mut events = ns.netlink().events(&[Group::Link]).unwrap();
    let mut followed = FollowedLinks::default();
    pairs(&ns, 2);
    followed.look(ns.netlink()).unwrap();
    for words in [
        "link add b0 type bridge",
        "link set v0 mtu 1400",
        "link set p1 name other",
        "link set v0 master b0",
        "link set p0 up alias text",
        "link delete v1",
    ] {
        ns.ip(words);
    }
    ns.ip("link add last type bridge");
    // Everything up to the last one.
    loop {
        let event = tokio::time::timeout(Duration::from_secs(10), events.next());
        let event = event.await.unwrap().unwrap();
        followed.on_event(&event);
        let all = followed.look(ns.netlink()).unwrap();
        if all.values().any(|link| link.name == "last") {
            break;
        }
    }
    let mut dumped = ns.netlink().dump_links().unwrap();
    dumped.sort_by_key(|link| link.index);
    let all: Vec<_> = followed
        .look(ns.netlink())
        .unwrap()
        .values()
        .cloned()
        .collect();
    assert_eq!(all, dumped);
}
