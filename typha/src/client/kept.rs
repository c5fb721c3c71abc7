//! The last state of a stream on disk, for a program that starts while no server answers.
//!
//! One SQLite file with the objects that the consumer was told and their revisions. What is told is written behind, in
//! transactions of what has gathered in a moment (the newest version of each object counts), so a file is at any time
//! a state that the consumer had, at most about a second old. Nobody waits for the disk, and what waits for it is bounded by the number of
//! objects. A file is used only if it is whole: of this version, of the same kinds, complete once, each object with
//! its sum, all of them readable. Otherwise, and when the disk fails, it is thrown away and said why.
//!
//! It does not decide when the state is used; that is [`super`]'s.

use std::collections::HashMap;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind, Revision};
use rusqlite::Connection;
use sha2::{Digest, Sha256};

use super::Covered;
use crate::Chain;

/// "Calk": another program's database is never written.
const APPLICATION_ID: i32 = 0x4361_6c6b;
/// Version of the tables, and of what an object looks like in them.
const VERSION: i32 = 2;
/// The file's largest size. A cluster of 100,000 pods takes some 150 MB.
const MAX_BYTES: i64 = 1 << 30;
const PAGE_BYTES: i64 = 4096;
/// What gathers in this time is one transaction.
const GATHER: Duration = Duration::from_millis(200);

const TABLES: &str = "
CREATE TABLE objects (
    kind      TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name      TEXT NOT NULL,
    revision  TEXT NOT NULL,
    body      TEXT NOT NULL,
    sum       BLOB NOT NULL,
    UNIQUE (kind, namespace, name)
) STRICT;
CREATE TABLE state (
    id       INTEGER PRIMARY KEY CHECK (id = 0),
    kinds    TEXT NOT NULL,
    complete INTEGER NOT NULL,
    written  INTEGER NOT NULL,
    covered  TEXT
) STRICT;
";

/// Where a state is kept, and when it is used.
#[derive(Debug, Clone)]
pub struct Keep {
    /// The file; one program each.
    pub file: PathBuf,
    /// How long a server is waited for before the consumer is told that the kept state is all there is.
    pub patience: Duration,
}

/// A state that was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) objects: Vec<Update>,
    /// How long ago the file was written last.
    pub(super) age: Duration,
    /// Which endpoints are in it.
    pub(super) covered: Covered,
}

#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("the database cannot be used")]
    Sql(#[from] rusqlite::Error),
    #[error("the file cannot be opened")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Other(String),
}

/// Writes behind what the consumer is told. Dropping it lets the last transaction finish.
#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    objects: HashMap<Key, Update>,
    covered: Option<Covered>,
    complete: bool,
    closed: bool,
}

fn lock(shared: &Shared) -> MutexGuard<'_, Waiting> {
    shared
        .waiting
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Opens the file: the state that was kept, if there is a whole one, and who goes on keeping. Blocks on the disk.
pub(super) fn open(file: &Path, subscription: &str) -> (Option<Found>, Option<Keeper>) {
    let opened = existing(file, subscription).map(|(connection, found)| (connection, Some(found)));
    let opened = opened.or_else(|reason| {
        if file.exists() {
            tracing::warn!(file = %file.display(), reason = %Chain(&reason), "the kept state is not used");
        }
        remove(file);
        Ok::<_, Unusable>((created(file, subscription)?, None))
    });
    let keeper = opened.and_then(|(connection, found)| {
        let shared = Arc::new(Shared::default());
        let (theirs, path) = (Arc::clone(&shared), file.to_owned());
        std::thread::Builder::new()
            .name("kept-state".to_owned())
            .spawn(move || write_behind(connection, &theirs, &path))?;
        Ok((found, Keeper { shared }))
    });
    match keeper {
        Ok((found, keeper)) => (found, Some(keeper)),
        Err(reason) => {
            tracing::warn!(file = %file.display(), reason = %Chain(&reason), "no state is kept for a start without a server");
            (None, None)
        }
    }
}

