//! Who uses an address that somebody holds? Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use cali_api::v3::{Affinity, AffinityType};
use cali_ipam::tunnel::Tunnel;
use cali_ipam::{Owner, names};
use serde::Serialize;

use crate::facts::{Facts, PodFacts, PodName};

/// Handle of the addresses that Calico keeps free in each block for Windows nodes.
pub(crate) const WINDOWS_HANDLE: &str = "windows-reserved-ipam-handle";

/// Why an address is in use, or is not ours to judge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Use {
    /// A pod has it, or is about to.
    Pod(PodName),
    /// A workload endpoint has it.
    Endpoint(String),
    /// A tunnel device of a live node.
    Tunnel(String),
    /// A live node keeps it ready.
    Reserve(String),
    /// A live node that keeps a journal answers for it.
    Journal(String),
    /// It does not say whose it is, or who that is cannot be looked up here.
    Unclassified,
}

/// Why nobody uses an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase", tag = "reason")]
pub enum Orphan {
    /// Its node was deleted.
    NodeGone {
        /// The node.
        node: String,
    },
    /// Its pod was deleted, or has ended.
    PodGone {
        /// Namespace and name.
        pod: String,
    },
    /// Its pod has been made anew: on another node, or with other addresses.
    PodChanged {
        /// Namespace and name.
        pod: String,
    },
}

impl Orphan {
    /// Whether there is nothing to wait for.
    pub fn is_certain(&self) -> bool {
        matches!(self, Self::NodeGone { .. })
    }
}

impl fmt::Display for Orphan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NodeGone { node } => write!(f, "node {node} is gone"),
            Self::PodGone { pod } => write!(f, "pod {pod} is gone"),
            Self::PodChanged { pod } => {
                write!(f, "pod {pod} was made anew and has another address or node")
            }
        }
    }
}

/// What is to be said about one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Hands off.
    Used(Use),
    /// Nobody uses it.
    Orphan(Orphan),
}

/// The facts, indexed for judging.
pub struct Judge<'a> {
    facts: &'a Facts,
    pods: BTreeMap<IpAddr, &'a PodName>,
    journals: BTreeSet<&'a str>,
}

impl<'a> Judge<'a> {
    /// With these facts. `owners` are all holders of addresses: a live node that holds a reserve keeps a journal, even
    /// if it does not say so.
    pub fn new(facts: &'a Facts, owners: impl Iterator<Item = &'a Owner>) -> Self {
        let mut journals: BTreeSet<&str> = facts
            .nodes
            .iter()
            .filter(|(_, node)| node.keeps_journal)
            .map(|(name, _)| name.as_str())
            .collect();
        journals.extend(owners.filter_map(|owner| {
            let node = owner.attribute("node")?;
            owner
                .has_handle(&names::reserve_handle(node))
                .then_some(node)
        }));
        Self {
            facts,
            pods: facts.pods_by_address(),
            journals,
        }
    }

    /// The node that answers for an address.
    pub fn node_of<'o>(owner: &'o Owner, block: Option<&'o Affinity>) -> Option<&'o str> {
        if let Some(node) = owner.attribute("node") {
            return Some(node);
        }
        let host = block.filter(|a| a.owner == AffinityType::Host)?;
        owner
            .has_handle(WINDOWS_HANDLE)
            .then_some(host.name.as_str())
    }

    /// Judges one address. `block` is the owner of the block that it is in.
    pub fn judge(&self, address: IpAddr, owner: &Owner, block: Option<&Affinity>) -> Verdict {
        if let Some(pod) = self.pods.get(&address) {
            return Verdict::Used(Use::Pod((*pod).clone()));
        }
        if let Some(endpoint) = self.facts.endpoints.get(&address) {
            return Verdict::Used(Use::Endpoint(endpoint.clone()));
        }
        let Some(node) = Self::node_of(owner, block) else {
            return Verdict::Used(Use::Unclassified);
        };
        let pod = pod_of(owner);
        if !self.facts.nodes.contains_key(node) {
            // Between the deletion of a Node and that of its pods, a pod without a visible address may still have this one.
            return match pod.and_then(|name| Some((self.waiting(&name, node)?, name))) {
                Some((_, name)) => Verdict::Used(Use::Pod(name)),
                None => Verdict::Orphan(Orphan::NodeGone {
                    node: node.to_owned(),
                }),
            };
        }
        let node_name = node.to_owned();
        if owner.has_handle(&names::reserve_handle(node)) {
            return Verdict::Used(Use::Reserve(node_name));
        }
        if is_tunnel(owner, node) {
            return Verdict::Used(Use::Tunnel(node_name));
        }
        if self.journals.contains(node) {
            return Verdict::Used(Use::Journal(node_name));
        }
        let Some(name) = pod else {
            return Verdict::Used(Use::Unclassified);
        };
        let text = format!("{}/{}", name.0, name.1);
        match self.facts.pods.get(&name) {
            None => Verdict::Orphan(Orphan::PodGone { pod: text }),
            Some(found) if found.finished => Verdict::Orphan(Orphan::PodGone { pod: text }),
            Some(_) if self.waiting(&name, node).is_some() => Verdict::Used(Use::Pod(name)),
            Some(_) => Verdict::Orphan(Orphan::PodChanged { pod: text }),
        }
    }

    /// The pod, if it is to run on this node and shows no address yet.
    fn waiting(&self, name: &PodName, node: &str) -> Option<&PodFacts> {
        self.facts.pods.get(name).filter(|pod| {
            let here = pod.node.as_deref().is_none_or(|on| on == node);
            here && !pod.finished && !pod.host_network && pod.addresses.is_empty()
        })
    }
}

/// The pod that an address was given to.
pub fn pod_of(owner: &Owner) -> Option<PodName> {
    Some((
        owner.attribute("namespace")?.to_owned(),
        owner.attribute("pod")?.to_owned(),
    ))
}

/// Whether this is the address of one of the node's tunnel devices.
pub fn is_tunnel(owner: &Owner, node: &str) -> bool {
    Tunnel::ALL.iter().any(|tunnel| {
        owner.has_handle(&tunnel.handle(node))
            || owner.attribute("type") == Some(tunnel.attribute())
    })
}
