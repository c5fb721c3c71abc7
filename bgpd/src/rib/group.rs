//! Update groups: peers that are told the same share one encoded stream.
//!
//! A group keeps Adj-RIB-Out per family, a list of destinations to evaluate again, and a log of encoded messages. A
//! member is either *attached*: it reads the log at its own position; or *behind*: it has a set of routes to be told about
//! (and perhaps a walk over the whole table to do), and reads the log again when that is empty. New members start behind,
//! with a walk. A reader whose unread messages make the log too long is put behind: memory is bounded by
//! [`RibConfig::stream_limit`](super::RibConfig::stream_limit) and the size of the table, and no member waits for another one.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::{Bytes, BytesMut};
use foldhash::fast::RandomState;

use super::adj_out::AdjOut;
use super::base::Base;
use super::batch::{Batch, Buckets, Target};
use super::event::PeerId;
use super::export::{EditCache, GroupKey, Out, Outs, evaluate};
use super::hops::{Hop, HopId};
use super::member::{Behind, Member, Walk};
use super::store::AttrId;
use super::table::{DestId, Table};
use crate::wire::{
    Codec, Family, Framer, Message, Nlri, Packer, Prefix, RefreshKind, RouteRefresh,
};

/// Destinations evaluated before the result is encoded.
const FLUSH_CHUNK: usize = 8192;
/// Routes told to a member that is behind before the budget is looked at again.
const CATCH_UP_CHUNK: usize = 2048;

#[derive(Debug)]
struct Packet {
    bytes: Bytes,
    target: Target,
}

/// One family of a group.
#[derive(Debug)]
struct Side {
    adj: AdjOut,
    /// Destinations to evaluate again, each once.
    dirty: VecDeque<DestId>,
    marked: Vec<u64>,
    /// Destinations from here on have not been evaluated yet; `DestId::MAX` when all have.
    filled: DestId,
}

impl Side {
    fn new(add_path: bool) -> Self {
        Self {
            adj: AdjOut::new(add_path),
            dirty: VecDeque::new(),
            marked: Vec::new(),
            filled: 0,
        }
    }
}

#[derive(Debug)]
pub(super) struct Group {
    pub(super) key: GroupKey,
    packer: Packer,
    sides: [Side; 2],
    pub(super) members: BTreeMap<u16, Member>,
    log: VecDeque<Packet>,
    /// Position of the log's first message.
    log_start: u64,
    log_size: usize,
    /// Routes that did not fit into a message, so far.
    pub(super) unfit: u64,
}

/// Messages for a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pull {
    /// Whole messages, in order.
    pub messages: Vec<Bytes>,
    /// There is more now; otherwise the peer will be in [`RibChanges::ready`](super::RibChanges::ready) when there is.
    pub more: bool,
}

impl Group {
    pub(super) fn new(key: GroupKey) -> Self {
        let packer = Packer::new(key.codec);
        let sides = [Side::new(key.add_path(0)), Side::new(key.add_path(1))];
        Self {
            key,
            packer,
            sides,
            members: BTreeMap::new(),
            log: VecDeque::new(),
            log_start: 0,
            log_size: 0,
            unfit: 0,
        }
    }

    /// A new session: it is told the whole table, then End-of-RIB of each family.
    pub(super) fn join(&mut self, peer: PeerId) {
        let behind = [0, 1].map(|family| Behind {
            walk: self
                .key
                .codec
                .families
                .contains(Family::SUPPORTED[family])
                .then_some(Walk {
                    next: 0,
                    first: true,
                    end_of_rib: true,
                    end_of_refresh: false,
                }),
            changed: BTreeMap::new(),
        });
        let member = Member {
            peer,
            position: self.log_end(),
            behind,
            outbox: Vec::new(),
            idle: true,
        };
        self.members.insert(peer.slot.0, member);
    }

    /// A session leaves (it ended, or it moves to another group).
    pub(super) fn leave(&mut self, slot: u16) -> Option<Member> {
        self.put_behind(slot);
        let member = self.members.remove(&slot);
        self.trim();
        member
    }

