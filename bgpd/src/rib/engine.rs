//! The table as a state machine: inputs, selection, outputs.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::base::{Base, RibConfig};
use super::decision::{Owner, Selection};
use super::event::{
    BestChange, BestRoute, Gateway, LocalRoute, PeerConfig, PeerId, PeerSlot, RibChanges, RibInput,
};
use super::export::GroupKey;
use super::forwarding::ForwardingStore;
use super::group::{Group, Pull};
use super::hops::{Hop, HopId};
use super::import::{self, Importer};
use super::store::AttrId;
use super::table::{DestId, NO_FORWARDING, Path, mark};
use crate::policy::DEFAULT_LOCAL_PREF;
use crate::wire::{Family, FamilySet, Nlri, Prefix, Update};

/// A configured neighbour.
#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) epoch: u32,
    /// The session's settings; kept while stale routes remain.
    pub(super) config: Option<Arc<PeerConfig>>,
    pub(super) group: Option<u32>,
    /// Paths in the table, by family.
    pub(super) paths: [u32; 2],
    /// Paths that were not refused, by family.
    pub(super) accepted: [u32; 2],
    over_limit: bool,
}

/// The routing information base; see the module's introduction.
#[derive(Debug)]
pub struct Rib {
    pub(super) base: Base,
    /// By slot; `None` for free slots.
    pub(super) peers: Vec<Option<Peer>>,
    pub(super) groups: Vec<Option<Group>>,
    group_index: HashMap<GroupKey, u32, RandomState>,
    pub(super) forwarding: ForwardingStore,
    /// What the last single path of this batch was made into; the paths of one UPDATE follow each other.
    latest: Option<(Facts, u32)>,
    over_limit: Vec<PeerId>,
}

/// Everything that the forwarding entry of a path without equals depends on.
type Facts = (AttrId, HopId, u16, u16);

/// What to do with the paths of a peer in a sweep.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sweep {
    Remove,
    RemoveMarked(u16),
    /// Stale paths, unless they are long-lived stale.
    RemoveStale,
    Mark(u16),
    LongLived,
}

impl Rib {
    /// An empty table.
    pub fn new(config: RibConfig) -> Self {
        Self {
            base: Base::new(config),
            peers: vec![Some(Peer::default())],
            groups: Vec::new(),
            group_index: HashMap::default(),
            forwarding: ForwardingStore::default(),
            latest: None,
            over_limit: Vec::new(),
        }
    }

    /// Changes the settings of the table. What peers have been told already is not changed by it.
    pub fn set_config(&mut self, config: RibConfig) {
        self.base.owners[0].router_id = config.router_id.into();
        self.base.config = config;
    }

    /// A slot for a configured neighbour; `None` when all 65535 are taken.
    pub fn register(&mut self) -> Option<PeerSlot> {
        let unused = self.peers.iter().position(Option::is_none);
        let index = unused.unwrap_or(self.peers.len());
        let slot = u16::try_from(index).ok()?;
        if unused.is_none() {
            self.peers.push(None);
            let local = self.base.owners[0];
            self.base.owners.push(Owner { ..local });
            self.base.clients.push(None);
        }
        self.peers[index] = Some(Peer::default());
        Some(PeerSlot(slot))
    }

    /// Takes one event. Events of a session that has ended are ignored.
    pub fn handle(&mut self, input: RibInput) {
        match input {
            RibInput::PeerUp {
                peer,
                config,
                preserved,
            } => self.peer_up(peer, config, preserved),
            RibInput::PeerDown { peer, retain } => self.peer_down(peer, retain),
            RibInput::PeerChanged { peer, config } => self.peer_changed(peer, config),
            RibInput::PeerRemoved { slot } => self.peer_removed(slot),
            RibInput::Update { peer, update } => self.update(peer, &update),
            RibInput::RefreshRequested { peer, family } => self.refresh_requested(peer, family),
            RibInput::RefreshBegin { peer, family } => {
                if self.session(peer).is_some() {
                    let families = FamilySet::from_iter([family]);
                    self.sweep(peer.slot, families, Sweep::Mark(mark::UNREFRESHED));
                }
            }
            RibInput::RefreshEnd { peer, family } => {
                if self.session(peer).is_some() {
                    let families = FamilySet::from_iter([family]);
                    self.sweep(peer.slot, families, Sweep::RemoveMarked(mark::UNREFRESHED));
                }
            }
            RibInput::StaleExpired { slot, families } => {
                self.sweep(slot, families, Sweep::RemoveMarked(mark::STALE));
            }
            RibInput::LongLivedStale { slot, families } => {
                self.sweep(slot, families, Sweep::LongLived);
            }
            RibInput::NextHop { gateway, state } => self.base.hops.set_state(gateway, state),
            RibInput::Originate(route) => self.originate(&route),
            RibInput::Retract(prefix) => {
                self.remove(PeerSlot::LOCAL, Nlri::new(prefix));
            }
        }
    }

