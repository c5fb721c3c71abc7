//! Speakers against each other, in one process and on virtual time.
#![allow(clippy::unwrap_used)]

mod in_memory;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bgpd::policy::{LocalKind, PolicyBuilder};
use bgpd::rib::LocalRoute;
use bgpd::speaker::settings::Range;
use bgpd::transport::memory::Network;
use bgpd::wire::{Attributes, Family, Prefix};
use cali_control::status::{BgpRequest, BgpResponse, SessionState};
use in_memory::{Running, addr, established, prefix, settings};

#[tokio::test(start_paused = true)]
async fn two_speakers_exchange_and_withdraw() {
    let net = Network::default();
    let one = Running::start(
        &net,
        1,
        settings(1, 64512, &[(2, 64512)], &["10.1.0.0/26", "10.1.1.0/26"]),
    );
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]));
    one.has("10.2.0.0/26").await;
    two.has("10.1.0.0/26").await;
    two.has("10.1.1.0/26").await;
    let path = two.sink.contents().paths[&prefix("10.1.0.0/26")].clone();
    assert_eq!(path.gateways[0].addr, addr(1));
    assert_eq!(path.learned_from, Some(addr(1)));
    one.speaker
        .configure(settings(1, 64512, &[(2, 64512)], &["10.1.1.0/26"]))
        .await
        .unwrap();
    two.wait("withdrawal", |_, c| {
        !c.paths.contains_key(&prefix("10.1.0.0/26"))
    })
    .await;
    assert!(
        two.sink
            .contents()
            .paths
            .contains_key(&prefix("10.1.1.0/26"))
    );
    assert_eq!(
        two.status().await.peers[0].established_count,
        1,
        "reconfiguration must not touch the session"
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_mesh_comes_up_whoever_dials() {
    let net = Network::default();
    let numbers: Vec<u8> = (1..=8).collect();
    let mut running = Vec::new();
    for n in &numbers {
        let others: Vec<(u8, u32)> = numbers
            .iter()
            .filter(|m| *m != n)
            .map(|m| (*m, 64512))
            .collect();
        running.push(Running::start(
            &net,
            *n,
            settings(*n, 64512, &others, &[&format!("10.{n}.0.0/26")]),
        ));
    }
    for speaker in &running {
        speaker
            .wait("7 sessions and routes", |s, c| {
                established(s, 7) && c.paths.len() == 7
            })
            .await;
    }
}

#[tokio::test(start_paused = true)]
async fn external_speaker_passes_routes_on_with_its_own_address() {
    let net = Network::default();
    let one = Running::start(&net, 1, settings(1, 64512, &[(9, 65000)], &["10.1.0.0/26"]));
    let router = Running::start(&net, 9, settings(9, 65000, &[(1, 64512), (2, 64513)], &[]));
    let two = Running::start(&net, 2, settings(2, 64513, &[(9, 65000)], &["10.2.0.0/26"]));
    two.has("10.1.0.0/26").await;
    one.has("10.2.0.0/26").await;
    router.has("10.1.0.0/26").await;
    assert_eq!(
        two.sink.contents().paths[&prefix("10.1.0.0/26")].gateways[0].addr,
        addr(9)
    );
}

#[tokio::test(start_paused = true)]
async fn a_crash_and_restart_costs_nobody_a_route() {
    let net = Network::default();
    let one = Running::start(&net, 1, settings(1, 64512, &[(9, 65000)], &["10.1.0.0/26"]));
    let two = Running::start(&net, 2, settings(2, 64513, &[(9, 65000)], &["10.2.0.0/26"]));
    let router_settings = || settings(9, 65000, &[(1, 64512), (2, 64513)], &["10.9.0.0/24"]);
    let router = Running::start(&net, 9, router_settings());
    for speaker in [&one, &two, &router] {
        speaker
            .wait("first convergence", |s, c| {
                !s.restarting && !c.paths.is_empty()
            })
            .await;
    }
    two.has("10.1.0.0/26").await;
    one.has("10.2.0.0/26").await;

    router.crash().await;
    one.wait("loss noticed", |s, _| s.peers[0].graceful_restart)
        .await;
    let router = Running::start(&net, 9, router_settings());
    router
        .wait("restart over", |s, c| {
            !s.restarting && c.synced.len() == 2 && c.paths.len() == 2
        })
        .await;
    for speaker in [&one, &two] {
        speaker
            .wait("session back", |s, _| {
                established(s, 1) && !s.peers[0].graceful_restart
            })
            .await;
    }
    tokio::time::sleep(Duration::from_secs(300)).await;
    for speaker in [&one, &two, &router] {
        let contents = speaker.sink.contents();
        assert_eq!(contents.removed, [], "speaker {} lost routes", speaker.n);
    }
    assert!(
        one.sink
            .contents()
            .paths
            .contains_key(&prefix("10.2.0.0/26"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_restarted_speaker_that_no_longer_has_a_route_loses_it_at_its_peers() {
    let net = Network::default();
    let one = Running::start(&net, 1, settings(1, 64512, &[(2, 64512)], &[]));
    let two = Running::start(
        &net,
        2,
        settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26", "10.2.1.0/26"]),
    );
    one.has("10.2.1.0/26").await;
    two.crash().await;
    one.wait("loss noticed", |s, _| s.peers[0].graceful_restart)
        .await;
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]));
    one.wait("stale route swept", |_, c| {
        !c.paths.contains_key(&prefix("10.2.1.0/26"))
    })
    .await;
    assert_eq!(one.sink.contents().removed, [prefix("10.2.1.0/26")]);
    drop(two);
}

#[tokio::test(start_paused = true)]
async fn a_speaker_that_does_not_come_back_loses_its_routes_after_the_restart_time() {
    let net = Network::default();
    let one = Running::start(&net, 1, settings(1, 64512, &[(2, 64512)], &[]));
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]));
    one.has("10.2.0.0/26").await;
    two.crash().await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    one.has("10.2.0.0/26").await;
    one.wait("route gone", |_, c| c.paths.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn drain_takes_the_routes_away_at_once() {
    let net = Network::default();
    let one = Running::start(&net, 1, settings(1, 64512, &[(2, 64512)], &[]));
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]));
    one.has("10.2.0.0/26").await;
    let answer = two
        .speaker
        .ask(BgpRequest::Drain {
            message: Some("maintenance".to_owned()),
        })
        .await;
    assert_eq!(answer, Ok(BgpResponse::Done));
    one.wait("route gone", |_, c| c.paths.is_empty()).await;
    let info = one.status().await.peers[0].info.clone().unwrap_or_default();
    assert!(info.contains("maintenance"), "{info}");
    two.task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_filter_change_is_applied_without_a_reset() {
    let net = Network::default();
    let base = || settings(1, 64512, &[(2, 64512)], &[]);
    let one = Running::start(&net, 1, base());
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]));
    one.has("10.2.0.0/26").await;
    let mut refusing = base();
    for neighbour in refusing.neighbours.values_mut() {
        neighbour.exchange.import = Arc::new(PolicyBuilder::default().build(false));
    }
    one.speaker.configure(refusing).await.unwrap();
    one.wait("route refused", |_, c| c.paths.is_empty()).await;
    one.speaker.configure(base()).await.unwrap();
    one.has("10.2.0.0/26").await;
    assert_eq!(two.status().await.peers[0].established_count, 1);
}

