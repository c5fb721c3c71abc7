//! The plugin beside the whole daemon, both as built: killed in the middle of its work, and host ports under policy.

#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cali_api::AnyResource;
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_netlink::testing::{TestNs, eventually};
use cali_tests::cni::{Runtime, given, told};
use cali_tests::lab::programs;
use cali_tests::traffic;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const NODE: &str = "node1";

/// A node with its daemon, and somebody beyond its link.
struct Node {
    host: TestNs,
    outside: TestNs,
    folder: tempfile::TempDir,
    runtime: Runtime,
    store: Arc<dyn Datastore>,
    daemon: Option<Child>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

fn object(value: Value) -> AnyResource {
    AnyResource::from_json(value).unwrap()
}

impl Node {
    async fn new() -> Self {
        let (host, outside) = (TestNs::new("cnihost"), TestNs::new("cniout"));
        host.veth("eth0", &outside, "far").await;
        host.ip("link set eth0 up");
        host.ip("address add 192.0.2.1/24 dev eth0");
        outside.ip("address add 192.0.2.2/24 dev far");
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Datastore> =
            Arc::new(Sqlite::open(&folder.path().join("cali.db")).unwrap());
        let node = Self {
            host,
            outside,
            runtime: Runtime::new(folder.path(), "test"),
            folder,
            store,
            daemon: None,
        };
        for object in [
            json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool",
                "metadata": {"name": "pods"}, "spec": {"cidr": "10.65.0.0/24"}}),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "test"}}),
        ] {
            node.put(object).await;
        }
        node
    }

    async fn put(&self, value: Value) {
        self.store.apply(object(value)).await.unwrap();
    }

    async fn pod(&self, name: &str) {
        self.put(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "test", "labels": {"app": name}},
            "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "i"}]}
        }))
        .await;
    }

    fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let mut command = self.host.netns().command(programs().join("cali-node"));
        self.runtime
            .folders(&mut command)
            .env("NODENAME", NODE)
            .env("CALI_SQLITE_PATH", self.folder.path().join("cali.db"))
            .env("CALI_CNI_INSTALL", "false")
            .env("NO_DEFAULT_POOLS", "true")
            .env("CALICO_NETWORKING_BACKEND", "none")
            .env("NO_COLOR", "1")
            .stderr(Stdio::from(log));
        self.daemon = Some(command.spawn().unwrap());
    }

    /// `SIGKILL`.
    fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn plugin(&self, command: &str, name: &str, pod: &TestNs, more: &Value) -> Child {
        self.runtime.call(command, name, pod, more)
    }

    fn add(&self, name: &str, pod: &TestNs, more: &Value) -> IpAddr {
        self.runtime.add(name, pod, more, || self.log())
    }

    fn calictl(&self, args: &[&str]) -> String {
        let output = Command::new(programs().join("calictl"))
            .args(args)
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", self.folder.path().join("cali.db"))
            .env("NO_COLOR", "1")
            .output()
            .unwrap();
        told(&output)
    }

    /// Waits until `calictl ipam check` finds nothing.
    fn is_consistent(&self) {
        eventually(LIMIT, || {
            let told = self.calictl(&["ipam", "check"]);
            if told.contains("found 0 problems") {
                Ok(())
            } else {
                Err(format!("{told}\n{}", self.log()))
            }
        });
    }
}

