//! What a connection keeps of a client that asks for a part of the endpoints, and what comes next for it.
//!
//! Endpoints are a stream of their own beside the other kinds, with its own cursor into the same changes. A change of the selectors
//! is taken up when the former one is done: what is to be sent by it is a list of endpoints, looked up when each is
//! sent, so that the newest version is; what changes meanwhile follows from the cursor.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use cali_api::Key;

use super::conn::CloseReason;
use crate::cache::{Cache, KindSet, Next};
use crate::scope::{Change, Interest};
use crate::wire::{
    Body, MAX_SELECTOR_BYTES, MAX_SELECTORS, Scope, ScopeChange, ScopeDone, ScopeStart, frame,
};

/// What a stream of changes has for the client.
#[derive(Debug)]
pub(super) enum Step {
    /// This.
    Frame(Bytes),
    /// Nothing more.
    UpToDate,
    /// See [`Next::Forgotten`].
    Forgotten,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Scoped {
    interest: Interest,
    /// The selectors that the client has named, and their length.
    wanted: BTreeSet<Arc<str>>,
    bytes: usize,
    /// Number of a change that was told whole and has not been taken up.
    told: Option<u64>,
    /// Number of the one that is in force.
    taken: u64,
    cursor: u64,
    /// The client may hold newer versions than shared deltas have.
    catching_up: bool,
    work: Option<Items>,
    /// Where the cursor was to get before the change that is in force is answered: what was not sent yet when it was taken up
    /// may be part of what it asks for.
    answer_at: Option<u64>,
}

/// Endpoints that are to be sent.
#[derive(Debug)]
pub(super) enum Items {
    Some {
        add: Vec<u32>,
        added: usize,
        remove: Vec<Key>,
        removed: usize,
    },
    All {
        next: usize,
        pages: usize,
    },
}

impl Items {
    /// The next piece; `None` at the end, `Some(None)` for a piece without objects.
    pub(super) fn take(&mut self, cache: &mut Cache, interest: &Interest) -> Option<Option<Bytes>> {
        match self {
            Self::Some { add, added, .. } if *added < add.len() => {
                let (frame, taken) = cache.endpoints(interest, &add[*added..]);
                *added += taken;
                Some(frame)
            }
            Self::Some {
                remove, removed, ..
            } if *removed < remove.len() => {
                let (frame, taken) = cache.removals(interest, &remove[*removed..]);
                *removed += taken;
                Some(frame)
            }
            Self::All { next, pages } if *next < *pages => {
                *next += 1;
                Some(cache.page(KindSet::endpoints(), *next - 1, *pages))
            }
            _ => None,
        }
    }

    fn of(add: Vec<u32>, remove: Vec<Key>) -> Self {
        Self::Some {
            add,
            added: 0,
            remove,
            removed: 0,
        }
    }
}

impl Scoped {
    pub(super) fn new(scope: &Scope) -> Self {
        Self {
            interest: Interest::of_node(&scope.node),
            wanted: BTreeSet::new(),
            bytes: 0,
            told: None,
            taken: 0,
            cursor: 0,
            catching_up: true,
            work: None,
            answer_at: None,
        }
    }

    pub(super) fn on_change(&mut self, change: ScopeChange) -> Result<(), CloseReason> {
        for text in &change.remove {
            if self.wanted.remove(text.as_str()) {
                self.bytes -= text.len();
            }
        }
        for text in change.add {
            let length = text.len();
            if self.wanted.insert(text.into()) {
                self.bytes += length;
            }
        }
        if self.wanted.len() > MAX_SELECTORS || self.bytes > MAX_SELECTOR_BYTES {
            return Err(CloseReason::TooManySelectors);
        }
        if !change.more {
            self.told = Some(change.id);
        }
        Ok(())
    }

    /// Whether the client has said what it wants.
    pub(super) fn is_told(&self) -> bool {
        self.told.is_some()
    }

