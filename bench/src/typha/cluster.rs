//! A large cluster: pods on nodes, each of one of many applications, and policies that let applications talk to a few others.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cali_api::update::Update;
use cali_api::{AnyResource, Kind, Revision};
use serde_json::{Value, json};

/// What the clients subscribe to.
pub const KINDS: [Kind; 5] = [
    Kind::Node,
    Kind::Tier,
    Kind::Profile,
    Kind::NetworkPolicy,
    Kind::WorkloadEndpoint,
];
const STAMP: &str = "bench/changed";

/// How much of everything there is.
#[derive(Debug, Clone, Copy)]
pub struct Cluster {
    /// Pods, spread evenly.
    pub pods: u32,
    /// Nodes.
    pub nodes: u32,
    /// Policies; each is of an application of its own.
    pub policies: u32,
    /// Policies are those of namespaces instead, which have ten applications each.
    pub namespaced: bool,
}

/// Pods, applications and policies of a namespace.
const PODS: u32 = 100;
const APPS: u32 = 10;
const POLICIES: u32 = 6;
/// One in so many pods is a proxy, which is let in everywhere.
const PROXIES: u32 = 500;

impl Cluster {
    /// All objects, in pieces.
    pub fn objects(self) -> impl Iterator<Item = Update> {
        let tier = json!({"apiVersion": "projectcalico.org/v3", "kind": "Tier",
            "metadata": {"name": "default"}, "spec": {"order": 1_000_000}});
        std::iter::once(tier)
            .chain((0..self.nodes).map(node))
            .chain((0..self.namespaces()).map(profile))
            .chain((0..self.policies()).map(move |number| {
                if self.namespaced {
                    in_namespace(number)
                } else {
                    self.policy(number)
                }
            }))
            .map(|manifest| update(manifest, 1))
            .chain((0..self.pods).map(move |number| self.pod(number, 1)))
    }

    const fn namespaces(self) -> u32 {
        self.pods.div_ceil(PODS)
    }

    /// Number of policies.
    #[must_use]
    pub const fn policies(self) -> u32 {
        if self.namespaced {
            self.namespaces() * POLICIES
        } else {
            self.policies
        }
    }

    /// The pods of an application are on many nodes, and those of a node are of many applications.
    fn app(self, pod: u32) -> u32 {
        let app = pod % self.nodes + pod / self.nodes;
        if self.namespaced {
            app % APPS
        } else {
            app % self.policies
        }
    }

    /// What the policies of a node's pods name, as if they held in every namespace: three applications for each pod.
    #[must_use]
    pub fn selectors(self, node: u32) -> BTreeSet<Arc<str>> {
        let pods = (node % self.nodes..self.pods).step_by(self.nodes as usize);
        pods.flat_map(|pod| (1..=3).map(move |offset| self.selector(self.app(pod) + offset).into()))
            .collect()
    }

    fn selector(self, app: u32) -> String {
        format!("app == 'app{}'", app % self.policies.max(1))
    }

    /// Name of a node.
    #[must_use]
    pub fn node_name(number: u32) -> String {
        format!("node{number}")
    }

    /// A pod, changed now.
    #[must_use]
    pub fn pod(self, number: u32, version: u64) -> Update {
        let node = Self::node_name(number % self.nodes);
        let [_, b, c, d] = number.to_be_bytes();
        let namespace = number / PODS;
        let mut manifest = json!({
            "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
            "metadata": {"namespace": format!("ns{namespace}"), "name": format!("{node}-k8s-pod--{number}-eth0"),
                "uid": format!("5b1f0000-0000-4000-8000-{number:012x}"),
                "labels": {"app": format!("app{}", self.app(number)), "pod-template-hash": format!("{:08x}", number / 7),
                    "projectcalico.org/namespace": format!("ns{namespace}"), "projectcalico.org/orchestrator": "k8s",
                    "projectcalico.org/serviceaccount": "default"},
                "annotations": {STAMP: now().as_nanos().to_string()}},
            "spec": {"orchestrator": "k8s", "node": node, "pod": format!("pod-{number}"), "endpoint": "eth0",
                "containerID": format!("{:064x}", u64::from(number) * 0x9e37_79b9), "interfaceName": format!("cali{number:011x}"),
                "serviceAccountName": "default",
                "ipNetworks": [format!("10.{b}.{c}.{d}/32")], "profiles": [format!("kns.ns{namespace}"), format!("ksa.ns{namespace}.default")]},
        });
        if self.namespaced && number.is_multiple_of(PROXIES) {
            manifest["metadata"]["labels"]["role"] = "proxy".into();
        }
        update(manifest, version)
    }

