//! Clients that ask for a part of the endpoints, on virtual time: whatever is asked for, taken back, lost or restarted, a client has the part
//! that it asked for, and knows when it has all of it.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use cali_api::selector::Selector;
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind, Revision, StringMap};
use proptest::prelude::*;
use serde_json::json;
use typha::cache::{Cache, Limits};
use typha::client::{self, Held, Identity, Output};
use typha::interest::{Selectors, Wanted};
use typha::server::{self, Patience};
use typha::wire::{Body, Decoder};

const NODE: &str = "node0";

/// What clients ask for: by label, by namespace, by a profile's label, everything, and what is no selector of this version.
const SELECTORS: [&str; 9] = [
    "app == 'a'",
    "app == 'b'",
    "has(role)",
    "app != 'a'",
    "projectcalico.org/namespace == 'ns1'",
    "env == 'prod'",
    "app in {'a', 'c'} && env == 'prod'",
    "all()",
    "app ~= 'later'",
];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pod {
    number: u8,
    app: u8,
    role: bool,
    node: u8,
}

fn key(number: u8) -> Key {
    Key::namespaced(
        Kind::WorkloadEndpoint,
        namespace(number),
        format!("pod{number}"),
    )
}

fn namespace(number: u8) -> String {
    format!("ns{}", number % 3)
}

/// The datastore: pods, and whether the profile of each namespace says `env: prod`.
#[derive(Default, Clone)]
struct Datastore {
    pods: BTreeMap<u8, (Pod, u64)>,
    prod: BTreeMap<u8, (bool, u64)>,
    versions: u64,
}

impl Datastore {
    fn put(&mut self, pod: Pod) -> Update {
        self.versions += 1;
        let update = pod_update(&pod, self.versions);
        self.pods.insert(pod.number, (pod, self.versions));
        update
    }

    fn delete(&mut self, number: u8) -> Option<Update> {
        self.pods.remove(&number)?;
        Some(Update {
            key: key(number),
            value: None,
            revision: Revision::from("gone"),
        })
    }

    fn set_profile(&mut self, namespace: u8, prod: bool) -> Update {
        self.versions += 1;
        self.prod.insert(namespace, (prod, self.versions));
        profile(namespace, prod, self.versions)
    }

    fn snapshot(&self) -> Vec<Update> {
        let pods = self
            .pods
            .values()
            .map(|(pod, version)| pod_update(pod, *version));
        let profiles = self
            .prod
            .iter()
            .map(|(ns, (prod, version))| profile(*ns, *prod, *version));
        pods.chain(profiles).collect()
    }

    /// What these selectors select, and what is on the node: the plain meaning, without any index.
    fn part(&self, selectors: &BTreeSet<Arc<str>>) -> BTreeMap<Key, u64> {
        let selected = |pod: &Pod| {
            let mut labels = StringMap::new();
            let mut put = |label: &str, value: String| drop(labels.insert(label.into(), value));
            put("app", app(pod.app));
            put("projectcalico.org/namespace", namespace(pod.number));
            put("projectcalico.org/orchestrator", "k8s".into());
            if pod.role {
                put("role", "x".into());
            }
            if self
                .prod
                .get(&(pod.number % 3))
                .is_some_and(|(prod, _)| *prod)
            {
                put("env", "prod".into());
            }
            let node = format!("node{}", pod.node);
            let matches = |text: &Arc<str>| match Selector::parse(text) {
                Ok(selector) => selector.matches(&labels),
                Err(_) => true,
            };
            node == NODE || selectors.iter().any(matches)
        };
        let pods = self.pods.values();
        pods.filter(|(pod, _)| selected(pod))
            .map(|(pod, version)| (key(pod.number), *version))
            .collect()
    }
}

fn app(number: u8) -> String {
    ["a", "b", "c"][usize::from(number % 3)].to_owned()
}

fn pod_update(pod: &Pod, version: u64) -> Update {
    let mut labels = json!({"app": app(pod.app), "version": version.to_string()});
    if pod.role {
        labels["role"] = "x".into();
    }
    let (namespace, number) = (namespace(pod.number), pod.number);
    let json = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
        "metadata": {"name": format!("pod{number}"), "namespace": namespace, "labels": labels},
        "spec": {"orchestrator": "k8s", "node": format!("node{}", pod.node), "pod": format!("pod{number}"), "endpoint": "eth0",
            "interfaceName": format!("cali{number}"), "ipNetworks": [format!("10.0.0.{number}/32")], "profiles": [format!("kns.{namespace}")]},
    });
    Update {
        key: key(number),
        value: Some(Arc::new(AnyResource::from_json(json).unwrap())),
        revision: Revision::from(version.to_string()),
    }
}