    /// Gateways to watch and to leave, as the batch so far asks for. Whoever can say at once whether a gateway is
    /// reachable does so between this and [`Self::commit`]: a route that moves to a gateway not seen before is then
    /// replaced, not withdrawn and announced again.
    pub fn take_watches(&mut self) -> (Vec<Gateway>, Vec<Gateway>) {
        let (mut watch, mut unwatch) = (Vec::new(), Vec::new());
        self.base.hops.take_watches(&mut watch, &mut unwatch);
        (watch, unwatch)
    }

    /// Ends the batch: selects again where something changed.
    pub fn commit(&mut self) -> RibChanges {
        let mut changes = RibChanges::default();
        if self.base.hops.any_changed() {
            self.touch_changed_hops();
        }
        for family in 0..2 {
            for id in self.base.tables[family].take_touched() {
                self.decide(family, id, &mut changes);
            }
        }
        // Numbers and peers mean something else in the next batch.
        self.forget_latest();
        self.base.hops.settle();
        self.base
            .hops
            .take_watches(&mut changes.watch, &mut changes.unwatch);
        for group in self.groups.iter_mut().flatten() {
            group.wake(&mut changes.ready);
        }
        changes.over_limit = std::mem::take(&mut self.over_limit);
        changes
    }

    /// Messages of about `budget` octets for a session; empty when it has ended.
    pub fn pull(&mut self, peer: PeerId, budget: usize) -> Pull {
        let group = self.session(peer).and_then(|p| p.group);
        let group = group.and_then(|id| self.groups.get_mut(id as usize)?.as_mut());
        match group {
            Some(group) => group.pull(&mut self.base, peer.slot.0, budget),
            None => Pull::default(),
        }
    }

    /// The neighbour, if `peer` is its current, living session.
    fn session(&self, peer: PeerId) -> Option<&Peer> {
        let known = self.peers.get(usize::from(peer.slot.0))?.as_ref()?;
        (known.epoch == peer.epoch && known.group.is_some()).then_some(known)
    }

    fn peer_mut(&mut self, slot: PeerSlot) -> Option<&mut Peer> {
        self.peers.get_mut(usize::from(slot.0))?.as_mut()
    }

    fn peer_up(&mut self, peer: PeerId, config: Arc<PeerConfig>, preserved: FamilySet) {
        let slot = peer.slot;
        let Some(known) = self.peer_mut(slot) else {
            return;
        };
        // Without a PeerDown before it (the peer restarted), this is one with everything retained.
        let old = known.group.is_some().then_some(known.epoch);
        if let Some(epoch) = old {
            self.peer_down(PeerId { slot, epoch }, FamilySet::ALL);
        }
        self.sweep(
            slot,
            FamilySet::ALL.difference(preserved),
            Sweep::RemoveMarked(mark::STALE),
        );
        self.base.set_owner(slot.0, &config);
        let group = self.group_for(&config);
        if let Some(known) = self.peer_mut(slot) {
            known.epoch = peer.epoch;
            known.config = Some(config);
            known.group = Some(group);
            known.over_limit = false;
        }
        if let Some(group) = &mut self.groups[group as usize] {
            group.join(peer);
        }
    }

    fn group_for(&mut self, config: &PeerConfig) -> u32 {
        let key = GroupKey::of(config);
        if let Some(&id) = self.group_index.get(&key) {
            return id;
        }
        let group = Some(Group::new(key.clone()));
        let id = match self.groups.iter().position(Option::is_none) {
            Some(id) => {
                self.groups[id] = group;
                id
            }
            None => {
                self.groups.push(group);
                self.groups.len() - 1
            }
        } as u32;
        self.group_index.insert(key, id);
        id
    }

    fn drop_group_if_empty(&mut self, id: u32) {
        let slot = &mut self.groups[id as usize];
        if slot.as_ref().is_some_and(|group| group.members.is_empty())
            && let Some(group) = slot.take()
        {
            self.group_index.remove(&group.key);
            group.dissolve(&mut self.base);
        }
    }

