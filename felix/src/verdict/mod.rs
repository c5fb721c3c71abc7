//! What the policy model says about one packet, worked out from the objects alone.
//!
//! This is the reference: it reads the objects as a person would, rule after rule, keeps no index
//! and shares no code with the graph and the compiler. Tests hold the kernel against it, and traces
//! take their explanation from it. It is not made for speed.
//!
//! [`Model::host_verdict`] answers for host endpoints, [`Model::committed`] shows what staged policies would do.
//! Not covered: HTTP conditions, which the kernel does not see.

mod host;
mod peer;
mod staged;

pub use host::Way;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::kubernetes::{LABEL_NAMESPACE, SERVICE_ACCOUNT_LABEL_PREFIX};
use cali_api::selector::Selector;
use cali_api::v3::{Action, DEFAULT_TIER, Order, Rule, TierAction, WorkloadEndpoint};
use cali_api::{AnyResource, Cidr, Key, Kind, StringMap};

use crate::calc::Direction;

/// The first packet of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, where the protocol has ports.
    pub source_port: u16,
    /// Destination port, where the protocol has ports.
    pub destination_port: u16,
    /// ICMP type and code, where the protocol is ICMP or ICMPv6.
    pub icmp: Option<(u8, u8)>,
}

/// Whether a packet passes in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It does.
    Allow,
    /// It does not.
    Deny,
}

/// What decided.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A rule of a policy.
    Rule {
        /// The policy's tier.
        tier: String,
        /// The policy.
        policy: Key,
        /// Which of the direction's rules, from 0.
        rule: usize,
    },
    /// The packet reached the end of a tier with policies, which denies.
    EndOfTier {
        /// The tier.
        tier: String,
    },
    /// A rule of a profile.
    Profile {
        /// The profile.
        profile: String,
        /// Which of the direction's rules, from 0.
        rule: usize,
    },
    /// No tier decided and no profile allowed it.
    NoProfile,
    /// A port that no policy of a host endpoint closes.
    Failsafe,
    /// Without it there is no IPv6 on a link.
    NeighbourDiscovery,
    /// No policy of the host endpoint that sees the packet decides on it.
    NotAsked,
    /// The endpoint is not known: what has no policy gets no packet.
    UnknownEndpoint,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule { tier, policy, rule } => {
                write!(f, "rule {rule} of {policy} in tier {tier}")
            }
            Self::EndOfTier { tier } => write!(f, "end of tier {tier}"),
            Self::Profile { profile, rule } => write!(f, "rule {rule} of profile {profile}"),
            Self::NoProfile => f.write_str("no policy or profile allows it"),
            Self::Failsafe => f.write_str("failsafe port"),
            Self::NeighbourDiscovery => f.write_str("neighbour discovery"),
            Self::NotAsked => f.write_str("no policy decides on it"),
            Self::UnknownEndpoint => f.write_str("the endpoint is not known"),
        }
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the packet passes.
    pub outcome: Outcome,
    /// What decided.
    pub reason: Reason,
}

impl Verdict {
    fn allow(reason: Reason) -> Self {
        Self {
            outcome: Outcome::Allow,
            reason,
        }
    }

    fn deny(reason: Reason) -> Self {
        Self {
            outcome: Outcome::Deny,
            reason,
        }
    }
}

/// What a policy sees of a host endpoint's packets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sees {
    Untracked,
    PreDnat,
    Forwarded,
    Local,
}

/// A policy as far as evaluation goes.
struct Policy<'a> {
    key: Key,
    tier: &'a str,
    order: Option<Order>,
    applies: [bool; 2],
    sees: &'static [Sees],
    rules: [&'a [Rule]; 2],
}

/// All objects that policy depends on.
#[derive(Debug, Clone, Default)]
pub struct Model {
    objects: BTreeMap<Key, Arc<AnyResource>>,
}

impl FromIterator<Arc<AnyResource>> for Model {
    fn from_iter<T: IntoIterator<Item = Arc<AnyResource>>>(objects: T) -> Self {
        Self {
            objects: objects
                .into_iter()
                .map(|object| (object.key(), object))
                .collect(),
        }
    }
}

impl Model {
    /// Adds an object or replaces its former version.
    pub fn put(&mut self, object: Arc<AnyResource>) {
        self.objects.insert(object.key(), object);
    }

    /// Removes an object.
    pub fn remove(&mut self, key: &Key) {
        self.objects.remove(key);
    }

