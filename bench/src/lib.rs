//! Benchmarks of Cali, side by side with the peers that users have today.
//!
//! [`bgp`] compares `bgpd` with other BGP daemons under one load generator; [`policy`] measures what policy costs, from the
//! datastore's words to the packets of a pod; [`typha`] measures fan-out to many nodes;
//! [`cni`] measures how long a pod waits for its network. Nothing here is part of the product.

pub mod bgp;
pub mod cni;
pub mod namespace;
pub mod policy;
pub mod typha;
