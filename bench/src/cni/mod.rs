//! How long a pod waits for its network: a whole node of [`cali_node`] in a network namespace, the plugin as it is built, called
//! as a container runtime calls it.
//!
//! The node is a process of its own ([`node`]) over a store that counts what it is asked, and that can be held: a request then
//! waits until the store is let go ([`counted`]). What succeeds meanwhile has waited for no answer of the datastore.

pub mod counted;
pub mod node;
pub mod plugin;
pub mod stages;

/// Name of the node.
pub const NODE: &str = "bench";
/// Namespace of Kubernetes whose pods are made.
pub const NAMESPACE: &str = "bench";
