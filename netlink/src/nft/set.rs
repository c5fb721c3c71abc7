//! Sets, maps and their elements as plain values.
//!
//! Keys are the bytes that a register holds: addresses and ports in network order, marks in host order, interface
//! names padded with NUL to 16 bytes; every field of a concatenation padded to 4 bytes.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use ipnetwork::IpNetwork;
use smallvec::SmallVec;

use super::Verdict;

/// Type of a key or of a map's data: length for the kernel, number for `nft list` (nftables' `datatype.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DataType {
    /// IPv4 address.
    Ipv4Addr,
    /// IPv6 address.
    Ipv6Addr,
    /// Ethernet address.
    EtherAddr,
    /// Layer 4 protocol number.
    InetProto,
    /// Port.
    InetService,
    /// Packet or conntrack mark.
    Mark,
    /// Interface name.
    IfName,
    /// Interface index.
    IfIndex,
    /// Layer 3 family (`meta nfproto`).
    NfProto,
    /// ICMP type.
    IcmpType,
    /// ICMPv6 type.
    Icmp6Type,
    /// Another type: its number and length.
    Other(u32, u32),
}

impl DataType {
    /// nftables' number of the type.
    pub fn number(self) -> u32 {
        match self {
            Self::NfProto => 2,
            Self::Ipv4Addr => 7,
            Self::Ipv6Addr => 8,
            Self::EtherAddr => 9,
            Self::InetProto => 12,
            Self::InetService => 13,
            Self::IcmpType => 14,
            Self::Mark => 19,
            Self::IfIndex => 20,
            Self::Icmp6Type => 29,
            Self::IfName => 41,
            Self::Other(number, _) => number,
        }
    }

    /// Bytes of a value, unpadded.
    pub fn size(self) -> u32 {
        match self {
            Self::NfProto | Self::InetProto | Self::IcmpType | Self::Icmp6Type => 1,
            Self::InetService => 2,
            Self::Ipv4Addr | Self::Mark | Self::IfIndex => 4,
            Self::EtherAddr => 6,
            Self::Ipv6Addr | Self::IfName => 16,
            Self::Other(_, len) => len,
        }
    }

    /// nftables' byte order: 1 host, 2 network.
    pub(crate) fn byte_order(self) -> u32 {
        match self {
            Self::Mark | Self::IfIndex | Self::IfName => 1,
            _ => 2,
        }
    }

    fn from_number(number: u32, len: u32) -> Self {
        [
            Self::NfProto,
            Self::Ipv4Addr,
            Self::Ipv6Addr,
            Self::EtherAddr,
            Self::InetProto,
            Self::InetService,
            Self::IcmpType,
            Self::Mark,
            Self::IfIndex,
            Self::Icmp6Type,
            Self::IfName,
        ]
        .into_iter()
        .find(|kind| kind.number() == number)
        .unwrap_or(Self::Other(number, len))
    }
}

/// The fields of a key: one, or several concatenated.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyType(pub SmallVec<[DataType; 4]>);

impl KeyType {
    /// A key of one field.
    pub fn one(kind: DataType) -> Self {
        Self(SmallVec::from_slice(&[kind]))
    }

    /// A key of several fields, e.g. address . protocol . port.
    pub fn concat(kinds: &[DataType]) -> Self {
        Self(SmallVec::from_slice(kinds))
    }

    /// The combined number: 6 bits per field.
    pub(crate) fn number(&self) -> u32 {
        self.0
            .iter()
            .fold(0, |number, kind| (number << 6) | kind.number())
    }

    /// Bytes of the whole key: unpadded for one field, each padded to 4 when concatenated.
    pub(crate) fn size(&self) -> u32 {
        match self.0.as_slice() {
            [one] => one.size(),
            many => many
                .iter()
                .map(|kind| kind.size().next_multiple_of(4))
                .sum(),
        }
    }

    pub(crate) fn is_concat(&self) -> bool {
        self.0.len() > 1
    }

