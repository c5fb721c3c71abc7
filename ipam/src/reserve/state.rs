//! What the node holds: addresses kept ready, addresses given to pods, and what the datastore has not been told yet. Pure.
//!
//! Every change is a [`Record`]. The journal is the sequence of records, so that replaying it gives the same state.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use cali_api::Cidr;
use serde::{Deserialize, Serialize};

use crate::owner::Owner;

/// An address in the node's hands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Held {
    /// The address.
    pub address: IpAddr,
    /// Its block.
    pub block: Cidr,
    /// Name of its pool.
    pub pool: String,
}

/// One change of the state, as written to the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// The datastore has given the node this address to keep ready.
    Hold(Held),
    /// Addresses became an owner's. With `stored` the datastore knows it already.
    Assign {
        /// Who has them now.
        owner: Owner,
        /// The addresses.
        addresses: Vec<Held>,
        /// Whether they were assigned in the datastore.
        stored: bool,
    },
    /// The owner with this handle is gone; its addresses are ready for others.
    Free {
        /// The handle.
        handle: String,
    },
    /// The node gives an unused address up.
    Drop {
        /// The address.
        address: IpAddr,
    },
    /// The datastore shows these addresses as the state has them.
    Clean {
        /// The addresses.
        addresses: Vec<IpAddr>,
    },
    /// A handle that this node does not know is to be released in the datastore, as one whose owner is gone
    /// ([`Record::Free`]).
    ReleaseHandle {
        /// The handle.
        handle: String,
    },
    /// That has been done.
    HandleReleased {
        /// The handle.
        handle: String,
    },
    /// Somebody else has this address: it is out of our hands.
    Lost {
        /// The address.
        address: IpAddr,
    },
}

/// Addresses of one owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The owner.
    pub owner: Owner,
    /// Its addresses.
    pub addresses: Vec<Held>,
}

/// One address that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// IPv4 or IPv6.
    pub v4: bool,
    /// Names of the pools that will do, best first.
    pub pools: Vec<String>,
}

/// Who the datastore is to show as the holder of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// The address.
    pub address: IpAddr,
    /// The holder; `None`: nobody.
    pub owner: Option<Owner>,
}

/// Everything the node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    reserve: Owner,
    free: VecDeque<Held>,
    attachments: BTreeMap<String, Attachment>,
    dropped: BTreeMap<IpAddr, Held>,
    dirty: BTreeMap<IpAddr, Held>,
    tombstones: BTreeSet<String>,
    version: u64,
}

impl State {
    /// Nothing is held. `reserve` is the holder that the datastore shows for addresses kept ready.
    pub fn new(reserve: Owner) -> Self {
        Self {
            reserve,
            free: VecDeque::new(),
            attachments: BTreeMap::new(),
            dropped: BTreeMap::new(),
            dirty: BTreeMap::new(),
            tombstones: BTreeSet::new(),
            version: 0,
        }
    }

    /// The holder that the datastore shows for addresses kept ready.
    pub fn reserve_owner(&self) -> &Owner {
        &self.reserve
    }

    /// Rises with every record.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The addresses kept ready, the next one first.
    pub fn free(&self) -> impl Iterator<Item = &Held> {
        self.free.iter()
    }

    /// The addresses of an owner.
    pub fn attachment(&self, handle: &str) -> Option<&Attachment> {
        self.attachments.get(handle)
    }

    /// All owners.
    pub fn attachments(&self) -> impl Iterator<Item = (&str, &Attachment)> {
        self.attachments
            .iter()
            .map(|(handle, a)| (handle.as_str(), a))
    }

    /// Handles to be released in the datastore.
    pub fn tombstones(&self) -> impl Iterator<Item = &str> {
        self.tombstones.iter().map(String::as_str)
    }

    /// Whether the datastore shows everything as it is.
    pub fn is_settled(&self) -> bool {
        self.dirty.is_empty() && self.tombstones.is_empty()
    }

    /// Whether an address is in our hands in any way.
    pub fn knows(&self, address: IpAddr) -> bool {
        self.dirty.contains_key(&address)
            || self.dropped.contains_key(&address)
            || self.free.iter().any(|h| h.address == address)
            || self
                .attachments
                .values()
                .flat_map(|a| &a.addresses)
                .any(|h| h.address == address)
    }

