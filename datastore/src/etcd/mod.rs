//! etcd as the datastore, in Calico's own layout ([`layout`]), so that Calico's and Cali's nodes can share one.
//!
//! - Compare-and-swap is a transaction on the key's modification revision; an IP pool is created in a transaction that
//!   also requires that no other pool was written since the pools were read, so that two overlapping ones cannot both pass.
//! - Lists are read in pages, all at the revision of the first page.
//! - Watches start behind a revision; one that etcd has compacted away, or has never reached (a restored backup), ends
//!   with [`Error::RevisionGone`], and the reader lists again.
//!
//! Revisions are those of etcd. The connection is made at the first use and made anew, with certificates read anew, after
//! it failed. What this module does not do: wait or retry; that is the caller's ([`crate::sync`]).

mod connect;
mod follow;
mod layout;
pub mod portable;

use std::future::Future;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind, Revision};
use etcd_client::{
    Compare, CompareOp, GetOptions, GetResponse, KeyValue, KvClient, Txn, TxnOp, TxnOpResponse,
    WatchClient,
};
use serde_json::Value;
use tokio::sync::{Mutex, mpsc};

pub use self::connect::Settings;
use self::layout::{Located, Range};
use crate::admission;
use crate::error::Error;
use crate::store::{Datastore, List, Page, PageToken, Undecodable, Versioned, WatchStream};
use crate::stored::{self, Identity};
use crate::timestamp;

/// Calico's client gives up a call after this time.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Objects in the first page of a list, of which the size is not known yet.
const FIRST_PAGE: i64 = 500;
/// Octets that a page should have. For each page, etcd counts all keys from there to the end of the range, which takes
/// seconds when 100,000 objects are read by the hundred.
const PAGE_SIZE: usize = 4 << 20;
/// The largest answer that is accepted; a page that is larger is read in parts. etcd takes values up to 1.5 MB.
const MAX_ANSWER: usize = 64 << 20;
/// The largest message of a watch that is accepted: etcd may tell many changes at once.
const MAX_MESSAGE: usize = 256 << 20;
/// Events that wait for a slow reader of one watch; the rest waits in etcd.
const WATCH_BUFFER: usize = 256;
/// How often a write whose transaction met another writer of some other object is tried again.
const ATTEMPTS: usize = 32;

/// etcd as a datastore. All users of one process share its connection.
pub struct Etcd {
    settings: Settings,
    connection: Mutex<Option<Connection>>,
}

#[derive(Clone)]
struct Connection {
    kv: KvClient,
    watch: WatchClient,
}

/// How far the reading of a range has come.
struct Position {
    /// 0: the latest.
    revision: i64,
    /// The first key that has not been read.
    start: String,
    /// Objects that the next page may have.
    count: i64,
}

impl Position {
    fn start_of(range: &Range) -> Self {
        Self {
            revision: 0,
            start: range.start.clone(),
            count: FIRST_PAGE,
        }
    }

    fn token(&self) -> PageToken {
        PageToken(format!("{} {} {}", self.revision, self.count, self.start))
    }

    fn of(range: &Range, token: Option<&PageToken>) -> Self {
        let parsed = token.and_then(|token| {
            let mut parts = token.0.splitn(3, ' ');
            Some(Self {
                revision: parts.next()?.parse().ok()?,
                count: parts.next()?.parse().ok()?,
                start: parts.next()?.to_owned(),
            })
        });
        parsed.unwrap_or_else(|| Self::start_of(range))
    }
}

/// A key as it was found.
struct Found {
    located: Located,
    path: String,
    revision: i64,
    value: Result<Value, String>,
}

