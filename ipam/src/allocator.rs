//! Gives out, keeps and takes back addresses in the datastore. Decisions are those of [`crate::block`],
//! [`crate::pools`] and [`crate::claim`]; here they are carried out with compare-and-swap.
//!
//! Order of writes: a handle's count rises before the block is written and falls after it, so that a crash can leave a
//! handle that names a block too many, never an address that its handle does not find.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cali_api::v3::{Affinity, AffinityType, AllowedUse, IPAMConfigurationSpec};
use cali_api::{Cidr, Net};
use cali_datastore::Datastore;

use crate::block::{Block, Clock, Release};
use crate::error::{Error, family};
use crate::names;
use crate::objects::{Objects, Stored, Swap};
use crate::owner::Owner;
use crate::pools::{self, Demand, Pool};

/// Conflicting writes after which an operation gives up. Each conflict means that somebody else got on.
pub(crate) const ATTEMPTS: usize = 100;

/// Where the time comes from.
pub type TimeSource = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Addresses wanted for one owner.
#[derive(Debug, Clone)]
pub struct Request {
    /// Who gets them.
    pub owner: Owner,
    /// Number of IPv4 addresses.
    pub v4: usize,
    /// Number of IPv6 addresses.
    pub v6: usize,
    /// What they are for.
    pub allowed_use: AllowedUse,
    /// IPv4 pools by name or CIDR; empty: as the pools' selectors say.
    pub pools_v4: Vec<String>,
    /// IPv6 pools by name or CIDR.
    pub pools_v6: Vec<String>,
    /// Labels of the pod's namespace.
    pub namespace_labels: Option<BTreeMap<String, String>>,
    /// Whether addresses of other nodes' blocks will do, where the configuration allows it.
    pub may_borrow: bool,
    /// Whether fewer addresses than asked for are still welcome.
    pub partial: bool,
}

impl Request {
    /// A request for a workload's addresses.
    pub fn workload(owner: Owner, v4: usize, v6: usize) -> Self {
        Self {
            owner,
            v4,
            v6,
            allowed_use: AllowedUse::Workload,
            pools_v4: Vec::new(),
            pools_v6: Vec::new(),
            namespace_labels: None,
            may_borrow: true,
            partial: false,
        }
    }
}

/// An address that was given out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Assigned {
    /// The address.
    pub address: IpAddr,
    /// Its block.
    pub block: Cidr,
    /// Name of its pool.
    pub pool: String,
}

/// What a request depends on, read once.
pub(crate) struct Situation {
    pub(crate) configuration: IPAMConfigurationSpec,
    pub(crate) pools: Vec<Pool>,
    pub(crate) reservations: Vec<Net>,
    pub(crate) node_labels: BTreeMap<String, String>,
    pub(crate) locked: bool,
}

impl Situation {
    pub(crate) fn ensure_unlocked(&self) -> Result<(), Error> {
        if self.locked {
            return Err(Error::Locked);
        }
        Ok(())
    }

    pub(crate) fn is_reserved(&self, address: IpAddr) -> bool {
        self.reservations
            .iter()
            .any(|net| net.cidr().contains(address))
    }
}

/// Address management for one node.
#[derive(Clone)]
pub struct Allocator {
    pub(crate) objects: Objects,
    node: Arc<str>,
    kind: AffinityType,
    time: TimeSource,
}

impl Allocator {
    /// Address management that acts for `node`.
    pub fn new(store: Arc<dyn Datastore>, node: &str, time: TimeSource) -> Self {
        Self {
            objects: Objects::new(store),
            node: node.into(),
            kind: AffinityType::Host,
            time,
        }
    }

    /// Address management for services: its blocks belong to no node (`virtual:load-balancer`, as Calico's).
    pub fn for_load_balancers(store: Arc<dyn Datastore>) -> Self {
        Self {
            kind: AffinityType::Virtual,
            ..Self::with_system_time(store, names::LOAD_BALANCER)
        }
    }

    /// As [`Allocator::new`], with the system's time.
    pub fn with_system_time(store: Arc<dyn Datastore>, node: &str) -> Self {
        Self::new(store, node, Arc::new(SystemTime::now))
    }

    /// The node that it acts for.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The owner of its blocks, as written into them.
    pub(crate) fn affinity(&self) -> Affinity {
        Affinity {
            owner: self.kind,
            name: self.node.to_string(),
        }
    }

    pub(crate) fn now(&self) -> SystemTime {
        (self.time)()
    }