    fn peer_down(&mut self, peer: PeerId, retain: FamilySet) {
        let Some(group) = self.session(peer).and_then(|p| p.group) else {
            return;
        };
        if let Some(group) = &mut self.groups[group as usize] {
            group.leave(peer.slot.0);
        }
        self.drop_group_if_empty(group);
        if let Some(known) = self.peer_mut(peer.slot) {
            known.group = None;
        }
        self.sweep(peer.slot, FamilySet::ALL.difference(retain), Sweep::Remove);
        // RFC 4724 §4.2: what was stale before and has not been announced since goes; long-lived stale paths have a time
        // of their own.
        self.sweep(peer.slot, retain, Sweep::RemoveStale);
        self.sweep(peer.slot, retain, Sweep::Mark(mark::STALE));
    }

    fn peer_changed(&mut self, peer: PeerId, config: Arc<PeerConfig>) {
        let Some(old) = self.session(peer).and_then(|p| p.group) else {
            return;
        };
        self.base.set_owner(peer.slot.0, &config);
        let new = self.group_for(&config);
        if let Some(known) = self.peer_mut(peer.slot) {
            known.config = Some(config);
            known.group = Some(new);
        }
        if new == old {
            return;
        }
        let slot = peer.slot.0;
        let (from, to) = (
            self.groups[old as usize].take(),
            self.groups[new as usize].take(),
        );
        if let (Some(mut from), Some(mut to)) = (from, to) {
            if let Some(member) = from.leave(slot) {
                to.adopt(&mut self.base, &from, member);
            }
            self.groups[old as usize] = Some(from);
            self.groups[new as usize] = Some(to);
        }
        self.drop_group_if_empty(old);
        // Whether its routes are reflected may have changed as well.
        self.touch_paths_of(peer.slot);
    }

    fn peer_removed(&mut self, slot: PeerSlot) {
        if slot == PeerSlot::LOCAL {
            return;
        }
        let Some(epoch) = self.peer_mut(slot).map(|p| p.epoch) else {
            return;
        };
        self.peer_down(PeerId { slot, epoch }, FamilySet::EMPTY);
        self.sweep(slot, FamilySet::ALL, Sweep::Remove);
        self.peers[usize::from(slot.0)] = None;
        self.base.clients[usize::from(slot.0)] = None;
    }

    fn refresh_requested(&mut self, peer: PeerId, family: Family) {
        let Some(known) = self.session(peer) else {
            return;
        };
        let enhanced = known.config.as_ref().is_some_and(|c| c.enhanced_refresh);
        let group = known
            .group
            .and_then(|id| self.groups.get_mut(id as usize)?.as_mut());
        if let (Some(group), Some(index)) = (group, family.index()) {
            group.refresh(peer.slot.0, index, enhanced);
        }
    }

    /// Takes a received UPDATE: the same as [`RibInput::Update`].
    pub fn update(&mut self, peer: PeerId, update: &Update) {
        let Some(config) = self.session(peer).and_then(|p| p.config.clone()) else {
            return;
        };
        if let Some(family) = update.as_end_of_rib() {
            let families = FamilySet::from_iter([family]);
            self.sweep(peer.slot, families, Sweep::RemoveMarked(mark::STALE));
            return;
        }
        // RFC 4271 §4.3: a prefix that is withdrawn and announced at once is announced.
        for route in update.withdrawals() {
            self.remove(peer.slot, route);
        }
        for (next_hop, block) in update.announcements() {
            let hop = self.base.hops.intern(import::hop(&config, next_hop));
            let mut importer =
                Importer::new(&mut self.base, &config, &update.attributes, &next_hop);
            for route in block.iter() {
                let accepted = importer.import(&mut self.base, route.prefix);
                if accepted.marks >> mark::REFUSAL_SHIFT != 0 && !self.base.config.keep_refused {
                    self.base.attrs.release(accepted.attr);
                    self.remove(peer.slot, route);
                    continue;
                }
                self.base.hops.retain(hop);
                let path = Path {
                    attr: accepted.attr,
                    hop,
                    path_id: route.path_id,
                    peer: peer.slot.0,
                    local_id: 0,
                    marks: accepted.marks,
                };
                self.insert(route.prefix, path);
            }
            importer.finish(&mut self.base);
            self.base.hops.release(hop);
        }
        self.check_limit(peer, config.max_prefixes);
    }

    fn check_limit(&mut self, peer: PeerId, max: u32) {
        if max == 0 {
            return;
        }
        if let Some(known) = self.peer_mut(peer.slot)
            && !known.over_limit
            && known.accepted.iter().any(|count| *count > max)
        {
            known.over_limit = true;
            self.over_limit.push(peer);
        }
    }

