//! Keeps connection tracking in line with policy: no flow outlives its right to exist.
//!
//! - An address that leaves its endpoint takes its entries with it, before anybody else can be given it.
//! - A flow that a change forbids ends in this order: the rules are in the kernel; the flow's tuples go into the set
//!   that drops both directions ([`crate::compile::held_set`]); its entry is deleted. What policy allows again is
//!   released.
//!
//! Work is bounded: only flows of addresses whose policy changed are looked at, a few addresses are asked for one by
//! one, and reading the table never takes more than a fifth of the time. What could not be done is kept and tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use cali_netlink::conntrack::{Conntrack, End, Flow, Tuple};
use cali_netlink::{Error, Netlink};
use tracing::{debug, info, warn};

use super::Endpoints;
use super::enforcer::Enforcer;
use super::flow_judge::{Forbidden, Judge};
use crate::compile::{HELD_LIMIT, HOLD, Suspects, can_be_held};

/// Up to so many addresses are asked for one by one; beyond, the whole table is read once.
const FEW: usize = 4;
/// Up to so many flows are read at once instead.
const FEW_FLOWS: u32 = 4096;
/// Where reading the table takes longer than [`QUICK`], it takes at most one part in so many of the time.
const SHARE: u32 = 5;
const QUICK: Duration = Duration::from_millis(10);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);
/// Failures to free an address that are worth another try.
const FREE_TRIES: u32 = 10;
/// How often the kernel is asked what it still holds.
const LOOK: Duration = Duration::from_secs(600);
/// So many ended flows are named in the log, the others counted.
const NAMED: usize = 10;

/// See the module's head.
pub(super) struct FlowGuard {
    conntrack: Option<Conntrack>,
    pending: Suspects,
    not_before: Option<Instant>,
    /// Flows that are held: original tuple to reply tuple.
    held: BTreeMap<Tuple, Tuple>,
    look_at: Option<Instant>,
    freed: BTreeSet<IpAddr>,
    free_tries: u32,
    ended: u64,
}

impl FlowGuard {
    /// Without connection tracking there is nothing to end.
    pub(super) fn open(netlink: &Netlink) -> Self {
        let conntrack = match Conntrack::open(netlink.netns()) {
            Ok(conntrack) => Some(conntrack),
            Err(error) => {
                warn!(%error, "connections that must end cannot be ended");
                None
            }
        };
        Self {
            conntrack,
            pending: Suspects::default(),
            not_before: None,
            held: BTreeMap::new(),
            look_at: None,
            freed: BTreeSet::new(),
            free_tries: 0,
            ended: 0,
        }
    }

    /// How many flows were ended since the last call, and how many are held.
    pub(super) fn counts(&mut self) -> (u64, usize) {
        (std::mem::take(&mut self.ended), self.held.len())
    }

    /// Takes over what a predecessor holds.
    pub(super) fn adopt(&mut self, enforcer: &mut Enforcer, now: Instant) {
        self.held.extend(enforcer.held_before());
        if !self.held.is_empty() {
            enforcer.set_holding(true);
            self.look_at = Some(now + LOOK);
        }
    }

    /// Flows that are held: original tuple to reply tuple.
    pub(super) const fn held(&self) -> &BTreeMap<Tuple, Tuple> {
        &self.held
    }

    /// Whom the host really talks to where it calls an address that is translated: by its own and the called socket.
    pub(super) fn translated(&self) -> BTreeMap<(SocketAddr, SocketAddr), SocketAddr> {
        let flows = self.conntrack.as_ref().map(Conntrack::dump);
        let flows = flows.and_then(Result::ok).unwrap_or_default();
        let tcp = flows.iter().filter(|flow| flow.original.protocol == 6);
        tcp.map(
            |Flow {
                 original, reply, ..
             }| {
                let from = SocketAddr::new(original.source, original.source_port);
                let to = SocketAddr::new(original.destination, original.destination_port);
                let server = SocketAddr::new(reply.source, reply.source_port);
                ((from, to), server)
            },
        )
        .collect()
    }

