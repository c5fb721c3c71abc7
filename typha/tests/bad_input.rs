//! What either side may be sent: every message comes through as it was, and bytes that are none end that connection alone, with a reason
//! and within the bounds of memory.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

mod running;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cali_api::Kind;
use cali_api::update::SyncEvent;
use proptest::prelude::*;
use running::{PATIENCE, View, connect_to, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use typha::cache::{Cache, Limits};
use typha::client::{self, Held, Identity, Output};
use typha::server::{self, Patience};
use typha::wire::{
    self, Body, ClientHello, Decoder, Goodbye, Interest, MAX_FROM_CLIENT, MAX_FROM_SERVER, Object,
    PROTOCOL, Ping, Pong, ResumeToken, SCOPE, Scope, ScopeChange, ScopeDone, ScopeStart,
    ServerHello, SyncDone, SyncStart, Updates, frame,
};

/// What is read from a socket in one go, at most.
const READ: usize = 64 * 1024;

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9./-]{0,20}"
}

fn object() -> impl Strategy<Value = Object> {
    let json = prop::option::of(prop::collection::vec(any::<u8>(), 0..600));
    (text(), text(), text(), text(), json).prop_map(|(kind, namespace, name, revision, json)| {
        Object {
            kind,
            namespace,
            name,
            revision,
            json: json.map(Bytes::from),
        }
    })
}

fn hello() -> impl Strategy<Value = Body> {
    let token = prop::option::of((any::<u32>(), prop::collection::vec(any::<u64>(), 0..40)));
    let kind = prop_oneof![
        Just("NetworkSet".to_owned()),
        Just("WorkloadEndpoint".to_owned()),
        text()
    ];
    let kinds = prop::collection::vec(kind, 0..5);
    let version = prop_oneof![Just(SCOPE), any::<u32>()];
    let scope = prop::option::of((version, text()));
    (
        prop_oneof![Just(PROTOCOL), any::<u32>()],
        text(),
        kinds,
        scope,
        token,
    )
        .prop_map(|(protocol, hostname, kinds, scope, token)| {
            let scope = scope.map(|(version, node)| Scope { version, node });
            Body::ClientHello(ClientHello {
                protocol,
                hostname,
                info: String::new(),
                interest: Some(Interest { kinds, scope }),
                resume: token.map(|(digest_version, digests)| ResumeToken {
                    digest_version,
                    digests,
                }),
            })
        })
}

fn server_hello() -> impl Strategy<Value = Body> {
    (
        prop_oneof![Just(PROTOCOL), any::<u32>()],
        any::<u32>(),
        0..3u32,
    )
        .prop_map(|(protocol, ping, scope)| {
            Body::ServerHello(ServerHello {
                protocol,
                info: "test".into(),
                unknown_kinds: Vec::new(),
                ping_interval_secs: ping,
                scope,
            })
        })
}

fn scope_change() -> impl Strategy<Value = Body> {
    let selectors = || {
        let selector = prop_oneof![
            Just("all()".to_owned()),
            Just("has(a)".to_owned()),
            Just("a in {'b'".to_owned()),
            text()
        ];
        prop::collection::vec(selector, 0..4)
    };
    (any::<u64>(), selectors(), selectors(), any::<bool>()).prop_map(|(id, add, remove, more)| {
        Body::ScopeChange(ScopeChange {
            id,
            add,
            remove,
            more,
        })
    })
}

fn body() -> impl Strategy<Value = Body> {
    let buckets = prop_oneof![Just(16u32), any::<u32>()];
    let start = (
        buckets,
        prop::collection::vec(any::<u32>(), 0..9),
        any::<bool>(),
    )
        .prop_map(|(buckets, stale, full)| {
            Body::SyncStart(SyncStart {
                buckets,
                stale,
                full,
            })
        });
    let updates = prop::collection::vec(object(), 0..8)
        .prop_map(|objects| Body::Updates(Updates { objects }));
    let goodbye = (text(), any::<bool>())
        .prop_map(|(reason, elsewhere)| Body::Goodbye(Goodbye { reason, elsewhere }));
    prop_oneof![
        3 => hello(),
        3 => server_hello(),
        3 => start,
        4 => updates,
        2 => any::<u64>().prop_map(|scope| Body::SyncDone(SyncDone { scope })),
        2 => scope_change(),
        1 => Just(Body::ScopeStart(ScopeStart {})),
        1 => any::<u64>().prop_map(|id| Body::ScopeDone(ScopeDone { id })),
        1 => any::<u64>().prop_map(|id| Body::Ping(Ping { id })),
        1 => any::<u64>().prop_map(|id| Body::Pong(Pong { id })),
        1 => goodbye,
    ]
}

