//! What BMP stations are told ([`crate::bmp`]): the peers that are up, their routes, what changes.
//!
//! Routes after policy are told from the table: which have changed is a set, bounded by the table, that is worked off
//! as the queue has room, so that only the latest state of each is sent. Routes before policy are copies of messages;
//! the table does not keep them, so peers are asked for them again when a station connects (RFC 2918).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;
use tracing::warn;

use super::neighbours::Running;
use super::{State, unix_now};
use crate::bmp::feed::Refused;
use crate::bmp::message::{self, PeerHeader, PeerStatistics, Stage};
use crate::bmp::{Feed, Station};
use crate::fsm::DownCause;
use crate::rib::{PathStatus, PathView, PeerSlot};
use crate::session::{Command, SessionUp};
use crate::wire::{
    Attributes, Codec, Family, FamilySet, Message, MpReach, MpUnreach, NextHop, Nlri, NlriBlock,
    Update,
};

/// Destinations of the table that are told at once.
const STEP: u32 = 32;
/// Pieces that are told before the speaker looks at something else.
const BURST: usize = 64;

/// A connection to a station.
pub(super) struct Monitor {
    station: SocketAddr,
    feed: Feed,
    stages: Vec<Stage>,
    /// Where telling the whole table goes on: index of the family, destination.
    dump: Option<(usize, u32)>,
    /// Routes after policy that have changed.
    changed: BTreeSet<(PeerSlot, Family, Nlri)>,
    statistics: Duration,
    pub(super) statistics_at: Instant,
    over: bool,
}

impl Monitor {
    fn wants(&self, stage: Stage) -> bool {
        self.stages.contains(&stage)
    }

    fn has_work(&self) -> bool {
        !self.over && (self.dump.is_some() || !self.changed.is_empty())
    }

    /// Hands a message over; a station that does not keep up is left.
    fn tell(&mut self, message: Bytes) {
        if self.over {
            return;
        }
        if let Err(refused) = self.feed.send(message) {
            self.over = true;
            if refused == Refused::Full {
                warn!(
                    station = %self.station,
                    "the BMP station does not keep up with what it is told: it is left"
                );
            }
        }
    }
}

/// Resolves when routes wait for a station that has room for them.
pub(super) async fn room(monitors: &[Monitor]) {
    let waiting = monitors.iter().filter(|m| m.has_work());
    let mut rooms: FuturesUnordered<_> = waiting.map(|m| m.feed.wait_for_room()).collect();
    if rooms.next().await.is_none() {
        std::future::pending().await
    }
}

/// How routes of a session are written for a station: as the session has them, with AS numbers of four octets.
fn codec(up: &SessionUp) -> Codec {
    let negotiated = &up.negotiated.codec;
    Codec {
        four_octet_as: true,
        extended_message: true,
        families: FamilySet::ALL,
        add_path_tx: negotiated.add_path_rx,
        ..*negotiated
    }
}

fn header(address: IpAddr, up: &SessionUp) -> PeerHeader {
    PeerHeader {
        address,
        asn: up.negotiated.remote_as,
        id: up.negotiated.remote_id,
        time: u32::try_from(unix_now()).unwrap_or(u32::MAX),
    }
}

fn peer_up(address: IpAddr, up: &SessionUp) -> Bytes {
    let (sent, received) = &up.opens;
    let header = header(address, up);
    message::peer_up(&header, up.local, up.remote.port(), sent, received)
}

/// An UPDATE with one route: announced with attributes and next hop, or withdrawn.
fn update(
    family: Family,
    nlri: Nlri,
    add_path: bool,
    announced: Option<(&Attributes, NextHop)>,
) -> Update {
    let mut update = Update::empty();
    let routes = NlriBlock::from_routes(family, add_path, &[nlri]);
    match announced {
        Some((attributes, next_hop)) => {
            update.attributes = attributes.clone();
            if family == Family::IPV4_UNICAST && matches!(next_hop, NextHop::V4(_)) {
                update.next_hop = Some(next_hop);
                update.nlri = routes;
            } else {
                update.mp_reach = Some(MpReach {
                    next_hop,
                    nlri: routes,
                });
            }
        }
        None if family == Family::IPV4_UNICAST => update.withdrawn = routes,
        None => update.mp_unreach = Some(MpUnreach { nlri: routes }),
    }
    update
}

