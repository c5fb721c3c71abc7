//! Routes, nexthop objects, neighbours and forwarding entries against the real kernel. Run as root.

#![allow(clippy::unwrap_used)]

use std::net::IpAddr;

use cali_netlink::{
    Change, FdbEntry, Hop, IpNetwork, LinkChange, LinkKind, Neighbour, NewLink, NewLinkKind,
    Nexthop, NexthopTarget, Route, RouteFilter, Rule, Target, Vxlan, route::TABLE_MAIN,
    testing::TestNs,
};

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ours() -> RouteFilter {
    RouteFilter {
        table: Some(TABLE_MAIN),
        protocol: Some(80),
        ..RouteFilter::default()
    }
}

fn all_ok(results: Vec<cali_netlink::Result<()>>) {
    for result in results {
        result.unwrap();
    }
}

/// Two namespaces joined by `eth0`, 10.0.0.1/24 and fd00::1/64 on the first.
async fn pair(label: &str) -> (TestNs, TestNs, u32) {
    let (one, two) = (TestNs::new(label), TestNs::new(label));
    let (eth0, _) = one.veth("eth0", &two, "eth0").await;
    one.address(eth0, "10.0.0.1/24").await;
    one.address(eth0, "fd00::1/64").await;
    (one, two, eth0)
}

#[tokio::test]
async fn routes_read_back_as_written() {
    let (ns, _peer, eth0) = pair("routes").await;
    let mut wanted = vec![
        Route::new(
            net("10.65.0.0/26"),
            80,
            Target::Hop(Hop::via(ip("10.0.0.2"), eth0)),
        ),
        Route::new(
            net("10.66.0.0/26"),
            80,
            Target::Hop(Hop::via(ip("192.168.9.9"), eth0).onlink()),
        ),
        Route::blackhole(net("10.67.0.0/26"), 80),
        Route::on_device(net("10.68.0.5/32"), 80, eth0),
        Route {
            source: Some(ip("10.0.0.1")),
            mtu: Some(1400),
            metric: 7,
            ..Route::new(
                net("10.69.0.0/16"),
                80,
                Target::Hop(Hop::via(ip("10.0.0.2"), eth0)),
            )
        },
        Route::new(
            net("10.70.0.0/24"),
            80,
            Target::Multipath(vec![
                Hop {
                    weight: 1,
                    ..Hop::via(ip("10.0.0.2"), eth0)
                },
                Hop {
                    weight: 3,
                    ..Hop::via(ip("10.0.0.3"), eth0)
                },
            ]),
        ),
        Route::new(
            net("10.71.0.0/24"),
            80,
            Target::Hop(Hop::via(ip("fd00::2"), eth0)),
        ),
        Route::new(
            net("fd65::/122"),
            80,
            Target::Hop(Hop::via(ip("fd00::2"), eth0)),
        ),
        Route::blackhole(net("fd66::/122"), 80),
        Route::new(net("fd67::5/128"), 80, Target::Hop(Hop::device(eth0))),
        Route::new(
            net("fd68::/64"),
            80,
            Target::Multipath(vec![
                Hop::via(ip("fd00::2"), eth0),
                Hop::via(ip("fd00::3"), eth0),
            ]),
        ),
    ];
    let changes: Vec<_> = wanted.iter().cloned().map(Change::Replace).collect();
    all_ok(ns.netlink().apply_routes(&changes));
    wanted = wanted.into_iter().map(Route::normalised).collect();
    wanted.sort();
    let mut seen = ns.netlink().dump_routes(&ours()).unwrap();
    seen.sort();
    assert_eq!(seen, wanted, "\n{}{}", ns.ip("route"), ns.ip("-6 route"));

    let changes: Vec<_> = seen.into_iter().map(Change::Delete).collect();
    all_ok(ns.netlink().apply_routes(&changes));
    assert_eq!(ns.netlink().dump_routes(&ours()).unwrap(), []);
}

