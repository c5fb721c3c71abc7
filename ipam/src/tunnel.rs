//! Addresses of the node's tunnel devices.
//!
//! Each device has one address, under a handle and with a `type` that are Calico's, so that either program recognises
//! the other's. The caller publishes the address in the Node resource.

use std::net::IpAddr;

use cali_api::v3::{AllowedUse, EncapMode, IPPoolSpec};

use crate::allocator::{Allocator, Request};
use crate::error::Error;
use crate::owner::Owner;
use crate::pools::{self, Demand, Pool};

/// A tunnel device that needs an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tunnel {
    /// `tunl0`.
    Ipip,
    /// `vxlan.calico`.
    Vxlan,
    /// `vxlan-v6.calico`.
    VxlanV6,
    /// `wireguard.cali`.
    Wireguard,
    /// `wg-v6.cali`.
    WireguardV6,
}

impl Tunnel {
    /// All of them, in the order in which addresses are given.
    pub const ALL: [Self; 5] = [
        Self::Wireguard,
        Self::WireguardV6,
        Self::Ipip,
        Self::Vxlan,
        Self::VxlanV6,
    ];

    /// The handle of the node's address for this device.
    pub fn handle(self, node: &str) -> String {
        let prefix = match self {
            Self::Ipip => "ipip",
            Self::Vxlan => "vxlan",
            Self::VxlanV6 => "vxlan-v6",
            Self::Wireguard => "wireguard",
            Self::WireguardV6 => "wireguard-v6",
        };
        format!("{prefix}-tunnel-addr-{node}")
    }

    /// The attribute `type` of the address.
    pub fn attribute(self) -> &'static str {
        match self {
            Self::Ipip => "ipipTunnelAddress",
            Self::Vxlan => "vxlanTunnelAddress",
            Self::VxlanV6 => "vxlanV6TunnelAddress",
            Self::Wireguard => "wireguardTunnelAddress",
            Self::WireguardV6 => "wireguardV6TunnelAddress",
        }
    }

    /// Whether its address is an IPv4 address.
    pub fn is_v4(self) -> bool {
        !matches!(self, Self::VxlanV6 | Self::WireguardV6)
    }

    /// Whether a pool's addresses may go to this device. WireGuard has no mode of its own in a pool.
    fn suits(self, pool: &IPPoolSpec) -> bool {
        match self {
            Self::Ipip => pool.ipip() != EncapMode::Never,
            Self::Vxlan | Self::VxlanV6 => pool.vxlan() != EncapMode::Never,
            Self::Wireguard | Self::WireguardV6 => true,
        }
    }
}

impl Allocator {
    /// Keeps the device's address if it is still right, or gives it another one. `None` if no pool calls for the device;
    /// an address that it had is then released.
    pub async fn ensure_tunnel_address(&self, tunnel: Tunnel) -> Result<Option<IpAddr>, Error> {
        let handle = tunnel.handle(self.node());
        let situation = self.situation().await?;
        let suitable: Vec<Pool> = situation
            .pools
            .iter()
            .filter(|p| tunnel.suits(&p.spec))
            .cloned()
            .collect();
        let demand = Demand {
            v4: tunnel.is_v4(),
            allowed_use: AllowedUse::Tunnel,
            requested: &[],
            node_labels: &situation.node_labels,
            namespace_labels: None,
        };
        let eligible = match pools::eligible(&suitable, &demand) {
            Ok(pools) => pools,
            Err(Error::NoPool { .. }) => Vec::new(),
            Err(e) => return Err(e),
        };
        let fits = |address: &IpAddr| eligible.iter().any(|p| p.spec.cidr.contains(*address));
        let held = self.addresses_of(&handle).await?;
        let keep = held.iter().copied().find(fits);
        let surplus: Vec<IpAddr> = held.into_iter().filter(|a| Some(*a) != keep).collect();
        self.release(&surplus, Some(&handle)).await?;
        if keep.is_some() || eligible.is_empty() {
            return Ok(keep);
        }
        let owner = Owner::new(&handle)
            .with("node", self.node())
            .with("type", tunnel.attribute());
        let names = eligible.iter().map(|p| p.name.clone()).collect();
        let mut request = Request::workload(owner, 0, 0);
        request.allowed_use = AllowedUse::Tunnel;
        if tunnel.is_v4() {
            (request.v4, request.pools_v4) = (1, names);
        } else {
            (request.v6, request.pools_v6) = (1, names);
        }
        Ok(self.assign(&request).await?.first().map(|a| a.address))
    }
}
