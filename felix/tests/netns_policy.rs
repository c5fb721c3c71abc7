//! Policy conformance: cases as data, real packets, three answers that must agree.
//!
//! Each file of `tests/conformance` holds cases: namespaces, pods, objects, probes with the verdict
//! that the specification demands. Every probe is evaluated by `felix::verdict` and sent as a packet
//! through the rules of each backend (nf_tables, iptables-nft, iptables-legacy), over IPv4 and IPv6. From case to case the kernel is changed by one
//! transaction of the differences, so the planner is under test as well.
//!
//! Pods are numbered in the order in which a case lists them: the n-th has 10.65.0.n and fd65::n.
//! `world` is outside: 192.0.2.2 and 2001:db8::2.

mod policy_lab;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Revision};
use felix::calc::{Batch, Graph, Input};
use felix::compile::{Compiler, Program, plan_transaction};
use felix::iptables::Renderer;
use felix::verdict::{Model, Packet};
use policy_lab::{BACKENDS, Backend, Lab, Listener, Place, Probe, expected, listen, probe};
use serde::Deserialize;
use serde_json::{Value, json};

const NODE: &str = "node";
const WORLD: &str = "world";
/// More pods than any case has.
const PODS: u8 = 4;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct File {
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Case {
    name: String,
    #[serde(default)]
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: Vec<Pod>,
    #[serde(default)]
    objects: Vec<Value>,
    probes: Vec<ProbeText>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Pod {
    /// `namespace/name`.
    name: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Port names.
    #[serde(default)]
    ports: Vec<Value>,
    #[serde(default)]
    service_account: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ProbeText {
    from: String,
    to: String,
    /// `tcp:80`, `udp:53` or `ping`.
    what: String,
    #[serde(default)]
    source_port: u16,
    /// 4 or 6; both when absent.
    #[serde(default)]
    ip_version: Option<u8>,
    allowed: bool,
}

impl ProbeText {
    fn what(&self) -> Probe {
        let port = |text: &str| {
            text.parse()
                .unwrap_or_else(|_| panic!("bad port in {self:?}"))
        };
        match self.what.split_once(':') {
            Some(("tcp", number)) => Probe::Tcp(port(number)),
            Some(("udp", number)) => Probe::Udp(port(number)),
            _ if self.what == "ping" => Probe::Ping,
            _ => panic!("bad probe {self:?}"),
        }
    }

    fn packet(&self, from: &Place, to: &Place, v4: bool) -> Packet {
        self.what()
            .packet(from.address(v4), to.address(v4), self.source_port)
    }
}

impl Case {
    /// All objects as the graph gets them: native ones converted.
    fn objects(&self, lab: &Lab) -> Vec<Arc<AnyResource>> {
        let mut raw = Vec::new();
        for (name, labels) in &self.namespaces {
            raw.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}));
        }
        raw.push(json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"},
                        "spec": {"nftablesFilterDenyAction": "Reject"}}));
        raw.extend(self.objects.iter().cloned());
        for (pod, place) in self.pods.iter().zip(&lab.pods) {
            let (namespace, name) = pod.name.split_once('/').expect("namespace/name");
            raw.push(json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"namespace": namespace, "name": name, "labels": pod.labels},
                "spec": {"nodeName": NODE, "serviceAccountName": pod.service_account,
                         "containers": [{"name": "c", "ports": pod.ports}]},
                "status": {"phase": "Running", "podIP": place.v4, "podIPs": [{"ip": place.v4}, {"ip": place.v6}]},
            }));
        }
        let mut objects = Vec::new();
        for value in raw {
            let text = value.to_string();
            let object = AnyResource::from_json(value)
                .unwrap_or_else(|error| panic!("{}: {error}: {text}", self.name));
            let converted = cali_api::kubernetes::convert(&object);
            assert_eq!(converted.problems, Vec::<String>::new(), "{}", self.name);
            objects.extend(converted.resources);
        }
        for object in &mut objects {
            if let AnyResource::WorkloadEndpoint(endpoint) = object {
                let here = |place: &&Place| {
                    endpoint
                        .spec
                        .ip_networks
                        .iter()
                        .any(|net| net.contains(place.v4.into()))
                };
                endpoint.spec.interface_name = lab
                    .pods
                    .iter()
                    .find(here)
                    .expect("a place")
                    .interface
                    .clone();
            }
        }
        objects.into_iter().map(Arc::new).collect()
    }

    fn place<'a>(&self, lab: &'a Lab, name: &str) -> &'a Place {
        if name == WORLD {
            return &lab.world;
        }
        let number = self.pods.iter().position(|pod| pod.name == name);
        &lab.pods[number.unwrap_or_else(|| panic!("{}: no pod {name}", self.name))]
    }
}

/// Enforces the objects from nothing, by what differs from the case before.
fn enforce(lab: &mut Lab, objects: &[Arc<AnyResource>]) {
    match lab.backend {
        Backend::Nftables => lab.enforce(&compile(objects)),
        Backend::Iptables(_) => {
            let mut renderer = Renderer::default();
            renderer.apply(&first_batch(objects));
            lab.enforce_chains(renderer.program());
        }
    }
}

fn compile(objects: &[Arc<AnyResource>]) -> Program {
    let mut compiler = Compiler::default();
    compiler.apply(&first_batch(objects));
    compiler.program().clone()
}

