//! Which of the host's addresses is the node's. Pure: the host's interfaces and what others know are inputs.

use std::net::IpAddr;
use std::str::FromStr;

use cali_api::Cidr;
use ipnetwork::IpNetwork;
use regex::Regex;

/// Interfaces that never carry the node's address: other people's bridges and tunnels, and our own devices.
/// The whole name must match.
const NEVER: &str = concat!(
    "^(?:docker.*|cbr.*|dummy.*|podman.*|virbr.*|lxcbr.*|veth.*|lo|br-.*|cali.*|tunl.*|flannel.*|kube-ipvs.*|cni.*|",
    r"vxlan\.calico|vxlan-v6\.calico|wireguard\.cali|wg-v6\.cali|nodelocaldns.*)$"
);

/// An interface of the host with its addresses.
#[derive(Debug, Clone)]
pub struct HostInterface {
    /// Kernel index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Administratively up.
    pub up: bool,
    /// Addresses with their subnets.
    pub addresses: Vec<IpNetwork>,
}

/// `IP_AUTODETECTION_METHOD`.
#[derive(Debug, Clone)]
pub enum Method {
    /// First valid address, interfaces with the highest index first.
    FirstFound,
    /// InternalIP of the Kubernetes node.
    KubernetesInternalIp,
    /// The source address that the kernel uses towards this address or name.
    CanReach(String),
    /// First valid address of an interface that matches, in the order of the list.
    Interface(Vec<Regex>),
    /// As first found, without interfaces that match.
    SkipInterface(Vec<Regex>),
    /// First valid address inside one of these.
    Cidr(Vec<Cidr>),
}

/// A text that is no method.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MethodError {
    /// Not a known form.
    #[error(
        "expected first-found, kubernetes-internal-ip, can-reach=<address>, interface=<regex,...>, \
         skip-interface=<regex,...> or cidr=<cidr,...>"
    )]
    Unknown,
    /// Nothing behind the `=`.
    #[error("{0} needs a value")]
    Empty(&'static str),
    /// A bad regular expression or CIDR.
    #[error("{0}")]
    Value(String),
}

impl FromStr for Method {
    type Err = MethodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let list = |name, values: &str| -> Result<Vec<String>, MethodError> {
            let values: Vec<String> = values
                .split(',')
                .map(str::trim)
                .filter(|v| !v.is_empty())
                .map(str::to_owned)
                .collect();
            if values.is_empty() {
                Err(MethodError::Empty(name))
            } else {
                Ok(values)
            }
        };
        let patterns = |name, values: &str| -> Result<Vec<Regex>, MethodError> {
            let compile = |v: String| {
                Regex::new(&v).map_err(|e| {
                    MethodError::Value(format!("{v:?} is not a regular expression: {e}"))
                })
            };
            list(name, values)?.into_iter().map(compile).collect()
        };
        match text.split_once('=') {
            None if text == "first-found" => Ok(Self::FirstFound),
            None if text == "kubernetes-internal-ip" => Ok(Self::KubernetesInternalIp),
            Some(("can-reach", target)) if target.trim().is_empty() => {
                Err(MethodError::Empty("can-reach"))
            }
            Some(("can-reach", target)) => Ok(Self::CanReach(target.trim().to_owned())),
            Some(("interface", values)) => Ok(Self::Interface(patterns("interface", values)?)),
            Some(("skip-interface", values)) => {
                Ok(Self::SkipInterface(patterns("skip-interface", values)?))
            }
            Some(("cidr", values)) => {
                let parse = |v: String| v.parse().map_err(|e| MethodError::Value(format!("{e}")));
                Ok(Self::Cidr(
                    list("cidr", values)?
                        .into_iter()
                        .map(parse)
                        .collect::<Result<_, _>>()?,
                ))
            }
            _ => Err(MethodError::Unknown),
        }
    }
}

/// What others know about the node's address, where the method asks them.
#[derive(Debug, Clone, Default)]
pub struct Hints {
    /// Source address towards the target of `can-reach`.
    pub reaches_from: Option<IpAddr>,
    /// InternalIP addresses of the Kubernetes node.
    pub kubernetes_internal: Vec<IpAddr>,
}

/// The address of this family that the method finds, with the prefix length of its interface.
pub fn detect(
    method: &Method,
    v4: bool,
    interfaces: &[HostInterface],
    hints: &Hints,
) -> Option<IpNetwork> {
    // The pattern is a constant, checked by a test.
    let never = Regex::new(NEVER).ok()?;
    let mut candidates: Vec<&HostInterface> = interfaces
        .iter()
        .filter(|i| i.up && !never.is_match(&i.name))
        .collect();
    candidates.sort_by_key(|interface| std::cmp::Reverse(interface.index));
    let first = |accept: &dyn Fn(&HostInterface, &IpNetwork) -> bool| {
        candidates.iter().find_map(|interface| {
            let usable =
                |a: &&IpNetwork| a.is_ipv4() == v4 && is_global(a.ip()) && accept(interface, a);
            interface.addresses.iter().find(usable).copied()
        })
    };
    match method {
        Method::FirstFound => first(&|_, _| true),
        Method::SkipInterface(skip) => {
            first(&|interface, _| !skip.iter().any(|s| s.is_match(&interface.name)))
        }
        Method::Interface(wanted) => wanted
            .iter()
            .find_map(|pattern| first(&|interface, _| pattern.is_match(&interface.name))),
        Method::Cidr(cidrs) => {
            first(&|_, address| cidrs.iter().any(|cidr| cidr.contains(address.ip())))
        }
        Method::CanReach(_) => with_subnet(
            hints.reaches_from.filter(|a| a.is_ipv4() == v4)?,
            interfaces,
        ),
        Method::KubernetesInternalIp => with_subnet(
            *hints
                .kubernetes_internal
                .iter()
                .find(|a| a.is_ipv4() == v4)?,
            interfaces,
        ),
    }
}

