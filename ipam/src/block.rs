//! One block of addresses: who holds which, and how that changes. Pure.
//!
//! The form is Calico's: `allocations` holds, for each ordinal, an index into `attributes`; `unallocated` is the queue
//! of free ordinals (released ones go to its end, so that an address rests as long as possible). A released address may
//! also have to rest for a configured time; until then it is neither free nor held.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime};

use cali_api::Cidr;
use cali_api::v3::{Affinity, AllocationAttribute, IPAMBlockSpec};
use cali_datastore::timestamp;

use crate::owner::Owner;

/// Time and the rule that depends on it, given by the caller.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// Now.
    pub now: SystemTime,
    /// How long a released address rests (`ipCooldownSeconds`).
    pub cooldown: Duration,
}

impl Clock {
    /// Addresses are free as soon as they are released.
    pub fn without_cooldown(now: SystemTime) -> Self {
        Self {
            now,
            cooldown: Duration::ZERO,
        }
    }
}

/// What happened to a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Release {
    /// The address is free.
    Done,
    /// Nobody held it.
    WasFree,
    /// Another handle holds it; nothing was changed.
    HeldBy(String),
}

/// A block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    spec: IPAMBlockSpec,
}

impl Block {
    /// An empty block of an owner. `now` also gives the first sequence number, so that numbers of a deleted and
    /// re-created block do not repeat.
    pub fn new(cidr: Cidr, affinity: Affinity, now: SystemTime) -> Self {
        let size = size(&cidr);
        let nanoseconds = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(0));
        Self {
            spec: IPAMBlockSpec {
                cidr,
                affinity: Some(affinity),
                affinity_claim_time: Some(timestamp::format(now)),
                allocations: vec![None; size as usize],
                unallocated: (0..size).collect(),
                attributes: Vec::new(),
                sequence_number: nanoseconds,
                sequence_number_for_allocation: Default::default(),
                deleted: false,
                strict_affinity: false,
            },
        }
    }

    /// The block as stored.
    pub fn from_spec(spec: IPAMBlockSpec) -> Self {
        Self { spec }
    }

    /// The form to store, with the sequence number of this write.
    pub fn into_spec(mut self) -> IPAMBlockSpec {
        self.spec.sequence_number = self.spec.sequence_number.wrapping_add(1);
        self.spec
    }

    /// Its range.
    pub fn cidr(&self) -> Cidr {
        self.spec.cidr
    }

    /// Its owner.
    pub fn affinity(&self) -> Option<&Affinity> {
        self.spec.affinity.as_ref()
    }

    /// Whether this node owns it.
    pub fn is_owned_by(&self, owner: &Affinity) -> bool {
        self.spec.affinity.as_ref() == Some(owner)
    }

    /// Gives the block up without deleting it.
    pub fn clear_affinity(&mut self) {
        self.spec.affinity = None;
        self.spec.affinity_claim_time = None;
    }

    /// When it was claimed.
    pub fn claimed_at(&self) -> Option<SystemTime> {
        timestamp::parse(self.spec.affinity_claim_time.as_deref()?)
    }

    /// Counts the writes; a number never comes again, not even in a block that was deleted and made anew.
    pub fn sequence(&self) -> u64 {
        self.spec.sequence_number
    }

    fn ordinal(&self, address: IpAddr) -> Option<usize> {
        if !self.spec.cidr.contains(address) {
            return None;
        }
        let offset = match (address, self.spec.cidr.addr()) {
            (IpAddr::V4(a), IpAddr::V4(base)) => u128::from(a.to_bits() - base.to_bits()),
            (IpAddr::V6(a), IpAddr::V6(base)) => a.to_bits() - base.to_bits(),
            _ => return None,
        };
        usize::try_from(offset)
            .ok()
            .filter(|o| *o < self.spec.allocations.len())
    }

    fn address(&self, ordinal: usize) -> IpAddr {
        match self.spec.cidr.addr() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(
                base.to_bits().wrapping_add(ordinal as u32),
            )),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(
                base.to_bits().wrapping_add(ordinal as u128),
            )),
        }
    }

    fn attribute(&self, ordinal: usize) -> Option<&AllocationAttribute> {
        let index = (*self.spec.allocations.get(ordinal)?)?;
        self.spec.attributes.get(index as usize)
    }

    /// Who holds an address. `None` for free ones and for those that rest after their release.
    pub fn holder(&self, address: IpAddr) -> Option<Owner> {
        self.attribute(self.ordinal(address)?)
            .filter(|a| a.released_at.is_none())
            .map(Owner::from)
    }

    /// Every held address with its holder, in order.
    pub fn held(&self) -> Vec<(IpAddr, Owner)> {
        (0..self.spec.allocations.len())
            .filter_map(|ordinal| {
                let attribute = self
                    .attribute(ordinal)
                    .filter(|a| a.released_at.is_none())?;
                Some((self.address(ordinal), Owner::from(attribute)))
            })
            .collect()
    }

    /// Addresses that a handle holds.
    pub fn held_by(&self, handle: &str) -> Vec<IpAddr> {
        let handle = crate::names::sanitized_handle(handle);
        self.held()
            .into_iter()
            .filter(|(_, owner)| owner.handle() == Some(handle.as_str()))
            .map(|(address, _)| address)
            .collect()
    }

    /// Whether nobody holds anything (resting addresses do not count).
    pub fn is_empty(&self) -> bool {
        self.held().is_empty()
    }

    /// Whether every address is free, none even resting: such a block can be deleted.
    pub fn is_unused(&self) -> bool {
        self.spec.unallocated.len() == self.spec.allocations.len()
    }

    /// Number of addresses in the block.
    pub fn capacity(&self) -> usize {
        self.spec.allocations.len()
    }

    /// Number of addresses that can be given out now.
    pub fn free(&self) -> usize {
        self.spec.unallocated.len()
    }

    /// Gives out up to `count` addresses, longest free first, except those that `skip` refuses.
    pub fn assign(
        &mut self,
        count: usize,
        owner: &Owner,
        clock: Clock,
        skip: impl Fn(IpAddr) -> bool,
    ) -> Vec<IpAddr> {
        self.end_rests(clock);
        let (mut taken, mut left) = (Vec::new(), Vec::new());
        for ordinal in std::mem::take(&mut self.spec.unallocated) {
            let address = self.address(ordinal as usize);
            let usable = (ordinal as usize) < self.spec.allocations.len();
            if taken.len() < count && usable && !skip(address) {
                taken.push((ordinal as usize, address));
            } else {
                left.push(ordinal);
            }
        }
        self.spec.unallocated = left;
        for (ordinal, _) in &taken {
            self.set(*ordinal, owner);
        }
        taken.into_iter().map(|(_, address)| address).collect()
    }

    /// Gives out one certain address. An owner that holds it already keeps it.
    pub fn assign_exact(
        &mut self,
        address: IpAddr,
        owner: &Owner,
        clock: Clock,
    ) -> Result<(), Option<Owner>> {
        self.end_rests(clock);
        let ordinal = self.ordinal(address).ok_or(None)?;
        match self.attribute(ordinal) {
            Some(attribute) if attribute.released_at.is_some() => {}
            Some(attribute) => {
                let holder = Owner::from(attribute);
                if holder.handle().is_none() || holder.handle() != owner.handle() {
                    return Err(Some(holder));
                }
            }
            None => {}
        }
        self.spec.unallocated.retain(|o| *o as usize != ordinal);
        self.set(ordinal, owner);
        Ok(())
    }

    /// Passes an address from one handle to another owner in one step: it is never free in between.
    pub fn change_owner(
        &mut self,
        address: IpAddr,
        from: &str,
        owner: &Owner,
    ) -> Result<(), Option<Owner>> {
        let ordinal = self.ordinal(address).ok_or(None)?;
        let holder = self.holder(address);
        match &holder {
            Some(current) if current.has_handle(from) => {
                self.set(ordinal, owner);
                Ok(())
            }
            _ => Err(holder),
        }
    }

    /// Takes an address back; with a handle, only from that handle.
    pub fn release(&mut self, address: IpAddr, handle: Option<&str>, clock: Clock) -> Release {
        self.end_rests(clock);
        let Some(ordinal) = self.ordinal(address) else {
            return Release::WasFree;
        };
        let Some(holder) = self.holder(address) else {
            return Release::WasFree;
        };
        if let Some(handle) = handle
            && !holder.has_handle(handle)
        {
            return Release::HeldBy(holder.to_string());
        }
        self.free_ordinal(ordinal, clock);
        Release::Done
    }

    /// Takes back all addresses of a handle.
    pub fn release_handle(&mut self, handle: &str, clock: Clock) -> Vec<IpAddr> {
        self.end_rests(clock);
        let addresses = self.held_by(handle);
        for address in &addresses {
            if let Some(ordinal) = self.ordinal(*address) {
                self.free_ordinal(ordinal, clock);
            }
        }
        addresses
    }

    fn free_ordinal(&mut self, ordinal: usize, clock: Clock) {
        self.spec
            .sequence_number_for_allocation
            .remove(&ordinal.to_string());
        if clock.cooldown.is_zero() {
            self.spec.allocations[ordinal] = None;
            self.spec.unallocated.push(ordinal as u32);
        } else {
            let resting = AllocationAttribute {
                released_at: Some(timestamp::format(clock.now)),
                ..AllocationAttribute::default()
            };
            let index = self.intern(resting);
            self.spec.allocations[ordinal] = Some(index);
        }
        self.drop_unused_attributes();
    }

    /// Whether [`Self::assign`] has something to give.
    pub fn has_free(&self, clock: Clock) -> bool {
        self.free() > 0 || self.rested(clock).next().is_some()
    }

    /// Frees the addresses whose rest is over, in the order of their numbers.
    pub fn end_rests(&mut self, clock: Clock) {
        for ordinal in self.rested(clock).collect::<Vec<_>>() {
            self.spec.allocations[ordinal] = None;
            self.spec.unallocated.push(ordinal as u32);
        }
        self.drop_unused_attributes();
    }

    fn rested(&self, clock: Clock) -> impl Iterator<Item = usize> {
        (0..self.spec.allocations.len()).filter(move |ordinal| {
            self.attribute(*ordinal)
                .and_then(|a| a.released_at.as_deref())
                .is_some_and(|at| rest_is_over(at, clock))
        })
    }

    fn set(&mut self, ordinal: usize, owner: &Owner) {
        let index = self.intern(owner.into());
        self.spec.allocations[ordinal] = Some(index);
        self.spec
            .sequence_number_for_allocation
            .insert(ordinal.to_string(), self.spec.sequence_number);
        self.drop_unused_attributes();
    }

    fn intern(&mut self, attribute: AllocationAttribute) -> u32 {
        let index = self
            .spec
            .attributes
            .iter()
            .position(|known| *known == attribute)
            .unwrap_or_else(|| {
                self.spec.attributes.push(attribute);
                self.spec.attributes.len() - 1
            });
        index as u32
    }

    fn drop_unused_attributes(&mut self) {
        let used: BTreeSet<u32> = self.spec.allocations.iter().flatten().copied().collect();
        if used.len() == self.spec.attributes.len() {
            return;
        }
        let mut places = vec![None; self.spec.attributes.len()];
        let mut kept = Vec::with_capacity(used.len());
        for (index, attribute) in std::mem::take(&mut self.spec.attributes)
            .into_iter()
            .enumerate()
        {
            if used.contains(&(index as u32)) {
                places[index] = Some(kept.len() as u32);
                kept.push(attribute);
            }
        }
        self.spec.attributes = kept;
        for slot in &mut self.spec.allocations {
            *slot = slot.and_then(|index| places.get(index as usize).copied().flatten());
        }
    }

    /// What is wrong inside a block that was read, if anything; blocks of other programs are not trusted blindly.
    pub fn defect(&self) -> Option<String> {
        let size = size(&self.spec.cidr) as usize;
        if self.spec.allocations.len() != size {
            return Some(format!(
                "{} allocations for {size} addresses",
                self.spec.allocations.len()
            ));
        }
        let mut seen = BTreeSet::new();
        for ordinal in &self.spec.unallocated {
            if *ordinal as usize >= size || !seen.insert(*ordinal) {
                return Some(format!(
                    "ordinal {ordinal} is out of range or listed as free twice"
                ));
            }
            if self.spec.allocations[*ordinal as usize].is_some() {
                return Some(format!("ordinal {ordinal} is both free and held"));
            }
        }
        for (ordinal, slot) in self.spec.allocations.iter().enumerate() {
            match slot {
                Some(index) if *index as usize >= self.spec.attributes.len() => {
                    return Some(format!(
                        "ordinal {ordinal} refers to attribute {index}, which does not exist"
                    ));
                }
                None if !seen.contains(&(ordinal as u32)) => {
                    return Some(format!("ordinal {ordinal} is neither free nor held"));
                }
                _ => {}
            }
        }
        None
    }
}

