//! Keeps the node's tunnel addresses as the pools want them: in IPAM and in the Node resource.
//!
//! [`plan`] decides. Order of writes: an address is allocated before it is published, and taken out of the Node resource before it is
//! returned, so that no other node ever sends to an address that is not ours.

pub mod plan;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::v3::{AllowedUse, IPPool, Node};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::{Datastore, Error as DatastoreError, edit};
use cali_ipam::tunnel::Tunnel;
use cali_ipam::{Allocator, Owner, Request};
use felix::dataplane::State;
use tokio::sync::{mpsc, watch};

use self::plan::{Action, Planner, TUNNELS, publish, published};

/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Why a round did not succeed.
#[derive(Debug, thiserror::Error)]
enum TunnelError {
    #[error("address management")]
    Ipam(#[from] cali_ipam::Error),
    #[error("the Node resource")]
    Node(#[from] DatastoreError),
    #[error("address management gave no address")]
    Nothing,
}

/// The task's parts.
pub struct TunnelAddresses {
    /// For the Node resource.
    pub datastore: Arc<dyn Datastore>,
    /// For the addresses.
    pub allocator: Allocator,
    /// Whether WireGuard's devices stand.
    pub dataplane: watch::Receiver<Arc<State>>,
}

impl TunnelAddresses {
    /// Runs until the stream or the dataplane ends. Reads pools and the own node from it; everything else in it is ignored.
    pub async fn run(mut self, mut events: mpsc::Receiver<SyncEvent>) {
        let mut pools = BTreeMap::new();
        let mut planner = Planner::default();
        let mut in_sync = false;
        let mut again: Option<Instant> = None;
        loop {
            let due = again.filter(|_| in_sync);
            let changed = tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.on_event(event, &mut pools, &mut in_sync),
                    None => return,
                },
                changed = self.dataplane.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let encrypts = self.dataplane.borrow_and_update().tunnels.encrypts;
                    std::mem::replace(&mut planner.encrypts, encrypts) != encrypts
                }
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => true,
            };
            if changed && in_sync {
                let pools: Vec<IPPool> = pools.values().cloned().collect();
                again = self.round(&pools, &mut planner).await;
            }
        }
    }

    /// True when something that counts has changed.
    fn on_event(
        &self,
        event: SyncEvent,
        pools: &mut BTreeMap<Key, IPPool>,
        in_sync: &mut bool,
    ) -> bool {
        match event {
            SyncEvent::Status(status) => {
                *in_sync |= status == SyncStatus::InSync;
                *in_sync
            }
            SyncEvent::Complete(_) => false,
            SyncEvent::Updates(updates) => {
                let mut changed = false;
                for update in updates {
                    match update.key.kind {
                        Kind::IPPool => match update.value.as_deref() {
                            Some(AnyResource::IPPool(pool)) => {
                                drop(pools.insert(update.key, (**pool).clone()))
                            }
                            _ => drop(pools.remove(&update.key)),
                        },
                        Kind::Node if &*update.key.name == self.allocator.node() => {}
                        _ => continue,
                    }
                    changed = true;
                }
                changed
            }
        }
    }

    /// One look at every tunnel; the time of the next one, where there is something to wait for.
    async fn round(&self, pools: &[IPPool], planner: &mut Planner) -> Option<Instant> {
        let mut again: Option<Instant> = None;
        for tunnel in TUNNELS {
            let due = match self.settle(tunnel, pools, planner).await {
                Ok(due) => due,
                Err(error) => {
                    tracing::warn!(?tunnel, %error, cause = crate::cause(&error), "cannot settle the tunnel address; trying again");
                    Some(Instant::now() + RETRY)
                }
            };
            again = [again, due].into_iter().flatten().min();
        }
        again
    }

    async fn settle(
        &self,
        tunnel: Tunnel,
        pools: &[IPPool],
        planner: &mut Planner,
    ) -> Result<Option<Instant>, TunnelError> {
        let handle = tunnel.handle(self.allocator.node());
        let held = self.allocator.addresses_of(&handle).await?;
        let node = self.read_node().await?;
        match planner.plan(tunnel, pools, &node, &held, Instant::now()) {
            Action::Nothing => {}
            Action::Wait(until) => return Ok(Some(until)),
            Action::Publish(address) => self.write(tunnel, Some(address)).await?,
            Action::Assign { pools, instead_of } => {
                let address = self.assign(tunnel, &handle, pools).await?;
                self.write(tunnel, Some(address)).await?;
                self.allocator.release(&instead_of, Some(&handle)).await?;
            }
            Action::Release(addresses) => {
                self.write(tunnel, None).await?;
                self.allocator.release(&addresses, Some(&handle)).await?;
                tracing::info!(
                    ?tunnel,
                    ?addresses,
                    "no pool needs the tunnel any more; its address is returned"
                );
            }
        }
        Ok(None)
    }

    async fn assign(
        &self,
        tunnel: Tunnel,
        handle: &str,
        pools: Vec<String>,
    ) -> Result<IpAddr, TunnelError> {
        let owner = Owner::new(handle)
            .with("node", self.allocator.node())
            .with("type", tunnel.attribute());
        let v4 = tunnel.is_v4();
        let (pools_v4, pools_v6) = if v4 {
            (pools, Vec::new())
        } else {
            (Vec::new(), pools)
        };
        let request = Request {
            allowed_use: AllowedUse::Tunnel,
            pools_v4,
            pools_v6,
            ..Request::workload(owner, usize::from(v4), usize::from(!v4))
        };
        let assigned = self.allocator.assign(&request).await?;
        let address = assigned
            .first()
            .map(|a| a.address)
            .ok_or(TunnelError::Nothing)?;
        tracing::info!(?tunnel, %address, "tunnel address assigned");
        Ok(address)
    }

    async fn read_node(&self) -> Result<Node, DatastoreError> {
        let key = Key::cluster(Kind::Node, self.allocator.node());
        let stored = self.datastore.get(&key).await?;
        match &*stored.object {
            AnyResource::Node(node) => Ok((**node).clone()),
            _ => Err(DatastoreError::NotFound { key }),
        }
    }

    async fn write(&self, tunnel: Tunnel, address: Option<IpAddr>) -> Result<(), DatastoreError> {
        let key = Key::cluster(Kind::Node, self.allocator.node());
        edit(&*self.datastore, &key, |node: &mut Node| {
            let differs = published(tunnel, node) != address;
            publish(tunnel, node, address);
            differs
        })
        .await?;
        Ok(())
    }
}