#[tokio::test]
async fn a_bad_route_does_not_stop_the_others_and_says_why() {
    let (ns, _peer, eth0) = pair("bad").await;
    let good = Route::new(
        net("10.65.0.0/26"),
        80,
        Target::Hop(Hop::via(ip("10.0.0.2"), eth0)),
    );
    let bad = Route::new(
        net("10.66.0.0/26"),
        80,
        Target::Hop(Hop::via(ip("192.168.9.9"), eth0)),
    );
    let results = ns
        .netlink()
        .apply_routes(&[Change::Replace(bad), Change::Replace(good.clone())]);
    let error = results[0].clone().unwrap_err();
    assert_eq!(error.operation, "replace");
    assert!(error.to_string().contains("10.66.0.0/26"), "{error}");
    assert!(
        error.to_string().contains("(Nexthop has invalid gateway)"),
        "{error}"
    );
    assert_eq!(results[1], Ok(()));
    assert_eq!(ns.netlink().dump_routes(&ours()).unwrap(), [good]);
}

#[tokio::test]
async fn replace_changes_the_kind_in_place() {
    let (ns, _peer, eth0) = pair("replace").await;
    for prefix in ["10.65.0.0/26", "fd65::/122"] {
        let gateway = if prefix.starts_with("10") {
            "10.0.0.2"
        } else {
            "fd00::2"
        };
        let via =
            Route::new(net(prefix), 80, Target::Hop(Hop::via(ip(gateway), eth0))).normalised();
        let hole = Route::blackhole(net(prefix), 80).normalised();
        for route in [&via, &hole, &via] {
            all_ok(ns.netlink().apply_routes(&[Change::Replace(route.clone())]));
            let seen = ns
                .netlink()
                .dump_routes(&RouteFilter {
                    v6: Some(via.prefix.is_ipv6()),
                    ..ours()
                })
                .unwrap();
            assert_eq!(seen.as_slice(), std::slice::from_ref(route));
        }
    }
}

#[tokio::test]
async fn routes_follow_their_nexthop_object() {
    let (ns, _peer, eth0) = pair("nexthop").await;
    let nl = ns.netlink();
    let object = |gateway: &str| Nexthop {
        id: 0x0ca1_0001,
        protocol: 80,
        target: NexthopTarget::Gateway {
            gateway: ip(gateway),
            oif: eth0,
            onlink: true,
        },
    };
    let v6 = Nexthop {
        id: 0x0ca1_0002,
        protocol: 80,
        target: NexthopTarget::Gateway {
            gateway: ip("fd00::2"),
            oif: eth0,
            onlink: false,
        },
    };
    all_ok(nl.apply_nexthops(&[
        Change::Replace(object("10.0.0.2")),
        Change::Replace(v6.clone()),
    ]));
    let routes: Vec<_> = (0..1000_u32)
        .map(|i| {
            let prefix =
                IpNetwork::new(IpAddr::from((0x0a41_0000 + (i << 6)).to_be_bytes()), 26).unwrap();
            Route::new(prefix, 80, Target::Nexthop(0x0ca1_0001))
        })
        .collect();
    all_ok(
        nl.apply_routes(
            &routes
                .iter()
                .cloned()
                .map(Change::Replace)
                .collect::<Vec<_>>(),
        ),
    );
    let over_v6 = Route::new(net("fd65::/122"), 80, Target::Nexthop(0x0ca1_0002)).normalised();
    all_ok(nl.apply_routes(&[Change::Replace(over_v6.clone())]));
    let mut seen = nl.dump_routes(&ours()).unwrap();
    assert_eq!(seen.pop(), Some(over_v6));
    assert_eq!(seen, routes);

    all_ok(nl.apply_nexthops(&[Change::Replace(object("10.0.0.9"))]));
    assert_eq!(nl.dump_nexthops().unwrap(), [object("10.0.0.9"), v6]);
    assert_eq!(
        nl.lookup_route(ip("10.65.0.1")).unwrap().gateway,
        Some(ip("10.0.0.9"))
    );

    all_ok(nl.apply_nexthops(&[Change::Delete(object("10.0.0.9"))]));
    assert_eq!(
        nl.dump_routes(&RouteFilter {
            v6: Some(false),
            ..ours()
        })
        .unwrap(),
        [],
        "the kernel takes them along"
    );
}