    /// The workload endpoint that has an address.
    pub fn endpoint_of(&self, addr: IpAddr) -> Option<Key> {
        let has = |endpoint: &WorkloadEndpoint| {
            endpoint
                .spec
                .ip_networks
                .iter()
                .any(|net| net.contains(addr))
        };
        self.objects
            .iter()
            .find_map(|(key, object)| match &**object {
                AnyResource::WorkloadEndpoint(endpoint) if has(endpoint) => Some(key.clone()),
                _ => None,
            })
    }

    /// What happens to a packet to (`Ingress`) or from (`Egress`) an endpoint.
    pub fn verdict(&self, endpoint: &Key, packet: &Packet, direction: Direction) -> Verdict {
        self.verdict_and_logs(endpoint, packet, direction).0
    }

    /// [`Self::verdict`], and the Log rules of policies that the packet meets before it is decided on.
    pub fn verdict_and_logs(
        &self,
        endpoint: &Key,
        packet: &Packet,
        direction: Direction,
    ) -> (Verdict, Vec<Reason>) {
        let mut logs = Vec::new();
        let Some(AnyResource::WorkloadEndpoint(object)) =
            self.objects.get(endpoint).map(|object| &**object)
        else {
            return (Verdict::deny(Reason::UnknownEndpoint), logs);
        };
        let labels = self.workload_labels(object);
        let tiers = self.tiers(&labels, Sees::Local, direction);
        let verdict = self
            .tiers_verdict(tiers, packet, direction, &mut logs)
            .unwrap_or_else(|| self.profile_verdict(&object.spec.profiles, packet, direction));
        (verdict, logs)
    }

    /// What the tiers say; `None` when they leave it to whatever follows. Log rules on the way are added to `logs`.
    fn tiers_verdict(
        &self,
        tiers: Vec<(&str, TierAction, Vec<Policy<'_>>)>,
        packet: &Packet,
        direction: Direction,
        logs: &mut Vec<Reason>,
    ) -> Option<Verdict> {
        'tiers: for (tier, end, policies) in tiers {
            for policy in policies {
                for (number, rule) in policy.rules[direction as usize].iter().enumerate() {
                    let reason = || Reason::Rule {
                        tier: tier.to_owned(),
                        policy: policy.key.clone(),
                        rule: number,
                    };
                    match self.effect(policy.key.namespace.as_deref(), rule, packet, direction) {
                        Some(Action::Allow) => return Some(Verdict::allow(reason())),
                        Some(Action::Deny) => return Some(Verdict::deny(reason())),
                        Some(Action::Pass) => continue 'tiers,
                        Some(Action::Log) => logs.push(reason()),
                        None => {}
                    }
                }
            }
            if end == TierAction::Deny {
                return Some(Verdict::deny(Reason::EndOfTier {
                    tier: tier.to_owned(),
                }));
            }
        }
        None
    }

    fn profile_verdict(
        &self,
        profiles: &[String],
        packet: &Packet,
        direction: Direction,
    ) -> Verdict {
        for name in profiles {
            let key = Key::cluster(Kind::Profile, name.as_str());
            let Some(AnyResource::Profile(profile)) =
                self.objects.get(&key).map(|object| &**object)
            else {
                continue;
            };
            let rules = match direction {
                Direction::Ingress => &profile.spec.ingress,
                Direction::Egress => &profile.spec.egress,
            };
            for (number, rule) in rules.iter().enumerate() {
                let reason = Reason::Profile {
                    profile: name.clone(),
                    rule: number,
                };
                match self.effect(None, rule, packet, direction) {
                    Some(Action::Allow) => return Verdict::allow(reason),
                    Some(Action::Deny) => return Verdict::deny(reason),
                    Some(Action::Pass) => break,
                    Some(Action::Log) | None => {}
                }
            }
        }
        Verdict::deny(Reason::NoProfile)
    }

    /// What a rule does with a packet; `None` when it does not match. A rule that cannot be read
    /// denies everything if it denied or passed, and nothing otherwise.
    fn effect(
        &self,
        namespace: Option<&str>,
        rule: &Rule,
        packet: &Packet,
        direction: Direction,
    ) -> Option<Action> {
        match self.matches(namespace, rule, packet, direction) {
            Ok(true) => Some(rule.action),
            Ok(false) => None,
            Err(_) => matches!(rule.action, Action::Deny | Action::Pass).then_some(Action::Deny),
        }
    }

