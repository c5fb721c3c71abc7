//! The journal: records on disk before anything is answered from them.
//!
//! A file of JSON lines. The first names format, version and node; each further line is one [`Record`]. Appends are
//! synced before they count; a torn last line (power cut) was never answered from and is cut off. Now and then the file
//! is replaced by the shortest equivalent one (temporary file, sync, rename). One process at a time: the file is locked.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::state::{Record, State};
use crate::error::Error;

const FORMAT: &str = "cali-address-journal";
const VERSION: u32 = 1;
/// The file is rewritten when it holds this many more lines than it needs.
const SLACK: usize = 2000;

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
    node: String,
}

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    node: String,
    file: File,
    lines: usize,
    /// An append failed: the end of the file is unknown and must be rewritten before the next one.
    damaged: bool,
    _lock: File,
}

impl Journal {
    /// Opens or creates the journal of a node and replays it into `state`.
    pub fn open(path: &Path, node: &str, state: &mut State) -> Result<Self, Error> {
        let failed = |operation| {
            move |source| Error::Journal {
                operation,
                path: path.display().to_string(),
                source,
            }
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
        }
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600);
            options.open(path)
        };
        // The lock is on a file of its own, because the journal is replaced by renaming.
        let lock = open(&path.with_extension("lock")).map_err(failed("lock"))?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => Error::ForeignJournal {
                path: path.display().to_string(),
                reason: "another process of this node has it open".to_owned(),
            },
            TryLockError::Error(source) => failed("lock")(source),
        })?;
        let mut file = open(path).map_err(failed("open"))?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed("read"))?;
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        if complete < text.len() {
            tracing::warn!(path = %path.display(), "cut off an unfinished entry at the end of the address journal");
            file.set_len(complete as u64).map_err(failed("repair"))?;
        }
        let mut journal = Self {
            path: path.to_owned(),
            node: node.to_owned(),
            file,
            lines: 0,
            damaged: false,
            _lock: lock,
        };
        if complete == 0 {
            journal.rewrite(state).map_err(failed("start"))?;
            return Ok(journal);
        }
        journal.replay(&text[..complete], state)?;
        journal
            .file
            .seek(SeekFrom::End(0))
            .map_err(failed("read"))?;
        Ok(journal)
    }

    fn replay(&mut self, text: &str, state: &mut State) -> Result<(), Error> {
        let foreign = |reason: String| Error::ForeignJournal {
            path: self.path.display().to_string(),
            reason,
        };
        let mut lines = text.lines();
        let header: Header = lines
            .next()
            .and_then(|line| serde_json::from_str(line).ok())
            .ok_or_else(|| foreign("its first line is not a journal's".to_owned()))?;
        if header.format != FORMAT || header.version != VERSION {
            return Err(foreign(format!(
                "it is {} version {}, this program reads {FORMAT} version {VERSION}",
                header.format, header.version
            )));
        }
        if header.node != self.node {
            return Err(foreign(format!(
                "it is of node {}, not of {}",
                header.node, self.node
            )));
        }
        let mut count = 1;
        for line in lines {
            count += 1;
            let record: Record =
                serde_json::from_str(line).map_err(|e| foreign(format!("line {count}: {e}")))?;
            state.apply(&record);
        }
        self.lines = count;
        Ok(())
    }

    /// Writes records and waits until the disk has them. On error none of them counts.
    pub fn append(&mut self, records: &[Record], state: &State) -> Result<(), Error> {
        self.try_append(records, state).map_err(|source| {
            self.damaged = true;
            Error::Journal {
                operation: "write",
                path: self.path.display().to_string(),
                source,
            }
        })
    }

    fn try_append(&mut self, records: &[Record], state: &State) -> io::Result<()> {
        if self.damaged || self.lines > state.records().len() + SLACK {
            self.rewrite(state)?;
        }
        let mut bytes = Vec::new();
        for record in records {
            serde_json::to_writer(&mut bytes, record)?;
            bytes.push(b'\n');
        }
        self.file.write_all(&bytes)?;
        self.file.sync_data()?;
        self.lines += records.len();
        Ok(())
    }

    fn rewrite(&mut self, state: &State) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        let header = Header {
            format: FORMAT.to_owned(),
            version: VERSION,
            node: self.node.clone(),
        };
        let mut bytes = serde_json::to_vec(&header)?;
        bytes.push(b'\n');
        let records = state.records();
        for record in &records {
            serde_json::to_writer(&mut bytes, record)?;
            bytes.push(b'\n');
        }
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &self.path)?;
        if let Some(folder) = self.path.parent() {
            File::open(folder)?.sync_all()?;
        }
        self.file = file;
        self.lines = records.len() + 1;
        self.damaged = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owner::Owner;
    use crate::reserve::state::Held;

    fn empty() -> State {
        State::new(Owner::new("cali-reserve-n1"))
    }

    fn hold(last: u8) -> Record {
        Record::Hold(Held {
            address: [10, 0, 0, last].into(),
            block: "10.0.0.0/26".parse().unwrap(),
            pool: "one".to_owned(),
        })
    }

    fn append(journal: &mut Journal, state: &mut State, record: Record) {
        journal
            .append(std::slice::from_ref(&record), state)
            .unwrap();
        state.apply(&record);
    }

    #[test]
    fn what_was_appended_is_there_after_a_restart_and_a_torn_line_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut state = empty();
        {
            let mut journal = Journal::open(&path, "n1", &mut state).unwrap();
            append(&mut journal, &mut state, hold(1));
            append(&mut journal, &mut state, hold(2));
        }
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"hold\":{\"addr");
        std::fs::write(&path, bytes).unwrap();
        let mut again = empty();
        let mut journal = Journal::open(&path, "n1", &mut again).unwrap();
        assert_eq!(again, state);
        append(&mut journal, &mut again, hold(3));
        drop(journal);
        let mut third = empty();
        Journal::open(&path, "n1", &mut third).unwrap();
        assert_eq!(third, again);
    }

    #[test]
    fn a_second_process_and_another_node_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let first = Journal::open(&path, "n1", &mut empty()).unwrap();
        let second = Journal::open(&path, "n1", &mut empty()).unwrap_err();
        assert!(second.to_string().contains("another process"), "{second}");
        drop(first);
        let other = Journal::open(&path, "n2", &mut empty()).unwrap_err();
        assert!(other.to_string().contains("of node n1"), "{other}");
    }

    #[test]
    fn a_long_journal_is_rewritten_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut state = empty();
        let mut journal = Journal::open(&path, "n1", &mut state).unwrap();
        append(&mut journal, &mut state, hold(1));
        let noise = vec![
            Record::Clean {
                addresses: Vec::new()
            };
            SLACK + 10
        ];
        journal.append(&noise, &state).unwrap();
        append(&mut journal, &mut state, hold(2));
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert_eq!(lines, 3, "header, the first hold, the second hold");
        drop(journal);
        let mut again = empty();
        Journal::open(&path, "n1", &mut again).unwrap();
        assert_eq!(again.free().count(), 2);
    }

    #[test]
    fn a_journal_of_a_newer_version_is_refused_not_guessed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        std::fs::write(
            &path,
            "{\"format\":\"cali-address-journal\",\"version\":2,\"node\":\"n1\"}\n",
        )
        .unwrap();
        let error = Journal::open(&path, "n1", &mut empty()).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
    }
}
