//! What the environment asks of a node's start, with Calico's names. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cali_api::v3::EncapMode;
use cali_api::{Asn, Cidr};
use cali_control::node_name;
use cali_routes::Backend;
use ipnetwork::IpNetwork;
use typha::config::{ConfigError, Env};

use super::detect::Method;

/// How one address of the node is found (`IP`, `IP6`).
#[derive(Debug, Clone)]
pub enum AddressWish {
    /// Detect at each start and follow changes (`autodetect`).
    Detect(Method),
    /// Detect only when the Node resource has none (empty `IP`).
    DetectIfUnset(Method),
    /// This one; with no prefix length given, the interface's is taken.
    Explicit {
        /// The address.
        address: IpNetwork,
        /// Whether the text had a prefix length.
        with_prefix: bool,
    },
    /// None, and what the Node resource has is removed (`none`).
    None,
    /// Leave what the Node resource has (empty `IP6`).
    Keep,
}

/// One default pool, as the environment describes it.
#[derive(Debug, Clone)]
pub struct PoolWish {
    /// `None`: the built-in choice. `Some(None)`: no pool (`none`).
    pub cidr: Option<Option<Cidr>>,
    /// IPIP mode.
    pub ipip: EncapMode,
    /// VXLAN mode.
    pub vxlan: EncapMode,
    /// Prefix length of a block.
    pub block_size: u8,
    /// Nodes that may use it.
    pub node_selector: String,
    /// Masquerade.
    pub nat_outgoing: bool,
    /// Keep it from BGP peers.
    pub disable_bgp_export: bool,
}

/// Everything that the start depends on.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `NODENAME`, the remembered name, `HOSTNAME` or the host's name, in this order.
    pub node_name: String,
    /// Where the name is remembered.
    pub node_name_file: PathBuf,
    /// IPv4 address.
    pub ipv4: AddressWish,
    /// IPv6 address.
    pub ipv6: AddressWish,
    /// `AS`.
    pub as_number: Option<Asn>,
    /// `CALICO_ROUTER_ID` of a route reflector; here only the cluster id counts.
    pub route_reflector_cluster_id: Option<std::net::Ipv4Addr>,
    /// `NO_DEFAULT_POOLS`.
    pub no_default_pools: bool,
    /// Default IPv4 pool.
    pub pool_v4: PoolWish,
    /// Default IPv6 pool, with `FELIX_IPV6SUPPORT`.
    pub pool_v6: PoolWish,
    /// `FELIX_IPV6SUPPORT`.
    pub ipv6_support: bool,
    /// `CLUSTER_TYPE`.
    pub cluster_type: String,
    /// `CALICO_NETWORKING_BACKEND`.
    pub backend: Backend,
    /// `CALI_ADDRESS_RESERVE`: addresses kept ready for pods in each pool that is used.
    pub address_reserve: Option<usize>,
    /// `DISABLE_NODE_IP_CHECK`.
    pub skip_duplicate_check: bool,
    /// `CALICO_K8S_NODE_REF`, by default the node's name when the datastore is Kubernetes.
    pub k8s_node_ref: Option<String>,
}

/// What the host tells besides the environment.
#[derive(Debug, Clone)]
pub struct HostNames {
    /// Content of the node name file.
    pub remembered: Option<String>,
    /// The host's name.
    pub hostname: String,
}

impl Settings {
    /// Reads the settings; the first one that cannot be used is the error.
    pub fn read(
        env: &Env,
        names: &HostNames,
        state_dir: &std::path::Path,
    ) -> Result<Self, ConfigError> {
        let node_name = node_name(
            env.get("NODENAME"),
            names.remembered.as_deref(),
            env.get("HOSTNAME"),
            Some(&names.hostname),
        )
        .ok_or_else(|| bad("NODENAME", "", "the host has no name; set NODENAME"))?;
        Ok(Self {
            node_name,
            node_name_file: env
                .get("CALICO_NODENAME_FILE")
                .map_or_else(|| state_dir.join("nodename"), PathBuf::from),
            ipv4: address_wish(env, true)?,
            ipv6: address_wish(env, false)?,
            as_number: env
                .get("AS")
                .map(|_| env.parse("AS", Asn::DEFAULT))
                .transpose()?,
            route_reflector_cluster_id: env
                .get("CALICO_ROUTE_REFLECTOR_CLUSTER_ID")
                .map(|_| {
                    env.parse(
                        "CALICO_ROUTE_REFLECTOR_CLUSTER_ID",
                        std::net::Ipv4Addr::UNSPECIFIED,
                    )
                })
                .transpose()?,
            no_default_pools: flag(env, "NO_DEFAULT_POOLS", false)?,
            pool_v4: pool_wish(env, &POOL_V4)?,
            pool_v6: pool_wish(env, &POOL_V6)?,
            ipv6_support: flag(env, "FELIX_IPV6SUPPORT", true)?,
            cluster_type: env.get("CLUSTER_TYPE").unwrap_or_default().to_owned(),
            backend: backend(env)?,
            address_reserve: address_reserve(env)?,
            skip_duplicate_check: flag(env, "DISABLE_NODE_IP_CHECK", false)?,
            k8s_node_ref: env.get("CALICO_K8S_NODE_REF").map(str::to_owned),
        })
    }
}

