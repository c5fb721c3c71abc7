//! Notifications, connection tracking, probing and TCP signatures against the real kernel. Run as root.
#![allow(clippy::unwrap_used)]

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, UdpSocket},
    time::Duration,
};

use cali_netlink::{
    Change, Event, EventStream, FdbEntry, Group, Hop, Neighbour, NewLink, NewLinkKind, Notice,
    Route, Target, Vxlan,
    conntrack::{Conntrack, Tuple},
    probe::{self, Capability},
    tcp,
    testing::{TestNs, eventually, patient},
};
use socket2::{Domain, SockAddr, Socket, Type};

const LIMIT: Duration = Duration::from_secs(10);

async fn next(events: &mut EventStream) -> Event {
    tokio::time::timeout(patient(LIMIT), events.next())
        .await
        .expect("an event in time")
        .unwrap()
}

async fn until(events: &mut EventStream, wanted: impl Fn(&Event) -> bool) -> Event {
    loop {
        let event = next(events).await;
        if wanted(&event) {
            return event;
        }
    }
}

async fn pair(label: &str) -> (TestNs, TestNs, u32) {
    let (one, two) = (TestNs::new(label), TestNs::new(label));
    let (eth0, peer) = one.veth("eth0", &two, "eth0").await;
    one.address(eth0, "10.0.0.1/24").await;
    two.address(peer, "10.0.0.2/24").await;
    (one, two, eth0)
}

#[tokio::test]
async fn every_group_tells_of_its_objects() {
    let (ns, _peer, eth0) = pair("groups").await;
    let all = [
        Group::Link,
        Group::Neighbour,
        Group::Ipv4Address,
        Group::Ipv4Route,
        Group::Ipv6Route,
        Group::Ipv4Rule,
        Group::Nexthop,
    ];
    let mut events = ns.netlink().events(&all).unwrap();
    ns.ip("link set eth0 mtu 1400");
    until(
        &mut events,
        |event| matches!(event, Event::Link(Notice::Present(link)) if link.mtu == 1400),
    )
    .await;
    ns.ip("addr add 10.9.0.1/24 dev eth0");
    until(&mut events, |event| matches!(event, Event::Address(Notice::Present(a)) if a.address.to_string() == "10.9.0.1/24")).await;
    ns.ip("addr del 10.9.0.1/24 dev eth0");
    until(&mut events, |event| matches!(event, Event::Address(Notice::Gone(a)) if a.address.to_string() == "10.9.0.1/24")).await;
    let route = Route::new(
        "10.65.0.0/26".parse().unwrap(),
        80,
        Target::Hop(Hop::via("10.0.0.2".parse().unwrap(), eth0)),
    );
    // Our own changes are told too: requests go over another socket.
    ns.netlink().apply_routes(&[Change::Replace(route.clone())])[0]
        .clone()
        .unwrap();
    let told = until(
        &mut events,
        |event| matches!(event, Event::Route(told) if told.object().protocol == 80),
    )
    .await;
    assert_eq!(told, Event::Route(Notice::Present(route.clone())));
    ns.ip("route del 10.65.0.0/26");
    let told = until(
        &mut events,
        |event| matches!(event, Event::Route(told) if told.object().protocol == 80),
    )
    .await;
    assert_eq!(told, Event::Route(Notice::Gone(route)));
    ns.ip("rule add fwmark 1 lookup 100 pref 50");
    until(
        &mut events,
        |event| matches!(event, Event::Rule(Notice::Present(rule)) if rule.priority == 50),
    )
    .await;
    ns.ip("nexthop add id 7 blackhole");
    until(
        &mut events,
        |event| matches!(event, Event::Nexthop(Notice::Present(nexthop)) if nexthop.id == 7),
    )
    .await;
    ns.ip("neigh add 10.0.0.9 lladdr 66:00:00:00:00:09 dev eth0 nud permanent");
    let wanted = Neighbour::permanent(
        eth0,
        "10.0.0.9".parse().unwrap(),
        "66:00:00:00:00:09".parse().unwrap(),
    );
    until(&mut events, |event| {
        *event == Event::Neighbour(Notice::Present(wanted.clone()))
    })
    .await;
}