impl Etcd {
    /// Does not connect yet: the first call does.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            connection: Mutex::new(None),
        }
    }

    async fn connection(&self) -> Result<Connection, Error> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = slot.as_ref() {
            return Ok(connection.clone());
        }
        let client = self.settings.connect().await?;
        let connection = Connection {
            kv: client.kv_client().max_decoding_message_size(MAX_ANSWER),
            watch: client.watch_client().max_decoding_message_size(MAX_MESSAGE),
        };
        *slot = Some(connection.clone());
        Ok(connection)
    }

    /// One call with its time limit. A failed connection is forgotten.
    async fn call<T, F>(
        &self,
        operation: impl FnOnce() -> String,
        work: impl FnOnce(Connection) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let connection = self.connection().await?;
        let error = match tokio::time::timeout(CALL_TIMEOUT, work(connection)).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => Error::unavailable(operation(), error),
            Err(late) => Error::unavailable(operation(), late),
        };
        self.connection.lock().await.take();
        Err(error)
    }

    /// Reads an object, and the store's revision.
    async fn find(&self, key: &Key) -> Result<(Option<Found>, i64), Error> {
        let paths = layout::paths(key);
        let mut revision = 0;
        for path in paths {
            let answer = self
                .call(
                    || format!("read {key}"),
                    |mut c| async move { c.kv.get(path, None).await },
                )
                .await?;
            revision = answer.header().map_or(0, |header| header.revision());
            if let Some(found) = answer.kvs().first().and_then(found) {
                return Ok((Some(found), revision));
            }
        }
        Ok((None, revision))
    }

    async fn existing(&self, key: &Key) -> Result<Found, Error> {
        let (found, _) = self.find(key).await?;
        found.ok_or_else(|| Error::NotFound { key: key.clone() })
    }

    /// All keys of a range as of one revision.
    async fn scan(&self, range: &Range, what: &str) -> Result<(Vec<KeyValue>, i64), Error> {
        let mut all = Vec::new();
        let mut at = Position::start_of(range);
        loop {
            let (kvs, more) = self.scan_page(range, &mut at, i64::MAX, what).await?;
            all.extend(kvs);
            if !more {
                return Ok((all, at.revision));
            }
        }
    }

    /// Up to `limit` keys of a range, and whether there are more; at the position's revision, or at the latest, which it then
    /// has. The position moves on.
    async fn scan_page(
        &self,
        range: &Range,
        at: &mut Position,
        limit: i64,
        what: &str,
    ) -> Result<(Vec<KeyValue>, bool), Error> {
        let mut count = at.count.min(limit);
        let mut answer = loop {
            match self.read_range(range, at, count, what).await {
                // Behind small objects come large ones.
                Err(error) if count > 1 && is_too_large(&error) => count = (count / 16).max(1),
                other => break other?,
            }
        };
        if at.revision == 0 {
            at.revision = answer.header().map_or(0, |header| header.revision());
        }
        let more = answer.more();
        let kvs = answer.take_kvs();
        if let Some(last) = kvs.last() {
            // A key that is no text is none of ours; one that follows it in the order is good enough.
            at.start = format!("{}\0", String::from_utf8_lossy(last.key()));
            let octets: usize = kvs.iter().map(|kv| kv.key().len() + kv.value().len()).sum();
            let count = PAGE_SIZE * kvs.len() / octets.max(1);
            at.count = i64::try_from(count).unwrap_or(i64::MAX).max(1);
        }
        Ok((kvs, more))
    }

    async fn read_range(
        &self,
        range: &Range,
        at: &Position,
        count: i64,
        what: &str,
    ) -> Result<GetResponse, Error> {
        let start = at.start.clone();
        let options = GetOptions::new()
            .with_range(range.end.clone())
            .with_limit(count)
            .with_revision(at.revision);
        self.call(
            || format!("list {what}"),
            |mut c| async move { c.kv.get(start, Some(options)).await },
        )
        .await
    }

    async fn read_list(&self, kind: Kind, namespace: Option<&str>) -> Result<List, Error> {
        let range = layout::range(kind, namespace);
        let (kvs, revision) = self.scan(&range, kind.plural()).await?;
        let (mut items, undecodable) = decode_all(kind, &kvs);
        // The order of the keys is not always that of the names: "a-b/" comes before "a/".
        items.sort_by_cached_key(|item| item.object.key());
        Ok(List {
            items,
            undecodable,
            revision: revision.to_string().into(),
        })
    }

    /// Writes if the object is still as `before` says (0: absent), and `fence` holds. What stands there if not.
    async fn put(
        &self,
        key: &Key,
        path: &str,
        value: &Value,
        before: i64,
        fence: Option<Compare>,
    ) -> Result<Result<i64, Option<Found>>, Error> {
        let mut when = vec![Compare::mod_revision(path, CompareOp::Equal, before)];
        when.extend(fence);
        let txn = Txn::new()
            .when(when)
            .and_then([TxnOp::put(path, value.to_string(), None)])
            .or_else([TxnOp::get(path, None)]);
        self.transact(key, "write", txn).await
    }

    async fn transact(
        &self,
        key: &Key,
        verb: &str,
        txn: Txn,
    ) -> Result<Result<i64, Option<Found>>, Error> {
        let answer = self
            .call(
                || format!("{verb} {key}"),
                |mut c| async move { c.kv.txn(txn).await },
            )
            .await?;
        if answer.succeeded() {
            return Ok(Ok(answer.header().map_or(0, |header| header.revision())));
        }
        Ok(Err(answer.op_responses().iter().find_map(
            |one| match one {
                TxnOpResponse::Get(get) => get.kvs().first().and_then(found),
                _ => None,
            },
        )))
    }

    /// Checks an object against its kind's rules and the other objects; the condition under which the check holds.
    async fn admit(
        &self,
        object: &AnyResource,
        old: Option<&AnyResource>,
    ) -> Result<Option<Compare>, Error> {
        let kind = object.kind();
        if !admission::compares_with_others(kind) {
            admission::check(object, old, &[])?;
            return Ok(None);
        }
        let list = self.read_list(kind, None).await?;
        let others: Vec<AnyResource> = list
            .items
            .iter()
            .map(|item| item.object.as_ref().clone())
            .collect();
        admission::check(object, old, &others)?;
        let range = layout::range(kind, None);
        let seen = number(&list.revision)?;
        Ok(Some(
            Compare::mod_revision(range.start, CompareOp::Less, seen + 1).with_range(range.end),
        ))
    }
}

