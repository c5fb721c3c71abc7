//! Ways that nobody is to send any more: first the node takes its word back, then the way ends. Pure.
//!
//! A device that went before the word would be sent to by whoever reads the former word, because a pool asks for that way again
//! just then: packets would be lost until this node has followed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// From the moment at which this node reads its own word without the way until the others have surely read it, too.
const NOTICE: Duration = Duration::from_secs(5);

/// Since when each way is no longer in the node's word, as the datastore gives it.
#[derive(Debug, Default)]
pub(crate) struct Farewell(BTreeMap<&'static str, Instant>);

impl Farewell {
    /// Whether a way has to stand. `tells`: the node says, or is about to say, that it receives this way. `told`: whether its word
    /// in the datastore has the way; `None` where nobody tells a word.
    pub(crate) fn stands(
        &mut self,
        way: &'static str,
        tells: bool,
        told: Option<bool>,
        now: Instant,
    ) -> bool {
        if tells || told == Some(true) {
            self.0.remove(way);
            return true;
        }
        if told.is_none() {
            return false;
        }
        let since = *self.0.entry(way).or_insert(now);
        now.saturating_duration_since(since) < NOTICE
    }

    /// When the next way may end.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Instant> {
        let ends = self.0.values().map(|since| *since + NOTICE);
        ends.filter(|end| *end > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_stands_until_the_word_has_been_taken_back_for_a_while() {
        let (mut farewell, start) = (Farewell::default(), Instant::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        assert!(farewell.stands("tunl0", true, Some(false), start));
        assert!(farewell.stands("tunl0", false, Some(true), later(1)));
        assert_eq!(farewell.next_due(later(1)), None);
        assert!(farewell.stands("tunl0", false, Some(false), later(100)));
        assert_eq!(farewell.next_due(later(100)), Some(later(105)));
        assert!(farewell.stands("tunl0", false, Some(false), later(104)));
        assert!(!farewell.stands("tunl0", false, Some(false), later(105)));
    }

    #[test]
    fn asked_for_again_it_begins_anew() {
        let (mut farewell, start) = (Farewell::default(), Instant::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        assert!(farewell.stands("tunl0", false, Some(false), start));
        assert!(farewell.stands("tunl0", true, Some(false), later(4)));
        assert!(farewell.stands("tunl0", false, Some(false), later(6)));
        assert!(!farewell.stands("tunl0", false, Some(false), later(11)));
    }

    #[test]
    fn without_anybody_who_tells_nothing_is_waited_for() {
        assert!(!Farewell::default().stands("tunl0", false, None, Instant::now()));
    }
}