/// Routes of an UPDATE, announced or withdrawn.
fn touched(update: &Update) -> impl Iterator<Item = Nlri> + '_ {
    let announced = update.announcements().flat_map(|(_, routes)| routes.iter());
    announced.chain(update.withdrawals())
}

fn is_accepted(path: &PathView<'_>) -> bool {
    !matches!(path.status, PathStatus::Refused(_))
}

impl State {
    /// A station has connected: it is told everything.
    pub(super) fn monitor(&mut self, station: &Station, feed: Feed) {
        let mut monitor = Monitor {
            station: station.address,
            feed,
            stages: station.stages.clone(),
            dump: station.stages.contains(&Stage::After).then_some((0, 0)),
            changed: BTreeSet::new(),
            statistics: station.statistics,
            statistics_at: Instant::now() + station.statistics,
            over: false,
        };
        let name = self.settings.router_id.to_string();
        let description = concat!("cali bgpd ", env!("CARGO_PKG_VERSION"));
        monitor.tell(message::initiation(&name, description));
        for (address, running) in &self.neighbours {
            let Some(up) = &running.live else { continue };
            monitor.tell(peer_up(*address, up));
            if monitor.wants(Stage::Before) {
                self.command(running, Command::Refresh);
            }
        }
        self.monitors.push(monitor);
    }

    /// Lets something be told while the rest of the state is read; stations that are left are forgotten.
    fn tell(&mut self, what: impl Fn(&Self, &mut Monitor)) {
        let mut monitors = std::mem::take(&mut self.monitors);
        for monitor in &mut monitors {
            what(self, monitor);
        }
        monitors.retain(|monitor| !monitor.over);
        self.monitors = monitors;
    }

    /// A session stands.
    pub(super) fn monitor_up(&mut self, address: IpAddr) {
        self.tell(|state, monitor| {
            let running = state.neighbours.get(&address);
            if let Some(up) = running.and_then(|n| n.live.as_ref()) {
                monitor.tell(peer_up(address, up));
            }
        });
    }

    /// A session has ended (`None`: its neighbour is no longer configured). `live` is what it was.
    pub(super) fn monitor_down(
        &mut self,
        address: IpAddr,
        slot: PeerSlot,
        live: &SessionUp,
        cause: Option<&DownCause>,
    ) {
        self.tell(|_, monitor| {
            monitor.changed.retain(|(changed, ..)| *changed != slot);
            monitor.tell(message::peer_down(&header(address, live), cause));
        });
    }

    /// All sessions end. Nothing that their tasks report is looked at any more.
    pub(super) fn monitor_leaving(&mut self, cause: &DownCause) {
        self.tell(|state, monitor| {
            for (address, running) in &state.neighbours {
                if let Some(live) = &running.live {
                    monitor.tell(message::peer_down(&header(*address, live), Some(cause)));
                }
            }
        });
    }

    /// An UPDATE of a peer, before the table has it.
    pub(super) fn monitor_update(&mut self, address: IpAddr, update: &Update) {
        if self.monitors.is_empty() {
            return;
        }
        let Some(running) = self.neighbours.get(&address) else {
            return;
        };
        let Some(up) = &running.live else { return };
        let slot = running.slot;
        let copy = Message::Update(Box::new(update.clone())).encode(&codec(up));
        let copy =
            copy.map(|copy| message::route_monitoring(&header(address, up), Stage::Before, &copy));
        self.tell(|_, monitor| {
            if monitor.wants(Stage::After) {
                let rows = touched(update).map(|nlri| (slot, nlri.prefix.family(), nlri));
                monitor.changed.extend(rows);
            }
            if let (true, Ok(copy)) = (monitor.wants(Stage::Before), &copy) {
                monitor.tell(copy.clone());
            }
        });
    }

    /// A peer has sent everything again that a station had to be told (RFC 7313 EoRR; RFC 7854 §5).
    pub(super) fn monitor_refreshed(&mut self, address: IpAddr, family: Family) {
        self.tell(|state, monitor| {
            let running = state.neighbours.get(&address);
            let marker = running
                .filter(|_| monitor.wants(Stage::Before))
                .and_then(|n| end_of_rib(address, n, family, Stage::Before));
            marker.into_iter().for_each(|m| monitor.tell(m));
        });
    }

