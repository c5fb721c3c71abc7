//! Keeping the routes of a peer while it restarts (RFC 4724 §4.2), and for much longer as a last resort (RFC 9494 §4.2).
//!
//! A family whose peer is away goes through two phases: stale (routes are used as before, until the restart time ends),
//! then, where both sides offered it, long-lived stale (routes are used where there is no other, until the family's
//! long-lived stale time ends). That time runs on when the peer comes back, and when it goes away again, until End-of-RIB.

use std::time::Duration;

use crate::wire::{Family, FamilySet};

/// What a peer offered in its OPEN, reduced to the families that the session carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PeerRestart {
    /// Families whose routes may be kept when the session is lost.
    pub families: FamilySet,
    /// Families whose forwarding state the peer kept over its last restart (F bit).
    pub forwarding: FamilySet,
    /// How long the peer's restart may take, in seconds.
    pub restart_time: u16,
    /// Long-lived stale time in seconds, by [`Family::index`]; 0 where it is not offered (RFC 9494 §3.1).
    pub long_lived: [u32; 2],
    /// Families whose forwarding state the peer kept over a long absence (F bit of the long-lived capability).
    pub long_lived_forwarding: FamilySet,
}

impl PeerRestart {
    fn long_lived_time(&self, family: Family) -> Option<Duration> {
        let seconds = self.long_lived.get(family.index()?).copied()?;
        (seconds > 0).then(|| Duration::from_secs(seconds.into()))
    }

    fn long_lived_families(&self) -> FamilySet {
        let named = Family::SUPPORTED.into_iter();
        named
            .filter(|f| self.long_lived_time(*f).is_some())
            .collect()
    }
}

/// The timers of a helper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HelperTimer {
    /// The peer must be back before this ends.
    Restart,
    /// The peer, back again, must have sent End-of-RIB before this ends.
    Stale,
    /// Routes of this family may be long-lived stale until this ends.
    LongLived(Family),
}

/// What happened to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HelperEvent {
    /// A session stands; with what the peer offered, if it offered graceful restart.
    Up(Option<PeerRestart>),
    /// The session ended; `keep` unless a NOTIFICATION or the configuration ended it.
    Down {
        /// Routes may be kept.
        keep: bool,
    },
    /// End-of-RIB arrived.
    EndOfRib(Family),
    /// A timer ran out.
    Timer(HelperTimer),
}

/// What to do with the peer's routes, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HelperAction {
    /// Mark the routes of these families stale, and keep using them.
    MarkStale(FamilySet),
    /// Make the stale routes of these families long-lived stale: least preferred, without those that forbid it.
    LongLived(FamilySet),
    /// Drop the routes of these families that are still marked.
    Sweep(FamilySet),
    /// Drop all routes of these families.
    Purge(FamilySet),
    /// Start a timer.
    Set(HelperTimer, Duration),
    /// Stop a timer.
    Cancel(HelperTimer),
}

/// The helper side for one peer.
#[derive(Debug, Clone, Default)]
pub struct Helper {
    offered: Option<PeerRestart>,
    /// What was offered when the session was lost.
    lost: PeerRestart,
    stale: FamilySet,
    /// Of the stale families, those that are long-lived stale.
    long_lived: FamilySet,
    up: bool,
    stale_time: Duration,
}

impl Helper {
    /// A helper that waits at most `stale_time` for End-of-RIB of a peer that came back.
    #[must_use]
    pub fn new(stale_time: Duration) -> Self {
        Self {
            stale_time,
            ..Self::default()
        }
    }

    /// Families with routes that are kept for a peer that is away or has not finished.
    #[must_use]
    pub const fn stale(&self) -> FamilySet {
        self.stale
    }

    /// Takes one event and says what to do.
    #[must_use]
    pub fn handle(&mut self, event: HelperEvent) -> Vec<HelperAction> {
        match event {
            HelperEvent::Up(offered) => self.on_up(offered),
            HelperEvent::Down { keep } => self.on_down(keep),
            HelperEvent::EndOfRib(family) => self.on_end_of_rib(family),
            HelperEvent::Timer(timer) => self.on_timer(timer),
        }
    }

    fn on_up(&mut self, offered: Option<PeerRestart>) -> Vec<HelperAction> {
        let mut out = Vec::new();
        self.up = true;
        self.offered = offered;
        if self.stale.is_empty() {
            return out;
        }
        out.push(HelperAction::Cancel(HelperTimer::Restart));
        // RFC 4724 §4.2: families that the new OPEN does not name, or whose forwarding state was lost, go at once. The
        // same holds for long-lived stale ones and their capability (RFC 9494 §4.2).
        let offer = offered.unwrap_or_default();
        let short = offer.families.intersection(offer.forwarding);
        let long = offer
            .long_lived_families()
            .intersection(offer.long_lived_forwarding);
        let kept = short
            .difference(self.long_lived)
            .union(long.intersection(self.long_lived));
        self.sweep(self.stale.difference(kept), &mut out);
        if !self.stale.is_empty() {
            out.push(HelperAction::Set(HelperTimer::Stale, self.stale_time));
        }
        out
    }