    pub(super) fn suspect_all(&mut self) {
        self.pending.all = true;
    }

    pub(super) fn suspect(&mut self, suspects: Suspects) {
        self.pending.merge(suspects);
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        let judge = (!self.pending.is_empty() || !self.freed.is_empty())
            .then_some(self.not_before)
            .flatten();
        [judge, self.look_at].into_iter().flatten().min()
    }

    /// No flow waits for its end.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.freed.is_empty()
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        let looks = self.look_at.is_some_and(|at| at <= now);
        looks || (!self.pending.is_empty() && self.not_before.is_none_or(|at| at <= now))
    }

    /// These addresses have left their endpoints.
    pub(super) fn free(&mut self, addresses: &BTreeSet<IpAddr>) {
        if !addresses.is_empty() {
            self.free_tries = 0;
            self.freed.extend(addresses);
        }
    }

    /// Ends all connections from and to addresses that have left, and releases what is held of them: the next owner
    /// must neither inherit the one nor suffer from the other.
    pub(super) fn end_freed(&mut self, enforcer: &mut Enforcer, now: Instant) {
        if self.freed.is_empty() {
            return;
        }
        let addresses: Vec<IpAddr> = self.freed.iter().copied().collect();
        let of_freed = |tuple: &Tuple| {
            addresses.contains(&tuple.source) || addresses.contains(&tuple.destination)
        };
        let mut gone = BTreeMap::new();
        self.held.retain(|original, reply| {
            let leaves = of_freed(original) || of_freed(reply);
            if leaves {
                gone.insert(*original, *reply);
            }
            !leaves
        });
        enforcer.change_held(&gone, &BTreeMap::new(), &self.held);
        enforcer.release_addresses(&addresses);
        let Some(conntrack) = &self.conntrack else {
            self.freed.clear();
            return;
        };
        match conntrack.delete_addresses(&addresses) {
            Ok(ended) => {
                debug!(
                    ?addresses,
                    ended, "ended the connections of former endpoints"
                );
                self.freed.clear();
            }
            Err(error) => {
                self.free_tries += 1;
                warn!(?addresses, %error, tries = self.free_tries, "connections of former endpoints cannot be ended");
                if self.free_tries >= FREE_TRIES {
                    self.freed.clear();
                }
                self.not_before = Some(now + RETRY);
            }
        }
    }

    /// Ends the flows that are forbidden, and releases those that are allowed again.
    pub(super) fn judge(
        &mut self,
        netlink: &Netlink,
        enforcer: &mut Enforcer,
        endpoints: &Endpoints,
        now: Instant,
    ) {
        let looks = self.look_at.is_some_and(|at| at <= now);
        if looks {
            self.forget_expired(enforcer, now);
        }
        let suspects = std::mem::take(&mut self.pending);
        if !suspects.is_empty()
            && let Err(error) = self.judge_suspects(netlink, enforcer, endpoints, &suspects)
        {
            warn!(%error, "established flows cannot be compared with policy; trying again");
            self.pending.merge(suspects);
            self.not_before = Some(now + RETRY);
        } else {
            let took = now.elapsed();
            self.not_before = (took > QUICK).then(|| now + took * SHARE);
        }
        if self.held.is_empty() {
            self.look_at = None;
            enforcer.set_holding(false);
        }
        if enforcer.write_holding() && !self.held.is_empty() {
            enforcer.change_held(&BTreeMap::new(), &self.held, &self.held);
        }
    }

    fn judge_suspects(
        &mut self,
        netlink: &Netlink,
        enforcer: &mut Enforcer,
        endpoints: &Endpoints,
        suspects: &Suspects,
    ) -> Result<(), Error> {
        let Some(conntrack) = &self.conntrack else {
            return Ok(());
        };
        let flows = suspicious(conntrack, suspects)?;
        if flows.is_empty() && self.held.is_empty() {
            return Ok(());
        }
        let own: BTreeSet<IpAddr> = netlink
            .dump_addresses(None)?
            .iter()
            .map(|address| address.address.ip())
            .collect();
        let judge = Judge {
            compiler: enforcer.compiler(),
            endpoints,
            own: &own,
        };
        let forbidden = judge.forbidden(flows, suspects);
        let mut released = BTreeMap::new();
        self.held.retain(|original, reply| {
            let still = judge.against(original, reply, None).is_some();
            if !still {
                released.insert(*original, *reply);
            }
            still
        });
        enforcer.change_held(&released, &BTreeMap::new(), &self.held);
        if !released.is_empty() {
            info!(
                flows = released.len(),
                "policy allows flows again that were held"
            );
        }
        self.end(enforcer, &forbidden);
        Ok(())
    }

    /// Holds and deletes, in this order.
    fn end(&mut self, enforcer: &mut Enforcer, forbidden: &[Forbidden]) {
        let Some(conntrack) = self.conntrack.as_ref().filter(|_| !forbidden.is_empty()) else {
            return;
        };
        self.ended += forbidden.len() as u64;
        let mut some = false;
        for Forbidden { flow, .. } in forbidden {
            let room = self.held.len() < HELD_LIMIT as usize / 2;
            if can_be_held(flow.original.protocol) && room {
                self.held.insert(flow.original, flow.reply);
                some = true;
            }
        }
        if some {
            enforcer.set_holding(true);
            self.look_at.get_or_insert(Instant::now() + LOOK);
            enforcer.change_held(&BTreeMap::new(), &self.held, &self.held);
        }
        let flows: Vec<Flow> = forbidden.iter().map(|one| one.flow.clone()).collect();
        for error in conntrack
            .delete_all(&flows)
            .into_iter()
            .filter_map(Result::err)
        {
            if !error.is_not_found() {
                warn!(%error, "a forbidden flow cannot be ended");
            }
        }
        for Forbidden {
            flow,
            endpoint,
            direction,
        } in forbidden.iter().take(NAMED)
        {
            info!(flow = %flow.original, %endpoint, %direction, "ended a flow that policy now forbids");
        }
        if forbidden.len() > NAMED {
            info!(
                flows = forbidden.len(),
                "ended flows that policy now forbids"
            );
        }
    }

    /// The kernel knows which held flows have been silent long enough.
    fn forget_expired(&mut self, enforcer: &Enforcer, now: Instant) {
        let left = match enforcer.still_held(&self.held) {
            Ok(left) => left,
            Err(error) => {
                warn!(%error, "held flows cannot be listed");
                self.look_at = Some(now + RETRY);
                return;
            }
        };
        self.held
            .retain(|original, reply| left.contains(original) || left.contains(reply));
        self.look_at = (!self.held.is_empty()).then(|| now + LOOK);
    }
}

/// The flows that must be looked at.
fn suspicious(conntrack: &Conntrack, suspects: &Suspects) -> Result<Vec<Flow>, Error> {
    let count = conntrack.count()?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let one_by_one =
        !suspects.all && suspects.networks.is_empty() && suspects.addresses.len() <= FEW;
    // Each question has the kernel walk its table: with few flows, the walks cost more than what they would leave out.
    if !one_by_one || count <= FEW_FLOWS {
        return conntrack.dump();
    }
    let mut flows = Vec::new();
    for address in &suspects.addresses {
        flows.extend(conntrack.dump_end(End::Originator(*address))?);
        flows.extend(conntrack.dump_end(End::Responder(*address))?);
    }
    flows.sort_unstable();
    flows.dedup_by(|a, b| a.original == b.original && a.zone == b.zone);
    Ok(flows)
}

const _: () = assert!(HOLD.as_secs() > LOOK.as_secs());
