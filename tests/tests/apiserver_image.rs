//! The image as the manifests run it, in containers of `runc`, on a real API server: each container with the account, the user, the
//! capabilities, the mounts and the read-only root that its pod has there. These suffice, and each of `cali-node`'s is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use cali_api::schema::Group;
use cali_datastore::Datastore;
use cali_datastore::kubernetes::Kubernetes;
use cali_netlink::testing::{TestNs, eventually};
use cali_tests::cluster::{Cluster, NODE};
use cali_tests::container::specification::Pod;
use cali_tests::container::{Container, Runtime};
use cali_tests::lab::repository;
use cali_tests::traffic;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// The capabilities of `cali-node`, with their numbers (`include/uapi/linux/capability.h`).
const CAPABILITIES: [(&str, u32); 3] = [
    ("NET_ADMIN", 12),
    ("SYS_ADMIN", 21),
    ("NET_BIND_SERVICE", 10),
];

/// What the kernel says to those who may not.
const REFUSALS: [&str; 3] = [
    "Operation not permitted",
    "Permission denied",
    "Read-only file system",
];

const PODS: &str = r#"
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {nodeName: node1, containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: early, namespace: shop}, spec: {nodeName: node1, containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, namespace: shop}, spec: {nodeName: node1, containers: [{name: c, image: i}]}}
"#;

const CLOSED: &str = r#"
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: shop}, spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}}
"#;

/// A cluster, and the containers of its node.
struct Node {
    cluster: Cluster,
    runtime: Runtime,
    objects: Vec<Value>,
    settings: BTreeMap<String, BTreeMap<String, String>>,
    secrets: BTreeMap<String, PathBuf>,
    started: u32,
}

impl Node {
    /// With an overlay of the manifests, and a variant of the image.
    async fn new(overlay: &str, variant: Option<&str>) -> Self {
        let mut cluster = Cluster::new(Group::V3).await;
        let overlay = repository()
            .join("deploy/kubernetes/overlays")
            .join(overlay);
        let text = cluster.kubectl(&["kustomize", &overlay.display().to_string()], "");
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).expect("documents in YAML");
        let maps = objects.iter().filter(|one| one["kind"] == "ConfigMap");
        let settings = maps.map(|map| {
            let name = map["metadata"]["name"].as_str().unwrap_or_default();
            let data = map["data"].as_object().into_iter().flatten();
            let data = data
                .map(|(name, value)| (name.clone(), value.as_str().expect("a text").to_owned()));
            (name.to_owned(), data.collect())
        });
        let settings = settings.collect();
        let runtime = Runtime::new(variant);
        // What calls the plugin knows the node's folders by these.
        for (path, own) in [("var/run/calico", "run"), ("var/lib/calico", "lib")] {
            let (path, own) = (runtime.host_root().join(path), cluster.folder().join(own));
            std::fs::create_dir_all(&own).expect("a folder");
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::os::unix::fs::symlink(own, path).expect("a link");
        }
        let plugin = runtime.host_root().join("opt/cni/bin/calico");
        cluster.runtime.call_program(plugin);
        cluster.apply(PODS);
        Self {
            cluster,
            runtime,
            objects,
            settings,
            secrets: BTreeMap::new(),
            started: 0,
        }
    }

    /// `spec` of a pod of the manifests.
    fn pod(&self, name: &str) -> Value {
        let named =
            |one: &&Value| one["metadata"]["name"] == name && one["spec"]["template"].is_object();
        let found = self.objects.iter().find(named).expect("a workload");
        found["spec"]["template"]["spec"].clone()
    }

    /// Starts the container of such a pod.
    fn start(&mut self, pod: &Value) -> Container {
        self.started += 1;
        let name = pod["serviceAccountName"].as_str().expect("an account");
        let account = self.cluster.account_of_pod(name);
        let pod = Pod {
            spec: pod,
            node: NODE,
            settings: &self.settings,
            secrets: &self.secrets,
            account: &account,
            server_port: self.cluster.server.port(),
        };
        let id = format!("{name}-{}-{}", std::process::id(), self.started);
        self.runtime.start(&id, &self.cluster.host, &pod)
    }

    /// Waits until it says all of this.
    fn until(
        &self,
        container: &Container,
        what: &str,
        mut wanted: impl FnMut() -> Result<(), String>,
    ) {
        eventually(LIMIT, || {
            wanted().map_err(|error| format!("{what}: {error}\n{}", container.log()))
        });
    }

    /// Takes the policy away that closes a pod.
    fn open(&self) {
        let words = "-n shop delete networkpolicies.networking.k8s.io web";
        let words: Vec<&str> = words.split(' ').collect();
        self.cluster.kubectl(&words, "");
    }

    fn speaks_bgp(&self) -> Result<(), String> {
        let port = SocketAddr::from(([192, 0, 2, 1], 179));
        let open = self
            .cluster
            .host
            .netns()
            .run(move || TcpStream::connect_timeout(&port, Duration::from_secs(1)));
        open.map_err(|error| error.to_string())?
            .map(drop)
            .map_err(|error| error.to_string())
    }
}

