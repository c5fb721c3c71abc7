//! From what must be enforced to iptables chains and IP sets, and from there to what `iptables-restore` reads.
//!
//! The backend for hosts that cannot have, or do not want, nf_tables rules of our own. [`Renderer`] takes the same deltas
//! as [`crate::compile::Compiler`] and keeps the desired [`Program`]: chains of the tables raw, mangle, nat and filter for
//! either family, the few rules that lead from the kernel's chains to them, and the IP sets that they look up.
//!
//! - chains are named `cali-*` and sets `cali40*`/`cali60*`; a rule carries a hash of itself, of all rules before it and
//!   of its chain's name as the comment `cali:<hash>`, so that `iptables-save` says which chains are as they should be;
//! - verdicts are Calico's packet marks: "allowed" and "passed on" are bits of `iptablesMarkMask`. A rule goes to a chain
//!   that sets the bit and so ends its policy; the endpoint's chain looks at it;
//! - endpoints are found through a tree of interface name prefixes, so that a packet meets few rules on its way;
//! - a selector is one `hash:net` per family; a list of networks in a rule is one as well, named by its content.
//!
//! [`Observed`] is what `iptables-save` printed, and [`plan_restore`] the input that takes one family from there to the
//! program, in one atomic step per table, touching only what differs. Nothing here runs a program or talks to the kernel.

mod base;
mod dispatch;
mod held;
mod hosts;
mod limits;
mod names;
mod plan;
mod policies;
mod program;
mod render;
mod rule;
mod save;
mod settings;

pub(crate) use held::{HeldSets, held_flows, held_members, held_sets};
pub use names::{OWN_CHAIN, SET_PREFIXES};
pub use plan::{ChainKey, Line, RestorePlan, culprit, joined, misplaced_hooks, plan_restore};
pub use program::{Chain, Family, HookRules, Program, Rule, SetProgram, Table};
pub use render::Renderer;
pub use save::{Observed, ObservedChain, ObservedRule};
pub use settings::{Marks, Settings};

#[cfg(test)]
mod tests;
