//! Addresses of devices: the model.

use std::{fmt, net::IpAddr};

use ipnetwork::IpNetwork;

use crate::link::IfIndex;

/// An address on a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Device.
    pub ifindex: IfIndex,
    /// Address with its prefix length (host bits kept).
    pub address: IpNetwork,
    /// The other end, for point-to-point addresses.
    pub peer: Option<IpAddr>,
    /// Scope, as routes have it (`RT_SCOPE_*` number: 0 global, 253 link, 254 host).
    pub scope: u8,
    /// `IFA_F_*` bits as the kernel reports them (tentative, secondary, ...).
    pub flags: u32,
}

impl Address {
    /// A global address.
    pub fn new(ifindex: IfIndex, address: IpNetwork) -> Self {
        Self {
            ifindex,
            address,
            peer: None,
            scope: 0,
            flags: 0,
        }
    }

    /// What identifies the address.
    pub fn key(&self) -> (IfIndex, IpNetwork) {
        (self.ifindex, self.address)
    }

    /// Duplicate address detection has not ended (`IFA_F_TENTATIVE`).
    pub fn is_tentative(&self) -> bool {
        self.flags & 0x40 != 0
    }

    /// Second address of a subnet (`IFA_F_SECONDARY`; for IPv6 the same bit means temporary).
    pub fn is_secondary(&self) -> bool {
        self.flags & 0x01 != 0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev #{}", self.address, self.ifindex)
    }
}
