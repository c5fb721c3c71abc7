//! The configuration file of a `bgpd` that stands alone (TOML).
//!
//! ```toml
//! router-id = "10.0.1.254"
//! as = 64513
//!
//! [[neighbor]]
//! address = "10.0.1.1"
//! as = 64512
//! group = "leaf"
//!
//! [group.leaf]
//! add-path = true
//!
//! [[range]]
//! prefix = "10.0.2.0/24"
//! group = "leaf"
//! limit = 32
//!
//! [[announce]]
//! prefix = "203.0.113.0/24"
//! ```

mod neighbor;
mod station;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use cali_api::{Asn, Cidr};
use serde::Deserialize;

use crate::bmp::Station;
use crate::policy::LocalKind;
use crate::rib::LocalRoute;
use crate::speaker::settings::{HostRules, Settings};
use crate::wire::{AnyCommunity, Attributes, CommunityParseError};
use neighbor::Keys;

/// The file as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    router_id: Ipv4Addr,
    #[serde(rename = "as")]
    asn: Asn,
    /// Makes this speaker a reflector for neighbours that are its clients.
    cluster_id: Option<Ipv4Addr>,
    #[serde(default = "default_port")]
    listen_port: u16,
    /// Addresses to listen on; all without it.
    #[serde(default)]
    listen: Vec<IpAddr>,
    /// Whether best paths are written into the kernel; a route reflector beside the traffic has no use for it.
    #[serde(default = "default_install")]
    install: bool,
    #[serde(default)]
    group: BTreeMap<String, Keys>,
    #[serde(default)]
    neighbor: Vec<Keys>,
    /// Neighbors that come by themselves.
    #[serde(default)]
    range: Vec<Keys>,
    #[serde(default)]
    announce: Vec<Announce>,
    #[serde(default)]
    bmp: Vec<station::Keys>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Announce {
    prefix: Cidr,
    local_pref: Option<u32>,
    med: Option<u32>,
    /// Of any kind: `A:B`, `A:B:C`, `rt:A:B`.
    #[serde(default)]
    communities: Vec<CommunityText>,
}

/// A community as text.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct CommunityText(AnyCommunity);

impl TryFrom<String> for CommunityText {
    type Error = CommunityParseError;

    fn try_from(text: String) -> Result<Self, CommunityParseError> {
        text.parse().map(Self)
    }
}

const fn default_port() -> u16 {
    179
}

const fn default_install() -> bool {
    true
}

/// What a file asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    /// Of the speaker.
    pub settings: Settings,
    /// Whether best paths are written into the kernel.
    pub install: bool,
    /// Who is told what peers say (RFC 7854).
    pub stations: Vec<Station>,
}

/// Why a file cannot be used, in words for an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Not the format; the text names line and column.
    #[error("{0}")]
    Syntax(String),
    /// A value that does not fit to others.
    #[error("{0}: {1}")]
    Neighbor(String, String),
    /// An address with two neighbors.
    #[error("neighbor {0} is there twice")]
    Twice(IpAddr),
    /// Identifier 0.0.0.0, or AS 0 (RFC 7607).
    #[error("{0}")]
    Identity(&'static str),
}

/// Reads a file.
pub fn parse(text: &str) -> Result<Configuration, FileError> {
    let file: File = toml::from_str(text).map_err(|e| FileError::Syntax(e.to_string()))?;
    if file.router_id.is_unspecified() {
        return Err(FileError::Identity("router-id must not be 0.0.0.0"));
    }
    if file.asn.0 == 0 {
        return Err(FileError::Identity("as must not be 0"));
    }
    let neighbours = neighbor::neighbours(&file)?;
    let ranges = neighbor::ranges(&file)?;
    let any = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let listen = if file.listen.is_empty() {
        any.to_vec()
    } else {
        file.listen.clone()
    };
    let routes = file.announce.iter().filter_map(|a| {
        let prefix = super::prefix(&a.prefix)?;
        let mut attributes = Attributes {
            local_pref: Some(a.local_pref.unwrap_or(100)),
            med: a.med,
            ..Attributes::default()
        };
        for community in &a.communities {
            match community.0 {
                AnyCommunity::Standard(community) => attributes.add_community(community),
                AnyCommunity::Large(community) => attributes.add_large_community(community),
                AnyCommunity::Extended(community) => attributes.add_ext_community(community),
            }
        }
        Some((
            prefix,
            LocalRoute {
                prefix,
                attributes,
                kind: LocalKind::Static,
                interface: None,
            },
        ))
    });
    let settings = Settings {
        router_id: file.router_id,
        local_as: file.asn.0,
        cluster_id: file.cluster_id,
        listen: listen
            .into_iter()
            .map(|ip| SocketAddr::new(ip, file.listen_port))
            .collect(),
        neighbours,
        ranges,
        originated: routes.collect(),
        host: HostRules::default(),
    };
    Ok(Configuration {
        settings,
        install: file.install,
        stations: file.bmp.iter().map(station::Keys::station).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::FamilySet;

    #[test]
    fn a_short_file_has_calicos_intervals_and_the_family_of_each_address() {
        let settings = parse(
            "router-id = \"10.0.1.254\"\nas = 64513\n[[neighbor]]\naddress = \"10.0.1.1\"\nas = 64512\n\
             [[neighbor]]\naddress = \"fd00::1\"\nas = \"1.1\"\n[[announce]]\nprefix = \"203.0.113.0/24\"\n",
        )
        .unwrap()
        .settings;
        let v4 = &settings.neighbours[&"10.0.1.1".parse::<IpAddr>().unwrap()];
        assert_eq!(
            (v4.session.port, v4.session.hold_time, v4.session.families),
            (179, 240, FamilySet::IPV4)
        );
        let v6 = &settings.neighbours[&"fd00::1".parse::<IpAddr>().unwrap()];
        assert_eq!(
            (v6.session.remote_as, v6.session.families),
            (Some(65537), FamilySet::IPV6)
        );
        assert_eq!(settings.listen.len(), 2);
        assert!(
            settings
                .originated
                .contains_key(&"203.0.113.0/24".parse().unwrap())
        );
    }

    #[test]
    fn faults_are_named_with_their_place() {
        let head = "router-id = \"10.0.1.254\"\nas = 64513\n";
        let cases = [
            ("router-id = \"10.0.1.254\"\n", "missing field `as`"),
            ("router-id = \"0.0.0.0\"\nas = 1\n", "router-id"),
            (&format!("{head}color = 1\n"), "unknown field `color`"),
            (
                &format!("{head}[[neighbor]]\naddress = \"10.0.1\"\nas = 1\n"),
                "line 4",
            ),
            (
                &format!("{head}[[neighbor]]\naddress = \"10.0.1.1\"\nas = 1\nhold-time = 2\n"),
                "hold-time",
            ),
            (
                &format!("{head}[[announce]]\nprefix = \"10.0.0.1/24\"\n"),
                "bits set after its prefix",
            ),
            (
                &format!(
                    "{head}[[announce]]\nprefix = \"10.0.0.0/24\"\ncommunities = [\"1:70000\"]\n"
                ),
                "\"1:70000\" is no community",
            ),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}\n{error}");
        }
    }

    #[test]
    fn one_address_is_one_neighbor() {
        let text = "router-id = \"10.0.1.254\"\nas = 64513\n[[neighbor]]\naddress = \"10.0.1.1\"\nas = 1\n\
                    [[neighbor]]\naddress = \"10.0.1.1\"\nas = 2\n";
        assert_eq!(
            parse(text).unwrap_err(),
            FileError::Twice("10.0.1.1".parse().unwrap())
        );
    }
}
