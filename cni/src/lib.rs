//! The CNI plugin (CNI specification 1.1), installed as `calico` and `calico-ipam`, and the server it calls.
//!
//! - [`plugin`] is the executable: it reads the runtime's call, opens the pod's namespace, passes the descriptor to the
//!   server over a unix socket, and prints the answer. With the server away, `DEL` removes the interface itself and
//!   leaves a [`tombstone`] that the server replays.
//! - [`server`] runs inside `cali-node`: it makes the interface pair, takes addresses from the node's reserve, hands the
//!   endpoint to whoever programs policy and routes ([`server::EndpointSink`]) and answers once that stands. Where the
//!   configuration names another IPAM plugin, the executable calls that one and hands its addresses over.
//! - [`loopback`] is the plugin of that name, which containerd calls beside the list's; the same executable.
//! - [`spec`], [`config`], [`result`] are the formats; [`request`] decides which addresses a pod gets, [`nat`] which ports
//!   and addresses of the host lead to it. All pure.
//!
//! What it does not do: routes and policy on the host, and address allocation itself (`cali-ipam`).

pub mod bandwidth;
pub mod config;
mod delegate;
mod durable;
pub mod loopback;
pub mod nat;
pub mod plugin;
pub mod request;
pub mod result;
pub mod server;
pub mod spec;
pub mod tombstone;
mod wiring;
