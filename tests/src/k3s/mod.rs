//! A cluster laid out as k3s lays it out, of Kubernetes' own programs: a control plane and two nodes, each with containerd, a kubelet and
//! kube-proxy, in two subnets with a router between them. All of it ends with the test, and takes everything away that it made.

mod archive;
mod control_plane;
mod node;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_datastore::testing::{Asked, told};
use cali_netlink::testing::TestNs;
use serde_json::{Value, json};

use crate::lab::repository;
pub use archive::BOX;
use control_plane::{ADDRESS, ControlPlane};
pub use node::{Node, ProxyMode};

/// The nodes; each is the only one of its subnet.
pub const NODES: [&str; 2] = ["node1", "node2"];

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct RunningPod {
    pub name: String,
    /// Place of its node in [`NODES`].
    pub node: usize,
    pub address: IpAddr,
}

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    // In the order in which they are to end.
    nodes: Vec<Node>,
    server: ControlPlane,
    router: TestNs,
    folder: tempfile::TempDir,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
    }
}

/// The address of a node in its subnet.
#[must_use]
pub fn address(node: usize) -> String {
    format!("192.168.{}.1", node + 1)
}

impl Cluster {
    /// Starts it, with our image and that of ordinary pods on the nodes. These are not ready: nothing makes networks of pods yet.
    ///
    /// # Panics
    /// If something cannot be started.
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let images = [
            archive::small(folder.path()),
            archive::ours(folder.path(), None),
            archive::ours(folder.path(), Some("iptables")),
        ];
        let router = TestNs::new("k3srouter");
        router.ip(&format!("address add {ADDRESS}/32 dev lo"));
        forward(&router);
        let mut hosts = Vec::new();
        for number in 0..NODES.len() {
            let (host, far) = (TestNs::new("k3snode"), format!("node{number}"));
            let gateway = format!("192.168.{}.254", number + 1);
            router.veth(&far, &host, "eth0").await;
            router.ip(&format!("link set {far} up"));
            router.ip(&format!("address add {gateway}/24 dev {far}"));
            host.ip(&format!("address add {}/24 dev eth0", address(number)));
            host.ip(&format!("route add default via {gateway}"));
            hosts.push(host);
        }
        let server = ControlPlane::start(router.netns(), folder.path(), &NODES);
        let mut cluster = Self {
            nodes: Vec::new(),
            server,
            router,
            folder,
        };
        for (number, host) in hosts.into_iter().enumerate() {
            let mut node = Node::new(NODES[number], host, cluster.folder.path());
            node.start_containerd(&images);
            node.start_kubelet(&cluster.server, &address(number));
            node.start_proxy(&cluster.server, ProxyMode::Iptables);
            cluster.nodes.push(node);
        }
        cluster
    }

    /// The nodes, in the order of [`NODES`].
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A host outside of the cluster, which reaches the nodes.
    #[must_use]
    pub fn outside(&self) -> &TestNs {
        &self.router
    }

    /// Restarts kube-proxy on every node.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn set_proxy_mode(&mut self, mode: ProxyMode) {
        for node in &mut self.nodes {
            node.start_proxy(&self.server, mode);
        }
    }

    /// What kubectl says to these words, separated by spaces; this must succeed.
    ///
    /// # Panics
    /// If it fails.
    pub fn kubectl(&self, words: &str) -> String {
        let said = told(self.server.kubectl().args(words.split(' ')), "");
        said.unwrap_or_else(|said| panic!("kubectl {words}: {said}"))
    }

    /// Applies manifests.
    ///
    /// # Panics
    /// If one is refused.
    pub fn apply(&self, manifests: &str) {
        let words = ["apply", "--server-side", "-f", "-"];
        let said = told(self.server.kubectl().args(words), manifests);
        said.unwrap_or_else(|said| panic!("{said}\n{manifests}"));
    }

    /// Applies an overlay of the manifests with components, as an overlay of a user's own.
    ///
    /// # Panics
    /// If it is refused.
    pub fn install(&self, overlay: &str, components: &[&str]) {
        let folder = self.folder.path().join("overlay");
        std::fs::create_dir_all(&folder).expect("a folder");
        // kustomize takes no whole paths.
        let up = "../".repeat(folder.components().count() - 1);
        let manifests = repository().canonicalize().expect("the repository");
        let manifests = manifests.join("deploy/kubernetes");
        let below =
            |part: &str| format!("{up}{}", &manifests.join(part).display().to_string()[1..]);
        let components = components.iter();
        let components: Vec<_> = components
            .map(|name| below(&format!("components/{name}")))
            .collect();
        let text = json!({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
            "resources": [below(&format!("overlays/{overlay}"))], "components": components});
        std::fs::write(folder.join("kustomization.yaml"), text.to_string()).expect("a file");
        self.kubectl(&format!("apply --server-side -k {}", folder.display()));
    }

    /// What the shell of a person says who works in the repository.
    ///
    /// # Errors
    /// What it said, if it failed or took longer than `limit`.
    pub fn types(&self, words: &str, limit: Duration) -> Result<String, String> {
        told(&mut self.server.shell(words, limit), "")
    }

    /// The same, not yet started.
    #[must_use]
    pub fn shell(&self, words: &str, limit: Duration) -> std::process::Command {
        self.server.shell(words, limit)
    }

    /// Objects as JSON: `get("-n shop pods")`.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn get(&self, words: &str) -> Result<Value, String> {
        let words = ["get"].into_iter().chain(words.split(' '));
        let said = told(self.server.kubectl().args(words).args(["-o", "json"]), "")?;
        serde_json::from_str(&said).map_err(|error| format!("{error}: {said}"))
    }

    /// The pods with this label that run and are ready, by node.
    ///
    /// # Errors
    /// Why there are not as many.
    pub fn pods(&self, label: &str, count: usize) -> Result<Vec<RunningPod>, String> {
        let listed = self.get(&format!("-n shop pods -l {label}"))?;
        let mut pods: Vec<RunningPod> = listed["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(running)
            .collect();
        pods.sort_by_key(|pod| pod.node);
        match pods.len() == count {
            true => Ok(pods),
            false => Err(format!(
                "{} of {count} pods run: {}",
                pods.len(),
                listed["items"]
            )),
        }
    }

    /// The network of a pod.
    ///
    /// # Panics
    /// If it does not run.
    #[must_use]
    pub fn network(&self, pod: &RunningPod) -> cali_netlink::NetNs {
        self.nodes[pod.node].pod(&pod.address.to_string())
    }

    /// What the manifests' accounts have asked the API server for since the start, or since this was called last.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        self.server.asked()
    }

    /// Waits until a condition yields a value, looking every 200 ms.
    ///
    /// # Panics
    /// If it does not in time, with what it said last.
    pub fn until<T>(
        &self,
        limit: Duration,
        what: &str,
        mut condition: impl FnMut() -> Result<T, String>,
    ) -> T {
        let start = Instant::now();
        loop {
            match condition() {
                Ok(value) => {
                    eprintln!("{what}: {:.1?}", start.elapsed());
                    return value;
                }
                Err(said) => assert!(
                    start.elapsed() < limit,
                    "{what}: not within {limit:?}: {said}"
                ),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What somebody looks at who wonders why a cluster does not work.
    #[must_use]
    pub fn report(&self) -> String {
        let mut report = String::new();
        for words in [
            "get nodes,pods -A -o wide",
            "get events -A --field-selector type=Warning",
            "-n kube-system logs -l app.kubernetes.io/name=cali-node --tail 30 --prefix",
            "-n kube-system logs -l app.kubernetes.io/name=cali-controllers --tail 10 --prefix",
        ] {
            let said = told(self.server.kubectl().args(words.split(' ')), "");
            report += &format!("== kubectl {words}\n{}\n", said.unwrap_or_else(|said| said));
        }
        report += &self.server.logs();
        self.nodes.iter().for_each(|node| report += &node.logs());
        report
    }
}

fn running(pod: &Value) -> Option<RunningPod> {
    let conditions = pod["status"]["conditions"].as_array()?;
    let ready = conditions
        .iter()
        .any(|one| one["type"] == "Ready" && one["status"] == "True");
    let goes = !pod["metadata"]["deletionTimestamp"].is_null();
    if !ready || goes {
        return None;
    }
    let node = pod["spec"]["nodeName"].as_str()?;
    Some(RunningPod {
        name: pod["metadata"]["name"].as_str()?.to_owned(),
        node: NODES.iter().position(|name| *name == node)?,
        address: pod["status"]["podIP"].as_str()?.parse().ok()?,
    })
}

fn forward(host: &TestNs) {
    host.run("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
}
