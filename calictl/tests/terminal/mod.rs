//! The built program in a folder and with a datastore of its own, and what was typed and printed so far.

// Each test binary uses a part of it.
#![allow(dead_code)]

pub(crate) mod kinds;
pub(crate) mod suite;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use cali_api::Kind;
use cali_datastore::Datastore;
use cali_ipam::{Allocator, Owner, Request};

pub(crate) struct Terminal {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) transcript: String,
    environment: Vec<(String, String)>,
    kubectl: Option<Kubectl>,
}

/// Applies a manifest as Kubernetes does; see [`Terminal::with_kubectl`].
type Kubectl = Box<dyn Fn(&str)>;

impl Terminal {
    /// With an embedded store in the folder, `cali.db`.
    pub(crate) fn new() -> Self {
        let mut terminal = Self {
            folder: tempfile::tempdir().expect("make a folder"),
            transcript: String::new(),
            environment: Vec::new(),
            kubectl: None,
        };
        let store = terminal.path("cali.db").display().to_string();
        terminal.environment = vec![
            ("DATASTORE_TYPE".to_owned(), "sqlite".to_owned()),
            ("CALI_SQLITE_PATH".to_owned(), store),
        ];
        terminal
    }

    /// From now on, another datastore.
    pub(crate) fn uses(&mut self, environment: &[(&str, &str)]) -> &mut Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.environment = environment.iter().map(owned).collect();
        self
    }

    /// The datastore is a cluster of Kubernetes, whose own objects are made so.
    pub(crate) fn with_kubectl(&mut self, kubectl: impl Fn(&str) + 'static) {
        self.kubectl = Some(Box::new(kubectl));
    }

    /// A node of the cluster, with an address.
    pub(crate) fn joins(&mut self, node: &str) {
        let number = node.trim_start_matches('n');
        if let Some(kubectl) = &self.kubectl {
            kubectl(&format!(
                "{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}"
            ));
        }
        let manifest = format!(
            "{{apiVersion: projectcalico.org/v3, kind: Node, metadata: {{name: {node}}}, spec: {{bgp: {{ipv4Address: 10.0.1.{number}/24}}}}}}"
        );
        self.file("node.yaml", &manifest);
        self.prints("apply -f node.yaml");
    }

    /// A pod of the namespace `shop`, with a label `app` that says its name.
    pub(crate) fn runs(&mut self, pod: &str, node: &str, address: &str) {
        if let Some(kubectl) = &self.kubectl {
            kubectl(&format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: {pod}, namespace: shop, labels: {{app: {pod}}}, \
                 annotations: {{cni.projectcalico.org/podIP: {address}/32}}}}, \
                 spec: {{nodeName: {node}, containers: [{{name: c, image: i}}]}}}}"
            ));
            return;
        }
        // As Kubernetes' pods get theirs: of the hash of namespace and name.
        let interface = match pod {
            "api" => "cali50d8cbfc60a",
            "db" => "cali2d7243dcff6",
            other => panic!("the interface of the pod {other} is not known here"),
        };
        self.file(
            "pod.yaml",
            &format!(
                "apiVersion: projectcalico.org/v3\nkind: Profile\nmetadata: {{name: kns.shop}}\n\
                 spec: {{ingress: [{{action: Allow}}], egress: [{{action: Allow}}]}}\n---\n\
                 apiVersion: projectcalico.org/v3\nkind: WorkloadEndpoint\n\
                 metadata: {{name: {node}-k8s-{pod}-eth0, namespace: shop, labels: {{app: {pod}, \
                 projectcalico.org/namespace: shop, projectcalico.org/orchestrator: k8s, \
                 projectcalico.org/serviceaccount: default}}}}\n\
                 spec: {{orchestrator: k8s, node: {node}, pod: {pod}, endpoint: eth0, interfaceName: {interface}, \
                 ipNetworks: [{address}/32], profiles: [kns.shop]}}\n"
            ),
        );
        self.prints("apply -f pod.yaml");
    }

    /// An empty datastore again, but for what only Kubernetes has.
    pub(crate) fn clears(&mut self) {
        self.transcript.clear();
        runtime().block_on(async {
            let store = self.store();
            let kinds = Kind::ALL.iter().copied();
            for kind in kinds.filter(|kind| !kind.is_native() && store.is_stored(*kind)) {
                for item in store.list(kind, None).await.expect("a list").items {
                    let key = item.object.key();
                    store.delete(&key, None).await.expect("deleted");
                }
            }
        });
    }

    /// The datastore of the commands. Inside a runtime.
    fn store(&self) -> Arc<dyn Datastore> {
        let value = |name: &str| {
            let mut pairs = self.environment.iter();
            pairs.find_map(|(known, value)| (known == name).then(|| value.clone()))
        };
        cali_datastore::open_with(value).expect("open")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn file(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("write a file");
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_calictl"));
        command
            .args(args)
            .current_dir(self.folder.path())
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// What a line does, without writing it down.
    pub(crate) fn output(&self, line: &str) -> Output {
        let (variables, args, file) = parts(line);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = self
            .command(&args)
            .envs(variables)
            .output()
            .expect("start calictl");
        if let Some(file) = file {
            std::fs::write(self.path(&file), &output.stdout).expect("write a file");
        }
        output
    }

    /// What a line prints; it must succeed.
    pub(crate) fn prints(&self, line: &str) -> String {
        let output = self.output(line);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "calictl {line}\n{said}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Types a line; words are separated by blanks, quotes keep them together. Variables come before it, `> FILE` at its end.
    pub(crate) fn types(&mut self, line: &str) -> &mut Self {
        let output = self.output(line);
        let said = if line.contains(" > ") {
            output.stderr
        } else {
            [output.stdout, output.stderr].concat()
        };
        let said = String::from_utf8_lossy(&said);
        let (variables, rest) = match parts(line).0.len() {
            0 => (String::new(), line),
            count => {
                let at = line
                    .match_indices(' ')
                    .nth(count - 1)
                    .map_or(0, |(at, _)| at + 1);
                (line[..at].to_owned(), &line[at..])
            }
        };
        let _ = write!(self.transcript, "$ {variables}calictl {rest}\n{said}");
        if let Some(code) = output.status.code().filter(|code| *code != 0) {
            let _ = writeln!(self.transcript, "[exit code {code}]");
        }
        self
    }

    /// The transcript without what differs from run to run.
    pub(crate) fn transcript(&self) -> String {
        let folder = self.folder.path().display().to_string();
        let lines = self.transcript.replace(&folder, "FOLDER");
        let changing = [
            "uid:",
            "resourceVersion:",
            "creationTimestamp:",
            "\"uid\":",
            "\"resourceVersion\":",
            "\"creationTimestamp\":",
        ];
        lines
            .lines()
            .filter(|line| {
                !changing
                    .iter()
                    .any(|word| line.trim_start().starts_with(word))
            })
            .map(|line| format!("{line}\n"))
            .collect()
    }

    /// Names and texts of the pieces of an archive, without its folder.
    pub(crate) fn unpacks(&self, archive: &str) -> BTreeMap<String, String> {
        let folder = self.path(&format!("{archive}.d"));
        std::fs::create_dir(&folder).expect("a folder");
        let done = Command::new("tar")
            .args(["--strip-components=1", "-xzf"])
            .arg(self.path(archive))
            .arg("-C")
            .arg(&folder)
            .status();
        assert!(done.expect("start tar").success());
        let mut found = BTreeMap::new();
        let mut folders = vec![folder.clone()];
        while let Some(inner) = folders.pop() {
            for entry in std::fs::read_dir(inner).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text =
                    String::from_utf8_lossy(&std::fs::read(&path).expect("a piece")).into_owned();
                let name = path.strip_prefix(&folder).expect("inside");
                found.insert(name.display().to_string(), text);
            }
        }
        found
    }

    /// Every kind of Calico, and a pod's address, in the embedded store of the folder.
    pub(crate) fn fills(&self, node: &str, pod: &str) {
        self.prints(&format!("apply -f {}", kinds::FOLDER));
        self.file(
            "pool.yaml",
            "{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: plain}, spec: {cidr: 10.40.0.0/16}}",
        );
        self.prints("apply -f pool.yaml");
        self.gives_address(node, pod);
    }

    /// A pod's address of this node.
    pub(crate) fn gives_address(&self, node: &str, pod: &str) {
        self.tries_address(node, pod).expect("an address");
    }

    /// The same, where it may be refused.
    pub(crate) fn tries_address(&self, node: &str, pod: &str) -> Result<(), cali_ipam::Error> {
        runtime().block_on(async { give_address(self.store(), node, pod).await })
    }
}

/// Resources written, shown in every format, changed and deleted: word for word the same on every datastore.
pub(crate) fn session(terminal: &mut Terminal) {
    terminal.file("session.yaml", SESSION);
    terminal
        .types("apply -f session.yaml --dry-run")
        .types("create -f session.yaml")
        .types("create -f session.yaml")
        .types("create -f session.yaml --skip-exists")
        .types("validate -f session.yaml")
        .types("replace -f session.yaml")
        .types("apply -f session.yaml")
        .types("get ippools")
        .types("get ippools -o wide")
        .types("get ippool v4 -o yaml --export")
        .types("get ippools -o json --export -l team=net")
        .types("get networkpolicies -n shop -o wide")
        .types("get -f session.yaml")
        .types("get bgppeers -o go-template='{{range .items}}{{.spec.peerIP}} {{end}}'")
        .types("get bgppeers -o jsonpath='{.items[*].spec.asNumber}'")
        .types("get bgppeers -o custom-columns=PEER:.spec.peerIP")
        .types("get ippools --field spec.vxlanMode=Never -o name")
        .types("get ippool nosuch")
        .types("label ippool v6 team=web")
        .types("label ippool v6 team=net --overwrite")
        .types("label ippool v6 team --remove")
        .types("patch ippool v4 -p '{\"spec\":{\"natOutgoing\":false}}'")
        .types("patch ippool v4 -p '{\"spec\":{\"cidr\":\"10.31.0.0/16\"}}'")
        .types("ipam configure --strictaffinity true")
        .types("ipam show --show-configuration")
        .types("ipam show")
        .types("datastore lock")
        .types("datastore unlock")
        .types("delete ippool v6 nosuch")
        .types("delete -f session.yaml -s")
        .types("get ippools -o name");
    // One file for all: what differs between datastores is a fault.
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_snapshot_path("../snapshots");
    settings.bind(|| insta::assert_snapshot!("session", terminal.transcript()));
}

const SESSION: &str = "\
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v4, labels: {team: net}}
spec: {cidr: 10.30.0.0/16, vxlanMode: CrossSubnet, natOutgoing: true}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v6}
spec: {cidr: 'fd00:30::/48'}
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {name: tor}
spec: {peerIP: 10.0.0.254, asNumber: 64600}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: deny-db, namespace: shop}
spec: {selector: tier == 'db', types: [Ingress], ingress: [{action: Deny}]}
";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

