//! One node with the whole daemon as it is built, on a datastore of its own, for the plugin to be called on.

use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use cali_api::AnyResource;
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_netlink::testing::{TestNs, eventually};
use serde_json::{Value, json};

use super::{LIMIT, Runtime, told};
use crate::lab::programs;

/// Name of the node.
pub const NODE: &str = "node1";
/// Kubernetes' namespace of its pods.
pub const NAMESPACE: &str = "test";

/// A node with its daemon, and somebody beyond its link.
pub struct Node {
    /// Namespace of the host, 192.0.2.1.
    pub host: TestNs,
    /// Somebody beyond its link, 192.0.2.2.
    pub outside: TestNs,
    /// What calls the plugin.
    pub runtime: Runtime,
    store: Arc<dyn Datastore>,
    daemon: Option<Child>,
    folder: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Node {
    /// A node with one pool, 10.65.0.0/24, whose daemon is not started yet.
    ///
    /// # Panics
    /// If it cannot be made.
    pub async fn new() -> Self {
        let (host, outside) = (TestNs::new("cnihost"), TestNs::new("cniout"));
        host.veth("eth0", &outside, "far").await;
        host.ip("link set eth0 up");
        host.ip("address add 192.0.2.1/24 dev eth0");
        outside.ip("address add 192.0.2.2/24 dev far");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Sqlite::open(&folder.path().join("cali.db")).expect("a store");
        let node = Self {
            host,
            outside,
            runtime: Runtime::new(folder.path(), NAMESPACE),
            folder,
            store: Arc::new(store),
            daemon: None,
        };
        for object in [
            json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool",
                "metadata": {"name": "pods"}, "spec": {"cidr": "10.65.0.0/24"}}),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        ] {
            node.put(object).await;
        }
        node
    }

    /// Puts an object into the datastore.
    ///
    /// # Panics
    /// If it is not taken.
    pub async fn put(&self, value: Value) {
        let object = AnyResource::from_json(value).expect("an object");
        self.store.apply(object).await.expect("the store takes it");
    }

    /// Puts a pod of this node into the datastore, labelled with its name as application.
    ///
    /// # Panics
    /// If it is not taken.
    pub async fn pod(&self, name: &str) {
        self.put(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name}},
            "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "i"}]}
        }))
        .await;
    }

    /// Starts the daemon.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .expect("a log");
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
        self.daemon = Some(command.spawn().expect("start cali-node"));
    }

    /// Ends the daemon with `SIGKILL`.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// What the daemon has said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The folder of everything of this node.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// [`Runtime::call`].
    pub fn plugin(&self, command: &str, name: &str, pod: &TestNs, more: &Value) -> Child {
        self.runtime.call(command, name, pod, more)
    }

    /// [`Runtime::add`].
    pub fn add(&self, name: &str, pod: &TestNs, more: &Value) -> IpAddr {
        self.runtime.add(name, pod, more, || self.log())
    }

    /// What `calictl` says.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn calictl(&self, args: &[&str]) -> String {
        let output = Command::new(programs().join("calictl"))
            .args(args)
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", self.folder.path().join("cali.db"))
            .env("NO_COLOR", "1")
            .output();
        told(&output.expect("run calictl"))
    }

    /// Waits until `calictl ipam check` finds nothing.
    ///
    /// # Panics
    /// If it goes on finding something.
    pub fn is_consistent(&self) {
        eventually(LIMIT, || {
            let told = self.calictl(&["ipam", "check"]);
            if told.contains("found 0 problems") {
                Ok(())
            } else {
                Err(format!("{told}\n{}", self.log()))
            }
        });
    }

    /// Whether the host gets an answer to one ping.
    #[must_use]
    pub fn host_reaches(&self, to: IpAddr) -> bool {
        let args = ["-c1", "-W1", &to.to_string()];
        self.host.output("ping", &args).status.success()
    }
}
