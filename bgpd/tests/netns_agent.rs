//! The daemon of two nodes in real namespaces, configured from a datastore, with the test as the nodes' route table.
//! Needs root.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cali_api::AnyResource;
use cali_control::routes::{PROTOCOL, ToNode, VERSION};
use cali_control::{FrameReader, FrameWriter};
use cali_datastore::Datastore;
use serde_json::{Value, json};
use tokio::net::UnixListener;

fn ip(arguments: &str) {
    let out = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Where each node serves its metrics, in its own namespace.
const METRICS: &str = "127.0.0.1:9179";

struct Node {
    name: String,
    netns: String,
    run: PathBuf,
    daemon: Option<Child>,
    heard: Arc<Mutex<Vec<ToNode>>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.netns])
            .status();
    }
}

impl Node {
    fn new(n: u8, folder: &Path) -> Self {
        let (name, netns) = (
            format!("node{n}"),
            format!("bgpd-a{n}-{}", std::process::id()),
        );
        ip(&format!("netns add {netns}"));
        ip(&format!("-n {netns} link set lo up"));
        let run = folder.join(&name);
        std::fs::create_dir_all(&run).unwrap();
        Self {
            name,
            netns,
            run,
            daemon: None,
            heard: Arc::default(),
        }
    }

    /// Plays `cali-node`: takes connections of the routes socket and keeps what it hears.
    fn serve(&self) {
        let listener = UnixListener::bind(self.run.join("routes.sock")).unwrap();
        let heard = Arc::clone(&self.heard);
        tokio::spawn(async move {
            loop {
                let (read, write) = listener.accept().await.unwrap().0.into_split();
                let (mut reader, mut writer) = (
                    FrameReader::new(PROTOCOL, read),
                    FrameWriter::new(PROTOCOL, write),
                );
                writer.hello(VERSION, "test").await.unwrap();
                reader.hello().await.unwrap();
                while let Ok(Some(frame)) = reader.next::<ToNode>().await {
                    heard.lock().unwrap().push(frame);
                }
            }
        });
    }