fn profile(namespace: u8, prod: bool, version: u64) -> Update {
    let labels = if prod {
        json!({"env": "prod"})
    } else {
        json!({})
    };
    let json = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "Profile",
        "metadata": {"name": format!("kns.ns{namespace}")}, "spec": {"labelsToApply": labels},
    });
    let value = AnyResource::from_json(json).unwrap();
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from(version.to_string()),
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
    pending: VecDeque<Update>,
    /// The datastore as far as the cache has it, and when each pod changed last in it, or moved.
    fed: Datastore,
    cache: Cache,
    limits: Limits,
    held: Held,
    link: Option<Link>,
    wanted: Wanted,
    /// Pods that changed, or may have moved, since a number was asked for.
    touched: BTreeMap<u64, BTreeSet<Key>>,
    asked: BTreeMap<u64, Selectors>,
    content: BTreeMap<Key, u64>,
    complete: u64,
    by_server: bool,
    checked: usize,
    in_sync: bool,
    objects: usize,
    deletions: usize,
}

impl Net {
    fn new(limits: Limits) -> Self {
        let mut cache = Cache::new(limits);
        cache.set_in_sync();
        Self {
            now: Instant::now(),
            datastore: Datastore::default(),
            pending: VecDeque::new(),
            fed: Datastore::default(),
            cache,
            limits,
            held: Held::default(),
            link: None,
            wanted: Wanted::default(),
            touched: BTreeMap::new(),
            asked: BTreeMap::new(),
            content: BTreeMap::new(),
            complete: 0,
            by_server: false,
            checked: 0,
            in_sync: false,
            objects: 0,
            deletions: 0,
        }
    }

    fn identity() -> Identity {
        Identity {
            hostname: "n1".into(),
            info: "test".into(),
            kinds: vec![Kind::Profile, Kind::WorkloadEndpoint],
            node: Some(NODE.into()),
        }
    }

    fn put(&mut self, pod: Pod) {
        let update = self.datastore.put(pod);
        self.pending.push_back(update);
    }

    fn feed(&mut self, count: usize) {
        let count = count.min(self.pending.len());
        let updates: Vec<Update> = self.pending.drain(..count).collect();
        for update in &updates {
            let moved: BTreeSet<Key> = match update.key.kind {
                Kind::Profile => {
                    let namespace: u8 = update
                        .key
                        .name
                        .trim_start_matches("kns.ns")
                        .parse()
                        .unwrap();
                    (0..=u8::MAX)
                        .filter(|number| number % 3 == namespace)
                        .map(key)
                        .collect()
                }
                _ => [update.key.clone()].into(),
            };
            for touched in self.touched.values_mut() {
                touched.extend(moved.iter().cloned());
            }
        }
        assert!(self.cache.apply(updates).is_empty());
        if self.pending.is_empty() {
            self.fed = self.datastore.clone();
        }
    }

    fn connect(&mut self) {
        self.hang_up();
        self.link = Some(Link {
            server: server::Conn::new(self.now, Patience::default()),
            client: client::Conn::new(self.now, &Self::identity(), &self.held),
            to_client: VecDeque::new(),
            to_server: VecDeque::new(),
        });
    }

    fn hang_up(&mut self) {
        if let Some(mut link) = self.link.take() {
            link.server.leave(&mut self.cache);
        }
    }

    fn restart_server(&mut self) {
        self.link = None;
        self.cache = Cache::new(self.limits);
        self.pending = self.datastore.snapshot().into();
    }

    fn want(&mut self, selectors: Selectors) {
        let number = self.wanted.number + 1;
        self.wanted = Wanted {
            number,
            selectors: Arc::clone(&selectors),
        };
        self.asked.insert(number, selectors);
        self.touched.insert(number, BTreeSet::new());
        self.drain();
        match &mut self.link {
            Some(link) => link.client.on_wanted(self.wanted.clone(), &mut self.held),
            None => {
                // As the client does it between connections: a connection that goes nowhere.
                let mut nowhere = client::Conn::new(self.now, &Self::identity(), &self.held);
                nowhere.on_wanted(self.wanted.clone(), &mut self.held);
                while let Some(output) = nowhere.poll_output(&mut self.held).unwrap() {
                    if let Output::Event(event) = output {
                        self.on_event(event);
                    }
                }
            }
        }
        self.drain();
    }

