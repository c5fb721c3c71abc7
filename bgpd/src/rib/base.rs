//! What selection, import and export share: tables, interned values, and facts about peers.

use std::net::{IpAddr, Ipv4Addr};

use super::decision::{Context, Owner, OwnerKind};
use super::event::{PeerConfig, RouteSource};
use super::hops::{Hop, HopStore};
use super::store::AttrStore;
use super::table::{Path, Table};
use crate::wire::PeerKind;

/// Settings of the whole table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RibConfig {
    /// Our AS number (a session may present another one).
    pub own_as: u32,
    /// Our BGP identifier.
    pub router_id: Ipv4Addr,
    /// Cluster identifier for routes between clients and others; the router identifier when `None` (RFC 4456 §7).
    pub cluster_id: Option<Ipv4Addr>,
    /// Most gateways of a route.
    pub max_paths: u16,
    /// Next hops that the tracker has not spoken about count as reachable. For reflectors without forwarding.
    pub assume_reachable: bool,
    /// Keep refused announcements, so that they can be shown with the reason.
    pub keep_refused: bool,
    /// Octets of encoded messages that a group of peers keeps for its slow readers; those that are further behind
    /// are brought up to date from the table.
    pub stream_limit: usize,
}

impl RibConfig {
    /// Usual settings.
    pub const fn new(own_as: u32, router_id: Ipv4Addr) -> Self {
        Self {
            own_as,
            router_id,
            cluster_id: None,
            max_paths: 16,
            assume_reachable: false,
            keep_refused: true,
            stream_limit: 1 << 20,
        }
    }

    pub(super) fn cluster(&self) -> Ipv4Addr {
        self.cluster_id.unwrap_or(self.router_id)
    }
}

/// Tables and stores.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) config: RibConfig,
    pub(super) attrs: AttrStore,
    pub(super) hops: HopStore,
    pub(super) tables: [Table; 2],
    /// By slot.
    pub(super) owners: Vec<Owner>,
    /// By slot: cluster identifier if the peer is our client.
    pub(super) clients: Vec<Option<Ipv4Addr>>,
}

impl Base {
    pub(super) fn new(config: RibConfig) -> Self {
        let local = Owner {
            kind: OwnerKind::Local,
            router_id: config.router_id.into(),
            addr: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        Self {
            config,
            attrs: AttrStore::default(),
            hops: HopStore::default(),
            tables: [Table::default(), Table::default()],
            owners: vec![local],
            clients: vec![None],
        }
    }

    pub(super) const fn context(&self) -> Context<'_> {
        Context {
            attrs: &self.attrs,
            hops: &self.hops,
            owners: self.owners.as_slice(),
            assume_reachable: self.config.assume_reachable,
        }
    }

    /// Notes what a session tells about its peer.
    pub(super) fn set_owner(&mut self, slot: u16, config: &PeerConfig) {
        let kind = match config.codec.peer {
            PeerKind::Ibgp => OwnerKind::Ibgp,
            PeerKind::Ebgp => OwnerKind::Ebgp,
        };
        let slot = usize::from(slot);
        self.owners[slot] = Owner {
            kind,
            router_id: config.remote_id.into(),
            addr: config.remote_addr,
        };
        self.clients[slot] = config.reflector_client;
    }

    /// Where a path comes from.
    pub(super) fn source(&self, path: &Path) -> RouteSource {
        match (
            self.owners[usize::from(path.peer)].kind,
            self.hops.get(path.hop),
        ) {
            (_, Hop::Local { kind, .. }) => RouteSource::Local(*kind),
            (OwnerKind::Ebgp, _) => RouteSource::Bgp(PeerKind::Ebgp),
            (OwnerKind::Ibgp | OwnerKind::Local, _) => RouteSource::Bgp(PeerKind::Ibgp),
        }
    }
}
