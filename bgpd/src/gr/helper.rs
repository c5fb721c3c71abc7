//! Keeping the routes of a peer while it restarts (RFC 4724 §4.2).

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
}

/// The two timers of a helper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HelperTimer {
    /// The peer must be back before this ends.
    Restart,
    /// The peer, back again, must have sent End-of-RIB before this ends.
    Stale,
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
    stale: FamilySet,
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
        // §4.2: families that the new OPEN does not name, or whose forwarding state was lost, go at once.
        let kept = offered
            .map(|o| o.families.intersection(o.forwarding))
            .unwrap_or_default();
        let lost = self.stale.difference(kept);
        if !lost.is_empty() {
            out.push(HelperAction::Sweep(lost));
        }
        self.stale = self.stale.intersection(kept);
        if !self.stale.is_empty() {
            out.push(HelperAction::Set(HelperTimer::Stale, self.stale_time));
        }
        out
    }

    fn on_down(&mut self, keep: bool) -> Vec<HelperAction> {
        let mut out = Vec::new();
        self.up = false;
        if !self.stale.is_empty() {
            // §4.2: routes still stale from the former restart do not survive a second one.
            out.push(HelperAction::Sweep(self.stale));
            out.push(HelperAction::Cancel(HelperTimer::Stale));
            out.push(HelperAction::Cancel(HelperTimer::Restart));
            self.stale = FamilySet::EMPTY;
        }
        let offered = self.offered.take().filter(|o| keep && o.restart_time > 0);
        let families = offered.map(|o| o.families).unwrap_or_default();
        let gone = FamilySet::ALL.difference(families);
        if !gone.is_empty() {
            out.push(HelperAction::Purge(gone));
        }
        if let Some(offered) = offered
            && !families.is_empty()
        {
            self.stale = families;
            out.push(HelperAction::MarkStale(families));
            let limit = Duration::from_secs(u64::from(offered.restart_time));
            out.push(HelperAction::Set(HelperTimer::Restart, limit));
        }
        out
    }

    fn on_end_of_rib(&mut self, family: Family) -> Vec<HelperAction> {
        let done = self.stale.intersection(FamilySet::from_iter([family]));
        if done.is_empty() {
            return Vec::new();
        }
        self.stale = self.stale.difference(done);
        let mut out = vec![HelperAction::Sweep(done)];
        if self.stale.is_empty() {
            out.push(HelperAction::Cancel(HelperTimer::Stale));
        }
        out
    }

    fn on_timer(&mut self, timer: HelperTimer) -> Vec<HelperAction> {
        let due = match timer {
            HelperTimer::Restart => !self.up,
            HelperTimer::Stale => self.up,
        };
        if !due || self.stale.is_empty() {
            return Vec::new();
        }
        vec![HelperAction::Sweep(std::mem::take(&mut self.stale))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: PeerRestart = PeerRestart {
        families: FamilySet::IPV4,
        forwarding: FamilySet::IPV4,
        restart_time: 120,
    };

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
        assert_eq!(actions[0], HelperAction::Sweep(FamilySet::IPV4));
        assert!(
            actions.contains(&HelperAction::MarkStale(FamilySet::IPV4)),
            "{actions:?}"
        );
    }
}
