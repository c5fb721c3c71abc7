//! Pods become workload endpoints.

use std::fmt::Write;
use std::net::IpAddr;

use sha1::{Digest, Sha1};

use super::{
    INTERFACE_PREFIX, LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_SERVICE_ACCOUNT,
    NAMESPACE_PROFILE_PREFIX, ORCHESTRATOR_KUBERNETES, POD_INTERFACE, Pod,
    SERVICE_ACCOUNT_PROFILE_PREFIX, annotation, derived_metadata, json_list, quantity,
};
use crate::v3::{
    Dscp, IPNAT, Protocol, QoSControls, WorkloadEndpoint, WorkloadEndpointPort,
    WorkloadEndpointSpec,
};
use crate::{Cidr, Resource, StringMap};

/// Labels may not be longer; a longer service account is only matched through its profile.
const MAX_LABEL_VALUE: usize = 63;

/// Burst where a bandwidth has none, in bits.
const DEFAULT_BURST: u64 = 1 << 32;
/// Burst where a packet rate has none, in packets.
const DEFAULT_PACKET_BURST: u64 = 5;

/// The host's interface of a pod: `cali` and eleven hexadecimal digits of a digest of its name.
#[must_use]
pub fn interface_name(namespace: &str, pod: &str) -> String {
    let digest = Sha1::digest(format!("{namespace}.{pod}").as_bytes());
    let mut name = INTERFACE_PREFIX.to_owned();
    for byte in &digest[..6] {
        // Writing to a text cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name.truncate(INTERFACE_PREFIX.len() + 11);
    name
}

/// The workload endpoint's name of a pod: node, orchestrator, pod and interface joined by dashes,
/// with the dashes within them doubled.
#[must_use]
pub fn workload_endpoint_name(node: &str, pod: &str) -> String {
    let part = |text: &str| text.replace('-', "--");
    format!(
        "{}-{ORCHESTRATOR_KUBERNETES}-{}-{POD_INTERFACE}",
        part(node),
        part(pod)
    )
}

/// The annotations by which a CNI plugin tells a pod's addresses before kubelet does.
#[must_use]
pub fn address_annotations(addresses: &[Cidr], container_id: &str) -> StringMap {
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    StringMap::from([
        (
            annotation::POD_IP.to_owned(),
            texts.first().cloned().unwrap_or_default(),
        ),
        (annotation::POD_IPS.to_owned(), texts.join(",")),
        (annotation::CONTAINER_ID.to_owned(), container_id.to_owned()),
    ])
}

/// Whether the pod's address may already belong to somebody else.
fn is_finished(pod: &Pod) -> bool {
    let emptied = |name: &str| {
        pod.metadata
            .annotations
            .get(name)
            .is_some_and(String::is_empty)
    };
    if pod.metadata.deletion_timestamp.is_some()
        && (emptied(annotation::POD_IP) || emptied(annotation::AWS_POD_IPS))
    {
        return true;
    }
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The texts of the pod's addresses, from the first source that has any.
fn address_texts(pod: &Pod) -> Vec<&str> {
    let status = pod.status.as_ref();
    let listed: Vec<&str> = status
        .into_iter()
        .flat_map(|status| status.pod_ips.iter().flatten())
        .map(|entry| entry.ip.as_str())
        .collect();
    if !listed.is_empty() {
        return listed;
    }
    if let Some(ip) = status
        .and_then(|status| status.pod_ip.as_deref())
        .filter(|ip| !ip.is_empty())
    {
        return vec![ip];
    }
    [
        annotation::POD_IPS,
        annotation::POD_IP,
        annotation::AWS_POD_IPS,
    ]
    .into_iter()
    .filter_map(|name| pod.metadata.annotations.get(name))
    .map(|text| {
        text.split(',')
            .map(str::trim)
            .filter(|ip| !ip.is_empty())
            .collect::<Vec<_>>()
    })
    .find(|ips| !ips.is_empty())
    .unwrap_or_default()
}

/// At most one address of each family.
fn addresses(pod: &Pod, problems: &mut Vec<String>) -> Vec<Cidr> {
    if is_finished(pod) {
        return Vec::new();
    }
    let mut found: Vec<Cidr> = Vec::new();
    for text in address_texts(pod) {
        let (address, prefix_len) = text
            .split_once('/')
            .map_or((text, None), |(address, len)| (address, Some(len)));
        let Ok(address) = address.parse::<IpAddr>() else {
            problems.push(format!("pod address {text:?} is malformed"));
            continue;
        };
        let cidr = Cidr::host(address);
        if prefix_len.is_some_and(|len| len != cidr.prefix_len().to_string()) {
            problems.push(format!("pod address {text:?} is not a single address"));
        } else if found.iter().any(|other| other.is_v4() == cidr.is_v4()) {
            problems.push(format!("pod address {text:?} is the second of its family"));
        } else {
            found.push(cidr);
        }
    }
    found
}

/// Container ports that policy can name or that are mapped on the host.
fn ports(pod: &Pod, problems: &mut Vec<String>) -> Vec<WorkloadEndpointPort> {
    let mut ports = Vec::new();
    for port in pod
        .spec
        .containers
        .iter()
        .flat_map(|container| container.ports.iter().flatten())
    {
        let name = port.name.clone().unwrap_or_default();
        let host_port = port.host_port.unwrap_or(0);
        if name.is_empty() && host_port == 0 {
            continue;
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let numbers = u16::try_from(port.container_port)
            .ok()
            .zip(u16::try_from(host_port).ok());
        match (protocol.parse::<Protocol>(), numbers) {
            (Ok(protocol), Some((number, host_port))) => ports.push(WorkloadEndpointPort {
                name,
                protocol,
                port: number,
                host_port,
                host_ip: port.host_ip.as_deref().and_then(|ip| ip.parse().ok()),
            }),
            _ => problems.push(format!(
                "port {name:?}: protocol {protocol:?} or a number is out of range"
            )),
        }
    }
    ports
}

fn qos_controls(annotations: &StringMap, problems: &mut Vec<String>) -> Option<QoSControls> {
    let mut limit = |own: &str, kubernetes: Option<&str>| -> u64 {
        let own = format!("{}{own}", annotation::QOS_PREFIX);
        let found = [Some(own.as_str()), kubernetes]
            .into_iter()
            .flatten()
            .find_map(|name| Some((name, annotations.get(name)?)));
        let Some((name, text)) = found else { return 0 };
        quantity::parse(text).unwrap_or_else(|| {
            problems.push(format!("annotation {name}: {text:?} is not a quantity"));
            0
        })
    };
    let mut controls = QoSControls {
        ingress_bandwidth: limit("ingressBandwidth", Some(annotation::INGRESS_BANDWIDTH)),
        ingress_burst: limit("ingressBurst", None),
        ingress_peakrate: limit("ingressPeakrate", None),
        ingress_minburst: limit("ingressMinburst", None),
        egress_bandwidth: limit("egressBandwidth", Some(annotation::EGRESS_BANDWIDTH)),
        egress_burst: limit("egressBurst", None),
        egress_peakrate: limit("egressPeakrate", None),
        egress_minburst: limit("egressMinburst", None),
        ingress_packet_rate: limit("ingressPacketRate", None),
        ingress_packet_burst: limit("ingressPacketBurst", None),
        egress_packet_rate: limit("egressPacketRate", None),
        egress_packet_burst: limit("egressPacketBurst", None),
        ingress_max_connections: limit("ingressMaxConnections", None),
        egress_max_connections: limit("egressMaxConnections", None),
        dscp: None,
    };
    let dscp = format!("{}dscp", annotation::QOS_PREFIX);
    if let Some(text) = annotations.get(&dscp) {
        let number = text
            .parse()
            .ok()
            .filter(|number| *number < 64)
            .map(Dscp::Number);
        controls.dscp = number.or_else(|| text.parse().ok().map(Dscp::Name));
        if controls.dscp.is_none() {
            problems.push(format!("annotation {dscp}: {text:?} is not a code point"));
        }
    }
    let fill = |rate: u64, burst: &mut u64, default: u64| {
        if rate > 0 && *burst == 0 {
            *burst = default;
        }
    };
    fill(
        controls.ingress_bandwidth,
        &mut controls.ingress_burst,
        DEFAULT_BURST,
    );
    fill(
        controls.egress_bandwidth,
        &mut controls.egress_burst,
        DEFAULT_BURST,
    );
    fill(
        controls.ingress_packet_rate,
        &mut controls.ingress_packet_burst,
        DEFAULT_PACKET_BURST,
    );
    fill(
        controls.egress_packet_rate,
        &mut controls.egress_packet_burst,
        DEFAULT_PACKET_BURST,
    );
    (controls != QoSControls::default()).then_some(controls)
}

/// The endpoint of a pod, or nothing for a pod that is not scheduled yet or in the host's network.
/// A pod that has no address yet, or has it no longer, gives an endpoint without addresses.
#[must_use]
pub fn workload_endpoint(pod: &Pod, problems: &mut Vec<String>) -> Option<WorkloadEndpoint> {
    let node = pod
        .spec
        .node_name
        .as_deref()
        .filter(|node| !node.is_empty())?;
    if pod.spec.host_network == Some(true) {
        return None;
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let name = pod.metadata.name.as_str();
    let annotations = &pod.metadata.annotations;
    let service_account = pod.spec.service_account_name.clone().unwrap_or_default();

    let mut metadata = derived_metadata(&pod.metadata, workload_endpoint_name(node, name));
    metadata.namespace = Some(namespace.to_owned());
    metadata
        .generate_name
        .clone_from(&pod.metadata.generate_name);
    metadata.labels.clone_from(&pod.metadata.labels);
    metadata
        .labels
        .insert(LABEL_NAMESPACE.to_owned(), namespace.to_owned());
    metadata.labels.insert(
        LABEL_ORCHESTRATOR.to_owned(),
        ORCHESTRATOR_KUBERNETES.to_owned(),
    );
    let mut profiles = vec![format!("{NAMESPACE_PROFILE_PREFIX}{namespace}")];
    if !service_account.is_empty() {
        if service_account.len() < MAX_LABEL_VALUE {
            metadata
                .labels
                .insert(LABEL_SERVICE_ACCOUNT.to_owned(), service_account.clone());
        }
        profiles.push(format!(
            "{SERVICE_ACCOUNT_PROFILE_PREFIX}{namespace}.{service_account}"
        ));
    }

    let ip_networks = addresses(pod, problems);
    let floating: Vec<IpAddr> = json_list(annotations, annotation::FLOATING_IPS, problems);
    let ip_nats = floating
        .into_iter()
        .filter_map(|external_ip| {
            let internal = ip_networks
                .iter()
                .find(|network| network.is_v4() == external_ip.is_ipv4())?;
            Some(IPNAT {
                internal_ip: internal.addr(),
                external_ip,
            })
        })
        .collect();
    let spec = WorkloadEndpointSpec {
        orchestrator: ORCHESTRATOR_KUBERNETES.to_owned(),
        node: node.to_owned(),
        container_id: annotations
            .get(annotation::CONTAINER_ID)
            .cloned()
            .unwrap_or_default(),
        pod: name.to_owned(),
        endpoint: POD_INTERFACE.to_owned(),
        service_account_name: service_account,
        ip_networks,
        ip_nats,
        profiles,
        interface_name: interface_name(namespace, name),
        ports: ports(pod, problems),
        allow_spoofed_source_prefixes: json_list(
            annotations,
            annotation::ALLOWED_SOURCE_PREFIXES,
            problems,
        ),
        qos_controls: qos_controls(annotations, problems),
        ..WorkloadEndpointSpec::default()
    };
    Some(Resource::new(metadata, spec))
}