    fn originate(&mut self, route: &LocalRoute) {
        let hop = Hop::Local {
            kind: route.kind,
            interface: route.interface.clone(),
        };
        let path = Path {
            attr: self.base.attrs.intern(&route.attributes),
            hop: self.base.hops.intern(hop),
            path_id: 0,
            peer: PeerSlot::LOCAL.0,
            local_id: 0,
            marks: 0,
        };
        self.insert(route.prefix, path);
    }

    /// Stores a path (with its counted references) in place of the peer's former one.
    fn insert(&mut self, prefix: Prefix, mut path: Path) {
        let Some(family) = prefix.family().index() else {
            return;
        };
        let table = &mut self.base.tables[family];
        let id = table.find_or_insert(prefix);
        let dest = table.get_mut(id);
        let old = dest.position(path.peer, path.path_id);
        let peer = self
            .peers
            .get_mut(usize::from(path.peer))
            .and_then(Option::as_mut);
        if let Some(peer) = peer {
            let was = old.map(|at| dest.paths[at]);
            peer.paths[family] += u32::from(was.is_none());
            peer.accepted[family] += u32::from(!path.is_refused());
            peer.accepted[family] -= u32::from(was.is_some_and(|p| !p.is_refused()));
        }
        match old {
            Some(at) => {
                let former = dest.paths[at];
                path.local_id = former.local_id;
                let same = former == path;
                if !same {
                    dest.changing(at);
                    dest.paths[at] = path;
                    table.touch(id);
                    self.base.hops.add_user(path.hop);
                    self.base.hops.remove_user(former.hop);
                }
                self.base.attrs.release(former.attr);
                self.base.hops.release(former.hop);
            }
            None => {
                path.local_id = dest.unused_local_id();
                dest.paths.push(path);
                table.touch(id);
                self.base.hops.add_user(path.hop);
            }
        }
    }

    /// Removes a path; unknown ones are ignored.
    fn remove(&mut self, slot: PeerSlot, route: Nlri) {
        let Some(family) = route.prefix.family().index() else {
            return;
        };
        let Some(id) = self.base.tables[family].find(&route.prefix) else {
            return;
        };
        let at = self.base.tables[family]
            .get(id)
            .position(slot.0, route.path_id);
        if let Some(at) = at {
            self.remove_at(family, id, at);
        }
    }

    fn remove_at(&mut self, family: usize, id: DestId, at: usize) {
        let table = &mut self.base.tables[family];
        let dest = table.get_mut(id);
        dest.changing(at);
        // The selected path stays first, unless it is the one that goes.
        dest.has_best &= at != 0;
        let Some(path) = dest.paths.swap_remove(at) else {
            return;
        };
        table.touch(id);
        self.base.hops.remove_user(path.hop);
        self.base.attrs.release(path.attr);
        self.base.hops.release(path.hop);
        if let Some(Some(peer)) = self.peers.get_mut(usize::from(path.peer)) {
            peer.paths[family] -= 1;
            peer.accepted[family] -= u32::from(!path.is_refused());
        }
    }

    /// Goes over all paths of a peer.
    fn sweep(&mut self, slot: PeerSlot, families: FamilySet, what: Sweep) {
        for family in families.iter().filter_map(Family::index) {
            let has = self.peer_mut(slot).map_or(0, |p| p.paths[family]);
            if has == 0 {
                continue;
            }
            for id in 0..self.base.tables[family].end() {
                let mut at = 0;
                while let Some(path) = self.base.tables[family].get(id).paths.get(at).copied() {
                    if path.peer == slot.0 && self.sweep_path(family, id, at, path, what) {
                        continue;
                    }
                    at += 1;
                }
            }
        }
    }

    /// Whether the path was removed.
    fn sweep_path(
        &mut self,
        family: usize,
        id: DestId,
        at: usize,
        path: Path,
        what: Sweep,
    ) -> bool {
        let set = match what {
            Sweep::Remove => return self.remove_swept(family, id, at),
            Sweep::RemoveMarked(marks) if path.has(marks) => {
                return self.remove_swept(family, id, at);
            }
            Sweep::RemoveStale if path.has(mark::STALE) && !path.has(mark::LONG_LIVED) => {
                return self.remove_swept(family, id, at);
            }
            Sweep::RemoveMarked(_) | Sweep::RemoveStale => return false,
            Sweep::LongLived if !path.has(mark::STALE) => return false,
            Sweep::LongLived if self.base.attrs.key(path.attr).no_llgr => {
                return self.remove_swept(family, id, at);
            }
            Sweep::LongLived => mark::LONG_LIVED,
            Sweep::Mark(marks) => marks,
        };
        let table = &mut self.base.tables[family];
        let dest = table.get_mut(id);
        dest.paths[at].marks |= set;
        // Being marked for a refresh changes nothing for others.
        if set != mark::UNREFRESHED {
            dest.changing(at);
            table.touch(id);
        }
        false
    }

