//! Speakers against each other, in one process and on virtual time.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bgpd::policy::{LocalKind, Policy, PolicyBuilder};
use bgpd::reach::Anywhere;
use bgpd::rib::LocalRoute;
use bgpd::sink::memory::{Contents, Memory};
use bgpd::speaker::settings::{Exchange, Neighbour, SessionSettings, Settings};
use bgpd::speaker::{Environment, Speaker};
use bgpd::transport::memory::Network;
use bgpd::wire::{Attributes, Family, FamilySet, Prefix};
use cali_control::status::{BgpRequest, BgpResponse, BgpStatus, PeerKind, SessionState};
use tokio::task::JoinHandle;

fn addr(n: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, n))
}

fn id(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, n)
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn accept() -> Arc<Policy> {
    Arc::new(Policy::accept_all())
}

/// A speaker's settings: its number, its AS, its neighbours as (number, AS), what it originates.
fn settings(n: u8, asn: u32, neighbours: &[(u8, u32)], routes: &[&str]) -> Settings {
    let neighbour = |(peer, peer_as): &(u8, u32)| {
        let mut session = SessionSettings::new(asn, id(n), Some(*peer_as));
        session.source = Some(addr(n));
        session.families = FamilySet::IPV4;
        session.hold_time = 90;
        let exchange = Exchange::new(accept(), accept());
        (
            addr(*peer),
            Neighbour {
                name: None,
                origin: PeerKind::Mesh,
                session,
                exchange,
            },
        )
    };
    let route = |text: &&str| {
        let prefix = prefix(text);
        let attributes = Attributes {
            local_pref: Some(100),
            ..Attributes::default()
        };
        (
            prefix,
            LocalRoute {
                prefix,
                attributes,
                kind: LocalKind::Block,
                interface: None,
            },
        )
    };
    Settings {
        router_id: id(n),
        local_as: asn,
        cluster_id: None,
        listen: vec![SocketAddr::new(addr(n), 179)],
        neighbours: neighbours.iter().map(neighbour).collect(),
        originated: routes.iter().map(route).collect(),
    }
}

struct Running {
    n: u8,
    speaker: Speaker,
    task: JoinHandle<()>,
    sink: Memory,
}

impl Running {
    fn start(network: &Network, n: u8, settings: Settings) -> Self {
        let sink = Memory::default();
        let environment = Environment {
            transport: Arc::new(network.host(&[addr(n)])),
            sink: Box::new(sink.clone()),
            reach: Box::new(Anywhere),
            seed: u64::from(n) * 77,
            deferral: Duration::from_secs(60),
        };
        let (speaker, task) = Speaker::start(environment, settings);
        Self {
            n,
            speaker,
            task,
            sink,
        }
    }

    async fn status(&self) -> BgpStatus {
        match self.speaker.ask(BgpRequest::Status).await.unwrap() {
            BgpResponse::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    async fn wait(&self, what: &str, condition: impl Fn(&BgpStatus, &Contents) -> bool) {
        for _ in 0..6000 {
            let (status, contents) = (self.status().await, self.sink.contents());
            if condition(&status, &contents) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!(
            "speaker {}: {what}; seen {:?} {:?}",
            self.n,
            self.status().await,
            self.sink.contents()
        );
    }

    async fn has(&self, text: &str) {
        let wanted = prefix(text);
        self.wait(&format!("waiting for {text}"), |_, c| {
            c.paths.contains_key(&wanted)
        })
        .await;
    }

    /// Stops as a crash does: nothing is said to anybody.
    async fn crash(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

fn established(status: &BgpStatus, count: usize) -> bool {
    status
        .peers
        .iter()
        .filter(|p| p.state == SessionState::Established)
        .count()
        == count
}

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
