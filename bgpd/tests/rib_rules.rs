//! Facts about the table, one per test: selection, loops, graceful restart, limits, who is told what.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use bgpd::policy::{Action, Condition, Edit, LocalKind, Policy, PolicyBuilder};
use bgpd::rib::{
    BestRoute, Gateway, LocalRoute, NextHopMode, NextHopState, PathStatus, PeerConfig, PeerId,
    PeerSlot, Refusal, Rib, RibChanges, RibConfig, RibInput, Step,
};
use bgpd::wire::{
    AsPath, Attributes, Codec, Community, Family, FamilySet, Framer, Message, NextHop, Nlri,
    NlriBlock, PeerKind, Prefix, Update,
};
use bytes::BytesMut;

const V4: Family = Family::IPV4_UNICAST;

fn settings(kind: PeerKind, last: u8) -> PeerConfig {
    let addr = Ipv4Addr::new(192, 0, 2, last);
    PeerConfig {
        codec: Codec {
            four_octet_as: true,
            families: FamilySet::ALL,
            ..Codec::basic(kind)
        },
        local_as: 65000,
        remote_as: if kind == PeerKind::Ibgp {
            65000
        } else {
            65000 + u32::from(last)
        },
        remote_id: addr,
        remote_addr: IpAddr::V4(addr),
        scope: 0,
        local_v4: Some(Ipv4Addr::new(192, 0, 2, 200)),
        local_v6: None,
        next_hop: NextHopMode::Auto,
        reflector_client: None,
        allow_own_as: 0,
        enforce_first_as: false,
        long_lived: false,
        enhanced_refresh: false,
        max_prefixes: 0,
        import: Arc::new(Policy::accept_all()),
        export: Arc::new(Policy::accept_all()),
    }
}

struct Bench {
    rib: Rib,
    changes: RibChanges,
}

impl Bench {
    fn new() -> Self {
        let mut config = RibConfig::new(65000, Ipv4Addr::new(192, 0, 2, 200));
        config.assume_reachable = true;
        Self {
            rib: Rib::new(config),
            changes: RibChanges::default(),
        }
    }

    fn peer(&mut self, config: PeerConfig) -> PeerId {
        let slot = self.rib.register().expect("a slot");
        self.up(PeerId { slot, epoch: 1 }, config, FamilySet::EMPTY)
    }

    fn up(&mut self, peer: PeerId, config: PeerConfig, preserved: FamilySet) -> PeerId {
        self.rib.handle(RibInput::PeerUp {
            peer,
            config: Arc::new(config),
            preserved,
        });
        peer
    }

    fn announce(&mut self, peer: PeerId, prefix: &str, next_hop: u8, attributes: Attributes) {
        let route = Nlri::new(p(prefix));
        let update = Update {
            next_hop: Some(NextHop::V4(Ipv4Addr::new(192, 0, 2, next_hop))),
            nlri: NlriBlock::from_routes(V4, false, &[route]),
            attributes,
            ..Update::empty()
        };
        self.rib.handle(RibInput::Update {
            peer,
            update: Box::new(update),
        });
        self.changes = self.rib.commit();
    }

    fn input(&mut self, input: RibInput) {
        self.rib.handle(input);
        self.changes = self.rib.commit();
    }

    fn changed(&self, prefix: &str) -> Option<Option<&BestRoute>> {
        let change = self.changes.best.iter().find(|c| c.prefix == p(prefix))?;
        Some(change.best.as_deref())
    }

    fn status(&self, prefix: &str, peer: PeerId) -> Option<PathStatus> {
        let paths = self.rib.paths(&p(prefix));
        paths.iter().find(|v| v.peer == peer.slot).map(|v| v.status)
    }

    /// Reads everything for a peer: announced routes with attributes and next hop, withdrawn routes.
    fn read(&mut self, peer: PeerId) -> (Vec<(String, NextHop, Attributes)>, Vec<String>) {
        let (mut announced, mut withdrawn) = (Vec::new(), Vec::new());
        loop {
            let pull = self.rib.pull(peer, 65536);
            for bytes in &pull.messages {
                let frame = Framer::new().next(&mut BytesMut::from(&bytes[..]));
                let frame = frame.expect("a good header").expect("a whole message");
                let codec = settings(PeerKind::Ibgp, 1).codec;
                let Ok(Message::Update(update)) = Message::decode(&frame, &codec) else {
                    panic!("not an UPDATE");
                };
                withdrawn.extend(update.withdrawals().map(|r| r.prefix.to_string()));
                for (next_hop, block) in update.announcements() {
                    let routes = block.iter().map(|r| r.prefix.to_string());
                    announced.extend(routes.map(|r| (r, next_hop, update.attributes.clone())));
                }
            }
            if !pull.more {
                return (announced, withdrawn);
            }
        }
    }
}