    /// Pools of the addresses that pods use.
    pub fn pools_in_use(&self) -> BTreeSet<(bool, String)> {
        let used = self.attachments.values().flat_map(|a| &a.addresses);
        used.map(|h| (h.address.is_ipv4(), h.pool.clone()))
            .collect()
    }

    /// How many addresses of a pool are ready.
    pub fn ready(&self, v4: bool, pool: &str) -> usize {
        self.free
            .iter()
            .filter(|h| h.pool == pool && h.address.is_ipv4() == v4)
            .count()
    }

    /// Chooses an address for each want; `None` if one of them cannot be met from what is ready.
    pub fn plan_assign(&self, owner: &Owner, wants: &[Want]) -> Option<Record> {
        let mut addresses: Vec<Held> = Vec::with_capacity(wants.len());
        for want in wants {
            let chosen = want.pools.iter().find_map(|pool| {
                self.free.iter().find(|h| {
                    h.pool == *pool && h.address.is_ipv4() == want.v4 && !addresses.contains(h)
                })
            })?;
            addresses.push(chosen.clone());
        }
        Some(Record::Assign {
            owner: owner.clone(),
            addresses,
            stored: false,
        })
    }

    /// Gives just these addresses to an owner; `None` if one of them is not ready here.
    pub fn plan_exact(&self, owner: &Owner, addresses: &[IpAddr]) -> Option<Record> {
        let ready = |address: &IpAddr| self.free.iter().find(|h| h.address == *address).cloned();
        Some(Record::Assign {
            owner: owner.clone(),
            addresses: addresses.iter().map(ready).collect::<Option<_>>()?,
            stored: false,
        })
    }

    /// The owner is gone. With `rest`, released addresses have to rest in the datastore before they are used again.
    pub fn plan_free(&self, handle: &str, rest: bool) -> Vec<Record> {
        let handle = handle.to_owned();
        let Some(attachment) = self.attachments.get(&handle) else {
            return vec![Record::ReleaseHandle { handle }];
        };
        let mut records = vec![Record::Free { handle }];
        if rest {
            records.extend(
                attachment
                    .addresses
                    .iter()
                    .map(|h| Record::Drop { address: h.address }),
            );
        }
        records
    }

    /// Gives up ready addresses that `keep` refuses, and those beyond `high` of their pool (the last ones first).
    pub fn plan_trim(&self, high: usize, keep: impl Fn(&Held) -> bool) -> Vec<Record> {
        let mut counts: BTreeMap<(bool, &str), usize> = BTreeMap::new();
        let mut records = Vec::new();
        for held in &self.free {
            let count = counts
                .entry((held.address.is_ipv4(), &held.pool))
                .or_default();
            if keep(held) && *count < high {
                *count += 1;
            } else {
                records.push(Record::Drop {
                    address: held.address,
                });
            }
        }
        records
    }

    /// What the datastore has to be told, by block.
    pub fn plan_sync(&self) -> BTreeMap<Cidr, Vec<Intent>> {
        let mut owners: BTreeMap<IpAddr, &Owner> = self
            .free
            .iter()
            .map(|h| (h.address, &self.reserve))
            .collect();
        for attachment in self.attachments.values() {
            owners.extend(
                attachment
                    .addresses
                    .iter()
                    .map(|h| (h.address, &attachment.owner)),
            );
        }
        let mut blocks: BTreeMap<Cidr, Vec<Intent>> = BTreeMap::new();
        for held in self.dirty.values() {
            blocks.entry(held.block).or_default().push(Intent {
                address: held.address,
                owner: owners.get(&held.address).map(|owner| (*owner).clone()),
            });
        }
        blocks
    }

    /// Whether an intent still stands: the state may have moved on while the datastore was written.
    pub fn still_intends(&self, intent: &Intent) -> bool {
        self.plan_sync().values().flatten().any(|now| now == intent)
    }

