//! The daemon of a node.
//!
//! [`startup`] makes the node known (name, address, Node resource, default pools and objects); then one process runs the policy
//! engine, the route table, the tunnels and the CNI server, and keeps `bgpd` running as a process of its own.
//!
//! It decides nothing about packets: that is done in the crates that it connects.

pub mod capabilities;
pub mod cni_install;
pub mod daemon;
pub mod endpoints;
pub mod fan_out;
pub mod health;
pub mod mtu;
pub mod pod_links;
pub mod program;
pub mod report;
pub mod routes_socket;
pub mod startup;
pub mod status_socket;
pub mod supervisor;
pub mod tunnel_addresses;
pub mod warnings;
pub mod word;

/// What lies behind an error, in words, for a line of the log that tells the error itself.
fn cause(error: &dyn std::error::Error) -> String {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    causes.join(": ")
}
