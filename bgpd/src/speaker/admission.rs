//! How many connections a source may open, and how often the log says that it opened more. Pure: time comes in.
//!
//! Neighbours have a count each. All addresses that are no neighbours share one, so that nothing grows with their
//! number; they are refused in any case, and only the log is spared.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Connections of one source are counted over this time.
const WINDOW: Duration = Duration::from_secs(10);
/// Most connections of a source in that time. Both ends of a healthy session need one each; one that flaps dials about
/// every second.
const LIMIT: u32 = 20;

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may be looked at.
    Admit,
    /// The first of many too many: refuse it, and say so.
    Refuse,
    /// Refuse it without a word.
    RefuseSilently,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    since: Instant,
    taken: u32,
    /// Refused since the last line in the log.
    refused: u64,
}

/// Counts of all sources.
#[derive(Debug, Default)]
pub(super) struct Admission {
    neighbours: BTreeMap<IpAddr, Count>,
    strangers: Option<Count>,
}

impl Count {
    const fn new(now: Instant) -> Self {
        Self {
            since: now,
            taken: 0,
            refused: 0,
        }
    }

    fn admit(&mut self, now: Instant) -> Verdict {
        if now.duration_since(self.since) >= WINDOW {
            *self = Self::new(now);
        }
        if self.taken < LIMIT {
            self.taken += 1;
            return Verdict::Admit;
        }
        self.refused += 1;
        if self.refused == 1 {
            Verdict::Refuse
        } else {
            Verdict::RefuseSilently
        }
    }
}

impl Admission {
    /// A connection of a neighbour.
    pub(super) fn neighbour(&mut self, address: IpAddr, now: Instant) -> Verdict {
        self.neighbours
            .entry(address)
            .or_insert_with(|| Count::new(now))
            .admit(now)
    }

    /// A connection of somebody else, which is refused; [`Verdict::Admit`] means that the log may name it.
    pub(super) fn stranger(&mut self, now: Instant) -> Verdict {
        self.strangers
            .get_or_insert_with(|| Count::new(now))
            .admit(now)
    }

    /// A neighbour is no longer one.
    pub(super) fn forget(&mut self, address: IpAddr) {
        self.neighbours.remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_thousand_connections_are_a_few_and_one_line() {
        let mut admission = Admission::default();
        let flooding: IpAddr = "10.0.0.1".parse().unwrap();
        let quiet: IpAddr = "10.0.0.2".parse().unwrap();
        let now = Instant::now();
        let mut count = BTreeMap::new();
        for _ in 0..1000 {
            *count
                .entry(format!("{:?}", admission.neighbour(flooding, now)))
                .or_insert(0) += 1;
        }
        let expected = [("Admit", 20), ("Refuse", 1), ("RefuseSilently", 979)];
        assert_eq!(count, expected.map(|(k, v)| (k.to_owned(), v)).into());
        assert_eq!(admission.neighbour(quiet, now), Verdict::Admit);
        let later = now + WINDOW;
        assert_eq!(admission.neighbour(flooding, later), Verdict::Admit);
    }
}
