//! Address prefixes in canonical form.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::text::serde_as_text;

/// A prefix whose host bits are zero. Addresses with host bits (such as a node's
/// `10.0.0.1/24`) are `ipnetwork::IpNetwork`, never this type.
///
/// Ordered by family, then address, then length, so that a prefix comes before what it contains.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    addr: IpAddr,
    prefix_len: u8,
}

/// Why a text or a pair is no canonical prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// The text has no `/`.
    #[error("{0:?} is not a CIDR: the prefix length is missing")]
    NoPrefixLength(String),
    /// The part before the `/` is no address.
    #[error("{0:?} is not a CIDR: the address is malformed")]
    Address(String),
    /// The part after the `/` is no number, or too large for the family.
    #[error("{0:?} is not a CIDR: the prefix length must be between 0 and {1}")]
    PrefixLength(String, u8),
    /// Bits after the prefix are set.
    #[error("{found} has bits set after its prefix; did you mean {canonical}?")]
    HostBits {
        /// What was given.
        found: String,
        /// The prefix that contains it.
        canonical: Cidr,
    },
}

const fn width(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn mask(addr: IpAddr, prefix_len: u8) -> IpAddr {
    match addr {
        IpAddr::V4(v4) => {
            let mask = u32::MAX
                .checked_shl(32 - u32::from(prefix_len))
                .unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask))
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX
                .checked_shl(128 - u32::from(prefix_len))
                .unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask))
        }
    }
}

impl Cidr {
    /// A prefix from its parts; host bits are refused.
    pub fn new(addr: IpAddr, prefix_len: u8) -> Result<Self, CidrError> {
        let masked = Self::masked(addr, prefix_len)?;
        if masked.addr == addr {
            Ok(masked)
        } else {
            Err(CidrError::HostBits {
                found: format!("{addr}/{prefix_len}"),
                canonical: masked,
            })
        }
    }

    /// The prefix of this length that contains the address.
    pub fn masked(addr: IpAddr, prefix_len: u8) -> Result<Self, CidrError> {
        if prefix_len > width(addr) {
            return Err(CidrError::PrefixLength(
                format!("{addr}/{prefix_len}"),
                width(addr),
            ));
        }
        Ok(Self {
            addr: mask(addr, prefix_len),
            prefix_len,
        })
    }

    /// The prefix of a single address: /32 or /128.
    #[must_use]
    pub const fn host(addr: IpAddr) -> Self {
        Self {
            addr,
            prefix_len: width(addr),
        }
    }

    /// The first address of the prefix.
    #[must_use]
    pub const fn addr(&self) -> IpAddr {
        self.addr
    }

    /// The number of leading bits that are fixed.
    #[must_use]
    pub const fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// Whether the family is IPv4.
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.addr.is_ipv4()
    }

    /// Whether the prefix is one address.
    #[must_use]
    pub const fn is_host(&self) -> bool {
        self.prefix_len == width(self.addr)
    }

    /// Whether the prefix is 0.0.0.0/0 or ::/0.
    #[must_use]
    pub const fn is_default(&self) -> bool {
        self.prefix_len == 0
    }

    /// Whether the address lies within. Families never mix.
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        addr.is_ipv4() == self.is_v4() && mask(addr, self.prefix_len) == self.addr
    }

    /// Whether every address of the other prefix lies within.
    #[must_use]
    pub fn contains_cidr(&self, other: &Self) -> bool {
        self.prefix_len <= other.prefix_len && self.contains(other.addr)
    }

    /// Whether the two have an address in common: one of them contains the other.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains_cidr(other) || other.contains_cidr(self)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.width().is_some() {
            f.pad(&format!("{}/{}", self.addr, self.prefix_len))
        } else {
            write!(f, "{}/{}", self.addr, self.prefix_len)
        }
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.prefix_len)
    }
}

fn parts(text: &str) -> Result<(IpAddr, u8), CidrError> {
    let (addr, len) = text
        .split_once('/')
        .ok_or_else(|| CidrError::NoPrefixLength(text.to_owned()))?;
    let addr: IpAddr = addr
        .parse()
        .map_err(|_| CidrError::Address(text.to_owned()))?;
    let digits = !len.is_empty() && len.bytes().all(|byte| byte.is_ascii_digit());
    let len = len
        .parse()
        .ok()
        .filter(|len| digits && *len <= width(addr))
        .ok_or_else(|| CidrError::PrefixLength(text.to_owned(), width(addr)))?;
    Ok((addr, len))
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (addr, len) = parts(text)?;
        Self::new(addr, len)
    }
}

serde_as_text!(Cidr, "a CIDR such as 10.0.0.0/8 or fd00::/8");