#[tokio::test]
async fn a_forwarding_entry_that_is_deleted_is_told() {
    let ns = TestNs::new("fdb");
    let vxlan = Vxlan {
        vni: 1,
        port: 4789,
        local: None,
        device: None,
        learning: false,
        udp_csum: true,
    };
    let index = ns
        .netlink()
        .add_link(&NewLink::new("vx", NewLinkKind::Vxlan(vxlan)))
        .await
        .unwrap();
    let entry = FdbEntry::vxlan(
        index,
        "66:00:00:00:00:01".parse().unwrap(),
        "192.0.2.1".parse().unwrap(),
    );
    ns.netlink().apply_fdb(&[Change::Replace(entry.clone())])[0]
        .clone()
        .unwrap();
    let mut events = ns.netlink().events(&[Group::Neighbour]).unwrap();
    ns.run(
        "bridge",
        &["fdb", "del", "66:00:00:00:00:01", "dev", "vx", "self"],
    );
    let told = until(&mut events, |event| {
        matches!(event, Event::Fdb(Notice::Gone(_)))
    })
    .await;
    let Event::Fdb(Notice::Gone(gone)) = told else {
        unreachable!()
    };
    assert_eq!(
        (gone.mac, gone.dst, gone.ifindex),
        (entry.mac, entry.dst, index)
    );
}

#[tokio::test]
async fn a_burst_beyond_the_buffer_is_told_as_overflow_and_the_stream_goes_on() {
    let (ns, _peer, eth0) = pair("overflow").await;
    let mut events = ns
        .netlink()
        .events_with_buffer(&[Group::Ipv4Route], 4096)
        .unwrap();
    let routes: Vec<_> = (0..5000_u32)
        .map(|i| {
            let prefix = cali_netlink::IpNetwork::new(
                IpAddr::from((0x0b00_0000 + (i << 6)).to_be_bytes()),
                26,
            )
            .unwrap();
            Change::Replace(Route::new(
                prefix,
                80,
                Target::Hop(Hop::via("10.0.0.2".parse().unwrap(), eth0)),
            ))
        })
        .collect();
    ns.netlink().apply_routes(&routes);
    assert_eq!(
        until(&mut events, |event| *event == Event::Overflow).await,
        Event::Overflow
    );
    ns.ip("route add 172.16.0.0/12 via 10.0.0.2");
    until(&mut events, |event| matches!(event, Event::Route(Notice::Present(route)) if route.prefix.prefix() == 12)).await;
}

#[tokio::test]
async fn a_burst_that_nobody_waited_for_to_its_end_is_not_lost() {
    let (ns, _peer, eth0) = pair("gather").await;
    let mut events = ns.netlink().events(&[Group::Ipv4Route]).unwrap();
    let route = |prefix: &str| {
        let hop = Target::Hop(Hop::via("10.0.0.2".parse().unwrap(), eth0));
        Change::Replace(Route::new(prefix.parse().unwrap(), 80, hop))
    };
    let prefixes = |events: Vec<Event>| -> Vec<String> {
        let prefix = |event: &Event| match event {
            Event::Route(notice) => notice.object().prefix.to_string(),
            other => format!("{other:?}"),
        };
        events.iter().map(prefix).collect()
    };
    // The window is longer than the test: the first burst is given up with its event in hand.
    let window = Duration::from_secs(3600);
    ns.netlink().apply_routes(&[route("11.0.0.0/26")]);
    let given_up = tokio::time::timeout(Duration::from_millis(50), events.next_burst(window, 10));
    assert!(given_up.await.is_err());
    ns.netlink().apply_routes(&[route("11.0.1.0/26")]);
    let so_far = prefixes(events.burst_so_far().unwrap());
    assert_eq!(so_far, ["11.0.0.0/26", "11.0.1.0/26"]);
    assert!(events.burst_so_far().unwrap().is_empty());
    ns.netlink().apply_routes(&[route("11.0.2.0/26")]);
    let given_up = tokio::time::timeout(Duration::from_millis(50), events.next_burst(window, 2));
    assert!(given_up.await.is_err());
    ns.netlink().apply_routes(&[route("11.0.3.0/26")]);
    let full = events.next_burst(window, 2);
    let full = tokio::time::timeout(patient(LIMIT), full).await.unwrap();
    assert_eq!(prefixes(full.unwrap()), ["11.0.2.0/26", "11.0.3.0/26"]);
}