    fn on_event(&mut self, event: SyncEvent) {
        match event {
            SyncEvent::Status(status) => self.in_sync |= status == SyncStatus::InSync,
            SyncEvent::Complete(number) => self.on_complete(number),
            SyncEvent::Updates(updates) => {
                for update in updates {
                    if update.key.kind != Kind::WorkloadEndpoint {
                        continue;
                    }
                    match update.value {
                        Some(value) => {
                            self.objects += 1;
                            let version = value.metadata().labels["version"].parse().unwrap();
                            let former = self.content.insert(update.key.clone(), version);
                            assert!(
                                former.is_none_or(|f| f < version),
                                "{} goes back in time",
                                update.key
                            );
                        }
                        None => {
                            self.deletions += 1;
                            assert!(
                                self.content.remove(&update.key).is_some(),
                                "{} deleted though never told",
                                update.key
                            );
                        }
                    }
                }
            }
        }
    }

    /// What has not changed since it was asked for is there, where it is a server that answers. (Of what is held of all that is asked
    /// for, the client answers itself, and a server need not be there.)
    fn on_complete(&mut self, number: u64) {
        assert!(number > self.complete, "{number} after {}", self.complete);
        let first = std::mem::replace(&mut self.complete, number) + 1;
        if !self.by_server || !self.pending.is_empty() {
            return;
        }
        self.checked += 1;
        let still = |key: &Key| !self.touched[&first].contains(key);
        for (key, version) in self.fed.part(&self.asked[&number]) {
            if still(&key) {
                assert_eq!(self.content.get(&key), Some(&version), "{key} at {number}");
            }
        }
    }

    fn drain(&mut self) {
        let Some(mut link) = self.link.take() else {
            return;
        };
        while let Some(output) = link.client.poll_output(&mut self.held).unwrap() {
            match output {
                Output::Send(frame) => link.to_server.extend(frame),
                Output::Event(event) => self.on_event(event),
                Output::Undecodable { object, reason } => panic!("{object}: {reason}"),
            }
        }
        self.link = Some(link);
    }

