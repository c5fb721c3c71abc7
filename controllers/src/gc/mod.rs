//! Garbage collection of addresses, blocks, affinities and handles.
//!
//! One pass: read the blocks, then who is in the cluster ([`crate::facts`]); plan ([`plan`], pure, remembers since when
//! something looks like garbage); carry out ([`apply`], compare-and-swap, looks at node and pod again before each write).

pub mod apply;
pub mod plan;
pub mod report;

use std::sync::Arc;
use std::time::Instant;

use cali_datastore::Datastore;
use cali_ipam::Allocator;
use cali_ipam::collect::Inventory;

use crate::error::Error;
use crate::facts::Facts;

pub use apply::{Done, apply};
pub use plan::{Collector, Plan, Rules};
pub use report::Report;

/// Reads everything that a pass needs, in the right order.
pub async fn read(
    store: &Arc<dyn Datastore>,
    allocator: &Allocator,
) -> Result<(Inventory, Facts), Error> {
    let inventory = allocator
        .inventory()
        .await
        .map_err(Error::ipam("read the blocks"))?;
    let facts = Facts::read(store.as_ref()).await?;
    Ok((inventory, facts))
}

/// One pass. With `dry_run`, and while the datastore is locked, nothing is written.
pub async fn pass(
    store: &Arc<dyn Datastore>,
    allocator: &Allocator,
    collector: &mut Collector,
    now: Instant,
    dry_run: bool,
) -> Result<(Report, Done), Error> {
    let (inventory, facts) = read(store, allocator).await?;
    let plan = collector.plan(&inventory, &facts, now);
    let report = Report::new(&inventory, &facts, &plan);
    let locked = allocator
        .is_locked()
        .await
        .map_err(Error::ipam("see whether the datastore is locked"))?;
    let done = if dry_run || locked {
        if locked {
            tracing::info!("the datastore is locked: nothing is collected");
        }
        Done::default()
    } else {
        apply(store, allocator, &plan).await
    };
    Ok((report, done))
}