#[tokio::test]
async fn five_thousand_routes_fit_into_the_default_buffer_of_a_stream() {
    let (ns, _peer, eth0) = pair("burst").await;
    let mut events = ns.netlink().events(&[Group::Ipv4Route]).unwrap();
    let routes: Vec<_> = (0..5000_u32)
        .map(|i| {
            let prefix = cali_netlink::IpNetwork::new(
                IpAddr::from((0x0b00_0000 + (i << 6)).to_be_bytes()),
                26,
            )
            .unwrap();
            Change::Replace(Route::new(
                prefix,
                80,
                Target::Hop(Hop::via("10.0.0.2".parse().unwrap(), eth0)),
            ))
        })
        .collect();
    ns.netlink().apply_routes(&routes);
    for change in &routes {
        assert_eq!(
            next(&mut events).await,
            Event::Route(Notice::Present(change.object().clone()))
        );
    }
}

#[test]
fn flows_of_an_address_are_found_and_deleted() {
    let ns = TestNs::new("ct");
    // A rule that looks at the state turns tracking on in the namespace.
    ns.run("nft", &["add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c ct state new counter"]);
    ns.ip("addr add 10.5.0.1/32 dev lo");
    ns.ip("addr add fd05::1/128 dev lo nodad");
    let conntrack = Conntrack::open(ns.netns()).unwrap();
    assert_eq!(
        conntrack.count().unwrap(),
        0,
        "a new namespace has no flows"
    );
    ns.netns()
        .run(|| {
            for (from, to) in [
                ("127.0.0.1:7001", "10.5.0.1:7002"),
                ("127.0.0.1:7001", "127.0.0.1:7003"),
                ("[::1]:7001", "[fd05::1]:7002"),
            ] {
                let socket = UdpSocket::bind(from).unwrap();
                let target = UdpSocket::bind(to).unwrap();
                target
                    .set_read_timeout(Some(Duration::from_millis(100)))
                    .unwrap();
                // The kernel's route to a new IPv6 address comes a little later than the address.
                let heard = (0..100).any(|_| {
                    socket.send_to(b"x", to).unwrap();
                    target.recv(&mut [0; 8]).is_ok()
                });
                assert!(heard, "{to} hears nothing");
            }
        })
        .unwrap();
    ns.run("ping", &["-c", "1", "10.5.0.1"]);
    let flows = conntrack.dump().unwrap();
    assert_eq!(conntrack.count().unwrap() as usize, flows.len());
    let udp = |destination: &str, port| Tuple {
        source: if destination.contains(':') {
            "::1".parse().unwrap()
        } else {
            "127.0.0.1".parse().unwrap()
        },
        destination: destination.parse().unwrap(),
        protocol: 17,
        source_port: 7001,
        destination_port: port,
    };
    for tuple in [
        udp("10.5.0.1", 7002),
        udp("127.0.0.1", 7003),
        udp("fd05::1", 7002),
    ] {
        assert!(
            flows.iter().any(|flow| flow.original == tuple),
            "{tuple} in {flows:#?}"
        );
    }
    assert_eq!(
        conntrack
            .delete_addresses(&["10.5.0.1".parse().unwrap(), "fd05::1".parse().unwrap()])
            .unwrap(),
        3
    );
    let left: Vec<Tuple> = conntrack
        .dump()
        .unwrap()
        .iter()
        .map(|flow| flow.original)
        .collect();
    assert_eq!(left, [udp("127.0.0.1", 7003)]);
    assert_eq!(conntrack.delete_tuple(&left[0]), Ok(true));
    assert_eq!(conntrack.delete_tuple(&left[0]), Ok(false));
}

