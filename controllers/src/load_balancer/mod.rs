//! Addresses of LoadBalancer services: taken from pools whose `allowedUses` is LoadBalancer, shown in
//! `status.loadBalancer`, given back when the service goes or asks for others.
//!
//! Blocks belong to Calico's virtual node (`virtual:load-balancer`) and handles are Calico's, so that either controller goes on
//! where the other has left. [`plan`] decides; [`pass`] reads, takes, shows and gives back, each step so that a kill after
//! it is finished by the next pass: an address is held before it is shown, and hidden before it is given back.

pub mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::kubernetes::{LoadBalancerIngress, LoadBalancerStatus, Service};
use cali_api::v3::{AllowedUse, AssignIPs};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::{Datastore, Error as StoreError, Warning, edit};
use cali_ipam::{Allocator, Owner, Request};

use crate::error::Error;
use plan::{HANDLE_PREFIX, Wish, Work};

/// What a pass has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// Addresses that were taken.
    pub taken: usize,
    /// Addresses that were given back.
    pub released: usize,
    /// Services that show something else than before.
    pub written: usize,
    /// What could not be done, by service.
    pub problems: BTreeMap<String, String>,
}

/// One look at all services.
///
/// # Errors
/// The datastore cannot be read, or fails in between. What one service asks for in vain is no error, but told beside it.
pub async fn pass(
    store: &Arc<dyn Datastore>,
    allocator: &Allocator,
    assign: AssignIPs,
) -> Result<Done, Error> {
    // Before the services: who holds an address has existed before.
    let inventory = allocator.inventory().await;
    let inventory = inventory.map_err(Error::ipam("read blocks"))?;
    let list = store.list(Kind::K8sService, None).await;
    let list = list.map_err(Error::datastore("list services"))?;
    let mut done = Done::default();
    let mut held: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    for (address, owner) in inventory
        .blocks
        .iter()
        .flat_map(cali_ipam::block::Block::held)
    {
        if let Some(handle) = owner.handle().filter(|h| h.starts_with(HANDLE_PREFIX)) {
            held.entry(handle.to_owned()).or_default().insert(address);
        }
    }
    let can_give = inventory
        .pools
        .iter()
        .any(|pool| pool.spec.allows(AllowedUse::LoadBalancer));
    let mut wishes = Vec::new();
    let mut others: Vec<&Service> = Vec::new();
    // A service that cannot be read, or whose annotations cannot, keeps what it has.
    let mut wanted = BTreeSet::new();
    for item in &list.items {
        let AnyResource::K8sService(service) = item.object.as_ref() else {
            continue;
        };
        match plan::wish(service, assign) {
            Some(Ok(wish)) => {
                wanted.insert(wish.handle.clone());
                wishes.push(wish);
            }
            Some(Err(problem)) => {
                let uid = service.metadata.uid.as_deref().unwrap_or_default();
                wanted.insert(plan::handle(&service.key(), uid));
                report(store, &service.key(), problem, &mut done).await;
            }
            None => others.push(service),
        }
    }
    let allocator = Load { store, allocator };
    for wish in &wishes {
        let nothing = BTreeSet::new();
        let has = held.get(&wish.handle).unwrap_or(&nothing);
        if has.is_empty() && !can_give && wish.exact.is_empty() {
            continue;
        }
        let work = plan::plan(wish, has, &inventory.pools);
        allocator
            .serve(wish, work, &inventory.pools, &mut done)
            .await?;
    }
    for service in others {
        let uid = service.metadata.uid.as_deref().unwrap_or_default();
        if let Some(has) = held.get(&plan::handle(&service.key(), uid)) {
            // It was ours: what we gave is hidden, what others gave stays.
            let left = plan::shown(service);
            let left = left.into_iter().filter(|address| !has.contains(address));
            done.written += usize::from(
                allocator
                    .show(&service.key(), &left.collect::<Vec<_>>())
                    .await?,
            );
        }
    }
    if list.undecodable.is_empty() {
        for handle in plan::abandoned(&held, &wanted) {
            done.released += allocator.give_back(handle).await?;
        }
    }
    Ok(done)
}

struct Load<'a> {
    store: &'a Arc<dyn Datastore>,
    allocator: &'a Allocator,
}

