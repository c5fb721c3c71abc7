//! Automatic host endpoints: one for all interfaces of each node, and those of each template that fits: one for the node
//! addresses in its networks, or one for each interface whose name matches its pattern.
//!
//! [`plan`] compares what is wanted with what stands, and is pure. Ours are those that say so in their labels
//! ([`CREATED_BY`]); a host endpoint of somebody else is never changed, also not where it has a name that we would take.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_api::kubernetes::DEFAULT_ALLOW_PROFILE;
use cali_api::selector::Selector;
use cali_api::v3::{
    AutoHostEndpointConfig, HostEndpoint, HostEndpointSpec, HostEndpointTemplate, Node, Toggle,
};
use cali_api::{AnyResource, Key, Kind, ObjectMeta, Resource};
use cali_datastore::{Datastore, Error as StoreError};
use regex::Regex;
use sha2::{Digest, Sha256};

use crate::error::Error;

/// The label by which ours are known, and its value.
pub const CREATED_BY: (&str, &str) = ("projectcalico.org/created-by", "calico-kube-controllers");
/// End of their names.
const SUFFIX: &str = "auto-hep";
/// Longest name of an object (RFC 1123 subdomain).
const NAME_LIMIT: usize = 253;

/// What is to be written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// To create, or to replace.
    pub put: Vec<HostEndpoint>,
    /// To delete; at this revision.
    pub delete: Vec<HostEndpoint>,
    /// What cannot be done, for the log.
    pub problems: Vec<String>,
}

/// Compares. Nothing is left of ours where the setting is off.
pub fn plan<'a>(
    config: &AutoHostEndpointConfig,
    nodes: impl IntoIterator<Item = &'a Node>,
    stand: &[HostEndpoint],
) -> Plan {
    let mut plan = Plan::default();
    let mut wanted: BTreeMap<String, HostEndpoint> = BTreeMap::new();
    if config.auto_create == Some(Toggle::Enabled) {
        for node in nodes {
            wanted_for(config, node, &mut wanted, &mut plan.problems);
        }
    }
    for endpoint in stand {
        let name = &*endpoint.metadata.name;
        let is_ours = endpoint
            .metadata
            .labels
            .get(CREATED_BY.0)
            .is_some_and(|value| value == CREATED_BY.1);
        match wanted.remove(name) {
            Some(_) if !is_ours => plan.problems.push(format!(
                "host endpoint {name} is not made by this controller and stays as it is"
            )),
            Some(new) if is_same(&new, endpoint) => {}
            Some(mut new) => {
                new.metadata
                    .resource_version
                    .clone_from(&endpoint.metadata.resource_version);
                plan.put.push(new);
            }
            None if is_ours => plan.delete.push(endpoint.clone()),
            None => {}
        }
    }
    plan.put.extend(wanted.into_values());
    plan
}

fn is_same(new: &HostEndpoint, old: &HostEndpoint) -> bool {
    new.spec == old.spec && new.metadata.labels == old.metadata.labels
}

fn wanted_for(
    config: &AutoHostEndpointConfig,
    node: &Node,
    wanted: &mut BTreeMap<String, HostEndpoint>,
    problems: &mut Vec<String>,
) {
    let name = &*node.metadata.name;
    let addresses = addresses(node);
    let mut want = |endpoint: HostEndpoint| {
        wanted.insert(endpoint.metadata.name.to_string(), endpoint);
    };
    if config.create_default_host_endpoint != Some(Toggle::Disabled) {
        let name = named([name, SUFFIX]);
        want(endpoint(name, node, "*", addresses.clone()));
    }
    for template in &config.templates {
        match of_template(template, node, &addresses) {
            Ok(endpoints) => endpoints.into_iter().for_each(&mut want),
            Err(problem) => problems.push(problem),
        }
    }
}

/// The host endpoints of a template: none if it is not for the node, or nothing of the node fits.
fn of_template(
    template: &HostEndpointTemplate,
    node: &Node,
    addresses: &[IpAddr],
) -> Result<Vec<HostEndpoint>, String> {
    let generated = &template.generate_name;
    let bad = |field: &str, reason: &dyn std::fmt::Display| {
        format!("template {generated:?} of automatic host endpoints: {field}: {reason}")
    };
    if !template.node_selector.is_empty() {
        let selector = Selector::parse(&template.node_selector);
        let selector = selector.map_err(|error| bad("nodeSelector", &error))?;
        if !selector.matches(&node.metadata.labels) {
            return Ok(Vec::new());
        }
    }
    let fits = |address: &&IpAddr| {
        template
            .interface_cidrs
            .iter()
            .any(|cidr| cidr.contains(**address))
    };
    let expected: Vec<IpAddr> = addresses.iter().filter(fits).copied().collect();
    let node_name = &*node.metadata.name;
    let mut endpoints = Vec::new();
    if template.interface_pattern.is_empty() {
        if template.interface_cidrs.is_empty() {
            return Err(bad(
                "interfaceCIDRs",
                &"give networks of node addresses here, or interfacePattern",
            ));
        }
        // Without an interface's name nothing else says where it is.
        if !expected.is_empty() {
            let name = named([node_name, generated, SUFFIX]);
            endpoints.push(endpoint(name, node, "", expected));
        }
    } else {
        let pattern = Regex::new(&template.interface_pattern);
        let pattern = pattern.map_err(|error| bad("interfacePattern", &error))?;
        for interface in &node.spec.interfaces {
            if pattern.is_match(&interface.name) {
                let mut all = expected.clone();
                all.extend(interface.addresses.iter().filter_map(|text| address(text)));
                let name = named([node_name, generated, &interface.name, SUFFIX]);
                endpoints.push(endpoint(name, node, &interface.name, each_once(all)));
            }
        }
    }
    for endpoint in &mut endpoints {
        // The template's word counts, but not about whose it is.
        let labels = &mut endpoint.metadata.labels;
        let given = template.labels.iter().filter(|(l, _)| *l != CREATED_BY.0);
        labels.extend(given.map(|(label, value)| (label.clone(), value.clone())));
    }
    Ok(endpoints)
}

