//! Server and client state machines on virtual time, with random cuts of the byte stream, lost connections and
//! restarted servers. The client's view is checked update by update against the history of the datastore.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind, Revision};
use proptest::prelude::*;
use typha::cache::{Cache, Limits};
use typha::client::{self, Held, Identity, Output};
use typha::server::{self, CloseReason, Patience};
use typha::wire::{Body, Goodbye, MAX_FROM_CLIENT, Pong, frame};

fn set_key(number: u16) -> Key {
    Key::namespaced(Kind::NetworkSet, "ns", format!("set{number}"))
}

fn set(number: u16, version: u64) -> Arc<AnyResource> {
    let json = serde_json::json!({
        "apiVersion": "projectcalico.org/v3", "kind": "NetworkSet",
        "metadata": {"name": format!("set{number}"), "namespace": "ns", "labels": {"version": version.to_string()}},
        "spec": {"nets": ["10.0.0.0/8"]},
    });
    Arc::new(AnyResource::from_json(json).unwrap())
}

/// What happened to each key, in order: the version put, or `None` for a deletion.
#[derive(Default)]
struct Datastore {
    history: HashMap<Key, Vec<Option<u64>>>,
    versions: u64,
}

impl Datastore {
    fn put(&mut self, number: u16) -> Update {
        self.versions += 1;
        self.history
            .entry(set_key(number))
            .or_default()
            .push(Some(self.versions));
        update(number, self.versions)
    }

    fn delete(&mut self, number: u16) -> Option<Update> {
        let history = self.history.get_mut(&set_key(number))?;
        history.last().copied().flatten()?;
        history.push(None);
        Some(Update {
            key: set_key(number),
            value: None,
            revision: Revision::from("gone"),
        })
    }

    fn content(&self) -> BTreeMap<Key, u64> {
        self.history
            .iter()
            .filter_map(|(key, h)| Some((key.clone(), h.last().copied().flatten()?)))
            .collect()
    }

    fn snapshot(&self) -> Vec<Update> {
        let number = |key: &Key| key.name.trim_start_matches("set").parse().unwrap();
        self.content()
            .iter()
            .map(|(key, version)| update(number(key), *version))
            .collect()
    }
}

fn update(number: u16, version: u64) -> Update {
    Update {
        key: set_key(number),
        value: Some(set(number, version)),
        revision: Revision::from(version.to_string()),
    }
}

/// The consumer of a client, which checks each update when it arrives.
#[derive(Default)]
struct Consumer {
    /// Position in the key's history of what was last told.
    told: HashMap<Key, usize>,
    content: BTreeMap<Key, u64>,
    status: Option<SyncStatus>,
    updates: usize,
}

impl Consumer {
    fn on_event(&mut self, event: SyncEvent, datastore: &Datastore) {
        let updates = match event {
            SyncEvent::Status(status) => return self.status = Some(status),
            SyncEvent::Complete(number) => panic!("{number} answered though nothing was asked"),
            SyncEvent::Updates(updates) => updates,
        };
        for update in updates {
            self.updates += 1;
            let key = update.key;
            let history = &datastore.history[&key];
            let former = self.told.get(&key).map_or(0, |at| at + 1);
            let version = update
                .value
                .map(|value| value.metadata().labels["version"].parse::<u64>().unwrap());
            let at = history[former..].iter().position(|v| *v == version);
            let at = former
                + at.unwrap_or_else(|| {
                    panic!("{key} told {version:?} after {former} of {history:?}")
                });
            self.told.insert(key.clone(), at);
            match version {
                Some(version) => assert_ne!(
                    self.content.insert(key, version),
                    Some(version),
                    "told twice"
                ),
                None => assert!(
                    self.content.remove(&key).is_some(),
                    "{key} deleted though never told"
                ),
            }
        }
    }
}

struct Link {
    server: server::Conn,
    client: client::Conn,
    to_client: VecDeque<u8>,
    to_server: VecDeque<u8>,
}

