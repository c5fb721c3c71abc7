//! Liveness and readiness from what named parts report. The time is a parameter.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// What is expected of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expectation {
    /// The part reports at least this often; without a report for so long, the daemon is not live. `None`: the part
    /// cannot hang unnoticed.
    pub report_within: Option<Duration>,
    /// The daemon is ready only when this part says so.
    pub decides_readiness: bool,
}

#[derive(Debug)]
struct Part {
    expectation: Expectation,
    reported: Instant,
    ready: bool,
    reason: String,
}

/// State of one part, for people and for JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PartState {
    /// Name of the part.
    pub part: String,
    /// Whether it reported in time.
    pub live: bool,
    /// Whether it said that it is ready (or need not).
    pub ready: bool,
    /// Why not, or what it is doing.
    pub reason: String,
}

/// The answer to "live?" or "ready?".
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Yes or no.
    pub ok: bool,
    /// All parts, sorted by name.
    pub parts: Vec<PartState>,
}

/// The parts of one daemon and what they reported last. Clones share the state.
#[derive(Debug, Clone, Default)]
pub struct Health {
    parts: Arc<Mutex<BTreeMap<String, Part>>>,
}

/// A part's way to report.
#[derive(Debug, Clone)]
pub struct Reporter {
    health: Health,
    name: String,
}

impl Health {
    /// Adds a part, not ready until it says so. A part of this name that stood before is replaced.
    #[must_use]
    pub fn part(&self, name: &str, expectation: Expectation, now: Instant) -> Reporter {
        self.lock().insert(
            name.to_owned(),
            Part {
                expectation,
                reported: now,
                ready: false,
                reason: "starting".to_owned(),
            },
        );
        Reporter {
            health: self.clone(),
            name: name.to_owned(),
        }
    }

    /// Whether every part that must report did so in time.
    #[must_use]
    pub fn liveness(&self, now: Instant) -> Answer {
        let parts = self.states(now);
        Answer {
            ok: parts.iter().all(|part| part.live),
            parts,
        }
    }

    /// Whether every part that decides readiness says yes, and all are live.
    #[must_use]
    pub fn readiness(&self, now: Instant) -> Answer {
        let parts = self.states(now);
        Answer {
            ok: parts.iter().all(|part| part.live && part.ready),
            parts,
        }
    }

    fn states(&self, now: Instant) -> Vec<PartState> {
        self.lock()
            .iter()
            .map(|(name, part)| {
                let silent = now.saturating_duration_since(part.reported);
                let live = part
                    .expectation
                    .report_within
                    .is_none_or(|limit| silent <= limit);
                PartState {
                    part: name.clone(),
                    live,
                    ready: part.ready || !part.expectation.decides_readiness,
                    reason: if live {
                        part.reason.clone()
                    } else {
                        format!(
                            "no report for {} s (last: {})",
                            silent.as_secs(),
                            part.reason
                        )
                    },
                }
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Part>> {
        // A reporter that panicked left whole values behind: each report is one assignment.
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reporter {
    /// The part works and is ready.
    pub fn ready(&self, now: Instant, detail: impl Into<String>) {
        self.report(now, true, detail.into());
    }

    /// The part works, but is not ready, for this reason.
    pub fn not_ready(&self, now: Instant, reason: impl Into<String>) {
        self.report(now, false, reason.into());
    }

    /// The part works; whether it is ready is as before.
    pub fn alive(&self, now: Instant) {
        if let Some(part) = self.health.lock().get_mut(&self.name) {
            part.reported = now;
        }
    }

    fn report(&self, now: Instant, ready: bool, reason: String) {
        if let Some(part) = self.health.lock().get_mut(&self.name) {
            part.reported = now;
            part.ready = ready;
            part.reason = reason;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATE: Expectation = Expectation {
        report_within: Some(Duration::from_secs(30)),
        decides_readiness: true,
    };

    #[test]
    fn a_part_that_falls_silent_ends_liveness_and_is_named() {
        let health = Health::default();
        let start = Instant::now();
        let part = health.part("dataplane", GATE, start);
        part.ready(start, "in sync");
        assert!(health.liveness(start + Duration::from_secs(30)).ok);
        let answer = health.liveness(start + Duration::from_secs(31));
        assert!(!answer.ok);
        assert_eq!(answer.parts[0].reason, "no report for 31 s (last: in sync)");
        part.alive(start + Duration::from_secs(31));
        assert!(health.liveness(start + Duration::from_secs(40)).ok);
    }

    #[test]
    fn readiness_waits_only_for_the_parts_that_decide_it() {
        let health = Health::default();
        let now = Instant::now();
        let gate = health.part("dataplane", GATE, now);
        let _other = health.part("metrics", Expectation::default(), now);
        assert!(!health.readiness(now).ok);
        gate.ready(now, "in sync");
        assert!(health.readiness(now).ok);
        gate.not_ready(now, "datastore away");
        let answer = health.readiness(now);
        assert!(!answer.ok);
        assert_eq!(answer.parts[0].reason, "datastore away");
        assert!(health.liveness(now).ok);
    }
}
