//! Passwords of peers from the secrets of a real kube-apiserver: nodes in one process, their secrets in the cluster.
#![allow(clippy::unwrap_used)]

mod in_memory;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bgpd::agent::Agent;
use bgpd::config::Local;
use bgpd::passwords::Passwords;
use bgpd::reach::Anywhere;
use bgpd::sink::memory::Memory;
use bgpd::speaker::{Environment, Speaker};
use bgpd::transport::memory::Network;
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Revision};
use cali_control::status::{BgpRequest, BgpResponse, PeerStatus, SessionState};
use cali_datastore::kubernetes::Kubernetes;
use cali_datastore::testing::ApiServer;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use typha::secrets::Secrets;

/// The installation's namespace.
const NAMESPACE: &str = "cali-system";
/// How soon secrets are read again.
const AGAIN: Duration = Duration::from_secs(1);
/// For a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

fn object(kind: &str, name: &str, spec: Value) -> Update {
    let object = json!({"apiVersion": "projectcalico.org/v3", "kind": kind,
        "metadata": {"name": name}, "spec": spec});
    let value = AnyResource::from_json(object).unwrap();
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from("1"),
    }
}

fn resources() -> Vec<Update> {
    let from = |key: &str| json!({"secretKeyRef": {"name": "bgp", "key": key}});
    let node = |n: u8| {
        object(
            "Node",
            &format!("node{n}"),
            json!({"bgp": {"ipv4Address": format!("10.0.0.{n}/24")}}),
        )
    };
    let peer = |from_node: u8, to: u8, key: &str| {
        let spec = json!({"node": format!("node{from_node}"), "peerIP": format!("10.0.0.{to}"),
            "asNumber": 64512, "password": from(key)});
        object("BGPPeer", &format!("from-{from_node}-to-{to}"), spec)
    };
    vec![
        node(1),
        node(2),
        node(3),
        object(
            "BGPConfiguration",
            "default",
            json!({"nodeToNodeMeshEnabled": false}),
        ),
        // Node 1 has a peer with each of two passwords.
        peer(1, 2, "two"),
        peer(2, 1, "two"),
        peer(1, 3, "three"),
        peer(3, 1, "three"),
    ]
}

struct Node {
    speaker: Speaker,
    _events: mpsc::Sender<SyncEvent>,
}

impl Node {
    async fn start(n: u8, net: &Network, server: &ApiServer) -> Self {
        let store = Arc::new(Kubernetes::new(server.settings()));
        let nowhere = "/nonexistent/secrets".into();
        let passwords = Passwords::in_folder(nowhere).with_cluster(Secrets::of(
            store,
            NAMESPACE.to_owned(),
            AGAIN,
        ));
        let local = Local {
            node: format!("node{n}"),
            ..Local::default()
        };
        let environment = Environment {
            transport: Arc::new(net.host(&[in_memory::addr(n)])),
            sink: Box::new(Memory::default()),
            reach: Box::new(Anywhere),
            seed: n.into(),
            deferral: Duration::from_secs(60),
        };
        let (events, queue) = mpsc::channel(16);
        let (told, started) = oneshot::channel();
        let agent = Agent::new(local, passwords);
        tokio::spawn(agent.run(queue, environment, move |speaker: &Speaker| {
            let _ = told.send(speaker.clone());
        }));
        events.send(SyncEvent::Updates(resources())).await.unwrap();
        events
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        Self {
            speaker: started.await.unwrap(),
            _events: events,
        }
    }

    async fn peer(&self, n: u8) -> PeerStatus {
        let BgpResponse::Status(status) = self.speaker.ask(BgpRequest::Status).await.unwrap()
        else {
            panic!("no status");
        };
        let address: IpAddr = in_memory::addr(n);
        status
            .peers
            .into_iter()
            .find(|p| p.address == address)
            .unwrap()
    }

    async fn wait(&self, n: u8, what: &str, condition: impl Fn(&PeerStatus) -> bool) {
        let begin = Instant::now();
        loop {
            let peer = self.peer(n).await;
            if condition(&peer) {
                return;
            }
            assert!(begin.elapsed() < LIMIT, "{what}: {peer:#?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn put(server: &ApiServer, entries: &[(&str, &str)]) {
    let data: serde_json::Map<String, Value> = entries
        .iter()
        .map(|(key, value)| ((*key).to_owned(), json!(value)))
        .collect();
    let secret = json!({"apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "bgp", "namespace": NAMESPACE}, "stringData": data});
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret.json");
    std::fs::write(&file, secret.to_string()).unwrap();
    let output = server
        .kubectl(&["apply", "-f", &file.display().to_string()])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_come_from_secrets_and_a_change_touches_only_its_peers() {
    let server = ApiServer::start().await;
    server.namespace(NAMESPACE).await;
    put(&server, &[("three", "stays")]);
    let net = Network::default();
    let one = Node::start(1, &net, &server).await;
    let _two = Node::start(2, &net, &server).await;
    let _three = Node::start(3, &net, &server).await;
    let up = |peer: &PeerStatus| peer.state == SessionState::Established;
    one.wait(3, "the session with a password", up).await;
    assert!(one.peer(3).await.password);
    // Nothing goes to the one whose password is not there, and it says why.
    let down = one.peer(2).await;
    assert_eq!(
        (down.state, down.messages_out.open),
        (SessionState::Idle, 0)
    );
    assert_eq!(
        down.info.as_deref(),
        Some("no password: secret \"bgp\" has no key \"two\"")
    );
    put(&server, &[("three", "stays"), ("two", "first")]);
    one.wait(2, "the session whose password came", up).await;
    put(&server, &[("three", "stays"), ("two", "second")]);
    one.wait(2, "a session with the new password", |peer| {
        up(peer) && peer.established_count >= 2
    })
    .await;
    assert_eq!(
        one.peer(3).await.established_count,
        1,
        "the other peer was touched"
    );
}
