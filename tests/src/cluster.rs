//! A cluster with one real node: a real API server with the repository's manifests applied, the node's host as a network namespace, and the
//! built programs with the accounts, the roles and the settings that the manifests give them.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use cali_api::schema::Group;
use cali_datastore::testing::ApiServer;
use cali_netlink::testing::TestNs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::cni::Runtime;
use crate::lab::{programs, repository};
use crate::relay::Relay;

/// The node.
pub const NODE: &str = "node1";
/// The accounts of the manifests.
pub const ACCOUNTS: [&str; 3] = ["cali-node", "cali-typha", "cali-controllers"];
/// Objects of kinds that have just been defined are accepted once the API server serves these.
const DEFINED: Duration = Duration::from_secs(60);

/// The API server's name for an account of the manifests.
#[must_use]
pub fn user(account: &str) -> String {
    format!("system:serviceaccount:kube-system:{account}")
}

/// The cluster. Everything ends with it.
#[derive(Debug)]
pub struct Cluster {
    programs: Vec<(String, Child)>,
    /// Calls the plugin; pods are of namespace `shop`.
    pub runtime: Runtime,
    /// The API server.
    pub server: ApiServer,
    /// The node's host, with the address 192.0.2.1.
    pub host: TestNs,
    _outside: TestNs,
    _relay: Relay,
    folder: tempfile::TempDir,
    group: Group,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, child) in &mut self.programs {
            // It may be gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
        // What outlives its parent: `bgpd`.
        for pid in self.host.pids() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// What the API server has to have before any program starts: the node and, as DaemonSets make it, the pod to which its token is bound.
const FIRST: &str = r#"
{apiVersion: v1, kind: Node, metadata: {name: node1, labels: {rack: a}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: web}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: agent, namespace: kube-system}, spec: {nodeName: node1, hostNetwork: true, serviceAccountName: cali-node, containers: [{name: a, image: a}]}}
"#;

/// The kinds of `policy.networking.k8s.io`, which a cluster has where somebody installs them; as far as that they are there.
const CLUSTER_POLICIES: [(&str, &str, &str); 3] = [
    ("ClusterNetworkPolicy", "clusternetworkpolicies", "v1alpha2"),
    ("AdminNetworkPolicy", "adminnetworkpolicies", "v1alpha1"),
    (
        "BaselineAdminNetworkPolicy",
        "baselineadminnetworkpolicies",
        "v1alpha1",
    ),
];

impl Cluster {
    /// With Calico's kinds in this group. What the manifests' accounts ask for is written down.
    ///
    /// # Panics
    /// If something cannot be started, or the API server refuses a manifest.
    pub async fn new(group: Group) -> Self {
        let users = ACCOUNTS.map(user);
        let server = ApiServer::start_audited(&users.each_ref().map(String::as_str)).await;
        let (host, outside) = (TestNs::new("kubehost"), TestNs::new("kubeout"));
        host.veth("eth0", &outside, "far").await;
        host.ip("link set eth0 up");
        host.ip("address add 192.0.2.1/24 dev eth0");
        outside.ip("address add 192.0.2.2/24 dev far");
        let folder = tempfile::tempdir().expect("a folder");
        let cluster = Self {
            programs: Vec::new(),
            runtime: Runtime::new(folder.path(), "shop"),
            _relay: Relay::start(host.netns(), server.port()),
            server,
            host,
            _outside: outside,
            folder,
            group,
        };
        cluster.install().await;
        cluster.apply(FIRST);
        cluster
    }