    pub(crate) fn clock(&self, configuration: &IPAMConfigurationSpec) -> Clock {
        Clock {
            now: self.now(),
            cooldown: Duration::from_secs(configuration.ip_cooldown_seconds.unwrap_or(0).into()),
        }
    }

    /// Whether the datastore is locked (`datastoreReady: false`).
    pub async fn is_locked(&self) -> Result<bool, Error> {
        self.objects.is_locked().await
    }

    pub(crate) async fn situation(&self) -> Result<Situation, Error> {
        Ok(Situation {
            configuration: self.objects.configuration().await?,
            pools: self.objects.pools().await?,
            reservations: self.objects.reservations().await?,
            node_labels: self.objects.node_labels(&self.node).await?,
            locked: self.objects.is_locked().await?,
        })
    }

    /// Gives out addresses: from the node's blocks, then from newly claimed ones, then borrowed ones. All or nothing,
    /// unless the request is partial. A locked datastore gives out nothing; taking back goes on ([`Allocator::release`]).
    pub async fn assign(&self, request: &Request) -> Result<Vec<Assigned>, Error> {
        let situation = self.situation().await?;
        situation.ensure_unlocked()?;
        let mut assigned: Vec<Assigned> = Vec::new();
        for (v4, count) in [(true, request.v4), (false, request.v6)] {
            if count == 0 {
                continue;
            }
            if let Err(error) = self
                .assign_family(&situation, request, v4, count, &mut assigned)
                .await
            {
                let addresses: Vec<IpAddr> = assigned.iter().map(|a| a.address).collect();
                if let Some(handle) = request.owner.handle()
                    && let Err(e) = self.release(&addresses, Some(handle)).await
                {
                    tracing::warn!(error = %e, handle, "addresses of a failed request stay assigned until their handle is released");
                }
                return Err(error);
            }
        }
        Ok(assigned)
    }

