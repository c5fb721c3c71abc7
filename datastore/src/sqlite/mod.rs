//! The embedded back end: one SQLite file in WAL mode, shared by any number of processes of one machine.
//!
//! - A write is one `BEGIN IMMEDIATE` transaction: read, check, write the object, append to the change log. Writers of
//!   all processes are serialised by SQLite, so that revisions grow in the order of commits.
//! - Watches tail the change log. Commits of this process wake them at once; commits of others are noticed by polling
//!   `PRAGMA data_version` ([`tail`]).
//! - The change log is bounded; a watch that fell out of it ends with [`Error::RevisionGone`].
//!
//! The calls block for microseconds to milliseconds (fsync) and run on Tokio's blocking threads.

mod schema;
mod tail;
mod write;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind, Revision};
use rusqlite::Connection;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::error::Error;
use crate::store::{Datastore, List, Page, PageToken, Undecodable, Versioned, WatchStream};
use crate::stored;

/// How many changes the log keeps for watches that resume.
pub const DEFAULT_LOG_LENGTH: u32 = 20_000;
/// Objects in one page of a list, at most.
const PAGE: i64 = 500;
/// Idle connections kept for reading.
const IDLE_READERS: usize = 4;
/// Events that wait for a slow reader of one watch; the rest waits in the log.
const WATCH_BUFFER: usize = 256;

/// The embedded store. Cheap to clone; all clones share connections and the tail of the change log.
#[derive(Clone)]
pub struct Sqlite {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    log_length: u32,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
    tail: tail::Tail,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while a lock was held cannot leave a connection half-way: its transaction was rolled back.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn failed(operation: impl Into<String>) -> impl FnOnce(rusqlite::Error) -> Error {
    let operation = operation.into();
    move |e| Error::unavailable(operation, e)
}

impl Sqlite {
    /// Opens the file, creating it (and its folder) if it does not exist.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with_log_length(path, DEFAULT_LOG_LENGTH)
    }

    /// As [`Sqlite::open`], with another bound for the change log.
    pub fn open_with_log_length(path: &Path, log_length: u32) -> Result<Self, Error> {
        let writer = schema::open(path)?;
        let latest = tail::latest(&writer).map_err(failed("read the change log"))?;
        let tail = tail::Tail::start(schema::connect(path)?, latest)?;
        Ok(Self {
            inner: Arc::new(Inner {
                path: path.to_owned(),
                log_length: log_length.max(1),
                writer: Mutex::new(writer),
                readers: Mutex::new(Vec::new()),
                tail,
            }),
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = self.inner.clone();
        blocking(move || inner.read(work)).await
    }

    async fn write(&self, write: write::Write) -> Result<Versioned, Error> {
        let inner = self.inner.clone();
        blocking(move || {
            let done = write.run(&mut lock(&inner.writer), inner.log_length)?;
            inner.tail.advance(done.revision);
            Ok(stored::versioned(done.object, &done.revision.to_string()))
        })
        .await
    }
}

impl Inner {
    fn read<T>(&self, work: impl FnOnce(&mut Connection) -> Result<T, Error>) -> Result<T, Error> {
        let idle = lock(&self.readers).pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => schema::connect(&self.path)?,
        };
        let result = work(&mut connection);
        let mut readers = lock(&self.readers);
        if readers.len() < IDLE_READERS {
            readers.push(connection);
        }
        result
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::unavailable("run a database call", e)),
    }
}

/// Reads a stored body as an object of `key`.
fn decode(key: &Key, revision: i64, body: &str) -> Result<Versioned, Undecodable> {
    let undecodable = |reason: String| Undecodable {
        key: key.clone(),
        revision: Revision::from(revision.to_string()),
        reason,
    };
    let mut value: Value = serde_json::from_str(body).map_err(|e| undecodable(e.to_string()))?;
    let revision = revision.to_string();
    stored::set_revision(&mut value, &revision);
    match AnyResource::from_json(value) {
        Ok(object) => Ok(stored::versioned(object, &revision)),
        Err(e) => Err(undecodable(e.to_string())),
    }
}

/// A revision of this store as a number. Anything else was given out by another store.
fn number(revision: &Revision) -> Result<i64, Error> {
    revision.as_str().parse().map_err(|_| Error::RevisionGone {
        revision: revision.clone(),
    })
}

fn key_of(kind: Kind, namespace: &str, name: &str) -> Key {
    Key {
        kind,
        namespace: (!namespace.is_empty()).then(|| namespace.into()),
        name: name.into(),
    }
}

#[async_trait]
impl Datastore for Sqlite {
    async fn get(&self, key: &Key) -> Result<Versioned, Error> {
        let key = key.clone();
        self.read(move |connection| {
            let (revision, body) = write::row(connection, &key)
                .map_err(failed(format!("read {key}")))?
                .ok_or_else(|| Error::NotFound { key: key.clone() })?;
            decode(&key, revision, &body).map_err(|u| Error::Undecodable {
                key: u.key,
                reason: u.reason,
            })
        })
        .await
    }

