//! What a node says that it can receive: the barrier between an edit of a pool and the first packet that goes the new way.
//!
//! A node writes its word ([`ANNOTATION`]) into its Node resource after the devices stand and its pods' MTU fits. Senders use
//! a way towards a node only when both ends have said so. A node that says nothing (Calico's) is taken as ready.

use std::fmt;
use std::str::FromStr;

use crate::{IPIP_DEVICE, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE, Via};

/// The annotation of the Node resource that carries the word: names from [`Receives`]'s text form, with commas.
pub const ANNOTATION: &str = "projectcalico.org/receives";

/// Ways in which packets for a node's pods may arrive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Receives {
    /// Unencapsulated.
    pub direct: bool,
    /// Through `tunl0`.
    pub ipip: bool,
    /// Through `vxlan.calico`.
    pub vxlan_v4: bool,
    /// Through `vxlan-v6.calico`.
    pub vxlan_v6: bool,
}

pub(crate) const DIRECT: &str = "direct";
const IPIP: &str = "ipip";
const VXLAN: &str = "vxlan";
const VXLAN_V6: &str = "vxlan-v6";

impl Receives {
    /// Whether packets that are sent this way are received.
    #[must_use]
    pub fn covers(&self, via: &Via) -> bool {
        match via {
            Via::Direct { .. } => self.direct,
            Via::Ipip { .. } => self.ipip,
            Via::Vxlan { device, .. } if *device == VXLAN_V6_DEVICE => self.vxlan_v6,
            Via::Vxlan { .. } => self.vxlan_v4,
        }
    }

    /// Whether packets that come through a device are received, or, for [`DIRECT`], unencapsulated ones.
    pub(crate) fn has(&self, way: &str) -> bool {
        match way {
            DIRECT => self.direct,
            IPIP_DEVICE => self.ipip,
            VXLAN_V4_DEVICE => self.vxlan_v4,
            VXLAN_V6_DEVICE => self.vxlan_v6,
            _ => false,
        }
    }

    /// Adds what a device brings.
    pub(crate) fn add_device(&mut self, device: &str) {
        match device {
            IPIP_DEVICE => self.ipip = true,
            VXLAN_V4_DEVICE => self.vxlan_v4 = true,
            VXLAN_V6_DEVICE => self.vxlan_v6 = true,
            _ => {}
        }
    }
}

/// The word of the barrier for a way, for people.
pub(crate) fn name(via: &Via) -> &'static str {
    match via {
        Via::Direct { .. } => DIRECT,
        Via::Ipip { .. } => IPIP,
        Via::Vxlan { device, .. } if *device == VXLAN_V6_DEVICE => VXLAN_V6,
        Via::Vxlan { .. } => VXLAN,
    }
}

impl fmt::Display for Receives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.direct, DIRECT),
            (self.ipip, IPIP),
            (self.vxlan_v4, VXLAN),
            (self.vxlan_v6, VXLAN_V6),
        ];
        let names: Vec<&str> = all
            .into_iter()
            .filter_map(|(has, name)| has.then_some(name))
            .collect();
        f.write_str(&names.join(","))
    }
}

impl FromStr for Receives {
    type Err = std::convert::Infallible;

    /// Unknown words are those of a later version and are passed over.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut receives = Self::default();
        for word in text.split(',').map(str::trim) {
            match word {
                DIRECT => receives.direct = true,
                IPIP => receives.ipip = true,
                VXLAN => receives.vxlan_v4 = true,
                VXLAN_V6 => receives.vxlan_v6 = true,
                _ => {}
            }
        }
        Ok(receives)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_reads_back_and_later_words_do_no_harm() {
        let receives = Receives {
            direct: true,
            vxlan_v6: true,
            ..Receives::default()
        };
        assert_eq!(receives.to_string(), "direct,vxlan-v6");
        assert_eq!("direct, vxlan-v6,gre".parse(), Ok(receives));
        assert_eq!("".parse(), Ok(Receives::default()));
    }
}
