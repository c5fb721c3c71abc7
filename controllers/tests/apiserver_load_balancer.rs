//! Addresses of LoadBalancer services with a real API server: two replicas of the real program under the account of
//! `deploy/kubernetes`, one of which is killed.
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::schema::{Group, defined, definition};
use cali_api::{AnyResource, Key, Kind};
use cali_controllers::check::check;
use cali_controllers::load_balancer::plan::shown;
use cali_datastore::Datastore;
use cali_datastore::kubernetes::Kubernetes;
use cali_datastore::testing::ApiServer;
use cali_ipam::Allocator;
use serde_json::{Value, json};

const BOUND: Duration = Duration::from_secs(90);
const ROLES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../deploy/kubernetes/base/roles.yaml"
);

struct Replica(Child);

impl Drop for Replica {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Cluster {
    server: ApiServer,
    folder: tempfile::TempDir,
    store: Arc<dyn Datastore>,
}

impl Cluster {
    async fn new() -> Self {
        let server = ApiServer::start().await;
        let definitions: Vec<Value> = defined()
            .map(|kind| definition(kind, Group::ALL[0]))
            .collect();
        server.define(&definitions).await;
        server.namespace("shop").await;
        let store = Arc::new(Kubernetes::new(server.settings()));
        let cluster = Self {
            server,
            folder: tempfile::tempdir().unwrap(),
            store,
        };
        cluster.kubectl(&["apply", "-n", "kube-system", "-f", ROLES], "");
        cluster
    }

    fn kubectl(&self, words: &[&str], input: &str) -> String {
        let said = self.server.kubectl_says(words, input);
        said.unwrap_or_else(|said| panic!("{words:?}: {said}"))
    }

    fn apply(&self, object: &Value) {
        self.kubectl(&["apply", "-f", "-"], &object.to_string());
    }

