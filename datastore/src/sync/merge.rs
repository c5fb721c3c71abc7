//! What the stream's readers see, from what is stored: conversion, several sources of one object, mark and sweep. Pure.
//!
//! A Calico object can come from a stored Calico object and from native Kubernetes ones (a `Profile` from a Namespace).
//! A stored Calico object wins over a converted one of the same name; when it goes, the converted one shows again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::update::Update;
use cali_api::{AnyResource, Key, Kind, Revision};

use crate::store::{Undecodable, Versioned};

/// One candidate for what readers see under a key.
#[derive(Debug)]
struct Candidate {
    source: Key,
    object: Arc<AnyResource>,
    revision: Revision,
}

/// A stored object and the keys that were made from it.
#[derive(Debug)]
struct Source {
    revision: Revision,
    outputs: Vec<Key>,
}

/// The state behind one stream.
#[derive(Debug, Default)]
pub(super) struct Merge {
    wanted: BTreeSet<Kind>,
    sources: BTreeMap<Key, Source>,
    visible: BTreeMap<Key, Vec<Candidate>>,
    problems: Vec<Problem>,
}

/// A part of a native object that could not be converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) object: Key,
    pub(super) text: String,
}

impl Merge {
    /// `wanted` are the kinds that readers asked for; conversions to other kinds are dropped.
    pub(super) fn new(wanted: impl IntoIterator<Item = Kind>) -> Self {
        Self {
            wanted: wanted.into_iter().collect(),
            ..Self::default()
        }
    }

    /// What could not be converted since the last call.
    pub(super) fn take_problems(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.problems)
    }

    /// A complete list of a stored kind: what is not in it is gone (objects that cannot be read are not gone).
    pub(super) fn on_list(
        &mut self,
        kind: Kind,
        items: Vec<Versioned>,
        undecodable: &[Undecodable],
    ) -> Vec<Update> {
        let mut gone: BTreeSet<Key> = self
            .sources
            .keys()
            .filter(|key| key.kind == kind)
            .cloned()
            .collect();
        for bad in undecodable {
            gone.remove(&bad.key);
        }
        let mut updates = Vec::new();
        let mut puts = Vec::new();
        for item in built_in(kind).into_iter().chain(items) {
            gone.remove(&item.object.key());
            self.put(item, &mut puts);
        }
        // Deletions first: what takes the place of a deleted object (an address, say) comes after it.
        for key in gone {
            self.remove(&key, None, &mut updates);
        }
        updates.append(&mut puts);
        updates
    }

    /// One object was written.
    pub(super) fn on_put(&mut self, item: Versioned) -> Vec<Update> {
        let mut updates = Vec::new();
        self.put(item, &mut updates);
        updates
    }

    /// One object was deleted.
    pub(super) fn on_delete(&mut self, key: &Key, revision: &Revision) -> Vec<Update> {
        let mut updates = Vec::new();
        self.remove(key, Some(revision), &mut updates);
        updates
    }

    fn put(&mut self, item: Versioned, updates: &mut Vec<Update>) {
        let source = item.object.key();
        if self
            .sources
            .get(&source)
            .is_some_and(|known| known.revision == item.revision)
        {
            return;
        }
        let outputs: Vec<(Key, Arc<AnyResource>)> = self
            .convert(&item.object)
            .into_iter()
            .map(|object| (object.key(), object))
            .filter(|(key, _)| self.wanted.contains(&key.kind))
            .collect();
        let keys: Vec<Key> = outputs.iter().map(|(key, _)| key.clone()).collect();
        let former = self.sources.insert(
            source.clone(),
            Source {
                revision: item.revision.clone(),
                outputs: keys.clone(),
            },
        );
        for key in former.into_iter().flat_map(|f| f.outputs) {
            if !keys.contains(&key) {
                self.withdraw(&source, &key, &item.revision, updates);
            }
        }
        for (key, object) in outputs {
            let candidates = self.visible.entry(key.clone()).or_default();
            candidates.retain(|c| c.source != source);
            let candidate = Candidate {
                source: source.clone(),
                object,
                revision: item.revision.clone(),
            };
            let place =
                candidates.partition_point(|c| rank(&c.source, &key) <= rank(&source, &key));
            candidates.insert(place, candidate);
            if place == 0 {
                updates.push(shown(&key, &candidates[0]));
            }
        }
    }

    fn convert(&mut self, object: &Arc<AnyResource>) -> Vec<Arc<AnyResource>> {
        if passes_unconverted(object.kind()) {
            return vec![Arc::clone(object)];
        }
        let conversion = cali_api::kubernetes::convert(object);
        let problem = |text| Problem {
            object: object.key(),
            text,
        };
        self.problems
            .extend(conversion.problems.into_iter().map(problem));
        conversion.resources.into_iter().map(Arc::new).collect()
    }

    fn remove(&mut self, source: &Key, revision: Option<&Revision>, updates: &mut Vec<Update>) {
        let Some(former) = self.sources.remove(source) else {
            return;
        };
        let revision = revision.unwrap_or(&former.revision);
        for key in &former.outputs {
            self.withdraw(source, key, revision, updates);
        }
    }

    fn withdraw(
        &mut self,
        source: &Key,
        key: &Key,
        revision: &Revision,
        updates: &mut Vec<Update>,
    ) {
        let Some(candidates) = self.visible.get_mut(key) else {
            return;
        };
        let was_shown = candidates.first().is_some_and(|c| c.source == *source);
        candidates.retain(|c| c.source != *source);
        match candidates.first() {
            Some(next) if was_shown => updates.push(shown(key, next)),
            Some(_) => {}
            None => {
                self.visible.remove(key);
                updates.push(Update {
                    key: key.clone(),
                    value: None,
                    revision: revision.clone(),
                });
            }
        }
    }
}

/// 0 for the stored object itself, 1 for what is converted from another kind.
fn rank(source: &Key, output: &Key) -> u8 {
    u8::from(source.kind != output.kind)
}

fn shown(key: &Key, candidate: &Candidate) -> Update {
    Update {
        key: key.clone(),
        value: Some(Arc::clone(&candidate.object)),
        revision: candidate.revision.clone(),
    }
}

/// Objects that every datastore has without their being stored.
fn built_in(kind: Kind) -> Option<Versioned> {
    (kind == Kind::Profile).then(|| Versioned {
        object: Arc::new(cali_api::kubernetes::default_allow_profile().into()),
        revision: Revision::from("built-in"),
    })
}

/// Calico kinds, and the native ones that readers take as they are.
pub(super) fn passes_unconverted(kind: Kind) -> bool {
    !kind.is_native() || matches!(kind, Kind::K8sService | Kind::K8sEndpointSlice)
}

/// The stored kinds that make up a kind of the stream.
pub(super) fn sources_of(kind: Kind) -> Vec<Kind> {
    let mut sources = vec![kind];
    match kind {
        Kind::Profile => sources.extend([Kind::K8sNamespace, Kind::K8sServiceAccount]),
        Kind::WorkloadEndpoint => sources.push(Kind::K8sPod),
        Kind::NetworkPolicy => sources.push(Kind::K8sNetworkPolicy),
        Kind::GlobalNetworkPolicy => sources.extend([
            Kind::K8sClusterNetworkPolicy,
            Kind::K8sAdminNetworkPolicy,
            Kind::K8sBaselineAdminNetworkPolicy,
        ]),
        Kind::Node => sources.push(Kind::K8sNode),
        _ => {}
    }
    sources
}
