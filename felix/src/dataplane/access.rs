//! Access to a running dataplane from other tasks.

use std::sync::Arc;
use std::time::Duration;

use cali_api::Key;
use cali_api::v3::WorkloadEndpoint;
use cali_routes::Writer;
use tokio::sync::{mpsc, oneshot, watch};

use super::state::{EndpointState, NotProgrammed, State};

/// The dataplane's task has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the dataplane has ended")]
pub struct Stopped;

/// A local endpoint, told before the datastore has it.
pub(super) struct Announcement {
    pub(super) key: Key,
    pub(super) endpoint: Option<Arc<WorkloadEndpoint>>,
    pub(super) done: oneshot::Sender<()>,
}

/// Access to a running dataplane.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) announcements: mpsc::Sender<Announcement>,
    pub(super) state: watch::Receiver<Arc<State>>,
    pub(super) routes: Writer,
}

impl Handle {
    /// Tells of a local endpoint that the datastore may not have yet (with `None`: takes that back), and waits until
    /// the step that takes it in has been done. Whether it is programmed then, [`Self::programmed`] says.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn announce(
        &self,
        key: Key,
        endpoint: Option<Arc<WorkloadEndpoint>>,
    ) -> Result<(), Stopped> {
        let (done, answer) = oneshot::channel();
        let announcement = Announcement {
            key,
            endpoint,
            done,
        };
        self.announcements
            .send(announcement)
            .await
            .map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Waits until policy and routes of an endpoint are in the kernel.
    ///
    /// # Errors
    /// [`NotProgrammed`] with the reason after `limit`.
    pub async fn programmed(
        &self,
        key: &Key,
        limit: Duration,
    ) -> Result<EndpointState, NotProgrammed> {
        let mut state = self.state.clone();
        let stands = state.wait_for(|state| {
            state
                .endpoints
                .get(key)
                .is_some_and(EndpointState::is_programmed)
        });
        let waited = match tokio::time::timeout(limit, stands).await {
            Ok(Ok(state)) => state.endpoints.get(key).cloned(),
            Ok(Err(_)) => return Err(NotProgrammed::Stopped),
            Err(_) => None,
        };
        if let Some(endpoint) = waited {
            return Ok(endpoint);
        }
        let problem = self
            .state
            .borrow()
            .endpoints
            .get(key)
            .map(|endpoint| endpoint.problem.clone());
        match problem {
            None => Err(NotProgrammed::Unknown(key.clone())),
            Some(problem) => Err(NotProgrammed::Because {
                endpoint: key.clone(),
                reason: problem.unwrap_or_else(|| "no reason is known".to_owned()),
            }),
        }
    }

    /// The state as it changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<Arc<State>> {
        self.state.clone()
    }

    /// The node's routes, for bgpd's best paths and for status.
    #[must_use]
    pub const fn routes(&self) -> &Writer {
        &self.routes
    }
}