/// The pod without one capability.
fn without_capability(pod: &Value, name: &str) -> Value {
    let mut less = pod.clone();
    let all = &mut less["containers"][0]["securityContext"]["capabilities"]["add"];
    let all = all.as_array_mut().expect("capabilities");
    all.retain(|one| one != name);
    less
}

/// The pod without what is mounted there.
fn without_mount(pod: &Value, path: &str) -> Value {
    let mut less = pod.clone();
    let all = less["containers"][0]["volumeMounts"]
        .as_array_mut()
        .expect("mounts");
    let before = all.len();
    all.retain(|one| one["mountPath"] != path);
    assert_eq!(all.len() + 1, before, "{path} is mounted");
    less
}

/// It ends by itself, saying this.
fn ends_with(node: &Node, container: &mut Container, words: &str) {
    eventually(LIMIT, || match container.ended() {
        None => Err(container.log()),
        Some(status) => {
            assert!(!status.success(), "{}", container.log());
            Ok(())
        }
    });
    assert!(
        container.log().contains(words),
        "{words}: {}",
        container.log()
    );
    assert!(node.speaks_bgp().is_err());
}

fn says(node: &Node, container: &Container, words: &str) {
    node.until(container, words, || match container.log().contains(words) {
        true => Ok(()),
        false => Err("no word of it".to_owned()),
    });
}

/// Plugin and list are on the host.
fn has_plugin(node: &Node, container: &Container) {
    let list = node
        .runtime
        .host_root()
        .join("etc/cni/net.d/10-calico.conflist");
    node.until(container, "the list of plugins", || match list.exists() {
        true => Ok(()),
        false => Err("is not there".to_owned()),
    });
}

fn each_privilege_is_needed(node: &mut Node, pod: &Value) {
    let named: BTreeSet<&str> = CAPABILITIES.iter().map(|(name, _)| *name).collect();
    let security = &pod["containers"][0]["securityContext"];
    let granted = security["capabilities"]["add"]
        .as_array()
        .expect("capabilities");
    let granted: BTreeSet<&str> = granted.iter().filter_map(Value::as_str).collect();
    assert_eq!(granted, named);
    assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
    for name in ["NET_ADMIN", "SYS_ADMIN"] {
        let mut container = node.start(&without_capability(pod, name));
        ends_with(
            node,
            &mut container,
            "this host lacks root privileges (CAP_NET_ADMIN and CAP_SYS_ADMIN)",
        );
    }
    let container = node.start(&without_mount(pod, "/host/proc/sys/net"));
    says(
        node,
        &container,
        "mount the host's /proc/sys/net at /host/proc/sys/net",
    );
    drop(container);
    // Two that have nothing to do with each other.
    let less = without_mount(&without_capability(pod, "NET_BIND_SERVICE"), "/run/netns");
    let container = node.start(&less);
    says(node, &container, "Permission denied");
    assert!(node.speaks_bgp().is_err());
    has_plugin(node, &container);
    let early = TestNs::new("imagepod");
    let (runtime, host) = (&node.cluster.runtime, &node.cluster.host);
    runtime.add("early", &early, &json!({}), || container.log());
    host.ip("link set eth0 mtu 1400");
    says(node, &container, "the pod keeps its MTU on its own side");
    host.ip("link set eth0 mtu 1500");
    runtime.del("early", &early);
}