async fn give_address(
    store: Arc<dyn Datastore>,
    node: &str,
    pod: &str,
) -> Result<(), cali_ipam::Error> {
    let allocator = Allocator::with_system_time(store, node);
    let owner = Owner::new(&format!("k8s-pod-network.{pod}"))
        .with("node", node)
        .with("namespace", "default")
        .with("pod", pod)
        .with("timestamp", "2026-01-01T00:00:00Z");
    allocator
        .assign(&Request::workload(owner, 1, 0))
        .await
        .map(drop)
}

/// Variables before a command, its words, and the file that its output goes to.
fn parts(line: &str) -> (Vec<(String, String)>, Vec<String>, Option<String>) {
    let mut words = words(line);
    let file = match words.iter().position(|word| word == ">") {
        Some(at) => {
            let file = words.pop();
            words.truncate(at);
            file
        }
        None => None,
    };
    let is_name = |name: &str| {
        name.chars()
            .all(|letter| letter.is_ascii_uppercase() || letter.is_ascii_digit() || letter == '_')
    };
    let mut variables = Vec::new();
    while let Some((name, value)) = words.first().and_then(|word| word.split_once('=')) {
        if !is_name(name) {
            break;
        }
        variables.push((name.to_owned(), value.to_owned()));
        words.remove(0);
    }
    (variables, words, file)
}

fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().expect("there is a word").push(letter),
        }
    }
    words
}
