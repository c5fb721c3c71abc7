//! Prefixes and NLRI (RFC 4271 §4.3, RFC 4760 §5, RFC 7911 §3).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

use super::family::Family;

/// An IPv4 or IPv6 prefix; bits after the length are always zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// The prefix of `len` bits that holds `addr`; `None` if `len` is too long for the family.
    pub fn new(addr: IpAddr, len: u8) -> Option<Self> {
        match addr {
            IpAddr::V4(a) if len <= 32 => Some(Self::v4(u32::from(a), len)),
            IpAddr::V6(a) if len <= 128 => Some(Self::v6(u128::from(a), len)),
            _ => None,
        }
    }

    /// An IPv4 prefix; a length over 32 counts as 32, host bits are cleared.
    pub fn v4(bits: u32, len: u8) -> Self {
        let len = len.min(32);
        let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
        Self {
            addr: IpAddr::V4(Ipv4Addr::from(bits & mask)),
            len,
        }
    }

    /// An IPv6 prefix; a length over 128 counts as 128, host bits are cleared.
    pub fn v6(bits: u128, len: u8) -> Self {
        let len = len.min(128);
        let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
        Self {
            addr: IpAddr::V6(Ipv6Addr::from(bits & mask)),
            len,
        }
    }

    /// The network address.
    pub const fn addr(&self) -> IpAddr {
        self.addr
    }

    /// The length in bits.
    #[expect(
        clippy::len_without_is_empty,
        reason = "the length of a prefix, not of a collection"
    )]
    pub const fn len(&self) -> u8 {
        self.len
    }

    /// The unicast family that carries this prefix.
    pub const fn family(&self) -> Family {
        match self.addr {
            IpAddr::V4(_) => Family::IPV4_UNICAST,
            IpAddr::V6(_) => Family::IPV6_UNICAST,
        }
    }

    /// Whether `other` is this prefix or lies inside it.
    pub fn contains(&self, other: &Self) -> bool {
        other.len >= self.len && Self::new(other.addr, self.len) == Some(*self)
    }

    /// Whether an address lies inside this prefix.
    pub fn contains_addr(&self, addr: IpAddr) -> bool {
        let host = if addr.is_ipv4() { 32 } else { 128 };
        Self::new(addr, host).is_some_and(|host| self.contains(&host))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text was not `address/length`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("not a prefix: {0:?} (expected address/length)")]
pub struct PrefixParseError(String);

impl std::str::FromStr for Prefix {
    type Err = PrefixParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('/')
            .and_then(|(addr, len)| Self::new(addr.parse().ok()?, len.parse().ok()?))
            .ok_or_else(|| PrefixParseError(text.to_owned()))
    }
}

/// One route of an NLRI field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nlri {
    /// The destination.
    pub prefix: Prefix,
    /// Path identifier (RFC 7911); 0 when add-path is not in use. 0 is also a legal identifier.
    pub path_id: u32,
}

impl Nlri {
    /// A route without path identifier.
    pub const fn new(prefix: Prefix) -> Self {
        Self { prefix, path_id: 0 }
    }

    /// Octets on the wire.
    pub fn wire_len(&self, add_path: bool) -> usize {
        usize::from(add_path) * 4 + 1 + usize::from(self.prefix.len.div_ceil(8))
    }

    /// Appends the wire form.
    pub fn encode(&self, add_path: bool, out: &mut BytesMut) {
        if add_path {
            out.put_u32(self.path_id);
        }
        out.put_u8(self.prefix.len);
        let octets = usize::from(self.prefix.len.div_ceil(8));
        match self.prefix.addr {
            IpAddr::V4(a) => out.put_slice(&a.octets()[..octets]),
            IpAddr::V6(a) => out.put_slice(&a.octets()[..octets]),
        }
    }
}

/// An NLRI field cannot be read: the session is lost (RFC 7606 §5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NlriError {
    /// Longer than the family's addresses.
    #[error("prefix length {0} is too long")]
    PrefixTooLong(u8),
    /// The field ends inside a route.
    #[error("truncated route")]
    Truncated,
}

/// A validated NLRI field, kept as received: iteration allocates nothing and cannot fail.
///
/// ```text
/// +---------------------------------+
/// | Path identifier (4, add-path)   |  \
/// | Length in bits (1)              |   } repeated
/// | Prefix (as many octets as bits  |  /
/// |         need; rest is ignored)  |
/// +---------------------------------+
/// ```
#[derive(Clone, Debug)]
pub struct NlriBlock {
    family: Family,
    add_path: bool,
    bytes: Bytes,
    count: u32,
}

impl NlriBlock {
    /// An empty field.
    pub const fn empty(family: Family) -> Self {
        Self {
            family,
            add_path: false,
            bytes: Bytes::new(),
            count: 0,
        }
    }

    /// Checks a received field.
    pub fn decode(family: Family, add_path: bool, bytes: Bytes) -> Result<Self, NlriError> {
        let mut rest = &bytes[..];
        let mut count = 0;
        while !rest.is_empty() {
            rest = split_route(rest, family, add_path)?.1;
            count += 1;
        }
        Ok(Self {
            family,
            add_path,
            bytes,
            count,
        })
    }

    /// Builds a field from routes (those of another family are left out).
    pub fn from_routes(family: Family, add_path: bool, routes: &[Nlri]) -> Self {
        let mut bytes = BytesMut::new();
        let mut count = 0;
        for route in routes.iter().filter(|r| r.prefix.family() == family) {
            route.encode(add_path, &mut bytes);
            count += 1;
        }
        Self {
            family,
            add_path,
            bytes: bytes.freeze(),
            count,
        }
    }

    /// The family of all routes.
    pub const fn family(&self) -> Family {
        self.family
    }

    /// Number of routes.
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is no route.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether routes carry path identifiers on the wire.
    pub const fn add_path(&self) -> bool {
        self.add_path
    }

    /// The wire form.
    pub const fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The routes, in order.
    pub fn iter(&self) -> impl Iterator<Item = Nlri> + '_ {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (nlri, tail) = split_route(rest, self.family, self.add_path).ok()?;
            rest = tail;
            Some(nlri)
        })
    }
}

impl PartialEq for NlriBlock {
    fn eq(&self, other: &Self) -> bool {
        self.family == other.family && self.count == other.count && self.iter().eq(other.iter())
    }
}

impl Eq for NlriBlock {}

fn split_route(field: &[u8], family: Family, add_path: bool) -> Result<(Nlri, &[u8]), NlriError> {
    let (path_id, field) = match (add_path, field.split_first_chunk::<4>()) {
        (true, Some((id, rest))) => (u32::from_be_bytes(*id), rest),
        (true, None) => return Err(NlriError::Truncated),
        (false, _) => (0, field),
    };
    let (&len, field) = field.split_first().ok_or(NlriError::Truncated)?;
    if len > family.max_prefix_len() {
        return Err(NlriError::PrefixTooLong(len));
    }
    let (octets, rest) = field
        .split_at_checked(usize::from(len.div_ceil(8)))
        .ok_or(NlriError::Truncated)?;
    let prefix = if family.afi == 1 {
        let mut raw = [0; 4];
        raw[..octets.len()].copy_from_slice(octets);
        Prefix::v4(u32::from_be_bytes(raw), len)
    } else {
        let mut raw = [0; 16];
        raw[..octets.len()].copy_from_slice(octets);
        Prefix::v6(u128::from_be_bytes(raw), len)
    };
    Ok((Nlri { prefix, path_id }, rest))
}