    /// Takes over a member of another group: it is told the differences only.
    pub(super) fn adopt(&mut self, base: &mut Base, from: &Self, mut member: Member) {
        let slot = member.peer.slot.0;
        for family in 0..2 {
            self.fill(base, family, DestId::MAX);
            let walked = member.behind[family].told_up_to();
            let (old, new) = (&from.sides[family].adj, &self.sides[family].adj);
            let mut ids = old.destinations();
            ids.extend(new.destinations());
            ids.sort_unstable();
            ids.dedup();
            for id in ids.into_iter().take_while(|id| *id < walked) {
                let prefix = base.tables[family].prefix(id);
                let (before, after) = (visible(old.get(id), slot), visible(new.get(id), slot));
                let same = |(p, a): &(u32, Out), (q, b): &(u32, Out)| {
                    p == q && a.attr == b.attr && a.hop == b.hop
                };
                for route in before.iter().filter(|r| !after.iter().any(|s| same(r, s))) {
                    member.behind[family].note(
                        id,
                        Nlri {
                            prefix,
                            path_id: route.0,
                        },
                        true,
                    );
                }
                for route in after.iter().filter(|r| !before.iter().any(|s| same(r, s))) {
                    member.behind[family].note(
                        id,
                        Nlri {
                            prefix,
                            path_id: route.0,
                        },
                        false,
                    );
                }
            }
        }
        member.position = self.log_end();
        self.members.insert(slot, member);
    }

    /// The peer asks for its table again (RFC 2918); bracketed if it knows BoRR and EoRR (RFC 7313).
    pub(super) fn refresh(&mut self, slot: u16, family: usize, enhanced: bool) {
        let wanted = Family::SUPPORTED[family];
        if !self.key.codec.families.contains(wanted) {
            return;
        }
        self.put_behind(slot);
        let begin = self.refresh_marker(wanted, RefreshKind::Begin);
        if let Some(member) = self.members.get_mut(&slot) {
            let end_of_rib = member.behind[family]
                .walk
                .is_some_and(|walk| walk.end_of_rib);
            member.behind[family].walk = Some(Walk {
                next: 0,
                first: false,
                end_of_rib,
                end_of_refresh: enhanced,
            });
            if enhanced {
                member.outbox.extend(begin);
            }
        }
    }

    fn refresh_marker(&self, family: Family, kind: RefreshKind) -> Option<Bytes> {
        let marker = Message::RouteRefresh(RouteRefresh { family, kind });
        marker.encode(&self.key.codec).ok()
    }

    /// The destination's selected path (or, with add-path, any path) changed.
    pub(super) fn mark(&mut self, table: &mut Table, family: usize, id: DestId) {
        let side = &mut self.sides[family];
        if id >= side.filled {
            return;
        }
        let (word, bit) = (id as usize / 64, 1u64 << (id % 64));
        if word >= side.marked.len() {
            side.marked.resize(word + 1, 0);
        }
        if side.marked[word] & bit == 0 {
            side.marked[word] |= bit;
            side.dirty.push_back(id);
            table.get_mut(id).holds += 1;
        }
    }

    /// Members that were idle and have something to read now.
    pub(super) fn wake(&mut self, ready: &mut Vec<PeerId>) {
        let dirty = self.sides.iter().any(|side| !side.dirty.is_empty());
        let end = self.log_end();
        for member in self.members.values_mut().filter(|m| m.idle) {
            let unread = !member.attached() || member.position < end || !member.outbox.is_empty();
            if dirty || unread {
                member.idle = false;
                ready.push(member.peer);
            }
        }
    }

    /// Messages of about `budget` octets for a member.
    pub(super) fn pull(&mut self, base: &mut Base, slot: u16, budget: usize) -> Pull {
        let mut pull = Pull::default();
        let mut size = 0;
        while size < budget {
            let from = pull.messages.len();
            let end = self.log_end();
            let Some(member) = self.members.get_mut(&slot) else {
                return pull;
            };
            pull.messages.append(&mut member.outbox);
            if !member.attached() {
                self.catch_up(base, slot, &mut pull.messages);
            } else if member.position < end {
                let index = member.position.saturating_sub(self.log_start) as usize;
                member.position += 1;
                let packet = &self.log[index];
                if packet.target.includes(slot) {
                    pull.messages.push(packet.bytes.clone());
                }
            } else if let Some(family) = (0..2).find(|f| !self.sides[*f].dirty.is_empty()) {
                self.trim();
                self.flush(base, family);
            } else if pull.messages.len() == from {
                member.idle = true;
                self.trim();
                return pull;
            }
            size += pull.messages[from..].iter().map(Bytes::len).sum::<usize>();
        }
        pull.more = true;
        self.trim();
        pull
    }

