//! What decides on a flow, and which way it takes: from the datastore alone. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Cidr, Key, NodeName, Revision};
use cali_routes::Backend;
use felix::calc::{Delta, Direction, Endpoint, Graph, Input};
use felix::dataplane::Resources;
use felix::verdict::{Model, Outcome, Packet, Reason};
use ipip_vxlan::Via;

use super::query::Service;
use super::rule_text::rule_text;
use super::world::{Party, World};

/// What one end's policy says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) direction: Direction,
    pub(crate) allowed: bool,
    /// In one line.
    pub(crate) because: String,
    /// The deciding rule, where one did.
    pub(crate) rule: Option<String>,
    /// Policies that select the endpoint, tier by tier, in the order in which they are asked.
    pub(crate) asked: Vec<(String, Vec<String>)>,
    /// Log rules that the packet meets first.
    pub(crate) logged: Vec<String>,
    /// The policy that decided, as in the comments of kernel rules.
    pub(crate) policy: Option<Key>,
}

/// A flow, explained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Explanation {
    pub(crate) source: Party,
    pub(crate) destination: Party,
    pub(crate) service: Service,
    /// None where the source is no workload.
    pub(crate) egress: Option<Judgement>,
    /// None where the destination is no workload.
    pub(crate) ingress: Option<Judgement>,
    pub(crate) path: Vec<String>,
    /// What would be if staged policies were committed, where that differs.
    pub(crate) staged: Vec<Judgement>,
}

impl Explanation {
    /// Both ends let it pass.
    pub(crate) fn allowed(&self) -> bool {
        [&self.egress, &self.ingress]
            .into_iter()
            .flatten()
            .all(|judgement| judgement.allowed)
    }
}

/// The first packet of a flow. The source port is one that clients get.
pub(crate) fn packet(source: IpAddr, destination: IpAddr, service: Service) -> Packet {
    let v6 = destination.is_ipv6();
    let is_icmp = service.protocol == 1;
    Packet {
        source,
        destination,
        protocol: if is_icmp && v6 { 58 } else { service.protocol },
        source_port: if is_icmp { 0 } else { 40_000 },
        destination_port: service.port,
        icmp: is_icmp.then_some(if v6 { (128, 0) } else { (8, 0) }),
    }
}

/// Explains a flow.
pub(crate) fn explain(
    world: &World,
    source: Party,
    destination: Party,
    service: Service,
) -> Explanation {
    let packet = packet(source.address, destination.address, service);
    let judge = |world: &World, model: &Model| -> Vec<Option<Judgement>> {
        [
            (&source, Direction::Egress),
            (&destination, Direction::Ingress),
        ]
        .into_iter()
        .map(|(party, direction)| judgement(world, model, party, &packet, direction))
        .collect()
    };
    let mut now = judge(world, &world.model());
    let staged = world.committed().map_or(Vec::new(), |after| {
        let then = judge(&after, &after.model());
        let differs = |(now, then): (&Option<Judgement>, Option<Judgement>)| {
            let same = |one: &Judgement, other: &Judgement| {
                one.allowed == other.allowed && one.because == other.because
            };
            then.filter(|then| now.as_ref().is_none_or(|now| !same(now, then)))
        };
        now.iter().zip(then).filter_map(differs).collect()
    });
    let path = path(world, &source, &destination);
    let ingress = now.pop().flatten();
    let egress = now.pop().flatten();
    Explanation {
        source,
        destination,
        service,
        egress,
        ingress,
        path,
        staged,
    }
}

/// What both ends' policies say, as far as the ends are workloads. Without the policies that are asked, which take longer
/// to find out.
pub(crate) fn judgements(
    world: &World,
    model: &Model,
    source: &Party,
    destination: &Party,
    packet: &Packet,
) -> Vec<Judgement> {
    [
        (source, Direction::Egress),
        (destination, Direction::Ingress),
    ]
    .into_iter()
    .filter_map(|(party, direction)| decision(world, model, party, packet, direction))
    .collect()
}

fn judgement(
    world: &World,
    model: &Model,
    party: &Party,
    packet: &Packet,
    direction: Direction,
) -> Option<Judgement> {
    let decision = decision(world, model, party, packet, direction)?;
    let asked = endpoint_of(world, party)
        .iter()
        .flat_map(|endpoint| endpoint.tiers(direction))
        .map(|tier| {
            let policies = tier.policies.iter().map(named).collect();
            (tier.tier.to_string(), policies)
        })
        .collect();
    Some(Judgement { asked, ..decision })
}

fn decision(
    world: &World,
    model: &Model,
    party: &Party,
    packet: &Packet,
    direction: Direction,
) -> Option<Judgement> {
    let key = party.endpoint.as_ref()?;
    let (verdict, logs) = model.verdict_and_logs(key, packet, direction);
    let (because, rule, policy) = match &verdict.reason {
        Reason::Rule { policy, rule, .. } => (
            rule_named(&verdict.reason),
            rule_of(world, policy, direction, *rule),
            Some(policy.clone()),
        ),
        Reason::EndOfTier { tier } => (
            format!("end of tier {tier}: no rule of its policies matches"),
            None,
            None,
        ),
        Reason::Profile { profile, rule } => (
            format!("rule {rule} of profile {profile}; no policy decides in this direction"),
            None,
            None,
        ),
        other => (other.to_string(), None, None),
    };
    Some(Judgement {
        direction,
        allowed: verdict.outcome == Outcome::Allow,
        because,
        rule,
        asked: Vec::new(),
        logged: logs.iter().map(rule_named).collect(),
        policy,
    })
}

