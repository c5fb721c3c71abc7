//! Fan-out to many nodes: a server in a process of its own, whose datastore is made up, and simulated clients over real sockets.
//!
//! A simulated client reads what it is sent and keeps nothing: it counts bytes, unpacks only small frames, and finds in them when the
//! change that they carry was made. One real client beside them says what a reconnecting one would offer as held.

mod agent;
mod clients;
mod cluster;
mod server;

pub use agent::agent;
pub use clients::{Fleet, Latency, SAMPLE, real_client};
pub use cluster::{Cluster, KINDS, changed_at};
pub use server::{Child, Process, serve};
