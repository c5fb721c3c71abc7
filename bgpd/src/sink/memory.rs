//! A table in memory that can be looked at, for tests and for speakers that only pass routes on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Path, Sink};
use crate::wire::{Family, Prefix};

/// What has come out of a speaker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Best paths.
    pub paths: BTreeMap<Prefix, Path>,
    /// Families whose synchronisation has ended.
    pub synced: BTreeSet<Family>,
    /// Prefixes that lost their path, in order.
    pub removed: Vec<Prefix>,
}

/// A sink that keeps everything in memory. Clones share the contents.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    contents: Arc<Mutex<Contents>>,
}

impl Memory {
    /// A copy of what is there.
    #[must_use]
    pub fn contents(&self) -> Contents {
        self.contents
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn with(&self, change: impl FnOnce(&mut Contents)) {
        change(&mut self.contents.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Sink for Memory {
    fn set(&mut self, prefix: Prefix, path: Option<Path>) {
        self.with(|c| match path {
            Some(path) => {
                c.paths.insert(prefix, path);
            }
            None => c.removed.extend(c.paths.remove(&prefix).map(|_| prefix)),
        });
    }

    fn flush(&mut self) {}

    fn end_of_sync(&mut self, family: Family) {
        self.with(|c| {
            c.synced.insert(family);
        });
    }
}
