//! Graceful restart (RFC 4724, RFC 9494), as two pure machines: [`Helper`] for a peer that restarts, [`Restarter`] for
//! our own restart.
//!
//! The restarter differs from RFC 4724 §4.1 on purpose in one point: best paths are chosen and installed at
//! once, and only what would remove something waits. Routes that the former process left in the kernel go,
//! and End-of-RIB is sent, when every peer has told what it knows or the deferral timer ran out. So a
//! restart never takes a route away that is about to come back.

mod helper;
mod restarter;

pub use helper::{Helper, HelperAction, HelperEvent, HelperTimer, PeerRestart};
pub use restarter::{Heard, Progress, Restarter};