fn rest_is_over(released_at: &str, clock: Clock) -> bool {
    // A time that cannot be read would keep the address for ever.
    timestamp::parse(released_at).is_none_or(|at| {
        clock
            .now
            .duration_since(at)
            .is_ok_and(|rested| rested >= clock.cooldown)
    })
}

/// Number of addresses of a block. Blocks have at most 4096 (validated on pools); anything larger is clamped.
fn size(cidr: &Cidr) -> u32 {
    let width = if cidr.is_v4() { 32 } else { 128 };
    1_u32 << u32::from(width - cidr.prefix_len()).min(16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn block(cidr: &str) -> Block {
        Block::new(
            cidr.parse().unwrap(),
            Affinity::host("n1"),
            SystemTime::UNIX_EPOCH,
        )
    }

    fn owner(handle: &str) -> Owner {
        Owner::new(handle).with("node", "n1")
    }

    fn clock() -> Clock {
        Clock::without_cooldown(SystemTime::UNIX_EPOCH)
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_come_in_order_and_return_to_the_end() {
        let mut block = block("10.0.0.0/30");
        assert_eq!(
            block.assign(2, &owner("a"), clock(), |_| false),
            ips(&["10.0.0.0", "10.0.0.1"])
        );
        assert_eq!(
            block.release("10.0.0.0".parse().unwrap(), Some("a"), clock()),
            Release::Done
        );
        let rest = block.assign(5, &owner("b"), clock(), |_| false);
        assert_eq!(rest, ips(&["10.0.0.2", "10.0.0.3", "10.0.0.0"]));
        assert_eq!(block.free(), 0);
    }

    #[test]
    fn reserved_addresses_are_skipped_and_stay_free() {
        let mut block = block("fd00::/126");
        let skip: IpAddr = "fd00::".parse().unwrap();
        assert_eq!(
            block.assign(1, &owner("a"), clock(), |ip| ip == skip),
            ips(&["fd00::1"])
        );
        assert_eq!(block.free(), 3);
    }

    #[test]
    fn release_with_the_wrong_handle_changes_nothing() {
        let mut block = block("10.0.0.0/30");
        block.assign(1, &owner("a"), clock(), |_| false);
        let before = block.clone();
        assert!(matches!(
            block.release("10.0.0.0".parse().unwrap(), Some("b"), clock()),
            Release::HeldBy(_)
        ));
        assert_eq!(block, before);
    }

    #[test]
    fn cooling_addresses_are_neither_free_nor_held() {
        let mut block = block("10.0.0.0/32");
        let address: IpAddr = "10.0.0.0".parse().unwrap();
        let at = |seconds| Clock {
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
            cooldown: Duration::from_secs(60),
        };
        block.assign(1, &owner("a"), at(0), |_| false);
        assert_eq!(block.release(address, None, at(100)), Release::Done);
        assert!(block.is_empty());
        assert!(block.assign(1, &owner("b"), at(159), |_| false).is_empty());
        assert_eq!(block.assign(1, &owner("b"), at(160), |_| false), [address]);
    }

    #[test]
    fn owner_changes_only_from_the_expected_handle() {
        let mut block = block("10.0.0.0/30");
        let address: IpAddr = "10.0.0.0".parse().unwrap();
        block.assign(1, &owner("reserve"), clock(), |_| false);
        assert!(block.change_owner(address, "other", &owner("pod")).is_err());
        assert!(
            block
                .change_owner(address, "reserve", &owner("pod"))
                .is_ok()
        );
        assert_eq!(block.held_by("pod"), [address]);
        assert!(block.held_by("reserve").is_empty());
    }

    #[test]
    fn size_one_and_size_4096_blocks_work() {
        assert_eq!(block("10.0.0.1/32").free(), 1);
        assert_eq!(block("10.0.0.0/20").free(), 4096);
        assert_eq!(block("fd00::/116").free(), 4096);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Assign(u8, u8),
        Exact(u8, u8),
        Release(u8, u8),
        ReleaseHandle(u8),
        Change(u8, u8, u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..4u8, 0..4u8).prop_map(|(n, h)| Op::Assign(n, h)),
            (0..8u8, 0..4u8).prop_map(|(o, h)| Op::Exact(o, h)),
            (0..8u8, 0..4u8).prop_map(|(o, h)| Op::Release(o, h)),
            (0..4u8).prop_map(Op::ReleaseHandle),
            (0..8u8, 0..4u8, 0..4u8).prop_map(|(o, a, b)| Op::Change(o, a, b)),
        ]
    }

    proptest! {
        /// A model (ordinal -> handle) and the block agree after any sequence, and the block stays well formed.
        #[test]
        fn block_agrees_with_the_model(ops in proptest::collection::vec(op(), 0..60)) {
            let mut block = block("10.0.0.0/29");
            let mut model: [Option<u8>; 8] = [None; 8];
            let address = |o: u8| IpAddr::V4(Ipv4Addr::new(10, 0, 0, o));
            let handle = |h: u8| format!("h{h}");
            for op in ops {
                match op {
                    Op::Assign(n, h) => {
                        for ip in block.assign(n.into(), &owner(&handle(h)), clock(), |_| false) {
                            let IpAddr::V4(v4) = ip else { unreachable!() };
                            let slot = &mut model[v4.octets()[3] as usize];
                            prop_assert_eq!(*slot, None, "{} was given out twice", ip);
                            *slot = Some(h);
                        }
                    }
                    Op::Exact(o, h) => {
                        let free = model[o as usize].is_none_or(|held| held == h);
                        prop_assert_eq!(block.assign_exact(address(o), &owner(&handle(h)), clock()).is_ok(), free);
                        if free { model[o as usize] = Some(h); }
                    }
                    Op::Release(o, h) => {
                        let done = block.release(address(o), Some(&handle(h)), clock()) == Release::Done;
                        prop_assert_eq!(done, model[o as usize] == Some(h));
                        if done { model[o as usize] = None; }
                    }
                    Op::ReleaseHandle(h) => {
                        block.release_handle(&handle(h), clock());
                        for slot in &mut model { if *slot == Some(h) { *slot = None; } }
                    }
                    Op::Change(o, a, b) => {
                        let done = block.change_owner(address(o), &handle(a), &owner(&handle(b))).is_ok();
                        prop_assert_eq!(done, model[o as usize] == Some(a));
                        if done { model[o as usize] = Some(b); }
                    }
                }
                prop_assert_eq!(block.defect(), None);
                for o in 0..8u8 {
                    let held = block.holder(address(o)).and_then(|w| w.handle().map(str::to_owned));
                    prop_assert_eq!(held, model[o as usize].map(handle));
                }
            }
        }
    }
}