/// An entry of a `nets` list of policies and network sets: a prefix, or a bare address.
/// It keeps which of the two was written. Host bits are dropped when reading, as Calico does there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Net {
    /// A bare address.
    Address(IpAddr),
    /// A prefix.
    Cidr(Cidr),
}

impl Net {
    /// The prefix that is meant.
    #[must_use]
    pub const fn cidr(&self) -> Cidr {
        match self {
            Self::Address(addr) => Cidr::host(*addr),
            Self::Cidr(cidr) => *cidr,
        }
    }
}

impl From<Cidr> for Net {
    fn from(cidr: Cidr) -> Self {
        Self::Cidr(cidr)
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Cidr(cidr) => fmt::Display::fmt(cidr, f),
        }
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Net {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        if let Ok(addr) = text.parse() {
            return Ok(Self::Address(addr));
        }
        let (addr, len) = parts(text)?;
        Cidr::masked(addr, len).map(Self::Cidr)
    }
}

serde_as_text!(Net, "an address or a CIDR");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_addr() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
            any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
        ]
    }

    fn any_cidr() -> impl Strategy<Value = Cidr> {
        (any_addr(), 0u8..=128)
            .prop_map(|(addr, len)| Cidr::masked(addr, len % (width(addr) + 1)).unwrap())
    }

    proptest! {
        #[test]
        fn text_round_trips(cidr in any_cidr()) {
            prop_assert_eq!(cidr.to_string().parse::<Cidr>().unwrap(), cidr);
            let json = serde_json::to_string(&cidr).unwrap();
            prop_assert_eq!(serde_json::from_str::<Cidr>(&json).unwrap(), cidr);
        }

        #[test]
        fn masking_is_idempotent_and_contains_its_origin(addr in any_addr(), len in 0u8..=32) {
            let cidr = Cidr::masked(addr, len).unwrap();
            prop_assert!(cidr.contains(addr));
            prop_assert_eq!(Cidr::new(cidr.addr(), len).unwrap(), cidr);
        }

        #[test]
        fn containment_is_a_partial_order(a in any_cidr(), b in any_cidr()) {
            prop_assert!(a.contains_cidr(&a));
            if a.contains_cidr(&b) && b.contains_cidr(&a) {
                prop_assert_eq!(a, b);
            }
            if a.contains_cidr(&b) {
                prop_assert!(a.contains(b.addr()));
                prop_assert!(a <= b, "a prefix sorts before what it contains");
            }
        }

        #[test]
        fn overlap_is_symmetric_and_means_containment(a in any_cidr(), b in any_cidr()) {
            prop_assert_eq!(a.overlaps(&b), b.overlaps(&a));
            prop_assert_eq!(a.overlaps(&b), a.contains_cidr(&b) || b.contains_cidr(&a));
        }

        #[test]
        fn any_text_is_read_or_refused_without_panic(text in ".{0,40}") {
            let _ = text.parse::<Cidr>();
            let _ = text.parse::<Net>();
        }
    }

    #[test]
    fn host_bits_are_refused_with_the_canonical_form() {
        assert_eq!(
            "10.1.2.3/24".parse::<Cidr>().unwrap_err().to_string(),
            "10.1.2.3/24 has bits set after its prefix; did you mean 10.1.2.0/24?"
        );
    }

    #[test]
    fn malformed_texts_say_what_is_wrong() {
        for (text, reason) in [
            (
                "10.0.0.0",
                "\"10.0.0.0\" is not a CIDR: the prefix length is missing",
            ),
            (
                "10.0.0/8",
                "\"10.0.0/8\" is not a CIDR: the address is malformed",
            ),
            (
                "10.0.0.0/33",
                "\"10.0.0.0/33\" is not a CIDR: the prefix length must be between 0 and 32",
            ),
            (
                "fd00::/+8",
                "\"fd00::/+8\" is not a CIDR: the prefix length must be between 0 and 128",
            ),
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap_err().to_string(), reason);
        }
    }

    #[test]
    fn families_never_contain_each_other() {
        let v4: Cidr = "0.0.0.0/0".parse().unwrap();
        let v6: Cidr = "::/0".parse().unwrap();
        assert!(!v4.overlaps(&v6));
        assert!(!v6.contains("10.0.0.1".parse().unwrap()));
    }

    #[test]
    fn a_net_keeps_whether_it_was_a_bare_address() {
        for (text, written, cidr) in [
            ("10.0.0.5", "10.0.0.5", "10.0.0.5/32"),
            ("10.0.0.5/32", "10.0.0.5/32", "10.0.0.5/32"),
            ("10.0.0.5/24", "10.0.0.0/24", "10.0.0.0/24"),
        ] {
            let net: Net = text.parse().unwrap();
            assert_eq!(net.to_string(), written);
            assert_eq!(net.cidr().to_string(), cidr);
        }
    }
}
