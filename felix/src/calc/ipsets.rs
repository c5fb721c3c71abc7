//! The IP sets in use and their members.
//!
//! Everything in the cluster that has addresses is an *item*: workload endpoints, host endpoints and
//! network sets. A set exists while a rule of an active policy uses it. Changes collect until they
//! are taken; what came and went in between cancels out.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::kubernetes::EndpointSlice;
use cali_api::selector::index::{LabelIndex, MatchChange};
use cali_api::{Cidr, Key};
use foldhash::HashMap;
use smallvec::SmallVec;

use super::asks::Asks;
use super::members::Members;
use super::numbered::Numbered;
use super::output::{Delta, IpSetId, Member};
use super::rules::SetSpec;
use super::services::Services;

/// What an item contributes to the sets that select it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Item {
    /// One, but for those of two families: a second is not worth its place in some hundred thousand items.
    pub(super) nets: SmallVec<[Cidr; 1]>,
    pub(super) ports: Box<[NamedPort]>,
}

/// A named port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedPort {
    pub(super) name: Arc<str>,
    pub(super) protocol: u8,
    pub(super) port: u16,
}

struct IpSet {
    spec: SetSpec,
    members: Members,
    users: usize,
    /// Whether consumers know the set.
    announced: bool,
    /// The selector that is asked for because of it.
    asked: Option<Arc<str>>,
}

/// Items, sets, and what changed since the last taking.
#[derive(Default)]
pub(super) struct IpSets {
    index: LabelIndex<u32, IpSetId>,
    items: Numbered,
    sets: HashMap<IpSetId, IpSet>,
    services: Services,
    /// Sets that were created, changed or lost their last user; `true`: visible, `false`: no longer.
    pending: BTreeMap<IpSetId, HashMap<Member, bool>>,
    pub(super) asks: Asks,
}

