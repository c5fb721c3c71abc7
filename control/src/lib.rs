//! The local sockets of a Cali node: where they are, how a frame looks, and the types that cross them.
//!
//! Three protocols share one framing ([`frame`]): best paths from `bgpd` to the node's route table ([`routes`]),
//! status for people and tools ([`status`]), and the CNI plugin's calls ([`cni`]). Each has a name and a version,
//! exchanged as the first frame in both directions; unknown fields are ignored so that a newer side can add some.
//!
//! Beside them stands what all programs of a node must agree on: its folders ([`paths`]) and its name ([`node_name`]).
//! This crate keeps no state.

pub mod client;
pub mod cni;
pub mod frame;
mod node_name;
mod packed;
pub mod paths;
pub mod routes;
pub mod status;

pub use frame::{Error, FrameReader, FrameWriter, Hello};
pub use node_name::node_name;
pub use packed::UnpackError;
