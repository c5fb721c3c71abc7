//! `runtimeConfig.portMappings`, as Kubernetes runtimes and podman give it (CNI conventions, "port mappings").

use std::net::IpAddr;

use cali_control::cni::Failure;
use serde::{Deserialize, Serialize};

use crate::config::AskedPort;
use crate::spec::{code, failure};

/// Protocols that have ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Transport {
    /// The protocol's number (IANA).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    fn named(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            // Kubernetes' default.
            "" | "tcp" => Some(Self::Tcp),
            "udp" => Some(Self::Udp),
            "sctp" => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// A port of the host that leads to one of the container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Only for this address of the host; an unspecified one (`0.0.0.0`, `::`) means all of its family, none means all.
    pub host_ip: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the container.
    pub container_port: u16,
    /// Protocol.
    pub transport: Transport,
}

/// Reads what the runtime asks for.
pub fn ports(asked: &[AskedPort]) -> Result<Vec<PortMapping>, Failure> {
    asked.iter().map(port).collect()
}

fn port(asked: &AskedPort) -> Result<PortMapping, Failure> {
    let bad = |what: String| {
        failure(
            code::CONFIGURATION,
            format!("runtimeConfig.portMappings: {what}"),
        )
    };
    let number = |name: &str, value: i64| {
        u16::try_from(value)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| bad(format!("{name} {value} is not a port (1 to 65535)")))
    };
    let host_ip = match asked.host_ip.as_str() {
        "" => None,
        text => Some(
            text.parse()
                .map_err(|_| bad(format!("hostIP {text:?} is not an IP address")))?,
        ),
    };
    Ok(PortMapping {
        host_ip,
        host_port: number("hostPort", asked.host_port)?,
        container_port: number("containerPort", asked.container_port)?,
        transport: Transport::named(&asked.protocol).ok_or_else(|| {
            bad(format!(
                "protocol {:?} is none of tcp, udp and sctp",
                asked.protocol
            ))
        })?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: serde_json::Value) -> Result<Vec<PortMapping>, Failure> {
        ports(&serde_json::from_value::<Vec<AskedPort>>(value).unwrap())
    }

    #[test]
    fn mappings_are_read_as_runtimes_write_them() {
        let all = read(json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
            {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "2001:db8::1"},
            {"hostPort": 9, "containerPort": 9},
        ]))
        .unwrap();
        assert_eq!(all[0].transport, Transport::Tcp);
        assert_eq!(
            (all[1].transport, all[1].host_ip),
            (Transport::Udp, Some("2001:db8::1".parse().unwrap()))
        );
        assert_eq!((all[2].transport, all[2].host_ip), (Transport::Tcp, None));
    }

    #[test]
    fn what_cannot_be_mapped_is_named() {
        for (bad, word) in [
            (json!([{"hostPort": 0, "containerPort": 80}]), "hostPort 0"),
            (
                json!([{"hostPort": 1, "containerPort": 65536}]),
                "containerPort 65536",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 1, "protocol": "icmp"}]),
                "icmp",
            ),
            (
                json!([{"hostPort": 1, "containerPort": 1, "hostIP": "here"}]),
                "here",
            ),
        ] {
            let failure = read(bad).unwrap_err();
            assert_eq!(failure.code, code::CONFIGURATION);
            assert!(failure.msg.contains(word), "{}", failure.msg);
        }
    }
}