    /// The tiers that the packet may see, each with its policies, all in order.
    fn tiers<'a>(
        &'a self,
        labels: &StringMap,
        sees: Sees,
        direction: Direction,
    ) -> Vec<(&'a str, TierAction, Vec<Policy<'a>>)> {
        let mut policies: Vec<Policy<'a>> = self
            .objects
            .iter()
            .filter_map(|(key, object)| policy(key, object, labels))
            .filter(|policy| policy.sees.contains(&sees) && policy.applies[direction as usize])
            .collect();
        policies
            .sort_by(|a, b| by_order(a.order, b.order).then_with(|| tie(&a.key).cmp(&tie(&b.key))));
        let mut tiers: Vec<(&str, TierAction, Option<Order>, Vec<Policy<'a>>)> = Vec::new();
        for policy in policies {
            let Some((order, end)) = self.tier(policy.tier) else {
                continue;
            };
            match tiers.iter_mut().find(|(name, ..)| *name == policy.tier) {
                Some((.., members)) => members.push(policy),
                None => tiers.push((policy.tier, end, order, vec![policy])),
            }
        }
        tiers.sort_by(|a, b| by_order(a.2, b.2).then_with(|| a.0.cmp(b.0)));
        tiers
            .into_iter()
            .map(|(name, end, _, policies)| (name, end, policies))
            .collect()
    }

    fn tier(&self, name: &str) -> Option<(Option<Order>, TierAction)> {
        if let Some(AnyResource::Tier(tier)) = self
            .objects
            .get(&Key::cluster(Kind::Tier, name))
            .map(|object| &**object)
        {
            return Some((tier.spec.order, tier.spec.end_action()));
        }
        match name {
            DEFAULT_TIER => Some((Some(Order(1_000_000.0)), TierAction::Deny)),
            "kube-admin" | "adminnetworkpolicy" => Some((Some(Order(1_000.0)), TierAction::Pass)),
            "kube-baseline" | "baselineadminnetworkpolicy" => {
                Some((Some(Order(10_000_000.0)), TierAction::Pass))
            }
            _ => None,
        }
    }
}

/// The policy, if it selects an endpoint with these labels. One whose selectors cannot be read selects nothing.
fn policy<'a>(key: &Key, object: &'a AnyResource, labels: &StringMap) -> Option<Policy<'a>> {
    let selected =
        |text: &str| Selector::parse(text).is_ok_and(|selector| selector.matches(labels));
    let accounts = |text: &str| {
        Selector::parse(text).is_ok_and(|selector| {
            selector
                .with_label_prefix(SERVICE_ACCOUNT_LABEL_PREFIX)
                .matches(labels)
        })
    };
    match object {
        AnyResource::NetworkPolicy(policy) => {
            let spec = &policy.spec;
            let same_namespace =
                labels.get(LABEL_NAMESPACE).map(String::as_str) == key.namespace.as_deref();
            (same_namespace && selected(&spec.selector) && accounts(&spec.service_account_selector))
                .then(|| Policy {
                    key: key.clone(),
                    tier: spec.tier_name(),
                    order: spec.order,
                    applies: [spec.applies_to_ingress(), spec.applies_to_egress()],
                    sees: &[Sees::Local],
                    rules: [&spec.ingress, &spec.egress],
                })
        }
        AnyResource::GlobalNetworkPolicy(policy) => {
            let spec = &policy.spec;
            let namespace = spec.namespace_selector.is_empty()
                || Selector::parse(&spec.namespace_selector)
                    .is_ok_and(|selector| selector.of_namespaces().matches(labels));
            let sees: &[Sees] = if spec.do_not_track {
                &[Sees::Untracked]
            } else if spec.pre_dnat {
                &[Sees::PreDnat]
            } else if spec.apply_on_forward {
                &[Sees::Forwarded, Sees::Local]
            } else {
                &[Sees::Local]
            };
            (namespace && selected(&spec.selector) && accounts(&spec.service_account_selector))
                .then(|| Policy {
                    key: key.clone(),
                    tier: spec.tier_name(),
                    order: spec.order,
                    applies: [
                        spec.applies_to_ingress(),
                        spec.applies_to_egress() && sees != [Sees::PreDnat],
                    ],
                    sees,
                    rules: [&spec.ingress, &spec.egress],
                })
        }
        _ => None,
    }
}

/// Smaller first, absent last.
fn by_order(a: Option<Order>, b: Option<Order>) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => a.cmp(&b),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    }
}

fn tie(key: &Key) -> (&str, Option<&str>, Kind) {
    (&key.name, key.namespace.as_deref(), key.kind)
}

/// Whether one of these networks has the address.
fn any_contains(nets: &[Cidr], addr: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(addr))
}