    /// The repository's manifests, without what would run containers.
    async fn install(&self) {
        let definitions = match self.group {
            Group::V3 => "crds/v3.yaml",
            Group::V1 => "crds/v1.yaml",
        };
        let base = [
            "accounts.yaml",
            "roles.yaml",
            "certificates.yaml",
            "own-objects.yaml",
        ];
        let mut words = ["apply", "--server-side"].map(str::to_owned).to_vec();
        let files = base.map(|name| format!("kubernetes/base/{name}"));
        for file in [definitions.to_owned()].into_iter().chain(files) {
            let path = repository().join("deploy").join(file);
            words.extend(["-f".to_owned(), path.display().to_string()]);
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.kubectl(&words, "");
        let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let definitions = CLUSTER_POLICIES.map(|(kind, plural, version)| {
            json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
                "metadata": {"name": format!("{plural}.policy.networking.k8s.io"),
                    "annotations": {"api-approved.kubernetes.io": "unapproved"}},
                "spec": {"group": "policy.networking.k8s.io", "scope": "Cluster",
                    "names": {"kind": kind, "plural": plural},
                    "versions": [{"name": version, "served": true, "storage": true,
                        "schema": {"openAPIV3Schema": open}}]}})
        });
        self.server.define(&definitions).await;
    }

    /// A manifest whose `apiVersion` is `API` where that of Calico's kinds stands, with the one of this cluster; and `LIVES` for an
    /// affinity's field `deleted`, which is a text in one of them.
    #[must_use]
    pub fn manifest(&self, text: &str) -> String {
        let (group, version) = self.group.parts();
        let lives = match self.group {
            Group::V3 => "false",
            Group::V1 => "'false'",
        };
        text.replace(
            "apiVersion: API,",
            &format!("apiVersion: {group}/{version},"),
        )
        .replace("LIVES", lives)
    }

    /// What kubectl says; this must succeed.
    ///
    /// # Panics
    /// With kubectl's words, if it does not.
    pub fn kubectl(&self, words: &[&str], input: &str) -> String {
        let said = self.server.kubectl_says(words, input);
        said.unwrap_or_else(|said| panic!("kubectl {words:?}: {said}\n{input}"))
    }

    /// Applies a manifest as a user does, and again while its kind is so new that it is not served yet.
    ///
    /// # Panics
    /// If it is refused.
    pub fn apply(&self, text: &str) {
        let end = Instant::now() + DEFINED;
        loop {
            let Err(said) = self.tries(text) else { return };
            let waits = said.contains("no matches for kind")
                || said.contains("could not find the requested resource");
            assert!(waits && Instant::now() < end, "{said}\n{text}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What kubectl says to a manifest.
    ///
    /// # Errors
    /// If it is refused, why.
    pub fn tries(&self, text: &str) -> Result<String, String> {
        let words = ["apply", "--server-side", "--validate=false", "-f", "-"];
        self.server.kubectl_says(&words, &self.manifest(text))
    }

    /// An object as the API server has it: `get("pod", "web", Some("shop"))`.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn get(&self, words: &str) -> Value {
        let words: Vec<&str> = words.split(' ').chain(["-o", "json"]).collect();
        let text = self.kubectl(&[&["get"], &words[..]].concat(), "");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The settings that the manifests give to every program.
    fn settings() -> Vec<(String, String)> {
        let file = repository().join("deploy/kubernetes/base/cali.env");
        let text = std::fs::read_to_string(file).expect("the settings of the manifests");
        text.lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    /// Starts a built program on the node's host under an account of the manifests.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(&mut self, program: &str, account: &str, environment: &[(&str, &str)]) {
        let pod = (account == "cali-node").then_some("agent");
        let kubeconfig = self.server.account(account, pod, self.folder.path());
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file(program))
            .expect("a log");
        let mut command = self.host.netns().command(programs().join(program));
        self.runtime
            .folders(&mut command)
            .envs(Self::settings())
            .env("KUBECONFIG", kubeconfig)
            .env("NO_COLOR", "1")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = command.spawn().expect("start a program");
        self.programs.push((program.to_owned(), child));
    }

    /// A folder with what a pod finds of its account: its token, whom it may trust, and its namespace.
    ///
    /// # Panics
    /// If the account has no token, or a file cannot be written.
    #[must_use]
    pub fn account_of_pod(&self, account: &str) -> PathBuf {
        let pod = (account == "cali-node").then_some("agent");
        let kubeconfig = self.server.account(account, pod, self.folder.path());
        let config = std::fs::read(kubeconfig).expect("a kubeconfig");
        let config: Value = serde_json::from_slice(&config).expect("JSON");
        let text = |pointer: &str| {
            let value = config.pointer(pointer).and_then(Value::as_str);
            value.expect("a text in the kubeconfig").to_owned()
        };
        let trusted = text("/clusters/0/cluster/certificate-authority");
        let trusted = std::fs::read_to_string(trusted).expect("a certificate");
        let folder = self.folder.path().join("accounts").join(account);
        std::fs::create_dir_all(&folder).expect("a folder");
        for (name, content) in [
            ("token", text("/users/0/user/token")),
            ("ca.crt", trusted),
            ("namespace", "kube-system".to_owned()),
        ] {
            std::fs::write(folder.join(name), content).expect("a file");
        }
        folder
    }

    /// The folder of everything of this cluster; `run` and `lib` in it are the node's.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Starts `cali-node`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_node(&mut self) {
        // The host's own programs and container runtime are none of this test's.
        let own = [("NODENAME", NODE), ("CALI_CNI_INSTALL", "false")];
        self.start("cali-node", "cali-node", &own);
    }

    /// Starts `cali-controllers`, which takes the lead soon after another's end.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_controllers(&mut self) {
        let own = [("CALI_CONTROLLERS_LEASE_SECONDS", "2")];
        self.start("cali-controllers", "cali-controllers", &own);
    }

    /// Kills a program: `SIGKILL`.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&mut self, program: &str) {
        let at = self.programs.iter().position(|(name, _)| name == program);
        let (_, mut child) = self
            .programs
            .remove(at.expect("a program that was started"));
        let ended = child.try_wait().expect("the state of a child");
        assert!(
            ended.is_none(),
            "{program}: {ended:?}\n{}",
            self.log(program)
        );
        child.kill().expect("end a program");
        child.wait().expect("the end of a program");
    }

    fn log_file(&self, program: &str) -> PathBuf {
        self.folder.path().join(format!("{program}.log"))
    }

    /// The end of what a program has said.
    #[must_use]
    pub fn log(&self, program: &str) -> String {
        let text = std::fs::read_to_string(self.log_file(program)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}