    /// Number of the change that is in force.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    pub(super) fn is_everything(&self) -> bool {
        self.interest.is_everything()
    }

    pub(super) fn interest(&self) -> &Interest {
        &self.interest
    }

    /// A snapshot begins, which has everything that the client asks for by now.
    pub(super) fn begin(&mut self, cache: &mut Cache) {
        cache.begin_interest(&mut self.interest);
        if let Some(id) = self.told.take() {
            cache.change_interest(&mut self.interest, &self.wanted, self.cursor);
            self.taken = id;
        }
        self.work = None;
        self.answer_at = None;
        self.cursor = cache.head();
        self.catching_up = true;
    }

    /// What a snapshot has to send beside its pages: of these buckets, or all.
    pub(super) fn snapshot(&self, cache: &Cache, stale: Option<(&[u32], usize)>) -> Option<Items> {
        (!self.is_everything())
            .then(|| Items::of(cache.all_in_scope(&self.interest, stale), Vec::new()))
    }

    /// Takes up what the client has asked for, when nothing else is open. What comes before the endpoints, if anything does.
    pub(super) fn take_up(&mut self, cache: &mut Cache) -> Option<Bytes> {
        if self.work.is_some() || self.answer_at.is_some() {
            return None;
        }
        self.taken = self.told.take()?;
        self.answer_at = Some(cache.head());
        match cache.change_interest(&mut self.interest, &self.wanted, self.cursor) {
            Change::Items { add, remove } => {
                self.work = Some(Items::of(add, remove));
                None
            }
            Change::Everything => {
                let pages = cache.page_count();
                self.work = Some(Items::All { next: 0, pages });
                self.catching_up = true;
                None
            }
            Change::Only(all) => {
                self.work = Some(Items::of(all, Vec::new()));
                self.cursor = cache.head();
                Some(frame(Body::ScopeStart(ScopeStart {}), false))
            }
        }
    }

    /// The next frame.
    pub(super) fn step(&mut self, cache: &mut Cache) -> Step {
        while let Some(work) = &mut self.work {
            match work.take(cache, &self.interest) {
                Some(Some(frame)) => return Step::Frame(frame),
                Some(None) => {}
                None => self.work = None,
            }
        }
        loop {
            if self.answer_at.is_some_and(|at| self.cursor >= at) {
                self.answer_at = None;
                let done = ScopeDone { id: self.taken };
                return Step::Frame(frame(Body::ScopeDone(done), false));
            }
            let kinds = KindSet::endpoints();
            let next = match (self.is_everything(), self.catching_up) {
                (false, _) => cache.newest_in_scope(&self.interest, self.cursor),
                (true, false) => cache.next(kinds, self.cursor),
                (true, true) => cache.newest_since(kinds, self.cursor),
            };
            match next {
                Next::UpToDate => {
                    self.catching_up = false;
                    return Step::UpToDate;
                }
                Next::Forgotten => return Step::Forgotten,
                Next::Frame { frame, cursor } => {
                    self.cursor = cursor;
                    if let Some(frame) = frame {
                        return Step::Frame(frame);
                    }
                }
            }
        }
    }

    /// The client is gone.
    pub(super) fn end(self, cache: &mut Cache) {
        cache.end_interest(self.interest);
    }
}

/// The next frame of the other kinds; `exact` for a client that holds exactly what was there at the cursor.
pub(super) fn follow(cache: &mut Cache, kinds: KindSet, cursor: &mut u64, exact: bool) -> Step {
    loop {
        let next = if exact {
            cache.next(kinds, *cursor)
        } else {
            cache.newest_since(kinds, *cursor)
        };
        match next {
            Next::UpToDate => return Step::UpToDate,
            Next::Forgotten => return Step::Forgotten,
            Next::Frame {
                frame,
                cursor: after,
            } => {
                *cursor = after;
                if let Some(frame) = frame {
                    return Step::Frame(frame);
                }
            }
        }
    }
}
