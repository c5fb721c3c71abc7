//! The conformance lab with one backend, as tests use it that look into the kernel themselves.

// Each test file uses its part of the lab.
#![allow(dead_code, unused_imports)]

use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Revision};
use cali_netlink::NetNs;
use felix::calc::{Batch, Graph, Input};
use felix::compile::{Compiler, Program};
use felix::conformance::{Backend, IptablesChains, Nftables, compile_batch};
pub(crate) use felix::conformance::{Lab as Places, Listener, Place, Probe, listen};
use felix::dataplane::{State, StatusSink, Variant};
use felix::iptables::{self, Renderer};
use serde_json::{Value, json};

/// Who does not listen to the dataplane.
pub(crate) struct Quiet;

impl StatusSink for Quiet {
    fn on_state(&mut self, _: &Arc<State>) {}
}

/// An object as the stream of changes brings it.
pub(crate) fn set(value: Value) -> Update {
    let object = AnyResource::from_json(value).expect("an object");
    Update {
        key: object.key(),
        value: Some(Arc::new(object)),
        revision: Revision::from("1"),
    }
}

/// The first batch for these pods, all allowed everything, and these objects.
pub(crate) fn batch(pods: &[Place], objects: &[Value]) -> Batch {
    let mut all = objects.to_vec();
    all.push(open());
    all.extend(pods.iter().map(endpoint));
    let mut graph = Graph::new("node".into());
    for value in all {
        graph.on_update(set(value));
    }
    graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
    graph.flush().expect("a first batch")
}

/// The profile that allows everything.
pub(crate) fn open() -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": "Profile", "metadata": {"name": "open"},
           "spec": {"ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}})
}

/// A pod of the lab as the datastore has it, allowed everything.
pub(crate) fn endpoint(place: &Place) -> Value {
    json!({
        "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
        "metadata": {"namespace": "default", "name": format!("node-k8s-{}-eth0", place.interface)},
        "spec": {"node": "node", "orchestrator": "k8s", "endpoint": "eth0", "interfaceName": place.interface,
                 "ipNetworks": [format!("{}/32", place.v4), format!("{}/128", place.v6)], "profiles": ["open"]},
    })
}

/// What enforces policy in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    Nftables,
    Iptables(Variant),
}

pub(crate) const BACKENDS: [By; 3] = [
    By::Nftables,
    By::Iptables(Variant::Nft),
    By::Iptables(Variant::Legacy),
];

enum Rules {
    Nftables(Nftables),
    Iptables(Box<IptablesChains>),
}

/// A node, its pods and the world, and its rules.
pub(crate) struct Lab {
    pub(crate) by: By,
    places: Places,
    rules: Rules,
}

impl Deref for Lab {
    type Target = Places;

    fn deref(&self) -> &Places {
        &self.places
    }
}

impl Lab {
    pub(crate) fn new(pods: u8) -> Self {
        Self::with(pods, By::Nftables)
    }

    pub(crate) fn with(pods: u8, by: By) -> Self {
        let places = Places::new(pods);
        let netns = places.node.netns().clone();
        let rules = match by {
            By::Nftables => Rules::Nftables(Nftables::new(netns).expect("open nf_tables")),
            By::Iptables(variant) => {
                let chains = IptablesChains::new(netns, variant).expect("adopt the chains");
                Rules::Iptables(Box::new(chains))
            }
        };
        Self { by, places, rules }
    }

    fn nftables(&mut self) -> &mut Nftables {
        match &mut self.rules {
            Rules::Nftables(rules) => rules,
            Rules::Iptables(_) => panic!("a lab of iptables"),
        }
    }

    /// Brings the kernel to a program with one transaction, and reads back that it is there.
    pub(crate) fn enforce(&mut self, desired: &Program) {
        if let Err(problem) = self.nftables().enforce_program(desired) {
            panic!("{problem}:\n{}", self.ruleset());
        }
    }

    /// Brings the kernel to chains and sets, and reads back that they are there.
    pub(crate) fn enforce_chains(&mut self, desired: &iptables::Program) {
        let Rules::Iptables(rules) = &mut self.rules else {
            panic!("a lab of nf_tables")
        };
        if let Err(problem) = rules.enforce_program(desired) {
            panic!("{problem}:\n{}", self.ruleset());
        }
    }

    /// Brings the kernel to what these objects say, by whatever enforces policy here.
    pub(crate) fn enforce_objects(&mut self, objects: &[Value]) {
        let objects: Vec<Arc<AnyResource>> = objects
            .iter()
            .map(|value| Arc::new(AnyResource::from_json(value.clone()).expect("an object")))
            .collect();
        let batch = compile_batch(&objects).expect("a batch");
        match self.by {
            By::Nftables => {
                let mut compiler = Compiler::default();
                compiler.apply(&batch);
                self.enforce(compiler.program());
            }
            By::Iptables(_) => {
                let mut renderer = Renderer::default();
                renderer.apply(&batch);
                self.enforce_chains(renderer.program());
            }
        }
    }

    /// Takes a dump for what is in the kernel.
    pub(crate) fn assume(&mut self, listed: Program) {
        self.nftables().assume(listed);
    }

    pub(crate) fn listed(&self) -> Program {
        match &self.rules {
            Rules::Nftables(rules) => rules.listed().expect("list the table"),
            Rules::Iptables(_) => panic!("a lab of iptables"),
        }
    }

    /// What the programs themselves make of the rules: for messages of failed tests.
    pub(crate) fn ruleset(&self) -> String {
        match &self.rules {
            Rules::Nftables(rules) => rules.dump(),
            Rules::Iptables(rules) => rules.dump(),
        }
    }
}

/// Whether the other end answers; an error when neither an answer nor a refusal comes.
pub(crate) fn probe(ns: &NetNs, to: IpAddr, what: Probe, source_port: u16) -> Result<bool, String> {
    felix::conformance::probe(ns, to, what, source_port, false).verdict(false)
}
