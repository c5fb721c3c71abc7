//! What is done with the octets. `tests/fuzz_seeds.rs` runs the same functions over the seeds.
//!
//! A seed is the stream of a real peer from its OPEN on (`seeds/NAME`, as it was received).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bgpd::policy::Policy;
use bgpd::reach::Anywhere;
use bgpd::sink::memory::Memory;
use bgpd::speaker::settings::{Exchange, HostRules, Neighbour, SessionSettings, Settings};
use bgpd::speaker::{Environment, Speaker};
use bgpd::transport::memory::Network;
use bgpd::transport::{Protection, Target, Transport};
use bgpd::wire::{
    AddPathMode, Capability, Codec, Family, FamilySet, Framer, Message, Negotiated, Open,
    PeerKind as Sort, RefreshKind,
};
use bytes::BytesMut;
use cali_control::status::{BgpRequest, BgpResponse, PeerKind, SessionState};

/// Our OPEN where a stream is read without a session.
fn ours() -> Open {
    Open {
        asn: 64512,
        hold_time: 90,
        router_id: Ipv4Addr::new(10, 0, 0, 1),
        capabilities: vec![
            Capability::Multiprotocol(Family::IPV4_UNICAST),
            Capability::Multiprotocol(Family::IPV6_UNICAST),
            Capability::RouteRefresh,
            Capability::EnhancedRouteRefresh,
            Capability::ExtendedMessage,
            Capability::AddPath(vec![
                (Family::IPV4_UNICAST, AddPathMode::BOTH),
                (Family::IPV6_UNICAST, AddPathMode::BOTH),
            ]),
            Capability::ExtendedNextHop(vec![(Family::IPV4_UNICAST, 2)]),
        ],
        four_octet_as: true,
    }
}

/// Reads a stream as a session would; what can be read is written and read again.
pub(crate) fn message(octets: &[u8]) {
    let mut framer = Framer::new();
    let mut codec = Codec::basic(Sort::Ibgp);
    let mut buffer = BytesMut::from(octets);
    while let Ok(Some(frame)) = framer.next(&mut buffer) {
        let Ok(message) = Message::decode(&frame, &codec) else {
            return;
        };
        look_at(&message);
        if let Message::Open(theirs) = &message {
            codec = Negotiated::between(&ours(), theirs).codec;
            framer.set_extended(codec.extended_message);
        } else if !matches!(message, Message::Update(_)) {
            // An UPDATE is written from routes, not from an UPDATE; see `wire_roundtrip`.
            let written = message
                .encode(&codec)
                .expect("what was read can be written");
            let again = framer.next(&mut BytesMut::from(&written[..]));
            let frame = again.expect("a frame").expect("a whole frame");
            let again = Message::decode(&frame, &codec).expect("what was written can be read");
            assert_eq!(message, again);
        }
    }
}

/// Walks through everything that is read lazily.
fn look_at(message: &Message) {
    match message {
        Message::Update(update) => {
            let _ = (update.treatment(), update.as_end_of_rib());
            let withdrawn = update.withdrawals().count();
            let announced: usize = update
                .announcements()
                .map(|(next_hop, block)| {
                    let _ = next_hop.gateway();
                    block.iter().count()
                })
                .sum();
            // No more routes than octets: nothing is made up.
            assert!(withdrawn + announced <= 65_535);
            assert!(update.attributes.as_path.asns().count() <= 65_535);
        }
        Message::Notification(notification) => {
            let _ = (notification.to_string(), notification.shutdown_text());
        }
        Message::RouteRefresh(refresh) => {
            let _ = refresh.kind == RefreshKind::Request;
        }
        Message::Open(_) | Message::Keepalive => {}
    }
}

const fn address(n: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, n))
}

/// A speaker with neighbours of these numbers; any AS will do.
fn speaker(network: &Network, n: u8, neighbours: &[u8]) -> (Speaker, tokio::task::JoinHandle<()>) {
    let accept = Arc::new(Policy::accept_all());
    let router_id = Ipv4Addr::new(10, 0, 0, n);
    let neighbour = |peer: &u8| {
        let mut session = SessionSettings::new(64512, router_id, None);
        session.add_path = AddPathMode::BOTH;
        session.extended_next_hop = true;
        session.families = FamilySet::ALL;
        session.long_lived = Some(3600);
        session.passive = *peer == 3;
        let one = Neighbour {
            name: None,
            origin: PeerKind::Static,
            session,
            exchange: Exchange::new(Arc::clone(&accept), Arc::clone(&accept)),
        };
        (address(*peer), one)
    };
    let settings = Settings {
        router_id,
        local_as: 64512,
        cluster_id: None,
        listen: vec![SocketAddr::new(address(n), 179)],
        neighbours: neighbours.iter().map(neighbour).collect(),
        ranges: Vec::new(),
        originated: Default::default(),
        host: HostRules::default(),
    };
    let environment = Environment {
        transport: Arc::new(network.host(&[address(n)])),
        sink: Box::new(Memory::default()),
        reach: Box::new(Anywhere),
        seed: u64::from(n),
        deferral: Duration::from_secs(5),
    };
    Speaker::start(environment, settings)
}

/// Sends a stream to a speaker, which must be there afterwards and have its other session still.
pub(crate) fn session(octets: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let network = Network::default();
        let (tested, task) = speaker(&network, 1, &[2, 3]);
        let (_other, _task) = speaker(&network, 2, &[1]);
        tokio::time::sleep(Duration::from_secs(10)).await;
        let target = Target {
            remote: SocketAddr::new(address(1), 179),
            source: None,
            interface: None,
            protection: Protection::default(),
        };
        let bad = network.host(&[address(3)]).dial(&target).await;
        let mut bad = bad.expect("it listens").stream;
        let (mut read, mut write) = tokio::io::split(&mut bad);
        let speak = async {
            use tokio::io::AsyncWriteExt;
            let _ = write.write_all(octets).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
        };
        let listen = async {
            use tokio::io::AsyncReadExt;
            let mut heard = [0; 4096];
            while read.read(&mut heard).await.is_ok_and(|length| length > 0) {}
            std::future::pending::<()>().await;
        };
        tokio::select! { () = speak => {}, () = listen => {} }
        drop(bad);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!task.is_finished(), "the speaker is gone");
        let Ok(BgpResponse::Status(status)) = tested.ask(BgpRequest::Status).await else {
            panic!("the speaker does not answer");
        };
        let other = status.peers.iter().find(|peer| peer.address == address(2));
        let other = other.expect("a neighbour of the settings");
        assert_eq!(
            (other.state, other.established_count),
            (SessionState::Established, 1),
            "the other session was touched"
        );
    });
}