fn bad(variable: &'static str, value: &str, reason: impl Into<String>) -> ConfigError {
    ConfigError {
        variable,
        value: value.to_owned(),
        reason: reason.into(),
    }
}

/// The spellings that Calico's programs accept.
fn flag(env: &Env, variable: &'static str, default: bool) -> Result<bool, ConfigError> {
    match env.get(variable).map(str::to_lowercase).as_deref() {
        None => Ok(default),
        Some("true" | "1" | "yes" | "on" | "t" | "enabled") => Ok(true),
        Some("false" | "0" | "no" | "off" | "f" | "disabled") => Ok(false),
        Some(other) => Err(bad(variable, other, "expected true or false")),
    }
}

fn address_reserve(env: &Env) -> Result<Option<usize>, ConfigError> {
    const MOST: usize = 4096;
    let Some(text) = env.get("CALI_ADDRESS_RESERVE") else {
        return Ok(None);
    };
    match text.parse() {
        Ok(addresses @ 1..=MOST) => Ok(Some(addresses)),
        _ => Err(ConfigError {
            variable: "CALI_ADDRESS_RESERVE",
            value: text.to_owned(),
            reason: format!("must be a number from 1 to {MOST}"),
        }),
    }
}

fn backend(env: &Env) -> Result<Backend, ConfigError> {
    const VARIABLE: &str = "CALICO_NETWORKING_BACKEND";
    match env.get(VARIABLE).map(str::to_lowercase).as_deref() {
        None | Some("bird" | "gobgp" | "cali") => Ok(Backend::Bgp),
        Some("vxlan") => Ok(Backend::Vxlan),
        Some("none") => Ok(Backend::None),
        Some(other) => Err(bad(VARIABLE, other, "expected bird, vxlan or none")),
    }
}

fn address_wish(env: &Env, v4: bool) -> Result<AddressWish, ConfigError> {
    let (variable, method_variable) = if v4 {
        ("IP", "IP_AUTODETECTION_METHOD")
    } else {
        ("IP6", "IP6_AUTODETECTION_METHOD")
    };
    let method = env.parse(method_variable, Method::FirstFound)?;
    match env.get(variable) {
        None if v4 => Ok(AddressWish::DetectIfUnset(method)),
        None => Ok(AddressWish::Keep),
        Some("autodetect") => Ok(AddressWish::Detect(method)),
        Some("none") => Ok(AddressWish::None),
        Some(text) => {
            let address: IpNetwork = text
                .parse()
                .map_err(|e| bad(variable, text, format!("{e}")))?;
            if address.is_ipv4() != v4 {
                return Err(bad(
                    variable,
                    text,
                    format!("expected an IPv{} address", if v4 { 4 } else { 6 }),
                ));
            }
            Ok(AddressWish::Explicit {
                address,
                with_prefix: text.contains('/'),
            })
        }
    }
}

/// Names and defaults of one family's pool variables.
struct PoolVariables {
    v4: bool,
    cidr: &'static str,
    ipip: Option<&'static str>,
    vxlan: &'static str,
    block_size: &'static str,
    node_selector: &'static str,
    nat_outgoing: &'static str,
    disable_bgp_export: &'static str,
    block_sizes: std::ops::RangeInclusive<u8>,
    default_block_size: u8,
}

const POOL_V4: PoolVariables = PoolVariables {
    v4: true,
    cidr: "CALICO_IPV4POOL_CIDR",
    ipip: Some("CALICO_IPV4POOL_IPIP"),
    vxlan: "CALICO_IPV4POOL_VXLAN",
    block_size: "CALICO_IPV4POOL_BLOCK_SIZE",
    node_selector: "CALICO_IPV4POOL_NODE_SELECTOR",
    nat_outgoing: "CALICO_IPV4POOL_NAT_OUTGOING",
    disable_bgp_export: "CALICO_IPV4POOL_DISABLE_BGP_EXPORT",
    block_sizes: 20..=32,
    default_block_size: 26,
};

const POOL_V6: PoolVariables = PoolVariables {
    v4: false,
    cidr: "CALICO_IPV6POOL_CIDR",
    ipip: None,
    vxlan: "CALICO_IPV6POOL_VXLAN",
    block_size: "CALICO_IPV6POOL_BLOCK_SIZE",
    node_selector: "CALICO_IPV6POOL_NODE_SELECTOR",
    nat_outgoing: "CALICO_IPV6POOL_NAT_OUTGOING",
    disable_bgp_export: "CALICO_IPV6POOL_DISABLE_BGP_EXPORT",
    block_sizes: 116..=128,
    default_block_size: 122,
};