fn first_batch(objects: &[Arc<AnyResource>]) -> Batch {
    let mut graph = Graph::new(NODE.into());
    let updates = objects.iter().map(|object| Update {
        key: object.key(),
        value: Some(object.clone()),
        revision: Revision::from("1"),
    });
    graph.handle(Input::Sync(SyncEvent::Updates(updates.collect())));
    graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
    graph.flush().expect("a first batch")
}

/// Runs a case; returns what did not agree.
fn run(lab: &mut Lab, case: &Case) -> Vec<String> {
    let objects = case.objects(lab);
    let model: Model = objects.iter().cloned().collect();
    enforce(lab, &objects);
    let lab = &*lab;
    let wanted: BTreeSet<(&str, Probe)> = case
        .probes
        .iter()
        .map(|probe| (probe.to.as_str(), probe.what()))
        .collect();
    let _listeners: Vec<Listener> = wanted
        .into_iter()
        .map(|(to, what)| listen(case.place(lab, to).ns.netns(), what))
        .collect();
    thread::scope(|scope| {
        let probes: Vec<_> = case
            .probes
            .iter()
            .flat_map(|text| [(text, true), (text, false)])
            .filter(|(text, v4)| text.ip_version.is_none_or(|only| (only == 4) == *v4))
            .map(|(text, v4)| {
                let (from, to) = (case.place(lab, &text.from), case.place(lab, &text.to));
                let (said, why) = expected(&model, &text.packet(from, to, v4));
                let sent = scope.spawn(move || {
                    probe(
                        from.ns.netns(),
                        to.address(v4),
                        text.what(),
                        text.source_port,
                    )
                });
                (text, v4, said, why, sent)
            })
            .collect();
        let mut failures = Vec::new();
        for (text, v4, said, why, sent) in probes {
            let kernel = sent.join().expect("a probe");
            if kernel != Ok(text.allowed) || said != text.allowed {
                failures.push(format!(
                    "{:?}: {}: {} -> {} {} over IPv{}: expected {}, model says {said} ({why}), kernel says {kernel:?}",
                    lab.backend,
                    case.name,
                    text.from,
                    text.to,
                    text.what,
                    if v4 { 4 } else { 6 },
                    text.allowed
                ));
            }
        }
        failures
    })
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance")
}

/// Runs all cases of a file on every backend, each in a lab of its own.
fn run_file(name: &str) {
    let path = folder().join(name);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file: File =
        serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let failures: Vec<String> = thread::scope(|scope| {
        let file = &file;
        let backends = BACKENDS.map(|backend| scope.spawn(move || run_cases(file, backend)));
        backends
            .into_iter()
            .flat_map(|backend| backend.join().expect("a backend"))
            .collect()
    });
    let probes: usize = file.cases.iter().map(|case| case.probes.len()).sum();
    eprintln!("{name}: {} cases, {probes} probes", file.cases.len());
    assert!(
        failures.is_empty(),
        "{} disagreements:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

fn run_cases(file: &File, backend: Backend) -> Vec<String> {
    let mut lab = Lab::with(PODS, backend);
    let mut failures = Vec::new();
    for case in &file.cases {
        let failed = run(&mut lab, case);
        if !failed.is_empty() {
            eprintln!("{}\n{}", failed.join("\n"), lab.ruleset());
        }
        failures.extend(failed);
    }
    failures
}

macro_rules! conformance {
    ($($test:ident: $file:literal),+ $(,)?) => {
        $(
            #[test]
            fn $test() {
                run_file($file);
            }
        )+

        #[test]
        fn every_file_of_cases_is_run() {
            let entries = std::fs::read_dir(folder()).expect("the cases");
            let found: BTreeSet<String> =
                entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
            assert_eq!(found, BTreeSet::from([$($file.to_owned()),+]));
        }
    };
}

conformance! {
    profiles_decide_without_policy: "basics.yaml",
    calico_policies_are_enforced: "calico.yaml",
    kubernetes_policies_are_enforced: "kubernetes.yaml",
    tiers_are_enforced: "tiers.yaml",
}

#[test]
fn what_a_stranger_changes_is_put_right_and_the_rest_is_left_alone() {
    let mut lab = Lab::new(2);
    let text = std::fs::read_to_string(folder().join("calico.yaml")).expect("the cases");
    let file: File = serde_saphyr::from_str(&text).expect("cases");
    let desired = compile(&file.cases[0].objects(&lab));
    lab.enforce(&desired);
    assert!(plan_transaction(&lab.listed(), &desired).is_empty());
    let chain = "cali-forward-to-wl";
    let handle = lab.listed().chains[chain].rules[1]
        .handle
        .expect("a handle")
        .to_string();
    for change in [
        vec!["delete", "rule", "inet", "calico", chain, "handle", &handle],
        vec!["insert", "rule", "inet", "calico", chain, "accept"],
        vec!["flush", "map", "inet", "calico", "cali-to-wl"],
        vec!["add", "chain", "inet", "calico", "stranger"],
    ] {
        lab.node.run("nft", &change);
        let listed = lab.listed();
        let plan = plan_transaction(&listed, &desired);
        assert_eq!(plan.transaction.len(), 1, "one message for {change:?}");
        lab.assume(listed);
        lab.enforce(&desired);
    }
}