#[tokio::test]
async fn dumps_are_filtered_by_the_kernel() {
    let (ns, _peer, eth0) = pair("filter").await;
    ns.ip("route add 10.1.0.0/24 via 10.0.0.2 proto 80 table 7777");
    ns.ip("route add 10.2.0.0/24 via 10.0.0.2 proto 12");
    ns.ip("route add 10.3.0.0/24 via 10.0.0.2 proto 80");
    let prefixes = |filter: RouteFilter| -> Vec<String> {
        ns.netlink()
            .dump_routes(&filter)
            .unwrap()
            .iter()
            .map(|route| route.prefix.to_string())
            .collect()
    };
    assert_eq!(
        prefixes(RouteFilter {
            table: Some(7777),
            ..RouteFilter::default()
        }),
        ["10.1.0.0/24"]
    );
    assert_eq!(
        prefixes(RouteFilter {
            protocol: Some(12),
            ..RouteFilter::default()
        }),
        ["10.2.0.0/24"]
    );
    assert_eq!(prefixes(ours()), ["10.3.0.0/24"]);
    assert_eq!(
        prefixes(RouteFilter {
            oif: Some(eth0),
            ..ours()
        }),
        ["10.3.0.0/24"]
    );
    assert_eq!(
        prefixes(RouteFilter {
            oif: Some(1),
            ..ours()
        }),
        [] as [&str; 0]
    );
    assert_eq!(
        prefixes(RouteFilter {
            table: Some(4242),
            ..RouteFilter::default()
        }),
        [] as [&str; 0]
    );
}

#[tokio::test]
async fn lookups_tell_decision_and_row() {
    let (ns, _peer, eth0) = pair("lookup").await;
    ns.ip("route add 10.9.0.0/16 via 10.0.0.2 proto 12");
    ns.ip("route add blackhole 10.8.0.0/16 proto 80");
    let decision = ns.netlink().lookup_route(ip("10.9.1.1")).unwrap();
    assert_eq!(
        (decision.gateway, decision.oif, decision.source),
        (Some(ip("10.0.0.2")), Some(eth0), Some(ip("10.0.0.1")))
    );
    let row = ns.netlink().match_route(ip("10.9.1.1")).unwrap();
    assert_eq!((row.prefix, row.protocol), (net("10.9.0.0/16"), 12));
    let error = ns.netlink().match_route(ip("10.8.1.1")).unwrap_err();
    assert_eq!(
        error.code(),
        Some(cali_netlink::Errno::EINVAL),
        "a blackhole: {error}"
    );
    let error = ns.netlink().lookup_route(ip("172.16.0.1")).unwrap_err();
    assert_eq!(
        error.code(),
        Some(cali_netlink::Errno::ENETUNREACH),
        "{error}"
    );
}

