//! The rules of policies and profiles, and the small types in them.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::Net;
use crate::metadata::StringMap;
use crate::text::text_enum;

text_enum! {
    /// What a rule does with the packets that match.
    pub enum Action {
        /// Accepts.
        Allow = "Allow",
        /// Drops or rejects.
        Deny = "Deny",
        /// Logs and goes on with the next rule.
        Log = "Log",
        /// Goes on with the next tier.
        Pass = "Pass",
    }
}

/// One rule. All conditions must hold; a list holds when one of its members does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// What to do.
    pub action: Action,
    /// 4 or 6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_version: Option<u8>,
    /// The packet has this protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// The packet is ICMP of this type and code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<Icmp>,
    /// The packet does not have this protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_protocol: Option<Protocol>,
    /// The packet is not ICMP of this type and code.
    #[serde(default, rename = "notICMP", skip_serializing_if = "Option::is_none")]
    pub not_icmp: Option<Icmp>,
    /// Conditions on the sender.
    #[serde(default, skip_serializing_if = "super::is_zero")]
    pub source: EntityRule,
    /// Conditions on the receiver.
    #[serde(default, skip_serializing_if = "super::is_zero")]
    pub destination: EntityRule,
    /// Conditions on HTTP requests; only with `Allow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpMatch>,
    /// Passed through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<RuleMetadata>,
}

impl Rule {
    /// A rule without conditions.
    #[must_use]
    pub fn new(action: Action) -> Self {
        Self {
            action,
            ip_version: None,
            protocol: None,
            icmp: None,
            not_protocol: None,
            not_icmp: None,
            source: EntityRule::default(),
            destination: EntityRule::default(),
            http: None,
            metadata: None,
        }
    }
}

/// Type and code of an ICMP message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Icmp {
    /// The type, up to 254.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub type_: Option<u8>,
    /// The code; needs the type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<u8>,
}

/// Conditions on the sender or the receiver.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EntityRule {
    /// The address is in one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<Net>,
    /// The address belongs to an endpoint or network set with these labels.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// The address belongs to an endpoint or network set of a namespace with these labels.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace_selector: String,
    /// The address and port belong to this service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub services: Option<ServiceMatch>,
    /// The port is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// The address is in none of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_nets: Vec<Net>,
    /// The address does not belong to an endpoint or network set with these labels.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub not_selector: String,
    /// The port is none of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_ports: Vec<Port>,
    /// The endpoint's service account is one of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_accounts: Option<ServiceAccountMatch>,
}

impl EntityRule {
    /// Whether there is no condition.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceMatch {
    /// Its name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its namespace; the policy's own when empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
}

/// Service accounts by name, by label, or both.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceAccountMatch {
    /// The name is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// The service account has these labels.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub selector: String,
}

/// Conditions on HTTP requests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpMatch {
    /// The method is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
    /// The path is one of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<HttpPath>,
}

/// A path of an HTTP request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HttpPath {
    /// The whole path.
    Exact(String),
    /// Its beginning.
    Prefix(String),
}

/// What a rule carries along.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RuleMetadata {
    /// Free texts.
    #[serde(skip_serializing_if = "StringMap::is_empty")]
    pub annotations: StringMap,
}

/// An IP protocol, kept in the spelling in which it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
    Icmp,
    IcmpV6,
    Sctp,
    UdpLite,
    /// By number, 1 to 255.
    Number(u8),
}

impl Protocol {
    const NAMED: [(Self, &'static str, u8); 6] = [
        (Self::Tcp, "TCP", 6),
        (Self::Udp, "UDP", 17),
        (Self::Icmp, "ICMP", 1),
        (Self::IcmpV6, "ICMPv6", 58),
        (Self::Sctp, "SCTP", 132),
        (Self::UdpLite, "UDPLite", 136),
    ];

    /// The protocol number (IANA).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmp => 1,
            Self::IcmpV6 => 58,
            Self::Sctp => 132,
            Self::UdpLite => 136,
            Self::Number(number) => number,
        }
    }

    /// Whether rules for this protocol may name ports.
    #[must_use]
    pub const fn has_ports(self) -> bool {
        matches!(self.number(), 6 | 17 | 132)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMED.iter().find(|(protocol, ..)| protocol == self) {
            Some((_, name, _)) => f.pad(name),
            None => self.number().fmt(f),
        }
    }
}

/// A text or number that is no protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a protocol (TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255)"
)]
pub struct ProtocolError(String);

impl FromStr for Protocol {
    type Err = ProtocolError;

    fn from_str(text: &str) -> Result<Self, ProtocolError> {
        if let Some((protocol, ..)) = Self::NAMED
            .iter()
            .find(|(_, name, _)| name.eq_ignore_ascii_case(text))
        {
            return Ok(*protocol);
        }
        match text.parse() {
            Ok(number) if number != 0 => Ok(Self::Number(number)),
            _ => Err(ProtocolError(text.to_owned())),
        }
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_u8(*number),
            named => serializer.collect_str(named),
        }
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrText(|text| {
            text.parse()
                .map_err(|error: ProtocolError| error.to_string())
        }))
    }
}

