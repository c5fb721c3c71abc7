//! What the owner of the table is told, and what it answers.

use std::collections::BTreeSet;
use std::net::IpAddr;

use cali_api::{Cidr, NodeName};
use ipip_vxlan::{Endpoint, Pool};

use crate::candidate::{Candidate, Source};
use crate::program::Hold;
use crate::supplier::Suppliers;
use crate::table::{RouteTable, Way};

/// One change of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A source proposes a route.
    Set(Source, Cidr, Candidate),
    /// A source proposes nothing any more.
    Remove(Source, Cidr),
    /// A pool appeared or changed.
    Pool(Pool),
    /// A pool is gone, by name.
    PoolRemove(String),
    /// A node appeared or changed.
    Node(Endpoint),
    /// A node is gone.
    NodeRemove(NodeName),
    /// Who supplies the routes of each kind of pool.
    Suppliers(Suppliers),
    /// Packets to workloads may be no larger than this, whatever their interfaces take: what is larger is answered with
    /// "fragmentation needed" or "packet too big" here. `None`: the interface decides.
    WorkloadMtu(Option<u32>),
    /// The datastore has told everything: routes that nothing asked for may go, and BGP's paths count.
    InSync,
    /// bgpd has connected anew.
    BgpStarted,
    /// bgpd has told everything in one family.
    BgpEndOfSync {
        /// IPv4 or IPv6.
        v4: bool,
    },
}

/// What an input means beyond the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// The pools changed.
    Pools,
    /// Held routes may go.
    Release(Hold),
    /// See [`Input::WorkloadMtu`].
    WorkloadMtu(Option<u32>),
}

/// Feeds one input to the table.
pub(crate) fn feed(table: &mut RouteTable, input: Input) -> Effect {
    match input {
        Input::Set(source, prefix, candidate) => table.set(source, prefix, candidate),
        Input::Remove(source, prefix) => table.remove(source, &prefix),
        Input::Pool(pool) => {
            table.set_pool(pool);
            return Effect::Pools;
        }
        Input::PoolRemove(name) => {
            table.remove_pool(&name);
            return Effect::Pools;
        }
        Input::Node(node) => table.set_node(node),
        Input::NodeRemove(name) => table.remove_node(&name),
        Input::Suppliers(suppliers) => table.set_suppliers(suppliers),
        Input::WorkloadMtu(mtu) => return Effect::WorkloadMtu(mtu),
        Input::InSync => {
            table.set_in_sync();
            return Effect::Release(Hold::Datastore);
        }
        Input::BgpStarted => table.bgp_started(),
        Input::BgpEndOfSync { v4 } => {
            table.bgp_end_of_sync(v4);
            return Effect::Release(Hold::Bgp { v4 });
        }
    }
    Effect::None
}

/// The prefixes that an input asks something for: those whose state is reported back.
pub(crate) fn asked_for(input: &Input) -> Option<Cidr> {
    match input {
        Input::Set(_, prefix, _) => Some(*prefix),
        _ => None,
    }
}

/// A prefix that is not in the kernel as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// The prefix.
    pub prefix: Cidr,
    /// Why, for people.
    pub reason: String,
}

/// One route for people: who wants it, why, and whether the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteStatus {
    /// The prefix.
    pub prefix: Cidr,
    /// As `ip route` would print it, without the prefix; empty while none is selected.
    pub kernel: String,
    /// The supplier, or the first source that proposes one.
    pub source: Source,
    /// The resource or peer that it comes from.
    pub because: String,
    /// It is in the kernel.
    pub programmed: bool,
    /// What is not as it should be.
    pub problem: Option<String>,
    /// Where it leads; `None` while none is selected.
    pub way: Option<Way>,
}

/// A row that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedRoute {
    /// The row, as its key is printed: prefix, table, metric.
    pub route: String,
    /// What the kernel said.
    pub reason: String,
    /// The resource or peer that it comes from; `None` once nobody wants it any more.
    pub because: Option<String>,
}

/// State of the writer that others act upon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriterState {
    /// (device, gateway) of all rows in the kernel: what must not be taken away from under them.
    pub gateways: BTreeSet<(String, IpAddr)>,
    /// Rows that are held from an earlier incarnation.
    pub held: usize,
    /// Rows that we want.
    pub desired: usize,
    /// Prefixes whose device is not there, with the reason.
    pub waiting: Vec<(Cidr, String)>,
    /// Rows that the kernel refused.
    pub quarantined: Vec<RefusedRoute>,
    /// Rows that somebody else keeps undoing.
    pub fights: Vec<String>,
}
