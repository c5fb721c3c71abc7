//! Translations that a container asks for on its node: ports of the host (`hostPort`) and floating addresses. Pure.
//!
//! [`ports`] reads what the runtime asks for, [`program`] is the nf_tables table for all containers of the node.

mod mapping;
mod program;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use mapping::{PortMapping, Transport, ports};
pub(crate) use program::{elements, set, table, transaction};

/// What one interface of one container has asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translation {
    /// Larger is younger: where two ask for the same port, the younger has it.
    pub sequence: u64,
    /// Addresses of the interface.
    pub addresses: Vec<IpAddr>,
    /// Ports of the host that lead to it.
    pub ports: Vec<PortMapping>,
    /// Addresses that lead to it with all ports, each with the address it becomes.
    pub floating: Vec<(IpAddr, IpAddr)>,
}

impl Translation {
    /// Nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty() && self.floating.is_empty()
    }

    /// The addresses that a mapping leads to, at most one of each family; none if the interface has none of a fitting family.
    fn targets(&self, mapping: &PortMapping) -> impl Iterator<Item = IpAddr> {
        let family = mapping.host_ip.map(|ip| ip.is_ipv4());
        let of = |v4: bool| self.addresses.iter().copied().find(|a| a.is_ipv4() == v4);
        [of(true), of(false)]
            .into_iter()
            .flatten()
            .filter(move |a| family.is_none_or(|v4| v4 == a.is_ipv4()))
    }
}
