//! Which policies apply to the endpoints of this node, and in which order they are asked.
//!
//! Tiers: by order, those without one last, then by name. Policies within a tier: by order, those
//! without one last, then by name, namespace and kind. A tier counts for an endpoint and direction
//! only if one of its policies applies there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::kubernetes::SERVICE_ACCOUNT_LABEL_PREFIX;
use cali_api::selector::Selector;
use cali_api::selector::index::{LabelIndex, MatchChange};
use cali_api::v3::{self, DEFAULT_TIER, Order, TierAction};
use cali_api::{AnyResource, Cidr, Key};
use foldhash::HashMap;

use super::output::{
    Direction, Endpoint, HostEndpoint, HostInterface, Limits, STAGES, Stage, TierDefault,
    TierPolicies, Tiers,
};
use super::rules::parse;

/// A local endpoint as far as the kernel is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum LocalEndpoint {
    /// A workload.
    Workload {
        interface: Arc<str>,
        addresses: Vec<Cidr>,
        mac: Option<Arc<str>>,
        profiles: Vec<Arc<str>>,
        limits: Limits,
    },
    /// An interface of the node, or all of them.
    Host {
        interface: HostInterface,
        addresses: Vec<IpAddr>,
        profiles: Vec<Arc<str>>,
    },
}

impl LocalEndpoint {
    fn profiles(&self) -> &[Arc<str>] {
        match self {
            Self::Workload { profiles, .. } | Self::Host { profiles, .. } => profiles,
        }
    }
}

/// A local endpoint with its policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decided {
    Workload(Endpoint),
    Host(HostEndpoint),
}

/// What a policy applies to: its directions, by stage in the order of [`STAGES`].
type Applies = [[bool; 2]; 4];

struct Policy {
    rules: Packed,
    tier: Arc<str>,
    order: Option<Order>,
    applies: Applies,
    selector: Selector,
}

/// Rules for ingress and egress as somebody wrote them, as JSON: all policies of the cluster are kept, and few of them are in force
/// on this node.
struct Packed(Box<[u8]>);

impl Packed {
    fn of(ingress: &[v3::Rule], egress: &[v3::Rule]) -> Result<Self, String> {
        let text = serde_json::to_vec(&(ingress, egress)).map_err(|error| error.to_string())?;
        Ok(Self(text.into()))
    }

    fn open(&self) -> Result<[Vec<v3::Rule>; 2], String> {
        serde_json::from_slice(&self.0).map_err(|error| format!("rules: {error}"))
    }
}

#[derive(Clone, Copy)]
struct Tier {
    order: Option<Order>,
    end: TierDefault,
}

/// Sorts as the model orders: smaller first, `None` last.
type Rank = (bool, Option<Order>);

fn rank(order: Option<Order>) -> Rank {
    (order.is_none(), order)
}

/// Tiers that exist without anybody writing them (Calico's fixed orders and end actions).
fn built_in(name: &str) -> Option<Tier> {
    let (order, end) = match name {
        DEFAULT_TIER => (1_000_000.0, TierDefault::Deny),
        "kube-admin" | "adminnetworkpolicy" => (1_000.0, TierDefault::Pass),
        "kube-baseline" | "baselineadminnetworkpolicy" => (10_000_000.0, TierDefault::Pass),
        _ => return None,
    };
    Some(Tier {
        order: Some(Order(order)),
        end,
    })
}

/// Local endpoints, all policies, all tiers.
#[derive(Default)]
pub(super) struct Local {
    endpoints: BTreeMap<Key, LocalEndpoint>,
    policies: HashMap<Key, Policy>,
    tiers: HashMap<Arc<str>, Tier>,
    index: LabelIndex<Key, Key>,
    dirty: BTreeSet<Key>,
}

