//! What the CNI server asks of the part that programs routes and policy.

use std::net::IpAddr;

use async_trait::async_trait;
use cali_api::Key;
use cali_api::v3::WorkloadEndpoint;

/// A pod's interface that has just been made. It carries no traffic that the container could have caused: the runtime
/// has not been answered yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// The endpoint, the same that the datastore will show once the pod's annotations are written.
    pub workload: WorkloadEndpoint,
    /// Index of the interface on the host; its name is `workload.spec.interface_name`.
    pub host_index: u32,
}

/// A pod's interface that is about to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaving {
    /// Key of the WorkloadEndpoint.
    pub key: Key,
    /// Name of the interface on the host.
    pub interface: String,
    /// The addresses; they may be given to others once this is done, so connections of theirs must be forgotten.
    pub addresses: Vec<IpAddr>,
    /// The sandbox that leaves.
    pub container_id: String,
}

/// Why an endpoint could not be programmed, for the runtime's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotProgrammed(pub String);

/// Programs endpoints. Both calls can come more than once for one endpoint.
#[async_trait]
pub trait EndpointSink: Send + Sync {
    /// Returns when the endpoint's route and policy are in the kernel.
    async fn endpoint_up(&self, endpoint: Endpoint) -> Result<(), NotProgrammed>;

    /// Returns when the endpoint's route, policy and connections are gone.
    async fn endpoint_down(&self, leaving: Leaving) -> Result<(), NotProgrammed>;

    /// Whether an endpoint could be programmed now; if not, why.
    fn ready(&self) -> Result<(), NotProgrammed>;
}
