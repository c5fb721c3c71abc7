//! Neighbours (ARP, NDP) and forwarding entries of vxlan and bridge devices: two views of `struct ndmsg`
//! (`include/uapi/linux/neighbour.h`).

use std::{fmt, net::IpAddr};

use crate::{link::IfIndex, mac::MacAddr};

/// State bits (`NUD_*`).
pub mod state {
    /// Being resolved.
    pub const INCOMPLETE: u16 = 0x01;
    /// Confirmed lately.
    pub const REACHABLE: u16 = 0x02;
    /// Known, not confirmed lately.
    pub const STALE: u16 = 0x04;
    /// Waiting before a probe.
    pub const DELAY: u16 = 0x08;
    /// Being probed.
    pub const PROBE: u16 = 0x10;
    /// Could not be resolved.
    pub const FAILED: u16 = 0x20;
    /// The device needs no resolution.
    pub const NOARP: u16 = 0x40;
    /// Set by somebody and never expiring.
    pub const PERMANENT: u16 = 0x80;
}

/// Flag bits (`NTF_*`).
pub mod flag {
    /// The entry belongs to the device itself (vxlan's table).
    pub const SELF: u8 = 0x02;
    /// The entry belongs to the bridge above the device.
    pub const MASTER: u8 = 0x04;
    /// Proxy ARP/NDP entry.
    pub const PROXY: u8 = 0x08;
    /// Learned by a control plane.
    pub const EXT_LEARNED: u8 = 0x10;
    /// The neighbour is a router.
    pub const ROUTER: u8 = 0x80;
}

/// An entry of the neighbour table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Neighbour {
    /// Device.
    pub ifindex: IfIndex,
    /// Address.
    pub address: IpAddr,
    /// Hardware address; `None` while unresolved, and for proxy entries.
    pub mac: Option<MacAddr>,
    /// [`state`] bits.
    pub state: u16,
    /// [`flag`] bits.
    pub flags: u8,
}

impl Neighbour {
    /// A permanent entry.
    pub fn permanent(ifindex: IfIndex, address: IpAddr, mac: MacAddr) -> Self {
        Self {
            ifindex,
            address,
            mac: Some(mac),
            state: state::PERMANENT,
            flags: 0,
        }
    }

    /// A proxy entry: this host answers for `address` on the device.
    pub fn proxy(ifindex: IfIndex, address: IpAddr) -> Self {
        Self {
            ifindex,
            address,
            mac: None,
            state: 0,
            flags: flag::PROXY,
        }
    }

    /// What identifies the entry.
    pub fn key(&self) -> (IfIndex, IpAddr) {
        (self.ifindex, self.address)
    }

    /// Permanent, so somebody set it and nobody learned it.
    pub fn is_permanent(&self) -> bool {
        self.state & state::PERMANENT != 0
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev #{}", self.address, self.ifindex)?;
        match self.mac {
            Some(mac) => write!(f, " lladdr {mac}"),
            None => Ok(()),
        }
    }
}

/// A forwarding entry of a vxlan or bridge device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FdbEntry {
    /// Device (the vxlan device itself, or a port of a bridge).
    pub ifindex: IfIndex,
    /// Hardware address.
    pub mac: MacAddr,
    /// Outer address of the tunnel end (vxlan).
    pub dst: Option<IpAddr>,
    /// VLAN (bridge).
    pub vlan: Option<u16>,
    /// [`state`] bits.
    pub state: u16,
    /// [`flag`] bits.
    pub flags: u8,
}

impl FdbEntry {
    /// A permanent entry of a vxlan device: frames to `mac` go to the tunnel end `dst`.
    pub fn vxlan(ifindex: IfIndex, mac: MacAddr, dst: IpAddr) -> Self {
        Self {
            ifindex,
            mac,
            dst: Some(dst),
            vlan: None,
            state: state::PERMANENT,
            flags: flag::SELF,
        }
    }
}

impl fmt::Display for FdbEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev #{}", self.mac, self.ifindex)?;
        match self.dst {
            Some(dst) => write!(f, " dst {dst}"),
            None => Ok(()),
        }
    }
}