/// The address with the prefix length that it has on the host's interface; a host route where it is on none.
pub fn with_subnet(address: IpAddr, interfaces: &[HostInterface]) -> Option<IpNetwork> {
    let own = interfaces
        .iter()
        .flat_map(|i| &i.addresses)
        .find(|a| a.ip() == address)
        .copied();
    own.or_else(|| IpNetwork::new(address, if address.is_ipv4() { 32 } else { 128 }).ok())
}

/// Global unicast in the sense of address selection: can be used to reach the host from elsewhere.
fn is_global(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(address.is_loopback() || address.is_multicast() || address.is_unspecified() || link_local)
}

/// The host's own interfaces with their addresses, as they are published in the Node resource.
pub fn published(interfaces: &[HostInterface]) -> Vec<&HostInterface> {
    let Ok(never) = Regex::new(NEVER) else {
        return Vec::new();
    };
    let mut own: Vec<_> = interfaces
        .iter()
        .filter(|i| !never.is_match(&i.name) && !i.addresses.is_empty())
        .collect();
    own.sort_by(|a, b| a.name.cmp(&b.name));
    own
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<HostInterface> {
        let interface = |index, name: &str, addresses: &[&str]| HostInterface {
            index,
            name: name.into(),
            up: name != "eth9",
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        };
        vec![
            interface(1, "lo", &["127.0.0.1/8", "::1/128"]),
            interface(2, "eth0", &["10.0.0.1/24", "fe80::1/64", "fd00::1/64"]),
            interface(3, "eth1", &["172.16.0.1/16"]),
            interface(4, "wlo1", &["192.168.1.9/24"]),
            interface(5, "docker0", &["172.17.0.1/16"]),
            interface(6, "vxlan.calico", &["10.244.0.1/32"]),
            interface(7, "eth9", &["10.9.9.9/24"]),
            interface(8, "eth3", &["169.254.1.1/16"]),
        ]
    }

    fn detected(method: &str, v4: bool, hints: &Hints) -> String {
        let found = detect(&method.parse().unwrap(), v4, &host(), hints);
        found.map_or_else(|| "none".to_owned(), |f| f.to_string())
    }

    #[test]
    fn each_method_finds_its_address() {
        let none = Hints::default();
        for (method, v4, expected) in [
            ("first-found", true, "192.168.1.9/24"),
            ("first-found", false, "fd00::1/64"),
            ("interface=eth0", true, "10.0.0.1/24"),
            ("interface=nothing,eth.*", true, "172.16.0.1/16"),
            ("skip-interface=wl.*", true, "172.16.0.1/16"),
            ("cidr=10.0.0.0/8,172.16.0.0/12", true, "172.16.0.1/16"),
            ("cidr=10.0.0.0/8", true, "10.0.0.1/24"),
            ("cidr=8.0.0.0/8", true, "none"),
            ("can-reach=8.8.8.8", true, "none"),
        ] {
            assert_eq!(detected(method, v4, &none), expected, "{method}");
        }
    }

    #[test]
    fn hints_get_the_prefix_length_of_their_interface() {
        let hints = Hints {
            reaches_from: Some("10.0.0.1".parse().unwrap()),
            kubernetes_internal: vec!["172.16.0.1".parse().unwrap(), "fd00::99".parse().unwrap()],
        };
        assert_eq!(
            detected("can-reach=example.org", true, &hints),
            "10.0.0.1/24"
        );
        assert_eq!(
            detected("kubernetes-internal-ip", true, &hints),
            "172.16.0.1/16"
        );
        assert_eq!(
            detected("kubernetes-internal-ip", false, &hints),
            "fd00::99/128"
        );
    }

    #[test]
    fn bad_methods_are_refused_with_what_is_expected() {
        for text in [
            "fastest",
            "interface=",
            "interface=(",
            "cidr=10.0.0.1/8",
            "can-reach=",
        ] {
            assert!(text.parse::<Method>().is_err(), "{text}");
        }
        assert!(
            "fastest"
                .parse::<Method>()
                .unwrap_err()
                .to_string()
                .contains("first-found")
        );
    }

    #[test]
    fn only_the_hosts_own_interfaces_are_published() {
        let host = host();
        let names: Vec<&str> = published(&host).iter().map(|i| i.name.as_str()).collect();
        assert_eq!(names, ["eth0", "eth1", "eth3", "eth9", "wlo1"]);
    }
}