#[tokio::test]
async fn this_host_is_probed_without_a_trace() {
    let before = TestNs::new("probe");
    drop(before);
    let results = probe::probe(Capability::ALL).await;
    assert_eq!(results.len(), Capability::ALL.len());
    for needed in [
        Capability::Root,
        Capability::Namespaces,
        Capability::Veth,
        Capability::NfTables,
        Capability::Vxlan,
        Capability::NexthopObjects,
    ] {
        let (_, result) = results
            .iter()
            .find(|(capability, _)| *capability == needed)
            .unwrap();
        assert_eq!(*result, Ok(()));
    }
    for (capability, result) in &results {
        println!(
            "{capability}: {}",
            result
                .as_ref()
                .map_or_else(ToString::to_string, |()| "yes".to_owned())
        );
        // What is missing says so with the kernel's word, not as an unreadable request of ours.
        if let Err(missing) = result {
            assert!(
                missing
                    .cause
                    .as_ref()
                    .is_some_and(cali_netlink::Error::is_unsupported)
                    || missing
                        .cause
                        .as_ref()
                        .is_some_and(cali_netlink::Error::is_not_found),
                "{missing}"
            );
        }
    }
    assert_eq!(probe::lab_needs(), vec![Ok(()); 6]);
}

fn listener(address: &str) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket
        .bind(&SockAddr::from(
            address.parse::<std::net::SocketAddr>().unwrap(),
        ))
        .unwrap();
    socket.listen(8).unwrap();
    socket
}

fn connect(to: &str, key: Option<&[u8]>) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let address: std::net::SocketAddr = to.parse().unwrap();
    if let Some(key) = key {
        tcp::set_md5_key(&socket, address.ip(), Some(key)).unwrap();
    }
    socket
        .connect_timeout(&address.into(), Duration::from_millis(300))
        .map(|()| socket)
}

#[test]
fn a_keyed_listener_takes_signed_connections_only() {
    let ns = TestNs::new("md5");
    ns.netns()
        .run(|| {
            let exact = listener("127.0.0.1:179");
            tcp::set_md5_key(&exact, "127.0.0.1".parse().unwrap(), Some(b"secret")).unwrap();
            assert!(connect("127.0.0.1:179", Some(b"wrong")).is_err());
            assert!(connect("127.0.0.1:179", None).is_err());
            let mut client = connect("127.0.0.1:179", Some(b"secret")).unwrap();
            let mut server = TcpListener::from(exact).accept().unwrap().0;
            client.write_all(b"open").unwrap();
            let mut buffer = [0; 4];
            server.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"open");

            let prefix = listener("127.0.0.1:1179");
            tcp::set_md5_key_of_prefix(&prefix, "127.0.0.0/8".parse().unwrap(), Some(b"secret"))
                .unwrap();
            assert!(connect("127.0.0.1:1179", None).is_err());
            connect("127.0.0.1:1179", Some(b"secret")).unwrap();
            tcp::set_md5_key_of_prefix(&prefix, "127.0.0.0/8".parse().unwrap(), None).unwrap();
            connect("127.0.0.1:1179", None).unwrap();
        })
        .unwrap();
}

#[test]
fn the_ttl_guard_drops_what_comes_from_afar() {
    let ns = TestNs::new("ttl");
    ns.netns()
        .run(|| {
            let guarded = listener("127.0.0.1:179");
            tcp::set_minimum_ttl(&guarded, true, 255).unwrap();
            assert!(
                connect("127.0.0.1:179", None).is_err(),
                "the default TTL is 64"
            );
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_ttl_v4(255).unwrap();
            let address: std::net::SocketAddr = "127.0.0.1:179".parse().unwrap();
            socket.connect_timeout(&address.into(), LIMIT).unwrap();
        })
        .unwrap();
}

#[test]
fn waiting_ends_with_the_condition() {
    let mut rounds = 0;
    let value = eventually(LIMIT, || {
        rounds += 1;
        if rounds == 3 {
            Ok(rounds)
        } else {
            Err(format!("round {rounds}"))
        }
    });
    assert_eq!(value, 3);
}