struct Net {
    now: Instant,
    datastore: Datastore,
    /// Updates that the cache has not received yet.
    pending: VecDeque<Update>,
    cache: Cache,
    limits: Limits,
    held: Held,
    consumer: Consumer,
    link: Option<Link>,
    sent_to_client: usize,
}

impl Net {
    fn new(limits: Limits) -> Self {
        let mut cache = Cache::new(limits);
        cache.set_in_sync();
        Self {
            now: Instant::now(),
            datastore: Datastore::default(),
            pending: VecDeque::new(),
            cache,
            limits,
            held: Held::default(),
            consumer: Consumer::default(),
            link: None,
            sent_to_client: 0,
        }
    }

    fn with_objects(count: u16) -> Self {
        let mut net = Self::new(Limits::default());
        for number in 0..count {
            net.put(number);
        }
        net
    }

    fn put(&mut self, number: u16) {
        let update = self.datastore.put(number);
        self.pending.push_back(update);
    }

    fn delete(&mut self, number: u16) {
        self.pending.extend(self.datastore.delete(number));
    }

    fn feed(&mut self, count: usize) {
        let count = count.min(self.pending.len());
        assert!(
            self.cache
                .apply(self.pending.drain(..count).collect())
                .is_empty()
        );
    }

    fn connect(&mut self) {
        let identity = Identity {
            hostname: "n1".into(),
            info: "test".into(),
            kinds: vec![Kind::NetworkSet, Kind::IPPool],
            node: None,
        };
        self.link = Some(Link {
            server: server::Conn::new(self.now, Patience::default()),
            client: client::Conn::new(self.now, &identity, &self.held),
            to_client: VecDeque::new(),
            to_server: VecDeque::new(),
        });
    }

    /// A new server with an empty cache, whose datastore stream begins with what exists.
    fn restart_server(&mut self) {
        self.link = None;
        self.cache = Cache::new(self.limits);
        self.pending = self.datastore.snapshot().into();
    }

    /// Moves up to so many bytes each way; false when there was nothing to move.
    fn deliver(&mut self, bytes: usize) -> bool {
        let Some(link) = &mut self.link else {
            return false;
        };
        let mut moved = false;
        if link.to_client.is_empty()
            && let Some(frame) = link.server.poll_transmit(&mut self.cache)
        {
            link.to_client.extend(frame);
        }
        let chunk: Vec<u8> = link
            .to_client
            .drain(..bytes.min(link.to_client.len()))
            .collect();
        if !chunk.is_empty() {
            moved = true;
            self.sent_to_client += chunk.len();
            link.server.on_written(self.now);
            link.client.on_bytes(self.now, &chunk);
        }
        while let Some(output) = link.client.poll_output(&mut self.held).unwrap() {
            match output {
                Output::Send(frame) => link.to_server.extend(frame),
                Output::Event(event) => self.consumer.on_event(event, &self.datastore),
                Output::Undecodable { object, reason } => panic!("{object}: {reason}"),
            }
        }
        let chunk: Vec<u8> = link
            .to_server
            .drain(..bytes.min(link.to_server.len()))
            .collect();
        if !chunk.is_empty() {
            moved = true;
            link.server.on_bytes(self.now, &chunk);
        }
        assert_eq!(link.server.closing(), None);
        moved
    }

    /// Lets everything arrive.
    fn settle(&mut self) {
        self.feed(usize::MAX);
        self.cache.set_in_sync();
        if self.link.is_none() {
            self.connect();
        }
        while self.deliver(1 << 20) {}
        assert_eq!(self.consumer.status, Some(SyncStatus::InSync));
        assert_eq!(self.consumer.content, self.datastore.content());
    }
}