/// A name of these parts; of their digest where it would be too long for an object.
fn named<const N: usize>(parts: [&str; N]) -> String {
    let name = parts.join("-");
    if name.len() <= NAME_LIMIT {
        return name;
    }
    let digest = Sha256::digest(name.as_bytes());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{digest}-{SUFFIX}")
}

fn endpoint(name: String, node: &Node, interface: &str, expected: Vec<IpAddr>) -> HostEndpoint {
    let mut metadata = ObjectMeta::named(name);
    metadata.labels.clone_from(&node.metadata.labels);
    metadata
        .labels
        .insert(CREATED_BY.0.to_owned(), CREATED_BY.1.to_owned());
    let spec = HostEndpointSpec {
        node: node.metadata.name.to_string(),
        interface_name: interface.to_owned(),
        expected_ips: expected,
        // As long as no policy selects it, a host endpoint of ours changes nothing.
        profiles: vec![DEFAULT_ALLOW_PROFILE.to_owned()],
        ..HostEndpointSpec::default()
    };
    Resource::new(metadata, spec)
}

/// All addresses of a node: its own, those of its tunnel devices and of its interfaces, each once.
fn addresses(node: &Node) -> Vec<IpAddr> {
    let spec = &node.spec;
    let mut all: Vec<IpAddr> = Vec::new();
    all.extend(spec.ipv4().map(|network| network.ip()));
    all.extend(spec.ipv6().map(|network| network.ip()));
    let tunnel = spec.bgp.as_ref().and_then(|b| b.ipv4_ipip_tunnel_addr);
    all.extend(tunnel.map(IpAddr::from));
    all.extend(spec.ipv4_vxlan_tunnel_addr.map(IpAddr::from));
    all.extend(spec.ipv6_vxlan_tunnel_addr.map(IpAddr::from));
    if let Some(wireguard) = &spec.wireguard {
        all.extend(wireguard.interface_ipv4_address.map(IpAddr::from));
        all.extend(wireguard.interface_ipv6_address.map(IpAddr::from));
    }
    all.extend(spec.addresses.iter().filter_map(|a| address(&a.address)));
    let interfaces = spec.interfaces.iter();
    all.extend(interfaces.flat_map(|i| i.addresses.iter().filter_map(|text| address(text))));
    each_once(all)
}

/// An address, with or without its subnet.
fn address(text: &str) -> Option<IpAddr> {
    text.split('/').next()?.parse().ok()
}

fn each_once(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let mut seen = BTreeSet::new();
    addresses.retain(|address| seen.insert(*address));
    addresses
}

/// Reads, compares, writes. What somebody else changes in between is left to the next pass.
///
/// # Errors
/// The datastore cannot be read, or refuses a write for another reason than a conflict.
pub async fn pass(store: &dyn Datastore, config: &AutoHostEndpointConfig) -> Result<Plan, Error> {
    let nodes = store.list(Kind::Node, None).await;
    let nodes = nodes.map_err(Error::datastore("list nodes"))?;
    let endpoints = store.list(Kind::HostEndpoint, None).await;
    let endpoints = endpoints.map_err(Error::datastore("list host endpoints"))?;
    if let Some(bad) = nodes.undecodable.first() {
        return Err(Error::Setting {
            name: bad.key.to_string(),
            reason: format!(
                "cannot be read, so host endpoints stay as they are: {}",
                bad.reason
            ),
        });
    }
    let known: Vec<&Node> = nodes
        .items
        .iter()
        .filter_map(|item| match item.object.as_ref() {
            AnyResource::Node(node) => Some(node.as_ref()),
            _ => None,
        })
        .collect();
    let stand: Vec<HostEndpoint> = endpoints
        .items
        .iter()
        .filter_map(|item| match item.object.as_ref() {
            AnyResource::HostEndpoint(endpoint) => Some(endpoint.as_ref().clone()),
            _ => None,
        })
        .collect();
    let plan = plan(config, known, &stand);
    for endpoint in &plan.put {
        let name = &endpoint.metadata.name;
        let written = if endpoint.metadata.resource_version.is_some() {
            store.update(endpoint.clone().into()).await
        } else {
            store.create(endpoint.clone().into()).await
        };
        later_if_raced(written.map(|_| ()), || {
            format!("write host endpoint {name}")
        })?;
    }
    for endpoint in &plan.delete {
        let key: Key = endpoint.key();
        let revision = endpoint.metadata.resource_version.as_ref();
        let deleted = store.delete(&key, revision).await;
        later_if_raced(deleted.map(|_| ()), || format!("delete {key}"))?;
    }
    Ok(plan)
}

fn later_if_raced(
    result: Result<(), StoreError>,
    operation: impl FnOnce() -> String,
) -> Result<(), Error> {
    match result {
        Err(
            StoreError::Conflict { .. }
            | StoreError::AlreadyExists { .. }
            | StoreError::NotFound { .. },
        ) => Ok(()),
        other => other.map_err(Error::datastore(operation())),
    }
}