fn p(text: &str) -> Prefix {
    text.parse().expect("a prefix")
}

fn path(asns: &[u32]) -> Attributes {
    Attributes {
        as_path: AsPath::from_sequence(asns),
        ..Attributes::default()
    }
}

const NET: &str = "10.0.0.0/24";

#[test]
fn a_looped_announcement_replaces_the_former_path() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ebgp, 1));
    b.announce(peer, NET, 1, path(&[65001]));
    assert!(b.changed(NET).is_some_and(|best| best.is_some()));
    b.announce(peer, NET, 1, path(&[65001, 65000]));
    assert_eq!(b.changed(NET), Some(None));
    assert_eq!(
        b.status(NET, peer),
        Some(PathStatus::Refused(Refusal::AsLoop))
    );
}

#[test]
fn own_as_is_allowed_as_often_as_configured() {
    let mut b = Bench::new();
    let peer = b.peer(PeerConfig {
        allow_own_as: 1,
        ..settings(PeerKind::Ebgp, 1)
    });
    b.announce(peer, NET, 1, path(&[65001, 65000]));
    assert_eq!(b.status(NET, peer), Some(PathStatus::Best));
    b.announce(peer, NET, 1, path(&[65001, 65000, 65000]));
    assert_eq!(
        b.status(NET, peer),
        Some(PathStatus::Refused(Refusal::AsLoop))
    );
}

#[test]
fn reflector_loops_and_own_next_hops_are_refused() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ibgp, 1));
    let own = Ipv4Addr::new(192, 0, 2, 200);
    b.announce(
        peer,
        NET,
        1,
        Attributes {
            originator_id: Some(own),
            ..path(&[])
        },
    );
    assert_eq!(
        b.status(NET, peer),
        Some(PathStatus::Refused(Refusal::OriginatorLoop))
    );
    b.announce(
        peer,
        NET,
        1,
        Attributes {
            cluster_list: [own].into(),
            ..path(&[])
        },
    );
    assert_eq!(
        b.status(NET, peer),
        Some(PathStatus::Refused(Refusal::ClusterLoop))
    );
    b.announce(peer, NET, 200, path(&[]));
    assert_eq!(
        b.status(NET, peer),
        Some(PathStatus::Refused(Refusal::OwnNextHop))
    );
}

#[test]
fn med_decides_only_within_a_neighbouring_as_in_every_order_of_arrival() {
    // The classic three: A and B of one AS, C of another; without grouping the outcome depends on the order.
    let cast = [(1, 65001, 20u32), (2, 65001, 10), (3, 65003, 15)];
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for order in orders {
        let mut b = Bench::new();
        let peers = cast.map(|(last, ..)| b.peer(settings(PeerKind::Ebgp, last)));
        for i in order {
            let attributes = Attributes {
                med: Some(cast[i].2),
                ..path(&[cast[i].1])
            };
            b.announce(peers[i], NET, cast[i].0, attributes);
        }
        assert_eq!(
            b.status(NET, peers[0]),
            Some(PathStatus::NotBest(Step::Med)),
            "{order:?}"
        );
        assert_eq!(b.status(NET, peers[1]), Some(PathStatus::Best), "{order:?}");
        assert_eq!(
            b.status(NET, peers[2]),
            Some(PathStatus::Multipath),
            "{order:?}"
        );
    }
}

#[test]
fn equal_paths_share_the_load_and_a_worse_one_does_not() {
    let mut b = Bench::new();
    let peers = [1, 2, 3].map(|n| b.peer(settings(PeerKind::Ebgp, n)));
    b.announce(peers[0], NET, 1, path(&[65001]));
    b.announce(peers[1], NET, 2, path(&[65002]));
    let best = b.changed(NET).flatten().expect("a route");
    let addrs: Vec<String> = best.gateways.iter().map(|g| g.addr.to_string()).collect();
    assert_eq!(addrs, ["192.0.2.1", "192.0.2.2"]);
    b.announce(peers[2], NET, 3, path(&[65003, 1]));
    assert_eq!(b.changed(NET), None, "a longer path changes nothing");
    assert_eq!(
        b.status(NET, peers[2]),
        Some(PathStatus::NotBest(Step::AsPathLength))
    );
}

