//! Policy conformance: cases as data, real packets, and answers that must agree.
//!
//! A file of cases ([`case::File`]) holds namespaces, pods, objects, and probes with the verdict that the specification
//! demands. Every probe is evaluated by [`crate::verdict`] and sent as a packet through the rules of a [`Backend`], over
//! IPv4 and IPv6. From case to case the kernel is changed, not built anew, so that the way from one state to another is
//! under test as well.
//!
//! Pods are numbered in the order in which a case lists them: the n-th has 10.65.0.n and fd65::n. `host` is the node
//! itself (192.0.2.1 and 2001:db8::1 on `eth0`, 198.51.100.1 and 2001:db8:1::1 on `eth1`), `world` is beyond `eth0`
//! (192.0.2.2 and 2001:db8::2), `lan` beyond `eth1` (198.51.100.2 and 2001:db8:1::2).
//!
//! It needs root and the programs `ip` and `sysctl`, works in network namespaces of its own, and panics where these
//! cannot be made. It does not test what the rule set does beside policy.

mod backend;
mod case;
mod expect;
mod lab;
mod probe;
mod run;
mod sctp;

pub use backend::{Backend, Interfaces, IptablesChains, Nftables};
pub use case::{Case, File, HOST, LAN, NODE, WORLD};
pub use expect::{Expected, expected};
pub use lab::{Lab, Place};
pub use probe::{Answer, LIMIT, Listener, Probe, listen, probe};
pub use run::{Report, compile_batch, files, run_case, run_file};
