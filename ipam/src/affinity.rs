//! Claiming blocks for the node and giving them up, with compare-and-swap.

use std::collections::BTreeSet;
use std::time::Duration;

use cali_api::Cidr;
use cali_api::v3::{Affinity, AffinityType, BlockAffinityState};

use crate::allocator::{ATTEMPTS, Allocator};
use crate::block::Block;
use crate::claim::{Seen, Step, next};
use crate::error::Error;
use crate::names;
use crate::objects::Swap;
use crate::pools::{self, Pool};

/// An empty block of another node may be taken over after this time; before it, its owner may be about to use it.
const TAKE_OVER_AFTER: Duration = Duration::from_secs(60);

impl Allocator {
    /// Makes a block the node's own: claims it, or takes up a claim that was interrupted. False if it is another's.
    pub async fn claim(&self, cidr: &Cidr) -> Result<bool, Error> {
        let node = self.node().to_owned();
        let ours = self.affinity();
        let mut renewed = false;
        for _ in 0..ATTEMPTS {
            let affinity = self.objects.affinity(&node, cidr).await?;
            let block = self.objects.block(cidr).await?;
            let seen = match &block {
                None => Seen::Absent,
                Some(block) if block.value.is_owned_by(&ours) => Seen::Ours,
                Some(_) => Seen::Foreign,
            };
            let swapped = match (
                next(affinity.as_ref().map(|a| a.value.state), renewed, seen),
                affinity,
                block,
            ) {
                (Step::Done, ..) => return Ok(seen == Seen::Ours),
                (Step::Announce, ..) => {
                    let swapped = self.objects.announce(&ours, cidr).await?;
                    renewed = matches!(swapped, Swap::Done(_));
                    swapped
                }
                (Step::Renew, Some(affinity), _) => {
                    let swapped = self
                        .objects
                        .set_state(&affinity, BlockAffinityState::Pending)
                        .await?;
                    renewed = matches!(swapped, Swap::Done(_));
                    swapped
                }
                (Step::CreateBlock, ..) => {
                    let block = Block::new(*cidr, ours.clone(), self.now());
                    self.objects.create_block(block).await?
                }
                (Step::Confirm, Some(affinity), Some(block)) => {
                    let rewritten = self
                        .objects
                        .update_block(&block, block.value.clone())
                        .await?;
                    match rewritten {
                        Swap::Raced => Swap::Raced,
                        Swap::Done(_) => {
                            self.objects
                                .set_state(&affinity, BlockAffinityState::Confirmed)
                                .await?
                        }
                    }
                }
                (Step::Withdraw, Some(affinity), _) => {
                    self.objects
                        .remove(&names::affinity(&node, cidr), &affinity.revision)
                        .await?
                }
                // The remaining pairs cannot be decided for an absent affinity or block.
                (Step::Renew | Step::Confirm | Step::Withdraw, ..) => Swap::Raced,
            };
            if swapped == Swap::Raced {
                renewed = false;
            }
        }
        Err(Error::Contention {
            operation: format!("claim block {cidr}"),
            attempts: ATTEMPTS,
        })
    }

    /// Claims some block of the pools: a free one, or else an empty one that another node has had for a while.
    pub(crate) async fn claim_new<'a>(
        &self,
        pools: &[&'a Pool],
    ) -> Result<Option<(Cidr, &'a Pool)>, Error> {
        let blocks = self.objects.blocks().await?;
        let known: BTreeSet<Cidr> = blocks.iter().map(Block::cidr).collect();
        for pool in pools {
            for cidr in pools::candidates(&pool.spec, self.node()).filter(|c| !known.contains(c)) {
                if self.claim(&cidr).await? {
                    return Ok(Some((cidr, pool)));
                }
            }
        }
        let ours = self.affinity();
        let idle = |block: &&Block| {
            let rested = block
                .claimed_at()
                .and_then(|at| self.now().duration_since(at).ok());
            block.is_unused()
                && !block.is_owned_by(&ours)
                && rested.is_some_and(|r| r >= TAKE_OVER_AFTER)
        };
        for block in blocks.iter().filter(idle) {
            let Some(pool) = pools
                .iter()
                .find(|p| p.spec.cidr.contains_cidr(&block.cidr()))
            else {
                continue;
            };
            let Some(Affinity {
                owner: AffinityType::Host,
                name,
            }) = block.affinity()
            else {
                continue;
            };
            if self.give_up(name, &block.cidr(), true).await? && self.claim(&block.cidr()).await? {
                tracing::info!(block = %block.cidr(), from = name, "took over an empty block");
                return Ok(Some((block.cidr(), pool)));
            }
        }
        Ok(None)
    }