impl Local {
    /// Adds an endpoint or changes it.
    pub(super) fn set_endpoint<'a>(
        &mut self,
        key: &Key,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        endpoint: LocalEndpoint,
    ) {
        let mut changes = Vec::new();
        self.index
            .set_item(key.clone(), labels, endpoint.profiles(), &mut changes);
        self.mark(changes);
        if self.endpoints.get(key) != Some(&endpoint) {
            self.endpoints.insert(key.clone(), endpoint);
            self.dirty.insert(key.clone());
        }
    }

    /// Removes an endpoint.
    pub(super) fn remove_endpoint(&mut self, key: &Key) {
        if self.endpoints.remove(key).is_some() {
            self.index.remove_item(key, &mut Vec::new());
            self.dirty.insert(key.clone());
        }
    }

    /// Gives a profile's labels to the endpoints that name it.
    pub(super) fn set_parent<'a>(
        &mut self,
        name: &Arc<str>,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) {
        let mut changes = Vec::new();
        self.index.set_parent(name, labels, &mut changes);
        self.mark(changes);
    }

    /// Adds a tier or changes it; `None` removes it.
    pub(super) fn set_tier(&mut self, name: &str, tier: Option<(Option<Order>, TierAction)>) {
        match tier {
            Some((order, end)) => {
                let end = match end {
                    TierAction::Deny => TierDefault::Deny,
                    TierAction::Pass => TierDefault::Pass,
                };
                self.tiers.insert(name.into(), Tier { order, end });
            }
            None => {
                self.tiers.remove(name);
            }
        }
        // Tiers are few and seldom change; which endpoints have policies in one is not kept.
        self.dirty.extend(self.endpoints.keys().cloned());
    }

    /// Adds a policy or changes it. With a selector that cannot be used, the error is returned and
    /// the former version stays.
    pub(super) fn set_policy(&mut self, key: &Key, source: &AnyResource) -> Result<(), String> {
        let Some(policy) = read_policy(source)? else {
            self.remove_policy(key);
            return Ok(());
        };
        let placed = (policy.tier.clone(), policy.order, policy.applies);
        let selector = policy.selector.clone();
        let old = self.policies.insert(key.clone(), policy);
        let mut changes = Vec::new();
        match old {
            Some(old) if old.selector == selector => {
                if placed != (old.tier, old.order, old.applies) {
                    self.dirty.extend(self.index.items_of(key).cloned());
                }
            }
            old => {
                if old.is_some() {
                    self.index.remove_selector(key, &mut changes);
                }
                self.index.add_selector(key.clone(), selector, &mut changes);
            }
        }
        self.mark(changes);
        Ok(())
    }

    /// Removes a policy.
    pub(super) fn remove_policy(&mut self, key: &Key) {
        if self.policies.remove(key).is_some() {
            let mut changes = Vec::new();
            self.index.remove_selector(key, &mut changes);
            self.mark(changes);
        }
    }

    /// A policy's rules for ingress and egress.
    pub(super) fn rules(&self, key: &Key) -> Option<Result<[Vec<v3::Rule>; 2], String>> {
        self.policies.get(key).map(|policy| policy.rules.open())
    }

    /// Number of policies.
    pub(super) fn policies(&self) -> usize {
        self.policies.len()
    }

    /// Endpoints to look at again, each with its state, or `None` when it is gone.
    pub(super) fn take(&mut self) -> Vec<(Key, Option<Decided>)> {
        std::mem::take(&mut self.dirty)
            .into_iter()
            .map(|key| {
                let decided = self
                    .endpoints
                    .get(&key)
                    .map(|endpoint| self.decide(&key, endpoint));
                (key, decided)
            })
            .collect()
    }

    fn decide(&self, key: &Key, endpoint: &LocalEndpoint) -> Decided {
        let tiers = |stage| Tiers {
            ingress: self.tiers_of(key, stage, Direction::Ingress),
            egress: self.tiers_of(key, stage, Direction::Egress),
        };
        match endpoint.clone() {
            LocalEndpoint::Workload {
                interface,
                addresses,
                mac,
                profiles,
                limits,
            } => {
                let Tiers { ingress, egress } = tiers(Stage::Normal);
                Decided::Workload(Endpoint {
                    interface,
                    addresses,
                    mac,
                    ingress,
                    egress,
                    profiles,
                    limits,
                })
            }
            LocalEndpoint::Host {
                interface,
                addresses,
                profiles,
            } => Decided::Host(HostEndpoint {
                interface,
                addresses,
                stages: STAGES.map(tiers),
                profiles,
            }),
        }
    }

    fn tiers_of(&self, endpoint: &Key, stage: Stage, direction: Direction) -> Vec<TierPolicies> {
        type PolicyPlace<'a> = (Rank, &'a str, Option<&'a str>, &'a Key);
        type TierPlace<'a> = (Rank, &'a Arc<str>);
        let mut tiers: BTreeMap<TierPlace<'_>, (Tier, Vec<PolicyPlace<'_>>)> = BTreeMap::new();
        for key in self.index.selectors_of(endpoint) {
            let Some(policy) = self.policies.get(key) else {
                continue;
            };
            let applies = policy.applies[stage as usize][direction as usize];
            let Some(tier) = self
                .tiers
                .get(&policy.tier)
                .copied()
                .or_else(|| built_in(&policy.tier))
            else {
                continue;
            };
            if applies {
                let place = (
                    rank(policy.order),
                    &*key.name,
                    key.namespace.as_deref(),
                    key,
                );
                let entry = tiers.entry((rank(tier.order), &policy.tier));
                entry.or_insert_with(|| (tier, Vec::new())).1.push(place);
            }
        }
        tiers
            .into_iter()
            .map(|((_, name), (tier, mut policies))| {
                policies.sort_unstable();
                // What comes before connection tracking or NAT only ever takes exceptions out.
                let early = matches!(stage, Stage::Untracked | Stage::PreDnat);
                TierPolicies {
                    tier: name.clone(),
                    default_action: if early { TierDefault::Pass } else { tier.end },
                    policies: policies.into_iter().map(|(.., key)| key.clone()).collect(),
                }
            })
            .collect()
    }

    fn mark(&mut self, changes: Vec<MatchChange<Key, Key>>) {
        self.dirty
            .extend(changes.into_iter().map(|change| change.item));
    }
}