/// A port: a number, a range `a:b`, or the name of a port of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// A number.
    Number(u16),
    /// From and to, inclusive.
    Range(u16, u16),
    /// A name.
    Named(String),
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Range(from, to) => write!(f, "{from}:{to}"),
            Self::Named(name) => f.pad(name),
        }
    }
}

/// A text or number that is no port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Neither number, range nor name.
    #[error("{0:?} is not a port (a number from 0 to 65535, a range \"a:b\" or a name)")]
    Malformed(String),
    /// The range ends before it starts.
    #[error("port range {0:?} ends before it starts")]
    Reversed(String),
}

impl FromStr for Port {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let malformed = || PortError::Malformed(text.to_owned());
        let numeric = text.starts_with(|c: char| c.is_ascii_digit() || c == '-')
            && text
                .bytes()
                .all(|byte| byte.is_ascii_digit() || matches!(byte, b':' | b'-' | b'.'));
        if let Some((from, to)) = text.split_once(':') {
            let from = from.parse().map_err(|_| malformed())?;
            let to = to.parse().map_err(|_| malformed())?;
            return if from <= to {
                Ok(Self::Range(from, to))
            } else {
                Err(PortError::Reversed(text.to_owned()))
            };
        }
        if numeric {
            return text.parse().map(Self::Number).map_err(|_| malformed());
        }
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let named = (1..=128).contains(&text.len()) && text.bytes().all(legal);
        if named {
            Ok(Self::Named(text.to_owned()))
        } else {
            Err(malformed())
        }
    }
}

impl Serialize for Port {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_u16(*number),
            other => serializer.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrText(|text| {
            text.parse().map_err(|error: PortError| error.to_string())
        }))
    }
}

/// Reads a number as if it were its text, so that one parser judges both.
pub(super) struct NumberOrText<T>(pub(super) fn(&str) -> Result<T, String>);

impl<T> de::Visitor<'_> for NumberOrText<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number or a text")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.0)(text).map_err(E::custom)
    }
}

/// Place of a policy or tier in its order. Written as an integer where it is one.
#[derive(Debug, Clone, Copy)]
pub struct Order(pub f64);

impl PartialEq for Order {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Order {}

impl PartialOrd for Order {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Order {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Order {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Exact up to 2^53; larger orders keep the floating-point form.
        #[allow(clippy::cast_possible_truncation)]
        if self.0.fract() == 0.0 && self.0.abs() <= 9_007_199_254_740_992.0 {
            serializer.serialize_i64(self.0 as i64)
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Order {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer).map(Self)
    }
}

text_enum! {
    /// A direction to which a policy applies.
    pub enum PolicyType { Ingress = "Ingress", Egress = "Egress" }
}

text_enum! {
    /// A hint for the dataplane.
    pub enum PerformanceHint { AssumeNeededOnEveryNode = "AssumeNeededOnEveryNode" }
}

text_enum! {
    /// What committing a staged policy would do.
    pub enum StagedAction { Set = "Set", Delete = "Delete", Learn = "Learn", Ignore = "Ignore" }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_port_text_is_read_or_refused_without_panic(text in ".{0,20}") {
            if let Ok(port) = text.parse::<Port>() {
                prop_assert_eq!(port.to_string().parse::<Port>().unwrap(), port);
            }
        }
    }

    #[test]
    fn protocols_keep_their_spelling() {
        for (read, written, number) in [
            ("\"TCP\"", "\"TCP\"", 6),
            ("\"icmpv6\"", "\"ICMPv6\"", 58),
            ("17", "17", 17),
            ("\"17\"", "17", 17),
        ] {
            let protocol: Protocol = serde_json::from_str(read).unwrap();
            assert_eq!(protocol.number(), number);
            assert_eq!(serde_json::to_string(&protocol).unwrap(), written);
        }
        for text in ["0", "256", "-1", "\"TCPP\"", "\"\""] {
            assert!(serde_json::from_str::<Protocol>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ports_are_numbers_ranges_or_names() {
        for (read, expected) in [
            ("80", Port::Number(80)),
            ("\"80\"", Port::Number(80)),
            ("\"80:90\"", Port::Range(80, 90)),
            ("\"http-alt\"", Port::Named("http-alt".to_owned())),
        ] {
            assert_eq!(serde_json::from_str::<Port>(read).unwrap(), expected);
        }
        for text in [
            "65536",
            "-1",
            "\"90:80\"",
            "\"1:2:3\"",
            "\"\"",
            "\"a b\"",
            "\"80:\"",
        ] {
            assert!(serde_json::from_str::<Port>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn orders_are_written_as_integers_where_they_are() {
        for (read, written) in [
            ("100", "100"),
            ("100.0", "100"),
            ("0.5", "0.5"),
            ("-3", "-3"),
        ] {
            let order: Order = serde_json::from_str(read).unwrap();
            assert_eq!(serde_json::to_string(&order).unwrap(), written);
        }
        assert!(Order(1.0) < Order(1.5));
    }
}
