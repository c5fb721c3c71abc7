//! Writes: each is one transaction that reads, checks, writes the object and appends to the change log.

use std::time::SystemTime;

use cali_api::{AnyResource, Key, Revision};
use rusqlite::{Connection, OptionalExtension, TransactionBehavior};
use serde_json::Value;

use super::{decode, failed};
use crate::admission;
use crate::error::Error;
use crate::stored::{self, Identity};
use crate::timestamp;

/// A write that has been prepared outside the transaction.
pub(super) struct Write {
    key: Key,
    what: What,
}

enum What {
    Create(AnyResource),
    Update {
        object: AnyResource,
        expected: Revision,
    },
    Delete {
        expected: Option<Revision>,
    },
}

/// A committed write.
pub(super) struct Done {
    pub(super) object: AnyResource,
    pub(super) revision: i64,
}

impl Write {
    pub(super) fn create(object: AnyResource) -> Result<Self, Error> {
        let (key, object) = admission::for_create(object)?;
        Ok(Self {
            key,
            what: What::Create(object),
        })
    }

    pub(super) fn update(object: AnyResource) -> Result<Self, Error> {
        let (key, object, expected) = admission::for_update(object)?;
        Ok(Self {
            key,
            what: What::Update { object, expected },
        })
    }

    pub(super) fn delete(key: Key, expected: Option<Revision>) -> Self {
        Self {
            key,
            what: What::Delete { expected },
        }
    }

    pub(super) fn run(self, connection: &mut Connection, log_length: u32) -> Result<Done, Error> {
        let Self { key, what } = self;
        let verb = match what {
            What::Create(_) => "create",
            What::Update { .. } => "update",
            What::Delete { .. } => "delete",
        };
        let sql = |e: rusqlite::Error| Error::unavailable(format!("{verb} {key}"), e);
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(sql)?;
        let before = row(&transaction, &key).map_err(sql)?;
        let done = match what {
            What::Create(object) => {
                if before.is_some() {
                    return Err(Error::AlreadyExists { key });
                }
                check(&transaction, &object, None)?;
                let identity = Identity {
                    uid: uid(&transaction).map_err(sql)?,
                    creation_timestamp: timestamp::format(SystemTime::now()),
                };
                put(&transaction, &key, &object, &identity)?
            }
            What::Update { object, expected } => {
                let (revision, body) = expect(&key, before, Some(&expected))?;
                let old: Value = serde_json::from_str(&body).map_err(|e| undecodable(&key, &e))?;
                let old_object = decode(&key, revision, &body).ok();
                check(
                    &transaction,
                    &object,
                    old_object.as_ref().map(|v| v.object.as_ref()),
                )?;
                put(&transaction, &key, &object, &stored::identity(&old))?
            }
            What::Delete { expected } => {
                let (revision, body) = expect(&key, before, expected.as_ref())?;
                let object = match decode(&key, revision, &body) {
                    Ok(old) => old.object.as_ref().clone(),
                    Err(bad) => return delete_unread(transaction, &key, bad.reason, log_length),
                };
                let revision = remove(&transaction, &key).map_err(sql)?;
                Done { object, revision }
            }
        };
        compact(&transaction, done.revision, log_length).map_err(sql)?;
        transaction.commit().map_err(sql)?;
        Ok(done)
    }
}

/// An object that cannot be read can still be deleted; the answer says that it could not be shown.
fn delete_unread(
    transaction: rusqlite::Transaction<'_>,
    key: &Key,
    reason: String,
    log_length: u32,
) -> Result<Done, Error> {
    let work = || -> rusqlite::Result<()> {
        let revision = remove(&transaction, key)?;
        compact(&transaction, revision, log_length)
    };
    work().map_err(failed(format!("delete {key}")))?;
    transaction
        .commit()
        .map_err(failed(format!("delete {key}")))?;
    Err(Error::Undecodable {
        key: key.clone(),
        reason: format!("{reason} (it has been deleted)"),
    })
}

fn undecodable(key: &Key, e: &serde_json::Error) -> Error {
    Error::Undecodable {
        key: key.clone(),
        reason: e.to_string(),
    }
}

