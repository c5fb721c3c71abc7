//! A node for the tests of the plugin: a namespace as the host, a store, the reserve, the server with a sink that only
//! writes routes, and the real executable.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind};
use cali_cni::server::{Endpoint, EndpointSink, Leaving, NotProgrammed, Server, Settings};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_datastore::testing::Switched;
use cali_ipam::Allocator;
use cali_ipam::reserve::Keeper;
use cali_netlink::testing::TestNs;
use cali_netlink::{Change, IpNetwork, Netlink, Route};
use serde_json::{Value, json};

pub(crate) const NODE: &str = "node1";
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Routes instead of policy.
pub(crate) struct Sink {
    host: Netlink,
    pub(crate) up: Mutex<BTreeMap<Key, Endpoint>>,
    pub(crate) refuses: Mutex<bool>,
    pub(crate) not_ready: Mutex<bool>,
}

fn routes(addresses: impl IntoIterator<Item = IpAddr>, index: u32) -> Vec<Route> {
    addresses
        .into_iter()
        .map(|a| Route::on_device(IpNetwork::from(a), 80, index))
        .collect()
}

fn addresses(endpoint: &Endpoint) -> Vec<IpAddr> {
    endpoint
        .workload
        .spec
        .ip_networks
        .iter()
        .map(|c| c.addr())
        .collect()
}

#[async_trait]
impl EndpointSink for Sink {
    async fn endpoint_up(&self, endpoint: Endpoint) -> Result<(), NotProgrammed> {
        if *self.refuses.lock().unwrap() {
            return Err(NotProgrammed("the test says no".to_owned()));
        }
        let changes: Vec<_> = routes(addresses(&endpoint), endpoint.host_index)
            .into_iter()
            .map(Change::Replace)
            .collect();
        for result in self.host.apply_routes(&changes) {
            result.map_err(|e| NotProgrammed(e.to_string()))?;
        }
        self.up
            .lock()
            .unwrap()
            .insert(endpoint.workload.key(), endpoint);
        Ok(())
    }

    async fn endpoint_down(&self, leaving: Leaving) -> Result<(), NotProgrammed> {
        if let Some(endpoint) = self.up.lock().unwrap().remove(&leaving.key) {
            let changes: Vec<_> = routes(addresses(&endpoint), endpoint.host_index)
                .into_iter()
                .map(Change::Delete)
                .collect();
            // Routes go with their interface too.
            let _ = self.host.apply_routes(&changes);
        }
        Ok(())
    }

    fn ready(&self) -> Result<(), NotProgrammed> {
        if *self.not_ready.lock().unwrap() {
            Err(NotProgrammed("not yet".to_owned()))
        } else {
            Ok(())
        }
    }
}

/// The node.
pub(crate) struct Node {
    pub(crate) host: TestNs,
    /// What the server works with; the test's own view of it is there always.
    pub(crate) switch: Arc<Switched>,
    pub(crate) store: Arc<dyn Datastore>,
    pub(crate) keeper: Keeper,
    pub(crate) sink: Arc<Sink>,
    folder: tempfile::TempDir,
    server: Option<Server>,
}

impl Node {
    pub(crate) async fn new(label: &str) -> Self {
        Self::with_reserve(label, None).await
    }

    /// With so many addresses in the reserve.
    pub(crate) async fn with_reserve(label: &str, reserve: Option<usize>) -> Self {
        let host = TestNs::new(label);
        host.run("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Datastore> =
            Arc::new(Sqlite::open(&folder.path().join("cali.db")).unwrap());
        for (name, cidr) in [
            ("overlay", "10.65.0.0/24"),
            ("routed", "10.66.0.0/24"),
            ("six", "fd00:65::/112"),
        ] {
            store
                .create(object(json!({
                    "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
                    "metadata": {"name": name}, "spec": {"cidr": cidr}
                })))
                .await
                .unwrap();
        }
        let switch = Switched::new(Arc::clone(&store));
        let keeper = open_keeper(&switch, folder.path(), reserve).await;
        let sink = Arc::new(Sink {
            host: host.netlink().clone(),
            up: Mutex::default(),
            refuses: Mutex::default(),
            not_ready: Mutex::default(),
        });
        let mut node = Self {
            host,
            switch,
            store,
            keeper,
            sink,
            folder,
            server: None,
        };
        node.start();
        node
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub(crate) fn start(&mut self) {
        let mut settings = Settings::new(NODE);
        settings.socket = self.folder.path().join("run/cni.sock");
        settings.state_dir = self.state_dir();
        settings.wait_for_pod = Duration::from_secs(1);
        let host = self.host.netlink().clone();
        let sink: Arc<dyn EndpointSink> = self.sink.clone();
        let server = Server::start(
            settings,
            self.switch.clone(),
            self.keeper.clone(),
            host,
            sink,
        )
        .unwrap();
        self.server = Some(server);
    }

    /// Starts it so that the kernel refuses it the removal of interfaces: threads have the privileges of the one that starts
    /// them, and removal has a thread of its own from the start.
    pub(crate) fn start_unable_to_remove(&mut self) {
        use caps::{CapSet, Capability::CAP_NET_ADMIN};
        caps::drop(None, CapSet::Effective, CAP_NET_ADMIN).unwrap();
        self.start();
        caps::raise(None, CapSet::Effective, CAP_NET_ADMIN).unwrap();
    }

    pub(crate) fn stop(&mut self) {
        self.server = None;
    }

    /// Puts a pod into the datastore.
    pub(crate) async fn pod(&self, name: &str, annotations: Value) {
        self.store.apply(object(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "test", "annotations": annotations, "labels": {"app": name}},
            "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "i"}]}
        }))).await.unwrap();
    }

    /// The pod's annotations in the datastore.
    pub(crate) async fn annotations(&self, name: &str) -> BTreeMap<String, String> {
        let key = Key::namespaced(Kind::K8sPod, "test", name);
        self.store
            .get(&key)
            .await
            .unwrap()
            .object
            .metadata()
            .annotations
            .clone()
    }

    /// Runs the executable.
    pub(crate) fn call(&self, call: &Call<'_>) -> Answer {
        call.run(self.folder.path())
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

async fn open_keeper(store: &Arc<Switched>, folder: &Path, reserve: Option<usize>) -> Keeper {
    let allocator = Allocator::with_system_time(store.clone(), NODE);
    let mut settings = cali_ipam::reserve::Settings::new(folder.join("state/journal"));
    if let Some(reserve) = reserve {
        settings.keep(reserve);
    }
    Keeper::open(allocator, settings).await.unwrap()
}

pub(crate) fn object(value: Value) -> AnyResource {
    AnyResource::from_json(value).unwrap()
}

/// One execution of the plugin.
#[derive(Debug, Clone)]
pub(crate) struct Call<'a> {
    pub(crate) program: &'a str,
    pub(crate) command: &'a str,
    pub(crate) container: &'a str,
    pub(crate) netns: &'a str,
    pub(crate) ifname: &'a str,
    pub(crate) pod: &'a str,
    pub(crate) config: Value,
}