    fn on_down(&mut self, keep: bool) -> Vec<HelperAction> {
        let mut out = Vec::new();
        self.up = false;
        let offered = self.offered.take().filter(|_| keep).unwrap_or_default();
        let short = if offered.restart_time > 0 {
            offered.families
        } else {
            FamilySet::EMPTY
        };
        let families = short.union(offered.long_lived_families());
        if !self.stale.is_empty() {
            // RFC 4724 §4.2: routes still stale from the former restart do not survive a second one. Long-lived stale
            // ones do, for the rest of their time.
            out.push(HelperAction::Cancel(HelperTimer::Stale));
            out.push(HelperAction::Cancel(HelperTimer::Restart));
            let over = self
                .stale
                .difference(self.long_lived.intersection(families));
            self.sweep(over, &mut out);
        }
        let gone = FamilySet::ALL.difference(families);
        if !gone.is_empty() {
            out.push(HelperAction::Purge(gone));
        }
        if families.is_empty() {
            return out;
        }
        self.lost = offered;
        self.stale = families;
        out.push(HelperAction::MarkStale(families));
        if short.is_empty() {
            self.begin_long_lived(&mut out);
        } else {
            let limit = Duration::from_secs(u64::from(offered.restart_time));
            out.push(HelperAction::Set(HelperTimer::Restart, limit));
        }
        out
    }

    /// The restart time is over: what may not be kept any longer goes.
    fn begin_long_lived(&mut self, out: &mut Vec<HelperAction>) {
        let long = self.stale.intersection(self.lost.long_lived_families());
        self.sweep(self.stale.difference(long), out);
        if long.is_empty() {
            return;
        }
        out.push(HelperAction::LongLived(long));
        for family in long.difference(self.long_lived).iter() {
            if let Some(time) = self.lost.long_lived_time(family) {
                out.push(HelperAction::Set(HelperTimer::LongLived(family), time));
            }
        }
        self.long_lived = long;
    }

    /// Drops what is still stale of these families, with the timers that ran for them.
    fn sweep(&mut self, families: FamilySet, out: &mut Vec<HelperAction>) {
        let families = families.intersection(self.stale);
        if families.is_empty() {
            return;
        }
        out.push(HelperAction::Sweep(families));
        for family in families.intersection(self.long_lived).iter() {
            out.push(HelperAction::Cancel(HelperTimer::LongLived(family)));
        }
        self.stale = self.stale.difference(families);
        self.long_lived = self.long_lived.difference(families);
    }

    fn on_end_of_rib(&mut self, family: Family) -> Vec<HelperAction> {
        let mut out = Vec::new();
        let done = self.stale.intersection(FamilySet::from_iter([family]));
        if done.is_empty() {
            return out;
        }
        self.sweep(done, &mut out);
        if self.stale.is_empty() {
            out.push(HelperAction::Cancel(HelperTimer::Stale));
        }
        out
    }

