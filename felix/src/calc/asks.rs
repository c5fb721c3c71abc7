//! What the graph asks for of other nodes' endpoints, and what of it has come.
//!
//! A selector is asked for while a set uses it. It is complete when an answer has come to a number from which on it was asked for
//! all the while; that less is asked for makes nothing incomplete.

use std::collections::BTreeSet;
use std::sync::Arc;

use cali_api::selector::Selector;
use foldhash::HashMap;

struct Want {
    users: usize,
    /// Number of what was asked for when it was first among it.
    since: u64,
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Asks {
    /// Whether endpoints come as they are asked for; otherwise all of them do.
    scoped: bool,
    wants: HashMap<Arc<str>, Want>,
    number: u64,
    changed: bool,
    complete: u64,
    begun: bool,
}

impl Asks {
    /// Endpoints come as they are asked for.
    pub(super) fn scoped() -> Self {
        Self {
            scoped: true,
            // The first time is always said.
            changed: true,
            ..Self::default()
        }
    }

    /// One more set uses the selector.
    pub(super) fn want(&mut self, scope: &Selector) -> Option<Arc<str>> {
        if !self.scoped {
            return None;
        }
        let text: Arc<str> = scope.to_string().into();
        let since = self.number + 1;
        let changed = &mut self.changed;
        let want = self.wants.entry(text.clone()).or_insert_with(|| {
            *changed = true;
            Want { users: 0, since }
        });
        want.users += 1;
        Some(text)
    }

    /// One set less.
    pub(super) fn drop(&mut self, text: &str) {
        let Some(want) = self.wants.get_mut(text) else {
            return;
        };
        want.users -= 1;
        if want.users == 0 {
            self.wants.remove(text);
            self.changed = true;
        }
    }

    /// What was asked for under this number, and before, is here.
    pub(super) fn on_complete(&mut self, number: u64) {
        self.complete = self.complete.max(number);
    }

    /// Whether every endpoint that it selects is known.
    pub(super) fn is_complete(&self, text: &str) -> bool {
        self.wants
            .get(text)
            .is_none_or(|want| want.since <= self.complete)
    }

    /// Whether anything may be said at all: once, everything that was asked for was here. Before that a consumer would take what is
    /// held back for gone.
    pub(super) fn has_begun(&mut self) -> bool {
        let complete = self.complete;
        self.begun |= !self.scoped || self.wants.values().all(|want| want.since <= complete);
        self.begun
    }

    /// What is asked for, when that has changed.
    pub(super) fn take(&mut self) -> Option<(u64, BTreeSet<Arc<str>>)> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        self.number += 1;
        Some((self.number, self.wants.keys().cloned().collect()))
    }
}
