//! Communities of all kinds, and their text form in files, status and logs.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A community (RFC 1997), shown as `high:low`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Community(pub u32);

impl Community {
    /// Not to be sent outside the AS (RFC 1997).
    pub const NO_EXPORT: Self = Self(0xffff_ff01);
    /// Not to be sent to any peer (RFC 1997).
    pub const NO_ADVERTISE: Self = Self(0xffff_ff02);
    /// Not to be sent outside the member AS (RFC 1997).
    pub const NO_EXPORT_SUBCONFED: Self = Self(0xffff_ff03);
    /// Kept past its session by long-lived graceful restart; least preferred (RFC 9494).
    pub const LLGR_STALE: Self = Self(0xffff_0006);
    /// Must not be kept by long-lived graceful restart (RFC 9494).
    pub const NO_LLGR: Self = Self(0xffff_0007);
    /// The sender is about to go (RFC 8326).
    pub const GRACEFUL_SHUTDOWN: Self = Self(0xffff_0000);
}

impl fmt::Display for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0 >> 16, self.0 & 0xffff)
    }
}

impl fmt::Debug for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A large community (RFC 8092).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LargeCommunity {
    /// AS that gives the rest its meaning.
    pub global: u32,
    /// First local part.
    pub local1: u32,
    /// Second local part.
    pub local2: u32,
}

impl fmt::Display for LargeCommunity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.global, self.local1, self.local2)
    }
}

/// An extended community (RFC 4360), passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtendedCommunity(pub [u8; 8]);

impl ExtendedCommunity {
    /// Whether it may cross an AS border (RFC 4360 §2, T bit is "non-transitive").
    pub const fn is_transitive(self) -> bool {
        self.0[0] & 0x40 == 0
    }
}

/// `rt:` and `ro:` for route targets and origins of the three formats (RFC 4360 §4 and §5, RFC 5668), all others as
/// the hexadecimal number of their octets.
impl fmt::Display for ExtendedCommunity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [kind, subtype, a, b, c, d, e, g] = self.0;
        let name = match subtype {
            2 => "rt",
            3 => "ro",
            _ => return write!(f, "{:#018x}", u64::from_be_bytes(self.0)),
        };
        match kind {
            0 => {
                let (asn, value) = (u16::from_be_bytes([a, b]), u32::from_be_bytes([c, d, e, g]));
                write!(f, "{name}:{asn}:{value}")
            }
            1 => {
                let (address, value) = (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([e, g]));
                write!(f, "{name}:{address}:{value}")
            }
            2 => {
                let (asn, value) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, g]));
                write!(f, "{name}:{asn}:{value}")
            }
            _ => write!(f, "{:#018x}", u64::from_be_bytes(self.0)),
        }
    }
}

/// A community of any kind, told apart by its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnyCommunity {
    /// `A:B`.
    Standard(Community),
    /// `A:B:C`.
    Large(LargeCommunity),
    /// `rt:A:B`, `ro:A:B`.
    Extended(ExtendedCommunity),
}

/// The text is none of the forms.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no community: A:B, A:B:C (large), rt:A:B or ro:A:B (extended; A is an AS number or an IPv4 address) is expected"
)]
pub struct CommunityParseError(String);

impl FromStr for AnyCommunity {
    type Err = CommunityParseError;

    fn from_str(text: &str) -> Result<Self, CommunityParseError> {
        parse(text).ok_or_else(|| CommunityParseError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<AnyCommunity> {
    let mut words = text.split(':');
    let parts = [words.next(), words.next(), words.next()];
    if words.next().is_some() {
        return None;
    }
    match parts {
        [Some("rt"), Some(a), Some(b)] => extended(2, a, b).map(AnyCommunity::Extended),
        [Some("ro"), Some(a), Some(b)] => extended(3, a, b).map(AnyCommunity::Extended),
        [Some(a), Some(b), Some(c)] => Some(AnyCommunity::Large(LargeCommunity {
            global: a.parse().ok()?,
            local1: b.parse().ok()?,
            local2: c.parse().ok()?,
        })),
        [Some(a), Some(b), None] => {
            let (a, b): (u16, u16) = (a.parse().ok()?, b.parse().ok()?);
            let bits = u32::from(a) << 16 | u32::from(b);
            Some(AnyCommunity::Standard(Community(bits)))
        }
        _ => None,
    }
}

fn extended(subtype: u8, administrator: &str, value: &str) -> Option<ExtendedCommunity> {
    let long = |kind: u8, head: [u8; 4], value: u16| {
        let [a, b, c, d] = head;
        let [e, g] = value.to_be_bytes();
        ExtendedCommunity([kind, subtype, a, b, c, d, e, g])
    };
    if let Ok(address) = administrator.parse::<Ipv4Addr>() {
        return Some(long(1, address.octets(), value.parse().ok()?));
    }
    let asn: u32 = administrator.parse().ok()?;
    if let Ok(asn) = u16::try_from(asn) {
        let ([a, b], [c, d, e, g]) = (asn.to_be_bytes(), value.parse::<u32>().ok()?.to_be_bytes());
        return Some(ExtendedCommunity([0, subtype, a, b, c, d, e, g]));
    }
    Some(long(2, asn.to_be_bytes(), value.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_read_from_the_text_that_it_is_shown_as() {
        for text in [
            "64512:1",
            "65535:65535",
            "4200000000:0:4294967295",
            "rt:64512:4294967295",
            "ro:10.0.0.1:7",
            "rt:4200000000:65535",
        ] {
            let shown = match text.parse().unwrap() {
                AnyCommunity::Standard(community) => community.to_string(),
                AnyCommunity::Large(community) => community.to_string(),
                AnyCommunity::Extended(community) => community.to_string(),
            };
            assert_eq!(shown, text);
        }
        assert_eq!(
            ExtendedCommunity([0x43, 0, 0, 0, 0, 0, 0, 1]).to_string(),
            "0x4300000000000001"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for text in [
            "",
            "1",
            "1:65536",
            "65536:1",
            "1:2:3:4",
            "1:2:4294967296",
            "rt:1",
            "rt:65536:65536",
            "xx:1:2",
            "-1:2",
        ] {
            assert!(text.parse::<AnyCommunity>().is_err(), "{text}");
        }
    }
}