    fn start(&mut self, database: &Path) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.run.join("log"))
            .unwrap();
        let child = Command::new("ip")
            .args([
                "netns",
                "exec",
                &self.netns,
                env!("CARGO_BIN_EXE_bgpd"),
                "--node",
                &self.name,
            ])
            .env("CALI_RUN_DIR", &self.run)
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", database)
            .env("CALI_BGP_METRICS_ADDRESS", METRICS)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(child);
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What a scrape in the node's namespace gets.
    fn metrics(&self) -> String {
        let (host, port) = METRICS.split_once(':').unwrap();
        let request = "GET /metrics HTTP/1.1\\r\\nHost: n\\r\\nConnection: close\\r\\n\\r\\n";
        let script =
            format!("exec 3<>/dev/tcp/{host}/{port}; printf '{request}' >&3; timeout 10 cat <&3");
        let out = Command::new("ip")
            .args(["netns", "exec", &self.netns, "bash", "-c", &script])
            .output()
            .unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn text(&self) -> String {
        format!("{:?}", self.heard.lock().unwrap())
    }

    async fn wait(&self, what: &str, condition: impl Fn(&[ToNode]) -> bool) {
        for _ in 0..400 {
            if condition(&self.heard.lock().unwrap()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let log = std::fs::read_to_string(self.run.join("log")).unwrap_or_default();
        panic!("{}: {what}; heard {}\n{log}", self.name, self.text());
    }

    fn announces(frames: &[ToNode], wanted: &str) -> bool {
        frames.iter().any(|f| match f {
            ToNode::Update { announced, .. } => {
                announced.iter().any(|p| p.prefix.to_string() == wanted)
            }
            ToNode::EndOfSync(_) => false,
        })
    }

    fn withdraws(frames: &[ToNode]) -> Vec<String> {
        let lists = frames.iter().filter_map(|f| match f {
            ToNode::Update { withdrawn, .. } => Some(withdrawn),
            ToNode::EndOfSync(_) => None,
        });
        lists.flatten().map(ToString::to_string).collect()
    }

    fn ends(frames: &[ToNode]) -> usize {
        frames
            .iter()
            .filter(|f| matches!(f, ToNode::EndOfSync(_)))
            .count()
    }
}

async fn put(store: &Arc<dyn Datastore>, object: Value) {
    let mut object = object;
    object["apiVersion"] = json!("projectcalico.org/v3");
    store
        .create(AnyResource::from_json(object).unwrap())
        .await
        .unwrap();
}

fn affinity(cidr: &str, node: &str) -> Value {
    let name = format!("{node}-{}", cidr.replace(['.', '/', ':'], "-"));
    json!({"kind": "BlockAffinity", "metadata": {"name": name},
        "spec": {"cidr": cidr, "node": node, "state": "confirmed", "deleted": "false"}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_mesh_by_their_resources_and_survive_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("cali.db");
    let store: Arc<dyn Datastore> =
        Arc::new(cali_datastore::sqlite::Sqlite::open(&database).unwrap());
    let mut nodes = [1, 2].map(|n| Node::new(n, folder.path()));
    ip(&format!(
        "-n {} link add eth0 type veth peer name eth0 netns {}",
        nodes[0].netns, nodes[1].netns
    ));
    for (n, node) in nodes.iter().enumerate() {
        let n = n + 1;
        ip(&format!(
            "-n {} address add 10.98.0.{n}/24 dev eth0",
            node.netns
        ));
        ip(&format!(
            "-n {} address add fd98::{n}/64 dev eth0 nodad",
            node.netns
        ));
        ip(&format!("-n {} link set eth0 up", node.netns));
        let bgp = json!({"ipv4Address": format!("10.98.0.{n}/24"), "ipv6Address": format!("fd98::{n}/64")});
        put(
            &store,
            json!({"kind": "Node", "metadata": {"name": node.name}, "spec": {"bgp": bgp}}),
        )
        .await;
    }
    put(
        &store,
        json!({"kind": "IPPool", "metadata": {"name": "v4"}, "spec": {"cidr": "10.10.0.0/16"}}),
    )
    .await;
    put(
        &store,
        json!({"kind": "IPPool", "metadata": {"name": "v6"}, "spec": {"cidr": "fd10::/48"}}),
    )
    .await;
    put(&store, affinity("10.10.1.0/26", "node1")).await;
    put(&store, affinity("fd10::/122", "node1")).await;
    put(&store, affinity("10.10.2.0/26", "node2")).await;
    for node in &mut nodes {
        node.serve();
        node.start(&database);
    }
    let [one, two] = &mut nodes;
    one.wait("block of node2", |f| {
        Node::announces(f, "10.10.2.0/26") && Node::ends(f) == 2
    })
    .await;
    two.wait("blocks of node1", |f| {
        Node::announces(f, "10.10.1.0/26") && Node::announces(f, "fd10::/122") && Node::ends(f) == 2
    })
    .await;
    // A block that is claimed while everything runs.
    put(&store, affinity("10.10.2.64/26", "node2")).await;
    one.wait("new block", |f| Node::announces(f, "10.10.2.64/26"))
        .await;

    two.kill();
    two.heard.lock().unwrap().clear();
    two.start(&database);
    two.wait("everything again, closed by end-of-sync", |f| {
        // IPv4 ends only after the IPv4 block has been announced.
        let announced = f
            .iter()
            .position(|x| Node::announces(std::slice::from_ref(x), "10.10.1.0/26"));
        let ended = f
            .iter()
            .position(|x| matches!(x, ToNode::EndOfSync(cali_control::routes::Family::Ipv4)));
        announced.is_some() && ended.is_some() && announced < ended && Node::ends(f) == 2
    })
    .await;
    assert_eq!(
        Node::withdraws(&one.heard.lock().unwrap()),
        [] as [String; 0],
        "node1 lost routes"
    );
    assert_eq!(
        Node::withdraws(&two.heard.lock().unwrap()),
        [] as [String; 0],
        "node2 lost routes"
    );

    // A pod of node1 with an address of node2's block, as the kernel has it; and then without.
    ip(&format!(
        "-n {} link add cali1 type veth peer name pod1",
        one.netns
    ));
    ip(&format!("-n {} link set cali1 up", one.netns));
    ip(&format!(
        "-n {} route add 10.10.2.7/32 dev cali1 proto 80",
        one.netns
    ));
    two.wait("the borrowed address", |f| {
        Node::announces(f, "10.10.2.7/32")
    })
    .await;
    ip(&format!("-n {} link set cali1 down", one.netns));
    two.wait("its withdrawal", |f| {
        Node::withdraws(f).contains(&"10.10.2.7/32".to_owned())
    })
    .await;
    let metrics = one.metrics();
    for line in [
        "bgp_peers{state=\"Established\"} 2",
        "bgp_table_prefixes{family=\"ipv4\"}",
        "bgp_peer_up{name=\"node2\",peer=\"10.98.0.2\",type=\"node-to-node mesh\"} 1",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
}
