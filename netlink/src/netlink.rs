//! [`Netlink`]: the handle to one namespace, its dumps and its bulk changes.
//!
//! Dumps and bulk changes are synchronous system calls on sockets of our own; a batch of some thousand items takes
//! milliseconds. Changes of links, addresses and rules are in [`crate::link_change`].

use std::{
    fmt::Display,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{errno::Errno, sys::socket::SockProtocol};

use crate::{
    Address, Change, FdbEntry, IfIndex, Link, Neighbour, NetNs, Nexthop, Route, RouteDecision,
    RouteFilter, Rule,
    error::{Cause, Error, Result},
    link_change::LowRate,
    rtnl::{link, neighbour, neighbour::Dump, nexthop as nh, route as rt},
    socket::{Ready, Socket},
    wire::{Message, Writer},
};

/// A handle to ONE network namespace. Clones share the sockets.
#[derive(Debug, Clone)]
pub struct Netlink {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    netns: NetNs,
    route: Mutex<Socket>,
    low_rate: LowRate,
}

/// Changes of routes as messages: making them does not have to wait until those before are sent.
#[derive(Debug)]
pub struct ReadyRoutes {
    changes: Vec<Change<Route>>,
    messages: Ready,
}

impl ReadyRoutes {
    /// Makes the messages of these changes.
    pub fn new(changes: Vec<Change<Route>>) -> Self {
        let messages = Ready::new(changes.len(), |writer, index, sequence| {
            rt::write_change(writer, &changes[index], sequence);
            Ok(())
        });
        Self { changes, messages }
    }
}

/// Results with what was to be done, and with what.
fn named<T: Display>(
    results: Vec<std::result::Result<(), Cause>>,
    changes: &[Change<T>],
) -> Vec<Result<()>> {
    let name = |change: &Change<T>, cause| {
        Error::new(change.operation(), change.object().to_string(), cause)
    };
    results
        .into_iter()
        .zip(changes)
        .map(|(result, change)| result.map_err(|cause| name(change, cause)))
        .collect()
}

impl Netlink {
    /// Opens the sockets inside `netns`.
    pub fn open(netns: &NetNs) -> Result<Self> {
        let socket = netns.run(|| Socket::open(SockProtocol::NetlinkRoute))??;
        Ok(Self::over(netns, socket))
    }

    fn over(netns: &NetNs, socket: Socket) -> Self {
        let low_rate = LowRate::new(netns.clone());
        Self {
            inner: Arc::new(Inner {
                netns: netns.clone(),
                route: Mutex::new(socket),
                low_rate,
            }),
        }
    }

    /// Opens the sockets inside `netns` and does `work` there, on one visit to the namespace: for many changes of one namespace
    /// that nobody else speaks to meanwhile. Blocks.
    pub fn visit<T: Send>(
        netns: &NetNs,
        work: impl FnOnce(&Self) -> Result<T> + Send,
    ) -> Result<T> {
        netns.run(|| {
            let socket = Socket::open(SockProtocol::NetlinkRoute)?;
            work(&Self::over(netns, socket))
        })?
    }

    /// Opens the sockets in the calling thread's namespace.
    pub fn current() -> Result<Self> {
        Self::open(&NetNs::current()?)
    }

    /// The namespace of this handle.
    pub fn netns(&self) -> &NetNs {
        &self.inner.netns
    }

    pub(crate) fn low_rate(&self) -> &LowRate {
        &self.inner.low_rate
    }

    pub(crate) fn socket(&self) -> MutexGuard<'_, Socket> {
        // A panic while the lock was held left at worst unread answers, which later requests skip by sequence number.
        self.inner
            .route
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn dump<T>(
        &self,
        object: &'static str,
        write: impl FnMut(&mut Writer, u32),
        decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>> {
        self.socket()
            .dump(write, decode)
            .map_err(|cause| Error::new("dump", object, cause))
    }

    pub(crate) fn apply<T: Display>(
        &self,
        changes: &[Change<T>],
        write: impl Fn(&mut Writer, &Change<T>, u32),
    ) -> Vec<Result<()>> {
        let results = self
            .socket()
            .batch(changes.len(), |writer, index, sequence| {
                write(writer, &changes[index], sequence);
                Ok(())
            });
        named(results, changes)
    }

    /// All devices.
    pub fn dump_links(&self) -> Result<Vec<Link>> {
        self.dump("links", link::write_link_dump, link::read_link)
    }

    /// One device by name; `None` if there is none.
    pub fn link_by_name(&self, name: &str) -> Result<Option<Link>> {
        self.find_link(0, Some(name), name)
    }

    /// One device by index; `None` if there is none.
    pub fn link_by_index(&self, index: IfIndex) -> Result<Option<Link>> {
        self.find_link(index, None, &format!("#{index}"))
    }

    fn find_link(&self, index: IfIndex, name: Option<&str>, object: &str) -> Result<Option<Link>> {
        let query =
            |writer: &mut Writer, sequence| link::write_link_query(writer, index, name, sequence);
        match self.socket().query(query, link::read_link) {
            Ok(link) => Ok(Some(link)),
            Err(Cause::Kernel {
                errno: Errno::ENODEV,
                ..
            }) => Ok(None),
            Err(cause) => Err(Error::new("get", format!("link {object}"), cause)),
        }
    }

    /// The number that this namespace has given to another one ([`Link::link_netns`]); `None` if it has given none.
    pub fn number_of(&self, other: &NetNs) -> Result<Option<i32>> {
        use std::os::fd::{AsFd as _, AsRawFd as _};
        let fd = other.as_fd().as_raw_fd().cast_unsigned();
        self.socket()
            .query(
                |writer, sequence| link::write_nsid_query(writer, fd, sequence),
                link::read_nsid,
            )
            .map_err(|cause| Error::new("find the number of", other.to_string(), cause))
    }

    /// All addresses, or those of one device.
    pub fn dump_addresses(&self, ifindex: Option<IfIndex>) -> Result<Vec<Address>> {
        let write =
            |writer: &mut Writer, sequence| link::write_address_dump(writer, ifindex, sequence);
        let all = match self.dump("addresses", write, link::read_address) {
            // The kernel says so when the device is gone.
            Err(error) if error.code() == Some(Errno::ENODEV) => return Ok(Vec::new()),
            result => result?,
        };
        Ok(all
            .into_iter()
            .filter(|address| ifindex.is_none_or(|index| address.ifindex == index))
            .collect())
    }

    /// All rules of both families that look into a table.
    pub fn dump_rules(&self) -> Result<Vec<Rule>> {
        let mut all = Vec::new();
        for v6 in [false, true] {
            let write = |writer: &mut Writer, sequence| link::write_rule_dump(writer, v6, sequence);
            all.extend(self.dump("rules", write, link::read_rule)?);
        }
        Ok(all)
    }

    /// The routes that the filter lets through.
    pub fn dump_routes(&self, filter: &RouteFilter) -> Result<Vec<Route>> {
        let mut all = Vec::new();
        for v6 in [false, true] {
            if filter.v6.is_some_and(|wanted| wanted != v6) {
                continue;
            }
            let write =
                |writer: &mut Writer, sequence| rt::write_dump(writer, v6, filter, sequence);
            match self.dump("routes", write, rt::read) {
                Ok(routes) => all.extend(routes.into_iter().filter(|route| filter.matches(route))),
                // A table that nobody has written to does not exist; a device may be gone.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Changes routes in order; one result each.
    pub fn apply_routes(&self, changes: &[Change<Route>]) -> Vec<Result<()>> {
        self.apply(changes, rt::write_change)
    }

    /// The same with what another thread has made ready meanwhile.
    pub fn apply_ready_routes(&self, ready: ReadyRoutes) -> Vec<Result<()>> {
        let results = self.socket().send_ready(ready.messages);
        named(results, &ready.changes)
    }

    /// The kernel's decision for a destination.
    ///
    /// No route is `ENETUNREACH`; a blackhole answers `EINVAL`, unreachable `EHOSTUNREACH`, prohibit `EACCES` (for both
    /// kinds of lookup).
    pub fn lookup_route(&self, destination: IpAddr) -> Result<RouteDecision> {
        let write =
            |writer: &mut Writer, sequence| rt::write_lookup(writer, destination, false, sequence);
        self.socket()
            .query(write, rt::read_decision)
            .map_err(|cause| Error::new("look up", format!("route to {destination}"), cause))
    }

    /// The row that a destination matches.
    pub fn match_route(&self, destination: IpAddr) -> Result<Route> {
        let write =
            |writer: &mut Writer, sequence| rt::write_lookup(writer, destination, true, sequence);
        self.socket()
            .query(write, rt::read_match)
            .map_err(|cause| Error::new("look up", format!("route to {destination}"), cause))
    }

    /// All nexthop objects.
    pub fn dump_nexthops(&self) -> Result<Vec<Nexthop>> {
        self.dump("nexthops", nh::write_dump, nh::read)
    }

    /// Changes nexthop objects in order; one result each.
    pub fn apply_nexthops(&self, changes: &[Change<Nexthop>]) -> Vec<Result<()>> {
        self.apply(changes, nh::write_change)
    }

    /// Neighbours of both families, of all devices or of one. Proxy entries are not among them.
    pub fn dump_neighbours(&self, ifindex: Option<IfIndex>) -> Result<Vec<Neighbour>> {
        self.neighbours(ifindex, |v6| Dump::Neighbours { v6 })
    }

    /// Proxy entries of both families, of all devices or of one.
    pub fn dump_proxies(&self, ifindex: Option<IfIndex>) -> Result<Vec<Neighbour>> {
        self.neighbours(ifindex, |v6| Dump::Proxies { v6 })
    }

    fn neighbours(
        &self,
        ifindex: Option<IfIndex>,
        what: impl Fn(bool) -> Dump,
    ) -> Result<Vec<Neighbour>> {
        let mut all = Vec::new();
        for v6 in [false, true] {
            let dump = what(v6);
            let write = |writer: &mut Writer, sequence| {
                neighbour::write_dump(writer, dump, ifindex, sequence)
            };
            all.extend(self.dump("neighbours", write, neighbour::read_neighbour)?);
        }
        all.retain(|entry| ifindex.is_none_or(|index| entry.ifindex == index));
        Ok(all)
    }

    /// Changes neighbours in order; one result each.
    pub fn apply_neighbours(&self, changes: &[Change<Neighbour>]) -> Vec<Result<()>> {
        self.apply(changes, neighbour::write_neighbour)
    }

    /// Forwarding entries of all devices or of one.
    pub fn dump_fdb(&self, ifindex: Option<IfIndex>) -> Result<Vec<FdbEntry>> {
        let write = |writer: &mut Writer, sequence| {
            neighbour::write_dump(writer, Dump::Fdb, ifindex, sequence)
        };
        let mut all = self.dump("forwarding entries", write, neighbour::read_fdb)?;
        all.retain(|entry| ifindex.is_none_or(|index| entry.ifindex == index));
        Ok(all)
    }

    /// Changes forwarding entries in order; one result each.
    pub fn apply_fdb(&self, changes: &[Change<FdbEntry>]) -> Vec<Result<()>> {
        self.apply(changes, neighbour::write_fdb)
    }
}

impl RouteFilter {
    /// Whether the filter lets the route through; kernels without strict checking leave that to us.
    pub fn matches(&self, route: &Route) -> bool {
        use crate::Target;
        self.v6.is_none_or(|v6| route.prefix.is_ipv6() == v6)
            && self.table.is_none_or(|table| route.table == table)
            && self
                .protocol
                .is_none_or(|protocol| route.protocol == protocol)
            && self.oif.is_none_or(|oif| match &route.target {
                Target::Hop(hop) => hop.oif == Some(oif),
                Target::Multipath(hops) => hops.iter().any(|hop| hop.oif == Some(oif)),
                // The kernel has looked into the object.
                Target::Nexthop(_) => true,
                Target::None => false,
            })
    }
}