impl Load<'_> {
    async fn serve(
        &self,
        wish: &Wish,
        work: Work,
        pools: &[cali_ipam::pools::Pool],
        done: &mut Done,
    ) -> Result<(), Error> {
        let mut shows = work.keep;
        for address in work.take {
            match self.take(wish, address, pools).await? {
                Ok(()) => {
                    done.taken += 1;
                    shows.push(address);
                }
                Err(problem) => report(self.store, &wish.key, problem, done).await,
            }
        }
        for (family, wanted) in work.any.into_iter().enumerate() {
            if !wanted {
                continue;
            }
            match self.take_any(wish, family).await? {
                Ok(address) => {
                    done.taken += 1;
                    shows.push(address);
                }
                Err(problem) => report(self.store, &wish.key, problem, done).await,
            }
        }
        if shows != wish.shown {
            done.written += usize::from(self.show(&wish.key, &shows).await?);
        }
        if !work.release.is_empty() {
            done.released += work.release.len();
            let released = self
                .allocator
                .release(&work.release, Some(&wish.handle))
                .await;
            released.map_err(Error::ipam(format!("give back addresses of {}", wish.key)))?;
            self.tidy(&work.release).await?;
        }
        Ok(())
    }

    fn owner(wish: &Wish) -> Owner {
        Owner::new(&wish.handle)
            .with("type", "loadBalancer")
            .with(
                "namespace",
                wish.key.namespace.as_deref().unwrap_or("default"),
            )
            .with("service", &*wish.key.name)
    }

    async fn take(
        &self,
        wish: &Wish,
        address: IpAddr,
        pools: &[cali_ipam::pools::Pool],
    ) -> Result<Result<(), String>, Error> {
        if let Some(reason) = plan::refusal(address, pools) {
            return Ok(Err(reason));
        }
        let taken = self
            .allocator
            .assign_exact(address, &Self::owner(wish))
            .await;
        settled(taken.map(|_| ()), &wish.key)
    }

    async fn take_any(&self, wish: &Wish, family: usize) -> Result<Result<IpAddr, String>, Error> {
        let [pools_v4, pools_v6] = wish.pools.clone();
        let request = Request {
            allowed_use: AllowedUse::LoadBalancer,
            pools_v4,
            pools_v6,
            may_borrow: false,
            ..Request::workload(
                Self::owner(wish),
                usize::from(family == 0),
                usize::from(family == 1),
            )
        };
        let taken = self.allocator.assign(&request).await;
        let first = taken.map(|all| all.into_iter().map(|one| one.address).next());
        Ok(settled(first, &wish.key)?
            .and_then(|address| address.ok_or_else(|| "no address was given".to_owned())))
    }

    /// Puts the addresses into the service's status; false if it is gone, or shows them already.
    async fn show(&self, key: &Key, addresses: &[IpAddr]) -> Result<bool, Error> {
        let shown = edit(self.store.as_ref(), key, |service: &mut Service| {
            if plan::shown(service) == addresses {
                return false;
            }
            let ingress = addresses.iter().map(|address| LoadBalancerIngress {
                ip: Some(address.to_string()),
                ..LoadBalancerIngress::default()
            });
            let status = service.status.get_or_insert_default();
            status.load_balancer = Some(LoadBalancerStatus {
                ingress: Some(ingress.collect()),
            });
            true
        });
        match shown.await {
            // Whoever writes it all the time wakes us again.
            Err(StoreError::NotFound { .. } | StoreError::Conflict { .. }) => Ok(false),
            other => other.map_err(Error::datastore(format!("write {key}"))),
        }
    }

    async fn give_back(&self, handle: &str) -> Result<usize, Error> {
        let released = self.allocator.release_handle(handle).await;
        let released = released.map_err(Error::ipam(format!("release handle {handle}")))?;
        self.tidy(&released).await?;
        Ok(released.len())
    }

    /// Gives up blocks that are empty now, so that a pool can be deleted.
    async fn tidy(&self, released: &[IpAddr]) -> Result<(), Error> {
        let tidied = self.allocator.give_up_empty(released).await;
        tidied.map_err(Error::ipam("give up empty blocks"))
    }
}

/// What the datastore refuses ends the pass; what cannot be had is told to the service.
fn settled<T>(result: Result<T, cali_ipam::Error>, key: &Key) -> Result<Result<T, String>, Error> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error)
            if error.is_transient() || matches!(error, cali_ipam::Error::Datastore { .. }) =>
        {
            Err(Error::ipam(format!("take an address for {key}"))(error))
        }
        Err(error) => Ok(Err(error.to_string())),
    }
}

async fn report(store: &Arc<dyn Datastore>, key: &Key, problem: String, done: &mut Done) {
    let warning = Warning {
        about: key.clone(),
        node: String::new(),
        reason: "NoLoadBalancerAddress",
        note: problem.clone(),
    };
    if let Err(error) = store.warn(&warning).await {
        tracing::debug!(%error, "cannot show a warning beside a service");
    }
    done.problems.insert(key.to_string(), problem);
}