fn remove(file: &Path) {
    for end in ["", "-wal", "-shm"] {
        let mut name = file.as_os_str().to_owned();
        name.push(end);
        // What is not there need not go; what cannot go is met again when the file is opened.
        let _ = std::fs::remove_file(name);
    }
}

fn connect(file: &Path) -> Result<Connection, Unusable> {
    let connection = Connection::open(file)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // Whole after a power cut, though perhaps without the last transactions.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "max_page_count", MAX_BYTES / PAGE_BYTES)?;
    Ok(connection)
}

fn created(file: &Path, subscription: &str) -> Result<Connection, Unusable> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)?;
    let connection = connect(file)?;
    connection.execute_batch(TABLES)?;
    connection.execute(
        "INSERT INTO state VALUES (0, ?1, 0, 0, ?2)",
        (subscription, text_of_covered(&Covered::default())),
    )?;
    connection.pragma_update(None, "user_version", VERSION)?;
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    Ok(connection)
}

/// The subscription: a state of other kinds, or of another node's part, is another state.
pub(super) fn text_of(kinds: &[Kind], node: Option<&str>) -> String {
    let mut kinds: Vec<String> = kinds.iter().map(Kind::to_string).collect();
    kinds.sort_unstable();
    let mut text = kinds.join(" ");
    if let Some(node) = node {
        text.push_str(" of ");
        text.push_str(node);
    }
    text
}

/// The selectors as JSON; none where every endpoint is there.
fn text_of_covered(covered: &Covered) -> Option<String> {
    match covered {
        Covered::Everything => None,
        Covered::Selectors(selectors) => {
            Some(serde_json::json!(selectors.iter().map(|s| &**s).collect::<Vec<_>>()).to_string())
        }
    }
}

fn covered_of(text: Option<&str>) -> Result<Covered, Unusable> {
    let Some(text) = text else {
        return Ok(Covered::Everything);
    };
    let selectors: Vec<String> = serde_json::from_str(text)
        .map_err(|error| Unusable::Other(format!("the selectors are damaged: {error}")))?;
    let selectors = selectors.into_iter().map(Arc::from).collect();
    Ok(Covered::Selectors(Arc::new(selectors)))
}

fn existing(file: &Path, subscription: &str) -> Result<(Connection, Found), Unusable> {
    let refused = |why: &str| Err(Unusable::Other(why.to_owned()));
    if !file.exists() {
        return refused("there is none");
    }
    let connection = connect(file)?;
    let number = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    if number("application_id")? != APPLICATION_ID {
        return refused("the file is of another program, or was not finished");
    }
    if number("user_version")? != VERSION {
        return refused("the file is of another version");
    }
    let (of, complete, written, covered): (String, bool, i64, Option<String>) = connection
        .query_row(
            "SELECT kinds, complete, written, covered FROM state",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )?;
    if of != subscription {
        return refused("the file is of another subscription");
    }
    if !complete {
        return refused("the state was never complete");
    }
    let objects = {
        let mut statement =
            connection.prepare("SELECT kind, namespace, name, revision, body, sum FROM objects")?;
        let rows = statement.query_and_then([], read)?;
        rows.collect::<Result<Vec<Update>, Unusable>>()?
    };
    let found = Found {
        objects,
        age: now().saturating_sub(Duration::from_secs(u64::try_from(written).unwrap_or(0))),
        covered: covered_of(covered.as_deref())?,
    };
    Ok((connection, found))
}

fn read(row: &rusqlite::Row<'_>) -> Result<Update, Unusable> {
    let fields: [String; 5] = [
        row.get(0)?,
        row.get(1)?,
        row.get(2)?,
        row.get(3)?,
        row.get(4)?,
    ];
    let sum: Vec<u8> = row.get(5)?;
    let [kind, namespace, name, revision, body] = &fields;
    let damaged = |why: String| Unusable::Other(format!("{kind}({namespace}/{name}): {why}"));
    if sum != sum_of(&fields.each_ref().map(String::as_str)) {
        return Err(damaged("the object is damaged".to_owned()));
    }
    let object = AnyResource::from_slice(body.as_bytes());
    Ok(Update {
        key: Key {
            kind: kind
                .parse()
                .map_err(|_| damaged("the kind is unknown".to_owned()))?,
            namespace: (!namespace.is_empty()).then(|| namespace.as_str().into()),
            name: name.as_str().into(),
        },
        value: Some(Arc::new(object.map_err(|e| damaged(e.to_string()))?)),
        revision: Revision::from(revision.as_str()),
    })
}