fn reaches(from: &TestNs, to: IpAddr) -> bool {
    let args = ["-c1", "-W1", &to.to_string()];
    from.output("ping", &args).status.success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_leaves_nothing_that_the_next_add_cannot_finish() {
    const ROUNDS: u64 = 8;
    let mut node = Node::new().await;
    let nothing = json!({});
    node.start();
    let warm = TestNs::new("cnipod");
    node.pod("warm").await;
    node.add("warm", &warm, &nothing);
    let mut pods = Vec::new();
    for round in 0..ROUNDS {
        let (name, pod) = (format!("p{round}"), TestNs::new("cnipod"));
        node.pod(&name).await;
        let cut = node.plugin("ADD", &name, &pod, &nothing);
        // From before the call has come in until after it has been answered.
        std::thread::sleep(Duration::from_millis(round * 6));
        node.kill();
        let first = given(&cut.wait_with_output().unwrap());
        node.start();
        let address = node.add(&name, &pod, &nothing);
        if let Some(first) = first {
            assert_eq!(first, address, "what was answered stays");
        }
        eventually(LIMIT, || {
            if reaches(&node.host, address) {
                Ok(())
            } else {
                Err(format!("no answer from {address}\n{}", node.log()))
            }
        });
        pods.push((name, pod, address));
    }
    let mut addresses: Vec<IpAddr> = pods.iter().map(|(_, _, address)| *address).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), pods.len());
    node.is_consistent();
    let links = node.host.ip("-br link");
    assert_eq!(links.matches("cali").count(), pods.len() + 1, "{links}");
    for (name, pod, _) in &pods {
        node.runtime.del(name, pod);
    }
    let links = node.host.ip("-br link");
    assert_eq!(links.matches("cali").count(), 1, "{links}");
    node.is_consistent();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_port_obeys_the_policy_of_its_container() {
    let mut node = Node::new().await;
    node.start();
    let pod = TestNs::new("cnipod");
    node.pod("web").await;
    let ports = json!({"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}});
    node.add("web", &pod, &ports);
    traffic::greet(pod.netns(), 80);
    let to: SocketAddr = "192.0.2.1:8080".parse().unwrap();
    let becomes = |wanted: Option<&str>| {
        eventually(LIMIT, || {
            let seen = traffic::asked(node.outside.netns(), to);
            if seen.as_deref() == wanted {
                Ok(())
            } else {
                Err(format!("{seen:?} instead of {wanted:?}\n{}", node.log()))
            }
        });
    };
    becomes(Some("192.0.2.2"));
    let policy = |net: &str| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
            "metadata": {"name": "web", "namespace": "test"},
            "spec": {"selector": "app == 'web'", "ingress": [
                {"action": "Allow", "protocol": "TCP", "source": {"nets": [net]}, "destination": {"ports": [80]}}]}})
    };
    node.put(policy("198.51.100.0/24")).await;
    becomes(None);
    // The client's own address and the container's port are what policy sees.
    node.put(policy("192.0.2.2/32")).await;
    becomes(Some("192.0.2.2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_with_action_log_writes_a_line_with_the_words_that_are_set() {
    let mut node = Node::new().await;
    node.put(json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration",
        "metadata": {"name": "default"}, "spec": {"logPrefix": "seen by %k %p", "logActionRateLimit": "1/hour", "logActionRateLimitBurst": 2}}))
    .await;
    node.put(
        json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": "test"},
        "spec": {"selector": "app == 'web'", "ingress": [
            {"action": "Deny", "protocol": "TCP", "destination": {"ports": [81]}},
            {"action": "Log", "protocol": "UDP", "destination": {"ports": [53]}}]}}),
    )
    .await;
    node.start();
    let pod = TestNs::new("cnipod");
    node.pod("web").await;
    let address = node.add("web", &pod, &json!({}));
    node.outside
        .ip(&format!("route add {address} via 192.0.2.1"));
    let send = move || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"a", (address, 53)).unwrap();
        socket.local_addr().unwrap().port()
    };
    let ports: Vec<u16> = (0..4)
        .map(|_| node.outside.netns().run(send).unwrap())
        .collect();
    let line = |port: u16| {
        format!(
            "seen by NetworkPolicy test/web policy=\"np/test/web\" direction=\"ingress\" rule=1 protocol=17 source=192.0.2.2 source_port={port} destination={address} destination_port=53"
        )
    };
    eventually(LIMIT, || {
        let log = node.log();
        let written = |port: &&u16| log.contains(&line(**port));
        if ports.iter().filter(written).count() == 2 {
            Ok(())
        } else {
            Err(format!("not two lines of {ports:?}\n{log}"))
        }
    });
    // The limit is for all packets of the rule; those beyond it are not written.
    assert_eq!(node.log().matches("seen by").count(), 2);
}