/// How a stream is damaged.
#[derive(Debug, Clone)]
enum Damage {
    Nothing,
    Truncate(prop::sample::Index),
    Flip(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        Just(Damage::Nothing),
        at().prop_map(Damage::Truncate),
        (at(), 1u8..).prop_map(|(at, with)| Damage::Flip(at, with)),
        (at(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, b)| Damage::Insert(at, b)),
        (at(), 1usize..9).prop_map(|(at, n)| Damage::Remove(at, n)),
    ]
}

/// Frames one after the other, compressed where the reader allows it, and damaged.
fn stream(bodies: &[Body], compress: bool, damage: &Damage) -> Vec<u8> {
    let mut bytes: Vec<u8> = bodies
        .iter()
        .flat_map(|body| frame(body.clone(), compress))
        .collect();
    let length = bytes.len();
    match damage {
        _ if length == 0 => {}
        Damage::Nothing => {}
        Damage::Truncate(at) => bytes.truncate(at.index(length)),
        Damage::Flip(at, with) => bytes[at.index(length)] ^= with,
        Damage::Insert(at, more) => {
            let at = at.index(length);
            bytes.splice(at..at, more.iter().copied());
        }
        Damage::Remove(at, n) => {
            let at = at.index(length);
            bytes.drain(at..(at + n).min(length));
        }
    }
    bytes
}

