//! Our own restart: when everything that peers can tell has been heard (RFC 4724 §4.1).

use std::collections::BTreeMap;

use crate::wire::{Family, FamilySet};

/// What a peer that was configured at the start has told so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard<P> {
    /// A session stands.
    Up {
        /// The peer.
        peer: P,
        /// Families that the peer will close with End-of-RIB; none without graceful restart.
        awaited: FamilySet,
        /// The peer has restarted itself (R bit): our End-of-RIB must not wait for its one, or each would wait for
        /// the other.
        restarted: bool,
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

/// Families for which a wait is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Our End-of-RIB may be sent: every peer that has not restarted itself was heard (RFC 4724 §4.1).
    pub converged: FamilySet,
    /// What the kernel holds from before may be removed: every peer was heard. A peer that says it restarts may
    /// have done so long ago (FRR says it for the whole of its restart time), and its routes are in use here.
    pub complete: FamilySet,
}

impl Progress {
    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.converged.is_empty() && self.complete.is_empty()
    }

    /// Both together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            converged: self.converged.union(other.converged),
            complete: self.complete.union(other.complete),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Awaited {
    families: FamilySet,
    restarted: bool,
}

/// Counts what is still awaited after our start, by family.
#[derive(Debug, Clone)]
pub struct Restarter<P> {
    awaited: BTreeMap<P, Awaited>,
    done: Progress,
}

impl<P: Ord> Restarter<P> {
    /// A start with these peers and the families of each.
    #[must_use]
    pub fn new(peers: impl IntoIterator<Item = (P, FamilySet)>) -> Self {
        let awaited = peers.into_iter().map(|(peer, families)| {
            let awaited = Awaited {
                families,
                restarted: false,
            };
            (peer, awaited)
        });
        Self {
            awaited: awaited.collect(),
            done: Progress::default(),
        }
    }

    /// Families for which our End-of-RIB may be sent.
    #[must_use]
    pub const fn converged(&self) -> FamilySet {
        self.done.converged
    }

    /// Whether our End-of-RIB is still kept back: the R bit of our OPENs.
    #[must_use]
    pub fn is_restarting(&self) -> bool {
        self.done.converged != FamilySet::ALL
    }

    /// Whether every peer was heard, or is no longer waited for.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.done.complete == FamilySet::ALL
    }

    /// What is done now. Call once after [`Self::new`] as well: without peers there is nothing to await.
    #[must_use]
    pub fn poll(&mut self) -> Progress {
        let done = |counts: fn(&Awaited) -> bool| {
            let open = self.awaited.values().filter(|one| counts(one));
            let open = open.fold(FamilySet::EMPTY, |all, one| all.union(one.families));
            FamilySet::ALL.difference(open)
        };
        let (converged, complete) = (done(|one| !one.restarted), done(|_| true));
        let new = Progress {
            converged: converged.difference(self.done.converged),
            complete: complete.difference(self.done.complete),
        };
        self.done = self.done.and(new);
        new
    }

    /// Takes note, and says what is done by it.
    #[must_use]
    pub fn on(&mut self, heard: Heard<P>) -> Progress {
        match heard {
            Heard::Up {
                peer,
                awaited,
                restarted,
            } => {
                if let Some(open) = self.awaited.get_mut(&peer) {
                    open.families = open.families.intersection(awaited);
                    open.restarted = restarted;
                }
            }
            Heard::EndOfRib { peer, family } => {
                if let Some(open) = self.awaited.get_mut(&peer) {
                    open.families = open.families.difference(FamilySet::from_iter([family]));
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

    fn up(peer: &'static str, awaited: FamilySet, restarted: bool) -> Heard<&'static str> {
        Heard::Up {
            peer,
            awaited,
            restarted,
        }
    }

    const fn end(peer: &'static str, family: Family) -> Heard<&'static str> {
        Heard::EndOfRib { peer, family }
    }

    const fn both(families: FamilySet) -> Progress {
        Progress {
            converged: families,
            complete: families,
        }
    }

    #[test]
    fn converges_per_family_when_every_peer_has_finished() {
        let mut start = Restarter::new([("a", FamilySet::IPV4), ("b", FamilySet::IPV4)]);
        assert_eq!(start.poll(), both(FamilySet::IPV6));
        assert!(start.on(up("a", FamilySet::IPV4, false)).is_empty());
        assert!(start.on(end("a", Family::IPV4_UNICAST)).is_empty());
        assert!(start.is_restarting());
        // The second peer has no graceful restart: it is not awaited.
        let progress = start.on(up("b", FamilySet::EMPTY, false));
        assert_eq!(progress, both(FamilySet::IPV4));
        assert!(!start.is_restarting());
    }

    #[test]
    fn a_peer_that_restarted_too_delays_the_removal_of_routes_but_not_our_end_of_rib() {
        let mut start = Restarter::new([("a", FamilySet::ALL)]);
        let progress = start.on(up("a", FamilySet::ALL, true));
        assert_eq!(
            (progress.converged, progress.complete),
            (FamilySet::ALL, FamilySet::EMPTY)
        );
        assert!(!start.is_restarting() && !start.is_complete());
        let progress = start.on(end("a", Family::IPV4_UNICAST));
        assert_eq!(
            (progress.converged, progress.complete),
            (FamilySet::EMPTY, FamilySet::IPV4)
        );
        assert_eq!(
            start.on(end("a", Family::IPV6_UNICAST)).complete,
            FamilySet::IPV6
        );
        assert!(start.is_complete());
    }

    #[test]
    fn a_peer_that_stays_away_delays_until_the_timer() {
        let mut start = Restarter::new([("a", FamilySet::ALL)]);
        assert!(start.poll().is_empty());
        assert_eq!(start.on(Heard::Deferred), both(FamilySet::ALL));
    }

    #[test]
    fn a_removed_peer_is_not_awaited() {
        let mut start = Restarter::new([("a", FamilySet::ALL), ("b", FamilySet::EMPTY)]);
        assert_eq!(start.on(Heard::Gone { peer: "a" }), both(FamilySet::ALL));
    }
}