#[tokio::test(start_paused = true)]
async fn a_removed_neighbour_is_told_and_forgotten() {
    let net = Network::default();
    let one = Running::start(
        &net,
        1,
        settings(1, 64512, &[(2, 64512), (3, 64512)], &["10.1.0.0/26"]),
    );
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]));
    let three = Running::start(&net, 3, settings(3, 64512, &[(1, 64512)], &["10.3.0.0/26"]));
    one.wait("both", |s, c| established(s, 2) && c.paths.len() == 2)
        .await;
    one.speaker
        .configure(settings(1, 64512, &[(3, 64512)], &["10.1.0.0/26"]))
        .await
        .unwrap();
    one.wait("routes of the neighbour gone", |_, c| c.paths.len() == 1)
        .await;
    two.wait("told", |s, c| {
        c.paths.is_empty() && s.peers[0].info.is_some()
    })
    .await;
    assert_eq!(
        three.status().await.peers[0].established_count,
        1,
        "the other session must not be touched"
    );
}

#[tokio::test(start_paused = true)]
async fn a_blocked_neighbour_stays_down_with_its_reason() {
    let net = Network::default();
    let mut blocked = settings(1, 64512, &[(2, 64512)], &[]);
    for neighbour in blocked.neighbours.values_mut() {
        neighbour.session.blocked = Some("no password".to_owned());
    }
    let one = Running::start(&net, 1, blocked);
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &[]));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let status = one.status().await;
    assert_eq!(status.peers[0].state, SessionState::Idle);
    assert_eq!(status.peers[0].info.as_deref(), Some("no password"));
    one.speaker
        .configure(settings(1, 64512, &[(2, 64512)], &[]))
        .await
        .unwrap();
    two.wait("session", |s, _| established(s, 1)).await;
}

