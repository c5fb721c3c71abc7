//! From what must be enforced to an nf_tables program, and from there to one transaction.
//!
//! [`Compiler`] takes the graph's deltas and keeps the desired [`Program`] of table `inet calico`:
//!
//! - an interface's name leads through a verdict map to the endpoint's chain, so the number of
//!   endpoints costs a packet nothing;
//! - the endpoint's chain goes on to a *stack*: tiers, policies and profiles in order. Endpoints with
//!   the same stack share one chain for it, policies are chains of their own, shared by all stacks;
//! - egress and ingress are two base chains of the forward hook. `accept` ends only its own base
//!   chain, so an allowed direction needs no packet mark. `Pass` is a `goto` to the stack of the
//!   remaining tiers; a policy that passes is therefore written out in its stack instead of shared;
//! - a selector is one exact set per family, with an interval set beside it only while the selector
//!   has networks among its members. A pod that comes or goes changes elements, no rule.
//!
//! Every object's content depends on the desired state alone, never on the order of deltas.
//! [`plan_transaction`] and [`plan_touched`] compare programs and touch only what differs. Nothing
//! here talks to the kernel.

mod base;
mod compiler;
mod desired;
mod expr;
mod known_sets;
pub(crate) mod names;
mod plan;
mod program;
mod rule;
mod settings;
mod stack;

pub(crate) use base::NEIGHBOUR_DISCOVERY;
pub use compiler::Compiler;
pub use plan::{Plan, PlanOutcome, plan_touched, plan_transaction};
pub use program::{ChainProgram, InstalledRule, Program, SetProgram, Touched};
pub(crate) use rule::{merge_ports, outermost};
pub use settings::{DenyAction, HostAction, Settings};

#[cfg(test)]
mod tests;