    /// Carries a record out.
    pub fn apply(&mut self, record: &Record) {
        self.version += 1;
        match record {
            Record::Hold(held) => {
                if !self.knows(held.address) {
                    self.free.push_back(held.clone());
                }
            }
            Record::Assign {
                owner,
                addresses,
                stored,
            } => self.assign(owner, addresses, *stored),
            Record::Free { handle } => {
                if let Some(attachment) = self.attachments.remove(handle) {
                    // A process killed between two writes may have left the handle a count too high; nobody else looks.
                    if handle != GHOST {
                        self.tombstones.insert(handle.clone());
                    }
                    for held in attachment.addresses {
                        self.dirty.insert(held.address, held.clone());
                        self.free.push_back(held);
                    }
                }
            }
            Record::Drop { address } => {
                if let Some(place) = self.free.iter().position(|h| h.address == *address)
                    && let Some(held) = self.free.remove(place)
                {
                    self.dirty.insert(*address, held.clone());
                    self.dropped.insert(*address, held);
                }
            }
            Record::Clean { addresses } => {
                for address in addresses {
                    self.dirty.remove(address);
                    self.dropped.remove(address);
                }
            }
            Record::ReleaseHandle { handle } => {
                self.tombstones.insert(handle.clone());
            }
            Record::HandleReleased { handle } => {
                self.tombstones.remove(handle);
            }
            Record::Lost { address } => {
                self.free.retain(|h| h.address != *address);
                self.dirty.remove(address);
                self.dropped.remove(address);
            }
        }
    }

    fn assign(&mut self, owner: &Owner, addresses: &[Held], stored: bool) {
        let Some(handle) = owner.handle() else { return };
        self.tombstones.remove(handle);
        for held in addresses {
            self.free.retain(|h| h.address != held.address);
            self.dropped.remove(&held.address);
            if stored {
                self.dirty.remove(&held.address);
            } else {
                self.dirty.insert(held.address, held.clone());
            }
        }
        let attachment = self
            .attachments
            .entry(handle.to_owned())
            .or_insert_with(|| Attachment {
                owner: owner.clone(),
                addresses: Vec::new(),
            });
        for held in addresses {
            if !attachment.addresses.contains(held) {
                attachment.addresses.push(held.clone());
            }
        }
    }

    /// The shortest sequence of records that gives this state.
    pub fn records(&self) -> Vec<Record> {
        let mut records: Vec<Record> = self.free.iter().cloned().map(Record::Hold).collect();
        records.extend(self.dropped.values().cloned().map(Record::Hold));
        for attachment in self.attachments.values() {
            for held in &attachment.addresses {
                records.push(Record::Assign {
                    owner: attachment.owner.clone(),
                    addresses: vec![held.clone()],
                    stored: !self.dirty.contains_key(&held.address),
                });
            }
        }
        // A ready address whose former owner the datastore still shows: it was that owner's until now.
        for held in self
            .free
            .iter()
            .filter(|h| self.dirty.contains_key(&h.address))
        {
            let ghost = Owner::new(GHOST);
            records.push(Record::Assign {
                owner: ghost,
                addresses: vec![held.clone()],
                stored: false,
            });
            records.push(Record::Free {
                handle: GHOST.to_owned(),
            });
        }
        records.extend(
            self.dropped
                .keys()
                .map(|address| Record::Drop { address: *address }),
        );
        records.extend(self.tombstones.iter().map(|handle| Record::ReleaseHandle {
            handle: handle.clone(),
        }));
        records
    }
}

