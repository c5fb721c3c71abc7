//! Everything Cali says to the Linux kernel, and hears from it.
//!
//! - [`NetNs`], [`Netlink`]: a handle to one network namespace. Links, addresses and rules are `async`, one request
//!   at a time; routes, nexthop objects, neighbours and forwarding entries are synchronous batches with one result
//!   per item, and links and addresses are where somebody waits for many changes at once.
//! - [`events`]: notifications, on a socket of their own.
//! - [`nft`]: nf_tables with our own encoder and decoder; one [`nft::Transaction`] is one atomic batch.
//! - [`ipset`]: IP sets, with our own encoder and decoder.
//! - [`conntrack`], [`sysctl`], [`tcp`], [`fdpass`]: the rest of what a node needs from the kernel.
//! - [`wireguard`]: keys and peers of WireGuard devices, over generic netlink.
//! - [`echo`]: whether a path carries packets of a size.
//! - [`process`]: a process held by a descriptor.
//! - [`together`]: what many callers want, asked of the kernel at once.
//! - [`reconcile`]: the pure planner that every kernel programmer here uses.
//! - [`probe`]: what this host can do, said so that an operator can act on it.
//!
//! All `unsafe` code of the workspace is in this crate, in files that say so. This crate decides nothing: what is to
//! be in the kernel is its callers' business, and it never touches an object that it was not told to.

pub mod address;
mod at_once;
pub mod command;
pub mod conntrack;
pub mod echo;
pub mod error;
pub mod events;
pub mod fdpass;
mod genetlink;
pub mod ipset;
pub mod link;
mod link_change;
mod link_follow;
mod link_removal;
pub mod mac;
pub mod neighbour;
mod netlink;
pub mod netns;
pub mod nexthop;
pub mod nflog;
pub mod nft;
pub mod probe;
pub mod process;
pub mod qdisc;
pub mod reconcile;
pub mod route;
mod rtnl;
pub mod rule;
mod socket;
mod sys;
pub mod sysctl;
pub mod tcp;
#[cfg(feature = "testing")]
pub mod testing;
pub mod together;
mod wire;
pub mod wireguard;

pub use address::Address;
pub use error::{Cause, Error, Result};
pub use events::{Event, EventStream, Group, Notice};
pub use ipnetwork::IpNetwork;
pub use link::{IfIndex, IpIp, Link, LinkChange, LinkKind, NewLink, NewLinkKind, VethPeer, Vxlan};
pub use link_follow::FollowedLinks;
pub use link_removal::LinkRemover;
pub use mac::MacAddr;
pub use neighbour::{FdbEntry, Neighbour};
pub use netlink::{Netlink, ReadyRoutes};
pub use netns::NetNs;
pub use nexthop::{Nexthop, NexthopTarget};
pub use nft::Nft;
pub use nix::errno::Errno;
pub use nix::sys::signal::Signal;
pub use process::Process;
pub use reconcile::Reconciler;
pub use route::{Hop, Route, RouteDecision, RouteFilter, RouteKey, RouteKind, Scope, Target};
pub use rule::Rule;
pub use wireguard::{WgChange, WgDevice, WgKey, WgPeer, Wireguard};

/// One change of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<T> {
    /// Make it; an error if it is there.
    Add(T),
    /// Make it, or put it in the place of the one with the same key.
    Replace(T),
    /// Remove it.
    Delete(T),
}

impl<T> Change<T> {
    /// The object that the change is about.
    pub fn object(&self) -> &T {
        match self {
            Self::Add(object) | Self::Replace(object) | Self::Delete(object) => object,
        }
    }

    fn operation(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Replace(_) => "replace",
            Self::Delete(_) => "delete",
        }
    }
}
