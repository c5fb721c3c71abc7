//! Graceful restart of neighbours and of ourselves, as far as the speaker carries it out.

use std::net::IpAddr;

use bytes::Bytes;
use tokio::time::Instant;
use tracing::info;

use super::State;
use crate::fsm::DownCause;
use crate::gr::{Heard, HelperAction, HelperEvent, HelperTimer, PeerRestart};
use crate::rib::RibInput;
use crate::session::SessionUp;
use crate::wire::{Codec, Family, FamilySet, Message, Negotiated, Update};

/// Keeps End-of-RIB markers of one session back until our own restart is over: the peer would otherwise drop
/// routes that we are about to learn again and send it.
#[derive(Debug, Default)]
pub(super) struct EndOfRib {
    held: FamilySet,
}

fn marker(family: Family, codec: &Codec) -> Option<Bytes> {
    Message::Update(Box::new(Update::end_of_rib(family)))
        .encode(codec)
        .ok()
}

impl EndOfRib {
    /// A new session.
    pub(super) fn reset(&mut self) {
        self.held = FamilySet::EMPTY;
    }

    /// Takes markers of families that have not converged out of what the table gave for the peer.
    pub(super) fn pass(
        &mut self,
        messages: Vec<Bytes>,
        converged: FamilySet,
        codec: &Codec,
    ) -> Vec<Bytes> {
        let open = FamilySet::ALL.difference(converged);
        if open.is_empty() {
            return messages;
        }
        let markers: Vec<(Family, Bytes)> = open
            .iter()
            .filter_map(|family| Some((family, marker(family, codec)?)))
            .collect();
        let held = &mut self.held;
        messages
            .into_iter()
            .filter(
                |message| match markers.iter().find(|(_, marker)| marker == message) {
                    Some((family, _)) => !held.insert(*family),
                    None => true,
                },
            )
            .collect()
    }

    /// Whether a marker that was kept back may go now.
    pub(super) fn is_due(&self, converged: FamilySet) -> bool {
        !self.held.intersection(converged).is_empty()
    }

    /// The markers that may go now.
    pub(super) fn release(&mut self, converged: FamilySet, codec: &Codec) -> Vec<Bytes> {
        let due = self.held.intersection(converged);
        self.held = self.held.difference(due);
        due.iter()
            .filter_map(|family| marker(family, codec))
            .collect()
    }
}

/// What the peer offered, reduced to the families of the session.
fn offered(negotiated: &Negotiated) -> Option<PeerRestart> {
    let gr = negotiated.graceful_restart.as_ref()?;
    let named: FamilySet = gr.families.iter().map(|f| f.family).collect();
    let kept: FamilySet = gr
        .families
        .iter()
        .filter(|f| f.forwarding_preserved)
        .map(|f| f.family)
        .collect();
    let carried = negotiated.codec.families;
    let long = negotiated.long_lived.iter();
    let long: Vec<_> = long.filter(|f| carried.contains(f.family)).collect();
    let mut long_lived = [0; 2];
    for family in &long {
        if let Some(index) = family.family.index() {
            long_lived[index] = family.stale_time;
        }
    }
    Some(PeerRestart {
        long_lived,
        long_lived_forwarding: long
            .iter()
            .filter(|f| f.forwarding_preserved)
            .map(|f| f.family)
            .collect(),
        families: named.intersection(carried),
        forwarding: kept.intersection(carried),
        restart_time: gr.restart_time,
    })
}

impl State {
    pub(super) fn session_up(&mut self, address: IpAddr, up: SessionUp) {
        let Some(running) = self.neighbours.get_mut(&address) else {
            return;
        };
        let actions = running
            .helper
            .handle(HelperEvent::Up(offered(&up.negotiated)));
        // What the helper has not given up waits for End-of-RIB.
        let preserved = running.helper.stale();
        let running = &self.neighbours[&address];
        let config = self.rib_config(address, running, &up);
        let peer = running.id();
        self.rib.handle(RibInput::PeerUp {
            peer,
            config,
            preserved,
        });
        // A peer with the capability sends End-of-RIB for every family of the session, whether or not it names the
        // family as one that it preserves (RFC 4724 §2, §3: naming none means helper only).
        let restart = up.negotiated.graceful_restart.as_ref();
        let awaited = match restart {
            Some(_) => up.negotiated.codec.families,
            None => FamilySet::EMPTY,
        };
        let restarted = restart.is_some_and(|gr| gr.restarting);
        if let Some(running) = self.neighbours.get_mut(&address) {
            running.live = Some(up);
            running.full = false;
            running.end_of_rib.reset();
        }
        self.help(address, actions);
        let progress = self.restarter.on(Heard::Up {
            peer: address,
            awaited,
            restarted,
        });
        self.on_progress(progress);
        self.feed(address, peer.epoch);
    }