#[tokio::test]
async fn vxlan_gets_its_neighbours_and_forwarding_entries() {
    let (ns, _peer, eth0) = pair("vxlan").await;
    let nl = ns.netlink();
    let vxlan = Vxlan {
        vni: 4096,
        port: 4789,
        local: Some(ip("10.0.0.1")),
        device: Some(eth0),
        learning: false,
        udp_csum: false,
    };
    let mac = "66:00:00:00:00:01".parse().unwrap();
    let index = nl
        .add_link(&NewLink {
            mtu: Some(1450),
            mac: Some(mac),
            ..NewLink::new("vxlan.calico", NewLinkKind::Vxlan(vxlan.clone()))
        })
        .await
        .unwrap();
    let link = nl.link_by_name("vxlan.calico").unwrap().unwrap();
    assert_eq!(link.kind, LinkKind::Vxlan(vxlan));
    assert_eq!(
        (link.index, link.mtu, link.mac, link.up),
        (index, 1450, Some(mac), true)
    );

    let peers: Vec<_> = (1..=600_u32)
        .map(|i| (i, [0x66, 1, 0, 0, (i >> 8) as u8, i as u8]))
        .collect();
    let neighbours: Vec<_> = peers
        .iter()
        .map(|(i, mac)| {
            Neighbour::permanent(
                index,
                IpAddr::from((0x0a41_0000 + i).to_be_bytes()),
                cali_netlink::MacAddr(*mac),
            )
        })
        .collect();
    let fdb: Vec<_> = peers
        .iter()
        .map(|(i, mac)| {
            FdbEntry::vxlan(
                index,
                cali_netlink::MacAddr(*mac),
                IpAddr::from((0x0a00_0000 + i).to_be_bytes()),
            )
        })
        .collect();
    all_ok(
        nl.apply_neighbours(
            &neighbours
                .iter()
                .cloned()
                .map(Change::Replace)
                .collect::<Vec<_>>(),
        ),
    );
    all_ok(nl.apply_fdb(&fdb.iter().cloned().map(Change::Replace).collect::<Vec<_>>()));
    let mut seen = nl.dump_neighbours(Some(index)).unwrap();
    seen.retain(Neighbour::is_permanent);
    seen.sort();
    assert_eq!(seen, neighbours);
    let mut seen = nl.dump_fdb(Some(index)).unwrap();
    seen.sort();
    assert_eq!(seen, fdb);

    // A peer moves: replaced in place, then removed.
    let moved = FdbEntry {
        dst: Some(ip("10.0.0.77")),
        ..fdb[0].clone()
    };
    all_ok(nl.apply_fdb(&[Change::Replace(moved.clone())]));
    assert!(nl.dump_fdb(Some(index)).unwrap().contains(&moved));
    all_ok(nl.apply_fdb(&[Change::Delete(moved.clone())]));
    assert!(!nl.dump_fdb(Some(index)).unwrap().contains(&moved));
    all_ok(nl.apply_neighbours(&[Change::Delete(neighbours[0].clone())]));
    assert!(
        !nl.dump_neighbours(Some(index))
            .unwrap()
            .contains(&neighbours[0])
    );
}

#[tokio::test]
async fn proxy_entries_are_listed_apart() {
    let (ns, _peer, eth0) = pair("proxy").await;
    let entry = Neighbour::proxy(eth0, ip("169.254.1.1"));
    all_ok(
        ns.netlink()
            .apply_neighbours(&[Change::Replace(entry.clone())]),
    );
    let proxies = ns.netlink().dump_proxies(Some(eth0)).unwrap();
    assert_eq!(
        proxies.iter().map(Neighbour::key).collect::<Vec<_>>(),
        [entry.key()]
    );
    assert!(
        !ns.netlink()
            .dump_neighbours(Some(eth0))
            .unwrap()
            .iter()
            .any(|seen| seen.key() == entry.key())
    );
}

#[tokio::test]
async fn links_are_changed_moved_and_deleted() {
    let (ns, other) = (TestNs::new("links"), TestNs::new("links"));
    let nl = ns.netlink();
    let bridge = nl
        .add_link(&NewLink::new("br0", NewLinkKind::Bridge))
        .await
        .unwrap();
    let veth = nl.add_link(&NewLink::veth("v0", "v1")).await.unwrap();
    let mac = "02:00:00:00:00:07".parse().unwrap();
    let change = LinkChange {
        mtu: Some(1300),
        mac: Some(mac),
        master: Some(Some(bridge)),
        alias: Some("a test".into()),
        ..LinkChange::default()
    };
    nl.change_link(veth, &change).await.unwrap();
    let link = nl.link_by_index(veth).unwrap().unwrap();
    assert_eq!(
        (link.mtu, link.mac, link.master),
        (1300, Some(mac), Some(bridge))
    );
    assert_eq!(link.alias.as_deref(), Some("a test"));
    assert_eq!(link.kind, LinkKind::Veth);

    nl.set_link_up(veth, false).await.unwrap();
    assert!(!nl.link_by_index(veth).unwrap().unwrap().up);
    nl.change_link(
        veth,
        &LinkChange {
            name: Some("v9".into()),
            master: Some(None),
            ..LinkChange::default()
        },
    )
    .await
    .unwrap();
    nl.move_link(veth, other.netns()).await.unwrap();
    assert_eq!(nl.link_by_name("v9").unwrap(), None);
    let moved = other.netlink().link_by_name("v9").unwrap().unwrap();
    assert!(
        moved.link_netns.is_some(),
        "the peer is in another namespace: {moved:?}"
    );
    other.netlink().delete_link(moved.index).await.unwrap();
    assert_eq!(
        nl.link_by_name("v1").unwrap(),
        None,
        "both ends go together"
    );
}

