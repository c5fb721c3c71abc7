//! A datastore in memory whose every operation can be interrupted, delayed and made to fail; and a way to run many
//! tasks over it in an order that a seed decides.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind, Revision};
use cali_datastore::{Datastore, Error, List, Versioned, WatchStream};

/// A small generator of numbers (xorshift64*), so that a seed reproduces a run.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit.max(1)
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        n != 0 && self.below(n) == 0
    }
}

struct Inner {
    objects: BTreeMap<Key, (u64, AnyResource)>,
    revision: u64,
    dice: Dice,
    /// One in so many writes fails, half of them after having been carried out. 0: none.
    fail_one_in: usize,
}

/// The store. It never waits: every operation is two turns, one before it is carried out and one after it.
pub(crate) struct Memory {
    inner: Mutex<Inner>,
}

impl Memory {
    pub(crate) fn new(seed: u64, fail_one_in: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                objects: BTreeMap::new(),
                revision: 1,
                dice: Dice::new(seed),
                fail_one_in,
            }),
        })
    }

    pub(crate) fn set_failures(&self, one_in: usize) {
        self.inner.lock().unwrap().fail_one_in = one_in;
    }

    pub(crate) fn objects(&self, kind: Kind) -> Vec<AnyResource> {
        let inner = self.inner.lock().unwrap();
        inner
            .objects
            .values()
            .map(|(_, o)| o.clone())
            .filter(|o| o.kind() == kind)
            .collect()
    }

    async fn write<T>(
        &self,
        work: impl FnOnce(&mut Inner) -> Result<T, Error>,
    ) -> Result<T, Error> {
        Turn::default().await;
        let result = {
            let mut inner = self.inner.lock().unwrap();
            let fail_one_in = inner.fail_one_in;
            if inner.dice.one_in(fail_one_in) {
                if inner.dice.one_in(2) {
                    let _ = work(&mut inner);
                }
                Err(lost())
            } else {
                work(&mut inner)
            }
        };
        Turn::default().await;
        result
    }
}

fn lost() -> Error {
    Error::Unavailable {
        operation: "reach the store".to_owned(),
        source: "the connection was lost".into(),
    }
}

fn put(inner: &mut Inner, mut object: AnyResource) -> Versioned {
    inner.revision += 1;
    let revision = Revision::from(inner.revision.to_string());
    object.metadata_mut().resource_version = Some(revision.clone());
    inner
        .objects
        .insert(object.key(), (inner.revision, object.clone()));
    Versioned {
        object: Arc::new(object),
        revision,
    }
}

fn expect(inner: &Inner, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error> {
    let Some((found, object)) = inner.objects.get(key) else {
        return Err(Error::NotFound { key: key.clone() });
    };
    let found = Revision::from(found.to_string());
    match revision {
        Some(expected) if *expected != found => Err(Error::Conflict {
            key: key.clone(),
            expected: expected.clone(),
            found,
        }),
        _ => Ok(Versioned {
            object: Arc::new(object.clone()),
            revision: found,
        }),
    }
}

#[async_trait]
impl Datastore for Memory {
    async fn get(&self, key: &Key) -> Result<Versioned, Error> {
        Turn::default().await;
        expect(&self.inner.lock().unwrap(), key, None)
    }

    async fn list(&self, kind: Kind, _namespace: Option<&str>) -> Result<List, Error> {
        Turn::default().await;
        let inner = self.inner.lock().unwrap();
        let items = inner.objects.iter().filter(|(key, _)| key.kind == kind);
        Ok(List {
            items: items
                .map(|(_, (revision, object))| Versioned {
                    object: Arc::new(object.clone()),
                    revision: Revision::from(revision.to_string()),
                })
                .collect(),
            undecodable: Vec::new(),
            revision: Revision::from(inner.revision.to_string()),
        })
    }

    async fn create(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.write(|inner| {
            let key = object.key();
            if inner.objects.contains_key(&key) {
                return Err(Error::AlreadyExists { key });
            }
            Ok(put(inner, object))
        })
        .await
    }

    async fn update(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.write(|inner| {
            let expected = object.metadata().resource_version.clone();
            expect(
                inner,
                &object.key(),
                Some(&expected.unwrap_or_else(|| Revision::from("none"))),
            )?;
            Ok(put(inner, object))
        })
        .await
    }

    async fn delete(&self, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error> {
        self.write(|inner| {
            let old = expect(inner, key, revision)?;
            inner.objects.remove(key);
            Ok(old)
        })
        .await
    }

    async fn watch(&self, kinds: &[Kind], _from: &Revision) -> Result<WatchStream, Error> {
        Err(Error::Unsupported {
            operation: "watch",
            key: Key::cluster(kinds[0], "*"),
            reason: "this store is for tests of writes",
        })
    }
}

/// Lets the others run once.
#[derive(Default)]
struct Turn(bool);

impl Future for Turn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.0 {
            return Poll::Ready(());
        }
        self.0 = true;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Polls the tasks in an order that the dice decide; now and then a task is dropped where it stands, as by a crash.
pub(crate) fn run(
    mut tasks: Vec<Pin<Box<dyn Future<Output = ()> + '_>>>,
    dice: &mut Dice,
    crash_one_in: usize,
) {
    let mut context = Context::from_waker(Waker::noop());
    while !tasks.is_empty() {
        let chosen = dice.below(tasks.len());
        let crashed = dice.one_in(crash_one_in);
        if crashed || tasks[chosen].as_mut().poll(&mut context).is_ready() {
            drop(tasks.swap_remove(chosen));
        }
    }
}