/// The handle that stands for a former owner in a compacted journal; no pod can have it (handles have a `.`).
const GHOST: &str = "former-owner";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn held(last: u8) -> Held {
        Held {
            address: IpAddr::from([10, 0, 0, last]),
            block: "10.0.0.0/26".parse().unwrap(),
            pool: if last < 8 { "one" } else { "two" }.to_owned(),
        }
    }

    fn state(ready: &[u8]) -> State {
        let mut state = State::new(Owner::new("cali-reserve-n1"));
        for last in ready {
            state.apply(&Record::Hold(held(*last)));
        }
        state
    }

    fn want(pools: &[&str]) -> Want {
        Want {
            v4: true,
            pools: pools.iter().map(|p| (*p).to_owned()).collect(),
        }
    }

    #[test]
    fn pools_are_tried_in_the_order_of_the_want() {
        let state = state(&[1, 9]);
        let pick = |pools: &[&str]| match state.plan_assign(&Owner::new("a.1"), &[want(pools)]) {
            Some(Record::Assign { addresses, .. }) => Some(addresses[0].clone()),
            _ => None,
        };
        assert_eq!(pick(&["two", "one"]), Some(held(9)));
        assert_eq!(pick(&["one"]), Some(held(1)));
        assert_eq!(pick(&["three"]), None);
    }

    #[test]
    fn a_freed_address_is_the_last_to_be_given_again() {
        let mut state = state(&[1, 2]);
        let assign = state
            .plan_assign(&Owner::new("a.1"), &[want(&["one"])])
            .unwrap();
        state.apply(&assign);
        for record in state.plan_free("a.1", false) {
            state.apply(&record);
        }
        assert_eq!(
            state.free().cloned().collect::<Vec<_>>(),
            [held(2), held(1)]
        );
    }

    #[test]
    fn the_handle_of_an_owner_that_is_gone_leaves_a_tombstone() {
        let mut state = state(&[1]);
        let assign = state
            .plan_assign(&Owner::new("a.1"), &[want(&["one"])])
            .unwrap();
        state.apply(&assign);
        for record in state.plan_free("a.1", false) {
            state.apply(&record);
        }
        assert_eq!(state.tombstones().collect::<Vec<_>>(), ["a.1"]);
    }

    #[test]
    fn an_address_that_has_to_rest_leaves_the_reserve() {
        let mut state = state(&[1]);
        state.apply(
            &state
                .plan_assign(&Owner::new("a.1"), &[want(&["one"])])
                .unwrap(),
        );
        for record in state.plan_free("a.1", true) {
            state.apply(&record);
        }
        assert_eq!(state.free().count(), 0);
        let intents: Vec<Intent> = state.plan_sync().into_values().flatten().collect();
        assert_eq!(
            intents,
            [Intent {
                address: held(1).address,
                owner: None
            }]
        );
    }

    #[test]
    fn a_handle_that_is_unknown_leaves_a_tombstone_until_it_is_used_again() {
        let mut state = state(&[1]);
        for record in state.plan_free("a.1", false) {
            state.apply(&record);
        }
        assert_eq!(state.tombstones().collect::<Vec<_>>(), ["a.1"]);
        state.apply(
            &state
                .plan_assign(&Owner::new("a.1"), &[want(&["one"])])
                .unwrap(),
        );
        assert_eq!(state.tombstones().count(), 0);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Hold(u8),
        Assign(u8),
        Free(u8, bool),
        Trim(usize),
        Clean(u8),
        Lost(u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..16u8).prop_map(Op::Hold),
            (0..4u8).prop_map(Op::Assign),
            (0..5u8, any::<bool>()).prop_map(|(h, rest)| Op::Free(h, rest)),
            (0..4usize).prop_map(Op::Trim),
            (0..16u8).prop_map(Op::Clean),
            (0..16u8).prop_map(Op::Lost),
        ]
    }

    fn run(state: &mut State, op: &Op) {
        let records = match op {
            Op::Hold(n) => vec![Record::Hold(held(*n))],
            Op::Assign(h) => state
                .plan_assign(&Owner::new(&format!("net.{h}")), &[want(&["one", "two"])])
                .into_iter()
                .collect(),
            Op::Free(h, rest) => state.plan_free(&format!("net.{h}"), *rest),
            Op::Trim(high) => state.plan_trim(*high, |_| true),
            Op::Clean(n) => vec![Record::Clean {
                addresses: vec![held(*n).address],
            }],
            Op::Lost(n) => vec![Record::Lost {
                address: held(*n).address,
            }],
        };
        for record in &records {
            state.apply(record);
        }
    }

    proptest! {
        /// No address is in two places, and a compacted journal gives the same holdings and the same intents.
        #[test]
        fn state_is_consistent_and_survives_compaction(ops in proptest::collection::vec(op(), 0..60)) {
            let mut state = state(&[]);
            for op in &ops {
                run(&mut state, op);
                let mut seen = BTreeSet::new();
                let attached = state.attachments.values().flat_map(|a| &a.addresses);
                for held in state.free.iter().chain(attached).chain(state.dropped.values()) {
                    prop_assert!(seen.insert(held.address), "{} is held twice after {op:?}", held.address);
                }
                let mut again = State::new(Owner::new("cali-reserve-n1"));
                for record in state.records() {
                    again.apply(&record);
                }
                let sorted = |s: &State| s.free().cloned().collect::<BTreeSet<_>>();
                prop_assert_eq!(sorted(&again), sorted(&state));
                prop_assert_eq!(&again.attachments, &state.attachments);
                prop_assert_eq!(&again.dropped, &state.dropped);
                prop_assert_eq!(&again.tombstones, &state.tombstones);
                prop_assert_eq!(again.plan_sync(), state.plan_sync());
            }
        }
    }
}
