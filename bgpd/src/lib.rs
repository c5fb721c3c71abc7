//! The BGP speaker of Cali: a native BGP-4 daemon for Kubernetes nodes, route reflectors and fabric routers.
//!
//! The core ([`wire`], [`fsm`], [`rib`], [`policy`]) is pure: no sockets, no clock, no randomness; time and every
//! event come in as values.

pub mod fsm;
pub mod policy;
pub mod rib;
pub mod wire;
