//! A dataplane behind a real Typha server that is sent of other nodes' endpoints what its policies select: while policies change what they
//! select, no peer that is allowed all the while is ever dropped, and a new endpoint stays closed until its sets are whole.

#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

mod flow_lab;

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Kind};
use flow_lab::{ANSWER, Host, PATIENCE, SetAtEnd, address, run, set};
use tokio::sync::{mpsc, watch};
use typha::client::{self, ClientConfig, Servers};
use typha::interest;
use typha::server::{Server, ServerConfig};

const PORT: u16 = 7000;
/// First of the ports that mark a policy.
const MARK: u32 = 41_000;
const CHANGES: u32 = 40;
/// Endpoints of other nodes that nothing on this node has to do with.
const OTHERS: u32 = 300;

/// A peer on another node.
fn peer(number: u32, address: &str, app: &str) -> Update {
    set(&format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"WorkloadEndpoint",
            "metadata":{{"name":"node2-k8s-peer{number}-eth0","namespace":"default","labels":{{"app":"{app}"}}}},
            "spec":{{"orchestrator":"k8s","node":"node2","pod":"peer{number}","endpoint":"eth0",
            "interfaceName":"calipeer{number}","ipNetworks":["{address}/32"],"profiles":["open"]}}}}"#
    ))
}

/// A policy of a pod that lets in what is selected, and to a mark of a port by which it is known.
fn allow(pod: u8, selector: &str, mark: u32) -> Update {
    // What does not change its revision is not sent.
    let revision = format!("{mark} {selector}").as_str().into();
    let update = set(&format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{{"name":"default.allow{pod}"}},
            "spec":{{"selector":"pod == '{pod}'","types":["Ingress"],
            "ingress":[{{"action":"Allow","protocol":"UDP","source":{{"selector":"{selector}"}},"destination":{{"ports":[{PORT},{mark}]}}}}]}}}}"#
    ));
    Update { revision, ..update }
}

/// Endpoints that the dataplane was told of and has not been told to be gone.
type Told = Arc<Mutex<BTreeSet<String>>>;

/// What a gate does not let through.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Shut {
    Nothing,
    /// The word that all is there.
    Answers,
    /// And endpoints.
    Endpoints,
}

/// Passes a stream on; what comes while the gate is shut waits.
struct Gate {
    shut: watch::Sender<Shut>,
    /// How often something has come to the shut gate.
    arrived: AtomicU32,
    told: Told,
}

impl Gate {
    async fn pass(&self, mut from: mpsc::Receiver<SyncEvent>, to: mpsc::Sender<SyncEvent>) {
        let mut shut = self.shut.subscribe();
        while let Some(event) = from.recv().await {
            let by = match &event {
                SyncEvent::Updates(updates) => self.note(updates).then_some(Shut::Endpoints),
                SyncEvent::Complete(_) => Some(Shut::Answers),
                SyncEvent::Status(_) => None,
            };
            if let Some(by) = by
                && *shut.borrow_and_update() >= by
            {
                self.arrived.fetch_add(1, Ordering::Relaxed);
                if shut.wait_for(|shut| *shut < by).await.is_err() {
                    return;
                }
            }
            if to.send(event).await.is_err() {
                return;
            }
        }
    }

    fn note(&self, updates: &[Update]) -> bool {
        let mut told = self.told.lock().unwrap();
        let endpoints = updates
            .iter()
            .filter(|update| update.key.kind == Kind::WorkloadEndpoint);
        endpoints.fold(false, |_, update| {
            let name = update.key.name.to_string();
            match update.value {
                Some(_) => told.insert(name),
                None => told.remove(&name),
            };
            true
        })
    }
}

/// A new dataplane as a new client.
fn follow(host: &mut Host, port: u16, gate: &Arc<Gate>) {
    let (asker, listener) = interest::channel("node1");
    let stream = client::start(ClientConfig {
        servers: Servers::Fixed(vec![format!("127.0.0.1:{port}")]),
        hostname: "node1".into(),
        info: "test".into(),
        kinds: typha::source::all_kinds(),
        tls: None,
        keep: None,
        interest: Some(listener),
    });
    let (to, passed) = mpsc::channel(64);
    let gate = Arc::clone(gate);
    tokio::spawn(async move { gate.pass(stream, to).await });
    host.follow(passed, asker);
}