#[test]
fn a_changed_next_hop_alone_reaches_kernel_and_peers() {
    let mut b = Bench::new();
    let from = b.peer(settings(PeerKind::Ebgp, 1));
    let to = b.peer(settings(PeerKind::Ibgp, 2));
    b.announce(from, NET, 1, path(&[65001]));
    b.read(to);
    b.announce(from, NET, 7, path(&[65001]));
    let gateway = Gateway {
        addr: "192.0.2.7".parse().expect("an address"),
        scope: 0,
    };
    assert_eq!(
        b.changed(NET).flatten().map(|r| r.gateways.clone()),
        Some(vec![gateway])
    );
    let (announced, withdrawn) = b.read(to);
    assert_eq!(announced.len(), 1);
    assert_eq!(announced[0].1.global().to_string(), "192.0.2.7");
    assert!(withdrawn.is_empty());
}

#[test]
fn a_route_that_moves_to_a_new_gateway_is_replaced_not_withdrawn() {
    let mut b = Bench::new();
    b.rib = Rib::new(RibConfig::new(65000, Ipv4Addr::new(192, 0, 2, 200)));
    let from = b.peer(settings(PeerKind::Ebgp, 1));
    let to = b.peer(settings(PeerKind::Ibgp, 2));
    for next_hop in [1, 7] {
        b.rib.handle(RibInput::Update {
            peer: from,
            update: Box::new(Update {
                next_hop: Some(NextHop::V4(Ipv4Addr::new(192, 0, 2, next_hop))),
                nlri: NlriBlock::from_routes(V4, false, &[Nlri::new(p(NET))]),
                attributes: path(&[65001]),
                ..Update::empty()
            }),
        });
        let (watch, unwatch) = b.rib.take_watches();
        let left = usize::from(next_hop == 7);
        assert_eq!((watch.len(), unwatch.len()), (1, left));
        for gateway in watch {
            let state = NextHopState::Reachable { metric: 0 };
            b.rib.handle(RibInput::NextHop { gateway, state });
        }
        b.changes = b.rib.commit();
        assert!(b.changed(NET).flatten().is_some());
        let (announced, withdrawn) = b.read(to);
        assert_eq!((announced.len(), withdrawn.len()), (1, 0));
    }
}

#[test]
fn stale_routes_stay_until_end_of_rib_and_then_go_unless_repeated() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ebgp, 1));
    b.announce(peer, NET, 1, path(&[65001]));
    b.announce(peer, "10.0.1.0/24", 1, path(&[65001]));
    b.input(RibInput::PeerDown {
        peer,
        retain: FamilySet::ALL,
    });
    assert!(
        b.changed(NET).flatten().is_some_and(|best| best.stale),
        "kept, and marked"
    );
    let peer = PeerId { epoch: 2, ..peer };
    b.up(peer, settings(PeerKind::Ebgp, 1), FamilySet::ALL);
    b.announce(peer, NET, 1, path(&[65001]));
    assert!(b.changed(NET).flatten().is_some_and(|best| !best.stale));
    b.input(RibInput::Update {
        peer,
        update: Box::new(Update::end_of_rib(V4)),
    });
    assert_eq!(b.changed("10.0.1.0/24"), Some(None));
    assert_eq!(b.changed(NET), None);
}

#[test]
fn a_restarted_peer_that_kept_no_state_loses_its_stale_routes_at_once() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ebgp, 1));
    b.announce(peer, NET, 1, path(&[65001]));
    b.input(RibInput::PeerDown {
        peer,
        retain: FamilySet::ALL,
    });
    b.up(
        PeerId { epoch: 2, ..peer },
        settings(PeerKind::Ebgp, 1),
        FamilySet::EMPTY,
    );
    b.changes = b.rib.commit();
    assert_eq!(b.changed(NET), Some(None));
}

#[test]
fn a_second_failure_drops_what_was_stale_already() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ebgp, 1));
    b.announce(peer, NET, 1, path(&[65001]));
    b.input(RibInput::PeerDown {
        peer,
        retain: FamilySet::ALL,
    });
    let peer = b.up(
        PeerId { epoch: 2, ..peer },
        settings(PeerKind::Ebgp, 1),
        FamilySet::ALL,
    );
    b.input(RibInput::PeerDown {
        peer,
        retain: FamilySet::ALL,
    });
    assert_eq!(b.changed(NET), Some(None));
}