    /// From the kernel's numbers; the lengths of unknown fields come out of the whole.
    pub(crate) fn from_number(number: u32, len: u32) -> Self {
        let mut numbers = SmallVec::<[u32; 4]>::new();
        let mut rest = number;
        loop {
            numbers.push(rest & 0x3f);
            rest >>= 6;
            if rest == 0 {
                break;
            }
        }
        numbers.reverse();
        if let [one] = numbers.as_slice() {
            return Self::one(DataType::from_number(*one, len));
        }
        Self(
            numbers
                .into_iter()
                .map(|number| DataType::from_number(number, 4))
                .collect(),
        )
    }
}

/// What a map yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapData {
    /// A verdict.
    Verdict,
    /// A value.
    Value(DataType),
}

/// A named set or map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Set {
    /// Name, at most 255 bytes.
    pub name: Arc<str>,
    /// Key.
    pub key: KeyType,
    /// Set for maps.
    pub data: Option<MapData>,
    /// Elements are ranges (`NFT_SET_INTERVAL`).
    pub interval: bool,
    /// Elements may expire (`NFT_SET_TIMEOUT`).
    pub timeout: bool,
    /// Rules may add elements (`NFT_SET_EVAL`), see [`super::Expr::Dynset`].
    pub dynamic: bool,
    /// Every element has a packet and byte counter.
    pub counter: bool,
    /// Most elements it may hold (dynamic sets need a bound).
    pub size: Option<u32>,
    /// Shown by `nft list`.
    pub comment: Option<String>,
}

impl Set {
    /// A set of single values.
    pub fn exact(name: impl Into<Arc<str>>, key: KeyType) -> Self {
        Self {
            name: name.into(),
            key,
            data: None,
            interval: false,
            timeout: false,
            dynamic: false,
            counter: false,
            size: None,
            comment: None,
        }
    }

    /// A set of ranges.
    pub fn interval(name: impl Into<Arc<str>>, key: KeyType) -> Self {
        Self {
            interval: true,
            ..Self::exact(name, key)
        }
    }

    /// A map from single values to verdicts.
    pub fn verdict_map(name: impl Into<Arc<str>>, key: KeyType) -> Self {
        Self {
            data: Some(MapData::Verdict),
            ..Self::exact(name, key)
        }
    }

    /// A map from single values to values.
    pub fn map(name: impl Into<Arc<str>>, key: KeyType, data: DataType) -> Self {
        Self {
            data: Some(MapData::Value(data)),
            ..Self::exact(name, key)
        }
    }
}

/// A set as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedSet {
    /// Table.
    pub table: super::TableName,
    /// The set.
    pub set: Set,
    /// Handle.
    pub handle: u64,
}

/// The bytes of a key or of data.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Key(pub SmallVec<[u8; 16]>);

impl Key {
    /// Any bytes.
    pub fn bytes(bytes: &[u8]) -> Self {
        Self(SmallVec::from_slice(bytes))
    }

