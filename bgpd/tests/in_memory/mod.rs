//! Speakers in one process on virtual time, and a peer whose every octet the test chooses.
#![allow(dead_code, clippy::unwrap_used)]

pub(crate) mod raw;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bgpd::policy::{LocalKind, Policy};
use bgpd::reach::Anywhere;
use bgpd::rib::LocalRoute;
use bgpd::sink::memory::{Contents, Memory};
use bgpd::speaker::settings::{Exchange, HostRules, Neighbour, SessionSettings, Settings};
use bgpd::speaker::{Environment, Speaker};
use bgpd::transport::memory::Network;
use bgpd::wire::{Attributes, FamilySet, Prefix};
use cali_control::status::{BgpRequest, BgpResponse, BgpStatus, PeerKind, SessionState};
use tokio::task::JoinHandle;

pub(crate) fn addr(n: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, n))
}

pub(crate) fn id(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, n)
}

pub(crate) fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

pub(crate) fn accept() -> Arc<Policy> {
    Arc::new(Policy::accept_all())
}

/// A speaker's settings: its number, its AS, its neighbours as (number, AS), what it originates.
pub(crate) fn settings(n: u8, asn: u32, neighbours: &[(u8, u32)], routes: &[&str]) -> Settings {
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
        ranges: Vec::new(),
        originated: routes.iter().map(route).collect(),
        host: HostRules::default(),
    }
}

pub(crate) struct Running {
    pub(crate) n: u8,
    pub(crate) speaker: Speaker,
    pub(crate) task: JoinHandle<()>,
    pub(crate) sink: Memory,
}

impl Running {
    pub(crate) fn start(network: &Network, n: u8, settings: Settings) -> Self {
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

    pub(crate) async fn status(&self) -> BgpStatus {
        match self.speaker.ask(BgpRequest::Status).await.unwrap() {
            BgpResponse::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn wait(&self, what: &str, condition: impl Fn(&BgpStatus, &Contents) -> bool) {
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

    pub(crate) async fn has(&self, text: &str) {
        let wanted = prefix(text);
        self.wait(&format!("waiting for {text}"), |_, c| {
            c.paths.contains_key(&wanted)
        })
        .await;
    }

    /// Stops as a crash does: nothing is said to anybody.
    pub(crate) async fn crash(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

pub(crate) fn established(status: &BgpStatus, count: usize) -> bool {
    status
        .peers
        .iter()
        .filter(|p| p.state == SessionState::Established)
        .count()
        == count
}
