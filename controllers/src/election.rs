//! One of several replicas works: a lease in the datastore, taken and renewed by compare-and-swap.
//!
//! [`Election`] decides, without I/O and clock. A lease has run out when its record has not changed for its duration on
//! the observer's own clock, so that clocks need not agree. [`Lock`] is where the record is kept; [`StoredLock`] keeps
//! it as an annotation of an object of its own. Two leaders for a moment would do no harm: everything that the
//! controllers write is compare-and-swap on what they have just looked at.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cali_api::v3::KubeControllersConfigurationSpec;
use cali_api::{AnyResource, Key, Kind, Resource, Revision};
use cali_datastore::{Datastore, Error as StoreError};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// What the lock holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// Who leads; empty after a leader that ended in order.
    pub holder: String,
    /// How long the lease holds after each renewal.
    pub seconds: u64,
    /// How often the leader has changed.
    pub transitions: u64,
    /// Rises with each renewal.
    pub renewals: u64,
}

/// A lease as it was read; the revision is the lock's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The record.
    pub lease: Lease,
    /// For the next write.
    pub revision: Revision,
}

/// Where the lease is kept. Kubernetes' own Lease objects fit the same two operations.
#[async_trait]
pub trait Lock: Send + Sync {
    /// The lease; `None` if nobody has ever led.
    async fn read(&self) -> Result<Option<Seen>, Error>;

    /// Writes the lease if it is still the one that was seen (`None`: if there is none). `None`: it is not.
    async fn write(&self, lease: &Lease, over: Option<&Revision>) -> Result<Option<Seen>, Error>;
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write this lease over what was seen.
    Write(Lease, Option<Revision>),
    /// Look again after this time.
    Wait(Duration),
}

/// One replica's view of the election.
#[derive(Debug, Clone)]
pub struct Election {
    me: String,
    duration: Duration,
    seen: Option<(Seen, Instant)>,
    /// When our own lease was last renewed: the time before the write, not after it.
    led_since: Option<Instant>,
}

impl Election {
    /// A replica with a name of its own.
    pub fn new(me: impl Into<String>, duration: Duration) -> Self {
        Self {
            me: me.into(),
            duration,
            seen: None,
            led_since: None,
        }
    }

    /// Whether this replica leads at this time. A leader that could not renew stops before others may start.
    pub fn leads(&self, now: Instant) -> bool {
        self.led_since
            .is_some_and(|since| now.saturating_duration_since(since) < self.duration * 2 / 3)
    }

    /// Takes what was read into account and decides.
    pub fn on_read(&mut self, read: Option<Seen>, now: Instant) -> Step {
        let Some(read) = read else {
            self.seen = None;
            self.led_since = None;
            return Step::Write(self.lease(0, 0), None);
        };
        let changed = self.seen.as_ref().is_none_or(|(seen, _)| *seen != read);
        let since = match &self.seen {
            Some((_, since)) if !changed => *since,
            _ => now,
        };
        self.seen = Some((read.clone(), since));
        let lease = &read.lease;
        let revision = Some(read.revision.clone());
        if lease.holder == self.me {
            let renewed = self.lease(lease.transitions, lease.renewals + 1);
            return Step::Write(renewed, revision);
        }
        self.led_since = None;
        let valid = Duration::from_secs(lease.seconds);
        let waited = now.saturating_duration_since(since);
        if lease.holder.is_empty() || waited >= valid {
            let mine = self.lease(lease.transitions + 1, lease.renewals + 1);
            return Step::Write(mine, revision);
        }
        Step::Wait((valid - waited).min(self.pause()))
    }

    /// The lease was written, or was not because somebody else did. `began` is the time before the write.
    pub fn on_written(&mut self, written: Option<Seen>, began: Instant) {
        match written {
            Some(seen) => {
                self.seen = Some((seen, began));
                self.led_since = Some(began);
            }
            None => self.led_since = None,
        }
    }

    /// The lease to write when ending in order, so that nobody has to wait.
    pub fn resign(&mut self, now: Instant) -> Option<(Lease, Revision)> {
        let leads = self.leads(now);
        self.led_since = None;
        let (seen, _) = self.seen.as_ref().filter(|_| leads)?;
        let mut lease = seen.lease.clone();
        lease.holder.clear();
        Some((lease, seen.revision.clone()))
    }

    /// Time between looks.
    pub fn pause(&self) -> Duration {
        self.duration / 5
    }

    fn lease(&self, transitions: u64, renewals: u64) -> Lease {
        Lease {
            holder: self.me.clone(),
            seconds: self.duration.as_secs().max(1),
            transitions,
            renewals,
        }
    }
}

/// The object that carries the lease, and the annotation.
const LOCK_NAME: &str = "cali-controllers-leader";
const ANNOTATION: &str = "projectcalico.org/leader";

/// A lock in the datastore.
pub struct StoredLock {
    store: Arc<dyn Datastore>,
    key: Key,
}

impl StoredLock {
    /// The lock of the controllers.
    pub fn new(store: Arc<dyn Datastore>) -> Self {
        Self {
            store,
            key: Key::cluster(Kind::KubeControllersConfiguration, LOCK_NAME),
        }
    }