    async fn assign_family(
        &self,
        situation: &Situation,
        request: &Request,
        v4: bool,
        count: usize,
        assigned: &mut Vec<Assigned>,
    ) -> Result<(), Error> {
        let demand = Demand {
            v4,
            allowed_use: request.allowed_use,
            requested: if v4 {
                &request.pools_v4
            } else {
                &request.pools_v6
            },
            node_labels: &situation.node_labels,
            namespace_labels: request.namespace_labels.as_ref(),
        };
        let pools = pools::eligible(&situation.pools, &demand)?;
        let goal = assigned.len() + count;
        let own = self.own_blocks(v4).await?;
        for (block, pool) in in_pools(&own, &pools) {
            if assigned.len() < goal && self.claim(&block).await? {
                let found = self
                    .take(
                        situation,
                        &block,
                        goal - assigned.len(),
                        &request.owner,
                        true,
                    )
                    .await?;
                assigned.extend(found.into_iter().map(|address| given(address, block, pool)));
            }
        }
        let mut reason = String::new();
        let limit = match self.kind {
            AffinityType::Host => situation.configuration.max_blocks() as usize,
            AffinityType::Virtual => usize::MAX,
        };
        let mut owned = own.len();
        while assigned.len() < goal {
            if !situation.configuration.auto_allocates() {
                reason = ", and autoAllocateBlocks is false".to_owned();
                break;
            }
            if owned >= limit {
                reason = format!(", and the node has its limit of {limit} blocks");
                break;
            }
            let Some((block, pool)) = self.claim_new(&pools).await? else {
                break;
            };
            owned += 1;
            let found = self
                .take(
                    situation,
                    &block,
                    goal - assigned.len(),
                    &request.owner,
                    true,
                )
                .await?;
            assigned.extend(found.into_iter().map(|address| given(address, block, pool)));
        }
        if assigned.len() < goal && request.may_borrow && !situation.configuration.strict_affinity {
            self.borrow_addresses(situation, request, &pools, goal, assigned)
                .await?;
        }
        if assigned.len() < goal && !(request.partial && assigned.len() + count > goal) {
            return Err(Error::Exhausted {
                family: family(v4),
                pools: pools
                    .iter()
                    .map(|p| p.name.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
                reason,
            });
        }
        Ok(())
    }

    async fn borrow_addresses(
        &self,
        situation: &Situation,
        request: &Request,
        pools: &[&Pool],
        goal: usize,
        assigned: &mut Vec<Assigned>,
    ) -> Result<(), Error> {
        let ours = self.affinity();
        let clock = self.clock(&situation.configuration);
        let others: Vec<Cidr> = self
            .objects
            .blocks()
            .await?
            .iter()
            .filter(|b| !b.is_owned_by(&ours) && b.has_free(clock))
            .map(Block::cidr)
            .collect();
        for (block, pool) in in_pools(&others, pools) {
            if assigned.len() >= goal {
                break;
            }
            let found = self
                .take(
                    situation,
                    &block,
                    goal - assigned.len(),
                    &request.owner,
                    false,
                )
                .await?;
            assigned.extend(found.into_iter().map(|address| given(address, block, pool)));
        }
        Ok(())
    }

    async fn own_blocks(&self, v4: bool) -> Result<Vec<Cidr>, Error> {
        let affinities = self.objects.affinities(&self.affinity()).await?;
        Ok(affinities
            .iter()
            .map(|a| a.cidr)
            .filter(|c| c.is_v4() == v4)
            .collect())
    }

    /// Takes up to `count` addresses of one block.
    async fn take(
        &self,
        situation: &Situation,
        cidr: &Cidr,
        count: usize,
        owner: &Owner,
        only_own: bool,
    ) -> Result<Vec<IpAddr>, Error> {
        let clock = self.clock(&situation.configuration);
        let ours = self.affinity();
        let edit = |block: &mut Block| {
            if only_own && !block.is_owned_by(&ours) {
                return Vec::new();
            }
            block.assign(count, owner, clock, |address| {
                situation.is_reserved(address)
            })
        };
        Ok(self.edit_block(cidr, edit).await?.unwrap_or_default())
    }

    /// Gives one certain address to an owner; its block is claimed if it belongs to nobody.
    pub async fn assign_exact(&self, address: IpAddr, owner: &Owner) -> Result<Assigned, Error> {
        let situation = self.situation().await?;
        situation.ensure_unlocked()?;
        let not_in_pool = Error::NotInPool { address };
        let Some((pool, cidr)) = situation
            .pools
            .iter()
            .filter(|p| !p.spec.disabled)
            .find_map(|p| Some((p, pools::block_of(&p.spec, address)?)))
        else {
            return Err(not_in_pool);
        };
        if self.objects.block(&cidr).await?.is_none() && situation.configuration.auto_allocates() {
            self.claim(&cidr).await?;
        }
        let clock = self.clock(&situation.configuration);
        let ours = self.affinity();
        let strict = situation.configuration.strict_affinity;
        let edit = |block: &mut Block| {
            if strict && !block.is_owned_by(&ours) {
                return Err(Error::ForeignBlock {
                    address,
                    block: cidr,
                    owner: block
                        .affinity()
                        .map_or_else(|| "nobody".to_owned(), ToString::to_string),
                });
            }
            block
                .assign_exact(address, owner, clock)
                .map_err(|holder| Error::InUse {
                    address,
                    holder: holder.map_or_else(String::new, |h| h.to_string()),
                })
        };
        match self.edit_block(&cidr, edit).await? {
            Some(result) => result.map(|()| given(address, cidr, pool)),
            None => Err(not_in_pool),
        }
    }

    /// Takes addresses back, if given only from this handle. Returns those that a different holder has.
    pub async fn release(
        &self,
        addresses: &[IpAddr],
        handle: Option<&str>,
    ) -> Result<Vec<IpAddr>, Error> {
        let clock = self.clock(&self.objects.configuration().await?);
        let mut refused = Vec::new();
        for (cidr, addresses) in self.by_block(addresses).await? {
            let edit = |block: &mut Block| -> Vec<IpAddr> {
                let held = |address: &&IpAddr| {
                    matches!(block.release(**address, handle, clock), Release::HeldBy(_))
                };
                addresses.iter().filter(held).copied().collect()
            };
            refused.extend(self.edit_block(&cidr, edit).await?.unwrap_or_default());
        }
        Ok(refused)
    }

    /// Takes back all addresses of a handle and forgets the handle. An unknown handle is no error.
    pub async fn release_handle(&self, handle: &str) -> Result<Vec<IpAddr>, Error> {
        let blocks = self.blocks_of_handle(handle).await?;
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        let clock = self.clock(&self.objects.configuration().await?);
        let mut released = Vec::new();
        for cidr in blocks {
            let freed = self
                .edit_block(&cidr, |block| block.release_handle(handle, clock))
                .await?;
            released.extend(freed.unwrap_or_default());
            self.forget_block_of_handle(handle, &cidr).await?;
        }
        Ok(released)
    }

    /// Every address of a handle.
    pub async fn addresses_of(&self, handle: &str) -> Result<Vec<IpAddr>, Error> {
        let mut addresses = Vec::new();
        for cidr in self.blocks_of_handle(handle).await? {
            if let Some(block) = self.objects.block(&cidr).await? {
                addresses.extend(block.value.held_by(handle));
            }
        }
        Ok(addresses)
    }

    pub(crate) async fn by_block(
        &self,
        addresses: &[IpAddr],
    ) -> Result<BTreeMap<Cidr, BTreeSet<IpAddr>>, Error> {
        let mut blocks: BTreeMap<Cidr, BTreeSet<IpAddr>> = BTreeMap::new();
        if addresses.is_empty() {
            return Ok(blocks);
        }
        // The stored blocks are asked, not the pools: a pool may be gone while its addresses are still held.
        let known: Vec<Cidr> = self
            .objects
            .blocks()
            .await?
            .iter()
            .map(Block::cidr)
            .collect();
        for address in addresses {
            if let Some(cidr) = known.iter().find(|c| c.contains(*address)) {
                blocks.entry(*cidr).or_default().insert(*address);
            }
        }
        Ok(blocks)
    }

    /// Changes a block with compare-and-swap and keeps the handles' counts. `edit` may run several times; what it
    /// returned in the successful run is the result. `None` if there is no such block.
    pub(crate) async fn edit_block<T>(
        &self,
        cidr: &Cidr,
        mut edit: impl FnMut(&mut Block) -> T,
    ) -> Result<Option<T>, Error> {
        for _ in 0..ATTEMPTS {
            let Some(stored) = self.objects.block(cidr).await? else {
                return Ok(None);
            };
            if let Some(defect) = stored.value.defect() {
                tracing::error!(block = %cidr, defect, "block is damaged and will not be used");
                return Ok(None);
            }
            let mut block = stored.value.clone();
            let result = edit(&mut block);
            if block == stored.value {
                return Ok(Some(result));
            }
            if self.swap_block(&stored, block).await? {
                return Ok(Some(result));
            }
        }
        Err(Error::Contention {
            operation: format!("write block {cidr}"),
            attempts: ATTEMPTS,
        })
    }

    /// Writes a changed block if it is still as it was read, and keeps the handles' counts. False: somebody else wrote.
    pub(crate) async fn swap_block(
        &self,
        stored: &Stored<Block>,
        block: Block,
    ) -> Result<bool, Error> {
        let cidr = block.cidr();
        let (gained, lost) = difference(&stored.value, &block);
        for (handle, count) in &gained {
            self.count_handle(handle, &cidr, i64::from(*count)).await?;
        }
        let abandoned = block.affinity().is_none() && block.is_unused();
        let written = if abandoned {
            self.objects
                .remove(&names::block(&cidr), &stored.revision)
                .await?
        } else {
            self.objects.update_block(stored, block).await?
        };
        let (undo, done) = match written {
            Swap::Raced => (gained, false),
            Swap::Done(_) => (lost, true),
        };
        for (handle, count) in &undo {
            // A count that stays too high costs a look into one block at release, nothing else.
            if let Err(e) = self.count_handle(handle, &cidr, -i64::from(*count)).await {
                tracing::warn!(error = %e, handle, "count of a handle stays too high");
            }
        }
        Ok(done)
    }
}

fn given(address: IpAddr, block: Cidr, pool: &Pool) -> Assigned {
    Assigned {
        address,
        block,
        pool: pool.name.clone(),
    }
}

/// The blocks that lie in the pools, pool by pool in their order.
fn in_pools<'a>(blocks: &[Cidr], pools: &[&'a Pool]) -> Vec<(Cidr, &'a Pool)> {
    let of = |pool: &'a Pool| {
        blocks
            .iter()
            .filter(|b| pool.spec.cidr.contains_cidr(b))
            .map(move |b| (*b, pool))
    };
    pools.iter().flat_map(|pool| of(pool)).collect()
}

type Counts = BTreeMap<String, u32>;

/// Per handle, how many addresses it holds more and how many less after a change.
fn difference(before: &Block, after: &Block) -> (Counts, Counts) {
    let (old, new) = (counts(before), counts(after));
    let more = |a: &Counts, b: &Counts| -> Counts {
        a.iter()
            .filter_map(|(handle, n)| {
                let rise = n.saturating_sub(b.get(handle).copied().unwrap_or(0));
                (rise > 0).then(|| (handle.clone(), rise))
            })
            .collect()
    };
    (more(&new, &old), more(&old, &new))
}

fn counts(block: &Block) -> Counts {
    let mut counts = Counts::new();
    for (_, owner) in block.held() {
        if let Some(handle) = owner.handle() {
            *counts.entry(handle.to_owned()).or_default() += 1;
        }
    }
    counts
}