fn expect(
    key: &Key,
    before: Option<(i64, String)>,
    expected: Option<&Revision>,
) -> Result<(i64, String), Error> {
    let Some((revision, body)) = before else {
        return Err(Error::NotFound { key: key.clone() });
    };
    let found = Revision::from(revision.to_string());
    match expected {
        Some(expected) if *expected != found => Err(Error::Conflict {
            key: key.clone(),
            expected: expected.clone(),
            found,
        }),
        _ => Ok((revision, body)),
    }
}

fn check(
    connection: &Connection,
    object: &AnyResource,
    old: Option<&AnyResource>,
) -> Result<(), Error> {
    let kind = object.kind();
    let others = if admission::compares_with_others(kind) {
        all(connection, kind).map_err(failed(format!("list {}", kind.plural())))?
    } else {
        Vec::new()
    };
    admission::check(object, old, &others)
}

fn all(connection: &Connection, kind: cali_api::Kind) -> rusqlite::Result<Vec<AnyResource>> {
    let mut statement = connection.prepare_cached("SELECT body FROM objects WHERE kind = ?1")?;
    let mut rows = statement.query([stored::kind_id(kind)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        if let Ok(value) = serde_json::from_str::<Value>(row.get_ref(0)?.as_str()?)
            && let Ok(object) = AnyResource::from_json(value)
        {
            found.push(object);
        }
    }
    Ok(found)
}

/// Revision and body of an object.
pub(super) fn row(connection: &Connection, key: &Key) -> rusqlite::Result<Option<(i64, String)>> {
    connection
        .prepare_cached(
            "SELECT revision, body FROM objects WHERE kind = ?1 AND namespace = ?2 AND name = ?3",
        )?
        .query_row(columns(key), |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

fn columns(key: &Key) -> (String, &str, &str) {
    (
        stored::kind_id(key.kind),
        key.namespace.as_deref().unwrap_or(""),
        &key.name,
    )
}

fn put(
    connection: &Connection,
    key: &Key,
    object: &AnyResource,
    identity: &Identity,
) -> Result<Done, Error> {
    let mut value = stored::to_value(object)?;
    stored::clear_revision(&mut value);
    stored::set_identity(&mut value, identity);
    let body = value.to_string();
    let write = || -> rusqlite::Result<i64> {
        let revision = log(connection, key, Some(&body))?;
        let (kind, namespace, name) = columns(key);
        connection
            .prepare_cached(
                "INSERT INTO objects (kind, namespace, name, revision, body) VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (kind, namespace, name) DO UPDATE SET revision = excluded.revision, body = excluded.body",
            )?
            .execute((kind, namespace, name, revision, &body))?;
        Ok(revision)
    };
    let revision = write().map_err(failed(format!("write {key}")))?;
    stored::set_revision(&mut value, &revision.to_string());
    let object = stored::from_value(key, value)?;
    Ok(Done { object, revision })
}

fn remove(connection: &Connection, key: &Key) -> rusqlite::Result<i64> {
    let revision = log(connection, key, None)?;
    connection
        .prepare_cached("DELETE FROM objects WHERE kind = ?1 AND namespace = ?2 AND name = ?3")?
        .execute(columns(key))?;
    Ok(revision)
}

fn log(connection: &Connection, key: &Key, body: Option<&str>) -> rusqlite::Result<i64> {
    let (kind, namespace, name) = columns(key);
    connection
        .prepare_cached(
            "INSERT INTO changes (kind, namespace, name, body) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute((kind, namespace, name, body))?;
    Ok(connection.last_insert_rowid())
}

/// Every so often drops what the log holds beyond its bound.
fn compact(connection: &Connection, revision: i64, log_length: u32) -> rusqlite::Result<()> {
    let every = i64::from(log_length / 8).max(1);
    if revision % every != 0 {
        return Ok(());
    }
    let last_dropped = revision - i64::from(log_length);
    let dropped = connection
        .prepare_cached("DELETE FROM changes WHERE revision <= ?1")?
        .execute([last_dropped])?;
    if dropped > 0 {
        connection
            .prepare_cached("UPDATE log SET compacted = max(compacted, ?1)")?
            .execute([last_dropped])?;
    }
    Ok(())
}

/// A random (version 4) UUID; the randomness is SQLite's, seeded from the system.
fn uid(connection: &Connection) -> rusqlite::Result<String> {
    let mut bytes: [u8; 16] =
        connection.query_row("SELECT randomblob(16)", [], |row| row.get(0))?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    Ok([
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-"))
}
