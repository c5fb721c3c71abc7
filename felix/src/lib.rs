//! Policy enforcement and workload networking of one node.
//!
//! [`calc`] is a pure, incremental graph: datastore updates in, "what this node must enforce" out.
//! [`compile`] turns that into an nf_tables program and plans the transaction that takes the kernel
//! there; [`iptables`] does the same for hosts whose rules are those of iptables. Both are pure as well. [`verdict`] answers the same questions from the policy model alone and
//! serves as the oracle of tests and the engine of traces.
//!
//! None of these reads a clock, a socket or the kernel. [`dataplane`] does: it brings the namespace that it runs
//! in to what they say, and keeps it there.

pub mod calc;
pub mod compile;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod dataplane;
pub mod iptables;
pub mod program;
pub mod verdict;
