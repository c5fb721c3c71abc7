//! The small typed names: node, AS number, revision, MAC address.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::text::serde_as_text;

/// The name of a cluster node, as in `Node.metadata.name`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(pub Arc<str>);

impl NodeName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Opaque version of an object in a datastore. Only equality has a meaning.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub Arc<str>);

impl Revision {
    /// The revision as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

macro_rules! shared_text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

shared_text!(NodeName);
shared_text!(Revision);

/// An autonomous system number (RFC 6793, four octets).
///
/// Calico writes it as a number, and reads a number, a decimal text or the `asdot` text `a.b`
/// of RFC 5396.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Asn(pub u32);

impl Asn {
    /// What Calico uses where nothing is configured.
    pub const DEFAULT: Self = Self(64512);
}

impl fmt::Display for Asn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Asn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AS{}", self.0)
    }
}

/// A text that is no AS number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an AS number (0 to 4294967295, or two 16-bit numbers \"a.b\")")]
pub struct AsnError(String);

impl FromStr for Asn {
    type Err = AsnError;

    fn from_str(text: &str) -> Result<Self, AsnError> {
        let number = match text.split_once('.') {
            Some((high, low)) => match (high.parse::<u16>(), low.parse::<u16>()) {
                (Ok(high), Ok(low)) => Some(u32::from(high) << 16 | u32::from(low)),
                _ => None,
            },
            None => text.parse().ok(),
        };
        number.map(Self).ok_or_else(|| AsnError(text.to_owned()))
    }
}

impl Serialize for Asn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> Deserialize<'de> for Asn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrText;
        impl de::Visitor<'_> for NumberOrText {
            type Value = Asn;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an AS number")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Asn, E> {
                u32::try_from(number)
                    .map(Asn)
                    .map_err(|_| E::custom(AsnError(number.to_string())))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Asn, E> {
                u32::try_from(number)
                    .map(Asn)
                    .map_err(|_| E::custom(AsnError(number.to_string())))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Asn, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(NumberOrText)
    }
}

/// An Ethernet address, written as six pairs of lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// A text that is no Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address (six pairs of hexadecimal digits)")]
pub struct MacAddrError(String);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, MacAddrError> {
        let refuse = || MacAddrError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split([':', '-']);
        for octet in &mut octets {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && !part.starts_with('+'))
                .ok_or_else(refuse)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| refuse())?;
        }
        if parts.next().is_some() {
            Err(refuse())
        } else {
            Ok(Self(octets))
        }
    }
}

serde_as_text!(MacAddr, "a MAC address");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_numbers_are_read_in_three_spellings_and_written_in_one() {
        for text in ["65537", "\"65537\"", "\"1.1\""] {
            let asn: Asn = serde_json::from_str(text).unwrap();
            assert_eq!(asn, Asn(65537), "{text}");
            assert_eq!(serde_json::to_string(&asn).unwrap(), "65537");
        }
    }

    #[test]
    fn an_as_number_that_does_not_fit_is_refused() {
        for text in ["-1", "4294967296", "\"1.65536\"", "\"\"", "\"1.2.3\""] {
            assert!(serde_json::from_str::<Asn>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn mac_addresses_survive_their_text() {
        let mac: MacAddr = "66:07:3A:ff:00:1b".parse().unwrap();
        assert_eq!(mac.to_string(), "66:07:3a:ff:00:1b");
        for text in [
            "66:07:3a:ff:00",
            "66:07:3a:ff:00:1b:00",
            "66:07:3a:ff:00:g1",
            "",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }
}