    /// Ends a node's affinity to a block: deletes the block if nobody holds an address in it, otherwise leaves it
    /// without an owner (or, with `only_empty`, leaves everything as it is). True if the affinity has ended.
    pub async fn give_up(&self, node: &str, cidr: &Cidr, only_empty: bool) -> Result<bool, Error> {
        self.give_up_of(&Affinity::host(node), cidr, only_empty)
            .await
    }

    /// Gives up those of its own blocks that these addresses were in and that are empty now.
    pub async fn give_up_empty(&self, addresses: &[std::net::IpAddr]) -> Result<(), Error> {
        let ours = self.affinity();
        for (cidr, _) in self.by_block(addresses).await? {
            self.give_up_of(&ours, &cidr, true).await?;
        }
        Ok(())
    }

    async fn give_up_of(
        &self,
        owner: &Affinity,
        cidr: &Cidr,
        only_empty: bool,
    ) -> Result<bool, Error> {
        let node = &owner.name;
        for _ in 0..ATTEMPTS {
            let Some(affinity) = self.objects.affinity(node, cidr).await? else {
                return Ok(true);
            };
            let block = self
                .objects
                .block(cidr)
                .await?
                .filter(|b| b.value.is_owned_by(owner));
            if let Some(block) = &block {
                if only_empty && !block.value.is_unused() {
                    // An address was taken after we had announced the end: the owner keeps its block.
                    if affinity.value.state == BlockAffinityState::PendingDeletion {
                        self.objects
                            .set_state(&affinity, BlockAffinityState::Confirmed)
                            .await?;
                    }
                    return Ok(false);
                }
                if affinity.value.state != BlockAffinityState::PendingDeletion {
                    self.objects
                        .set_state(&affinity, BlockAffinityState::PendingDeletion)
                        .await?;
                    continue;
                }
                let swapped = if block.value.is_unused() {
                    self.objects
                        .remove(&names::block(cidr), &block.revision)
                        .await?
                } else {
                    let mut orphan = block.value.clone();
                    orphan.clear_affinity();
                    self.objects.update_block(block, orphan).await?
                };
                if swapped == Swap::Raced {
                    continue;
                }
            }
            if let Swap::Done(_) = self
                .objects
                .remove(&names::affinity(node, cidr), &affinity.revision)
                .await?
            {
                return Ok(true);
            }
        }
        Err(Error::Contention {
            operation: format!("give up block {cidr} of {node}"),
            attempts: ATTEMPTS,
        })
    }

    /// Gives up the node's empty blocks in pools that no longer select it, or no longer exist.
    pub async fn give_up_unselected(&self) -> Result<Vec<Cidr>, Error> {
        let situation = self.situation().await?;
        let selected = |cidr: &Cidr| {
            situation.pools.iter().any(|p| {
                p.spec.cidr.contains_cidr(cidr)
                    && pools::selects(&p.spec.node_selector, &situation.node_labels)
            })
        };
        let mut given_up = Vec::new();
        for affinity in self.objects.affinities(&self.affinity()).await? {
            if !selected(&affinity.cidr) && self.give_up(self.node(), &affinity.cidr, true).await? {
                given_up.push(affinity.cidr);
            }
        }
        Ok(given_up)
    }
}