/// What one key holds; `None` for keys that are not ours.
fn found(kv: &KeyValue) -> Option<Found> {
    let path = kv.key_str().ok()?.to_owned();
    Some(Found {
        located: layout::locate(&path)?,
        path,
        revision: kv.mod_revision(),
        value: serde_json::from_slice(kv.value()).map_err(|error| error.to_string()),
    })
}

/// The objects of a kind among these keys.
fn decode_all(kind: Kind, kvs: &[KeyValue]) -> (Vec<Versioned>, Vec<Undecodable>) {
    let (mut items, mut undecodable) = (Vec::new(), Vec::new());
    for found in kvs.iter().filter_map(found) {
        if found.located.key.kind == kind {
            match decode(found) {
                Ok(object) => items.push(object),
                Err(bad) => undecodable.push(bad),
            }
        }
    }
    (items, undecodable)
}

/// Whether a read failed because etcd has compacted its revision away.
fn is_compacted(error: &Error) -> bool {
    says(error, "compacted")
}

/// Whether an answer was refused for its size ([`MAX_ANSWER`]).
fn is_too_large(error: &Error) -> bool {
    says(error, "message length too large")
}

fn says(error: &Error, words: &str) -> bool {
    let Error::Unavailable { source, .. } = error else {
        return false;
    };
    match source.downcast_ref() {
        Some(etcd_client::Error::GRpcStatus(status)) => status.message().contains(words),
        _ => false,
    }
}

fn decode(found: Found) -> Result<Versioned, Undecodable> {
    let revision = found.revision.to_string();
    let object = found.value.and_then(|value| {
        let mut value = layout::decode(&found.located, value);
        stored::set_revision(&mut value, &revision);
        AnyResource::from_json(value).map_err(|error| error.to_string())
    });
    match object {
        // The key, not the value, says which object it is.
        Ok(object) if object.key() == found.located.key => Ok(stored::versioned(object, &revision)),
        Ok(other) => Err(Undecodable {
            reason: format!("the value at {} is that of {}", found.path, other.key()),
            key: found.located.key,
            revision: revision.into(),
        }),
        Err(reason) => Err(Undecodable {
            key: found.located.key,
            revision: revision.into(),
            reason,
        }),
    }
}

fn unreadable(bad: Undecodable) -> Error {
    Error::Undecodable {
        key: bad.key,
        reason: bad.reason,
    }
}

/// A revision of etcd as a number. Anything else was given out by another store.
fn number(revision: &Revision) -> Result<i64, Error> {
    let parsed = revision.as_str().parse().ok().filter(|number| *number > 0);
    parsed.ok_or_else(|| Error::RevisionGone {
        revision: revision.clone(),
    })
}

fn conflict(key: &Key, expected: &Revision, found: i64) -> Error {
    Error::Conflict {
        key: key.clone(),
        expected: expected.clone(),
        found: found.to_string().into(),
    }
}

/// The object as written, with the metadata that the store gives.
fn prepared(
    key: &Key,
    object: &AnyResource,
    identity: &Identity,
) -> Result<(Value, Value, String), Error> {
    let mut whole = stored::to_value(object)?;
    stored::clear_revision(&mut whole);
    if layout::keeps_metadata(key.kind) {
        stored::set_identity(&mut whole, identity);
    } else {
        layout::strip_metadata(key.kind, &mut whole);
    }
    let path = layout::path_of(key, &whole).ok_or_else(|| Error::Unsupported {
        operation: "write",
        key: key.clone(),
        reason: "its name has no place in etcd's layout",
    })?;
    let value = layout::encode(key.kind, whole.clone());
    Ok((whole, value, path))
}

fn written(key: &Key, mut whole: Value, revision: i64) -> Result<Versioned, Error> {
    let revision = revision.to_string();
    stored::set_revision(&mut whole, &revision);
    Ok(stored::versioned(
        stored::from_value(key, whole)?,
        &revision,
    ))
}

#[async_trait]
impl Datastore for Etcd {
    async fn get(&self, key: &Key) -> Result<Versioned, Error> {
        let found = self.existing(key).await?;
        decode(found).map_err(unreadable)
    }

    async fn list(&self, kind: Kind, namespace: Option<&str>) -> Result<List, Error> {
        self.read_list(kind, namespace).await
    }

