//! Results of `ADD`, in the format of each version of the specification. Pure.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::spec::at_least;

/// What an `ADD` has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    /// The interfaces; none for the address plugin.
    pub interfaces: Vec<Interface>,
    /// The pod's addresses; they belong to the last interface.
    pub addresses: Vec<IpAddr>,
    /// Default gateways, by family of the addresses.
    pub gateways: Vec<IpAddr>,
}

/// An interface of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: String,
    /// The namespace as the runtime named it; `None` for the host.
    pub sandbox: Option<String>,
    /// MTU (from 1.1 on).
    pub mtu: u32,
}

fn host_prefix(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

/// Renders a result.
pub fn render(added: &Added, version: &str) -> Value {
    if at_least(version, "0.3.0") {
        modern(added, version)
    } else {
        old(added, version)
    }
}

fn modern(added: &Added, version: &str) -> Value {
    let ips: Vec<Value> = added
        .addresses
        .iter()
        .map(|address| {
            let mut ip = json!({"address": host_prefix(*address)});
            if !at_least(version, "1.0.0") {
                ip["version"] = json!(if address.is_ipv4() { "4" } else { "6" });
            }
            if let Some(last) = added.interfaces.len().checked_sub(1) {
                ip["interface"] = json!(last);
            }
            ip
        })
        .collect();
    let mut result = json!({"cniVersion": version, "ips": ips, "dns": {}});
    if added.interfaces.is_empty() {
        return result;
    }
    let interfaces: Vec<Value> = added
        .interfaces
        .iter()
        .map(|interface| {
            let mut object = json!({"name": interface.name, "mac": interface.mac});
            if let Some(sandbox) = &interface.sandbox {
                object["sandbox"] = json!(sandbox);
            }
            if at_least(version, "1.1.0") {
                object["mtu"] = json!(interface.mtu);
            }
            object
        })
        .collect();
    result["interfaces"] = json!(interfaces);
    result["routes"] = json!(routes(added));
    result
}

fn routes(added: &Added) -> Vec<Value> {
    added
        .gateways
        .iter()
        .map(|gateway| json!({"dst": if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" }, "gw": gateway.to_string()}))
        .collect()
}

fn old(added: &Added, version: &str) -> Value {
    let mut result = json!({"cniVersion": version, "dns": {}});
    for (key, v4) in [("ip4", true), ("ip6", false)] {
        if let Some(address) = added.addresses.iter().find(|a| a.is_ipv4() == v4) {
            let mut ip = json!({"ip": host_prefix(*address)});
            if !added.interfaces.is_empty() {
                let of_family = Added {
                    gateways: added
                        .gateways
                        .iter()
                        .copied()
                        .filter(|g| g.is_ipv4() == v4)
                        .collect(),
                    ..added.clone()
                };
                ip["routes"] = json!(routes(&of_family));
            }
            result[key] = ip;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::VERSIONS;

    fn added() -> Added {
        Added {
            interfaces: vec![
                Interface {
                    name: "cali1".into(),
                    mac: "ee:ee:ee:ee:ee:ee".into(),
                    sandbox: None,
                    mtu: 1450,
                },
                Interface {
                    name: "eth0".into(),
                    mac: "0a:00:00:00:00:01".into(),
                    sandbox: Some("/run/netns/x".into()),
                    mtu: 1450,
                },
            ],
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            gateways: vec!["169.254.1.1".parse().unwrap(), "fe80::1".parse().unwrap()],
        }
    }

    #[test]
    fn newest_format_is_complete() {
        assert_eq!(
            render(&added(), "1.1.0"),
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "cali1", "mac": "ee:ee:ee:ee:ee:ee", "mtu": 1450},
                    {"name": "eth0", "mac": "0a:00:00:00:00:01", "sandbox": "/run/netns/x", "mtu": 1450}
                ],
                "ips": [{"address": "10.0.0.1/32", "interface": 1}, {"address": "fd00::1/128", "interface": 1}],
                "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
                "dns": {}
            })
        );
    }

    #[test]
    fn older_formats_name_the_family() {
        assert_eq!(render(&added(), "0.4.0")["ips"][1]["version"], "6");
        assert_eq!(
            render(&added(), "0.2.0")["ip4"],
            json!({"ip": "10.0.0.1/32", "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}]})
        );
        for version in VERSIONS {
            assert_eq!(render(&added(), version)["cniVersion"], version);
        }
    }

    #[test]
    fn address_plugin_lists_no_interfaces() {
        let only = Added {
            interfaces: Vec::new(),
            ..added()
        };
        let result = render(&only, "1.0.0");
        assert_eq!(result["ips"][0], json!({"address": "10.0.0.1/32"}));
        assert!(result.get("interfaces").is_none() && result.get("routes").is_none());
    }
}