    /// Tells stations more, as long as they have room and it does not take long.
    pub(super) fn monitor_more(&mut self) {
        self.tell(|state, monitor| {
            for _ in 0..BURST {
                if !monitor.has_work() || !monitor.feed.has_room() {
                    break;
                }
                if let Some((slot, family, nlri)) = monitor.changed.pop_first() {
                    state.tell_route(monitor, slot, family, nlri);
                } else if let Some((family, from)) = monitor.dump {
                    state.tell_table(monitor, family, from);
                }
            }
        });
    }

    /// The state of one route after policy.
    fn tell_route(&self, monitor: &mut Monitor, slot: PeerSlot, family: Family, nlri: Nlri) {
        let paths = self.rib.paths(&nlri.prefix);
        let path = paths
            .iter()
            .find(|p| p.peer == slot && p.path_id == nlri.path_id);
        let message = self.after_policy(slot, family, nlri, path.filter(|p| is_accepted(p)));
        message.into_iter().for_each(|m| monitor.tell(m));
    }

    fn after_policy(
        &self,
        slot: PeerSlot,
        family: Family,
        nlri: Nlri,
        path: Option<&PathView<'_>>,
    ) -> Option<Bytes> {
        let address = self.slots.get(&slot)?;
        let up = self.neighbours.get(address)?.live.as_ref()?;
        let codec = codec(up);
        let announced = match path {
            Some(path) => Some((path.attributes, path.next_hop?)),
            None => None,
        };
        let add_path = codec.add_path_tx.contains(family);
        let update = update(family, nlri, add_path, announced);
        let message = Message::Update(Box::new(update)).encode(&codec).ok()?;
        let header = header(*address, up);
        Some(message::route_monitoring(&header, Stage::After, &message))
    }

    /// A part of the table; End-of-RIB of every peer behind the last one of a family.
    fn tell_table(&self, monitor: &mut Monitor, family: usize, from: u32) {
        let Some(name) = Family::SUPPORTED.get(family).copied() else {
            monitor.dump = None;
            return;
        };
        let (views, next) = self.rib.page(name, from, STEP);
        for path in views.iter().filter(|p| is_accepted(p)) {
            let nlri = Nlri {
                prefix: path.prefix,
                path_id: path.path_id,
            };
            let message = self.after_policy(path.peer, name, nlri, Some(path));
            message.into_iter().for_each(|m| monitor.tell(m));
        }
        monitor.dump = Some(match next {
            Some(next) => (family, next),
            None => {
                let markers = self.neighbours.iter();
                markers
                    .filter_map(|(address, n)| end_of_rib(*address, n, name, Stage::After))
                    .for_each(|m| monitor.tell(m));
                (family + 1, 0)
            }
        });
    }

    /// Numbers of every peer that is up, to the stations whose turn it is.
    pub(super) fn monitor_statistics(&mut self, now: Instant) {
        self.tell(|state, monitor| {
            if monitor.statistics_at > now {
                return;
            }
            monitor.statistics_at = now + monitor.statistics;
            for (address, running) in &state.neighbours {
                let Some(up) = &running.live else { continue };
                let counts = Family::SUPPORTED.map(|f| state.rib.peer_counts(running.slot, f));
                let received: u64 = counts.iter().map(|c| u64::from(c.received)).sum();
                let accepted: u64 = counts.iter().map(|c| u64::from(c.accepted)).sum();
                let numbers = PeerStatistics {
                    refused: u32::try_from(received - accepted).unwrap_or(u32::MAX),
                    received,
                    accepted,
                };
                monitor.tell(message::statistics(&header(*address, up), &numbers));
            }
        });
    }
}

fn end_of_rib(address: IpAddr, running: &Running, family: Family, stage: Stage) -> Option<Bytes> {
    let up = running.live.as_ref()?;
    let carries = up.negotiated.codec.families.contains(family);
    let marker = Message::Update(Box::new(Update::end_of_rib(family)));
    let marker = carries.then(|| marker.encode(&codec(up)).ok()).flatten()?;
    let header = header(address, up);
    Some(message::route_monitoring(&header, stage, &marker))
}