    fn service(&self, name: &str, annotations: &Value, class: Option<&str>) {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop", "annotations": annotations},
            "spec": {"type": "LoadBalancer", "selector": {"app": name}, "ports": [{"port": 80}]}
        });
        if let Some(class) = class {
            object["spec"]["loadBalancerClass"] = json!(class);
        }
        self.apply(&object);
    }

    async fn setting(&self, assign: &str) {
        let setting = AnyResource::from_json(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "KubeControllersConfiguration", "metadata": {"name": "default"},
            "spec": {"controllers": {"node": {"leakGracePeriod": "2s"}, "loadBalancer": {"assignIPs": assign}}}
        }));
        self.store.apply(setting.unwrap()).await.unwrap();
    }

    /// As the deployment's account, which may do what its role says.
    fn kubeconfig(&self) -> PathBuf {
        let text = std::fs::read_to_string(self.server.kubeconfig()).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["users"][0]["user"]["as"] =
            json!("system:serviceaccount:kube-system:cali-controllers");
        let path = self.folder.path().join("kubeconfig");
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    fn replica(&self, name: &str) -> Replica {
        let log = std::fs::File::create(self.folder.path().join(name)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_cali-controllers"))
            .args(["--name", name, "--lease-seconds", "2"])
            .env("DATASTORE_TYPE", "kubernetes")
            .env("KUBECONFIG", self.kubeconfig())
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Replica(child)
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(Path::new(self.folder.path()).join(name)).unwrap_or_default()
    }

    async fn shows(&self, name: &str) -> Vec<IpAddr> {
        let key = Key::namespaced(Kind::K8sService, "shop", name);
        match self.store.get(&key).await {
            Ok(found) => match found.object.as_ref() {
                AnyResource::K8sService(service) => shown(service),
                other => panic!("{other:?}"),
            },
            Err(_) => Vec::new(),
        }
    }

    /// Waits until the service shows so many addresses.
    async fn eventually(&self, name: &str, count: usize) -> Vec<IpAddr> {
        let end = Instant::now() + BOUND;
        loop {
            let seen = self.shows(name).await;
            if seen.len() == count {
                return seen;
            }
            let logs = [self.log("one"), self.log("two")].join("\n");
            assert!(Instant::now() < end, "{name} shows {seen:?}\n{logs}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until so many addresses are held in all, and nothing is wrong with them.
    async fn held(&self, count: usize) {
        let allocator = Allocator::with_system_time(Arc::clone(&self.store), "");
        let end = Instant::now() + BOUND;
        loop {
            let inventory = allocator.inventory().await.unwrap();
            let held: Vec<_> = inventory
                .blocks
                .iter()
                .flat_map(|block| block.held())
                .collect();
            let facts = cali_controllers::facts::Facts::read(self.store.as_ref())
                .await
                .unwrap();
            let problems = check(&inventory, &facts).problems;
            // A leader that lost its lease in the middle of an assignment leaves a handle for the garbage collection.
            if held.len() == count && problems.is_empty() && inventory.handles.len() == count {
                let ours =
                    |owner: &cali_ipam::Owner| owner.attribute("type") == Some("loadBalancer");
                assert!(held.iter().all(|(_, owner)| ours(owner)), "{held:#?}");
                return;
            }
            assert!(Instant::now() < end, "{held:#?}\n{problems:#?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_get_keep_and_give_back_their_addresses_through_the_leaders_end() {
    let cluster = Cluster::new().await;
    for (name, cidr, uses) in [
        ("lb", "203.0.113.0/26", json!(["LoadBalancer"])),
        ("lb2", "203.0.113.64/26", json!(["LoadBalancer"])),
        ("pods", "10.65.0.0/24", json!(["Workload"])),
    ] {
        let object = AnyResource::from_json(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": name},
            "spec": {"cidr": cidr, "allowedUses": uses, "ipipMode": "Never", "vxlanMode": "Never", "nodeSelector": "all()"}
        }));
        cluster.store.apply(object.unwrap()).await.unwrap();
    }
    cluster.setting("AllServices").await;
    let one = cluster.replica("one");
    let none = json!({});
    cluster.service("web", &none, None);
    let first = cluster.eventually("web", 1).await;
    let _two = cluster.replica("two");

    // What a service asks for.
    cluster.service(
        "pool",
        &json!({"projectcalico.org/ipv4pools": "[\"lb2\"]"}),
        None,
    );
    cluster.service(
        "exact",
        &json!({"projectcalico.org/loadBalancerIPs": "[\"203.0.113.9\"]"}),
        None,
    );
    cluster.service("other", &none, Some("example.com/other"));
    let pool = cluster.eventually("pool", 1).await;
    assert!(
        pool[0]
            .to_string()
            .parse::<std::net::Ipv4Addr>()
            .unwrap()
            .octets()[3]
            >= 64,
        "{pool:?}"
    );
    assert_eq!(
        cluster.eventually("exact", 1).await,
        ["203.0.113.9".parse::<IpAddr>().unwrap()]
    );

    // What cannot be had is said beside the service.
    let taken = json!({"projectcalico.org/loadBalancerIPs": "[\"203.0.113.9\"]"});
    cluster.service("late", &taken, None);
    let end = Instant::now() + BOUND;
    loop {
        let events = cluster.kubectl(&["get", "events", "-A", "-o", "json"], "");
        if events.contains("203.0.113.9 is in use") {
            break;
        }
        assert!(Instant::now() < end, "{events}\n{}", cluster.log("one"));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(cluster.shows("late").await.is_empty());
    cluster.held(3).await;

    // The other replica goes on, and nothing that is shown changes.
    drop(one);
    cluster.service("more", &none, None);
    cluster.eventually("more", 1).await;
    assert_eq!(cluster.shows("web").await, first);

    // Given back: to whoever waits for it.
    cluster.kubectl(&["-n", "shop", "delete", "service", "exact"], "");
    cluster.eventually("late", 1).await;
    let turned = json!({"spec": {"type": "ClusterIP"}}).to_string();
    cluster.kubectl(
        &["-n", "shop", "patch", "service", "more", "-p", &turned],
        "",
    );
    cluster.held(3).await;
    assert!(cluster.shows("other").await.is_empty());

    // Only those that ask from now on.
    cluster.setting("RequestedServicesOnly").await;
    cluster.eventually("web", 0).await;
    cluster.held(2).await;
    cluster.kubectl(&["-n", "shop", "delete", "service", "--all"], "");
    cluster.held(0).await;
    let end = Instant::now() + BOUND;
    loop {
        let blocks = cluster
            .store
            .list(Kind::IPAMBlock, None)
            .await
            .unwrap()
            .items;
        if blocks.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "{blocks:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
