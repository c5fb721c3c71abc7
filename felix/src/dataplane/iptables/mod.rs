//! Chains and IP sets in the kernel: adopted at start, changed by as few writes as possible, put right when somebody else
//! changes them.
//!
//! [`Iptables`] keeps what the kernel is believed to hold. Sets are made and filled before the chains that look them up
//! are written, and destroyed after the last such chain is gone. A chain that `iptables-restore` refuses keeps its former
//! content, or drops everything if it has none, and is reported; everything else is written. Nothing tells of changes to
//! the legacy tables, so they are read again after each write, soon and then ever more rarely; for the nf_tables variant
//! the kernel's notifications lead to a look at once.

mod applier;
mod held;
mod look;
mod sets;
mod tools;

pub use applier::Iptables;
pub use tools::{Tools, Variant};
