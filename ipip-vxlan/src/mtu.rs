//! Overheads of the encapsulations, in bytes of the outer packet.

/// What a tunnel adds to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overhead {
    /// Nothing: the packet goes out as it is.
    None,
    /// Outer IPv4 header (RFC 2003).
    Ipip,
    /// Outer IPv4, UDP, VXLAN and inner Ethernet header (RFC 7348).
    VxlanV4,
    /// The same with an outer IPv6 header.
    VxlanV6,
    /// Outer IPv4, UDP and WireGuard's header and tag.
    WireguardV4,
    /// The same with an outer IPv6 header.
    WireguardV6,
}

impl Overhead {
    /// The overhead in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Ipip => 20,
            Self::VxlanV4 => 20 + 8 + 8 + 14,
            Self::VxlanV6 => 40 + 8 + 8 + 14,
            Self::WireguardV4 => 20 + 8 + 32,
            Self::WireguardV6 => 40 + 8 + 32,
        }
    }

    /// MTU of a tunnel device over an underlay of `underlay` bytes. Never below the minimum of the inner
    /// family's links (68 for IPv4, RFC 791; 1280 for IPv6, RFC 8200 §5), which the kernel would refuse.
    #[must_use]
    pub const fn device_mtu(self, underlay: u32) -> u32 {
        let least = match self {
            Self::VxlanV6 | Self::WireguardV6 => 1280,
            _ => 68,
        };
        let mtu = underlay.saturating_sub(self.bytes());
        if mtu < least { least } else { mtu }
    }
}

#[cfg(test)]
mod tests {
    use super::Overhead;

    #[test]
    fn overheads_are_those_of_the_headers() {
        assert_eq!(Overhead::VxlanV4.device_mtu(1500), 1450);
        assert_eq!(Overhead::VxlanV6.device_mtu(1500), 1430);
        assert_eq!(Overhead::Ipip.device_mtu(1500), 1480);
        assert_eq!(Overhead::WireguardV4.device_mtu(1500), 1440);
        assert_eq!(Overhead::WireguardV6.device_mtu(1500), 1420);
    }

    #[test]
    fn a_tiny_underlay_does_not_give_an_mtu_the_kernel_refuses() {
        assert_eq!(Overhead::VxlanV6.device_mtu(1300), 1280);
        assert_eq!(Overhead::VxlanV4.device_mtu(60), 68);
    }
}
