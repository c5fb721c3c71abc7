//! Our own restart: when everything that peers can tell has been heard (RFC 4724 §4.1).

use std::collections::BTreeMap;

use crate::wire::{Family, FamilySet};

/// What a peer that was configured at the start has told so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard<P> {
    /// A session stands. `awaited` are its families for which the peer will send End-of-RIB; it is empty
    /// when the peer has no graceful restart or has restarted itself (R bit): waiting for it would be
    /// waiting for each other.
    Up {
        /// The peer.
        peer: P,
        /// Families that the peer will close with End-of-RIB.
        awaited: FamilySet,
    },
    /// End-of-RIB arrived.
    EndOfRib {
        /// The peer.
        peer: P,
        /// Its family.
        family: Family,
    },
    /// The peer was removed or shut down.
    Gone {
        /// The peer.
        peer: P,
    },
    /// The deferral timer ran out: no more waiting.
    Deferred,
}

/// Counts what is still awaited after our start, by family.
#[derive(Debug, Clone)]
pub struct Restarter<P> {
    awaited: BTreeMap<P, FamilySet>,
    converged: FamilySet,
}

impl<P: Ord> Restarter<P> {
    /// A start with these peers and the families of each.
    #[must_use]
    pub fn new(peers: impl IntoIterator<Item = (P, FamilySet)>) -> Self {
        Self {
            awaited: peers.into_iter().collect(),
            converged: FamilySet::EMPTY,
        }
    }

    /// Families for which everything has been heard.
    #[must_use]
    pub const fn converged(&self) -> FamilySet {
        self.converged
    }

    /// Whether we still are in our restart: the R bit of our OPENs.
    #[must_use]
    pub fn is_restarting(&self) -> bool {
        self.converged != FamilySet::ALL
    }

    /// Families that converge now. Call once after [`Self::new`] as well: without peers there is nothing to await.
    #[must_use]
    pub fn poll(&mut self) -> FamilySet {
        let open = self
            .awaited
            .values()
            .fold(FamilySet::EMPTY, |all, one| all.union(*one));
        let new = FamilySet::ALL.difference(open).difference(self.converged);
        self.converged = self.converged.union(new);
        new
    }

    /// Takes note, and says which families converge by it.
    #[must_use]
    pub fn on(&mut self, heard: Heard<P>) -> FamilySet {
        match heard {
            Heard::Up { peer, awaited } => {
                if let Some(open) = self.awaited.get_mut(&peer) {
                    *open = open.intersection(awaited);
                }
            }
            Heard::EndOfRib { peer, family } => {
                if let Some(open) = self.awaited.get_mut(&peer) {
                    *open = open.difference(FamilySet::from_iter([family]));
                }
            }
            Heard::Gone { peer } => {
                self.awaited.remove(&peer);
            }
            Heard::Deferred => self.awaited.clear(),
        }
        self.poll()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converges_per_family_when_every_peer_has_finished() {
        let mut start = Restarter::new([("a", FamilySet::IPV4), ("b", FamilySet::IPV4)]);
        assert_eq!(start.poll(), FamilySet::IPV6);
        assert_eq!(
            start.on(Heard::Up {
                peer: "a",
                awaited: FamilySet::IPV4
            }),
            FamilySet::EMPTY
        );
        assert_eq!(
            start.on(Heard::EndOfRib {
                peer: "a",
                family: Family::IPV4_UNICAST
            }),
            FamilySet::EMPTY
        );
        assert!(start.is_restarting());
        // The second peer restarted as well: it is not awaited.
        assert_eq!(
            start.on(Heard::Up {
                peer: "b",
                awaited: FamilySet::EMPTY
            }),
            FamilySet::IPV4
        );
        assert!(!start.is_restarting());
    }

    #[test]
    fn a_peer_that_stays_away_delays_until_the_timer() {
        let mut start = Restarter::new([("a", FamilySet::ALL)]);
        assert_eq!(start.poll(), FamilySet::EMPTY);
        assert_eq!(start.on(Heard::Deferred), FamilySet::ALL);
    }

    #[test]
    fn a_removed_peer_is_not_awaited() {
        let mut start = Restarter::new([("a", FamilySet::ALL), ("b", FamilySet::EMPTY)]);
        assert_eq!(start.on(Heard::Gone { peer: "a" }), FamilySet::ALL);
    }
}