    /// What a member has been told, or will be as soon as it reads: prefix and identifier, attributes, next hop.
    pub(super) fn told(&self, base: &Base, slot: u16, family: usize) -> Vec<(Nlri, AttrId, HopId)> {
        let adj = &self.sides[family].adj;
        let mut routes = Vec::new();
        for id in adj.destinations() {
            let prefix = base.tables[family].prefix(id);
            for (path_id, out) in visible(adj.get(id), slot) {
                routes.push((Nlri { prefix, path_id }, out.attr, out.hop));
            }
        }
        routes
    }

    /// How many routes of a family the group has, in all and by the peer that they came from (who is not told of them).
    pub(super) fn told_counts(&self, family: usize) -> (u64, HashMap<u16, u64, RandomState>) {
        let adj = &self.sides[family].adj;
        let mut all = 0;
        let mut by_source = HashMap::default();
        for id in adj.destinations() {
            for (_, out) in adj.get(id) {
                all += 1;
                *by_source.entry(out.source).or_default() += 1;
            }
        }
        (all, by_source)
    }

    /// Gives back all references and holds; the group must not be used afterwards.
    pub(super) fn dissolve(mut self, base: &mut Base) {
        for (family, side) in self.sides.iter_mut().enumerate() {
            for id in side.adj.destinations() {
                for (_, out) in side.adj.get(id) {
                    out.release(base);
                }
                base.tables[family].unhold(id);
            }
            for id in side.dirty.drain(..) {
                base.tables[family].unhold(id);
            }
        }
    }

    /// Evaluates destinations up to `end` (excluded) for the first time. Nobody needs to be told: members that
    /// have to know still have their walk ahead of them.
    fn fill(&mut self, base: &mut Base, family: usize, end: DestId) {
        let side = &mut self.sides[family];
        if side.filled == DestId::MAX {
            return;
        }
        let mut cache = EditCache::default();
        let table_end = base.tables[family].end();
        for id in side.filled..end.min(table_end) {
            let outs = evaluate(base, &mut cache, &self.key, family, id);
            if !outs.is_empty() {
                base.tables[family].get_mut(id).holds += 1;
                side.adj.set(id, outs);
            }
        }
        cache.clear(base);
        side.filled = if end >= table_end { DestId::MAX } else { end };
    }

    /// Evaluates a chunk of changed destinations and appends what is new to the log.
    fn flush(&mut self, base: &mut Base, family: usize) {
        let mut cache = EditCache::default();
        let behind = self.members.iter().filter(|(_, m)| !m.attached());
        let mut batch = Batch::new(behind.map(|(slot, _)| *slot).collect());
        let mut replaced: Vec<Out> = Vec::new();
        let mut evaluated: Vec<DestId> = Vec::new();
        for _ in 0..FLUSH_CHUNK {
            let side = &mut self.sides[family];
            let Some(id) = side.dirty.pop_front() else {
                break;
            };
            side.marked[id as usize / 64] &= !(1 << (id % 64));
            evaluated.push(id);
            let outs = evaluate(base, &mut cache, &self.key, family, id);
            let before = self.sides[family].adj.get(id);
            if before == outs {
                replaced.extend(outs.iter().map(|(_, out)| *out));
                continue;
            }
            let prefix = base.tables[family].prefix(id);
            self.diff(id, prefix, &before, &outs, &mut batch);
            match (before.is_empty(), outs.is_empty()) {
                (true, false) => base.tables[family].get_mut(id).holds += 1,
                (false, true) => base.tables[family].get_mut(id).holds -= 1,
                _ => {}
            }
            replaced.extend(before.iter().map(|(_, out)| *out));
            self.sides[family].adj.set(id, outs);
        }
        self.encode(base, family, batch);
        for out in replaced {
            out.release(base);
        }
        cache.clear(base);
        for id in evaluated {
            base.tables[family].unhold(id);
        }
        self.limit_log(base.config.stream_limit);
    }

