//! The tail of the change log: noticing commits, and feeding watches from the log.
//!
//! Commits of other processes are noticed by polling `PRAGMA data_version`, which reads shared memory and costs 6 µs
//! (measured; a change is seen elsewhere after at most one interval, within the process after some microseconds). inotify on the `-wal` file would tell before the commit is visible (SQLite publishes the commit in the
//! memory-mapped `-shm` file after the write, which inotify does not see), so a poll would be needed behind it anyway.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak, mpsc as channel};
use std::thread;
use std::time::Duration;

use cali_api::{Kind, Revision};
use rusqlite::Connection;
use tokio::sync::{mpsc, watch};

use super::{Inner, decode, key_of};
use crate::error::Error;
use crate::store::WatchEvent;

/// How often commits of other processes are looked for.
const POLL: Duration = Duration::from_millis(20);
/// Rows read from the log at once.
const BATCH: u32 = 256;
/// A watch that sees nothing of its kinds is told how far the log went, after this many changes of other kinds.
const BOOKMARK_EVERY: i64 = 256;

/// The newest revision known, and the thread that looks for commits of other processes.
pub(super) struct Tail {
    latest: Arc<watch::Sender<i64>>,
    // Dropped with the store: the thread sees it at its next poll and ends.
    _stop: channel::Sender<()>,
}

impl Tail {
    pub(super) fn start(connection: Connection, latest: i64) -> Result<Self, Error> {
        let latest = Arc::new(watch::Sender::new(latest));
        let (stop, stopped) = channel::channel();
        let shared = Arc::clone(&latest);
        thread::Builder::new()
            .name("sqlite-tail".to_owned())
            .spawn(move || poll(&connection, &shared, &stopped))
            .map_err(|e| Error::unavailable("start the thread that follows the change log", e))?;
        Ok(Self {
            latest,
            _stop: stop,
        })
    }

    /// A commit of this process.
    pub(super) fn advance(&self, revision: i64) {
        advance(&self.latest, revision);
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<i64> {
        self.latest.subscribe()
    }
}

fn advance(latest: &watch::Sender<i64>, revision: i64) {
    latest.send_if_modified(|known| {
        let newer = revision > *known;
        if newer {
            *known = revision;
        }
        newer
    });
}

fn poll(connection: &Connection, latest: &watch::Sender<i64>, stopped: &channel::Receiver<()>) {
    let mut seen = None;
    let mut failing = false;
    loop {
        let result = data_version(connection).and_then(|version| {
            if seen == Some(version) {
                return Ok(());
            }
            advance(latest, self::latest(connection)?);
            seen = Some(version);
            Ok(())
        });
        if let Err(e) = &result
            && !failing
        {
            tracing::warn!(error = %e, "cannot look for changes in the datastore");
        }
        failing = result.is_err();
        match stopped.recv_timeout(POLL) {
            Err(channel::RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(channel::RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("PRAGMA data_version")?
        .query_row([], |row| row.get(0))
}

/// The revision of the newest change.
pub(super) fn latest(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'changes'")?
        .query_row([], |row| row.get(0))
}

/// True if the log holds every change after `from`.
pub(super) fn check(connection: &Connection, from: i64) -> rusqlite::Result<bool> {
    let compacted: i64 = connection
        .prepare_cached("SELECT compacted FROM log")?
        .query_row([], |row| row.get(0))?;
    Ok(from >= compacted && from <= latest(connection)?)
}

/// What one look into the log gave.
struct Page {
    events: Vec<WatchEvent>,
    /// Everything up to here has been looked at.
    upto: i64,
    more: bool,
}

fn page(
    connection: &mut Connection,
    kinds: &BTreeMap<String, Kind>,
    from: i64,
) -> rusqlite::Result<Option<Page>> {
    let transaction = connection.transaction()?;
    if !check(&transaction, from)? {
        return Ok(None);
    }
    let newest = latest(&transaction)?;
    let mut page = Page {
        events: Vec::new(),
        upto: newest,
        more: false,
    };
    {
        let marks = vec!["?"; kinds.len()].join(",");
        let sql = format!(
            "SELECT revision, kind, namespace, name, body FROM changes
             WHERE revision > {from} AND kind IN ({marks}) ORDER BY revision LIMIT {BATCH}"
        );
        let mut statement = transaction.prepare(&sql)?;
        let mut rows = statement.query(rusqlite::params_from_iter(kinds.keys()))?;
        let mut last = from;
        while let Some(row) = rows.next()? {
            last = row.get(0)?;
            let Some(kind) = kinds.get(row.get_ref(1)?.as_str()?) else {
                continue;
            };
            let key = key_of(*kind, row.get_ref(2)?.as_str()?, row.get_ref(3)?.as_str()?);
            page.events.push(match row.get_ref(4)?.as_str_or_null()? {
                None => WatchEvent::Deleted {
                    key,
                    revision: Revision::from(last.to_string()),
                },
                Some(body) => match decode(&key, last, body) {
                    Ok(object) => WatchEvent::Put(object),
                    Err(bad) => WatchEvent::Undecodable(bad),
                },
            });
        }
        if page.events.len() >= BATCH as usize {
            page.upto = last;
            page.more = true;
        }
    }
    Ok(Some(page))
}

/// Feeds one watch until its reader goes away, the store is closed, or the log no longer reaches back.
pub(super) async fn follow(
    store: Weak<Inner>,
    kinds: BTreeMap<String, Kind>,
    mut from: i64,
    sender: mpsc::Sender<Result<WatchEvent, Error>>,
) {
    let kinds = Arc::new(kinds);
    let Some(mut latest) = store.upgrade().map(|inner| inner.tail.subscribe()) else {
        return;
    };
    let mut told = from;
    loop {
        let newest = *latest.borrow_and_update();
        while from < newest {
            let Some(inner) = store.upgrade() else { return };
            let wanted = Arc::clone(&kinds);
            let result = super::blocking(move || {
                inner.read(|connection| {
                    page(connection, &wanted, from)
                        .map_err(|e| Error::unavailable("read the change log", e))
                })
            })
            .await;
            let page = match result {
                Ok(Some(page)) => page,
                Ok(None) => {
                    let revision = Revision::from(from.to_string());
                    let _ = sender.send(Err(Error::RevisionGone { revision })).await;
                    return;
                }
                Err(e) => {
                    let _ = sender.send(Err(e)).await;
                    return;
                }
            };
            if !page.events.is_empty() {
                told = page.upto;
            }
            for event in page.events {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            from = page.upto;
            if from - told >= BOOKMARK_EVERY {
                // Lets an idle watch resume from here later, instead of from a revision that the log has lost.
                told = from;
                let bookmark = WatchEvent::Bookmark(Revision::from(from.to_string()));
                if sender.send(Ok(bookmark)).await.is_err() {
                    return;
                }
            }
        }
        if latest.changed().await.is_err() {
            return;
        }
    }
}
