//! A cluster as the datastore tells of it, in the shape of the benchmark that Felix has for itself: namespaces of 100 pods with
//! ten applications each, four policies in each namespace.
//!
//! A policy selects one application. It allows ingress from two applications of its namespace and from everybody of the
//! team, each to ports of its own, and egress to one application.

use std::sync::Arc;

use cali_api::update::Update;
use cali_api::{AnyResource, Revision};
use serde_json::{Value, json};

/// The node under test.
pub const NODE: &str = "here";
const PODS_PER_NAMESPACE: u32 = 100;
const POLICIES_PER_NAMESPACE: u32 = 4;
const APPS: u32 = 10;
/// Namespaces of a team.
const TEAM: u32 = 25;

/// How much of everything there is.
#[derive(Debug, Clone, Copy)]
pub struct Cluster {
    /// Pods in the cluster, the local ones among them.
    pub pods: u32,
    /// Pods on the node under test.
    pub local: u32,
}

impl Cluster {
    /// How many policies it has.
    #[must_use]
    pub const fn policies(&self) -> u32 {
        self.namespaces() * POLICIES_PER_NAMESPACE
    }

    const fn namespaces(&self) -> u32 {
        self.pods.div_ceil(PODS_PER_NAMESPACE)
    }

    /// Local pods are spread over the namespaces.
    const fn is_local(&self, pod: u32) -> bool {
        pod.is_multiple_of(self.pods / self.local)
    }

    /// Everything but the pods.
    pub fn policy_objects(&self) -> impl Iterator<Item = Update> {
        let tier = json!({"apiVersion": "projectcalico.org/v3", "kind": "Tier",
            "metadata": {"name": "default"}, "spec": {"order": 1_000_000}});
        let namespaces = (0..self.namespaces()).map(namespace);
        let policies = (0..self.policies()).map(policy);
        [tier]
            .into_iter()
            .chain(namespaces)
            .chain(policies)
            .map(|manifest| update(&manifest))
    }

    /// All pods.
    pub fn pods(self) -> impl Iterator<Item = Update> {
        (0..self.pods).map(move |pod| self.pod(pod, pod % APPS))
    }

    /// One pod, as part of an application.
    #[must_use]
    pub fn pod(&self, pod: u32, app: u32) -> Update {
        let (namespace, number) = (pod / PODS_PER_NAMESPACE, pod % PODS_PER_NAMESPACE);
        let [_, b, c, d] = pod.to_be_bytes();
        let node = if self.is_local(pod) { NODE } else { "there" };
        update(&json!({
            "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
            "metadata": {"namespace": format!("ns{namespace}"), "name": format!("{node}-k8s-pod{number}-eth0"),
                "labels": {"app": format!("a{app}"), "version": "v1"}},
            "spec": {"orchestrator": "k8s", "node": node, "pod": format!("pod{number}"), "endpoint": "eth0",
                "interfaceName": format!("cali{pod:08x}"), "ipNetworks": [format!("10.{b}.{c}.{d}/32")],
                "profiles": [format!("kns.ns{namespace}")]},
        }))
    }

    /// A pod that is on another node and whose application local pods talk to.
    #[must_use]
    pub const fn remote_neighbour(&self, number: u32) -> u32 {
        let local = (number % self.local) * (self.pods / self.local);
        local + 1 + number % (APPS - 1)
    }

    /// A local pod.
    #[must_use]
    pub const fn local_pod(&self, number: u32) -> u32 {
        (number % self.local) * (self.pods / self.local)
    }
}

fn update(manifest: &Value) -> Update {
    let value = match AnyResource::from_json(manifest.clone()) {
        Ok(value) => value,
        Err(error) => panic!("{error}: {manifest}"),
    };
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from("1"),
    }
}

/// A namespace is a profile.
fn namespace(number: u32) -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": "Profile",
        "metadata": {"name": format!("kns.ns{number}")},
        "spec": {"labelsToApply": {"pcns.team": format!("t{}", number / TEAM)},
            "ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}})
}

fn policy(number: u32) -> Value {
    let (namespace, which) = (
        number / POLICIES_PER_NAMESPACE,
        number % POLICIES_PER_NAMESPACE,
    );
    let app = |offset: u32| format!("app == 'a{}'", (which + offset) % APPS);
    let port = 8000 + which;
    json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
    "metadata": {"namespace": format!("ns{namespace}"), "name": format!("default.p{which}")},
    "spec": {"selector": app(0), "types": ["Ingress", "Egress"],
        "ingress": [
            {"action": "Allow", "protocol": "TCP", "source": {"selector": app(1)}, "destination": {"ports": [port, 9090]}},
            {"action": "Allow", "protocol": "TCP", "source": {"selector": app(2)}, "destination": {"ports": [port]}},
            {"action": "Allow", "protocol": "TCP",
                "source": {"namespaceSelector": format!("team == 't{}'", namespace / TEAM)},
                "destination": {"ports": [443]}}],
        "egress": [
            {"action": "Allow", "protocol": "TCP", "destination": {"selector": app(3), "ports": ["8000:8010"]}},
            {"action": "Allow", "protocol": "UDP", "destination": {"ports": [53]}}]}})
}
