//! Peers that send what no peer should: the speaker lives on, and what it does with its other peers is not touched.
#![allow(clippy::unwrap_used)]

mod in_memory;

use std::time::Duration;

use bgpd::speaker::settings::Settings;
use bgpd::transport::memory::Network;
use bgpd::wire::{Message, Prefix};
use cali_control::status::SessionState;
use in_memory::raw::{Raw, announcement, octets, open};
use in_memory::{Running, addr, established, prefix, settings};
use proptest::prelude::*;

/// The AS of the peer that misbehaves; its number is 3.
const BAD: u32 = 65003;

/// The speaker under test: number 1, with a good peer 2 and a bad one 3 that it does not dial.
fn tested() -> Settings {
    let mut settings = settings(1, 64512, &[(2, 64512), (3, BAD)], &["10.1.0.0/26"]);
    if let Some(bad) = settings.neighbours.get_mut(&addr(3)) {
        bad.session.passive = true;
    }
    settings
}

/// The speaker under test and its good peer, with their session up.
async fn with_a_good_peer(network: &Network) -> (Running, Running) {
    let tested = Running::start(network, 1, tested());
    let good = settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]);
    let good = Running::start(network, 2, good);
    tested.has("10.2.0.0/26").await;
    good.has("10.1.0.0/26").await;
    (tested, good)
}

/// The good peer's session is the first one still, and carries news.
async fn is_untouched(tested: &Running, good: &Running) {
    let peers = tested.status().await.peers;
    let peer = peers.iter().find(|p| p.address == addr(2)).unwrap();
    assert_eq!(
        (peer.state, peer.established_count),
        (SessionState::Established, 1),
        "{peer:?}"
    );
    let mut more = settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26", "10.2.1.0/26"]);
    more.neighbours = settings(2, 64512, &[(1, 64512)], &[]).neighbours;
    good.speaker.configure(more).await.unwrap();
    tested.has("10.2.1.0/26").await;
}