fn sum_of(fields: &[&str; 5]) -> Vec<u8> {
    let mut hasher = Sha256::new();
    for field in fields {
        hasher.update((field.len() as u64).to_be_bytes());
        hasher.update(field.as_bytes());
    }
    hasher.finalize().to_vec()
}

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

impl Keeper {
    /// Which endpoints the consumer has been told of, once what was noted so far is written.
    pub(super) fn cover(&self, covered: Covered) {
        let mut waiting = lock(&self.shared);
        if !waiting.closed {
            waiting.covered = Some(covered);
            self.shared.arrived.notify_one();
        }
    }

    /// The consumer is told this.
    pub(super) fn note(&self, event: &SyncEvent) {
        let mut waiting = lock(&self.shared);
        if waiting.closed {
            return;
        }
        match event {
            SyncEvent::Status(SyncStatus::InSync) => waiting.complete = true,
            SyncEvent::Status(_) | SyncEvent::Complete(_) => return,
            SyncEvent::Updates(updates) => {
                let new = updates
                    .iter()
                    .map(|update| (update.key.clone(), update.clone()));
                waiting.objects.extend(new);
            }
        }
        self.shared.arrived.notify_one();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        lock(&self.shared).closed = true;
        self.shared.arrived.notify_one();
    }
}

fn write_behind(mut connection: Connection, shared: &Shared, file: &Path) {
    loop {
        let mut waiting = lock(shared);
        while waiting.objects.is_empty()
            && waiting.covered.is_none()
            && !waiting.complete
            && !waiting.closed
        {
            waiting = shared
                .arrived
                .wait(waiting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let objects = std::mem::take(&mut waiting.objects);
        let complete = std::mem::take(&mut waiting.complete);
        let covered = waiting.covered.take();
        let closed = waiting.closed;
        drop(waiting);
        if let Err(reason) = write(&mut connection, objects, complete, covered.as_ref()) {
            // A state that lacks something would be worse than none.
            let mut waiting = lock(shared);
            waiting.closed = true;
            waiting.objects = HashMap::new();
            drop(connection);
            remove(file);
            tracing::warn!(file = %file.display(), reason = %Chain(&reason), "no state is kept any more for a start without a server");
            return;
        }
        if closed {
            return;
        }
        std::thread::sleep(GATHER);
    }
}

fn write(
    connection: &mut Connection,
    objects: HashMap<Key, Update>,
    complete: bool,
    covered: Option<&Covered>,
) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    {
        let mut put = transaction
            .prepare_cached("INSERT OR REPLACE INTO objects VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
        let mut delete = transaction.prepare_cached(
            "DELETE FROM objects WHERE kind = ?1 AND namespace = ?2 AND name = ?3",
        )?;
        for (key, update) in objects {
            let kind = key.kind.to_string();
            let namespace = key.namespace.as_deref().unwrap_or_default();
            match update.value {
                Some(value) => {
                    let body = value.to_json().to_string();
                    let revision = update.revision.as_str();
                    let fields = [
                        kind.as_str(),
                        namespace,
                        &*key.name,
                        revision,
                        body.as_str(),
                    ];
                    let [kind, namespace, name, revision, body] = fields;
                    let sum = sum_of(&fields);
                    put.execute((kind, namespace, name, revision, body, sum))?;
                }
                None => {
                    delete.execute((kind, namespace, &*key.name))?;
                }
            }
        }
    }
    transaction.execute(
        "UPDATE state SET written = ?1, complete = complete OR ?2",
        (i64::try_from(now().as_secs()).unwrap_or(i64::MAX), complete),
    )?;
    if let Some(covered) = covered {
        transaction.execute("UPDATE state SET covered = ?1", [text_of_covered(covered)])?;
    }
    transaction.commit()
}
