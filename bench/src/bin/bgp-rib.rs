//! Speed and size of the BGP routing table alone, in one thread: decode, import, selection, export, encoding. No sockets.
//!
//! `bgp-rib SHAPE [peers] [prefixes per peer] [prefixes per attribute set]`, where the shape is `unique` (every peer its own
//! prefixes) or `overlap` (all peers the same ones); one monitor reads everything. One shape per process, so that the
//! growth of resident memory is the table's.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bgpd::policy::Policy;
use bgpd::rib::{NextHopMode, PeerConfig, PeerId, Rib, RibConfig, RibInput};
use bgpd::wire::{
    AsPath, Attributes, Codec, Family, FamilySet, Framer, Message, NextHop, Nlri, Packer, PeerKind,
    Prefix,
};
use bytes::{Bytes, BytesMut};

const BATCH: usize = 64;

fn codec(peer: PeerKind) -> Codec {
    Codec {
        four_octet_as: true,
        families: FamilySet::IPV4,
        ..Codec::basic(peer)
    }
}

fn settings(kind: PeerKind, number: u32) -> PeerConfig {
    let addr = Ipv4Addr::from(0x0a4d_0100 + number);
    PeerConfig {
        codec: codec(kind),
        local_as: 65000,
        remote_as: if kind == PeerKind::Ibgp {
            65000
        } else {
            64000 + number
        },
        remote_id: addr,
        remote_addr: IpAddr::V4(addr),
        scope: 0,
        local_v4: Some(Ipv4Addr::new(10, 77, 0, 1)),
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

/// The messages of one sender.
fn stream(peer: u32, first: u32, count: u32, per_set: u32) -> Vec<Bytes> {
    let packer = Packer::new(codec(PeerKind::Ibgp));
    let next_hop = NextHop::V4(Ipv4Addr::from(0x0a4d_0100 + peer));
    let mut out = Vec::new();
    for start in (0..count).step_by(per_set as usize) {
        let attributes = Attributes {
            as_path: AsPath::from_sequence(&[64700, 1 + start / per_set, 1 + peer]),
            local_pref: Some(100),
            ..Attributes::default()
        };
        let routes: Vec<Nlri> = (start..(start + per_set).min(count))
            .map(|n| Nlri::new(Prefix::v4(0x1000_0000 + ((first + n) << 8), 24)))
            .collect();
        packer.announce(
            Family::IPV4_UNICAST,
            &attributes,
            &next_hop,
            &routes,
            &mut out,
        );
    }
    out
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|n| n.parse::<usize>().ok());
    pages.unwrap_or_default() * 4096
}

struct Outcome {
    time: Duration,
    octets: usize,
    messages: usize,
    routes_out: usize,
}

fn run(streams: &[Vec<Bytes>]) -> (Rib, Outcome) {
    let mut config = RibConfig::new(65000, Ipv4Addr::new(10, 77, 0, 1));
    config.assume_reachable = true;
    let mut rib = Rib::new(config);
    let up = |rib: &mut Rib, config: PeerConfig| {
        let slot = rib.register().expect("a slot");
        let peer = PeerId { slot, epoch: 1 };
        let config = Arc::new(config);
        rib.handle(RibInput::PeerUp {
            peer,
            config,
            preserved: FamilySet::EMPTY,
        });
        peer
    };
    let peers: Vec<PeerId> = (0..streams.len())
        .map(|n| up(&mut rib, settings(PeerKind::Ibgp, n as u32)))
        .collect();
    let monitor = up(&mut rib, settings(PeerKind::Ebgp, 200));
    rib.commit();
    for peer in peers.iter().chain([&monitor]) {
        while rib.pull(*peer, 65536).more {}
    }
    let before = resident();
    let (mut time, mut messages, mut routes_out) = (Duration::ZERO, 0, 0);
    let mut next = vec![0; streams.len()];
    while next
        .iter()
        .zip(streams)
        .any(|(at, messages)| *at < messages.len())
    {
        for (n, stream) in streams.iter().enumerate() {
            let batch = &stream[next[n]..stream.len().min(next[n] + BATCH)];
            next[n] += batch.len();
            let start = Instant::now();
            let sent = feed(&mut rib, peers[n], batch, monitor);
            time += start.elapsed();
            messages += sent.len();
            routes_out += sent.iter().map(routes).sum::<usize>();
        }
    }
    let octets = resident().saturating_sub(before);
    (
        rib,
        Outcome {
            time,
            octets,
            messages,
            routes_out,
        },
    )
}

/// One batch of a sender, and everything that the monitor gets for it.
fn feed(rib: &mut Rib, peer: PeerId, batch: &[Bytes], monitor: PeerId) -> Vec<Bytes> {
    for bytes in batch {
        let frame = Framer::new().next(&mut BytesMut::from(&bytes[..]));
        let frame = frame.expect("a good header").expect("a whole message");
        let Ok(Message::Update(update)) = Message::decode(&frame, &codec(PeerKind::Ibgp)) else {
            panic!("not an UPDATE");
        };
        rib.handle(RibInput::Update { peer, update });
    }
    rib.commit();
    let mut sent = Vec::new();
    loop {
        let pull = rib.pull(monitor, 65536);
        sent.extend(pull.messages);
        if !pull.more {
            return sent;
        }
    }
}

fn routes(bytes: &Bytes) -> usize {
    let frame = Framer::new().next(&mut BytesMut::from(&bytes[..]));
    let frame = frame.expect("a good header").expect("a whole message");
    match Message::decode(&frame, &codec(PeerKind::Ebgp)) {
        Ok(Message::Update(update)) => update.announcements().map(|(_, block)| block.len()).sum(),
        _ => 0,
    }
}

fn main() {
    let number = |n: usize, default: u32| {
        std::env::args()
            .nth(n)
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let overlap = std::env::args()
        .nth(1)
        .is_some_and(|shape| shape == "overlap");
    let (peers, count, per_set) = (number(2, 10), number(3, 100_000), number(4, 100));
    let first = |peer: u32| if overlap { 0 } else { peer * count };
    let streams: Vec<_> = (0..peers)
        .map(|peer| stream(peer, first(peer), count, per_set))
        .collect();
    let (rib, outcome) = run(&streams);
    let paths = f64::from(peers) * f64::from(count);
    println!(
        "{peers} peers x {count} prefixes: {:.3} s, {:.0} paths/s, {:.1} octets per path (resident), {} prefixes, \
         {} attribute sets, {} UPDATEs with {} routes to the monitor",
        outcome.time.as_secs_f64(),
        paths / outcome.time.as_secs_f64(),
        outcome.octets as f64 / paths,
        rib.counts().prefixes[0],
        rib.counts().attribute_sets,
        outcome.messages,
        outcome.routes_out,
    );
}