    async fn list_page(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        after: Option<&PageToken>,
        limit: usize,
    ) -> Result<Page, Error> {
        let range = layout::range(kind, namespace);
        let limit = i64::try_from(limit.max(1)).unwrap_or(i64::MAX);
        let mut at = Position::of(&range, after);
        let read = self.scan_page(&range, &mut at, limit, kind.plural()).await;
        let (kvs, more) = match read {
            Err(error) if after.is_some() && is_compacted(&error) => {
                // The first page's instant is gone: what follows is as of now.
                at.revision = 0;
                self.scan_page(&range, &mut at, limit, kind.plural())
                    .await?
            }
            other => other?,
        };
        let (items, undecodable) = decode_all(kind, &kvs);
        Ok(Page {
            items,
            undecodable,
            revision: at.revision.to_string().into(),
            next: more.then(|| at.token()),
        })
    }

    async fn create(&self, object: AnyResource) -> Result<Versioned, Error> {
        let (key, object) = admission::for_create(object)?;
        let identity = Identity {
            uid: stored::random_uid()?,
            creation_timestamp: timestamp::format(SystemTime::now()),
        };
        let (whole, value, path) = prepared(&key, &object, &identity)?;
        for _ in 0..ATTEMPTS {
            let fence = self.admit(&object, None).await?;
            match self.put(&key, &path, &value, 0, fence).await? {
                Ok(revision) => return written(&key, whole, revision),
                Err(Some(_)) => return Err(Error::AlreadyExists { key }),
                // Another pool was written in between.
                Err(None) => {}
            }
        }
        Err(contended(&key))
    }

    async fn update(&self, object: AnyResource) -> Result<Versioned, Error> {
        let (key, object, expected) = admission::for_update(object)?;
        for _ in 0..ATTEMPTS {
            let old = self.existing(&key).await?;
            let before = old.revision;
            if expected.as_str() != before.to_string() {
                return Err(conflict(&key, &expected, before));
            }
            let identity = match &old.value {
                Ok(value) => stored::identity(value),
                Err(reason) => {
                    return Err(Error::Undecodable {
                        key,
                        reason: reason.clone(),
                    });
                }
            };
            let old = decode(old).ok();
            let old = old.as_ref().map(|old| old.object.as_ref());
            let fence = self.admit(&object, old).await?;
            let (whole, value, path) = prepared(&key, &object, &identity)?;
            match self.put(&key, &path, &value, before, fence).await? {
                Ok(revision) => return written(&key, whole, revision),
                Err(Some(now)) if now.revision != before => {
                    return Err(conflict(&key, &expected, now.revision));
                }
                Err(Some(_)) => {}
                Err(None) => return Err(Error::NotFound { key }),
            }
        }
        Err(contended(&key))
    }

    async fn delete(&self, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error> {
        for _ in 0..ATTEMPTS {
            let old = self.existing(key).await?;
            if let Some(expected) = revision
                && expected.as_str() != old.revision.to_string()
            {
                return Err(conflict(key, expected, old.revision));
            }
            let txn = Txn::new()
                .when([Compare::mod_revision(
                    old.path.as_str(),
                    CompareOp::Equal,
                    old.revision,
                )])
                .and_then([TxnOp::delete(old.path.as_str(), None)]);
            if self.transact(key, "delete", txn).await?.is_ok() {
                return decode(old).map_err(|mut bad| {
                    bad.reason.push_str(" (it has been deleted)");
                    unreadable(bad)
                });
            }
        }
        Err(contended(key))
    }

    async fn watch(&self, kinds: &[Kind], from: &Revision) -> Result<WatchStream, Error> {
        let after = number(from)?;
        let Some(range) = layout::range_of_all(kinds) else {
            return Err(Error::RevisionGone {
                revision: from.clone(),
            });
        };
        let probe = range.start.clone();
        let options = GetOptions::new().with_count_only();
        let latest = self
            .call(
                || "read the revision of etcd".to_owned(),
                |mut c| async move { c.kv.get(probe, Some(options)).await },
            )
            .await?;
        // A revision from before a backup was restored, or of another etcd.
        if latest.header().map_or(0, |header| header.revision()) < after {
            return Err(Error::RevisionGone {
                revision: from.clone(),
            });
        }
        let source = self
            .call(
                || "watch etcd".to_owned(),
                |c| follow::start(c.watch, range, after),
            )
            .await?;
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let mut follower = follow::Follower::new(source, kinds.to_vec(), after);
        // The first answer says whether the revision is still there.
        follower.begin(CALL_TIMEOUT).await?;
        let task = tokio::spawn(async move { follower.run(sender).await });
        Ok(WatchStream::new(receiver, task))
    }
}

fn contended(key: &Key) -> Error {
    Error::unavailable(
        format!("write {key}"),
        format!("other writers came in between {ATTEMPTS} times"),
    )
}
