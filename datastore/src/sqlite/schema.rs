//! Tables and pragmas of the embedded store, and how a file comes to have them.
//!
//! `changes` is the log that watches read; its row id is the revision of the whole store. The first revision of a new
//! file is taken from the clock, so that a revision of a deleted and re-created file is never mistaken for one of this file.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use crate::error::Error;

/// "Cali" as SQLite's application id: refuses to write into somebody else's database.
const APPLICATION_ID: i32 = 0x4361_6c69;
/// Version of the tables below.
const SCHEMA_VERSION: i32 = 1;
/// How long a write waits for the writer of another process.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

const TABLES: &str = "
CREATE TABLE objects (
    kind      TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name      TEXT NOT NULL,
    revision  INTEGER NOT NULL,
    body      TEXT NOT NULL,
    UNIQUE (kind, namespace, name)
) STRICT;
CREATE TABLE changes (
    revision  INTEGER PRIMARY KEY AUTOINCREMENT,
    kind      TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name      TEXT NOT NULL,
    body      TEXT
) STRICT;
CREATE INDEX changes_by_kind ON changes (kind, revision);
CREATE TABLE log (
    id        INTEGER PRIMARY KEY CHECK (id = 0),
    compacted INTEGER NOT NULL
) STRICT;
";

/// Opens the file, making it (mode 0600, which SQLite copies to its `-wal` and `-shm` files) and its tables if needed.
pub(super) fn open(path: &Path) -> Result<Connection, Error> {
    let failed = |e: std::io::Error| Error::unavailable(format!("open {}", path.display()), e);
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let mut connection = connect(path)?;
    prepare(&mut connection).map_err(|e| match e {
        Prepare::Sql(e) => Error::unavailable(format!("open {}", path.display()), e),
        Prepare::Foreign(text) => Error::unavailable(format!("open {}", path.display()), text),
    })?;
    Ok(connection)
}

/// One more connection to a prepared file.
pub(super) fn connect(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        write_ahead(&connection)?;
        // Every commit reaches the disk: an address that was claimed stays claimed after a power cut.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.set_prepared_statement_cache_capacity(64);
        Ok(connection)
    };
    open().map_err(|e| Error::unavailable(format!("open {}", path.display()), e))
}

/// Turns on the write-ahead log. SQLite's own waiting does not cover this switch: while several processes open a new
/// file at the same time, all but one are told at once that it is busy.
fn write_ahead(connection: &Connection) -> rusqlite::Result<()> {
    let limit = std::time::Instant::now() + BUSY_TIMEOUT;
    loop {
        let switched = connection.pragma_update(None, "journal_mode", "WAL");
        let busy = switched
            .as_ref()
            .err()
            .and_then(rusqlite::Error::sqlite_error_code)
            == Some(rusqlite::ErrorCode::DatabaseBusy);
        if !busy || std::time::Instant::now() >= limit {
            return switched;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

enum Prepare {
    Sql(rusqlite::Error),
    Foreign(String),
}

impl From<rusqlite::Error> for Prepare {
    fn from(e: rusqlite::Error) -> Self {
        Self::Sql(e)
    }
}

fn prepare(connection: &mut Connection) -> Result<(), Prepare> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let pragma =
        |name: &str| transaction.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    let (application, version) = (pragma("application_id")?, pragma("user_version")?);
    match (application, version) {
        (APPLICATION_ID, SCHEMA_VERSION) => return Ok(()),
        (APPLICATION_ID, other) => {
            return Err(Prepare::Foreign(format!(
                "the file has schema version {other}, this program knows {SCHEMA_VERSION}"
            )));
        }
        (0, 0) => {}
        _ => {
            return Err(Prepare::Foreign(
                "the file is a database of another program".to_owned(),
            ));
        }
    }
    let tables: i64 =
        transaction.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if tables != 0 {
        return Err(Prepare::Foreign(
            "the file is a database of another program".to_owned(),
        ));
    }
    transaction.execute_batch(TABLES)?;
    let first = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(1, |d| i64::try_from(d.as_millis()).unwrap_or(1));
    transaction.execute(
        "INSERT INTO sqlite_sequence (name, seq) VALUES ('changes', ?1)",
        [first],
    )?;
    transaction.execute("INSERT INTO log (id, compacted) VALUES (0, ?1)", [first])?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()?;
    Ok(())
}
