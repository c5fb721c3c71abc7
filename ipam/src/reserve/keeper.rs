//! The owner of the reserve: answers requests from it, and keeps it and the datastore in step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use cali_api::v3::{AllowedUse, IPAMConfigurationSpec};
use tokio::sync::{Mutex, Notify, watch};
use tokio::task::JoinHandle;

use super::journal::Journal;
use super::state::{Attachment, Held, Record, State, Want};
use super::upkeep;
use crate::allocator::{Allocator, Assigned, Request, Situation};
use crate::error::Error;
use crate::names;
use crate::owner::Owner;
use crate::pools::{self, Demand};

/// How the reserve is kept.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The journal's file.
    pub journal: PathBuf,
    /// Fewer ready addresses than this in a pool that is used: claim more.
    pub low: usize,
    /// Claim up to this many, and give up what is beyond twice as many.
    pub high: usize,
    /// How often the datastore is compared with what is held, besides after each change.
    pub audit: Duration,
}

impl Settings {
    /// The usual reserve, with its journal in this file.
    pub fn new(journal: PathBuf) -> Self {
        Self {
            journal,
            low: 4,
            high: 8,
            audit: Duration::from_secs(30),
        }
    }

    /// Keeps so many addresses ready in each pool that is used: so many pods can come while the datastore is away, and
    /// so many addresses are taken by nobody. Filled up when half are gone.
    pub fn keep(&mut self, addresses: usize) {
        self.high = addresses.max(1);
        self.low = self.high.div_ceil(2);
    }
}

/// Addresses for one owner: one of each family that is asked for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Who gets them.
    pub owner: Owner,
    /// Whether an IPv4 address is wanted.
    pub v4: bool,
    /// Whether an IPv6 address is wanted.
    pub v6: bool,
    /// IPv4 pools by name or CIDR; empty: as the pools' selectors say.
    pub pools_v4: Vec<String>,
    /// IPv6 pools by name or CIDR.
    pub pools_v6: Vec<String>,
    /// Labels of the pod's namespace.
    pub namespace_labels: Option<BTreeMap<String, String>>,
}

/// The reserve of this node. Clones share it; the upkeep ends with the last clone.
#[derive(Clone)]
pub struct Keeper {
    pub(super) inner: Arc<Inner>,
    _upkeep: Arc<Upkeep>,
}

struct Upkeep(JoinHandle<()>);

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(super) struct Inner {
    pub(super) allocator: Allocator,
    pub(super) settings: Settings,
    ledger: Arc<Mutex<Ledger>>,
    /// Held while the datastore is being written, so that two of our own writes never race.
    pub(super) writing: Mutex<()>,
    known: StdMutex<Known>,
    pub(super) wake: Notify,
    pub(super) settled: watch::Sender<bool>,
}

struct Ledger {
    state: State,
    journal: Journal,
}

/// What was last read of the datastore, so that requests need not.
#[derive(Default)]
struct Known {
    situation: Option<Arc<Situation>>,
    /// Pools in which addresses were asked for since the start.
    demanded: BTreeSet<(bool, String)>,
}