    /// An address.
    pub fn ip(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::bytes(&address.octets()),
            IpAddr::V6(address) => Self::bytes(&address.octets()),
        }
    }

    /// A port.
    pub fn port(port: u16) -> Self {
        Self::bytes(&port.to_be_bytes())
    }

    /// A protocol number, or another one-byte value.
    pub fn byte(value: u8) -> Self {
        Self::bytes(&[value])
    }

    /// A mark, an index or another value in host order.
    pub fn host32(value: u32) -> Self {
        Self::bytes(&value.to_ne_bytes())
    }

    /// An interface name, padded; a longer name is cut, as the kernel's names cannot be longer.
    pub fn ifname(name: &str) -> Self {
        let mut bytes = [0; 16];
        let len = name.len().min(15);
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self::bytes(&bytes)
    }

    /// A concatenation: every field padded to 4 bytes.
    pub fn concat<'a>(fields: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut all = SmallVec::new();
        for field in fields {
            all.extend_from_slice(&field.0);
            let padded = all.len().next_multiple_of(4);
            all.resize(padded, 0);
        }
        Self(all)
    }

    /// The key as an address, if it has the length of one.
    pub fn as_ip(&self) -> Option<IpAddr> {
        <[u8; 4]>::try_from(self.0.as_slice())
            .map(IpAddr::from)
            .or_else(|_| <[u8; 16]>::try_from(self.0.as_slice()).map(IpAddr::from))
            .ok()
    }

    /// The key as an interface name.
    pub fn as_ifname(&self) -> Option<String> {
        let end = self
            .0
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.0.len());
        std::str::from_utf8(&self.0[..end]).ok().map(str::to_owned)
    }

    /// The next greater key of the same length; `None` after the greatest.
    pub(crate) fn successor(&self) -> Option<Self> {
        let mut next = self.clone();
        for byte in next.0.iter_mut().rev() {
            let (value, overflow) = byte.overflowing_add(1);
            *byte = value;
            if !overflow {
                return Some(next);
            }
        }
        None
    }

    /// The next smaller key of the same length; `None` before the smallest.
    pub(crate) fn predecessor(&self) -> Option<Self> {
        let mut next = self.clone();
        for byte in next.0.iter_mut().rev() {
            let (value, overflow) = byte.overflowing_sub(1);
            *byte = value;
            if !overflow {
                return Some(next);
            }
        }
        None
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(ip) = (self.0.len() == 4).then(|| self.as_ip()).flatten() {
            return write!(f, "{ip}");
        }
        if self.0.len() == 16 {
            let name_len = self.0.iter().position(|byte| *byte == 0).unwrap_or(16);
            let is_name = name_len > 0
                && self.0[..name_len].iter().all(u8::is_ascii_graphic)
                && self.0[name_len..].iter().all(|byte| *byte == 0);
            if is_name && let Some(name) = self.as_ifname() {
                return f.write_str(&name);
            }
            if let Some(ip) = self.as_ip() {
                return write!(f, "{ip}");
            }
        }
        f.write_str("0x")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a map element yields.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// A verdict.
    Verdict(Verdict),
    /// A value.
    Value(Key),
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Elem {
    /// The value, or the first of the range.
    pub key: Key,
    /// The last of the range (inclusive), in interval sets.
    pub end: Option<Key>,
    /// What it yields, in maps.
    pub data: Option<Data>,
    /// How long it lives.
    pub timeout: Option<Duration>,
    /// How long it still lives; only set in dumps.
    pub expires: Option<Duration>,
    /// Packets and bytes, in sets with counters; may be given to start from.
    pub counter: Option<(u64, u64)>,
    /// Shown by `nft list`.
    pub comment: Option<String>,
}

impl Elem {
    /// A single value.
    pub fn new(key: Key) -> Self {
        Self {
            key,
            end: None,
            data: None,
            timeout: None,
            expires: None,
            counter: None,
            comment: None,
        }
    }

    /// A range, both ends in it.
    pub fn range(first: Key, last: Key) -> Self {
        Self {
            end: Some(last),
            ..Self::new(first)
        }
    }

    /// All addresses of a prefix.
    pub fn prefix(prefix: IpNetwork) -> Self {
        let last = match prefix {
            IpNetwork::V4(prefix) => IpAddr::V4(prefix.broadcast()),
            IpNetwork::V6(prefix) => IpAddr::V6(prefix.broadcast()),
        };
        Self::range(Key::ip(prefix.network()), Key::ip(last))
    }

    /// The same element, leading to a verdict.
    #[must_use]
    pub fn verdict(mut self, verdict: Verdict) -> Self {
        self.data = Some(Data::Verdict(verdict));
        self
    }

    /// The same element, yielding a value.
    #[must_use]
    pub fn value(mut self, value: Key) -> Self {
        self.data = Some(Data::Value(value));
        self
    }

    /// The same element with a life time.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

impl fmt::Display for Elem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.key)?;
        match &self.end {
            Some(end) if *end != self.key => write!(f, "-{end}"),
            _ => Ok(()),
        }
    }
}