/// What selects and places a policy; `None` for what is no policy.
fn read_policy(source: &AnyResource) -> Result<Option<Policy>, String> {
    let accounts = |text: &str| -> Result<Selector, String> {
        let selector = if text.is_empty() {
            Selector::all()
        } else {
            parse("serviceAccountSelector", text)?
        };
        Ok(selector.with_label_prefix(SERVICE_ACCOUNT_LABEL_PREFIX))
    };
    let none = [false; 2];
    Ok(match source {
        AnyResource::NetworkPolicy(policy) => {
            let spec = &policy.spec;
            let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
            let selector = parse("selector", &spec.selector)?
                .and(Selector::equals(
                    cali_api::kubernetes::LABEL_NAMESPACE,
                    namespace,
                ))
                .and(accounts(&spec.service_account_selector)?);
            let directions = [spec.applies_to_ingress(), spec.applies_to_egress()];
            Some(Policy {
                rules: Packed::of(&spec.ingress, &spec.egress)?,
                tier: spec.tier_name().into(),
                order: spec.order,
                applies: [none, none, none, directions],
                selector,
            })
        }
        AnyResource::GlobalNetworkPolicy(policy) => {
            let spec = &policy.spec;
            let mut selector =
                parse("selector", &spec.selector)?.and(accounts(&spec.service_account_selector)?);
            if !spec.namespace_selector.is_empty() {
                selector = selector
                    .and(parse("namespaceSelector", &spec.namespace_selector)?.of_namespaces());
            }
            let directions = [spec.applies_to_ingress(), spec.applies_to_egress()];
            let applies = match (spec.do_not_track, spec.pre_dnat, spec.apply_on_forward) {
                (true, ..) => [directions, none, none, none],
                (false, true, _) => [none, [directions[0], false], none, none],
                (false, false, true) => [none, none, directions, directions],
                (false, false, false) => [none, none, none, directions],
            };
            Some(Policy {
                rules: Packed::of(&spec.ingress, &spec.egress)?,
                tier: spec.tier_name().into(),
                order: spec.order,
                applies,
                selector,
            })
        }
        _ => None,
    })
}
