//! Nexthop objects (`include/uapi/linux/nexthop.h`): one object per peer node, many routes that name its id.
//!
//! Kernels since 5.3 have them; with them route insertion stays linear in the number of distinct gateways.

use std::{fmt, net::IpAddr};

use crate::link::IfIndex;

/// A nexthop object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nexthop {
    /// Its id, chosen by the owner out of its own range.
    pub id: u32,
    /// Route protocol number of the owner.
    pub protocol: u8,
    /// Where it leads.
    pub target: NexthopTarget,
}

/// Where a nexthop object leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NexthopTarget {
    /// To a gateway over a device.
    Gateway {
        /// Gateway address; its family is the family of the object.
        gateway: IpAddr,
        /// Output device.
        oif: IfIndex,
        /// Reachable although no subnet says so.
        onlink: bool,
    },
    /// Straight out of a device.
    Device {
        /// Output device.
        oif: IfIndex,
        /// Family of the object.
        v6: bool,
    },
    /// Packets are dropped.
    Blackhole {
        /// Family of the object.
        v6: bool,
    },
    /// Several objects, each with a weight of 1..=256.
    Group(Vec<(u32, u16)>),
}

impl fmt::Display for Nexthop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nexthop {}", self.id)?;
        match &self.target {
            NexthopTarget::Gateway {
                gateway,
                oif,
                onlink,
            } => {
                write!(f, " via {gateway} dev #{oif}")?;
                if *onlink {
                    f.write_str(" onlink")?;
                }
                Ok(())
            }
            NexthopTarget::Device { oif, .. } => write!(f, " dev #{oif}"),
            NexthopTarget::Blackhole { .. } => f.write_str(" blackhole"),
            NexthopTarget::Group(members) => {
                f.write_str(" group")?;
                for (id, weight) in members {
                    write!(f, " {id}*{weight}")?;
                }
                Ok(())
            }
        }
    }
}