#[test]
fn long_lived_stale_is_least_preferred_and_told_only_to_those_who_know_it() {
    let mut b = Bench::new();
    let old = b.peer(settings(PeerKind::Ebgp, 1));
    let knows = b.peer(PeerConfig {
        long_lived: true,
        ..settings(PeerKind::Ibgp, 3)
    });
    let plain = b.peer(settings(PeerKind::Ibgp, 4));
    b.announce(old, NET, 1, path(&[65001]));
    let keep_not = Attributes {
        communities: [Community::NO_LLGR].into(),
        ..path(&[65001])
    };
    b.announce(old, "10.0.1.0/24", 1, keep_not);
    b.read(plain);
    b.input(RibInput::PeerDown {
        peer: old,
        retain: FamilySet::ALL,
    });
    b.input(RibInput::LongLivedStale {
        slot: old.slot,
        families: FamilySet::ALL,
    });
    assert_eq!(b.changed("10.0.1.0/24"), Some(None), "NO_LLGR");
    let (announced, _) = b.read(knows);
    assert!(
        announced
            .iter()
            .any(|(r, _, a)| r == NET && a.has_community(Community::LLGR_STALE))
    );
    let (_, withdrawn) = b.read(plain);
    assert!(withdrawn.contains(&NET.to_owned()), "{withdrawn:?}");
    // A path that is worse in everything else wins now.
    let other = b.peer(settings(PeerKind::Ebgp, 2));
    b.announce(other, NET, 2, path(&[65002, 1, 2, 3]));
    assert_eq!(b.status(NET, other), Some(PathStatus::Best));
    assert_eq!(
        b.status(NET, old),
        Some(PathStatus::NotBest(Step::LongLivedStale))
    );
}

#[test]
fn enhanced_refresh_removes_what_was_not_repeated() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ebgp, 1));
    b.announce(peer, NET, 1, path(&[65001]));
    b.announce(peer, "10.0.1.0/24", 1, path(&[65001]));
    b.input(RibInput::RefreshBegin { peer, family: V4 });
    assert!(b.changes.best.is_empty());
    b.announce(peer, NET, 1, path(&[65001]));
    b.input(RibInput::RefreshEnd { peer, family: V4 });
    assert_eq!(b.changes.best.len(), 1);
    assert_eq!(b.changed("10.0.1.0/24"), Some(None));
}

#[test]
fn input_of_a_dead_session_is_ignored() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ebgp, 1));
    b.input(RibInput::PeerDown {
        peer,
        retain: FamilySet::EMPTY,
    });
    b.announce(peer, NET, 1, path(&[65001]));
    assert!(b.changes.best.is_empty());
    assert_eq!(b.rib.pull(peer, 1000).messages.len(), 0);
}

#[test]
fn external_peers_see_our_as_and_address_and_nothing_internal() {
    let mut b = Bench::new();
    let inside = b.peer(settings(PeerKind::Ibgp, 1));
    let outside = b.peer(settings(PeerKind::Ebgp, 2));
    let attributes = Attributes {
        local_pref: Some(300),
        med: Some(5),
        originator_id: Some(Ipv4Addr::new(1, 2, 3, 4)),
        cluster_list: [Ipv4Addr::new(5, 6, 7, 8)].into(),
        ..path(&[64512])
    };
    b.announce(inside, NET, 1, attributes);
    let (announced, _) = b.read(outside);
    assert_eq!(announced.len(), 1);
    let (_, next_hop, a) = &announced[0];
    assert_eq!(next_hop.global().to_string(), "192.0.2.200");
    assert_eq!(*a, path(&[65000, 64512]));
}

#[test]
fn internal_routes_are_reflected_to_and_from_clients_only() {
    let mut b = Bench::new();
    let cluster = Some(Ipv4Addr::new(192, 0, 2, 200));
    let client = b.peer(PeerConfig {
        reflector_client: cluster,
        ..settings(PeerKind::Ibgp, 1)
    });
    let plain = b.peer(settings(PeerKind::Ibgp, 2));
    let other = b.peer(settings(PeerKind::Ibgp, 3));
    b.announce(client, "10.0.1.0/24", 1, path(&[]));
    b.announce(plain, "10.0.2.0/24", 2, path(&[]));
    let mut routes = |peer| {
        b.read(peer)
            .0
            .into_iter()
            .map(|(r, n, a)| (r, n.global().to_string(), a))
            .collect::<Vec<_>>()
    };
    let to_plain = routes(plain);
    assert_eq!(to_plain.len(), 1);
    assert_eq!(
        (to_plain[0].0.as_str(), to_plain[0].1.as_str()),
        ("10.0.1.0/24", "192.0.2.1")
    );
    assert_eq!(
        to_plain[0].2.originator_id,
        Some(Ipv4Addr::new(192, 0, 2, 1))
    );
    assert_eq!(
        to_plain[0].2.cluster_list[..],
        [Ipv4Addr::new(192, 0, 2, 200)]
    );
    let to_client = routes(client);
    assert_eq!(to_client.len(), 1);
    assert_eq!(to_client[0].0, "10.0.2.0/24");
    let to_other = routes(other);
    assert_eq!(
        to_other.len(),
        1,
        "a route between two non-clients is not reflected: {to_other:?}"
    );
}

