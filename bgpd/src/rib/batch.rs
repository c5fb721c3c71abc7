//! What one evaluation found, sorted for packing: withdrawals by receivers, announcements by attributes, next hop and receivers.

use std::collections::{BTreeMap, HashMap};

use foldhash::fast::RandomState;

use super::export::Out;
use super::hops::HopId;
use super::member::Member;
use super::store::AttrId;
use crate::wire::Nlri;

/// Which members a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Target {
    All,
    Except(u16),
    Only(u16),
}

impl Target {
    pub(super) const fn includes(self, slot: u16) -> bool {
        match self {
            Self::All => true,
            Self::Except(other) => slot != other,
            Self::Only(other) => slot == other,
        }
    }
}

/// Announcements of one batch by attributes, next hop and receivers.
#[derive(Default)]
pub(super) struct Buckets {
    index: HashMap<BucketKey, usize, RandomState>,
    /// The last bucket: routes of one UPDATE follow each other.
    last: Option<(BucketKey, usize)>,
    pub(super) list: Vec<(AttrId, HopId, Target, Vec<Nlri>)>,
}

type BucketKey = (AttrId, HopId, Target);

impl Buckets {
    pub(super) fn add(&mut self, out: &Out, target: Target, route: Nlri) {
        let key = (out.attr, out.hop, target);
        let at = match self.last {
            Some((last, at)) if last == key => at,
            _ => {
                let list = &mut self.list;
                let at = *self.index.entry(key).or_insert_with(|| {
                    list.push((out.attr, out.hop, target, Vec::new()));
                    list.len() - 1
                });
                self.last = Some((key, at));
                at
            }
        };
        self.list[at].3.push(route);
    }
}

/// What one flush found.
#[derive(Default)]
pub(super) struct Batch {
    /// Members that are behind: changes are noted for each of them.
    pub(super) behind: Vec<u16>,
    pub(super) withdrawn: Vec<(Target, Vec<Nlri>)>,
    /// The list that the last withdrawal went to.
    last: usize,
    pub(super) buckets: Buckets,
    /// The last answer of [`Self::all_but`].
    asked: Option<(u16, Target)>,
}

impl Batch {
    pub(super) fn new(behind: Vec<u16>) -> Self {
        Self {
            behind,
            ..Self::default()
        }
    }

    pub(super) fn withdraw(&mut self, target: Target, route: Nlri) {
        let is = |(other, _): &(Target, _)| *other == target;
        if !self.withdrawn.get(self.last).is_some_and(is) {
            self.last = self.withdrawn.iter().position(is).unwrap_or_else(|| {
                self.withdrawn.push((target, Vec::new()));
                self.withdrawn.len() - 1
            });
        }
        self.withdrawn[self.last].1.push(route);
    }

    /// Who is told about a route of this peer.
    pub(super) fn all_but(&mut self, members: &BTreeMap<u16, Member>, source: u16) -> Target {
        match self.asked {
            Some((known, target)) if known == source => target,
            _ => {
                let target = if members.contains_key(&source) {
                    Target::Except(source)
                } else {
                    Target::All
                };
                self.asked = Some((source, target));
                target
            }
        }
    }
}
