//! Handles: in which blocks a handle holds how many addresses. An index; the blocks are the truth.

use cali_api::Cidr;
use cali_api::v3::IPAMHandleSpec;

use crate::allocator::{ATTEMPTS, Allocator};
use crate::error::Error;
use crate::names;
use crate::objects::Swap;

impl Allocator {
    /// Raises or lowers a handle's count for a block. A handle without blocks is deleted.
    pub(crate) async fn count_handle(
        &self,
        handle: &str,
        cidr: &Cidr,
        change: i64,
    ) -> Result<(), Error> {
        let block = cidr.to_string();
        self.edit_handle(handle, |spec| {
            let count =
                i64::from(spec.block.get(&block).copied().unwrap_or(0)).saturating_add(change);
            match u32::try_from(count) {
                Ok(count) if count > 0 => spec.block.insert(block.clone(), count),
                _ => spec.block.remove(&block),
            };
        })
        .await
    }

    pub(crate) async fn forget_block_of_handle(
        &self,
        handle: &str,
        cidr: &Cidr,
    ) -> Result<(), Error> {
        let block = cidr.to_string();
        self.edit_handle(handle, |spec| {
            spec.block.remove(&block);
        })
        .await
    }

    pub(crate) async fn blocks_of_handle(&self, handle: &str) -> Result<Vec<Cidr>, Error> {
        let blocks = self
            .objects
            .handle(handle)
            .await?
            .map(|h| h.value.block)
            .unwrap_or_default();
        Ok(blocks.keys().filter_map(|text| text.parse().ok()).collect())
    }

    async fn edit_handle(
        &self,
        handle: &str,
        edit: impl Fn(&mut IPAMHandleSpec),
    ) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let old = self.objects.handle(handle).await?;
            let mut spec = match &old {
                Some(old) => old.value.clone(),
                None => IPAMHandleSpec {
                    handle_id: names::sanitized_handle(handle),
                    ..IPAMHandleSpec::default()
                },
            };
            edit(&mut spec);
            let unchanged = match &old {
                Some(old) => old.value == spec && !spec.block.is_empty(),
                None => spec.block.is_empty(),
            };
            if unchanged {
                return Ok(());
            }
            if let Swap::Done(_) = self.objects.write_handle(old.as_ref(), spec).await? {
                return Ok(());
            }
        }
        Err(Error::Contention {
            operation: format!("write handle {handle}"),
            attempts: ATTEMPTS,
        })
    }
}
