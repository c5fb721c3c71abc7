//! Next hops: interned, with the reachability of their gateways.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::event::{Gateway, NextHopState};
use crate::policy::LocalKind;
use crate::wire::NextHop;

/// Number of an interned next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct HopId(u32);

impl HopId {
    /// No next hop: marks an unused entry.
    pub(super) const NONE: Self = Self(u32::MAX);
}

/// Where a path leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Hop {
    /// The route starts here.
    Local {
        kind: LocalKind,
        interface: Option<Arc<str>>,
    },
    /// Another router.
    Remote { next_hop: NextHop, scope: u32 },
}

#[derive(Debug)]
struct Slot {
    hop: Hop,
    refs: u32,
    gateway: Option<u32>,
}

#[derive(Debug)]
struct GatewayEntry {
    gateway: Gateway,
    state: Option<NextHopState>,
    /// Hops with this gateway.
    hops: u32,
    /// Paths through it; tracked while there are any.
    users: u32,
    watched: bool,
    /// State changed since the last selection.
    changed: bool,
    /// In `touched`.
    listed: bool,
}

/// All next hops in use.
#[derive(Debug, Default)]
pub(super) struct HopStore {
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: HashMap<Hop, u32, RandomState>,
    gateways: Vec<GatewayEntry>,
    free_gateways: Vec<u32>,
    by_gateway: HashMap<Gateway, u32, RandomState>,
    /// Gateways whose watch state may have to change, or that may be unused.
    touched: Vec<u32>,
    any_changed: bool,
}

impl HopStore {
    /// The number of `hop`, counted once more.
    pub(super) fn intern(&mut self, hop: Hop) -> HopId {
        if let Some(&id) = self.index.get(&hop) {
            self.slots[id as usize].refs += 1;
            return HopId(id);
        }
        let gateway = match &hop {
            Hop::Local { .. } => None,
            Hop::Remote { next_hop, scope } => Some(self.gateway_entry(Gateway {
                addr: next_hop.gateway(),
                scope: *scope,
            })),
        };
        let slot = Slot {
            hop: hop.clone(),
            refs: 1,
            gateway,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = slot;
                id
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.index.insert(hop, id);
        HopId(id)
    }

    fn gateway_entry(&mut self, gateway: Gateway) -> u32 {
        if let Some(&id) = self.by_gateway.get(&gateway) {
            self.gateways[id as usize].hops += 1;
            return id;
        }
        let entry = GatewayEntry {
            gateway,
            state: None,
            hops: 1,
            users: 0,
            watched: false,
            changed: false,
            listed: false,
        };
        let id = match self.free_gateways.pop() {
            Some(id) => {
                self.gateways[id as usize] = entry;
                id
            }
            None => {
                self.gateways.push(entry);
                (self.gateways.len() - 1) as u32
            }
        };
        self.by_gateway.insert(gateway, id);
        id
    }

    pub(super) fn retain(&mut self, id: HopId) {
        self.slots[id.0 as usize].refs += 1;
    }

    pub(super) fn release(&mut self, id: HopId) {
        let slot = &mut self.slots[id.0 as usize];
        slot.refs -= 1;
        if slot.refs > 0 {
            return;
        }
        self.index.remove(&slot.hop);
        self.free.push(id.0);
        if let Some(gateway) = slot.gateway.take() {
            self.gateways[gateway as usize].hops -= 1;
            self.list(gateway);
        }
    }

    /// A path uses the hop from now on.
    pub(super) fn add_user(&mut self, id: HopId) {
        if let Some(gateway) = self.slots[id.0 as usize].gateway {
            let entry = &mut self.gateways[gateway as usize];
            entry.users += 1;
            if entry.users == 1 {
                self.list(gateway);
            }
        }
    }

    /// A path does not use the hop any more.
    pub(super) fn remove_user(&mut self, id: HopId) {
        if let Some(gateway) = self.slots[id.0 as usize].gateway {
            let entry = &mut self.gateways[gateway as usize];
            entry.users -= 1;
            if entry.users == 0 {
                self.list(gateway);
            }
        }
    }

    fn list(&mut self, gateway: u32) {
        let entry = &mut self.gateways[gateway as usize];
        if !entry.listed {
            entry.listed = true;
            self.touched.push(gateway);
        }
    }

    /// Takes what the tracker says. Unknown gateways are ignored: their tracking ended meanwhile.
    pub(super) fn set_state(&mut self, gateway: Gateway, state: NextHopState) {
        if let Some(&id) = self.by_gateway.get(&gateway) {
            let entry = &mut self.gateways[id as usize];
            if entry.state != Some(state) {
                entry.state = Some(state);
                entry.changed = true;
                self.any_changed = true;
            }
        }
    }

    /// Interior cost of a hop; `None` when it cannot be used. Local hops cost nothing.
    pub(super) fn metric(&self, id: HopId, assume_reachable: bool) -> Option<u32> {
        let Some(gateway) = self.slots[id.0 as usize].gateway else {
            return Some(0);
        };
        match self.gateways[gateway as usize].state {
            Some(NextHopState::Reachable { metric }) => Some(metric),
            Some(NextHopState::Unreachable) => None,
            None => assume_reachable.then_some(0),
        }
    }

    pub(super) fn get(&self, id: HopId) -> &Hop {
        &self.slots[id.0 as usize].hop
    }

    pub(super) fn gateway(&self, id: HopId) -> Option<Gateway> {
        let gateway = self.slots[id.0 as usize].gateway?;
        Some(self.gateways[gateway as usize].gateway)
    }

    /// Whether some gateway changed since [`HopStore::settle`].
    pub(super) const fn any_changed(&self) -> bool {
        self.any_changed
    }

    pub(super) fn changed(&self, id: HopId) -> bool {
        let gateway = self.slots[id.0 as usize].gateway;
        gateway.is_some_and(|g| self.gateways[g as usize].changed)
    }

    /// Ends a batch: forgets change marks.
    pub(super) fn settle(&mut self) {
        if std::mem::take(&mut self.any_changed) {
            for entry in &mut self.gateways {
                entry.changed = false;
            }
        }
    }

    /// Reports which gateways to watch and to leave from now on.
    pub(super) fn take_watches(&mut self, watch: &mut Vec<Gateway>, unwatch: &mut Vec<Gateway>) {
        for id in std::mem::take(&mut self.touched) {
            let entry = &mut self.gateways[id as usize];
            entry.listed = false;
            match (entry.watched, entry.users > 0) {
                (false, true) => {
                    entry.watched = true;
                    watch.push(entry.gateway);
                }
                (true, false) => {
                    entry.watched = false;
                    entry.state = None;
                    unwatch.push(entry.gateway);
                }
                _ => {}
            }
            if entry.hops == 0 {
                self.by_gateway.remove(&entry.gateway);
                self.free_gateways.push(id);
            }
        }
    }
}
