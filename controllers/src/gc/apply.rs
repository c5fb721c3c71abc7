//! Carries a plan out. Every address is looked at again, then written with compare-and-swap; one failure stops nothing else.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::Cidr;
use cali_datastore::Datastore;
use cali_ipam::{Allocator, Owner};
use serde::Serialize;

use super::plan::{Allocation, Leak, Plan};
use crate::error::Error;
use crate::facts::Facts;
use crate::judge::{Judge, Verdict, pod_of};

/// Writes that meet another writer before an operation is left to the next pass.
const ATTEMPTS: usize = 5;

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    /// Addresses that were released.
    pub released: Vec<IpAddr>,
    /// Blocks that were taken from their owner: empty ones are deleted.
    pub blocks: Vec<Cidr>,
    /// Handles of which a part or all was removed.
    pub handles: Vec<String>,
    /// What failed. The next pass tries again.
    pub failures: Vec<String>,
}

impl Done {
    /// Whether anything was written.
    pub fn is_nothing(&self) -> bool {
        self.released.is_empty() && self.blocks.is_empty() && self.handles.is_empty()
    }

    fn note<T>(&mut self, what: impl std::fmt::Display, result: Result<T, Error>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%what, %error, ?cause, "garbage stays until the next pass");
                self.failures.push(format!("{what}: {error}"));
                None
            }
        }
    }
}

/// Carries the plan out.
pub async fn apply(store: &Arc<dyn Datastore>, allocator: &Allocator, plan: &Plan) -> Done {
    let mut done = Done::default();
    for leak in &plan.leaks {
        let what = leak
            .addresses
            .first()
            .map_or_else(String::new, |a| format!("{} of {}", a.address, a.owner));
        let released = release(store, allocator, leak).await;
        if let Some(released) = done.note(what, released)
            && !released.is_empty()
        {
            tracing::info!(addresses = ?released, reason = %leak.orphan, "released leaked addresses");
            done.released.extend(released);
        }
    }
    for (node, cidr) in &plan.deserted {
        let given_up = desert(store, allocator, node, cidr).await;
        if done.note(format!("block {cidr} of {node}"), given_up) == Some(true) {
            tracing::info!(block = %cidr, node, "gave up a block of a deleted node");
            done.blocks.push(*cidr);
        }
    }
    for (node, cidr) in &plan.idle {
        let given_up = allocator.give_up(node, cidr, true).await;
        let given_up = given_up.map_err(Error::ipam("give up an idle block"));
        if done.note(format!("block {cidr} of {node}"), given_up) == Some(true) {
            tracing::info!(block = %cidr, node, "gave up an idle block");
            done.blocks.push(*cidr);
        }
    }
    for cidr in &plan.ownerless {
        let disowned = disown(store, allocator, cidr).await;
        if done.note(format!("block {cidr}"), disowned) == Some(true) {
            done.blocks.push(*cidr);
        }
    }
    for cidr in &plan.resting {
        let ended = end_rests(allocator, cidr).await;
        done.note(format!("block {cidr}"), ended);
    }
    for (handle, cidr) in &plan.stale_handles {
        let forgotten = match cidr {
            Some(cidr) => allocator.forget_stale(handle, cidr).await,
            None => allocator.forget_empty(handle).await,
        };
        let forgotten = forgotten.map_err(Error::ipam("remove a stale handle"));
        if done.note(format!("handle {handle}"), forgotten) == Some(true) {
            done.handles.push(handle.clone());
        }
    }
    done
}