    fn seen(&self, object: &AnyResource, revision: &Revision) -> Result<Seen, Error> {
        let foreign = |reason: String| Error::ForeignLease {
            lock: self.key.to_string(),
            reason,
        };
        let text = object
            .metadata()
            .annotations
            .get(ANNOTATION)
            .ok_or_else(|| foreign(format!("it has no annotation {ANNOTATION}")))?;
        let lease = serde_json::from_str(text).map_err(|e| foreign(e.to_string()))?;
        Ok(Seen {
            lease,
            revision: revision.clone(),
        })
    }
}

#[async_trait]
impl Lock for StoredLock {
    async fn read(&self) -> Result<Option<Seen>, Error> {
        match self.store.get(&self.key).await {
            Ok(found) => self.seen(&found.object, &found.revision).map(Some),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(source) => Err(Error::datastore("read the leader's lease")(source)),
        }
    }

    async fn write(&self, lease: &Lease, over: Option<&Revision>) -> Result<Option<Seen>, Error> {
        let mut object =
            Resource::named(&*self.key.name, KubeControllersConfigurationSpec::default());
        let text = serde_json::to_string(lease).map_err(|e| Error::ForeignLease {
            lock: self.key.to_string(),
            reason: e.to_string(),
        })?;
        object
            .metadata
            .annotations
            .insert(ANNOTATION.to_owned(), text);
        object.metadata.resource_version = over.cloned();
        let written = match over {
            None => self.store.create(object.into()).await,
            Some(_) => self.store.update(object.into()).await,
        };
        match written {
            Ok(stored) => self.seen(&stored.object, &stored.revision).map(Some),
            Err(
                StoreError::Conflict { .. }
                | StoreError::AlreadyExists { .. }
                | StoreError::NotFound { .. },
            ) => Ok(None),
            Err(source) => Err(Error::datastore("write the leader's lease")(source)),
        }
    }
}

/// One look at the lock, and the write that follows from it. Returns the time until the next look.
pub async fn take_turn(lock: &dyn Lock, election: &mut Election) -> Result<Duration, Error> {
    let read = lock.read().await?;
    let began = Instant::now();
    match election.on_read(read, began) {
        Step::Wait(time) => Ok(time),
        Step::Write(lease, over) => {
            let written = lock.write(&lease, over.as_ref()).await?;
            election.on_written(written, began);
            Ok(election.pause())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Duration = Duration::from_secs(15);

    /// A lock that any number of replicas share.
    #[derive(Default)]
    struct Shared(Option<Seen>, u64);

    impl Shared {
        fn write(&mut self, lease: Lease, over: Option<Revision>) -> Option<Seen> {
            if self.0.as_ref().map(|s| s.revision.clone()) != over {
                return None;
            }
            self.1 += 1;
            let revision = Revision::from(self.1.to_string());
            self.0 = Some(Seen { lease, revision });
            self.0.clone()
        }

        fn turn(&mut self, election: &mut Election, now: Instant) {
            if let Step::Write(lease, over) = election.on_read(self.0.clone(), now) {
                let written = self.write(lease, over);
                election.on_written(written, now);
            }
        }
    }

    #[test]
    fn the_first_leads_and_the_second_waits_until_the_lease_has_run_out() {
        let (mut lock, start) = (Shared::default(), Instant::now());
        let (mut one, mut two) = (Election::new("one", TERM), Election::new("two", TERM));
        lock.turn(&mut one, start);
        lock.turn(&mut two, start);
        assert!(one.leads(start) && !two.leads(start));
        let late = start + TERM - Duration::from_secs(1);
        lock.turn(&mut two, late);
        assert!(!two.leads(late), "the lease still holds");
        assert!(!one.leads(late), "a leader that does not renew stops early");
        lock.turn(&mut two, start + TERM);
        assert!(two.leads(start + TERM));
        lock.turn(&mut one, start + TERM);
        assert!(!one.leads(start + TERM));
    }

    #[test]
    fn a_leader_that_renews_stays() {
        let (mut lock, start) = (Shared::default(), Instant::now());
        let (mut one, mut two) = (Election::new("one", TERM), Election::new("two", TERM));
        for step in 0..100 {
            let now = start + one.pause() * step;
            lock.turn(&mut one, now);
            lock.turn(&mut two, now);
            assert!(one.leads(now) && !two.leads(now), "after {step} turns");
        }
    }

    #[test]
    fn of_two_writers_only_one_leads() {
        let (mut lock, now) = (Shared::default(), Instant::now());
        let (mut one, mut two) = (Election::new("one", TERM), Election::new("two", TERM));
        let (first, second) = (one.on_read(None, now), two.on_read(None, now));
        for (election, step) in [(&mut one, first), (&mut two, second)] {
            let Step::Write(lease, over) = step else {
                panic!("nobody leads yet, so both try")
            };
            let written = lock.write(lease, over);
            election.on_written(written, now);
        }
        assert!(one.leads(now) && !two.leads(now));
    }

    #[test]
    fn who_resigns_is_followed_at_once() {
        let (mut lock, now) = (Shared::default(), Instant::now());
        let (mut one, mut two) = (Election::new("one", TERM), Election::new("two", TERM));
        lock.turn(&mut one, now);
        let (lease, revision) = one.resign(now).unwrap();
        assert!(lock.write(lease, Some(revision)).is_some());
        lock.turn(&mut two, now);
        assert!(two.leads(now) && !one.leads(now));
    }
}
