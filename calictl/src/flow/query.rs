//! Reads `SRC DST[:PORT][/PROTO]`: a pod as `namespace/pod` or `pod`, or an address.

use std::net::IpAddr;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// One end as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// A pod.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// An address, of a pod or of anybody else.
    Address(IpAddr),
}

impl FromStr for End {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'));
        if let Ok(address) = bare.unwrap_or(text).parse() {
            return Ok(Self::Address(address));
        }
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        let fits = |part: &str| {
            let allowed =
                |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
            !part.is_empty() && part.chars().all(allowed)
        };
        if !fits(namespace) || !fits(name) {
            bail!("'{text}' is neither an address nor a pod (namespace/name)");
        }
        Ok(Self::Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Service {
    /// IP protocol number; for ICMP that of IPv4, whatever the family.
    pub(crate) protocol: u8,
    /// Destination port, where the protocol has one.
    pub(crate) port: u16,
}

impl Service {
    /// As it is written behind a destination.
    pub(crate) fn describe(self) -> String {
        match self.protocol {
            1 => "icmp (echo request)".to_owned(),
            other => format!("{} port {}", protocol_name(other), self.port),
        }
    }
}

/// The name of a protocol as users write it.
pub(crate) fn protocol_name(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        other => format!("protocol {other}"),
    }
}

/// A destination with what is sent to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Destination {
    /// Where to.
    pub(crate) end: End,
    /// What.
    pub(crate) service: Service,
}

impl FromStr for Destination {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, name)) => match protocol_number(name) {
                Some(number) => (rest, Some(number)),
                None => (text, None),
            },
            None => (text, None),
        };
        let (end, port) = split_port(rest)?;
        let protocol = match (protocol, port) {
            (Some(protocol), _) => protocol,
            (None, Some(_)) => 6,
            (None, None) => 1,
        };
        if protocol == 1 && port.is_some() {
            bail!("'{text}': icmp has no ports");
        }
        if protocol != 1 && port.is_none() {
            bail!("'{text}' has no port; write it as DST:PORT/PROTO, for example web:80/tcp");
        }
        Ok(Self {
            end: end.parse()?,
            service: Service {
                protocol,
                port: port.unwrap_or_default(),
            },
        })
    }
}

fn protocol_number(name: &str) -> Option<u8> {
    match name.to_ascii_lowercase().as_str() {
        "tcp" => Some(6),
        "udp" => Some(17),
        "sctp" => Some(132),
        "icmp" | "icmpv6" => Some(1),
        _ => None,
    }
}

fn split_port(text: &str) -> Result<(&str, Option<u16>)> {
    // An IPv6 address has a port only behind brackets.
    if text.parse::<IpAddr>().is_ok() {
        return Ok((text, None));
    }
    match text.rsplit_once(':') {
        Some((end, port)) => {
            let number = port
                .parse()
                .with_context(|| format!("'{port}' in '{text}' is not a port"))?;
            Ok((end, Some(number)))
        }
        None => Ok((text, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> String {
        match text.parse::<Destination>() {
            Ok(Destination { end, service }) => format!("{end:?} {}", service.describe()),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn destinations_are_read_as_they_are_written() {
        for (text, meaning) in [
            (
                "web:80",
                "Pod { namespace: \"default\", name: \"web\" } tcp port 80",
            ),
            (
                "shop/web:53/udp",
                "Pod { namespace: \"shop\", name: \"web\" } udp port 53",
            ),
            ("10.0.0.1:443/TCP", "Address(10.0.0.1) tcp port 443"),
            ("[fd00::1]:80", "Address(fd00::1) tcp port 80"),
            ("fd00::1", "Address(fd00::1) icmp (echo request)"),
            (
                "shop/web",
                "Pod { namespace: \"shop\", name: \"web\" } icmp (echo request)",
            ),
            (
                "shop/tcp:1",
                "Pod { namespace: \"shop\", name: \"tcp\" } tcp port 1",
            ),
            (
                "web/udp",
                "error: 'web/udp' has no port; write it as DST:PORT/PROTO, for example web:80/tcp",
            ),
            ("web:http", "error: 'http' in 'web:http' is not a port"),
            ("web:1/icmp", "error: 'web:1/icmp': icmp has no ports"),
            (
                "Web:1",
                "error: 'Web' is neither an address nor a pod (namespace/name)",
            ),
        ] {
            assert_eq!(read(text), meaning, "{text}");
        }
    }
}
