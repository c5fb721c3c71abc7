//! Asks for the endpoints of other nodes that policy needs, and tells when they are long in coming.

use std::sync::Arc;
use std::time::{Duration, Instant};

use typha::interest::{Asker, Wanted};

use crate::calc::Graph;

/// What is held back longer than this is told of.
const LONG_WAIT: Duration = Duration::from_secs(10);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Asking {
    asker: Option<Asker>,
    /// Since when policy waits.
    since: Option<Instant>,
}

impl Asking {
    /// Without an asker, all endpoints come in any case.
    pub(super) const fn new(asker: Option<Asker>) -> Self {
        Self { asker, since: None }
    }

    /// Asks for what the graph needs by now.
    pub(super) fn ask(&mut self, graph: &mut Graph, now: Instant) {
        if let (Some(asker), Some((number, selectors))) = (&self.asker, graph.take_wanted()) {
            let selectors = Arc::new(selectors);
            asker.ask(Wanted { number, selectors });
        }
        if graph.is_waiting() {
            self.since.get_or_insert(now);
        } else {
            self.since = None;
        }
    }

    /// When there will be something to tell.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        let at = self.since? + LONG_WAIT;
        (at > now).then_some(at)
    }

    /// What has been held back for long.
    pub(super) fn notice(&self, graph: &Graph, now: Instant) -> Option<String> {
        if now < self.since? + LONG_WAIT {
            return None;
        }
        let waiting = graph.waiting();
        let first = waiting.first()?;
        Some(format!(
            "{} objects, {first} among them, wait for endpoints of other nodes, which Typha has to send; what they replace stays in force",
            waiting.len(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use cali_api::update::{SyncEvent, SyncStatus};

    use super::*;
    use crate::calc::Input;
    use crate::calc::tests::{put, web};

    #[test]
    fn what_waits_is_told_of_when_it_has_waited_long_and_until_it_is_there() {
        let (asker, _listener) = typha::interest::channel("here");
        let mut asking = Asking::new(Some(asker));
        let mut graph = Graph::asking("here".into());
        web().into_iter().for_each(|update| graph.on_update(update));
        graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
        let start = Instant::now();
        assert!(graph.flush().is_none());
        asking.ask(&mut graph, start);
        assert_eq!(asking.notice(&graph, start), None);
        let due = asking.next_due(start).unwrap();
        assert_eq!(due, start + LONG_WAIT);
        let notice = asking.notice(&graph, due).unwrap();
        assert!(notice.contains("NetworkPolicy(prod/web)"), "{notice}");
        graph.handle(Input::Sync(SyncEvent::Complete(1)));
        assert!(graph.flush().is_some());
        asking.ask(&mut graph, due);
        assert_eq!(
            (asking.notice(&graph, due), asking.next_due(start)),
            (None, None)
        );
        // Nothing waits for what selects no endpoint.
        graph.on_update(put(
            serde_json::json!({"apiVersion": "projectcalico.org/v3", "kind": "Tier",
            "metadata": {"name": "top"}, "spec": {"order": 1}}),
        ));
        graph.flush();
        asking.ask(&mut graph, due);
        assert_eq!(asking.next_due(due), None);
    }
}