#[tokio::test(start_paused = true)]
async fn wrong_as_is_refused_and_shown() {
    let net = Network::default();
    let one = Running::start(&net, 1, settings(1, 64512, &[(2, 65000)], &[]));
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &[]));
    one.wait("reason shown", |s, _| {
        s.peers[0]
            .info
            .as_deref()
            .is_some_and(|i| i.contains("(2/2)"))
    })
    .await;
    two.wait("reason shown", |s, _| {
        s.peers[0]
            .info
            .as_deref()
            .is_some_and(|i| i.contains("received"))
    })
    .await;
    assert!(!established(&one.status().await, 1));
}

#[tokio::test(start_paused = true)]
async fn many_routes_arrive_complete_in_both_families_of_one_session() {
    let net = Network::default();
    let mut big = settings(1, 64512, &[(2, 64512)], &[]);
    big.originated = (0..20_000_u32)
        .map(|i| Prefix::v4(0x0b00_0000 + (i << 8), 24))
        .map(|prefix| {
            let attributes = Attributes {
                local_pref: Some(100),
                ..Attributes::default()
            };
            (
                prefix,
                LocalRoute {
                    prefix,
                    attributes,
                    kind: LocalKind::Static,
                    interface: None,
                },
            )
        })
        .collect::<BTreeMap<_, _>>();
    let one = Running::start(&net, 1, big);
    let two = Running::start(&net, 2, settings(2, 64512, &[(1, 64512)], &[]));
    two.wait("all routes", |s, c| {
        c.paths.len() == 20_000 && c.synced.contains(&Family::IPV4_UNICAST) && !s.restarting
    })
    .await;
    drop(one);
}

/// A reflector that takes whoever comes from 10.0.0.0/24, two at a time.
fn open_for_two() -> bgpd::speaker::settings::Settings {
    let mut settings = settings(9, 64512, &[(1, 64512)], &["10.9.0.0/24"]);
    let named = settings.neighbours.pop_first().unwrap();
    let mut neighbour = named.1;
    neighbour.session.remote_as = None;
    settings.ranges.push(Range {
        prefix: prefix("10.0.0.0/24"),
        limit: 2,
        neighbour,
    });
    settings
}