#[derive(Debug, Clone)]
enum Step {
    Put(u16),
    Delete(u16),
    Feed(usize),
    Deliver(usize),
    Disconnect,
    Connect,
    RestartServer,
    ServerInSync,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..60u16).prop_map(Step::Put),
        4 => (0..60u16).prop_map(Step::Delete),
        4 => (1..20usize).prop_map(Step::Feed),
        8 => (1..3000usize).prop_map(Step::Deliver),
        1 => Just(Step::Disconnect),
        2 => Just(Step::Connect),
        1 => Just(Step::RestartServer),
        2 => Just(Step::ServerInSync),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is cut, lost or restarted: the client ends equal to the datastore; no key goes back in time; nothing is reported
    /// deleted that was not deleted since the client last heard of it. Tiny limits reach every way of catching up.
    #[test]
    fn client_follows_the_datastore_through_any_failure(
        steps in proptest::collection::vec(step(), 1..200),
        backlog_bytes in prop_oneof![Just(0usize), Just(2000), Just(1 << 20)],
        tombstones in prop_oneof![Just(0usize), Just(3), Just(1000)],
    ) {
        let mut net = Net::new(Limits { backlog_bytes, tombstones });
        for step in steps {
            match step {
                Step::Put(number) => net.put(number),
                Step::Delete(number) => net.delete(number),
                Step::Feed(count) => net.feed(count),
                Step::Deliver(bytes) => drop(net.deliver(bytes)),
                Step::Disconnect => net.link = None,
                Step::Connect => net.connect(),
                Step::RestartServer => net.restart_server(),
                // A datastore stream is in sync once its snapshot has been taken in.
                Step::ServerInSync => {
                    net.feed(usize::MAX);
                    net.cache.set_in_sync();
                }
            }
        }
        net.settle();
    }
}

#[test]
fn resume_at_a_restarted_server_sends_only_what_changed() {
    let mut net = Net::with_objects(10_000);
    net.settle();
    let (full, told) = (net.sent_to_client, net.consumer.updates);
    net.link = None;
    for number in 0..10 {
        net.put(number);
    }
    net.delete(5000);
    net.restart_server();
    net.settle();
    let resumed = net.sent_to_client - full;
    assert_eq!(
        net.consumer.updates - told,
        11,
        "ten changes and one deletion"
    );
    assert!(resumed * 5 < full, "{resumed} of {full} bytes");
}

#[test]
fn resume_with_nothing_missed_sends_no_object() {
    let mut net = Net::with_objects(5000);
    net.settle();
    let full = net.sent_to_client;
    net.restart_server();
    net.settle();
    assert!(
        net.sent_to_client - full < 200,
        "{} bytes",
        net.sent_to_client - full
    );
}

#[test]
fn all_clients_share_the_bytes_of_page_and_delta() {
    let mut net = Net::with_objects(2000);
    net.feed(usize::MAX);
    let kinds = [Kind::NetworkSet].into_iter().collect();
    let first = net.cache.page(kinds, 0, 1).unwrap();
    assert_eq!(
        net.cache.page(kinds, 0, 1).unwrap().as_ptr(),
        first.as_ptr()
    );
    let cursor = net.cache.head();
    net.put(1);
    net.feed(1);
    let next = |cache: &mut Cache| match cache.next(kinds, cursor) {
        typha::cache::Next::Frame {
            frame: Some(frame), ..
        } => frame.as_ptr(),
        other => panic!("{other:?}"),
    };
    assert_eq!(next(&mut net.cache), next(&mut net.cache));
    assert_ne!(
        net.cache.page(kinds, 0, 1).unwrap().as_ptr(),
        first.as_ptr(),
        "a changed page is built anew"
    );
}

#[test]
fn slow_client_gets_the_newest_version_once_and_grows_nothing() {
    let limits = Limits {
        backlog_bytes: 64 * 1024,
        tombstones: 100,
    };
    let mut net = Net::new(limits);
    for number in 0..50 {
        net.put(number);
    }
    net.settle();
    let told = net.consumer.updates;
    // One byte arrives between changes.
    for round in 0..200u16 {
        for number in 0..50 {
            net.put(number);
        }
        net.feed(usize::MAX);
        net.deliver(1);
        assert!(
            net.cache.backlog_bytes() <= limits.backlog_bytes,
            "round {round}"
        );
    }
    net.settle();
    let told = net.consumer.updates - told;
    assert!(
        told <= 150,
        "50 keys changed 200 times each; told {told} times"
    );
}

