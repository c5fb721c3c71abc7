//! What a consumer asks for of the endpoints, seen from the client: what a server has been told, and what all is held of.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::interest::{Selectors, Wanted, on_wire};
use crate::wire::{self, Body, ScopeChange};

/// Near this size a change is cut.
const PIECE: usize = 32 * 1024;

/// The selectors of which every endpoint is held that the last server had. Outlives connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Covered {
    /// Every endpoint is held.
    Everything,
    /// The node's, and those that these select.
    Selectors(Selectors),
}

impl Default for Covered {
    fn default() -> Self {
        Self::Selectors(Selectors::default())
    }
}

impl Covered {
    fn has(&self, selectors: &BTreeSet<Arc<str>>) -> bool {
        match self {
            Self::Everything => true,
            Self::Selectors(own) => selectors.is_subset(own),
        }
    }

    fn narrowed(&self, to: &Selectors) -> Self {
        Self::Selectors(match self {
            Self::Everything => Arc::clone(to),
            Self::Selectors(own) if own.is_subset(to) => Arc::clone(own),
            Self::Selectors(own) => Arc::new(own.intersection(to).cloned().collect()),
        })
    }
}

/// What is known of the consumer's wishes. Lives as long as the consumer.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    covered: Covered,
    wanted: Wanted,
    answered: u64,
    /// Whether the disk has not been told.
    changed: bool,
}

impl Coverage {
    /// What is asked for now.
    pub(super) fn want(&mut self, wanted: Wanted) {
        if wanted.number > self.wanted.number {
            self.wanted = wanted;
        }
    }

    /// Somebody else says what is held.
    pub(super) fn set(&mut self, covered: Covered) {
        self.changed |= covered != self.covered;
        self.covered = covered;
    }

    /// The number of what is asked for, if that is held and has not been said.
    pub(super) fn answer(&mut self) -> Option<u64> {
        if self.wanted.number <= self.answered || !self.covered.has(&self.wanted.selectors) {
            return None;
        }
        self.answered = self.wanted.number;
        Some(self.answered)
    }

    /// What is held, if that has changed since it was asked for.
    pub(super) fn take_changed(&mut self) -> Option<Covered> {
        std::mem::take(&mut self.changed).then(|| self.covered.clone())
    }

    /// What a server is asked for: until the consumer has said anything, what it asked for in its last life.
    fn to_ask(&self) -> Wanted {
        match &self.covered {
            Covered::Selectors(own) if self.wanted.number == 0 => Wanted {
                number: 0,
                selectors: Arc::clone(own),
            },
            _ => self.wanted.clone(),
        }
    }
}

/// One server's part.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Whether the server takes part.
    pub(super) scoped: bool,
    /// What it has been told of the wire's selectors.
    told: Selectors,
    /// What was told and is not answered, with the consumer's selectors.
    open: VecDeque<Wanted>,
    last: Option<u64>,
}

impl Asked {
    /// Tells the server what is new, in frames.
    pub(super) fn tell(&mut self, coverage: &mut Coverage) -> Vec<Bytes> {
        let wanted = coverage.to_ask();
        if !self.scoped || self.last.is_some_and(|last| wanted.number <= last) {
            return Vec::new();
        }
        self.last = Some(wanted.number);
        // From here on the server stops telling of what is no longer asked for.
        let narrowed = coverage.covered.narrowed(&wanted.selectors);
        coverage.set(narrowed);
        let selectors = on_wire(&wanted.selectors);
        let frames = changes(wanted.number, &self.told, &selectors);
        self.told = selectors;
        self.open.push_back(wanted);
        frames
            .into_iter()
            .map(|change| wire::frame(Body::ScopeChange(change), false))
            .collect()
    }

    /// The server has sent what the change of this number asked for.
    pub(super) fn on_done(&mut self, id: u64, coverage: &mut Coverage) {
        if !self.scoped {
            return coverage.set(Covered::Everything);
        }
        while let Some(open) = self.open.front()
            && open.number <= id
        {
            coverage.set(Covered::Selectors(Arc::clone(&open.selectors)));
            self.open.pop_front();
        }
        // What has been taken back since then may be forgotten already.
        for later in &self.open {
            let narrowed = coverage.covered.narrowed(&later.selectors);
            coverage.set(narrowed);
        }
    }
}

