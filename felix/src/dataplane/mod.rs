//! From the graph's words to the kernel of one network namespace.
//!
//! One task ([`Dataplane`]) owns the order of things: rules first, then the way to the endpoint, then the word that it
//! is programmed; on the way out the other way round. Rules go through [`Ruleset`] or [`Iptables`], routes through
//! [`cali_routes::Writer`], tunnels through [`ipip_vxlan::Tunnels`]; each of them adopts what it finds, listens to the
//! kernel and puts right what somebody else changes.
//!
//! Invariants:
//! - nothing is removed from the kernel before the datastore has been in sync once, and the end of the task removes
//!   nothing at all;
//! - a kernel object that is refused never holds up the others: it is reported, and tried again.
//!
//! It never reads the datastore: updates come in over a channel, status goes out as values ([`State`]).

mod access;
mod asking;
mod bystanders;
mod driver;
mod endpoints;
mod enforcer;
mod enforcer_side;
mod flow_guard;
mod flow_judge;
mod host;
mod iptables;
mod lockout;
mod metrics;
mod offload;
mod own_addresses;
mod packet_log;
mod resources;
mod ruleset;
mod sockets;
mod state;
mod status_log;

pub use access::{Handle, Stopped};
pub use driver::{Config, Dataplane};
pub use endpoints::{EndpointChanges, Endpoints, interface_settings};
pub use enforcer::BackendOverride;
pub use iptables::{Iptables, Tools, Variant};
pub use lockout::{Purpose, Servers};
pub use resources::{KINDS, Resources};
pub(crate) use ruleset::write;
pub use ruleset::{Refused, Ruleset};
pub use state::{EndpointState, NotProgrammed, State, StatusSink};
pub use status_log::StatusLog;