fn probe(from: &str, pod: u8) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind((from, 0))?;
    socket.set_read_timeout(Some(ANSWER))?;
    socket.send_to(b"o", SocketAddr::new(address(pod), PORT))?;
    Ok(socket)
}

#[test]
fn no_allowed_peer_is_dropped_and_no_endpoint_opens_while_sets_are_incomplete() {
    run(async {
        let mut host = Host::new("flint", 3).await;
        // The first pod's namespace is the way to the other node's pods.
        let far = &host.pods[0];
        far.ip("link set unused0 up");
        far.ip("address add 10.1.0.254/24 dev unused0");
        for peer in ["192.168.2.10", "192.168.2.11"] {
            far.ip(&format!("address add {peer}/32 dev unused0"));
        }
        far.ip("route add 192.168.1.2/32 via 10.1.0.1");
        far.ip("route add 192.168.1.3/32 via 10.1.0.1");
        host.ns.ip("route add 192.168.2.0/24 via 10.1.0.254");

        let server = Server::bind(ServerConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            ..ServerConfig::default()
        })
        .unwrap();
        let port = server.local_addr().unwrap().port();
        let (source, events) = mpsc::channel(16);
        let serving = tokio::spawn(server.run(events, std::future::pending()));
        let told = Told::default();
        let gate = Arc::new(Gate {
            shut: watch::Sender::new(Shut::Nothing),
            arrived: AtomicU32::new(0),
            told: Arc::clone(&told),
        });
        follow(&mut host, port, &gate);

        let (first, second) = ("192.168.2.10", "192.168.2.11");
        let mut all: Vec<Update> = host.everything();
        all.retain(|update| update.key != Host::key(1) && update.key != Host::key(3));
        all.extend([
            peer(10, first, "a"),
            peer(11, second, "b"),
            allow(2, "app == 'a'", MARK),
            // Not in use yet.
            allow(3, "app == 'b'", MARK),
        ]);
        all.extend((0..OTHERS).map(|n| {
            let [_, _, high, low] = n.to_be_bytes();
            peer(1000 + n, &format!("192.168.{}.{low}", 100 + high), "other")
        }));
        let send =
            async |updates: Vec<Update>| source.send(SyncEvent::Updates(updates)).await.unwrap();
        send(all).await;
        source
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        host.handle()
            .programmed(&Host::key(2), PATIENCE)
            .await
            .unwrap();

        let (to_second, to_third) = (host.listens(2, PORT), host.listens(3, PORT));
        let (over, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let (probes, answered, leaked) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            let _end = SetAtEnd([&over, &done]);
            scope.spawn(|| {
                let mut data = [0; 8];
                while !done.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = to_second.recv_from(&mut data) {
                        if from.ip().to_string() != first {
                            leaked.fetch_add(1, Ordering::Relaxed);
                        }
                        // The prober says if an answer is missing.
                        let _ = to_second.send_to(&data[..length], from);
                    }
                }
            });
            let prober = scope.spawn(|| {
                let probing = || {
                    while !over.load(Ordering::Relaxed) {
                        // Every probe is a new flow; that of the second peer is never allowed.
                        probe(second, 2)?;
                        probes.fetch_add(1, Ordering::Relaxed);
                        if probe(first, 2)?.recv(&mut [0; 8]).is_ok() {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Ok::<_, std::io::Error>(())
                };
                host.pods[0].netns().run(probing)
            });
            let changing = async {
                for number in 0..CHANGES {
                    // A selector that nobody has asked for before, of which the one peer is a part.
                    let selector = format!("app in {{'a', 'n{number}'}}");
                    let mark = MARK + 1 + number;
                    let text = mark.to_string();
                    let arrived = gate.arrived.load(Ordering::Relaxed);
                    gate.shut.send_replace(Shut::Endpoints);
                    send(vec![allow(2, &selector, mark)]).await;
                    host.until("what was asked for", || {
                        gate.arrived.load(Ordering::Relaxed) > arrived
                    })
                    .await;
                    let before = probes.load(Ordering::Relaxed);
                    host.until("probes", || probes.load(Ordering::Relaxed) > before + 20)
                        .await;
                    assert!(
                        !host.rules().contains(&text),
                        "written before its sets are whole\n{}",
                        host.rules()
                    );
                    gate.shut.send_replace(Shut::Nothing);
                    host.until("the next policy", || host.rules().contains(&text))
                        .await;
                }
            };
            let ended = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current()
                    .block_on(async { tokio::time::timeout(PATIENCE * 4, changing).await })
            });
            over.store(true, Ordering::Relaxed);
            let probed = prober.join().expect("the prober");
            done.store(true, Ordering::Relaxed);
            ended.expect("changes are taken in");
            probed.expect("its namespace").expect("its sockets");
        });
        let (probes, answered) = (probes.into_inner(), answered.into_inner());
        println!("{CHANGES} changes, {probes} probes, {answered} answered");
        assert!(
            probes > CHANGES,
            "too few probes to show something: {probes}"
        );
        assert_eq!(answered, probes, "answers and probes\n{}", host.rules());
        assert_eq!(
            leaked.into_inner(),
            0,
            "the other peer got through\n{}",
            host.rules()
        );
        let names = told.lock().unwrap().clone();
        assert!(names.contains("node2-k8s-peer10-eth0"), "{names:?}");
        assert!(
            !names
                .iter()
                .any(|name| name.contains("peer1000") || name.contains("peer11-")),
            "{names:?}"
        );

        // A new pod whose policy selects what has not come yet: closed, and said so; the others go on.
        gate.shut.send_replace(Shut::Endpoints);
        let key = Host::key(3);
        let Some(AnyResource::WorkloadEndpoint(third)) =
            set(&flow_lab::pod(3, 3)).value.as_deref().cloned()
        else {
            unreachable!("built as one")
        };
        host.handle()
            .announce(key.clone(), Some(third.into()))
            .await
            .unwrap();
        host.until("the pod that waits", || {
            let state = host.handle().state();
            let state = state.borrow();
            state
                .endpoints
                .get(&key)
                .is_some_and(|it| it.problem.as_deref().is_some_and(|p| p.contains("waits")))
        })
        .await;
        let mut data = [0; 8];
        for _ in 0..5 {
            host.inside(1, || probe(second, 3).map(drop));
            host.inside(1, || probe(first, 3).map(drop));
            assert!(
                to_third.recv(&mut data).is_err(),
                "open before its set is whole\n{}",
                host.rules()
            );
        }
        gate.shut.send_replace(Shut::Nothing);
        host.handle().programmed(&key, PATIENCE).await.unwrap();
        host.until("the peer that is allowed", || {
            host.inside(1, || probe(second, 3).map(drop));
            to_third
                .recv_from(&mut [0; 8])
                .is_ok_and(|(_, from)| from.ip().to_string() == second)
        })
        .await;

        // What is selected no longer is forgotten.
        send(vec![allow(3, "app == 'nobody'", MARK)]).await;
        host.until("what is not asked for any more", || {
            !told.lock().unwrap().contains("node2-k8s-peer11-eth0")
        })
        .await;

        // A new dataplane leaves what it finds until it has what it asked for first.
        let arrived = gate.arrived.load(Ordering::Relaxed);
        gate.shut.send_replace(Shut::Answers);
        follow(&mut host, port, &gate);
        host.until("what a new dataplane asks for", || {
            gate.arrived.load(Ordering::Relaxed) > arrived
        })
        .await;
        for _ in 0..20 {
            host.until("the peer that is allowed still", || {
                host.inside(1, || probe(first, 2).map(drop));
                to_second.recv_from(&mut [0; 8]).is_ok()
            })
            .await;
        }
        gate.shut.send_replace(Shut::Nothing);
        host.handle()
            .programmed(&Host::key(2), PATIENCE)
            .await
            .unwrap();
        serving.abort();
    });
}