/// The bits of `/proc/PID/status`.
fn confined(container: &Container, capabilities: u64, user: &str) {
    let status = container.status();
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(status[set], format!("{capabilities:016x}"), "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["Seccomp"], "2", "a filter");
    assert_eq!(status["Uid"].split_whitespace().next(), Some(user));
}

/// Two pods of the node.
struct Pods {
    client: TestNs,
    web: TestNs,
    address: IpAddr,
}

impl Pods {
    fn new(node: &Node, container: &Container) -> Self {
        let (client, web) = (TestNs::new("imagepod"), TestNs::new("imagepod"));
        let add = |name: &str, pod: &TestNs| {
            node.cluster
                .runtime
                .add(name, pod, &json!({}), || container.log())
        };
        let address = add("web", &web);
        add("client", &client);
        traffic::greet(web.netns(), 80);
        Self {
            client,
            web,
            address,
        }
    }

    fn connected(&self) -> bool {
        traffic::asked(self.client.netns(), SocketAddr::new(self.address, 80)).is_some()
    }

    /// Waits until the client reaches the other, or does not.
    fn reach(&self, node: &Node, container: &Container, wanted: bool) {
        node.until(container, "a connection", || {
            match self.connected() == wanted {
                true => Ok(()),
                false => Err(format!("is not {wanted}")),
            }
        });
    }
}

fn they_suffice(node: &mut Node, pod: &Value) {
    let mut container = node.start(pod);
    node.until(&container, "readiness", || container.ready());
    let bits = CAPABILITIES.iter().map(|(_, number)| 1_u64 << number).sum();
    confined(&container, bits, "0");
    has_plugin(node, &container);
    let pods = Pods::new(node, &container);
    assert!(
        pods.address.to_string().starts_with("10.42."),
        "{}",
        pods.address
    );
    pods.reach(node, &container, true);
    node.until(&container, "BGP's port", || node.speaks_bgp());
    // The pool's encapsulation, and the MTU that follows from it, on both ends; then a smaller one, for pods that run.
    node.cluster.host.ip("link show vxlan.calico");
    for (underlay, inner) in [("1500", "mtu 1450"), ("1400", "mtu 1350")] {
        node.cluster
            .host
            .ip(&format!("link set eth0 mtu {underlay}"));
        node.until(&container, "the pod's MTU", || {
            let link = pods.web.ip("link show eth0");
            if link.contains(inner) {
                Ok(())
            } else {
                Err(link)
            }
        });
    }
    node.cluster.apply(CLOSED);
    pods.reach(node, &container, false);
    let said = container
        .exec(&["/calictl", "node", "status"])
        .expect("calictl in the container");
    assert!(said.contains("Calico process is running"), "{said}");
    // While there is no container, what was written stays; the next one takes it up.
    container.kill();
    assert!(!pods.connected(), "policy is gone with the container");
    node.open();
    let next = node.start(pod);
    node.until(&next, "readiness", || next.ready());
    pods.reach(node, &next, true);
    node.until(&next, "BGP's port", || node.speaks_bgp());
    node.cluster.runtime.del("client", &pods.client);
    assert!(!pods.connected());
    for container in [&container, &next] {
        let log = container.log();
        let refused = log
            .lines()
            .find(|line| REFUSALS.iter().any(|one| line.contains(one)));
        assert_eq!(refused, None, "{log}");
    }
}

/// The others need nothing of the kernel: they are nobody, and may do nothing.
async fn controllers_and_typha_need_none(node: &mut Node) {
    let controllers = node.start(&node.pod("cali-controllers"));
    let store = Kubernetes::new(node.cluster.server.settings());
    let folder = node.cluster.folder().join("typha-certs");
    std::fs::create_dir(&folder).expect("a folder");
    let end = std::time::Instant::now() + LIMIT;
    let certificates = loop {
        if let Ok(Some(values)) = store.secret("kube-system", "typha-certs").await
            && values.contains_key("tls.key")
        {
            break values;
        }
        assert!(std::time::Instant::now() < end, "{}", controllers.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    confined(&controllers, 0, "65532");
    for (name, value) in certificates {
        std::fs::write(folder.join(name), value).expect("a file");
    }
    node.secrets.insert("typha-certs".to_owned(), folder);
    let typha = node.start(&node.pod("cali-typha"));
    node.until(&typha, "readiness", || typha.ready());
    confined(&typha, 0, "65532");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_image_runs_with_the_privileges_of_its_manifests_and_each_is_needed() {
    let mut node = Node::new("k3s", None).await;
    let pod = node.pod("cali-node");
    each_privilege_is_needed(&mut node, &pod);
    they_suffice(&mut node, &pod);
    controllers_and_typha_need_none(&mut node).await;
}

/// The variant with iptables' programs, whose legacy ones need one more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_variant_with_iptables_enforces_policy_with_its_own_programs() {
    let mut node = Node::new("iptables", Some("iptables")).await;
    let pod = node.pod("cali-node");
    for (backend, program) in [
        ("Legacy", "iptables-legacy-save"),
        ("NFT", "iptables-nft-save"),
    ] {
        for map in node.settings.values_mut() {
            map.insert("FELIX_IPTABLESBACKEND".to_owned(), backend.to_owned());
        }
        if backend == "Legacy" {
            let container = node.start(&without_capability(&pod, "NET_RAW"));
            says(
                &node,
                &container,
                "iptables-restore: unable to initialize table",
            );
        }
        let mut container = node.start(&pod);
        node.until(&container, "readiness", || container.ready());
        has_plugin(&node, &container);
        let pods = Pods::new(&node, &container);
        pods.reach(&node, &container, true);
        node.cluster.apply(CLOSED);
        pods.reach(&node, &container, false);
        let rules = container
            .exec(&[&format!("/usr/sbin/{program}")])
            .expect("the rules");
        assert!(rules.contains("cali-"), "{program}: {rules}");
        node.open();
        pods.reach(&node, &container, true);
        for name in ["web", "client"] {
            let pod = if name == "web" {
                &pods.web
            } else {
                &pods.client
            };
            node.cluster.runtime.del(name, pod);
        }
        container.kill();
    }
}
