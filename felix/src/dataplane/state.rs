//! What the dataplane tells about itself: values, for whoever shows or stores them.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::{Cidr, Key};
use cali_routes::WriterState;
use ipip_vxlan::TunnelState;

use super::Refused;

/// One local endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointState {
    /// The host's side of its interface pair.
    pub interface: Arc<str>,
    /// Its addresses.
    pub addresses: Vec<Cidr>,
    /// Policies that apply to it, each once, in the order in which they are asked.
    pub policies: Vec<Key>,
    /// Why it is not programmed: policy and routes in the kernel, interface set up. `None` when it is.
    pub problem: Option<String>,
}

impl EndpointState {
    /// Policy and routes are in the kernel, and the interface is set up.
    #[must_use]
    pub const fn is_programmed(&self) -> bool {
        self.problem.is_none()
    }
}

/// The whole state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// The datastore has been in sync, and everything has been written once.
    pub ready: bool,
    /// Local endpoints.
    pub endpoints: BTreeMap<Key, EndpointState>,
    /// Rules and sets that the kernel refused.
    pub refused: Vec<Refused>,
    /// What cannot be used of the objects in the datastore.
    pub unusable: BTreeMap<Key, Vec<String>>,
    /// Things that an operator should know.
    pub notices: Vec<String>,
    /// Names of the WireGuard devices for IPv4 and IPv6, as the settings have them.
    pub wireguard_devices: [String; 2],
    /// Tunnel devices and endpoints.
    pub tunnels: TunnelState,
    /// Routes.
    pub routes: Arc<WriterState>,
}

/// Where the state goes. Called with every new state, from the dataplane's task: it must not block.
pub trait StatusSink: Send + 'static {
    /// Takes the new state.
    fn on_state(&mut self, state: &Arc<State>);
}

/// An endpoint did not become programmed in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotProgrammed {
    /// The reason at the end of the wait.
    #[error("{endpoint} is not programmed: {reason}")]
    Because {
        /// The endpoint.
        endpoint: Key,
        /// Why.
        reason: String,
    },
    /// The dataplane does not know it.
    #[error("{0} is not an endpoint of this node")]
    Unknown(Key),
    /// The dataplane has ended.
    #[error("the dataplane has ended")]
    Stopped,
}