/// The difference of two sets, in pieces that fit into frames; at least one.
fn changes(id: u64, from: &Selectors, to: &Selectors) -> Vec<ScopeChange> {
    let mut all = Vec::new();
    let mut piece = ScopeChange {
        id,
        ..ScopeChange::default()
    };
    let mut size = 0;
    let gone = from.difference(to).map(|text| (text, false));
    for (text, new) in gone.chain(to.difference(from).map(|text| (text, true))) {
        if size + text.len() > PIECE {
            let full = ScopeChange {
                more: true,
                ..std::mem::take(&mut piece)
            };
            all.push(full);
            piece.id = id;
            size = 0;
        }
        // Tag and length of each.
        size += text.len() + 4;
        let list = if new {
            &mut piece.add
        } else {
            &mut piece.remove
        };
        list.push(text.to_string());
    }
    all.push(piece);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(texts: &[&str]) -> Selectors {
        Arc::new(texts.iter().map(|text| Arc::from(*text)).collect())
    }

    fn wanted(number: u64, texts: &[&str]) -> Wanted {
        Wanted {
            number,
            selectors: set(texts),
        }
    }

    #[test]
    fn only_what_is_held_of_every_selector_is_answered() {
        let (mut coverage, mut asked) = (Coverage::default(), Asked::default());
        asked.scoped = true;
        assert_eq!(
            asked.tell(&mut coverage).len(),
            1,
            "the first is empty, and said"
        );
        asked.on_done(0, &mut coverage);
        coverage.want(wanted(1, &["a", "b"]));
        assert_eq!(coverage.answer(), None);
        asked.tell(&mut coverage);
        coverage.want(wanted(2, &["b", "c"]));
        asked.tell(&mut coverage);
        asked.on_done(1, &mut coverage);
        assert_eq!(coverage.answer(), None, "c is not held");
        // Less than what is asked for needs no server.
        coverage.want(wanted(3, &["b"]));
        assert_eq!(coverage.answer(), Some(3));
        coverage.want(wanted(4, &["a", "b"]));
        assert_eq!(coverage.answer(), None, "a was taken back");
        asked.tell(&mut coverage);
        asked.on_done(4, &mut coverage);
        assert_eq!(coverage.answer(), Some(4));
        assert_eq!(coverage.answer(), None, "once");
    }

    #[test]
    fn a_server_without_scopes_covers_everything() {
        let (mut coverage, mut asked) = (Coverage::default(), Asked::default());
        coverage.want(wanted(1, &["a"]));
        assert_eq!(asked.tell(&mut coverage), Vec::<Bytes>::new());
        asked.on_done(0, &mut coverage);
        assert_eq!(coverage.answer(), Some(1));
        coverage.want(wanted(2, &["b"]));
        assert_eq!(coverage.answer(), Some(2));
    }

    #[test]
    fn long_changes_come_in_pieces_that_add_up() {
        let (from, to) = (set(&["x", "y"]), {
            let many = (0..3000).map(|n| Arc::from(format!("app == 'a{n}' && role == 'b'")));
            Arc::new(many.collect::<BTreeSet<Arc<str>>>())
        });
        let pieces = changes(7, &from, &to);
        assert!(pieces.len() > 2);
        let (last, others) = pieces.split_last().unwrap();
        assert!(!last.more && others.iter().all(|piece| piece.more));
        let mut sum: BTreeSet<Arc<str>> = (*from).clone();
        for piece in &pieces {
            assert_eq!(piece.id, 7);
            let frame = wire::frame(Body::ScopeChange(piece.clone()), false);
            assert!(frame.len() < wire::MAX_FROM_CLIENT);
            piece
                .remove
                .iter()
                .for_each(|text| assert!(sum.remove(text.as_str())));
            sum.extend(piece.add.iter().map(|text| Arc::from(text.as_str())));
        }
        assert_eq!(sum, *to);
    }
}
