//! Neighbours that come by themselves: any address of a range in the settings may connect and becomes a neighbour as long
//! as its session lasts.
//!
//! Such a neighbour is like one that is named, except that it is never dialled and never awaited after our own restart,
//! that its password stands on the listening socket for the whole range, and that it is forgotten when it is gone for a
//! while (with the routes that are kept over its restart, not before they are gone).

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::State;
use super::settings::{Neighbour, Range, Settings};
use crate::fsm;

/// How long a neighbour without a connection is remembered.
const REMEMBERED: Duration = Duration::from_secs(10);

/// What is known about a neighbour because it came by itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dynamic {
    /// When it is forgotten, unless it is back by then.
    pub(super) expires: Option<Instant>,
}

impl Dynamic {
    fn new(now: Instant) -> Self {
        Self {
            expires: Some(now + REMEMBERED),
        }
    }

    /// The session's state is another one.
    pub(super) fn on_state(&mut self, state: fsm::State, now: Instant) {
        self.expires = match state {
            fsm::State::Idle | fsm::State::Connect | fsm::State::Active => Some(now + REMEMBERED),
            fsm::State::OpenSent | fsm::State::OpenConfirm | fsm::State::Established => None,
        };
    }
}

/// The range that an address belongs to.
fn range_of(settings: &Settings, address: IpAddr) -> Option<&Range> {
    settings
        .ranges
        .iter()
        .filter(|range| range.prefix.contains_addr(address))
        .max_by_key(|range| range.prefix.len())
}

/// What an address of a range is as a neighbour.
fn member(range: &Range) -> Neighbour {
    let mut neighbour = range.neighbour.clone();
    neighbour.session.passive = true;
    neighbour
}

impl State {
    /// Makes a neighbour of an address that has connected, if a range allows it. Whether there is one now.
    pub(super) fn welcome(&mut self, address: IpAddr) -> bool {
        let Some(range) = range_of(&self.settings, address) else {
            return false;
        };
        let (prefix, limit, neighbour) = (range.prefix, range.limit, member(range));
        let members = self
            .neighbours
            .iter()
            .filter(|(a, n)| n.dynamic.is_some() && prefix.contains_addr(**a));
        if members.count() >= usize::from(limit) {
            if self.admission.stranger(Instant::now()) == super::admission::Verdict::Admit {
                warn!(peer = %address, range = %prefix, limit, "refused a connection: the range has all the neighbours that it may have");
            }
            return false;
        }
        self.add(address, &neighbour, Some(Dynamic::new(Instant::now())));
        self.neighbours.contains_key(&address)
    }

    /// Applies new settings to the neighbours that came by themselves.
    pub(super) fn configure_dynamic(&mut self, old: &Settings) {
        for range in &old.ranges {
            let same = |new: &&Range| new.prefix == range.prefix;
            let kept = self.settings.ranges.iter().find(same);
            let before = range.neighbour.session.protection.password.as_deref();
            let after = kept.and_then(|r| r.neighbour.session.protection.password.as_deref());
            if before.is_some() && after.is_none() {
                self.change_key_of_range(range.prefix, None);
            }
        }
        let dynamic = self.neighbours.iter().filter(|(_, n)| n.dynamic.is_some());
        let dynamic: Vec<IpAddr> = dynamic.map(|(address, _)| *address).collect();
        for address in dynamic {
            let named = self.settings.neighbours.contains_key(&address);
            match range_of(&self.settings, address).filter(|_| !named) {
                None => self.remove(address),
                Some(range) => {
                    let after = member(range);
                    let before = self.neighbours[&address].config.clone();
                    if before != after {
                        self.change(address, &before, &after);
                    }
                }
            }
        }
    }

    /// Forgets those that have been away for long enough.
    pub(super) fn forget_dynamic(&mut self, now: Instant) {
        let mut gone = Vec::new();
        for (address, running) in &mut self.neighbours {
            let Some(dynamic) = &mut running.dynamic else {
                continue;
            };
            if dynamic.expires.is_some_and(|at| at <= now) {
                if running.helper.stale().is_empty() {
                    gone.push(*address);
                } else {
                    dynamic.expires = Some(now + REMEMBERED);
                }
            }
        }
        for address in gone {
            self.remove(address);
        }
    }

    /// Sets the passwords of all ranges on the listening sockets.
    pub(super) fn protect_ranges(&mut self) {
        for range in self.settings.ranges.clone() {
            if let Some(password) = &range.neighbour.session.protection.password {
                self.change_key_of_range(range.prefix, Some(password));
            }
        }
    }
}
