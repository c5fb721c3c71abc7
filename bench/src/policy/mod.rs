//! What policy costs: processor time and memory of a change, of a start, and of packets.

mod cluster;
mod node;
mod packets;

pub use cluster::{Cluster, NODE};
pub use node::{Change, Node};
pub use packets::{
    Path, Rates, connect, established_flow, forget_flows, greet, policies_for, received,
    send_established, send_new,
};