    fn policy(self, number: u32) -> Value {
        let app = |offset: u32| self.selector(number + offset);
        json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
        "metadata": {"namespace": format!("ns{}", number % self.namespaces()), "name": format!("default.p{number}")},
        "spec": {"selector": app(0), "types": ["Ingress", "Egress"],
            "ingress": [{"action": "Allow", "protocol": "TCP", "source": {"selector": app(1)}, "destination": {"ports": [8080, 9090]}},
                {"action": "Allow", "protocol": "TCP", "source": {"selector": app(2)}, "destination": {"ports": [8443]}}],
            "egress": [{"action": "Allow", "protocol": "TCP", "destination": {"selector": app(3), "ports": ["8000:8010"]}},
                {"action": "Allow", "protocol": "UDP", "destination": {"ports": [53]}}]}})
    }
}

/// A policy of a namespace: four let applications of it talk to each other, one lets the proxies in from everywhere, and one denies the rest.
fn in_namespace(number: u32) -> Value {
    let (namespace, which) = (number / POLICIES, number % POLICIES);
    let app = |number: u32| format!("app == 'app{}'", number % APPS);
    let spec = match which {
        0 => json!({"selector": "all()", "types": ["Ingress"], "ingress": []}),
        1 => {
            json!({"selector": app(0), "types": ["Ingress"], "ingress": [{"action": "Allow", "protocol": "TCP",
            "source": {"selector": "role == 'proxy'", "namespaceSelector": "all()"}, "destination": {"ports": [8080]}}]})
        }
        which => json!({"selector": app(which), "types": ["Ingress", "Egress"],
            "ingress": [{"action": "Allow", "protocol": "TCP", "source": {"selector": app(which + 3)}, "destination": {"ports": [8080, 9090]}}],
            "egress": [{"action": "Allow", "protocol": "TCP", "destination": {"selector": app(which + 5), "ports": [5432]}},
                {"action": "Allow", "protocol": "UDP", "destination": {"ports": [53]}}]}),
    };
    json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
        "metadata": {"namespace": format!("ns{namespace}"), "name": format!("default.p{which}")}, "spec": spec})
}

/// Time since 1970: the one clock that two processes share.
fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// How long ago an object, as JSON, was changed.
#[must_use]
pub fn changed_at(json: &[u8]) -> Option<Duration> {
    let value: Value = serde_json::from_slice(json).ok()?;
    let stamp = value["metadata"]["annotations"][STAMP].as_str()?;
    now().checked_sub(Duration::from_nanos(stamp.parse().ok()?))
}

fn update(manifest: Value, version: u64) -> Update {
    let value = match AnyResource::from_json(manifest) {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    };
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from(version.to_string()),
    }
}

fn node(number: u32) -> Value {
    let [_, b, c, d] = number.to_be_bytes();
    json!({"apiVersion": "projectcalico.org/v3", "kind": "Node",
        "metadata": {"name": Cluster::node_name(number), "labels": {"kubernetes.io/hostname": Cluster::node_name(number), "zone": format!("z{}", number % 3)}},
        "spec": {"bgp": {"ipv4Address": format!("172.{}.{c}.{d}/16", 16 + b), "ipv4IPIPTunnelAddr": format!("10.200.{c}.{d}")}}})
}

fn profile(number: u32) -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": "Profile",
        "metadata": {"name": format!("kns.ns{number}")},
        "spec": {"labelsToApply": {"pcns.projectcalico.org/name": format!("ns{number}")},
            "ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}})
}
