//! The Node resource: what this start makes of the one that is stored. Pure.

use std::net::IpAddr;

use cali_api::v3::{CALICO_NODE_IP, Node, NodeAddress, NodeInterface, NodeSpec, OrchRef};
use cali_api::{NodeName, ObjectMeta};
use ipnetwork::IpNetwork;

use super::detect::{Hints, HostInterface, Method, detect, published, with_subnet};
use super::settings::{AddressWish, Settings};

/// Why the node cannot be described.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// Detection found nothing.
    #[error(
        "no IPv{family} address found by {variable}; the host's interfaces have: {seen}. Set {variable}, or {explicit} to an address"
    )]
    NothingDetected {
        /// 4 or 6.
        family: u8,
        /// The method's variable.
        variable: &'static str,
        /// The address' variable.
        explicit: &'static str,
        /// What there is.
        seen: String,
    },
    /// Another node has the address.
    #[error(
        "address {address} already belongs to node {other}; set DISABLE_NODE_IP_CHECK=true if that is intended"
    )]
    Duplicate {
        /// The address.
        address: IpAddr,
        /// Its node.
        other: NodeName,
    },
}

/// What the start knows about the host.
#[derive(Debug, Clone)]
pub struct Host {
    /// Interfaces with addresses.
    pub interfaces: Vec<HostInterface>,
    /// Answers for IPv4 detection.
    pub hints_v4: Hints,
    /// Answers for IPv6 detection.
    pub hints_v6: Hints,
}

/// The Node resource as it is to be written, from the stored one and what the host and the environment say.
/// Fields that others set (labels, tunnel addresses, keys) stay.
pub fn plan_node(
    stored: Option<&Node>,
    settings: &Settings,
    host: &Host,
) -> Result<Node, NodeError> {
    let mut node = stored.cloned().unwrap_or_else(|| {
        Node::new(
            ObjectMeta::named(settings.node_name.clone()),
            NodeSpec::default(),
        )
    });
    // Published before the first address is handed out.
    node.metadata
        .annotations
        .insert(cali_ipam::names::JOURNAL_ANNOTATION.into(), "v1".into());
    let former = node.spec.bgp.clone().unwrap_or_default();
    let ipv4 = address(&settings.ipv4, true, former.ipv4_address, host)?;
    let ipv6 = address(&settings.ipv6, false, former.ipv6_address, host)?;
    let bgp = node.spec.bgp.get_or_insert_default();
    bgp.ipv4_address = ipv4;
    bgp.ipv6_address = ipv6;
    bgp.as_number = settings.as_number.or(bgp.as_number);
    bgp.route_reflector_cluster_id = settings
        .route_reflector_cluster_id
        .or(bgp.route_reflector_cluster_id);
    if *bgp == Default::default() {
        node.spec.bgp = None;
    }
    node.spec.addresses.retain(|a| a.type_ != CALICO_NODE_IP);
    let own = [ipv4, ipv6].into_iter().flatten();
    node.spec.addresses.extend(own.map(|a| NodeAddress {
        address: a.to_string(),
        type_: CALICO_NODE_IP.into(),
    }));
    node.spec.interfaces = published(&host.interfaces)
        .into_iter()
        .map(|i| NodeInterface {
            name: i.name.clone(),
            addresses: i.addresses.iter().map(|a| a.ip().to_string()).collect(),
        })
        .collect();
    if let Some(name) = &settings.k8s_node_ref {
        node.spec.orch_refs = vec![OrchRef {
            node_name: name.clone(),
            orchestrator: "k8s".into(),
        }];
    }
    Ok(node)
}

fn address(
    wish: &AddressWish,
    v4: bool,
    stored: Option<IpNetwork>,
    host: &Host,
) -> Result<Option<IpNetwork>, NodeError> {
    let found = |method: &Method| {
        let hints = if v4 { &host.hints_v4 } else { &host.hints_v6 };
        detect(method, v4, &host.interfaces, hints)
            .map(Some)
            .ok_or_else(|| NodeError::NothingDetected {
                family: if v4 { 4 } else { 6 },
                variable: if v4 {
                    "IP_AUTODETECTION_METHOD"
                } else {
                    "IP6_AUTODETECTION_METHOD"
                },
                explicit: if v4 { "IP" } else { "IP6" },
                seen: seen(&host.interfaces),
            })
    };
    match wish {
        AddressWish::Keep => Ok(stored),
        AddressWish::None => Ok(None),
        AddressWish::DetectIfUnset(_) if stored.is_some() => Ok(stored),
        AddressWish::DetectIfUnset(method) | AddressWish::Detect(method) => found(method),
        AddressWish::Explicit {
            address,
            with_prefix: true,
        } => Ok(Some(*address)),
        AddressWish::Explicit {
            address,
            with_prefix: false,
        } => Ok(with_subnet(address.ip(), &host.interfaces)),
    }
}