impl IpSets {
    /// Adds an item or changes it.
    pub(super) fn set_item<'a>(
        &mut self,
        key: &Key,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        parents: &[Arc<str>],
        item: Item,
    ) {
        let (number, old) = self.items.put(key, item.clone());
        let mut changes = Vec::new();
        self.index.set_item(number, labels, parents, &mut changes);
        if old != item {
            let kept: Vec<IpSetId> = self
                .index
                .selectors_of(&number)
                .filter(|id| {
                    !changes
                        .iter()
                        .any(|change| change.matches && change.selector == **id)
                })
                .cloned()
                .collect();
            for id in kept {
                self.contribute_item(&id, &old, false);
                self.contribute_item(&id, &item, true);
            }
        }
        for change in changes {
            let item = if change.matches { &item } else { &old };
            self.contribute_item(&change.selector, item, change.matches);
        }
    }

    /// Removes an item.
    pub(super) fn remove_item(&mut self, key: &Key) {
        let Some((number, item)) = self.items.remove(key) else {
            return;
        };
        let mut changes = Vec::new();
        self.index.remove_item(&number, &mut changes);
        for change in changes {
            self.contribute_item(&change.selector, &item, change.matches);
        }
    }

    /// Gives a profile's labels to the items that name it.
    pub(super) fn set_parent<'a>(
        &mut self,
        name: &Arc<str>,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) {
        let mut changes = Vec::new();
        self.index.set_parent(name, labels, &mut changes);
        self.apply(&changes);
    }

    /// Counts one more user of a set, which exists from now on.
    pub(super) fn acquire(&mut self, id: &IpSetId, spec: &SetSpec) {
        if let Some(set) = self.sets.get_mut(id) {
            set.users += 1;
            return;
        }
        let set = IpSet {
            spec: spec.clone(),
            members: Members::default(),
            users: 1,
            announced: false,
            asked: spec.scope().and_then(|scope| self.asks.want(scope)),
        };
        self.sets.insert(id.clone(), set);
        self.pending.entry(id.clone()).or_default();
        match (spec.scope(), spec.service()) {
            (Some(scope), _) => {
                let mut changes = Vec::new();
                self.index
                    .add_selector(id.clone(), scope.clone(), &mut changes);
                self.apply(&changes);
            }
            (None, Some((service, with_ports))) => {
                for slice in self.services.add_set(service, id) {
                    self.contribute(id, &slice.members(with_ports), true);
                }
            }
            (None, None) => {}
        }
    }

    /// A part of a service's endpoints appeared, changed or is gone.
    pub(super) fn set_slice(&mut self, key: &Key, slice: Option<&EndpointSlice>) {
        for change in self.services.set_slice(key, slice) {
            for id in change.sets {
                let Some((_, with_ports)) = self.sets.get(&id).and_then(|set| set.spec.service())
                else {
                    continue;
                };
                // New members first: what both versions have is never without a contribution.
                self.contribute(&id, &change.after.members(with_ports), true);
                self.contribute(&id, &change.before.members(with_ports), false);
            }
        }
    }

    /// Takes one use back. The set goes with the next taking, unless it is used again until then.
    pub(super) fn release(&mut self, id: &IpSetId) {
        let Some(set) = self.sets.get_mut(id) else {
            return;
        };
        set.users = set.users.saturating_sub(1);
        if set.users == 0 {
            self.pending.entry(id.clone()).or_default();
        }
    }

    /// Whether all that belongs into the set is known.
    pub(super) fn is_complete(&self, id: &IpSetId) -> bool {
        self.sets
            .get(id)
            .is_none_or(|set| is_complete(&self.asks, set))
    }

    /// Number of sets in use.
    pub(super) fn len(&self) -> usize {
        self.sets.len()
    }

    /// The changes since the last call: creations and changes, and apart from them removals.
    pub(super) fn take(&mut self) -> (Vec<Delta>, Vec<Delta>) {
        let (mut live, mut removed) = (Vec::new(), Vec::new());
        for (id, changes) in std::mem::take(&mut self.pending) {
            let Some(set) = self.sets.get_mut(&id) else {
                continue;
            };
            if set.users == 0 {
                if set.announced {
                    removed.push(Delta::IpSetRemove { id: id.clone() });
                }
                match set.spec.service() {
                    Some((service, _)) => self.services.remove_set(service, &id),
                    None => self.index.remove_selector(&id, &mut Vec::new()),
                }
                if let Some(asked) = &set.asked {
                    self.asks.drop(asked);
                }
                self.sets.remove(&id);
            } else if !set.announced && !is_complete(&self.asks, set) {
                // Nobody uses it yet.
                self.pending.insert(id, changes);
            } else if !set.announced {
                set.announced = true;
                let (kind, origin) = (set.spec.kind(), set.spec.origin());
                live.push(Delta::IpSetCreate {
                    id,
                    kind,
                    origin,
                    members: set.members.visible(),
                });
            } else if !changes.is_empty() {
                let mut added: Vec<Member> = changes
                    .iter()
                    .filter(|(_, on)| **on)
                    .map(|(member, _)| *member)
                    .collect();
                let mut gone: Vec<Member> = changes
                    .iter()
                    .filter(|(_, on)| !**on)
                    .map(|(member, _)| *member)
                    .collect();
                added.sort_unstable();
                gone.sort_unstable();
                live.push(Delta::IpSetChange {
                    id,
                    added,
                    removed: gone,
                });
            }
        }
        (live, removed)
    }

    /// Every set that consumers know, as it is now.
    pub(super) fn whole(&self) -> impl Iterator<Item = Delta> {
        let known = self.sets.iter().filter(|(_, set)| set.announced);
        known.map(|(id, set)| Delta::IpSetCreate {
            id: id.clone(),
            kind: set.spec.kind(),
            origin: set.spec.origin(),
            members: set.members.visible(),
        })
    }

    fn apply(&mut self, changes: &[MatchChange<u32, IpSetId>]) {
        for change in changes {
            if let Some(item) = self.items.item(change.item).cloned() {
                self.contribute_item(&change.selector, &item, change.matches);
            }
        }
    }

    /// Adds or takes back what an item contributes to a set.
    fn contribute_item(&mut self, id: &IpSetId, item: &Item, add: bool) {
        if let Some(set) = self.sets.get(id) {
            let members = contribution(&set.spec, item);
            self.contribute(id, &members, add);
        }
    }

    fn contribute(&mut self, id: &IpSetId, members: &[Member], add: bool) {
        let Some(set) = self.sets.get_mut(id) else {
            return;
        };
        let pending = &mut self.pending;
        let announced = set.announced;
        let mut note = |member: Member, visible: bool| {
            if !announced {
                return;
            }
            let changes = pending.entry(id.clone()).or_default();
            // The opposite of what is pending brings the set back to what consumers know.
            if changes.remove(&member).is_none() {
                changes.insert(member, visible);
            }
        };
        for member in members {
            if add {
                set.members.add(*member, &mut note);
            } else {
                set.members.remove(*member, &mut note);
            }
        }
    }
}

fn is_complete(asks: &Asks, set: &IpSet) -> bool {
    set.asked
        .as_deref()
        .is_none_or(|asked| asks.is_complete(asked))
}

fn contribution(spec: &SetSpec, item: &Item) -> SmallVec<[Member; 2]> {
    match spec {
        SetSpec::Service { .. } => SmallVec::new(),
        SetSpec::Addresses(_) => item.nets.iter().map(|net| Member::Net(*net)).collect(),
        SetSpec::NamedPort { protocol, name, .. } => item
            .ports
            .iter()
            .filter(|port| port.protocol == *protocol && port.name == *name)
            .flat_map(|port| {
                item.nets
                    .iter()
                    .filter(|net| net.is_host())
                    .map(|net| Member::Port {
                        addr: net.addr(),
                        protocol: port.protocol,
                        port: port.port,
                    })
            })
            .collect(),
    }
}