/// Releases the addresses of a leak, unless one of them is in use by now.
pub async fn release(
    store: &Arc<dyn Datastore>,
    allocator: &Allocator,
    leak: &Leak,
) -> Result<Vec<IpAddr>, Error> {
    let mut by_block: BTreeMap<Cidr, Vec<&Allocation>> = BTreeMap::new();
    for allocation in &leak.addresses {
        by_block
            .entry(allocation.block)
            .or_default()
            .push(allocation);
    }
    let mut released = Vec::new();
    for (cidr, allocations) in by_block {
        for _ in 0..ATTEMPTS {
            // In this order: a block that was not written after it was seen shows everybody who was there at the check.
            let seen = allocator
                .see_block(&cidr)
                .await
                .map_err(Error::ipam("look at a block"))?;
            let Some(seen) = seen else { break };
            let held: Vec<(IpAddr, Owner)> = allocations
                .iter()
                .filter(|a| seen.block().holder(a.address).as_ref() == Some(&a.owner))
                .map(|a| (a.address, a.owner.clone()))
                .collect();
            if held.is_empty() {
                break;
            }
            if !still_orphaned(store.as_ref(), &leak.addresses, &seen.block().held()).await? {
                return Ok(released);
            }
            let done = allocator
                .release_seen(&seen, &held)
                .await
                .map_err(Error::ipam("release leaked addresses"))?;
            if done {
                released.extend(held.iter().map(|(address, _)| *address));
                break;
            }
        }
    }
    Ok(released)
}

async fn still_orphaned(
    store: &dyn Datastore,
    addresses: &[Allocation],
    neighbours: &[(IpAddr, Owner)],
) -> Result<bool, Error> {
    let mut checked = Vec::new();
    for allocation in addresses {
        let owner = &allocation.owner;
        let node = Judge::node_of(owner, allocation.affinity.as_ref());
        let pod = pod_of(owner);
        if checked.contains(&(node, pod.clone())) {
            continue;
        }
        let facts = Facts::read_some(store, node, pod.as_ref()).await?;
        let judge = Judge::new(&facts, neighbours.iter().map(|(_, owner)| owner));
        if !facts.unreadable.is_empty() {
            return Ok(false);
        }
        for same in addresses
            .iter()
            .filter(|a| Judge::node_of(&a.owner, a.affinity.as_ref()) == node)
        {
            if pod_of(&same.owner) == pod
                && !matches!(
                    judge.judge(same.address, &same.owner, same.affinity.as_ref()),
                    Verdict::Orphan(_)
                )
            {
                return Ok(false);
            }
        }
        checked.push((node, pod));
    }
    Ok(true)
}

async fn is_gone(store: &dyn Datastore, node: &str) -> Result<bool, Error> {
    let facts = Facts::read_some(store, Some(node), None).await?;
    Ok(facts.nodes.is_empty() && facts.unreadable.is_empty())
}

async fn desert(
    store: &Arc<dyn Datastore>,
    allocator: &Allocator,
    node: &str,
    cidr: &Cidr,
) -> Result<bool, Error> {
    if !is_gone(store.as_ref(), node).await? {
        return Ok(false);
    }
    allocator
        .give_up(node, cidr, false)
        .await
        .map_err(Error::ipam("give up a block of a deleted node"))
}

async fn disown(
    store: &Arc<dyn Datastore>,
    allocator: &Allocator,
    cidr: &Cidr,
) -> Result<bool, Error> {
    let seen = allocator
        .see_block(cidr)
        .await
        .map_err(Error::ipam("look at a block"))?;
    let Some(seen) = seen else { return Ok(false) };
    if let Some(owner) = seen.block().affinity()
        && !is_gone(store.as_ref(), &owner.name).await?
    {
        return Ok(false);
    }
    allocator
        .disown_seen(&seen)
        .await
        .map_err(Error::ipam("delete a block without owner"))
}

async fn end_rests(allocator: &Allocator, cidr: &Cidr) -> Result<bool, Error> {
    let seen = allocator
        .see_block(cidr)
        .await
        .map_err(Error::ipam("look at a block"))?;
    let Some(seen) = seen else { return Ok(false) };
    allocator
        .end_rests(&seen)
        .await
        .map_err(Error::ipam("end the rest of released addresses"))
}