    pub(super) fn session_down(&mut self, address: IpAddr, epoch: u32, cause: &DownCause) {
        let Some(running) = self.neighbours.get_mut(&address) else {
            return;
        };
        if running.epoch != epoch {
            return;
        }
        let Some(live) = running.live.take() else {
            return;
        };
        let actions = running.helper.handle(HelperEvent::Down {
            keep: cause.keeps_routes(),
        });
        let (peer, retain) = (running.id(), running.helper.stale());
        self.monitor_down(address, peer.slot, &live, Some(cause));
        if !retain.is_empty() {
            info!(peer = %address, families = ?retain, "keeping the neighbour's routes while it restarts");
        }
        // What is still stale from an earlier loss goes before the loss of this session makes more routes stale.
        let (before, after): (Vec<_>, Vec<_>) = actions
            .into_iter()
            .partition(|action| matches!(action, HelperAction::Sweep(_)));
        self.help(address, before);
        self.rib.handle(RibInput::PeerDown { peer, retain });
        self.help(address, after);
    }

    /// Our own restart is over for some families: neighbours may learn that they have heard everything.
    pub(super) fn release_end_of_rib(&mut self) {
        let live = self
            .neighbours
            .iter()
            .filter(|(_, n)| n.live.is_some() && !n.full);
        let due: Vec<(IpAddr, u32)> = live.map(|(address, n)| (*address, n.epoch)).collect();
        for (address, epoch) in due {
            self.feed(address, epoch);
        }
    }

    pub(super) fn end_of_rib(&mut self, address: IpAddr, family: Family) {
        if let Some(running) = self.neighbours.get_mut(&address) {
            let actions = running.helper.handle(HelperEvent::EndOfRib(family));
            self.help(address, actions);
        }
        let progress = self.restarter.on(Heard::EndOfRib {
            peer: address,
            family,
        });
        self.on_progress(progress);
    }

    pub(super) fn helper_timers(&mut self, now: Instant) {
        let mut due: Vec<(IpAddr, HelperTimer)> = Vec::new();
        for (address, running) in &self.neighbours {
            let ran_out = running.helper_timers.iter().filter(|(_, at)| **at <= now);
            due.extend(ran_out.map(|(timer, _)| (*address, *timer)));
        }
        for (address, timer) in due {
            if let Some(running) = self.neighbours.get_mut(&address) {
                running.helper_timers.remove(&timer);
                let actions = running.helper.handle(HelperEvent::Timer(timer));
                info!(peer = %address, ?timer, "the neighbour did not come back in time");
                self.help(address, actions);
            }
        }
    }

    /// Carries the helper's decisions out. Marking and purging at the loss of a session, and sweeping what a
    /// new OPEN leaves out, are part of the table's own handling of both events.
    pub(super) fn help(&mut self, address: IpAddr, actions: Vec<HelperAction>) {
        let Some(running) = self.neighbours.get_mut(&address) else {
            return;
        };
        for action in actions {
            match action {
                HelperAction::Set(timer, wait) => {
                    running.helper_timers.insert(timer, Instant::now() + wait);
                }
                HelperAction::Cancel(timer) => {
                    running.helper_timers.remove(&timer);
                }
                HelperAction::Sweep(families) => {
                    self.rib.handle(RibInput::StaleExpired {
                        slot: running.slot,
                        families,
                    });
                }
                HelperAction::LongLived(families) => {
                    info!(peer = %address, ?families, "the neighbour is away for long: its routes are the last choice now");
                    self.rib.handle(RibInput::LongLivedStale {
                        slot: running.slot,
                        families,
                    });
                }
                HelperAction::MarkStale(_) | HelperAction::Purge(_) => {}
            }
        }
    }
}
