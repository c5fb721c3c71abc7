//! The table as MRT records ([`crate::mrt`]), in pieces: between two of them the speaker does its work, so a dump of
//! any size delays nobody.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};

use bytes::BytesMut;
use cali_control::status::MrtCursor;

use super::{State, unix_now};
use crate::mrt::{self, PeerEntry, RibEntry};
use crate::rib::{PathStatus, PathView, PeerSlot};
use crate::wire::Family;

/// A piece ends with the first destination beyond this many octets.
const PIECE: usize = 512 * 1024;
/// Destinations that are read at once.
const STEP: u32 = 16;

fn seconds() -> u32 {
    u32::try_from(unix_now()).unwrap_or(u32::MAX)
}

impl State {
    /// The piece that begins at the cursor, in hexadecimal, and where it goes on.
    pub(super) fn dump(&self, cursor: Option<MrtCursor>) -> (String, Option<MrtCursor>) {
        let mut out = BytesMut::new();
        let time = seconds();
        let mut at = cursor.unwrap_or_else(|| {
            let peers = self.index();
            mrt::peer_index(&mut out, time, self.settings.router_id, &peers);
            MrtCursor {
                ipv6: false,
                destination: 0,
                sequence: 0,
                peers: u16::try_from(peers.len()).unwrap_or(u16::MAX),
            }
        });
        let mut more = true;
        while more && out.len() < PIECE {
            more = self.step(&mut out, time, &mut at);
        }
        let mut text = String::with_capacity(2 * out.len());
        for octet in &out {
            // Writing to a text cannot fail.
            let _ = write!(text, "{octet:02x}");
        }
        (text, more.then_some(at))
    }

    /// All slots of the table by number, so that entries need no translation. Slot 0 is this speaker; unused ones are empty.
    fn index(&self) -> Vec<PeerEntry> {
        let last = self.slots.keys().next_back();
        let count = last.map_or(1, |slot| usize::from(slot.index()) + 1);
        let empty = PeerEntry {
            id: Ipv4Addr::UNSPECIFIED,
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            asn: 0,
        };
        let mut peers = vec![empty; count];
        peers[0] = PeerEntry {
            id: self.settings.router_id,
            asn: self.settings.local_as,
            ..empty
        };
        for (slot, address) in &self.slots {
            let Some(running) = self.neighbours.get(address) else {
                continue;
            };
            let negotiated = running.live.as_ref().map(|l| &l.negotiated);
            let configured = running.config.session.remote_as.unwrap_or(0);
            peers[usize::from(slot.index())] = PeerEntry {
                id: negotiated.map_or(Ipv4Addr::UNSPECIFIED, |n| n.remote_id),
                address: *address,
                asn: negotiated.map_or(configured, |n| n.remote_as),
            };
        }
        peers
    }

    /// Some destinations; whether there are more.
    fn step(&self, out: &mut BytesMut, time: u32, at: &mut MrtCursor) -> bool {
        let family = if at.ipv6 {
            Family::IPV6_UNICAST
        } else {
            Family::IPV4_UNICAST
        };
        let (views, next) = self.rib.page(family, at.destination, STEP);
        for paths in views.chunk_by(|a, b| a.prefix == b.prefix) {
            let accepted = paths.iter().filter(|p| {
                !matches!(p.status, PathStatus::Refused(_)) && p.peer.index() < at.peers
            });
            let entries: Vec<RibEntry<'_>> = accepted.map(|p| self.entry(p)).collect();
            if let Some(prefix) = paths.first().map(|p| p.prefix)
                && !entries.is_empty()
            {
                mrt::rib(out, time, at.sequence, prefix, &entries);
                at.sequence = at.sequence.wrapping_add(1);
            }
        }
        match (next, at.ipv6) {
            (Some(next), _) => at.destination = next,
            (None, false) => {
                at.ipv6 = true;
                at.destination = 0;
            }
            (None, true) => return false,
        }
        true
    }

    fn entry<'a>(&self, path: &PathView<'a>) -> RibEntry<'a> {
        RibEntry {
            peer: path.peer.index(),
            originated: self.originated_at(path.peer),
            path_id: path.path_id,
            attributes: path.attributes,
            next_hop: path.next_hop,
        }
    }

    /// The table does not keep when each path came; no path is older than this.
    fn originated_at(&self, slot: PeerSlot) -> u32 {
        let peer = self.slots.get(&slot).and_then(|a| self.neighbours.get(a));
        let at = peer.map_or(self.started_at, |running| running.shown.since);
        u32::try_from(at).unwrap_or(u32::MAX)
    }
}