fn identity() -> Identity {
    Identity {
        hostname: "node1".into(),
        info: "test".into(),
        kinds: vec![Kind::NetworkSet, Kind::GlobalNetworkSet],
        node: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_message_comes_through_at_any_split(
        bodies in prop::collection::vec(body(), 1..6), compress in any::<bool>(), step in 1usize..5000,
    ) {
        let mut decoder = Decoder::from_servers();
        let mut got = Vec::new();
        for piece in stream(&bodies, compress, &Damage::Nothing).chunks(step) {
            decoder.push(piece);
            while let Some(body) = decoder.next_message().unwrap() {
                got.push(body);
            }
        }
        prop_assert_eq!(got, bodies);
        prop_assert_eq!(decoder.buffered(), 0);
    }

    #[test]
    fn no_stream_makes_a_decoder_hold_more_than_one_frame(
        bytes in prop::collection::vec(any::<u8>(), 0..64), length in any::<u32>(),
    ) {
        for (mut decoder, limit) in [
            (Decoder::from_clients(), MAX_FROM_CLIENT),
            (Decoder::from_servers(), MAX_FROM_SERVER),
        ] {
            decoder.push(&length.to_be_bytes());
            decoder.push(&bytes);
            let piece = vec![0; READ];
            while let Ok(None) = decoder.next_message() {
                prop_assert!(decoder.buffered() < limit + 4);
                decoder.push(&piece);
            }
            prop_assert!(decoder.buffered() <= limit + 4 + READ);
        }
    }

    #[test]
    fn server_lives_through_any_stream_and_closes_what_is_no_conversation(
        bodies in prop::collection::vec(body(), 0..6), damage in damage(), step in 1usize..300,
    ) {
        let now = Instant::now();
        let mut cache = Cache::new(Limits::default());
        cache.set_in_sync();
        let mut conn = server::Conn::new(now, Patience::default());
        for piece in stream(&bodies, false, &damage).chunks(step) {
            conn.on_bytes(now, piece);
            let mut frames = 0;
            while conn.poll_transmit(&mut cache).is_some() {
                frames += 1;
                prop_assert!(frames < 100, "an empty cache has nothing more to say");
            }
        }
        let fitting = matches!(damage, Damage::Nothing)
            && bodies.iter().enumerate().all(|(at, body)| match body {
                Body::ClientHello(_) => at == 0,
                Body::Pong(_) => at > 0,
                _ => false,
            });
        if !fitting && matches!(damage, Damage::Nothing) {
            prop_assert!(conn.closing().is_some(), "goes on after {:?}", bodies);
        }
        if let Some(reason) = conn.closing() {
            prop_assert!(!reason.to_string().is_empty());
        }
    }

    #[test]
    fn client_lives_through_any_stream_and_never_deletes_what_no_complete_snapshot_misses(
        bodies in prop::collection::vec(body(), 0..8), damage in damage(), step in 1usize..300,
    ) {
        let now = Instant::now();
        let mut held = Held::default();
        let mut conn = client::Conn::new(now, &identity(), &held);
        let mut known = BTreeMap::new();
        let mut failed = None;
        for piece in stream(&bodies, true, &damage).chunks(step) {
            conn.on_bytes(now, piece);
            let output = loop {
                match conn.poll_output(&mut held) {
                    Ok(Some(Output::Event(SyncEvent::Updates(updates)))) => for update in updates {
                        match update.value {
                            Some(_) => drop(known.insert(update.key, ())),
                            None => prop_assert!(known.remove(&update.key).is_some()),
                        }
                    },
                    // A write may fail: what is held is what was told by then.
                    Ok(Some(Output::Send(_))) => prop_assert_eq!(known.len(), held.len()),
                    Ok(Some(_)) => {}
                    end => break end,
                }
            };
            failed = output.err();
            if failed.is_some() { break }
        }
        prop_assert_eq!(known.len(), held.len());
        if let Some(reason) = failed {
            prop_assert!(!reason.to_string().is_empty());
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn deltas_are_cut_so_that_every_client_takes_them(sizes in prop::collection::vec(1usize..300_000, 1..12)) {
        let mut cache = Cache::new(Limits { backlog_bytes: usize::MAX, tombstones: 10 });
        cache.set_in_sync();
        let updates = sizes.iter().enumerate().map(|(n, size)| running::update_of_size(n, *size));
        cache.apply(updates.collect());
        let kinds = [Kind::GlobalNetworkSet].into_iter().collect();
        let mut cursor = 0;
        let mut seen = 0;
        let mut decoder = Decoder::from_servers();
        while let typha::cache::Next::Frame { frame, cursor: after } = cache.next(kinds, cursor) {
            cursor = after;
            decoder.push(&frame.unwrap());
            let Some(Body::Updates(updates)) = decoder.next_message().unwrap() else { panic!("no updates") };
            let raw: usize = updates.objects.iter().filter_map(|o| o.json.as_ref()).map(Bytes::len).sum();
            prop_assert!(raw < typha::cache::CHUNK + 310_000, "{raw} bytes in one frame");
            seen += updates.objects.len();
        }
        prop_assert_eq!(seen, sizes.len());
    }
}

/// One frame with so many objects of so many bytes each, all in all a few hundred on the wire.
fn bomb(objects: usize, size: usize) -> Bytes {
    let names = 0..objects;
    let objects = names.map(|number| {
        let update = running::update_of_size(number, size);
        Object {
            kind: "GlobalNetworkSet".into(),
            namespace: String::new(),
            name: update.key.name.to_string(),
            revision: "1".into(),
            json: Some(serde_json::to_vec(&*update.value.unwrap()).unwrap().into()),
        }
    });
    frame(
        Body::Updates(Updates {
            objects: objects.collect(),
        }),
        true,
    )
}

#[test]
fn frames_that_unpack_to_large_ones_are_unpacked_one_at_a_time() {
    let now = Instant::now();
    let mut held = Held::default();
    let mut conn = client::Conn::new(now, &identity(), &held);
    let greeting = Body::ServerHello(ServerHello {
        protocol: PROTOCOL,
        ..ServerHello::default()
    });
    let bomb = bomb(3, 2_000_000);
    let mut octets = frame(greeting, false).to_vec();
    for _ in 0..30 {
        octets.extend_from_slice(&bomb);
    }
    // 180 MB in what is read at once.
    assert!(octets.len() < READ, "{} bytes", octets.len());
    assert!(matches!(
        conn.poll_output(&mut held),
        Ok(Some(Output::Send(_)))
    ));
    conn.on_bytes(now, &octets);
    assert!(
        held.is_empty(),
        "nothing is unpacked before it is asked for"
    );
    let Ok(Some(Output::Event(SyncEvent::Updates(updates)))) = conn.poll_output(&mut held) else {
        panic!("no updates");
    };
    assert_eq!((updates.len(), held.len()), (3, 3));
}

#[test]
fn an_object_that_no_client_would_take_is_not_sent_and_holds_nothing_up() {
    let mut cache = Cache::new(Limits::default());
    cache.set_in_sync();
    let small = |number| running::update_of_size(number, 10);
    assert!(cache.apply(vec![small(1)]).is_empty());
    let mut large = running::update_of_size(1, wire::MAX_OBJECT);
    large.revision = "2".into();
    let failed = cache.apply(vec![large, small(2)]);
    let (key, error) = &failed[..].first().unwrap();
    assert_eq!(&*key.name, "set1");
    assert!(error.to_string().contains("more than 4194304"), "{error}");
    let just = running::update_of_size(3, wire::MAX_OBJECT - 1000);
    assert!(cache.apply(vec![just]).is_empty());
    let mut held = Held::default();
    let now = Instant::now();
    let mut theirs = server::Conn::new(now, Patience::default());
    let mut ours = client::Conn::new(now, &identity(), &held);
    let mut told = Vec::new();
    while !ours.is_complete() {
        while let Some(output) = ours.poll_output(&mut held).unwrap() {
            match output {
                Output::Send(frame) => theirs.on_bytes(now, &frame),
                Output::Event(SyncEvent::Updates(updates)) => {
                    told.extend(
                        updates
                            .into_iter()
                            .map(|u| (u.key.name.to_string(), u.revision.to_string())),
                    );
                }
                _ => {}
            }
        }
        while let Some(frame) = theirs.poll_transmit(&mut cache) {
            ours.on_bytes(now, &frame);
        }
    }
    told.sort();
    let expected = ["set1", "set2", "set3"].map(|name| (name.to_owned(), "1".to_owned()));
    assert_eq!(told, expected);
}

#[tokio::test]
async fn clients_that_send_nonsense_are_told_why_and_the_others_do_not_notice() {
    let mut content: BTreeMap<u32, u32> = (0..50).map(|n| (n, 0)).collect();
    let server = serve(0, &content).await;
    let mut events = connect_to(&[server.port]);
    let mut view = View::default();
    view.until(&mut events, &content).await;
    let hello = Body::ClientHello(ClientHello {
        protocol: PROTOCOL,
        hostname: "bad".into(),
        info: String::new(),
        interest: Some(Interest {
            kinds: vec!["GlobalNetworkSet".into()],
            scope: None,
        }),
        resume: None,
    });
    let pong = || frame(Body::Pong(Pong { id: 1 }), false);
    let twice = [frame(hello.clone(), false), frame(hello.clone(), false)].concat();
    let wrong_way = [
        frame(hello.clone(), false),
        frame(Body::SyncDone(SyncDone::default()), false),
    ];
    let garbage = [
        frame(hello.clone(), false).to_vec(),
        vec![0, 0, 0, 9, 0, 255, 255, 255, 255, 1, 2, 3, 4],
    ];
    let compressed = [0, 0, 0, 5, 1, 0x28, 0xb5, 0x2f, 0xfd];
    let cases: [(&str, Vec<u8>); 7] = [
        ("exceeds the limit", vec![0xff; 100]),
        ("unexpected Pong", pong().to_vec()),
        ("unexpected ClientHello", twice),
        ("unexpected SyncDone", wrong_way.concat()),
        ("not a message", garbage.concat()),
        ("not allowed here", compressed.to_vec()),
        ("empty frame", vec![0; 4]),
    ];
    for (round, (expected, bytes)) in (1u32..).zip(cases) {
        let mut bad = TcpStream::connect(("127.0.0.1", server.port))
            .await
            .unwrap();
        bad.write_all(&bytes).await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, bad.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.contains(expected),
            "{answer:?} instead of {expected:?}"
        );
        // Half a frame, and gone.
        let mut half = TcpStream::connect(("127.0.0.1", server.port))
            .await
            .unwrap();
        half.write_all(&frame(hello.clone(), false)[..7])
            .await
            .unwrap();
        drop(half);
        server.put(7, round).await;
        content.insert(7, round);
        view.until(&mut events, &content).await;
    }
    assert_eq!(
        view.in_sync_events, 1,
        "the good client was never disconnected"
    );
}

#[tokio::test]
async fn servers_that_send_nonsense_lose_the_client_and_the_consumer_keeps_what_it_has() {
    let content: BTreeMap<u32, u32> = (0..50).map(|n| (n, 0)).collect();
    let server = serve(0, &content).await;
    // Nobody listens there yet, so that the client begins at the good one.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let mut events = connect_to(&[server.port, address.port()]);
    let hello = frame(
        Body::ServerHello(ServerHello {
            protocol: PROTOCOL,
            info: "bad".into(),
            unknown_kinds: Vec::new(),
            ping_interval_secs: 10,
            scope: 0,
        }),
        false,
    );
    let all = SyncStart {
        buckets: 1,
        stale: Vec::new(),
        full: true,
    };
    let start = frame(Body::SyncStart(all), false);
    let impossible = SyncStart {
        buckets: 77,
        stale: vec![1],
        full: false,
    };
    let answers = [
        vec![0xff; 64],
        // A snapshot of everything, which breaks off: nothing is gone.
        [
            hello.clone(),
            start.clone(),
            Bytes::from_static(&[0, 0, 0, 3, 0, 255, 255]),
        ]
        .concat(),
        [
            hello.clone(),
            frame(Body::SyncDone(SyncDone::default()), false),
        ]
        .concat(),
        [hello.clone(), frame(Body::SyncStart(impossible), false)].concat(),
        frame(Body::SyncDone(SyncDone::default()), false).to_vec(),
        hello[..6].to_vec(),
    ];
    let mut view = View::default();
    view.until(&mut events, &content).await;
    let bad = TcpListener::bind(address).await.unwrap();
    server.kill().await;
    let served = async {
        for answer in answers {
            let (mut stream, _) = bad.accept().await.unwrap();
            stream.write_all(&answer).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut rest = Vec::new();
            // The client may have reset the connection: it is through with it.
            let _ = timeout(PATIENCE, stream.read_to_end(&mut rest))
                .await
                .unwrap();
        }
    };
    timeout(Duration::from_secs(120), served).await.unwrap();
    view.take_waiting(&mut events);
    assert_eq!(view.content, content);
    assert_eq!(view.deletions, 0);
}