fn pool_wish(env: &Env, names: &PoolVariables) -> Result<PoolWish, ConfigError> {
    let cidr = match env.get(names.cidr) {
        None => None,
        Some("none") => Some(None),
        Some(text) => {
            let cidr: Cidr = text
                .parse()
                .map_err(|e| bad(names.cidr, text, format!("{e}")))?;
            if cidr.is_v4() != names.v4 {
                return Err(bad(names.cidr, text, "wrong address family"));
            }
            Some(Some(cidr))
        }
    };
    let block_size = env.parse(names.block_size, names.default_block_size)?;
    if !names.block_sizes.contains(&block_size) {
        let reason = format!(
            "expected {} to {}",
            names.block_sizes.start(),
            names.block_sizes.end()
        );
        return Err(bad(names.block_size, &block_size.to_string(), reason));
    }
    let ipip = names
        .ipip
        .map_or(Ok(EncapMode::Never), |variable| encap(env, variable))?;
    let vxlan = encap(env, names.vxlan)?;
    if ipip != EncapMode::Never && vxlan != EncapMode::Never {
        return Err(bad(
            names.vxlan,
            vxlan.as_str(),
            "a pool cannot use IPIP and VXLAN at once",
        ));
    }
    Ok(PoolWish {
        cidr,
        ipip,
        vxlan,
        block_size,
        node_selector: env.get(names.node_selector).unwrap_or("all()").to_owned(),
        nat_outgoing: flag(env, names.nat_outgoing, names.v4)?,
        disable_bgp_export: flag(env, names.disable_bgp_export, false)?,
    })
}

fn encap(env: &Env, variable: &'static str) -> Result<EncapMode, ConfigError> {
    let spellings = BTreeMap::from([
        ("off", EncapMode::Never),
        ("never", EncapMode::Never),
        ("always", EncapMode::Always),
        ("cross-subnet", EncapMode::CrossSubnet),
        ("crosssubnet", EncapMode::CrossSubnet),
    ]);
    match env.get(variable) {
        None => Ok(EncapMode::Never),
        Some(text) => spellings
            .get(text.to_lowercase().as_str())
            .copied()
            .ok_or_else(|| bad(variable, text, "expected Always, CrossSubnet or Never")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Settings, ConfigError> {
        let names = HostNames {
            remembered: None,
            hostname: "Host\n".into(),
        };
        Settings::read(
            &pairs.iter().copied().collect(),
            &names,
            std::path::Path::new("/state"),
        )
    }

    #[test]
    fn name_comes_from_the_environment_then_the_file_then_the_host() {
        assert_eq!(read(&[("NODENAME", "A")]).unwrap().node_name, "A");
        assert_eq!(read(&[("HOSTNAME", "B")]).unwrap().node_name, "b");
        assert_eq!(read(&[]).unwrap().node_name, "host");
        let names = HostNames {
            remembered: Some("kept\n".into()),
            hostname: "host".into(),
        };
        let env = Env::from_iter([("HOSTNAME", "B")]);
        assert_eq!(
            Settings::read(&env, &names, std::path::Path::new("/s"))
                .unwrap()
                .node_name,
            "kept"
        );
    }

    #[test]
    fn address_variables_are_calicos() {
        assert!(matches!(
            read(&[]).unwrap().ipv4,
            AddressWish::DetectIfUnset(_)
        ));
        assert!(matches!(read(&[]).unwrap().ipv6, AddressWish::Keep));
        assert!(matches!(
            read(&[("IP", "autodetect")]).unwrap().ipv4,
            AddressWish::Detect(_)
        ));
        assert!(matches!(
            read(&[("IP", "none")]).unwrap().ipv4,
            AddressWish::None
        ));
        let explicit = read(&[("IP", "10.0.0.1/24")]).unwrap().ipv4;
        assert!(
            matches!(
                explicit,
                AddressWish::Explicit {
                    with_prefix: true,
                    ..
                }
            ),
            "{explicit:?}"
        );
        assert_eq!(read(&[("IP", "fd00::1")]).unwrap_err().variable, "IP");
        assert_eq!(read(&[("IP6", "10.0.0.1")]).unwrap_err().variable, "IP6");
    }

    #[test]
    fn pool_settings_are_checked() {
        let settings = read(&[
            ("CALICO_IPV4POOL_IPIP", "cross-subnet"),
            ("CALICO_IPV4POOL_CIDR", "none"),
        ])
        .unwrap();
        assert_eq!(
            (settings.pool_v4.ipip, settings.pool_v4.cidr),
            (EncapMode::CrossSubnet, Some(None))
        );
        for bad in [
            ("CALICO_IPV4POOL_CIDR", "10.0.0.1/8"),
            ("CALICO_IPV4POOL_BLOCK_SIZE", "12"),
            ("CALICO_IPV4POOL_VXLAN", "sometimes"),
            ("NO_DEFAULT_POOLS", "maybe"),
            ("CALICO_NETWORKING_BACKEND", "ospf"),
        ] {
            assert_eq!(read(&[bad]).unwrap_err().variable, bad.0);
        }
    }
}