#[tokio::test]
async fn a_link_that_exists_is_an_error_that_names_it() {
    let ns = TestNs::new("dup");
    ns.netlink()
        .add_link(&NewLink::new("br0", NewLinkKind::Bridge))
        .await
        .unwrap();
    let error = ns
        .netlink()
        .add_link(&NewLink::new("br0", NewLinkKind::Bridge))
        .await
        .unwrap_err();
    assert!(error.is_exists(), "{error}");
    assert_eq!(error.to_string(), "add link br0: File exists");
}

#[tokio::test]
async fn addresses_and_rules_read_back_as_written() {
    let (ns, _peer, eth0) = pair("addr").await;
    let nl = ns.netlink();
    let texts: Vec<String> = nl
        .dump_addresses(Some(eth0))
        .unwrap()
        .iter()
        .map(|a| a.address.to_string())
        .collect();
    assert!(
        texts.contains(&"10.0.0.1/24".to_owned()) && texts.contains(&"fd00::1/64".to_owned()),
        "{texts:?}"
    );
    let ours = nl
        .dump_addresses(Some(eth0))
        .unwrap()
        .into_iter()
        .find(|a| a.address == net("10.0.0.1/24"))
        .unwrap();
    nl.delete_address(&ours).await.unwrap();
    assert!(!nl.dump_addresses(Some(eth0)).unwrap().contains(&ours));

    for v6 in [false, true] {
        let rule = Rule {
            fwmark: Some((0x100, 0x100)),
            from: Some(net(if v6 { "fd65::/64" } else { "10.65.0.0/16" })),
            iif: Some("eth0".into()),
            suppress_prefix_len: Some(0),
            invert: true,
            protocol: 80,
            ..Rule::new(v6, 99, 1000)
        };
        nl.add_rule(&rule).await.unwrap();
        assert!(
            nl.dump_rules().unwrap().contains(&rule),
            "{}",
            ns.ip("rule")
        );
        nl.delete_rule(&rule).await.unwrap();
        assert!(!nl.dump_rules().unwrap().contains(&rule));
    }
}

/// The batch is longer than any one send, and every answer finds its item.
#[tokio::test]
async fn twenty_thousand_routes_in_one_call() {
    let (ns, _peer, eth0) = pair("many").await;
    let route = |i: u32, onlink: bool| {
        let prefix =
            IpNetwork::new(IpAddr::from((0x0b00_0000 + (i << 6)).to_be_bytes()), 26).unwrap();
        let hop = Hop::via(ip("192.168.1.1"), eth0);
        Route::new(
            prefix,
            80,
            Target::Hop(if onlink { hop.onlink() } else { hop }),
        )
    };
    let changes: Vec<_> = (0..20_000)
        .map(|i| Change::Add(route(i, i % 1000 != 500)))
        .collect();
    let results = ns.netlink().apply_routes(&changes);
    let failed: Vec<_> = results
        .iter()
        .enumerate()
        .filter(|(_, result)| result.is_err())
        .map(|(i, _)| i)
        .collect();
    assert_eq!(failed, (0..20).map(|i| i * 1000 + 500).collect::<Vec<_>>());
    assert_eq!(
        ns.netlink().dump_routes(&ours()).unwrap().len(),
        20_000 - 20
    );
}