/// A session that is in order up to a point, and what is done to its octets.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let routes: Vec<Prefix> = (0..20)
        .map(|n| Prefix::v4(0x0a03_0000 + (n << 8), 24))
        .collect();
    let mut whole = Vec::new();
    whole.extend(octets(&Message::Open(open(3, BAD))));
    whole.extend(octets(&Message::Keepalive));
    for update in announcement(3, BAD, &routes) {
        whole.extend(update);
    }
    let damaged = proptest::collection::vec((0..whole.len(), any::<u8>()), 0..6);
    let tail = proptest::collection::vec(any::<u8>(), 0..200);
    (Just(whole), damaged, 0..200_usize, tail).prop_map(|(mut whole, damaged, cut, tail)| {
        for (at, value) in damaged {
            whole[at] = value;
        }
        whole.truncate(whole.len() - cut.min(whole.len()));
        whole.extend(tail);
        whole
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_octets_leave_the_speaker_alive_and_other_sessions_untouched(
        streams in proptest::collection::vec(stream(), 1..4),
        pieces in 1..64_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let network = Network::default();
            let (tested, good) = with_a_good_peer(&network).await;
            for stream in &streams {
                let Ok(mut raw) = Raw::dial(&network, 3, 1).await else { continue };
                for piece in stream.chunks(pieces) {
                    raw.write(piece).await;
                }
                while raw.next(Duration::from_millis(200)).await.is_some() {}
            }
            is_untouched(&tested, &good).await;
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_thousand_connections_of_one_neighbour_get_a_few_answers() {
    let network = Network::default();
    let (tested, good) = with_a_good_peer(&network).await;
    let mut answered = 0;
    for _ in 0..1000 {
        let mut raw = Raw::dial(&network, 3, 1).await.unwrap();
        if raw.next(Duration::from_millis(1)).await.is_some() {
            answered += 1;
        }
    }
    assert!(
        (1..=40).contains(&answered),
        "{answered} connections were taken"
    );
    for _ in 0..1000 {
        // Of somebody who is no neighbour.
        let mut raw = Raw::dial(&network, 77, 1).await.unwrap();
        assert!(raw.next(Duration::from_millis(1)).await.is_none());
    }
    is_untouched(&tested, &good).await;

    // The neighbour that behaves again is taken again.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut raw = Raw::dial(&network, 3, 1).await.unwrap();
    raw.establish(3, BAD).await;
}

#[tokio::test(start_paused = true)]
async fn half_a_message_ends_with_the_wait_for_the_rest() {
    let network = Network::default();
    let (tested, good) = with_a_good_peer(&network).await;
    let mut raw = Raw::dial(&network, 3, 1).await.unwrap();
    let first = raw.next(Duration::from_secs(1)).await;
    assert!(matches!(first, Some(Message::Open(_))), "{first:?}");
    raw.write(&octets(&Message::Open(open(3, BAD)))[..20]).await;
    let last = raw.next(Duration::from_secs(300)).await;
    let Some(Message::Notification(expired)) = last else {
        panic!("{last:?}");
    };
    assert_eq!(expired.code, 4, "hold timer: {expired:?}");
    let peers = tested.status().await.peers;
    let info = peers
        .iter()
        .find(|p| p.address == addr(3))
        .and_then(|p| p.info.clone());
    assert!(info.is_some_and(|i| i.contains("4/0")), "{peers:?}");
    is_untouched(&tested, &good).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stops_reading_is_given_up_and_nobody_waits_for_it() {
    let network = Network::default();
    let (tested, good) = with_a_good_peer(&network).await;
    let mut raw = Raw::dial(&network, 3, 1).await.unwrap();
    raw.establish(3, BAD).await;
    // More than fits between both, so that the writer has to wait.
    let mut many = settings(2, 64512, &[(1, 64512)], &["10.2.0.0/26"]);
    let route = many.originated.values().next().unwrap().clone();
    for n in 0..30_000_u32 {
        let prefix = Prefix::v4(0x0b00_0000 + (n << 8), 24);
        let mut one = route.clone();
        one.prefix = prefix;
        one.attributes.med = Some(n);
        many.originated.insert(prefix, one);
    }
    good.speaker.configure(many).await.unwrap();
    tested
        .wait("all routes of the good peer", |_, c| {
            c.paths.len() == 30_001
        })
        .await;
    let mut given_up = None;
    for second in (0..1000_u32).step_by(20) {
        raw.write(&octets(&Message::Keepalive)).await;
        tokio::time::sleep(Duration::from_secs(20)).await;
        let peers = tested.status().await.peers;
        let bad = peers.iter().find(|p| p.address == addr(3)).unwrap().clone();
        if bad.state != SessionState::Established {
            given_up = Some((second, bad));
            break;
        }
    }
    let (second, bad) = given_up.expect("the session is still there");
    assert!(second >= 400, "{second}: {bad:?}");
    assert!(
        bad.info
            .as_deref()
            .is_some_and(|i| i.contains("8/0") || i.contains("does not read")),
        "{bad:?}"
    );
    assert!(established(&good.status().await, 1));
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_updates_delays_nobody_else_for_long() {
    let network = Network::default();
    let (tested, good) = with_a_good_peer(&network).await;
    let mut raw = Raw::dial(&network, 3, 1).await.unwrap();
    raw.establish(3, BAD).await;
    let routes: Vec<Prefix> = (0..200)
        .map(|n| Prefix::v4(0x0a03_0000 + (n << 8), 24))
        .collect();
    let update = announcement(3, BAD, &routes).concat();
    for _ in 0..2000 {
        raw.write(&update).await;
    }
    is_untouched(&tested, &good).await;
    tested.has("10.3.0.0/24").await;
}

/// RFC 4724 §4.2: a second loss takes what was still stale from the first, and only that.
#[tokio::test(start_paused = true)]
async fn a_second_loss_before_end_of_rib_keeps_what_the_second_session_announced() {
    let network = Network::default();
    let (tested, _good) = with_a_good_peer(&network).await;
    let (old, new) = (prefix("10.3.0.0/24"), prefix("10.3.1.0/24"));
    let mut raw = Raw::dial(&network, 3, 1).await.unwrap();
    raw.establish(3, BAD).await;
    raw.write(&announcement(3, BAD, &[old, new]).concat()).await;
    tested.has("10.3.0.0/24").await;
    drop(raw);
    let stale = |s: &cali_control::status::BgpStatus| {
        s.peers
            .iter()
            .any(|p| p.address == addr(3) && p.graceful_restart)
    };
    tested.wait("stale", |s, _| stale(s)).await;
    let mut raw = Raw::dial(&network, 3, 1).await.unwrap();
    raw.establish(3, BAD).await;
    raw.write(&announcement(3, BAD, &[new]).concat()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(raw);
    tested
        .wait("the first session's route gone", |_, c| {
            !c.paths.contains_key(&old)
        })
        .await;
    let contents = tested.sink.contents();
    assert_eq!(contents.removed, [old]);
    assert!(contents.paths.contains_key(&new));
}
