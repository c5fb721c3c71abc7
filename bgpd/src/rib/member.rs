//! Members of an update group: how far each one has read, and what those that are behind have to be told.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::event::PeerId;
use super::table::DestId;
use crate::wire::Nlri;

/// A walk over the table for one member.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    pub(super) next: DestId,
    /// The peer knows nothing yet of what lies ahead; otherwise (a refresh) withdrawals ahead must still be told.
    pub(super) first: bool,
    pub(super) end_of_rib: bool,
    pub(super) end_of_refresh: bool,
}

/// What a member that is behind has to be told, of one family.
#[derive(Debug, Default)]
pub(super) struct Behind {
    pub(super) walk: Option<Walk>,
    /// Routes that changed; the value says whether the peer may have the route.
    pub(super) changed: BTreeMap<Nlri, bool>,
}

impl Behind {
    pub(super) fn is_empty(&self) -> bool {
        self.walk.is_none() && self.changed.is_empty()
    }

    /// Destinations below this number may be known to the peer.
    pub(super) fn told_up_to(&self) -> DestId {
        self.walk
            .filter(|walk| walk.first)
            .map_or(DestId::MAX, |walk| walk.next)
    }

    /// Notes a change, unless the walk will come by.
    pub(super) fn note(&mut self, id: DestId, route: Nlri, told: bool) {
        if id < self.told_up_to() {
            self.changed.entry(route).or_insert(told);
        }
    }
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) peer: PeerId,
    /// Position in the log, if attached.
    pub(super) position: u64,
    pub(super) behind: [Behind; 2],
    /// Control messages to send first.
    pub(super) outbox: Vec<Bytes>,
    /// Nothing was left at the last pull.
    pub(super) idle: bool,
}

impl Member {
    pub(super) fn attached(&self) -> bool {
        self.behind.iter().all(Behind::is_empty)
    }
}
