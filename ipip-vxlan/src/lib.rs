//! Encapsulation: which (pool, node) pair is reached directly and which through a tunnel, and the
//! kernel objects a tunnel needs.
//!
//! The crate has two halves. The pure half is [`Resolver`], which answers "how is this prefix, which
//! lives on that node, reached from here?", and [`plan`], which lists the devices, addresses,
//! forwarding entries and neighbours that must exist for those answers to work. The thin half,
//! [`Tunnels`], brings the kernel of one network namespace to that plan and keeps it there.
//!
//! It does not write routes: `cali-routes` is the only writer of routes and asks [`Resolver`] for each.
//!
//! # Invariants
//! - Receivers are prepared for every encapsulation that any pool names, whether or not a route of
//!   this node uses it yet (docs/architecture.md §6, the barrier for pool edits).
//! - Nothing that a route still uses is removed: [`Tunnels`] is told which gateways are in use.
//! - A way is used towards a node only after both ends have said that they receive it ([`Receives`]).
//! - A device of our name but of another kind belongs to somebody else. It is reported, never changed.

mod addressless;
mod apply;
mod devices;
mod encap;
mod entries;
mod farewell;
mod inputs;
mod mac;
mod mtu;
pub mod plan;
mod receives;
mod resolve;
mod reverse_path;
mod transition;
mod wireguard;

pub use apply::{GatewaysInUse, TunnelState, Tunnels, Wish};
pub use encap::{Encap, Pool, Scope};
pub use mac::vtep_mac;
pub use mtu::Overhead;
pub use plan::{DesiredDevice, DeviceKind, Plan, PlanProblem, Settings, Underlay, VtepEntry};
pub use receives::{ANNOTATION as RECEIVES_ANNOTATION, Receives};
pub use resolve::{Endpoint, Resolver, Unresolved, Via, Vtep, WgNode};
pub use wireguard::{FamilySettings, Holders, WireguardSettings};

/// IPv4 VXLAN device, Calico's name.
pub const VXLAN_V4_DEVICE: &str = "vxlan.calico";
/// IPv6 VXLAN device, Calico's name.
pub const VXLAN_V6_DEVICE: &str = "vxlan-v6.calico";
/// IPIP device: the fall-back device of the `ipip` module, Calico's choice as well.
pub const IPIP_DEVICE: &str = "tunl0";