    fn deliver(&mut self, bytes: usize) -> bool {
        let Some(link) = &mut self.link else {
            return false;
        };
        if link.to_client.is_empty()
            && let Some(frame) = link.server.poll_transmit(&mut self.cache)
        {
            link.to_client.extend(frame);
        }
        let chunk: Vec<u8> = link
            .to_client
            .drain(..bytes.min(link.to_client.len()))
            .collect();
        let mut moved = !chunk.is_empty();
        if moved {
            link.client.on_bytes(self.now, &chunk);
        }
        self.by_server = true;
        self.drain();
        self.by_server = false;
        let Some(link) = &mut self.link else {
            return false;
        };
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

    fn settle(&mut self) {
        self.feed(usize::MAX);
        self.cache.set_in_sync();
        if self.link.is_none() {
            self.connect();
            // What was asked for meanwhile is known to the client.
            self.drain();
        }
        while self.deliver(1 << 20) {}
        assert!(self.in_sync);
        assert_eq!(self.complete, self.wanted.number, "everything is answered");
        assert_eq!(self.content, self.datastore.part(&self.wanted.selectors));
    }
}

fn selectors(chosen: impl IntoIterator<Item = usize>) -> Selectors {
    Arc::new(
        chosen
            .into_iter()
            .map(|at| Arc::from(SELECTORS[at]))
            .collect(),
    )
}

#[derive(Debug, Clone)]
enum Step {
    Put(Pod),
    Delete(u8),
    Profile(u8, bool),
    Want(Vec<usize>),
    Feed(usize),
    Deliver(usize),
    Disconnect,
    Connect,
    RestartServer,
    ServerInSync,
}

fn pod() -> impl Strategy<Value = Pod> {
    (0..24u8, 0..3u8, any::<bool>(), 0..3u8).prop_map(|(number, app, role, node)| Pod {
        number,
        app,
        role,
        node,
    })
}

fn step() -> impl Strategy<Value = Step> {
    // The last two selectors are everything, which is not the common case.
    let some = proptest::collection::vec(0..SELECTORS.len() - 2, 0..4);
    let all = proptest::collection::vec(0..SELECTORS.len(), 0..4);
    prop_oneof![
        8 => pod().prop_map(Step::Put),
        4 => (0..24u8).prop_map(Step::Delete),
        2 => (0..3u8, any::<bool>()).prop_map(|(ns, prod)| Step::Profile(ns, prod)),
        3 => some.prop_map(Step::Want),
        1 => all.prop_map(Step::Want),
        5 => (1..20usize).prop_map(Step::Feed),
        10 => (1..3000usize).prop_map(Step::Deliver),
        1 => Just(Step::Disconnect),
        2 => Just(Step::Connect),
        1 => Just(Step::RestartServer),
        2 => Just(Step::ServerInSync),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The client ends with exactly its part; what is asked for is there when it is told so; nothing goes back in time, nothing is told to be
    /// gone that was not there. Tiny limits reach every way of catching up.
    #[test]
    fn client_has_its_part_through_any_change_and_failure(
        steps in proptest::collection::vec(step(), 1..150),
        backlog_bytes in prop_oneof![Just(0usize), Just(2000), Just(1 << 20)],
        tombstones in prop_oneof![Just(0usize), Just(3), Just(1000)],
    ) {
        let mut net = Net::new(Limits { backlog_bytes, tombstones });
        for step in steps {
            match step {
                Step::Put(pod) => net.put(pod),
                Step::Delete(number) => {
                    let update = net.datastore.delete(number);
                    net.pending.extend(update);
                }
                Step::Profile(namespace, prod) => {
                    let update = net.datastore.set_profile(namespace, prod);
                    net.pending.push_back(update);
                }
                Step::Want(chosen) => net.want(selectors(chosen)),
                Step::Feed(count) => net.feed(count),
                Step::Deliver(bytes) => drop(net.deliver(bytes)),
                Step::Disconnect => net.hang_up(),
                Step::Connect => net.connect(),
                Step::RestartServer => net.restart_server(),
                Step::ServerInSync => {
                    net.feed(usize::MAX);
                    net.cache.set_in_sync();
                }
            }
        }
        net.settle();
        net.hang_up();
        prop_assert_eq!(net.cache.scopes().selectors(), 0, "who has gone leaves no selector behind");
    }
}

fn cluster(net: &mut Net, pods: u8) {
    for number in 0..pods {
        let (app, node) = (number / 3, 1 + number % 5);
        net.put(Pod {
            number,
            app,
            role: false,
            node,
        });
    }
}

#[test]
fn nothing_of_other_nodes_is_sent_unasked_and_a_wider_interest_sends_only_what_is_new() {
    let mut net = Net::new(Limits::default());
    cluster(&mut net, 200);
    net.settle();
    assert_eq!(net.objects, 0);
    net.want(selectors([0]));
    net.settle();
    let a = net.objects;
    assert_eq!(a, net.content.len());
    assert!((50..100).contains(&a), "{a} of 200");
    net.want(selectors([0, 1]));
    net.settle();
    assert_eq!(
        net.objects,
        net.content.len(),
        "those of the first are not told again"
    );
    assert_eq!(net.deletions, 0);
    assert_eq!(
        net.checked, 2,
        "a server answered, and what it answered was looked at"
    );
    net.want(selectors([1]));
    net.settle();
    assert_eq!(net.deletions, a);
    // A change of what is not asked for costs no byte.
    let before = net.objects;
    net.put(Pod {
        number: 0,
        app: 0,
        role: true,
        node: 1,
    });
    net.settle();
    assert_eq!(net.objects, before);
}

#[test]
fn resume_of_a_part_at_a_restarted_server_sends_only_what_changed() {
    let mut net = Net::new(Limits::default());
    cluster(&mut net, 240);
    net.want(selectors([0, 4]));
    net.settle();
    let (objects, held) = (net.objects, net.content.len());
    assert!(held > 50);
    net.hang_up();
    net.put(Pod {
        number: 0,
        app: 0,
        role: true,
        node: 1,
    });
    let update = net.datastore.delete(9);
    net.pending.extend(update);
    net.restart_server();
    net.settle();
    assert_eq!((net.objects - objects, net.deletions), (1, 1));
}

#[test]
fn endpoints_are_looked_at_only_while_somebody_asks_for_a_part() {
    let mut net = Net::new(Limits::default());
    cluster(&mut net, 60);
    net.feed(usize::MAX);
    assert_eq!(net.cache.scopes().endpoints(), 0);
    net.want(selectors([0, 5]));
    net.settle();
    assert_eq!(net.cache.scopes().endpoints(), net.datastore.pods.len());
    assert!(net.content.len() > 10);
    net.hang_up();
    assert_eq!(net.cache.scopes().endpoints(), 0);
    // What changes meanwhile is known to the next one, deletions too.
    let update = net.datastore.delete(0);
    net.pending.extend(update);
    let update = net.datastore.set_profile(1, true);
    net.pending.push_back(update);
    net.settle();
}

#[test]
fn a_selector_is_evaluated_once_for_all_clients() {
    let mut net = Net::new(Limits::default());
    cluster(&mut net, 30);
    net.settle();
    let mut others = Vec::new();
    for _ in 0..50 {
        let mut held = Held::default();
        let mut client = client::Conn::new(net.now, &Net::identity(), &held);
        let mut server = server::Conn::new(net.now, Patience::default());
        let wanted = Wanted {
            number: 1,
            selectors: selectors([0, 1, 2]),
        };
        client.on_wanted(wanted, &mut held);
        for _ in 0..20 {
            while let Some(output) = client.poll_output(&mut held).unwrap() {
                if let Output::Send(frame) = output {
                    server.on_bytes(net.now, &frame);
                }
            }
            if let Some(frame) = server.poll_transmit(&mut net.cache) {
                client.on_bytes(net.now, &frame);
            }
        }
        assert!(server.is_streaming());
        others.push(server);
    }
    assert_eq!(net.cache.scopes().selectors(), 3);
    let before = net.cache.scopes().evaluations();
    net.put(Pod {
        number: 200,
        app: 0,
        role: true,
        node: 9,
    });
    net.feed(1);
    let spent = net.cache.scopes().evaluations() - before;
    assert!(
        spent <= 3,
        "{spent} evaluations for one endpoint and 50 clients"
    );
    // And the frame is made once.
    let frames: BTreeSet<usize> = others
        .iter_mut()
        .filter_map(|server| server.poll_transmit(&mut net.cache))
        .map(|frame| frame.as_ptr() as usize)
        .collect();
    assert_eq!(frames.len(), 1);
}

#[test]
fn a_server_that_knows_no_scopes_sends_everything_and_that_is_complete() {
    let mut held = Held::default();
    let now = Instant::now();
    let mut client = client::Conn::new(now, &Net::identity(), &held);
    let wanted = |number| Wanted {
        number,
        selectors: selectors([0]),
    };
    client.on_wanted(wanted(1), &mut held);
    let mut said = Vec::new();
    let mut hear = |client: &mut client::Conn, held: &mut Held, events: &mut Vec<SyncEvent>| {
        while let Some(output) = client.poll_output(held).unwrap() {
            match output {
                Output::Send(frame) => said.extend(frame),
                Output::Event(event) => events.push(event),
                other => panic!("{other:?}"),
            }
        }
    };
    let mut events = Vec::new();
    hear(&mut client, &mut held, &mut events);
    let bodies = [
        Body::ServerHello(typha::wire::ServerHello {
            protocol: 1,
            ping_interval_secs: 10,
            ..Default::default()
        }),
        Body::SyncStart(typha::wire::SyncStart {
            buckets: 1,
            stale: vec![],
            full: true,
        }),
        Body::SyncDone(typha::wire::SyncDone::default()),
    ];
    for body in bodies {
        client.on_bytes(now, &typha::wire::frame(body, false));
        hear(&mut client, &mut held, &mut events);
    }
    assert!(events.contains(&SyncEvent::Complete(1)), "{events:?}");
    client.on_wanted(wanted(2), &mut held);
    hear(&mut client, &mut held, &mut events);
    assert_eq!(events.last(), Some(&SyncEvent::Complete(2)));
    let mut decoder = Decoder::from_clients();
    decoder.push(&said);
    let names: Vec<&str> = std::iter::from_fn(|| decoder.next_message().unwrap())
        .map(|body| body.name())
        .collect();
    assert_eq!(
        names,
        ["ClientHello"],
        "an older server would not understand more"
    );
}