impl Keeper {
    /// Opens the journal and starts the upkeep. Needs no datastore: what the journal holds can be handed out at once.
    ///
    /// Must be called inside a Tokio runtime.
    pub async fn open(allocator: Allocator, settings: Settings) -> Result<Self, Error> {
        let node = allocator.node().to_owned();
        let reserve = Owner::new(&names::reserve_handle(&node))
            .with("node", &node)
            .with("type", "reserve");
        let path = settings.journal.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let mut state = State::new(reserve);
            let journal = Journal::open(&path, &node, &mut state)?;
            Ok::<_, Error>(Ledger { state, journal })
        });
        let ledger = opened.await.map_err(|_| Error::Closed)??;
        let inner = Arc::new(Inner {
            allocator,
            settings,
            ledger: Arc::new(Mutex::new(ledger)),
            writing: Mutex::new(()),
            known: StdMutex::new(Known::default()),
            wake: Notify::new(),
            settled: watch::Sender::new(false),
        });
        let task = tokio::spawn(upkeep::run(Arc::downgrade(&inner)));
        Ok(Self {
            inner,
            _upkeep: Arc::new(Upkeep(task)),
        })
    }

    /// The addresses of a handle, if it has some.
    pub async fn attachment(&self, handle: &str) -> Option<Attachment> {
        let handle = names::sanitized_handle(handle);
        self.inner
            .ledger
            .lock()
            .await
            .state
            .attachment(&handle)
            .cloned()
    }

    /// Every handle with its addresses.
    pub async fn attachments(&self) -> Vec<(String, Attachment)> {
        let ledger = self.inner.ledger.lock().await;
        ledger
            .state
            .attachments()
            .map(|(handle, a)| (handle.to_owned(), a.clone()))
            .collect()
    }

    /// The addresses that are ready.
    pub async fn ready(&self) -> Vec<Held> {
        self.inner
            .ledger
            .lock()
            .await
            .state
            .free()
            .cloned()
            .collect()
    }

    /// Gives addresses to an owner. An owner that has some already gets the same again.
    pub async fn acquire(&self, ask: &Ask) -> Result<Vec<Held>, Error> {
        if let Some(held) = self.inner.take_ready(ask).await? {
            self.inner.wake.notify_one();
            return Ok(held);
        }
        self.inner.acquire_from_datastore(ask).await
    }

    /// Gives certain addresses to an owner: from what is ready, as those that an earlier pod of this node had may be, else
    /// directly in the datastore.
    pub async fn acquire_exact(
        &self,
        owner: &Owner,
        addresses: &[IpAddr],
    ) -> Result<Vec<Held>, Error> {
        let _writing = self.inner.writing.lock().await;
        loop {
            let locked = self.inner.situation().is_some_and(|now| now.locked);
            let ready: BTreeSet<IpAddr> = self
                .inner
                .read(|state| state.free().map(|held| held.address).collect())
                .await;
            let (ready, others): (Vec<IpAddr>, Vec<IpAddr>) = addresses
                .iter()
                .partition(|address| !locked && ready.contains(*address));
            let held = self.inner.assign_exactly(owner, &others).await?;
            if ready.is_empty() {
                self.inner.record_stored(owner, &held).await?;
                return Ok(held);
            }
            let given = self.inner.change(|state| {
                let Some(Record::Assign {
                    owner,
                    addresses,
                    stored,
                }) = state.plan_exact(owner, &ready)
                else {
                    return (Vec::new(), None);
                };
                let all: Vec<Held> = addresses.iter().chain(&held).cloned().collect();
                let taken = Record::Assign {
                    owner: owner.clone(),
                    addresses,
                    stored,
                };
                let assigned = Record::Assign {
                    owner,
                    addresses: held.clone(),
                    stored: true,
                };
                (vec![taken, assigned], Some(all))
            });
            if let Some(mut all) = given.await? {
                self.inner.wake.notify_one();
                let asked = |held: &Held| addresses.iter().position(|a| *a == held.address);
                all.sort_by_key(asked);
                return Ok(all);
            }
            // Somebody has been quicker here: who, the datastore will say.
            self.inner.give_back(owner, &held).await?;
        }
    }

    /// Whether [`Self::acquire`] would succeed now; if not, why. Asks the datastore only where nothing is ready.
    pub async fn available(&self, ask: &Ask) -> Result<(), Error> {
        let wanted = match self.inner.situation() {
            Some(situation) if situation.locked => None,
            Some(situation) => wants(ask, &situation)?,
            None => wants_unseen(ask),
        };
        if let Some(wanted) = &wanted {
            let ready = self.inner.read(|state| {
                let any = |want: &Want| want.pools.iter().any(|p| state.ready(want.v4, p) > 0);
                wanted.iter().all(any)
            });
            if ready.await {
                return Ok(());
            }
        }
        // Taken and given back: what is borrowed counts, too.
        let handle = ask.owner.handle().unwrap_or_default().to_owned();
        self.acquire(ask).await?;
        self.release(&handle).await.map(|_| ())
    }

    /// Takes an owner's addresses back. Always succeeds if the journal can be written, whatever the datastore does.
    pub async fn release(&self, handle: &str) -> Result<Vec<Held>, Error> {
        let handle = names::sanitized_handle(handle);
        let rest = self.inner.configuration().ip_cooldown_seconds.unwrap_or(0) > 0;
        let released = self
            .inner
            .change(|state| {
                let held = state
                    .attachment(&handle)
                    .map(|a| a.addresses.clone())
                    .unwrap_or_default();
                (state.plan_free(&handle, rest), held)
            })
            .await?;
        self.inner.wake.notify_one();
        Ok(released)
    }

    /// Waits until the datastore shows everything that is held.
    pub async fn settled(&self) -> Result<(), Error> {
        let mut settled = self.inner.settled.subscribe();
        self.inner.wake.notify_one();
        settled
            .wait_for(|s| *s)
            .await
            .map(|_| ())
            .map_err(|_| Error::Closed)
    }
}