#[test]
fn members_of_a_group_get_the_same_bytes_and_a_slow_one_holds_nobody_up() {
    let mut config = RibConfig::new(65000, Ipv4Addr::new(192, 0, 2, 200));
    config.assume_reachable = true;
    config.stream_limit = 2000;
    let mut b = Bench {
        rib: Rib::new(config),
        changes: RibChanges::default(),
    };
    let from = b.peer(settings(PeerKind::Ebgp, 1));
    let (fast, same, slow) = (
        b.peer(settings(PeerKind::Ibgp, 2)),
        b.peer(settings(PeerKind::Ibgp, 3)),
        b.peer(settings(PeerKind::Ibgp, 4)),
    );
    b.changes = b.rib.commit();
    for peer in [from, fast, same, slow] {
        b.read(peer);
    }
    for round in 0..200u32 {
        let prefix = format!("10.{}.0.0/16", round % 50);
        b.announce(from, &prefix, 1, path(&[65001, 1 + round]));
        let (one, two) = (b.rib.pull(fast, 65536), b.rib.pull(same, 65536));
        assert_eq!(one.messages, two.messages);
        let shared = one
            .messages
            .iter()
            .zip(&two.messages)
            .all(|(a, b)| a.as_ptr() == b.as_ptr());
        assert!(shared && one.messages.len() == 1, "encoded once");
    }
    let (announced, _) = b.read(slow);
    assert_eq!(
        announced.len(),
        50,
        "the slow reader gets the last state of each prefix, once"
    );
    let last = announced
        .iter()
        .find(|(r, ..)| r == "10.49.0.0/16")
        .expect("the prefix");
    assert_eq!(last.2.as_path, AsPath::from_sequence(&[65001, 200]));
}

#[test]
fn a_local_route_wins_unless_import_prefers_the_peer() {
    let mut b = Bench::new();
    let import = PolicyBuilder::default()
        .rule(
            "moving in",
            vec![Condition::Community(Community(65000 << 16 | 9))],
            vec![Edit::PreferOverLocal],
            Action::Accept,
        )
        .build(true);
    let peer = b.peer(PeerConfig {
        import: Arc::new(import),
        ..settings(PeerKind::Ibgp, 1)
    });
    b.input(RibInput::Originate(LocalRoute {
        prefix: p(NET),
        attributes: Attributes::default(),
        kind: LocalKind::Workload,
        interface: None,
    }));
    b.announce(
        peer,
        NET,
        1,
        Attributes {
            local_pref: Some(999),
            ..path(&[])
        },
    );
    assert_eq!(
        b.status(NET, peer),
        Some(PathStatus::NotBest(Step::LocalOrigin))
    );
    let moving = Attributes {
        communities: [Community(65000 << 16 | 9)].into(),
        ..path(&[])
    };
    b.announce(peer, NET, 1, moving);
    assert_eq!(b.status(NET, peer), Some(PathStatus::Best));
    assert!(b.changed(NET).flatten().is_some_and(|best| best.preferred));
}

#[test]
fn a_peer_over_its_limit_is_named_once() {
    let mut b = Bench::new();
    let peer = b.peer(PeerConfig {
        max_prefixes: 2,
        ..settings(PeerKind::Ebgp, 1)
    });
    for n in 0..3 {
        assert!(b.changes.over_limit.is_empty());
        b.announce(peer, &format!("10.0.{n}.0/24"), 1, path(&[65001]));
    }
    assert_eq!(b.changes.over_limit, [peer]);
    b.announce(peer, "10.0.9.0/24", 1, path(&[65001]));
    assert!(b.changes.over_limit.is_empty());
}

#[test]
fn slots_are_given_out_again_after_removal() {
    let mut b = Bench::new();
    let peer = b.peer(settings(PeerKind::Ebgp, 1));
    b.announce(peer, NET, 1, path(&[65001]));
    b.input(RibInput::PeerRemoved { slot: peer.slot });
    assert_eq!(b.changed(NET), Some(None));
    assert_eq!(b.rib.register(), Some(peer.slot));
    assert_ne!(peer.slot, PeerSlot::LOCAL);
}
