//! The upkeep of the reserve: tells the datastore what happened, fills the reserve up, gives surplus back, and compares.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use cali_api::Cidr;
use cali_datastore::WatchStream;
use tokio::time::Instant;

use super::keeper::Inner;
use super::state::{Held, Intent, Record, State};
use crate::allocator::Situation;
use crate::block::{Block, Clock, Release};
use crate::error::Error;
use crate::objects;
use crate::owner::Owner;
use crate::pools;

/// Waits between attempts after an error: doubled from the first to the last.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Runs until the keeper is gone.
pub(super) async fn run(keeper: Weak<Inner>) {
    let mut wait = RETRY.0;
    let mut audited: Option<Instant> = None;
    let mut settings: Option<WatchStream> = None;
    loop {
        let Some(inner) = keeper.upgrade() else {
            return;
        };
        let due = audited.is_none_or(|at| at.elapsed() >= inner.settings.audit);
        // Watched before they are read, so that no change is missed in between.
        let watched = match settings.take() {
            Some(watch) => Ok(watch),
            None => inner.allocator.objects.watch_settings().await,
        };
        let done = match watched {
            Ok(watch) => {
                settings = Some(watch);
                once(&inner, due).await
            }
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => {
                wait = RETRY.0;
                if due {
                    audited = Some(Instant::now());
                }
                let settled = inner.read(State::is_settled).await;
                inner.settled.send_replace(settled);
                if settled {
                    sleep(&inner, &mut settings).await;
                }
            }
            Err(Error::Locked) => {
                tracing::info!("{}", Error::Locked);
                inner.settled.send_replace(false);
                sleep(&inner, &mut settings).await;
            }
            Err(error) => {
                tracing::warn!(error = %error, cause = ?std::error::Error::source(&error), retry_in = ?wait, "the datastore does not show the node's addresses yet");
                drop(inner);
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

/// Until somebody asks, a pool changes, or the next comparison is due.
async fn sleep(inner: &Inner, settings: &mut Option<WatchStream>) {
    let changed = async {
        match settings.as_mut() {
            Some(watch) => watch.next().await,
            None => std::future::pending().await,
        }
    };
    let broken = tokio::select! {
        () = inner.wake.notified() => false,
        () = tokio::time::sleep(inner.settings.audit) => false,
        event = changed => !matches!(event, Some(Ok(_))),
    };
    if broken {
        *settings = None;
    }
}

async fn once(inner: &Arc<Inner>, audit: bool) -> Result<(), Error> {
    let _writing = inner.writing.lock().await;
    let situation = inner.refresh().await?;
    // What the journal holds is told when the lock is gone: somebody may be copying the datastore.
    situation.ensure_unlocked()?;
    if audit {
        self::audit(inner).await?;
        for cidr in inner.allocator.give_up_unselected().await? {
            tracing::info!(block = %cidr, "gave up an empty block of a pool that no longer selects this node");
        }
    }
    trim(inner, &situation).await?;
    sync(inner, &situation).await?;
    // After the blocks: what is left in a handle then is what the journal does not know, or a count too high.
    release_tombstones(inner).await?;
    refill(inner, &situation).await
}

/// Makes the datastore show the holders that the state has.
async fn sync(inner: &Arc<Inner>, situation: &Situation) -> Result<(), Error> {
    let node = inner.allocator.node().to_owned();
    let clock = inner.allocator.clock(&situation.configuration);
    for (cidr, intents) in inner.read(State::plan_sync).await {
        let edit = |block: &mut Block| -> Vec<Outcome> {
            intents
                .iter()
                .map(|intent| reconcile(block, intent, &node, clock))
                .collect()
        };
        let outcomes = match inner.allocator.edit_block(&cidr, edit).await? {
            Some(outcomes) => outcomes,
            None => reclaim(inner, &cidr, &intents).await?,
        };
        let mut clean = Vec::new();
        for (intent, outcome) in intents.iter().zip(&outcomes) {
            match outcome {
                Outcome::Agrees => clean.push(intent.clone()),
                Outcome::HeldBy(holder) => {
                    tracing::error!(address = %intent.address, holder, "an address of this node belongs to somebody else in the datastore");
                    let address = intent.address;
                    inner
                        .change(|_| (vec![Record::Lost { address }], ()))
                        .await?;
                }
            }
        }
        inner
            .change(|state| {
                // What changed again while the datastore was written is still to be told.
                let addresses: Vec<IpAddr> = clean
                    .iter()
                    .filter(|i| state.still_intends(i))
                    .map(|i| i.address)
                    .collect();
                let records = if addresses.is_empty() {
                    Vec::new()
                } else {
                    vec![Record::Clean { addresses }]
                };
                (records, ())
            })
            .await?;
    }
    Ok(())
}

/// What became of an intent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Agrees,
    HeldBy(String),
}

/// Makes one address of a block show its intended holder, unless another node has it. Pure.
pub(super) fn reconcile(block: &mut Block, intent: &Intent, node: &str, clock: Clock) -> Outcome {
    let holder = block.holder(intent.address);
    if let Some(holder) = &holder
        && holder.attribute("node") != Some(node)
    {
        return match intent.owner {
            None => Outcome::Agrees,
            Some(_) => Outcome::HeldBy(holder.to_string()),
        };
    }
    match (&intent.owner, holder) {
        (Some(owner), Some(holder)) if *owner == holder => Outcome::Agrees,
        (Some(owner), Some(holder)) => {
            let changed = holder
                .handle()
                .map(|from| block.change_owner(intent.address, from, owner));
            if matches!(changed, Some(Ok(()))) {
                Outcome::Agrees
            } else {
                Outcome::HeldBy(holder.to_string())
            }
        }
        (Some(owner), None) => match block.assign_exact(intent.address, owner, clock) {
            Ok(()) => Outcome::Agrees,
            Err(holder) => Outcome::HeldBy(holder.map_or_else(String::new, |h| h.to_string())),
        },
        (None, Some(_)) => {
            let released = block.release(intent.address, None, clock);
            debug_assert_ne!(released, Release::WasFree);
            Outcome::Agrees
        }
        (None, None) => Outcome::Agrees,
    }
}

/// The block has gone from the datastore: addresses in use are taken anew, the others are gone with it.
async fn reclaim(
    inner: &Arc<Inner>,
    cidr: &Cidr,
    intents: &[Intent],
) -> Result<Vec<Outcome>, Error> {
    let mut outcomes = Vec::with_capacity(intents.len());
    for intent in intents {
        let outcome = match &intent.owner {
            None => Outcome::Agrees,
            Some(owner) => match inner.allocator.assign_exact(intent.address, owner).await {
                Ok(_) => Outcome::Agrees,
                Err(Error::InUse { holder, .. }) => Outcome::HeldBy(holder),
                Err(e @ (Error::NotInPool { .. } | Error::ForeignBlock { .. })) => {
                    tracing::error!(address = %intent.address, block = %cidr, error = %e, "an address in use has lost its block");
                    Outcome::HeldBy("nobody: its block is gone".to_owned())
                }
                Err(e) => return Err(e),
            },
        };
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

async fn release_tombstones(inner: &Arc<Inner>) -> Result<(), Error> {
    let handles: Vec<String> = inner
        .read(|state| state.tombstones().map(str::to_owned).collect())
        .await;
    for handle in &handles {
        let released = inner.allocator.release_handle(handle).await?;
        if !released.is_empty() {
            tracing::info!(handle, addresses = ?released, "released addresses that the journal did not know");
        }
    }
    let done = |handle| Record::HandleReleased { handle };
    let records = handles.into_iter().map(done).collect();
    inner.change(|_| (records, ())).await
}

async fn trim(inner: &Arc<Inner>, situation: &Situation) -> Result<(), Error> {
    let usable = |held: &Held| {
        let pool = situation
            .pools
            .iter()
            .find(|p| p.name == held.pool && p.spec.cidr.contains(held.address));
        pool.is_some_and(|p| {
            !p.spec.disabled && pools::selects(&p.spec.node_selector, &situation.node_labels)
        }) && !situation.is_reserved(held.address)
    };
    let high = inner.settings.high * 2;
    inner
        .change(|state| (state.plan_trim(high, usable), ()))
        .await
}

/// Fills up the pools that pods use or asked for.
async fn refill(inner: &Arc<Inner>, situation: &Situation) -> Result<(), Error> {
    let mut used = inner.read(State::pools_in_use).await;
    used.extend(inner.demanded());
    for (v4, pool) in used {
        let usable = situation
            .pools
            .iter()
            .any(|p| p.name == pool && !p.spec.disabled);
        if usable && inner.read(|state| state.ready(v4, &pool)).await < inner.settings.low {
            inner.claim_ahead(v4, &pool).await?;
        }
    }
    Ok(())
}

/// Compares the datastore's blocks with the state: takes up what is ours and unknown (the journal was lost, or a write
/// of an earlier run got through without an answer), and drops ready addresses whose block is no longer ours.
async fn audit(inner: &Arc<Inner>) -> Result<(), Error> {
    let version = inner.read(State::version).await;
    let blocks = inner.allocator.objects.blocks().await?;
    let pools = inner.allocator.objects.pools().await?;
    let node = inner.allocator.node().to_owned();
    inner
        .change(|state| {
            // A pod came or went while the blocks were read: what was read may be older than the state.
            let records = if state.version() == version {
                plan_audit(state, &blocks, &pools, &node)
            } else {
                Vec::new()
            };
            (records, ())
        })
        .await
}

fn plan_audit(state: &State, blocks: &[Block], pools: &[pools::Pool], node: &str) -> Vec<Record> {
    let ours = objects::host(node);
    let mut records = Vec::new();
    let mut stored: BTreeMap<IpAddr, (Owner, Cidr, bool)> = BTreeMap::new();
    for block in blocks {
        let own = block.is_owned_by(&ours);
        stored.extend(
            block
                .held()
                .into_iter()
                .map(|(address, owner)| (address, (owner, block.cidr(), own))),
        );
    }
    for held in state.free() {
        match stored.get(&held.address) {
            Some((owner, _, _)) if owner.attribute("node") != Some(node) => {
                records.push(Record::Lost {
                    address: held.address,
                });
            }
            Some((_, _, false)) => records.push(Record::Drop {
                address: held.address,
            }),
            _ => {}
        }
    }
    let is_ours = |owner: &Owner| owner.attribute("node") == Some(node);
    let reserve = state.reserve_owner();
    for (address, (owner, block, own)) in stored {
        if !is_ours(&owner) || state.knows(address) {
            continue;
        }
        let Some(pool) = pools.iter().find(|p| p.spec.cidr.contains(address)) else {
            continue;
        };
        let held = Held {
            address,
            block,
            pool: pool.name.clone(),
        };
        if owner.handle() == reserve.handle() {
            records.push(Record::Hold(held));
            if !own {
                records.push(Record::Drop { address });
            }
        } else if owner.attribute("pod").is_some() {
            records.push(Record::Assign {
                owner,
                addresses: vec![held],
                stored: true,
            });
        }
    }
    records
}
