//! Which addresses a pod gets: from the configuration and the annotations of the pod and its namespace. Pure.

use std::net::IpAddr;

use cali_api::StringMap;
use cali_api::kubernetes::annotation;
use cali_control::cni::Failure;
use cali_netlink::MacAddr;

use crate::config::Config;
use crate::spec::{code, failure};

/// Where a pod's addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addresses {
    /// Given without being managed (`ipAddrsNoIpam`).
    Unmanaged(Vec<IpAddr>),
    /// These, allocated by address management (`ipAddrs`).
    Exact(Vec<IpAddr>),
    /// Any of these pools (all that select the node and the namespace, if empty).
    Pools {
        /// Whether an IPv4 address is wanted.
        v4: bool,
        /// Whether an IPv6 address is wanted.
        v6: bool,
        /// By name or CIDR.
        pools_v4: Vec<String>,
        /// By name or CIDR.
        pools_v6: Vec<String>,
    },
}

/// Decides. The pod's annotations go before those of its namespace, and both before the configuration.
pub fn addresses(
    config: &Config,
    namespace: &StringMap,
    pod: &StringMap,
) -> Result<Addresses, Failure> {
    let list = |name: &str, from: &[&StringMap]| -> Result<Option<Vec<String>>, Failure> {
        let Some(text) = from.iter().find_map(|annotations| annotations.get(name)) else {
            return Ok(None);
        };
        serde_json::from_str(text).map(Some).map_err(|e| {
            let msg = format!("annotation {name}: {text:?} is not a JSON list of texts: {e}");
            failure(code::POD, msg)
        })
    };
    if let Some(texts) = list(annotation::IP_ADDRS_NO_IPAM, &[pod])? {
        if !config.feature_control.ip_addrs_no_ipam {
            let msg = format!(
                "annotation {} is not enabled (feature_control.ip_addrs_no_ipam)",
                annotation::IP_ADDRS_NO_IPAM
            );
            return Err(failure(code::POD, msg));
        }
        return Ok(Addresses::Unmanaged(parsed(
            annotation::IP_ADDRS_NO_IPAM,
            &texts,
        )?));
    }
    if let Some(texts) = list(annotation::IP_ADDRS, &[pod])? {
        return Ok(Addresses::Exact(parsed(annotation::IP_ADDRS, &texts)?));
    }
    let both = [pod, namespace];
    let (v4, v6) = match list(annotation::IP_FAMILIES, &both)? {
        Some(families) => {
            let unknown = families
                .iter()
                .find(|f| !matches!(f.as_str(), "IPv4" | "IPv6"));
            if let Some(unknown) = unknown {
                let msg = format!(
                    "annotation {}: {unknown:?} is neither IPv4 nor IPv6",
                    annotation::IP_FAMILIES
                );
                return Err(failure(code::POD, msg));
            }
            let has = |family: &str| families.iter().any(|f| f == family);
            (has("IPv4"), has("IPv6"))
        }
        None => (
            config.ipam.assign_ipv4.is_none_or(|s| s.0),
            config.ipam.assign_ipv6.is_some_and(|s| s.0),
        ),
    };
    if !v4 && !v6 {
        return Err(failure(
            code::CONFIGURATION,
            "neither IPv4 nor IPv6 is to be assigned",
        ));
    }
    Ok(Addresses::Pools {
        v4,
        v6,
        pools_v4: list(annotation::IPV4_POOLS, &both)?
            .unwrap_or_else(|| config.ipam.ipv4_pools.clone()),
        pools_v6: list(annotation::IPV6_POOLS, &both)?
            .unwrap_or_else(|| config.ipam.ipv6_pools.clone()),
    })
}

/// The Ethernet address that the pod's interface is to have; the kernel chooses one if nobody says.
pub fn hardware_address(config: &Config, pod: &StringMap) -> Result<Option<MacAddr>, Failure> {
    let annotated = pod.get(annotation::HW_ADDR).map(String::as_str);
    let (name, text) = match (annotated, config.runtime_config.mac.as_deref()) {
        (Some(text), _) => (annotation::HW_ADDR, text),
        (None, Some(text)) if !text.is_empty() => ("runtimeConfig.mac", text),
        _ => return Ok(None),
    };
    let usable = |mac: &MacAddr| mac.0[0] & 1 == 0 && mac.0 != [0; 6];
    match text.parse::<MacAddr>().ok().filter(usable) {
        Some(mac) => Ok(Some(mac)),
        None => {
            let msg = format!("{name}: {text:?} is not the Ethernet address of one interface");
            Err(failure(code::POD, msg))
        }
    }
}

