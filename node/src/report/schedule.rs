//! Which CalicoNodeStatus is due when. Pure: time is given.

use std::collections::BTreeMap;
use std::time::Duration;

use cali_api::v3::{CalicoNodeStatus, CalicoNodeStatusSpec, NodeStatusClass};
use cali_control::status::REPORT_ANNOTATION;
use tokio::time::Instant;

/// One that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) name: String,
    pub(super) classes: Vec<NodeStatusClass>,
    /// More may be asked for in [`REPORT_ANNOTATION`].
    pub(super) with_query: bool,
}

/// Those that name this node.
#[derive(Debug)]
pub(super) struct Schedule {
    node: String,
    asked: BTreeMap<String, Asked>,
}

#[derive(Debug)]
struct Asked {
    spec: CalicoNodeStatusSpec,
    with_query: bool,
    due: Instant,
}

impl Schedule {
    pub(super) fn of_node(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            asked: BTreeMap::new(),
        }
    }

    /// A resource appeared, changed, or is gone. Our own report is such a change as well: it puts nothing forward.
    pub(super) fn on_update(&mut self, name: &str, value: Option<&CalicoNodeStatus>, now: Instant) {
        let wanted = value.filter(|object| {
            let period = object.spec.update_period_seconds;
            // Calico: 0 stops reports; without a number nobody asked for any.
            object.spec.node == self.node && period.is_some_and(|seconds| seconds > 0)
        });
        let Some(object) = wanted else {
            self.asked.remove(name);
            return;
        };
        match self.asked.get(name) {
            Some(asked) if asked.spec == object.spec => {}
            _ => {
                let query = object.metadata.annotations.get(REPORT_ANNOTATION);
                let asked = Asked {
                    spec: object.spec.clone(),
                    with_query: query.is_some_and(|query| !query.is_empty()),
                    due: now,
                };
                self.asked.insert(name.to_owned(), asked);
            }
        }
    }

    /// When something is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.asked.values().map(|asked| asked.due).min()
    }

    /// What is due; each is due again after its period.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<Due> {
        let mut taken = Vec::new();
        for (name, asked) in &mut self.asked {
            if asked.due <= now {
                let period = u64::from(asked.spec.update_period_seconds.unwrap_or(1).max(1));
                asked.due = now + Duration::from_secs(period);
                taken.push(Due {
                    name: name.clone(),
                    classes: asked.spec.classes.clone(),
                    // It is answered once.
                    with_query: std::mem::take(&mut asked.with_query),
                });
            }
        }
        taken
    }

    /// It could not be written: it is due at this time.
    pub(super) fn again(&mut self, name: &str, at: Instant) {
        if let Some(asked) = self.asked.get_mut(name) {
            asked.due = at.min(asked.due);
            // The question may stand there still.
            asked.with_query = true;
        }
    }

    /// It is gone.
    pub(super) fn forget(&mut self, name: &str) {
        self.asked.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(node: &str, period: Option<u32>) -> CalicoNodeStatus {
        CalicoNodeStatus::named(
            "s",
            CalicoNodeStatusSpec {
                node: node.into(),
                classes: vec![NodeStatusClass::BGP],
                update_period_seconds: period,
            },
        )
    }

    #[test]
    fn a_report_is_due_at_once_and_then_after_each_period() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut schedule = Schedule::of_node("n1");
        assert_eq!(schedule.next(), None);
        schedule.on_update("s", Some(&asked("n1", Some(10))), start);
        schedule.on_update("other", Some(&asked("n2", Some(10))), start);
        assert_eq!(schedule.next(), Some(start));
        assert_eq!(schedule.take_due(start).len(), 1);
        // What we wrote comes back to us.
        schedule.on_update("s", Some(&asked("n1", Some(10))), after(1));
        assert_eq!(schedule.next(), Some(after(10)));
        assert!(schedule.take_due(after(9)).is_empty());
        assert_eq!(schedule.take_due(after(12))[0].name, "s");
        schedule.again("s", after(17));
        assert_eq!(schedule.next(), Some(after(17)));
        // Another period counts at once.
        schedule.on_update("s", Some(&asked("n1", Some(60))), after(13));
        assert_eq!(schedule.next(), Some(after(13)));
    }

    #[test]
    fn nobody_asks_any_more() {
        let now = Instant::now();
        for gone in [
            None,
            Some(asked("n1", Some(0))),
            Some(asked("n1", None)),
            Some(asked("n2", Some(10))),
        ] {
            let mut schedule = Schedule::of_node("n1");
            schedule.on_update("s", Some(&asked("n1", Some(10))), now);
            schedule.on_update("s", gone.as_ref(), now);
            assert_eq!(schedule.next(), None, "{gone:?}");
        }
    }
}
