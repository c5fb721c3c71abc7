//! The BGP speaker of Cali: a native BGP-4 daemon for Kubernetes nodes, route reflectors and fabric routers.
//!
//! The core ([`wire`], [`fsm`], [`gr`], [`rib`], [`policy`], [`config`]) is pure: no sockets, no clock, no randomness;
//! time and every event come in as values. The edge is [`transport`], [`speaker`] (with a task per neighbour),
//! [`sink`], [`devices`] and [`control`].

pub mod agent;
pub mod bfd;
pub mod bmp;
pub mod config;
pub mod control;
pub mod devices;
pub mod fsm;
pub mod gr;
pub mod metrics;
pub mod mrt;
pub mod passwords;
pub mod policy;
pub mod program;
pub mod reach;
pub mod rib;
mod session;
pub mod sink;
pub mod speaker;
pub mod transport;
pub mod wire;