fn seen(interfaces: &[HostInterface]) -> String {
    let one = |i: &HostInterface| {
        let addresses: Vec<String> = i.addresses.iter().map(ToString::to_string).collect();
        format!("{} {}", i.name, addresses.join(" "))
    };
    let all: Vec<String> = interfaces
        .iter()
        .filter(|i| !i.addresses.is_empty())
        .map(one)
        .collect();
    all.join(", ")
}

/// Refuses an address that another node has.
pub fn check_duplicates<'a>(
    node: &Node,
    others: impl IntoIterator<Item = &'a Node>,
) -> Result<(), NodeError> {
    let own = [node.spec.ipv4(), node.spec.ipv6()];
    for other in others {
        if other.metadata.name == node.metadata.name {
            continue;
        }
        let theirs = [other.spec.ipv4(), other.spec.ipv6()];
        for (mine, their) in own.iter().zip(theirs) {
            if let (Some(mine), Some(their)) = (mine, their)
                && mine.ip() == their.ip()
            {
                let other = NodeName::from(other.metadata.name.as_str());
                return Err(NodeError::Duplicate {
                    address: mine.ip(),
                    other,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::startup::settings::HostNames;

    fn settings(env: &[(&str, &str)]) -> Settings {
        let names = HostNames {
            remembered: None,
            hostname: "n1".into(),
        };
        Settings::read(
            &env.iter().copied().collect(),
            &names,
            std::path::Path::new("/s"),
        )
        .unwrap()
    }

    fn host(address: &str) -> Host {
        Host {
            interfaces: vec![HostInterface {
                index: 2,
                name: "eth0".into(),
                up: true,
                addresses: vec![address.parse().unwrap()],
            }],
            hints_v4: Hints::default(),
            hints_v6: Hints::default(),
        }
    }

    fn ipv4(node: &Node) -> String {
        node.spec
            .ipv4()
            .map_or_else(|| "none".into(), |a| a.to_string())
    }

    #[test]
    fn a_new_node_gets_its_detected_address_and_interfaces() {
        let node = plan_node(None, &settings(&[]), &host("10.0.0.1/24")).unwrap();
        assert_eq!(
            (node.metadata.name.as_str(), ipv4(&node).as_str()),
            ("n1", "10.0.0.1/24")
        );
        assert_eq!(node.spec.addresses[0].address, "10.0.0.1/24");
        assert_eq!(node.spec.interfaces[0].addresses, ["10.0.0.1"]);
    }

    #[test]
    fn what_others_set_survives_a_restart_and_an_unset_ip_keeps_the_stored_address() {
        let mut stored = plan_node(None, &settings(&[]), &host("10.0.0.1/24")).unwrap();
        stored.metadata.labels.insert("rack".into(), "1".into());
        stored.spec.ipv4_vxlan_tunnel_addr = Some([10, 244, 0, 1].into());
        let again = plan_node(Some(&stored), &settings(&[]), &host("10.0.0.2/24")).unwrap();
        assert_eq!(
            (&again.metadata, ipv4(&again).as_str()),
            (&stored.metadata, "10.0.0.1/24")
        );
        assert_eq!(
            again.spec.ipv4_vxlan_tunnel_addr,
            stored.spec.ipv4_vxlan_tunnel_addr
        );
        let detecting = settings(&[("IP", "autodetect")]);
        assert_eq!(
            ipv4(&plan_node(Some(&stored), &detecting, &host("10.0.0.2/24")).unwrap()),
            "10.0.0.2/24"
        );
        let without = settings(&[("IP", "none")]);
        assert_eq!(
            ipv4(&plan_node(Some(&stored), &without, &host("10.0.0.2/24")).unwrap()),
            "none"
        );
    }

    #[test]
    fn explicit_address_takes_the_interfaces_prefix_unless_it_brings_one() {
        let plan = |ip: &str| {
            ipv4(&plan_node(None, &settings(&[("IP", ip)]), &host("10.0.0.1/24")).unwrap())
        };
        assert_eq!(
            [plan("10.0.0.1"), plan("10.0.0.1/28"), plan("10.7.7.7")],
            ["10.0.0.1/24", "10.0.0.1/28", "10.7.7.7/32"]
        );
    }

    #[test]
    fn failed_detection_says_what_there_is_and_what_to_set() {
        let error = plan_node(
            None,
            &settings(&[("IP", "autodetect")]),
            &host("169.254.0.1/16"),
        )
        .unwrap_err()
        .to_string();
        for part in ["IPv4", "IP_AUTODETECTION_METHOD", "eth0 169.254.0.1/16"] {
            assert!(error.contains(part), "{part:?} in {error}");
        }
    }

    #[test]
    fn an_address_of_another_node_is_refused() {
        let mine = plan_node(None, &settings(&[]), &host("10.0.0.1/24")).unwrap();
        let mut other = mine.clone();
        assert_eq!(check_duplicates(&mine, [&other]), Ok(()), "itself");
        other.metadata.name = "n2".into();
        assert!(matches!(
            check_duplicates(&mine, [&other]),
            Err(NodeError::Duplicate { .. })
        ));
    }
}