    fn on_timer(&mut self, timer: HelperTimer) -> Vec<HelperAction> {
        let mut out = Vec::new();
        match timer {
            HelperTimer::Restart if !self.up => self.begin_long_lived(&mut out),
            HelperTimer::Stale if self.up => self.sweep(self.stale, &mut out),
            HelperTimer::LongLived(family) => {
                let over = self.long_lived.intersection(FamilySet::from_iter([family]));
                self.sweep(over, &mut out);
            }
            HelperTimer::Restart | HelperTimer::Stale => {}
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: PeerRestart = PeerRestart {
        families: FamilySet::IPV4,
        forwarding: FamilySet::IPV4,
        restart_time: 120,
        long_lived: [0, 0],
        long_lived_forwarding: FamilySet::EMPTY,
    };

    const LONG: PeerRestart = PeerRestart {
        long_lived: [3600, 0],
        long_lived_forwarding: FamilySet::IPV4,
        ..OFFER
    };
    const LONG_LIVED: HelperTimer = HelperTimer::LongLived(Family::IPV4_UNICAST);

    /// The peer is away for longer than its restart time.
    fn long_lost() -> Helper {
        let mut helper = Helper::new(Duration::from_secs(60));
        let _ = helper.handle(HelperEvent::Up(Some(LONG)));
        let _ = helper.handle(HelperEvent::Down { keep: true });
        assert_eq!(
            helper.handle(HelperEvent::Timer(HelperTimer::Restart)),
            [
                HelperAction::LongLived(FamilySet::IPV4),
                HelperAction::Set(LONG_LIVED, Duration::from_secs(3600)),
            ]
        );
        helper
    }

    fn lost() -> Helper {
        let mut helper = Helper::new(Duration::from_secs(60));
        assert_eq!(helper.handle(HelperEvent::Up(Some(OFFER))), []);
        assert_eq!(
            helper.handle(HelperEvent::Down { keep: true }),
            [
                HelperAction::Purge(FamilySet::IPV6),
                HelperAction::MarkStale(FamilySet::IPV4),
                HelperAction::Set(HelperTimer::Restart, Duration::from_secs(120)),
            ]
        );
        helper
    }

    #[test]
    fn routes_stay_until_end_of_rib_of_the_new_session() {
        let mut helper = lost();
        assert_eq!(
            helper.handle(HelperEvent::Up(Some(OFFER))),
            [
                HelperAction::Cancel(HelperTimer::Restart),
                HelperAction::Set(HelperTimer::Stale, Duration::from_secs(60)),
            ]
        );
        assert_eq!(
            helper.handle(HelperEvent::EndOfRib(Family::IPV4_UNICAST)),
            [
                HelperAction::Sweep(FamilySet::IPV4),
                HelperAction::Cancel(HelperTimer::Stale)
            ]
        );
        assert_eq!(
            helper.handle(HelperEvent::EndOfRib(Family::IPV4_UNICAST)),
            []
        );
    }

    #[test]
    fn a_peer_that_does_not_come_back_loses_its_routes() {
        let mut helper = lost();
        assert_eq!(
            helper.handle(HelperEvent::Timer(HelperTimer::Restart)),
            [HelperAction::Sweep(FamilySet::IPV4)]
        );
    }

    #[test]
    fn a_peer_that_lost_its_forwarding_state_loses_its_routes_at_once() {
        let mut helper = lost();
        let offer = PeerRestart {
            forwarding: FamilySet::EMPTY,
            ..OFFER
        };
        assert_eq!(
            helper.handle(HelperEvent::Up(Some(offer))),
            [
                HelperAction::Cancel(HelperTimer::Restart),
                HelperAction::Sweep(FamilySet::IPV4)
            ]
        );
    }

    #[test]
    fn a_notification_purges() {
        let mut helper = Helper::new(Duration::from_secs(60));
        let _ = helper.handle(HelperEvent::Up(Some(OFFER)));
        assert_eq!(
            helper.handle(HelperEvent::Down { keep: false }),
            [HelperAction::Purge(FamilySet::ALL)]
        );
    }

    #[test]
    fn a_second_loss_before_end_of_rib_drops_what_was_still_stale() {
        let mut helper = lost();
        let _ = helper.handle(HelperEvent::Up(Some(OFFER)));
        let actions = helper.handle(HelperEvent::Down { keep: true });
        assert!(
            actions.contains(&HelperAction::Sweep(FamilySet::IPV4)),
            "{actions:?}"
        );
        assert!(
            actions.contains(&HelperAction::MarkStale(FamilySet::IPV4)),
            "{actions:?}"
        );
    }

    #[test]
    fn long_lived_routes_stay_until_their_time_ends() {
        let mut helper = long_lost();
        assert_eq!(helper.stale(), FamilySet::IPV4);
        assert_eq!(
            helper.handle(HelperEvent::Timer(LONG_LIVED)),
            [
                HelperAction::Sweep(FamilySet::IPV4),
                HelperAction::Cancel(LONG_LIVED)
            ]
        );
        assert_eq!(helper.stale(), FamilySet::EMPTY);
    }

    #[test]
    fn without_a_restart_time_routes_are_long_lived_at_once() {
        let mut helper = Helper::new(Duration::from_secs(60));
        let offer = PeerRestart {
            restart_time: 0,
            ..LONG
        };
        let _ = helper.handle(HelperEvent::Up(Some(offer)));
        let actions = helper.handle(HelperEvent::Down { keep: true });
        assert!(
            actions.contains(&HelperAction::LongLived(FamilySet::IPV4)),
            "{actions:?}"
        );
    }

    #[test]
    fn a_peer_that_comes_back_late_refreshes_its_long_lived_routes() {
        let mut helper = long_lost();
        assert_eq!(
            helper.handle(HelperEvent::Up(Some(LONG))),
            [
                HelperAction::Cancel(HelperTimer::Restart),
                HelperAction::Set(HelperTimer::Stale, Duration::from_secs(60)),
            ]
        );
        assert_eq!(
            helper.handle(HelperEvent::EndOfRib(Family::IPV4_UNICAST)),
            [
                HelperAction::Sweep(FamilySet::IPV4),
                HelperAction::Cancel(LONG_LIVED),
                HelperAction::Cancel(HelperTimer::Stale),
            ]
        );
    }

    #[test]
    fn a_peer_that_lost_its_state_over_a_long_absence_loses_its_routes_at_once() {
        let mut helper = long_lost();
        let offer = PeerRestart {
            long_lived_forwarding: FamilySet::EMPTY,
            ..LONG
        };
        let actions = helper.handle(HelperEvent::Up(Some(offer)));
        assert!(
            actions.contains(&HelperAction::Sweep(FamilySet::IPV4)),
            "{actions:?}"
        );
    }

    #[test]
    fn the_long_lived_time_is_not_begun_again_by_a_short_return() {
        let mut helper = long_lost();
        let _ = helper.handle(HelperEvent::Up(Some(LONG)));
        let actions = helper.handle(HelperEvent::Down { keep: true });
        assert!(
            !actions.contains(&HelperAction::Sweep(FamilySet::IPV4)),
            "{actions:?}"
        );
        assert_eq!(
            helper.handle(HelperEvent::Timer(HelperTimer::Restart)),
            [HelperAction::LongLived(FamilySet::IPV4)]
        );
    }
}