    async fn list(&self, kind: Kind, namespace: Option<&str>) -> Result<List, Error> {
        let namespace = namespace.map(str::to_owned);
        self.read(move |connection| {
            list(connection, kind, namespace.as_deref())
                .map_err(failed(format!("list {}", kind.plural())))
        })
        .await
    }

    async fn list_page(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        after: Option<&PageToken>,
        limit: usize,
    ) -> Result<Page, Error> {
        let namespace = namespace.map(str::to_owned);
        let after = after.cloned();
        self.read(move |connection| {
            page(connection, kind, namespace.as_deref(), after, limit)
                .map_err(failed(format!("list {}", kind.plural())))
        })
        .await
    }

    async fn create(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.write(write::Write::create(object)?).await
    }

    async fn update(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.write(write::Write::update(object)?).await
    }

    async fn delete(&self, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error> {
        self.write(write::Write::delete(key.clone(), revision.cloned()))
            .await
    }

    async fn watch(&self, kinds: &[Kind], from: &Revision) -> Result<WatchStream, Error> {
        let from_number = number(from)?;
        // The first read is done here, so that a revision that is gone is told at once.
        let first = self
            .read(move |connection| {
                tail::check(connection, from_number).map_err(failed("read the change log"))
            })
            .await?;
        if !first {
            return Err(Error::RevisionGone {
                revision: from.clone(),
            });
        }
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let ids = kinds
            .iter()
            .map(|kind| (stored::kind_id(*kind), *kind))
            .collect();
        let task = tokio::spawn(tail::follow(
            Arc::downgrade(&self.inner),
            ids,
            from_number,
            sender,
        ));
        Ok(WatchStream::new(receiver, task))
    }
}

fn list(
    connection: &mut Connection,
    kind: Kind,
    namespace: Option<&str>,
) -> rusqlite::Result<List> {
    let transaction = connection.transaction()?;
    let revision = tail::latest(&transaction)?;
    let (mut items, mut undecodable) = (Vec::new(), Vec::new());
    {
        let mut statement = transaction.prepare_cached(
            "SELECT namespace, name, revision, body FROM objects
             WHERE kind = ?1 AND (?2 IS NULL OR namespace = ?2) ORDER BY namespace, name",
        )?;
        let mut rows = statement.query((stored::kind_id(kind), namespace))?;
        while let Some(row) = rows.next()? {
            match decode_row(kind, row)?.1 {
                Ok(object) => items.push(object),
                Err(bad) => undecodable.push(bad),
            }
        }
    }
    Ok(List {
        items,
        undecodable,
        revision: Revision::from(revision.to_string()),
    })
}

/// The key of a row with namespace, name, revision and body, and what it holds.
fn decode_row(
    kind: Kind,
    row: &rusqlite::Row<'_>,
) -> rusqlite::Result<(Key, Result<Versioned, Undecodable>)> {
    let key = key_of(kind, row.get_ref(0)?.as_str()?, row.get_ref(1)?.as_str()?);
    let decoded = decode(&key, row.get(2)?, row.get_ref(3)?.as_str()?);
    Ok((key, decoded))
}

/// The first rows behind a key. Each page is a transaction of its own: a reader that stops half-way (`| less`) must not keep the
/// write-ahead log from being taken in.
fn page(
    connection: &mut Connection,
    kind: Kind,
    namespace: Option<&str>,
    after: Option<PageToken>,
    limit: usize,
) -> rusqlite::Result<Page> {
    let transaction = connection.transaction()?;
    let revision = tail::latest(&transaction)?;
    // No namespace and no name come before all others.
    let (after_namespace, after_name) = after
        .as_ref()
        .and_then(|token| token.0.split_once('\0'))
        .unwrap_or_default();
    let limit = i64::try_from(limit).unwrap_or(PAGE).clamp(1, PAGE);
    let (mut items, mut undecodable, mut last, mut count) = (Vec::new(), Vec::new(), None, 0);
    {
        let mut statement = transaction.prepare_cached(
            "SELECT namespace, name, revision, body FROM objects
             WHERE kind = ?1 AND (?2 IS NULL OR namespace = ?2) AND (namespace, name) > (?3, ?4)
             ORDER BY namespace, name LIMIT ?5",
        )?;
        let wanted = (
            stored::kind_id(kind),
            namespace,
            after_namespace,
            after_name,
            limit,
        );
        let mut rows = statement.query(wanted)?;
        while let Some(row) = rows.next()? {
            let (key, decoded) = decode_row(kind, row)?;
            match decoded {
                Ok(object) => items.push(object),
                Err(bad) => undecodable.push(bad),
            }
            last = Some(key);
            count += 1;
        }
    }
    let next = last.filter(|_| count == limit).map(|key| {
        let namespace = key.namespace.as_deref().unwrap_or_default();
        PageToken(format!("{namespace}\0{}", key.name))
    });
    Ok(Page {
        items,
        undecodable,
        revision: Revision::from(revision.to_string()),
        next,
    })
}
