//! Network devices: the model.

use std::{fmt, net::IpAddr, os::fd::OwnedFd, sync::Arc};

use crate::mac::MacAddr;

/// Kernel index of a device, unique in its namespace while the device lives.
pub type IfIndex = u32;

/// A device as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: IfIndex,
    /// Name.
    pub name: String,
    /// Kind with its settings.
    pub kind: LinkKind,
    /// Hardware address, for Ethernet-like devices.
    pub mac: Option<MacAddr>,
    /// MTU.
    pub mtu: u32,
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Has carrier (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// Device needs no neighbour resolution (`IFF_NOARP`).
    pub noarp: bool,
    /// Bridge or bond above it.
    pub master: Option<IfIndex>,
    /// Device below or the veth peer (`IFLA_LINK`); an index of namespace `link_netns` if that is set.
    pub parent: Option<IfIndex>,
    /// Id of the namespace in which `parent` lives, if it is another one (`IFLA_LINK_NETNSID`).
    pub link_netns: Option<i32>,
    /// Free text (`ip link set alias`).
    pub alias: Option<String>,
    /// Allmulti, promiscuity and such are left out: nobody here reads them. Group id (`IFLA_GROUP`).
    pub group: u32,
}

/// Kind of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// No kind: physical devices and `lo`.
    Physical,
    /// One end of a pair.
    Veth,
    /// Ethernet bridge.
    Bridge,
    /// VXLAN tunnel.
    Vxlan(Vxlan),
    /// IP-in-IP tunnel.
    IpIp(IpIp),
    /// WireGuard.
    Wireguard,
    /// Dummy.
    Dummy,
    /// VLAN with its id.
    Vlan(u16),
    /// Anything else, by its kernel name.
    Other(Arc<str>),
}

impl LinkKind {
    /// The kernel's name of the kind (`IFLA_INFO_KIND`); empty for physical devices.
    pub fn name(&self) -> &str {
        match self {
            Self::Physical => "",
            Self::Veth => "veth",
            Self::Bridge => "bridge",
            Self::Vxlan(_) => "vxlan",
            Self::IpIp(_) => "ipip",
            Self::Wireguard => "wireguard",
            Self::Dummy => "dummy",
            Self::Vlan(_) => "vlan",
            Self::Other(name) => name,
        }
    }
}

/// Settings of a VXLAN device (RFC 7348; `IFLA_VXLAN_*`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// Network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Outer source address.
    pub local: Option<IpAddr>,
    /// Underlay device.
    pub device: Option<IfIndex>,
    /// Learn entries from received frames.
    pub learning: bool,
    /// Outer UDP checksum (IPv4), or the IPv6 receive-without-checksum pair when off.
    pub udp_csum: bool,
}

/// Settings of an IP-in-IP device (RFC 2003; `IFLA_IPTUN_*`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IpIp {
    /// Outer source address; `None`: any.
    pub local: Option<std::net::Ipv4Addr>,
    /// Outer destination; `None`: chosen by the route's gateway.
    pub remote: Option<std::net::Ipv4Addr>,
    /// Outer time to live; 0: inherited.
    pub ttl: u8,
    /// Path MTU discovery.
    pub pmtudisc: bool,
}

/// A device to be made.
#[derive(Debug, Clone)]
pub struct NewLink {
    /// Name, at most 15 bytes.
    pub name: String,
    /// What to make.
    pub kind: NewLinkKind,
    /// MTU; `None`: the kernel's choice.
    pub mtu: Option<u32>,
    /// Hardware address; `None`: random.
    pub mac: Option<MacAddr>,
    /// Bridge above it.
    pub master: Option<IfIndex>,
    /// Bring it up at once.
    pub up: bool,
}

/// What [`NewLink`] makes.
#[derive(Debug, Clone)]
pub enum NewLinkKind {
    /// A pair; the other end may be made directly in another namespace.
    Veth(VethPeer),
    /// Ethernet bridge.
    Bridge,
    /// VXLAN tunnel.
    Vxlan(Vxlan),
    /// IP-in-IP tunnel.
    IpIp(IpIp),
    /// WireGuard.
    Wireguard,
    /// Dummy.
    Dummy,
}

/// The other end of a veth pair.
#[derive(Debug, Clone)]
pub struct VethPeer {
    /// Name, at most 15 bytes.
    pub name: String,
    /// Hardware address; `None`: random.
    pub mac: Option<MacAddr>,
    /// MTU; `None`: the kernel's choice.
    pub mtu: Option<u32>,
    /// Namespace to make it in; `None`: the same.
    pub netns: Option<Arc<OwnedFd>>,
    /// Bring it up at once.
    pub up: bool,
}

impl NewLink {
    /// A device that is brought up, with nothing else set.
    pub fn new(name: impl Into<String>, kind: NewLinkKind) -> Self {
        Self {
            name: name.into(),
            kind,
            mtu: None,
            mac: None,
            master: None,
            up: true,
        }
    }

    /// A veth pair in one namespace, both ends up.
    pub fn veth(name: impl Into<String>, peer: impl Into<String>) -> Self {
        Self::new(
            name,
            NewLinkKind::Veth(VethPeer {
                name: peer.into(),
                mac: None,
                mtu: None,
                netns: None,
                up: true,
            }),
        )
    }
}

/// What to change on a device; `None` leaves a setting as it is.
#[derive(Debug, Clone, Default)]
pub struct LinkChange {
    /// New name (the device must be down on old kernels).
    pub name: Option<String>,
    /// MTU.
    pub mtu: Option<u32>,
    /// Hardware address.
    pub mac: Option<MacAddr>,
    /// `Some(None)` takes it out of its bridge.
    pub master: Option<Option<IfIndex>>,
    /// Up or down.
    pub up: Option<bool>,
    /// Free text.
    pub alias: Option<String>,
    /// Move it into this namespace.
    pub netns: Option<Arc<OwnedFd>>,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (#{})", self.name, self.index)
    }
}