    /// Notes the differences of one destination, for the log and for members that are behind.
    fn diff(&mut self, id: DestId, prefix: Prefix, before: &Outs, after: &Outs, batch: &mut Batch) {
        let members = &mut self.members;
        let family = prefix.family().index().unwrap_or_default();
        let behind = std::mem::take(&mut batch.behind);
        let note = |members: &mut BTreeMap<u16, Member>, route: Nlri, old: Option<&Out>| {
            for slot in &behind {
                let told = old.is_some_and(|out| out.source != *slot);
                if let Some(member) = members.get_mut(slot) {
                    member.behind[family].note(id, route, told);
                }
            }
        };
        for (path_id, old) in before {
            if !after.iter().any(|(other, _)| other == path_id) {
                let route = Nlri {
                    prefix,
                    path_id: *path_id,
                };
                let target = batch.all_but(members, old.source);
                batch.withdraw(target, route);
                note(members, route, Some(old));
            }
        }
        for (path_id, new) in after {
            let old = before
                .iter()
                .find(|(other, _)| other == path_id)
                .map(|(_, out)| out);
            if old == Some(new) {
                continue;
            }
            let route = Nlri {
                prefix,
                path_id: *path_id,
            };
            match old {
                Some(old) if old.attr == new.attr && old.hop == new.hop => {
                    // The same route from another peer: only the former source does not have it.
                    if members.contains_key(&old.source) {
                        batch.buckets.add(new, Target::Only(old.source), route);
                    }
                }
                _ => {
                    let target = batch.all_but(members, new.source);
                    batch.buckets.add(new, target, route);
                }
            }
            let had = old.is_some_and(|old| old.source != new.source);
            if had && members.contains_key(&new.source) {
                batch.withdraw(Target::Only(new.source), route);
            }
            note(members, route, old);
        }
        batch.behind = behind;
    }

    fn encode(&mut self, base: &Base, family: usize, batch: Batch) {
        let mut messages = Vec::new();
        let wanted = Family::SUPPORTED[family];
        for (target, routes) in batch.withdrawn {
            self.packer.withdraw(wanted, &routes, &mut messages);
            self.append(&mut messages, target);
        }
        for (attr, hop, target, routes) in batch.buckets.list {
            let Hop::Remote { next_hop, .. } = base.hops.get(hop) else {
                continue;
            };
            let attributes = base.attrs.get(attr);
            let done = self
                .packer
                .announce(wanted, attributes, next_hop, &routes, &mut messages);
            let unfit = &routes[done..];
            if !unfit.is_empty() {
                // Never cut short: such a route is withdrawn, and counted.
                self.unfit += unfit.len() as u64;
                self.packer.withdraw(wanted, unfit, &mut messages);
            }
            self.append(&mut messages, target);
        }
    }

    fn append(&mut self, messages: &mut Vec<Bytes>, target: Target) {
        for bytes in messages.drain(..) {
            self.log_size += bytes.len();
            self.log.push_back(Packet { bytes, target });
        }
    }

    /// Tells a member that is behind some of what it missed; straight to it, past the log.
    fn catch_up(&mut self, base: &mut Base, slot: u16, messages: &mut Vec<Bytes>) {
        for family in 0..2 {
            let Some(member) = self.members.get_mut(&slot) else {
                return;
            };
            if member.behind[family].is_empty() {
                continue;
            }
            let mut withdrawn = Vec::new();
            let mut buckets = Buckets::default();
            let mut finished = None;
            let mut left = CATCH_UP_CHUNK;
            while left > 0
                && let Some((route, told)) = member.behind[family].changed.pop_first()
            {
                left -= 1;
                let now = base.tables[family]
                    .find(&route.prefix)
                    .and_then(|id| self.sides[family].adj.route(id, route.path_id))
                    .filter(|out| out.source != slot);
                match now {
                    Some(out) => buckets.add(&out, Target::All, route),
                    None if told => withdrawn.push(route),
                    None => {}
                }
            }
            if let Some(walk) = member.behind[family].walk.filter(|_| left > 0) {
                let end = base.tables[family].end();
                let stop = walk.next.saturating_add(left as DestId).min(end);
                if stop > self.sides[family].filled || stop == end {
                    self.fill(base, family, stop);
                }
                for id in walk.next..stop {
                    for (path_id, out) in visible(self.sides[family].adj.get(id), slot) {
                        let prefix = base.tables[family].prefix(id);
                        buckets.add(&out, Target::All, Nlri { prefix, path_id });
                    }
                }
                let done = stop == end;
                finished = done.then_some(walk);
                if let Some(member) = self.members.get_mut(&slot) {
                    member.behind[family].walk = (!done).then_some(Walk { next: stop, ..walk });
                }
            }
            self.send(base, family, &withdrawn, buckets, messages);
            if let Some(walk) = finished {
                if walk.end_of_rib {
                    self.packer.end_of_rib(Family::SUPPORTED[family], messages);
                }
                if walk.end_of_refresh {
                    let wanted = Family::SUPPORTED[family];
                    messages.extend(self.refresh_marker(wanted, RefreshKind::End));
                }
            }
            let end = self.log_end();
            if let Some(member) = self.members.get_mut(&slot).filter(|m| m.attached()) {
                // Everything up to here has been noted or told; what follows is in the log.
                member.position = end;
            }
            return;
        }
    }