impl Inner {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn situation(&self) -> Option<Arc<Situation>> {
        self.known().situation.clone()
    }

    fn configuration(&self) -> IPAMConfigurationSpec {
        self.situation()
            .map(|s| s.configuration.clone())
            .unwrap_or_default()
    }

    pub(super) async fn refresh(&self) -> Result<Arc<Situation>, Error> {
        let situation = Arc::new(self.allocator.situation().await?);
        self.known().situation = Some(Arc::clone(&situation));
        Ok(situation)
    }

    pub(super) fn demanded(&self) -> BTreeSet<(bool, String)> {
        self.known().demanded.clone()
    }

    pub(super) async fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.ledger.lock().await.state)
    }

    /// Plans records on the state, writes them to the journal, and only then carries them out.
    pub(super) async fn change<T>(
        &self,
        plan: impl FnOnce(&State) -> (Vec<Record>, T),
    ) -> Result<T, Error> {
        let mut ledger = Arc::clone(&self.ledger).lock_owned().await;
        let (records, result) = plan(&ledger.state);
        if records.is_empty() {
            return Ok(result);
        }
        self.settled.send_replace(false);
        // The guard moves along: journal and state stay in step even if the caller goes away meanwhile.
        let written = tokio::task::spawn_blocking(move || {
            let ledger = &mut *ledger;
            ledger.journal.append(&records, &ledger.state)?;
            for record in &records {
                ledger.state.apply(record);
            }
            Ok(())
        });
        written.await.map_err(|_| Error::Closed)??;
        Ok(result)
    }

    /// Answers from what is ready. `None` if a family cannot be met.
    async fn take_ready(&self, ask: &Ask) -> Result<Option<Vec<Held>>, Error> {
        let situation = self.situation();
        let handle = ask.owner.handle().unwrap_or_default().to_owned();
        let wants = match &situation {
            // Nothing new; what the owner has already it may be told again.
            Some(situation) if situation.locked => None,
            Some(situation) => wants(ask, situation)?,
            None => wants_unseen(ask),
        };
        self.change(|state| {
            if let Some(known) = state.attachment(&handle) {
                return (Vec::new(), Some(known.addresses.clone()));
            }
            match wants
                .as_ref()
                .and_then(|wants| state.plan_assign(&ask.owner, wants))
            {
                Some(Record::Assign {
                    owner,
                    addresses,
                    stored,
                }) => {
                    let held = addresses.clone();
                    (
                        vec![Record::Assign {
                            owner,
                            addresses,
                            stored,
                        }],
                        Some(held),
                    )
                }
                _ => (Vec::new(), None),
            }
        })
        .await
    }

    async fn acquire_from_datastore(&self, ask: &Ask) -> Result<Vec<Held>, Error> {
        let _writing = self.writing.lock().await;
        let situation = self.refresh().await?;
        if let Some(wants) = wants(ask, &situation)? {
            for want in &wants {
                self.stock_up(want).await?;
            }
        }
        if let Some(held) = self.take_ready(ask).await? {
            self.wake.notify_one();
            return Ok(held);
        }
        // Nothing of our own is left: whatever the cluster still has, borrowed if need be.
        let mut request =
            Request::workload(ask.owner.clone(), usize::from(ask.v4), usize::from(ask.v6));
        request.pools_v4.clone_from(&ask.pools_v4);
        request.pools_v6.clone_from(&ask.pools_v6);
        request.namespace_labels.clone_from(&ask.namespace_labels);
        let held: Vec<Held> = self
            .allocator
            .assign(&request)
            .await?
            .into_iter()
            .map(Held::from)
            .collect();
        self.record_stored(&ask.owner, &held).await?;
        Ok(held)
    }

    /// Assigns all of these addresses in the datastore, or none. The caller holds `writing`.
    async fn assign_exactly(
        &self,
        owner: &Owner,
        addresses: &[IpAddr],
    ) -> Result<Vec<Held>, Error> {
        let mut held = Vec::new();
        for address in addresses {
            match self.allocator.assign_exact(*address, owner).await {
                Ok(assigned) => held.push(Held::from(assigned)),
                Err(error) => {
                    self.give_back(owner, &held).await?;
                    return Err(error);
                }
            }
        }
        Ok(held)
    }

    async fn give_back(&self, owner: &Owner, held: &[Held]) -> Result<(), Error> {
        if let Some(handle) = owner.handle() {
            let given: Vec<IpAddr> = held.iter().map(|held| held.address).collect();
            self.allocator.release(&given, Some(handle)).await?;
        }
        Ok(())
    }

    async fn record_stored(&self, owner: &Owner, held: &[Held]) -> Result<(), Error> {
        let record = Record::Assign {
            owner: owner.clone(),
            addresses: held.to_vec(),
            stored: true,
        };
        self.change(|_| (vec![record], ())).await?;
        self.wake.notify_one();
        Ok(())
    }

    /// Claims addresses of the first pool of a want that has some, if none is ready.
    async fn stock_up(&self, want: &Want) -> Result<(), Error> {
        for pool in &want.pools {
            self.known().demanded.insert((want.v4, pool.clone()));
            if self.read(|state| state.ready(want.v4, pool)).await > 0
                || self.claim_ahead(want.v4, pool).await? > 0
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Fills the reserve of a pool up. Returns how many addresses were added. The caller holds `writing`.
    pub(super) async fn claim_ahead(&self, v4: bool, pool: &str) -> Result<usize, Error> {
        let (reserve, ready) = self
            .read(|state| (state.reserve_owner().clone(), state.ready(v4, pool)))
            .await;
        let missing = self.settings.high.saturating_sub(ready);
        let mut request = Request::workload(reserve, 0, 0);
        request.may_borrow = false;
        request.partial = true;
        let named = vec![pool.to_owned()];
        if v4 {
            (request.v4, request.pools_v4) = (missing, named);
        } else {
            (request.v6, request.pools_v6) = (missing, named);
        }
        let assigned = match self.allocator.assign(&request).await {
            Ok(assigned) => assigned,
            Err(Error::Exhausted { .. } | Error::NoPool { .. } | Error::UnknownPool { .. }) => {
                return Ok(0);
            }
            Err(e) => return Err(e),
        };
        let count = assigned.len();
        let records = assigned
            .into_iter()
            .map(|a| Record::Hold(a.into()))
            .collect();
        self.change(|_| (records, ())).await?;
        Ok(count)
    }
}

impl From<Assigned> for Held {
    fn from(assigned: Assigned) -> Self {
        Self {
            address: assigned.address,
            block: assigned.block,
            pool: assigned.pool,
        }
    }
}

/// The pools for each wanted family, as the rules of the pools say.
fn wants(ask: &Ask, situation: &Situation) -> Result<Option<Vec<Want>>, Error> {
    let mut wants = Vec::new();
    for (v4, requested) in [(true, &ask.pools_v4), (false, &ask.pools_v6)] {
        if !(if v4 { ask.v4 } else { ask.v6 }) {
            continue;
        }
        let demand = Demand {
            v4,
            allowed_use: AllowedUse::Workload,
            requested,
            node_labels: &situation.node_labels,
            namespace_labels: ask.namespace_labels.as_ref(),
        };
        match pools::eligible(&situation.pools, &demand) {
            Ok(pools) => wants.push(Want {
                v4,
                pools: pools.iter().map(|p| p.name.clone()).collect(),
            }),
            // The pool may be newer than what was read: the datastore is asked before this is an answer.
            Err(Error::NoPool { .. } | Error::UnknownPool { .. }) => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    Ok(Some(wants))
}

/// Before the datastore was ever reached only pools asked for by name can be served.
fn wants_unseen(ask: &Ask) -> Option<Vec<Want>> {
    let mut wants = Vec::new();
    for (v4, wanted, pools) in [
        (true, ask.v4, &ask.pools_v4),
        (false, ask.v6, &ask.pools_v6),
    ] {
        if wanted {
            if pools.is_empty() {
                return None;
            }
            wants.push(Want {
                v4,
                pools: pools.clone(),
            });
        }
    }
    Some(wants)
}