#[tokio::test(start_paused = true)]
async fn neighbours_of_a_range_come_by_themselves_up_to_its_limit_and_are_forgotten() {
    let net = Network::default();
    let host = Running::start(&net, 9, open_for_two());
    let guest = |n: u8| {
        let of = settings(
            n,
            64512 + u32::from(n),
            &[(9, 64512)],
            &[&format!("10.{n}.0.0/26")],
        );
        Running::start(&net, n, of)
    };
    let one = guest(1);
    let two = guest(2);
    host.wait("two guests", |s, c| established(s, 2) && c.paths.len() == 2)
        .await;
    one.has("10.2.0.0/26").await;
    let three = guest(3);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(host.status().await.peers.len(), 2, "no third one");
    assert!(!established(&three.status().await, 1));

    // Room is made by one that says goodbye.
    let answer = two.speaker.ask(BgpRequest::Drain { message: None }).await;
    assert_eq!(answer, Ok(BgpResponse::Done));
    host.wait("the third in the second's place", |s, c| {
        established(s, 2) && c.paths.contains_key(&prefix("10.3.0.0/26"))
    })
    .await;
    assert!(
        host.status()
            .await
            .peers
            .iter()
            .all(|p| p.address != addr(2))
    );

    // A change of the settings reaches them; without the range there are none.
    let mut closed = open_for_two();
    closed.ranges.clear();
    host.speaker.configure(closed).await.unwrap();
    host.wait("nobody", |s, c| s.peers.is_empty() && c.paths.is_empty())
        .await;
}

#[tokio::test(start_paused = true)]
async fn long_lived_routes_outlast_the_restart_time_and_end_with_their_own() {
    let net = Network::default();
    let long = |n: u8, other: u8, routes: &[&str]| {
        let mut settings = settings(n, 64512, &[(other, 64512)], routes);
        for neighbour in settings.neighbours.values_mut() {
            neighbour.session.long_lived = Some(600);
        }
        settings
    };
    let one = Running::start(&net, 1, long(1, 2, &[]));
    let two = Running::start(&net, 2, long(2, 1, &["10.2.0.0/26"]));
    one.has("10.2.0.0/26").await;
    one.wait("start is over", |s, _| !s.restarting).await;
    two.crash().await;
    // The restart time is 120 s.
    tokio::time::sleep(Duration::from_secs(400)).await;
    one.has("10.2.0.0/26").await;
    tokio::time::sleep(Duration::from_secs(400)).await;
    one.wait("route gone", |_, c| c.paths.is_empty()).await;
    let told = one.sink.contents().removed;
    assert_eq!(told, [prefix("10.2.0.0/26")]);
}

#[tokio::test(start_paused = true)]
async fn all_paths_go_through_a_reflector_to_a_client_that_takes_several() {
    let net = Network::default();
    let several = |mut settings: bgpd::speaker::settings::Settings, client: bool| {
        let id = settings.router_id;
        for neighbour in settings.neighbours.values_mut() {
            neighbour.session.add_path = bgpd::wire::AddPathMode::BOTH;
            neighbour.exchange.reflector_client = client.then_some(id);
        }
        settings
    };
    let reflector = settings(9, 64512, &[(1, 64512), (2, 64512), (3, 64512)], &[]);
    let reflector = Running::start(&net, 9, several(reflector, true));
    let client = |n: u8, routes: &[&str]| {
        let of = settings(n, 64512, &[(9, 64512)], routes);
        Running::start(&net, n, several(of, false))
    };
    let one = client(1, &["10.1.0.0/26"]);
    let two = client(2, &["10.1.0.0/26"]);
    let three = client(3, &[]);
    let both = |gateways: &[bgpd::rib::Gateway]| {
        let addresses: Vec<_> = gateways.iter().map(|g| g.addr).collect();
        addresses == [addr(1), addr(2)]
    };
    three
        .wait("two ways", |_, c| {
            c.paths
                .get(&prefix("10.1.0.0/26"))
                .is_some_and(|path| both(&path.gateways))
        })
        .await;
    one.crash().await;
    tokio::time::sleep(Duration::from_secs(200)).await;
    three
        .wait("the other way", |_, c| {
            c.paths
                .get(&prefix("10.1.0.0/26"))
                .is_some_and(|path| path.gateways.len() == 1 && path.gateways[0].addr == addr(2))
        })
        .await;
    drop((reflector, two));
}