    fn remove_swept(&mut self, family: usize, id: DestId, at: usize) -> bool {
        self.remove_at(family, id, at);
        true
    }

    fn touch_where(&mut self, wanted: impl Fn(&Base, &Path) -> bool, changing: bool) {
        for family in 0..2 {
            for id in 0..self.base.tables[family].end() {
                let paths = &self.base.tables[family].get(id).paths;
                if paths.iter().any(|p| wanted(&self.base, p)) {
                    if changing {
                        self.base.tables[family].get_mut(id).best_touched = true;
                    }
                    self.base.tables[family].touch(id);
                }
            }
        }
    }

    fn touch_changed_hops(&mut self) {
        self.touch_where(|base, path| base.hops.changed(path.hop), false);
    }

    fn touch_paths_of(&mut self, slot: PeerSlot) {
        self.touch_where(|_, path| path.peer == slot.0, true);
    }

    /// Selects the best path of a destination and notes who has to know.
    fn decide(&mut self, family: usize, id: DestId, changes: &mut RibChanges) {
        let context = self.base.context();
        let dest = self.base.tables[family].get(id);
        let selection = context.select(&dest.paths);
        let new = self.forward(family, id, &selection);
        let dest = self.base.tables[family].get_mut(id);
        let moved = match (dest.has_best, selection.best) {
            (false, None) => dest.best_touched,
            (true, Some(0)) => dest.best_touched,
            _ => true,
        };
        dest.touched = false;
        dest.best_touched = false;
        dest.has_best = selection.best.is_some();
        if let Some(best) = selection.best {
            dest.paths.swap(0, best);
        }
        let old = std::mem::replace(&mut dest.forwarding, new);
        if old != new {
            let best = (new != NO_FORWARDING)
                .then(|| self.forwarding.get(new))
                .flatten();
            let learned_from = dest.best().map(|path| PeerSlot(path.peer));
            changes.best.push(BestChange {
                prefix: self.base.tables[family].prefix(id),
                best,
                learned_from,
            });
        }
        if old != NO_FORWARDING {
            self.forwarding.release(old);
        }
        let table = &mut self.base.tables[family];
        for group in self.groups.iter_mut().flatten() {
            if moved || group.key.add_path(family) {
                group.mark(table, family, id);
            }
        }
        table.free_if_unused(id);
    }

    /// The number of what the kernel has to be told about a destination, counted once more.
    fn forward(&mut self, family: usize, id: DestId, selection: &Selection) -> u32 {
        let Some(best) = selection.best else {
            return NO_FORWARDING;
        };
        let paths = &self.base.tables[family].get(id).paths;
        let Path {
            attr,
            hop,
            peer,
            marks,
            ..
        } = paths[best];
        let facts = (attr, hop, peer, marks);
        let alone = selection.equal.len() == 1;
        if alone
            && let Some((known, number)) = self.latest
            && known == facts
        {
            self.forwarding.retain(number);
            return number;
        }
        let route = self.forwarding_of(paths, best, &selection.equal);
        let number = self.forwarding.intern(route);
        if alone {
            self.forwarding.retain(number);
            self.forget_latest();
            self.latest = Some((facts, number));
        }
        number
    }

    fn forget_latest(&mut self) {
        if let Some((_, number)) = self.latest.take() {
            self.forwarding.release(number);
        }
    }

    fn forwarding_of(&self, paths: &[Path], best: usize, equal: &[u16]) -> BestRoute {
        let path = &paths[best];
        let max = usize::from(self.base.config.max_paths.max(1));
        // The selected path first, so that the limit never cuts it off.
        let others = equal.iter().map(|i| usize::from(*i)).filter(|i| *i != best);
        let mut gateways = Vec::with_capacity(equal.len().min(max));
        for index in std::iter::once(best).chain(others) {
            if let Some(gateway) = self.base.hops.gateway(paths[index].hop)
                && gateways.len() < max
                && !gateways.contains(&gateway)
            {
                gateways.push(gateway);
            }
        }
        gateways.sort_unstable();
        BestRoute {
            source: self.base.source(path),
            gateways,
            local_pref: self.local_pref(path.attr),
            preferred: path.has(mark::PREFERRED),
            stale: path.has(mark::STALE | mark::LONG_LIVED),
        }
    }

    fn local_pref(&self, attr: AttrId) -> u32 {
        self.base
            .attrs
            .get(attr)
            .local_pref
            .unwrap_or(DEFAULT_LOCAL_PREF)
    }
}
