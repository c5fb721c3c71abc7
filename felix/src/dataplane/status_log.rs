//! The state as log lines.

use std::sync::Arc;

use super::{State, StatusSink};

/// Writes to the log what an operator should know, each thing once.
#[derive(Debug, Default)]
pub struct StatusLog {
    last: Arc<State>,
}

impl StatusSink for StatusLog {
    fn on_state(&mut self, state: &Arc<State>) {
        if state.ready != self.last.ready {
            tracing::info!(
                ready = state.ready,
                endpoints = state.endpoints.len(),
                "dataplane"
            );
        }
        for refused in state
            .refused
            .iter()
            .filter(|refused| !self.last.refused.contains(refused))
        {
            tracing::error!(
                object = refused.object,
                reason = refused.reason,
                "the kernel refused an object"
            );
        }
        for notice in state
            .notices
            .iter()
            .filter(|notice| !self.last.notices.contains(notice))
        {
            tracing::warn!(notice, "notice");
        }
        for (object, problems) in &state.unusable {
            if self.last.unusable.get(object) != Some(problems) {
                tracing::error!(%object, ?problems, "an object cannot be used as it is");
            }
        }
        self.last = state.clone();
    }
}