    fn send(
        &mut self,
        base: &Base,
        family: usize,
        withdrawn: &[Nlri],
        buckets: Buckets,
        messages: &mut Vec<Bytes>,
    ) {
        let wanted = Family::SUPPORTED[family];
        self.packer.withdraw(wanted, withdrawn, messages);
        for (attr, hop, _, routes) in buckets.list {
            let Hop::Remote { next_hop, .. } = base.hops.get(hop) else {
                continue;
            };
            let attributes = base.attrs.get(attr);
            let done = self
                .packer
                .announce(wanted, attributes, next_hop, &routes, messages);
            self.packer.withdraw(wanted, &routes[done..], messages);
            self.unfit += (routes.len() - done) as u64;
        }
    }

    /// Reads the log of a member as routes to be told, and takes it off the log.
    fn put_behind(&mut self, slot: u16) {
        let end = self.log_end();
        let Some(member) = self.members.get_mut(&slot).filter(|m| m.attached()) else {
            return;
        };
        let skip = member.position.saturating_sub(self.log_start) as usize;
        // Our own messages, read with the path identifiers that they were written with.
        let codec = Codec {
            add_path_rx: self.key.codec.add_path_tx,
            ..self.key.codec
        };
        let mut framer = Framer::new();
        framer.set_extended(codec.extended_message);
        for packet in self
            .log
            .iter()
            .skip(skip)
            .filter(|p| p.target.includes(slot))
        {
            let mut buffer = BytesMut::from(&packet.bytes[..]);
            let Ok(Some(frame)) = framer.next(&mut buffer) else {
                continue;
            };
            let Ok(Message::Update(update)) = Message::decode(&frame, &codec) else {
                continue;
            };
            let announced = update.announcements().flat_map(|(_, block)| block.iter());
            for route in update.withdrawals().chain(announced) {
                let family = route.prefix.family().index().unwrap_or_default();
                member.behind[family].changed.insert(route, true);
            }
        }
        member.position = end;
    }

    /// Keeps the log in its limit by putting the slowest readers behind.
    fn limit_log(&mut self, limit: usize) {
        let end = self.log_end();
        while self.log_size > limit {
            let unread = self
                .members
                .iter()
                .filter(|(_, m)| m.attached() && m.position < end);
            let Some(slot) = unread
                .min_by_key(|(_, m)| m.position)
                .map(|(slot, _)| *slot)
            else {
                break;
            };
            self.put_behind(slot);
            self.trim();
        }
    }

    fn log_end(&self) -> u64 {
        self.log_start + self.log.len() as u64
    }

    /// Drops messages that every attached member has read.
    fn trim(&mut self) {
        let end = self.log_end();
        let attached = self.members.values().filter(|m| m.attached());
        let oldest = attached.map(|m| m.position).min().unwrap_or(end).min(end);
        while self.log_start < oldest {
            if let Some(packet) = self.log.pop_front() {
                self.log_size -= packet.bytes.len();
            }
            self.log_start += 1;
        }
    }
}

fn visible(outs: Outs, slot: u16) -> Outs {
    outs.into_iter()
        .filter(|(_, out)| out.source != slot)
        .collect()
}