fn parsed(name: &str, texts: &[String]) -> Result<Vec<IpAddr>, Failure> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in texts {
        let address: IpAddr = text.parse().map_err(|_| {
            failure(
                code::POD,
                format!("annotation {name}: {text:?} is not an IP address"),
            )
        })?;
        if addresses
            .iter()
            .any(|other| other.is_ipv4() == address.is_ipv4())
        {
            return Err(failure(
                code::POD,
                format!("annotation {name}: at most one address of each family"),
            ));
        }
        addresses.push(address);
    }
    if addresses.is_empty() {
        return Err(failure(
            code::POD,
            format!("annotation {name}: the list is empty"),
        ));
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(ipam: serde_json::Value) -> Config {
        Config::read(&json!({"cniVersion": "1.1.0", "name": "n", "ipam": ipam})).unwrap()
    }

    fn annotations(pairs: &[(&str, &str)]) -> StringMap {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    fn pools(v4: bool, v6: bool, names: &[&str]) -> Addresses {
        let pools_v4 = names.iter().map(|n| (*n).to_owned()).collect();
        Addresses::Pools {
            v4,
            v6,
            pools_v4,
            pools_v6: Vec::new(),
        }
    }

    #[test]
    fn pods_annotation_goes_before_namespace_and_configuration() {
        let config = config(json!({"ipv4_pools": ["c"]}));
        let (ns, pod) = (
            annotations(&[(annotation::IPV4_POOLS, "[\"n\"]")]),
            annotations(&[(annotation::IPV4_POOLS, "[\"p\"]")]),
        );
        let none = StringMap::new();
        assert_eq!(
            addresses(&config, &ns, &pod),
            Ok(pools(true, false, &["p"]))
        );
        assert_eq!(
            addresses(&config, &ns, &none),
            Ok(pools(true, false, &["n"]))
        );
        assert_eq!(
            addresses(&config, &none, &none),
            Ok(pools(true, false, &["c"]))
        );
    }

    #[test]
    fn families_come_from_annotation_or_configuration() {
        let none = StringMap::new();
        let six = annotations(&[(annotation::IP_FAMILIES, "[\"IPv6\"]")]);
        assert_eq!(
            addresses(&config(json!({})), &six, &none),
            Ok(pools(false, true, &[]))
        );
        assert_eq!(
            addresses(&config(json!({"assign_ipv6": "true"})), &none, &none),
            Ok(pools(true, true, &[]))
        );
        assert!(addresses(&config(json!({"assign_ipv4": "false"})), &none, &none).is_err());
    }

    #[test]
    fn fixed_addresses_are_at_most_one_of_each_family() {
        let none = StringMap::new();
        let one = annotations(&[(annotation::IP_ADDRS, "[\"10.0.0.1\",\"fd00::1\"]")]);
        let exact = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        assert_eq!(
            addresses(&config(json!({})), &none, &one),
            Ok(Addresses::Exact(exact))
        );
        for bad in ["[\"10.0.0.1\",\"10.0.0.2\"]", "[]", "[\"x\"]", "10.0.0.1"] {
            let failure = addresses(
                &config(json!({})),
                &none,
                &annotations(&[(annotation::IP_ADDRS, bad)]),
            )
            .unwrap_err();
            assert_eq!(failure.code, code::POD, "{bad}");
        }
    }

    #[test]
    fn the_ethernet_address_is_the_annotations_then_the_runtimes() {
        let config = Config::read(&json!({
            "cniVersion": "1.1.0", "name": "n", "runtimeConfig": {"mac": "0a:00:00:00:00:01"}
        }))
        .unwrap();
        let annotated = |text: &str| annotations(&[(annotation::HW_ADDR, text)]);
        let ask = |pod: &StringMap| {
            hardware_address(&config, pod).map(|mac| mac.map(|mac| mac.to_string()))
        };
        assert_eq!(
            ask(&StringMap::new()).unwrap().as_deref(),
            Some("0a:00:00:00:00:01")
        );
        assert_eq!(
            ask(&annotated("0a:00:00:00:00:02")).unwrap().as_deref(),
            Some("0a:00:00:00:00:02")
        );
        // A group address, none at all, and no address.
        for bad in ["01:00:00:00:00:01", "00:00:00:00:00:00", "x"] {
            assert_eq!(ask(&annotated(bad)).unwrap_err().code, code::POD, "{bad}");
        }
    }

    #[test]
    fn unmanaged_addresses_need_their_gate() {
        let none = StringMap::new();
        let pod = annotations(&[(annotation::IP_ADDRS_NO_IPAM, "[\"10.0.0.1\"]")]);
        assert!(addresses(&config(json!({})), &none, &pod).is_err());
    }
}
