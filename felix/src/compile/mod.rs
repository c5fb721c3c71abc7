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
//! - runs of Allow rules, within a policy and over the policies of a tier, are few lookups: by port to
//!   small chains, by address to the counter of the policy (`collapse`);
//! - a selector is one exact set per family, with an interval set beside it only while the selector
//!   has networks among its members. A pod that comes or goes changes elements, no rule.
//!
//! Every object's content depends on the desired state alone, never on the order of deltas.
//! [`plan_transaction`] and [`plan_touched`] compare programs and touch only what differs. Nothing
//! here talks to the kernel.

mod base;
mod collapse;
mod compiler;
mod desired;
mod elements;
mod evaluate;
mod expr;
mod held;
mod host_policy;
pub(crate) mod hosts;
mod ipvs;
mod known_sets;
mod limits;
pub(crate) mod log;
pub(crate) mod names;
mod offload;
mod plan;
mod program;
mod rule;
mod settings;
mod shared;
mod stack;
mod workloads;

pub(crate) use base::{NEIGHBOUR_DISCOVERY, ROUTER_ADVERTISEMENT};
pub use collapse::Thresholds;
pub use compiler::Compiler;
pub use elements::Elements;
pub use evaluate::Suspects;
pub use held::{HELD_LIMIT, HOLD, can_be_held, held_elements, held_flow, held_set, held_tuple};
pub use host_policy::KeptOpen;
pub use ipvs::{DEVICE as IPVS_DEVICE, Marks as IpvsMarks};
pub use log::{LogRate, Unit};
pub use names::{is_chain_of, policy_text};
pub use offload::{Offload, table as offload_table};
pub use plan::{Plan, PlanOutcome, plan_touched, plan_transaction};
pub use program::{ChainProgram, InstalledRule, Program, SetProgram, Touched};
pub(crate) use rule::{merge_ports, outermost};
pub use settings::{DenyAction, HostAction, NatOutgoing, Settings};

#[cfg(test)]
mod tests;
