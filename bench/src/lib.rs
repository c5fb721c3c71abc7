//! Benchmarks of Cali, side by side with the peers that users have today.
//!
//! [`bgp`] compares `bgpd` with other BGP daemons under one load generator. Nothing here is part of the product.

pub mod bgp;