/// A rule of a policy, with its tier.
fn rule_named(reason: &Reason) -> String {
    match reason {
        Reason::Rule { tier, policy, rule } => {
            format!("rule {rule} of {}, tier {tier}", named(policy))
        }
        other => other.to_string(),
    }
}

/// A policy as people write it.
fn named(key: &Key) -> String {
    match &key.namespace {
        Some(namespace) => format!("{} {namespace}/{}", key.kind, key.name),
        None => format!("{} {}", key.kind, key.name),
    }
}

fn rule_of(world: &World, policy: &Key, direction: Direction, number: usize) -> Option<String> {
    let (ingress, egress) = match world.objects.get(policy).map(|object| &**object)? {
        AnyResource::NetworkPolicy(policy) => (&policy.spec.ingress, &policy.spec.egress),
        AnyResource::GlobalNetworkPolicy(policy) => (&policy.spec.ingress, &policy.spec.egress),
        _ => return None,
    };
    let rules = match direction {
        Direction::Ingress => ingress,
        Direction::Egress => egress,
    };
    rules.get(number).map(rule_text)
}

/// The endpoint as its own node sees it.
fn endpoint_of(world: &World, party: &Party) -> Option<Endpoint> {
    let mut graph = Graph::new(party.node.as_deref()?.into());
    graph.handle(Input::Sync(SyncEvent::Updates(updates(world))));
    graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
    let deltas = graph.flush()?.deltas;
    deltas.into_iter().find_map(|delta| match delta {
        Delta::Endpoint { id, endpoint } if Some(&id) == party.endpoint.as_ref() => {
            Some((*endpoint).clone())
        }
        _ => None,
    })
}

fn updates(world: &World) -> Vec<Update> {
    let update = |(key, object): (&Key, &std::sync::Arc<AnyResource>)| Update {
        key: key.clone(),
        value: Some(object.clone()),
        revision: Revision::from("0"),
    };
    world.objects.iter().map(update).collect()
}

/// The way, one line for each stage.
fn path(world: &World, source: &Party, destination: &Party) -> Vec<String> {
    let at = |party: &Party| -> Option<String> {
        let node = party.node.as_deref()?;
        Some(match party.interface.as_deref() {
            Some(interface) => format!("{node}, interface {interface}"),
            None => format!("{node}, interface not known"),
        })
    };
    let (from, to) = (at(source), at(destination));
    let mut lines = vec![match &from {
        Some(from) => format!("{} on {from}", source.name),
        None => format!("{}, which is no pod", source.name),
    }];
    match (&source.node, &destination.node) {
        (Some(a), Some(b)) if a == b => lines.push(format!("forwarded on {a} itself")),
        (Some(a), Some(b)) => lines.push(between(world, a, b, destination.address)),
        (Some(a), None) => lines.push(format!(
            "by {a}'s own routes{}",
            if nat_outgoing(world, source.address, destination.address) {
                ", with the node's address as source (natOutgoing)"
            } else {
                ""
            }
        )),
        (None, Some(b)) => lines.push(format!("arrives at {b} by its own routes")),
        (None, None) => {}
    }
    lines.push(match &to {
        Some(to) => format!("{} on {to}", destination.name),
        None => format!("{}, which is no pod", destination.name),
    });
    lines
}

fn between(world: &World, from: &str, to: &str, destination: IpAddr) -> String {
    let mut resources = Resources::new(NodeName::from(from), Backend::default());
    let mut ignored = Vec::new();
    for update in updates(world) {
        resources.on_update(&update, &mut ignored);
    }
    let via = resources
        .resolver()
        .resolve(&Cidr::host(destination), &NodeName::from(to));
    match via {
        Ok(Via::Direct { gateway }) => {
            format!("{from} to {to} without encapsulation, towards {gateway}")
        }
        Ok(Via::Vxlan { gateway, device }) => {
            format!("{from} to {to} in VXLAN: device {device}, tunnel endpoint {gateway}")
        }
        Ok(Via::Ipip { gateway, device }) => {
            format!("{from} to {to} in IPIP: device {device}, outer destination {gateway}")
        }
        Err(problem) => format!("{from} to {to}: no way, {problem}"),
    }
}

fn nat_outgoing(world: &World, source: IpAddr, destination: IpAddr) -> bool {
    let mut nat = false;
    for object in world.objects.values() {
        if let AnyResource::IPPool(pool) = &**object {
            let cidr = pool.spec.cidr;
            if cidr.contains(destination) {
                return false;
            }
            nat |= cidr.contains(source) && pool.spec.nat_outgoing;
        }
    }
    nat
}

/// Verdicts of all pairs of workloads on some services, by the names of the ends: for comparisons.
pub(crate) fn matrix(
    world: &World,
    services: &[Service],
    v6: bool,
) -> BTreeMap<(String, String, String), bool> {
    let model = world.model();
    let workloads = world.workloads(v6);
    let mut all = BTreeMap::new();
    for source in &workloads {
        for destination in &workloads {
            if source.name == destination.name {
                continue;
            }
            for service in services {
                let packet = packet(source.address, destination.address, *service);
                let passes = |party: &Party, direction| {
                    party.endpoint.as_ref().is_none_or(|key| {
                        model.verdict(key, &packet, direction).outcome == Outcome::Allow
                    })
                };
                let allowed =
                    passes(source, Direction::Egress) && passes(destination, Direction::Ingress);
                let key = (
                    source.name.clone(),
                    destination.name.clone(),
                    service.describe(),
                );
                all.insert(key, allowed);
            }
        }
    }
    all
}
