//! What garbage collection may do to blocks and handles.
//!
//! Each operation is a compare-and-swap on what the collector has looked at: a decision that was made on an older
//! version of a block is never carried out on a newer one.

use std::net::IpAddr;

use cali_api::v3::{AffinityType, BlockAffinitySpec, IPAMHandleSpec};
use cali_api::{AnyResource, Cidr, Kind};

use crate::allocator::Allocator;
use crate::block::{Block, Release};
use crate::error::Error;
use crate::names;
use crate::objects::{Stored, Swap};
use crate::owner::Owner;
use crate::pools::Pool;

/// A block as it was at one revision.
#[derive(Debug, Clone)]
pub struct SeenBlock(Stored<Block>);

impl SeenBlock {
    /// The block.
    pub fn block(&self) -> &Block {
        &self.0.value
    }
}

/// Everything that address management has stored.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// The blocks, in the order of their names.
    pub blocks: Vec<Block>,
    /// Names of block objects that exist and cannot be read.
    pub unreadable_blocks: Vec<String>,
    /// Affinities of nodes.
    pub affinities: Vec<BlockAffinitySpec>,
    /// The handles.
    pub handles: Vec<IPAMHandleSpec>,
    /// The pools.
    pub pools: Vec<Pool>,
}

impl Allocator {
    /// Reads everything. Handles come before blocks: an assignment raises its handle's count first, so that a handle
    /// read here whose block shows nothing yet is either stale or in the middle of an assignment, never overlooked.
    pub async fn inventory(&self) -> Result<Inventory, Error> {
        let handles = self.objects.all(Kind::IPAMHandle).await?;
        let affinities = self.objects.all(Kind::BlockAffinity).await?;
        let (blocks, unreadable_blocks) = self.objects.blocks_and_unreadable().await?;
        Ok(Inventory {
            blocks,
            unreadable_blocks,
            affinities: affinities
                .iter()
                .filter_map(|found| match found.object.as_ref() {
                    AnyResource::BlockAffinity(a)
                        if !a.spec.deleted && a.spec.type_ != Some(AffinityType::Virtual) =>
                    {
                        Some(a.spec.clone())
                    }
                    _ => None,
                })
                .collect(),
            handles: handles
                .iter()
                .filter_map(|found| match found.object.as_ref() {
                    AnyResource::IPAMHandle(h) if !h.spec.deleted => Some(h.spec.clone()),
                    _ => None,
                })
                .collect(),
            pools: self.objects.pools().await?,
        })
    }

    /// Looks at one block.
    pub async fn see_block(&self, cidr: &Cidr) -> Result<Option<SeenBlock>, Error> {
        Ok(self.objects.block(cidr).await?.map(SeenBlock))
    }

    /// Takes addresses back from exactly these owners. False, and nothing is changed, if the block was written since it
    /// was looked at, or if one of the addresses has another owner.
    pub async fn release_seen(
        &self,
        seen: &SeenBlock,
        addresses: &[(IpAddr, Owner)],
    ) -> Result<bool, Error> {
        let clock = self.clock(&self.objects.configuration().await?);
        let mut block = seen.0.value.clone();
        if block.defect().is_some() {
            return Ok(false);
        }
        for (address, owner) in addresses {
            if block.holder(*address).as_ref() != Some(owner)
                || block.release(*address, None, clock) != Release::Done
            {
                return Ok(false);
            }
        }
        self.swap_block(&seen.0, block).await
    }

    /// Ends the rest of released addresses whose time is over, which otherwise waits for the next assignment.
    pub async fn end_rests(&self, seen: &SeenBlock) -> Result<bool, Error> {
        let clock = self.clock(&self.objects.configuration().await?);
        let mut block = seen.0.value.clone();
        if block.defect().is_some() {
            return Ok(false);
        }
        block.end_rests(clock);
        if block == seen.0.value {
            return Ok(false);
        }
        self.swap_block(&seen.0, block).await
    }

    /// Takes a block from its owner: deletes it if no address is held or rests, otherwise leaves it without an owner.
    pub async fn disown_seen(&self, seen: &SeenBlock) -> Result<bool, Error> {
        let mut block = seen.0.value.clone();
        block.clear_affinity();
        if block.defect().is_some() || (block == seen.0.value && !block.is_unused()) {
            return Ok(false);
        }
        self.swap_block(&seen.0, block).await
    }

    /// Removes a handle's mention of a block in which it holds nothing. False if it holds something, or may be about to.
    ///
    /// An assignment reads the block, raises the count and writes the block. So the handle is read first, then the block
    /// is rewritten, which makes every assignment fail that read it before; and one that reads it later raises the count,
    /// which makes the removal fail.
    pub async fn forget_stale(&self, handle: &str, cidr: &Cidr) -> Result<bool, Error> {
        let Some(stored) = self.objects.handle(handle).await? else {
            return Ok(false);
        };
        if let Some(block) = self.objects.block(cidr).await? {
            let held = !block.value.held_by(handle).is_empty();
            if held || block.value.defect().is_some() {
                return Ok(false);
            }
            let rewritten = self
                .objects
                .update_block(&block, block.value.clone())
                .await?;
            if rewritten == Swap::Raced {
                return Ok(false);
            }
        }
        let mut spec = stored.value.clone();
        spec.block.remove(&cidr.to_string());
        let written = self.objects.write_handle(Some(&stored), spec).await?;
        Ok(written != Swap::Raced)
    }

    /// Removes a handle that mentions no block. False if it does by now.
    pub async fn forget_empty(&self, handle: &str) -> Result<bool, Error> {
        match self.objects.handle(handle).await? {
            Some(stored) if stored.value.block.is_empty() => {
                let removed = self
                    .objects
                    .remove(&names::handle(handle), &stored.revision)
                    .await?;
                Ok(removed != Swap::Raced)
            }
            _ => Ok(false),
        }
    }
}