#[test]
fn nothing_is_sent_before_the_server_is_in_sync() {
    let mut net = Net::with_objects(100);
    net.settle();
    net.restart_server();
    net.feed(10);
    net.connect();
    for _ in 0..20 {
        net.deliver(1 << 20);
    }
    assert_eq!(
        net.consumer.content.len(),
        100,
        "nothing is taken for deleted"
    );
    net.settle();
}

/// A server connection alone, past its handshake deadline or fed with bad bytes.
fn closed_after(feed: impl FnOnce(&mut server::Conn, Instant)) -> (Option<CloseReason>, Vec<u8>) {
    let now = Instant::now();
    let mut conn = server::Conn::new(now, Patience::default());
    feed(&mut conn, now);
    let mut farewell = Vec::new();
    let mut cache = Cache::new(Limits::default());
    while let Some(frame) = conn.poll_transmit(&mut cache) {
        farewell.extend(frame);
    }
    (conn.closing().cloned(), farewell)
}

#[test]
fn silent_and_trickling_clients_are_closed_at_the_handshake_deadline() {
    for trickle in [false, true] {
        let (reason, _) = closed_after(|conn, now| {
            for second in 1..=10 {
                let now = now + Duration::from_secs(second);
                if trickle {
                    // A frame of 100 bytes, one byte a second.
                    conn.on_bytes(now, &[if second == 4 { 100 } else { 0 }]);
                }
                conn.on_timeout(now);
            }
        });
        assert!(
            matches!(reason, Some(CloseReason::Handshake(_))),
            "trickle {trickle}: {reason:?}"
        );
    }
}

#[test]
fn garbage_oversized_and_misplaced_frames_close_with_a_reason_that_the_client_is_told() {
    let oversized = u32::try_from(MAX_FROM_CLIENT + 1).unwrap().to_be_bytes();
    let cases: [(&str, &[u8]); 4] = [
        ("exceeds the limit", &oversized),
        ("exceeds the limit", b"GET / HTTP/1.1\r\n\r\n"),
        ("not a message", &[0, 0, 0, 3, 0, 0xff, 0xff]),
        ("unexpected Pong", &frame(Body::Pong(Pong { id: 1 }), false)),
    ];
    for (expected, bytes) in cases {
        let (reason, farewell) = closed_after(|conn, now| conn.on_bytes(now, bytes));
        let reason = reason.map(|r| r.to_string()).unwrap_or_default();
        assert!(reason.contains(expected), "{reason:?} for {expected:?}");
        assert_eq!(
            farewell,
            frame(
                Body::Goodbye(Goodbye {
                    reason,
                    elsewhere: false
                }),
                false
            )
        );
    }
}

#[test]
fn client_that_takes_nothing_is_dropped_and_one_that_makes_progress_is_not() {
    let start = Instant::now();
    let mut net = Net::with_objects(10);
    net.now = start;
    net.settle();
    let link = net.link.as_mut().unwrap();
    for second in 1..300 {
        let now = start + Duration::from_secs(second);
        link.server.on_written(now);
        link.server.on_timeout(now);
        assert_eq!(link.server.closing(), None);
    }
    for second in 300..370 {
        link.server.on_timeout(start + Duration::from_secs(second));
    }
    assert!(
        matches!(link.server.closing(), Some(CloseReason::NoProgress(_))),
        "{:?}",
        link.server.closing()
    );
}

#[test]
fn client_gives_up_a_silent_server() {
    let mut net = Net::with_objects(1);
    net.settle();
    let link = net.link.as_mut().unwrap();
    let deadline = link.client.poll_timeout();
    assert!(
        link.client
            .on_timeout(deadline - Duration::from_millis(1))
            .is_ok()
    );
    assert!(link.client.on_timeout(deadline).is_err());
}
