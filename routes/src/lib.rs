//! The one route table of a node, and the only writer of routes.
//!
//! [`RouteTable`] is pure: workloads, IPAM blocks, block affinities and BGP propose routes ([`Candidate`]), the kernel
//! contract (docs/architecture.md §5) admits exactly one supplier per pool mode, `ipip-vxlan` says through which device, and one
//! route per prefix is selected. [`Program`], pure as well, turns the selection into rows and nexthop objects and
//! plans the steps from what the kernel holds.
//!
//! [`Writer`] is the task that owns both, carries the steps out, and listens to the kernel.
//!
//! What it does not do: it makes no devices (that is `ipip-vxlan`), and it never touches a route that is not its own.

mod candidate;
mod input;
mod kernel;
pub mod nexthops;
mod program;
mod render;
mod signal;
mod supplier;
mod table;
mod writer;

pub use candidate::{Candidate, NextHop, RouteSpec, Source};
pub use input::{Failed, Input, RefusedRoute, RouteStatus, WriterState};
pub use program::{Hold, Program, Step};
pub use render::{Devices, KernelSettings, Rendered, Waiting, describe, network, render};
pub use supplier::{Backend, ClusterRoutes, Supplier, Suppliers};
pub use table::{Gateway, Problem, Reach, RouteTable, RowView, Selected, Way};
pub use writer::{Writer, WriterGone};