pub(crate) fn config() -> Value {
    json!({"cniVersion": "1.1.0", "name": "k8s-pod-network", "type": "calico", "ipam": {"type": "calico-ipam"}})
}

impl<'a> Call<'a> {
    pub(crate) fn new(command: &'a str, pod: &'a str, container: &'a str, netns: &'a str) -> Self {
        Self {
            program: env!("CARGO_BIN_EXE_calico"),
            command,
            container,
            netns,
            ifname: "eth0",
            pod,
            config: config(),
        }
    }

    /// Sets one key of the configuration.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    fn run(&self, folder: &Path) -> Answer {
        let mut command = Command::new(self.program);
        command
            .env_clear()
            .env("CALI_RUN_DIR", folder.join("run"))
            .env("CALI_STATE_DIR", folder.join("state"))
            .env("CNI_COMMAND", self.command)
            .env("CNI_CONTAINERID", self.container)
            .env("CNI_IFNAME", self.ifname)
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if !self.netns.is_empty() {
            command.env("CNI_NETNS", Path::new("/run/netns").join(self.netns));
        }
        if !self.pod.is_empty() {
            let args = format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=test;K8S_POD_NAME={}",
                self.pod
            );
            command.env("CNI_ARGS", args);
        }
        let mut child = command.spawn().unwrap();
        // A text is given as it is: for what is no JSON.
        let given = match &self.config {
            Value::String(text) => text.clone(),
            config => config.to_string(),
        };
        // A plugin that fails early does not read its input.
        let _ = child.stdin.take().unwrap().write_all(given.as_bytes());
        let output = child.wait_with_output().unwrap();
        Answer {
            success: output.status.success(),
            printed: serde_json::from_slice(&output.stdout).unwrap_or(Value::Null),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// What the plugin printed.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) success: bool,
    pub(crate) printed: Value,
    pub(crate) stderr: String,
}

impl Answer {
    pub(crate) fn ok(self) -> Value {
        assert!(self.success, "{self:?}");
        self.printed
    }

    /// The code of the error object.
    pub(crate) fn code(&self) -> u64 {
        assert!(!self.success, "it should have failed: {self:?}");
        self.printed["code"]
            .as_u64()
            .unwrap_or_else(|| panic!("no error object: {self:?}"))
    }
}

pub(crate) fn address(result: &Value, index: usize) -> IpAddr {
    let text = result["ips"][index]["address"]
        .as_str()
        .unwrap_or_else(|| panic!("no address in {result}"));
    text.split('/').next().unwrap().parse().unwrap()
}

/// How long it takes until so many bytes have come in at the other end.
pub(crate) fn transfer(from: &TestNs, to: &TestNs, at: IpAddr, bytes: usize) -> Duration {
    let listener = to
        .netns()
        .run(move || TcpListener::bind((at, 0)).unwrap())
        .unwrap();
    let at = listener.local_addr().unwrap();
    let mut stream = from
        .netns()
        .run(move || TcpStream::connect_timeout(&at, PATIENCE).unwrap())
        .unwrap();
    let started = Instant::now();
    let sender = std::thread::spawn(move || stream.write_all(&vec![7; bytes]).unwrap());
    let (mut incoming, _) = listener.accept().unwrap();
    let mut all = Vec::new();
    incoming.read_to_end(&mut all).unwrap();
    sender.join().unwrap();
    assert_eq!(all.len(), bytes);
    started.elapsed()
}

/// Waits until the condition holds.
pub(crate) async fn soon(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("{what} did not happen"));
}

/// [`Node::call`] from another thread.
pub(crate) fn run_in(folder: &Path, call: &Call<'_>) -> Answer {
    call.run(folder)
}
