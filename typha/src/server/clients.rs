//! The tasks that serve clients, and the order in which they are told to go elsewhere.

use std::collections::HashMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::{Id, JoinSet};

/// How a server that stops takes leave of its clients (Calico: `ShutdownTimeoutSecs`, `ShutdownConnectionDropIntervalMaxSecs`).
#[derive(Debug, Clone, Copy)]
pub struct Leave {
    /// All are gone after this time.
    pub limit: Duration,
    /// Time between two of them, at most.
    pub interval: Duration,
}

impl Default for Leave {
    fn default() -> Self {
        Self {
            limit: Duration::from_secs(300),
            interval: Duration::from_secs(1),
        }
    }
}

impl Leave {
    /// Time between two of so many clients: they are spread over 95 % of the limit, so that the other servers take them in one
    /// by one.
    pub(super) fn pace(&self, clients: usize) -> Duration {
        let clients = u32::try_from(clients.max(1)).unwrap_or(u32::MAX);
        self.interval.min(self.limit.mul_f64(0.95) / clients)
    }
}

/// Hangs up when the other end is used or dropped.
pub(super) type HangUp = oneshot::Receiver<()>;

/// One task for each connection. Dropping this ends them.
#[derive(Debug, Default)]
pub(super) struct Clients {
    tasks: JoinSet<()>,
    hang_ups: HashMap<Id, oneshot::Sender<()>>,
}

impl Clients {
    /// Starts a task that ends soon after its [`HangUp`].
    pub(super) fn spawn<F>(&mut self, task: impl FnOnce(HangUp) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, hang_up) = oneshot::channel();
        let handle = self.tasks.spawn(task(hang_up));
        self.hang_ups.insert(handle.id(), sender);
    }

    /// Connections, those included that have been told to go.
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until one has ended; `None` at once when there is none.
    pub(super) async fn next_ended(&mut self) -> Option<()> {
        let ended = self.tasks.join_next_with_id().await?;
        let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
        self.hang_ups.remove(&id);
        Some(())
    }

    /// Tells any one to go elsewhere.
    pub(super) fn shed_one(&mut self) {
        // A map of its own random order: no client is preferred.
        if let Some(id) = self.hang_ups.keys().next().copied() {
            self.hang_ups.remove(&id);
        }
    }

    /// Tells all to go, and waits until they have.
    pub(super) async fn end(mut self) {
        self.hang_ups.clear();
        while self.tasks.join_next().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn farewells_are_spread_over_the_time_that_there_is() {
        let leave = Leave::default();
        assert_eq!(leave.pace(3), Duration::from_secs(1));
        assert_eq!(leave.pace(1000), Duration::from_millis(285));
        assert_eq!(leave.pace(0), Duration::from_secs(1));
    }
}
