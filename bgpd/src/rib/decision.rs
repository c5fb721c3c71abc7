//! Route selection (RFC 4271 §9.1.2.2 with RFC 4456 §9, RFC 9494 §4.2).
//!
//! The order of steps stands in [`Step`]. MED is compared as the RFC's pseudo code does: among the paths that are still equal,
//! a path is removed when another one of the same neighbouring AS has a lower MED. The outcome does not depend on the order in
//! which paths arrived.

use std::net::IpAddr;

use smallvec::SmallVec;

use super::hops::HopStore;
use super::store::AttrStore;
use super::table::{Path, mark};

/// What selection must know about the owner of a path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub(super) kind: OwnerKind,
    pub(super) router_id: u32,
    pub(super) addr: IpAddr,
}

/// Kind of the owner of a path, best first at the external/internal step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum OwnerKind {
    Local,
    Ebgp,
    Ibgp,
}

/// The step at which a path lost against the selected one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Long-lived stale paths come last (RFC 9494 §4.2).
    LongLivedStale,
    /// Preferred by an import rule.
    Preferred,
    /// Originated here.
    LocalOrigin,
    /// Higher LOCAL_PREF.
    LocalPref,
    /// Shorter AS_PATH.
    AsPathLength,
    /// Lower ORIGIN.
    Origin,
    /// Lower MED of the same neighbouring AS.
    Med,
    /// External over internal.
    PeerKind,
    /// Lower interior cost to the next hop.
    InteriorCost,
    /// Lower ORIGINATOR_ID or BGP identifier.
    RouterId,
    /// Shorter CLUSTER_LIST.
    ClusterListLength,
    /// Lower peer address.
    PeerAddress,
    /// Lower path identifier.
    PathId,
}

/// Selected path and its equals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    /// Index of the selected path.
    pub(super) best: Option<usize>,
    /// Indices of all paths as good up to the interior cost, the selected one included.
    pub(super) equal: SmallVec<[u16; 4]>,
}

/// Everything that selection looks at.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) attrs: &'a AttrStore,
    pub(super) hops: &'a HopStore,
    pub(super) owners: &'a [Owner],
    pub(super) assume_reachable: bool,
}

/// Steps up to ORIGIN; smaller is better.
type Early = (bool, bool, bool, u32, u16, u8);

impl Context<'_> {
    /// Whether the path may be selected at all.
    pub(super) fn eligible(&self, path: &Path) -> bool {
        !path.is_refused() && self.hops.metric(path.hop, self.assume_reachable).is_some()
    }

    fn owner(&self, path: &Path) -> &Owner {
        &self.owners[usize::from(path.peer)]
    }

    fn early(&self, path: &Path) -> Early {
        let key = self.attrs.key(path.attr);
        (
            path.has(mark::LONG_LIVED) || key.llgr_stale,
            !path.has(mark::PREFERRED),
            self.owner(path).kind != OwnerKind::Local,
            u32::MAX - key.local_pref,
            key.hops,
            key.origin,
        )
    }

    /// Steps after MED that must be equal for multipath.
    fn middle(&self, path: &Path) -> (OwnerKind, u32) {
        let metric = self
            .hops
            .metric(path.hop, self.assume_reachable)
            .unwrap_or(u32::MAX);
        (self.owner(path).kind, metric)
    }

    fn late(&self, path: &Path) -> (u32, u16, IpAddr, u32, u16) {
        let key = self.attrs.key(path.attr);
        let owner = self.owner(path);
        let id = if key.originator != 0 {
            key.originator
        } else {
            owner.router_id
        };
        (id, key.cluster_len, owner.addr, path.path_id, path.peer)
    }

    /// Whether a path of the same neighbouring AS in `rivals` has a lower MED.
    fn beaten_by_med(&self, path: &Path, rivals: &[&Path]) -> bool {
        let key = self.attrs.key(path.attr);
        rivals.iter().any(|rival| {
            let other = self.attrs.key(rival.attr);
            other.neighbor_as == key.neighbor_as && other.med < key.med
        })
    }

    /// Selects among the paths of one destination.
    pub(super) fn select(&self, paths: &[Path]) -> Selection {
        if let [only] = paths {
            let best = self.eligible(only).then_some(0);
            return Selection {
                best,
                equal: best.iter().map(|_| 0).collect(),
            };
        }
        let mut early: Option<Early> = None;
        let mut left: SmallVec<[u16; 8]> = SmallVec::new();
        for (index, path) in paths.iter().enumerate().filter(|(_, p)| self.eligible(p)) {
            let rank = self.early(path);
            if early.is_none_or(|best| rank < best) {
                early = Some(rank);
                left.clear();
            }
            if early == Some(rank) {
                left.push(index as u16);
            }
        }
        if left.len() > 1 {
            let rivals: SmallVec<[&Path; 8]> =
                left.iter().map(|i| &paths[usize::from(*i)]).collect();
            left.retain(|i| !self.beaten_by_med(&paths[usize::from(*i)], &rivals));
        }
        let best_middle = left
            .iter()
            .map(|i| self.middle(&paths[usize::from(*i)]))
            .min();
        left.retain(|i| Some(self.middle(&paths[usize::from(*i)])) == best_middle);
        let best = left
            .iter()
            .min_by_key(|i| self.late(&paths[usize::from(**i)]))
            .copied();
        Selection {
            best: best.map(usize::from),
            equal: left.into_iter().collect(),
        }
    }

    /// Why `path` is not selected although it could be; `None` for the selected path itself.
    pub(super) fn lost_at(&self, path: &Path, paths: &[Path]) -> Option<Step> {
        let best = &paths[self.select(paths).best?];
        if best == path {
            return None;
        }
        let (ours, theirs) = (self.early(path), self.early(best));
        if ours != theirs {
            return Some(if ours.0 != theirs.0 {
                Step::LongLivedStale
            } else if ours.1 != theirs.1 {
                Step::Preferred
            } else if ours.2 != theirs.2 {
                Step::LocalOrigin
            } else if ours.3 != theirs.3 {
                Step::LocalPref
            } else if ours.4 != theirs.4 {
                Step::AsPathLength
            } else {
                Step::Origin
            });
        }
        let rivals: SmallVec<[&Path; 8]> = paths
            .iter()
            .filter(|p| self.eligible(p) && self.early(p) == theirs)
            .collect();
        if self.beaten_by_med(path, &rivals) {
            return Some(Step::Med);
        }
        let (ours, theirs) = (self.middle(path), self.middle(best));
        if ours != theirs {
            let kind = ours.0 != theirs.0;
            return Some(if kind {
                Step::PeerKind
            } else {
                Step::InteriorCost
            });
        }
        let (ours, theirs) = (self.late(path), self.late(best));
        Some(if ours.0 != theirs.0 {
            Step::RouterId
        } else if ours.1 != theirs.1 {
            Step::ClusterListLength
        } else if ours.2 != theirs.2 {
            Step::PeerAddress
        } else {
            Step::PathId
        })
    }
}
