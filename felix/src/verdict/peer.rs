//! Whether a rule matches a packet, and who has an address.

use std::net::IpAddr;

use cali_api::kubernetes::{
    LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_SERVICE_ACCOUNT, NAMESPACE_PROFILE_PREFIX,
    SERVICE_ACCOUNT_LABEL_PREFIX,
};
use cali_api::selector::{Selector, SelectorError};
use cali_api::v3::{EntityRule, Icmp, Port, Protocol, Rule, ServiceMatch, WorkloadEndpoint};
use cali_api::{AnyResource, Cidr, Key, Kind, StringMap};

use super::{Model, Packet, any_contains};
use crate::calc::Direction;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Why a rule cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    #[error(transparent)]
    Selector(#[from] SelectorError),
    #[error("ports need a protocol")]
    PortsWithoutProtocol,
    #[error("services cannot stand here")]
    Services,
    #[error("no such IP version")]
    IpVersion,
}

/// Somebody with labels and addresses.
struct Somebody {
    labels: StringMap,
    nets: Vec<Cidr>,
    ports: Vec<(String, u8, u16)>,
}

/// One end of a packet.
#[derive(Clone, Copy)]
struct End {
    addr: IpAddr,
    port: u16,
}

impl Model {
    pub(super) fn matches(
        &self,
        namespace: Option<&str>,
        rule: &Rule,
        packet: &Packet,
        direction: Direction,
    ) -> Result<bool, Unreadable> {
        let (mine, peer) = match direction {
            Direction::Ingress => (&rule.destination, &rule.source),
            Direction::Egress => (&rule.source, &rule.destination),
        };
        if mine.services.is_some() {
            return Err(Unreadable::Services);
        }
        let services = match &peer.services {
            Some(service) => self.service_matches(namespace, peer, service, packet, direction)?,
            None => true,
        };
        let version = match rule.ip_version {
            None => true,
            Some(4) => packet.destination.is_ipv4(),
            Some(6) => packet.destination.is_ipv6(),
            Some(_) => return Err(Unreadable::IpVersion),
        };
        let protocol = rule
            .protocol
            .is_none_or(|protocol| protocol.number() == packet.protocol)
            && rule
                .not_protocol
                .is_none_or(|protocol| protocol.number() != packet.protocol);
        let is_icmp = matches!(packet.protocol, ICMP | ICMPV6);
        let icmp = rule
            .icmp
            .as_ref()
            .is_none_or(|icmp| is_icmp && icmp_matches(icmp, packet))
            && rule
                .not_icmp
                .as_ref()
                .is_none_or(|icmp| is_icmp && !icmp_matches(icmp, packet));
        let source = End {
            addr: packet.source,
            port: packet.source_port,
        };
        let destination = End {
            addr: packet.destination,
            port: packet.destination_port,
        };
        // Both ends are looked at in any case: a rule is readable or not whatever the packet is.
        let source = self.end_matches(namespace, rule.protocol, &rule.source, source)?;
        let destination =
            self.end_matches(namespace, rule.protocol, &rule.destination, destination)?;
        Ok(version && protocol && icmp && source && destination && services)
    }

    fn end_matches(
        &self,
        namespace: Option<&str>,
        protocol: Option<Protocol>,
        entity: &EntityRule,
        end: End,
    ) -> Result<bool, Unreadable> {
        if protocol.is_none() && !(entity.ports.is_empty() && entity.not_ports.is_empty()) {
            return Err(Unreadable::PortsWithoutProtocol);
        }
        let nets: Vec<Cidr> = entity.nets.iter().map(|net| net.cidr()).collect();
        let not_nets: Vec<Cidr> = entity.not_nets.iter().map(|net| net.cidr()).collect();
        let positive = positive_selectors(namespace, entity)?;
        let negative = Selector::parse(&entity.not_selector)?;
        let selected =
            |labels: &StringMap| positive.iter().all(|selector| selector.matches(labels));
        let wanted = match (positive.is_empty(), entity.not_selector.is_empty()) {
            (true, true) => true,
            (true, false) => {
                !self.anybody_at(end.addr, |somebody| negative.matches(&somebody.labels))
            }
            (false, true) => self.anybody_at(end.addr, |somebody| selected(&somebody.labels)),
            (false, false) => self.anybody_at(end.addr, |somebody| {
                selected(&somebody.labels) && !negative.matches(&somebody.labels)
            }),
        };
        let port_is = |ports: &[Port]| {
            ports.iter().any(|port| match port {
                Port::Number(number) => *number == end.port,
                Port::Range(first, last) => (*first..=*last).contains(&end.port),
                Port::Named(name) => self.anybody_at(end.addr, |somebody| {
                    let here = |(known, number, port): &(String, u8, u16)| {
                        known == name
                            && Some(*number) == protocol.map(Protocol::number)
                            && *port == end.port
                    };
                    selected(&somebody.labels) && somebody.ports.iter().any(here)
                }),
            })
        };
        Ok((nets.is_empty() || any_contains(&nets, end.addr))
            && !any_contains(&not_nets, end.addr)
            && wanted
            && (entity.ports.is_empty() || port_is(&entity.ports))
            && !port_is(&entity.not_ports))
    }

    /// Whether the sender (of ingress rules) has an address of the service, or the receiver (of egress rules) is one
    /// of its ports.
    fn service_matches(
        &self,
        namespace: Option<&str>,
        entity: &EntityRule,
        service: &ServiceMatch,
        packet: &Packet,
        direction: Direction,
    ) -> Result<bool, Unreadable> {
        let alone = EntityRule {
            services: None,
            ports: Vec::new(),
            not_ports: Vec::new(),
            ..entity.clone()
        };
        let with_ports = direction == Direction::Egress;
        let ports = !(entity.ports.is_empty() && entity.not_ports.is_empty());
        let home = match service.namespace.as_str() {
            "" => namespace,
            name => Some(name),
        };
        let (Some(home), false) = (home, service.name.is_empty()) else {
            return Err(Unreadable::Services);
        };
        if !alone.is_empty() || (with_ports && ports) {
            return Err(Unreadable::Services);
        }
        let slices = self
            .objects
            .iter()
            .filter_map(|(key, object)| match &**object {
                AnyResource::K8sEndpointSlice(slice) if key.namespace.as_deref() == Some(home) => {
                    Some(slice)
                }
                _ => None,
            });
        let of_service = slices.filter(|slice| {
            slice.metadata.labels.get("kubernetes.io/service-name") == Some(&service.name)
        });
        let addr = match direction {
            Direction::Ingress => packet.source,
            Direction::Egress => packet.destination,
        };
        Ok(of_service.into_iter().any(|slice| {
            let mut addresses = slice.spec.endpoints.iter().flat_map(|one| &one.addresses);
            let port_is = slice.spec.ports.iter().any(|port| {
                let protocol = port
                    .protocol
                    .as_deref()
                    .unwrap_or("TCP")
                    .parse::<Protocol>();
                protocol.is_ok_and(|protocol| protocol.number() == packet.protocol)
                    && port.port == Some(packet.destination_port.into())
            });
            addresses.any(|text| text.parse() == Ok(addr)) && (port_is || !with_ports)
        }))
    }

    /// Whether somebody who has the address satisfies the test.
    fn anybody_at(&self, addr: IpAddr, test: impl Fn(&Somebody) -> bool) -> bool {
        self.objects
            .iter()
            .filter_map(|(key, object)| self.somebody(key, object))
            .any(|somebody| any_contains(&somebody.nets, addr) && test(&somebody))
    }

    fn somebody(&self, key: &Key, object: &AnyResource) -> Option<Somebody> {
        match object {
            AnyResource::WorkloadEndpoint(endpoint) => {
                let ports = endpoint.spec.ports.iter();
                Some(Somebody {
                    labels: self.workload_labels(endpoint),
                    nets: endpoint.spec.ip_networks.clone(),
                    ports: ports
                        .map(|port| (port.name.clone(), port.protocol.number(), port.port))
                        .collect(),
                })
            }
            AnyResource::HostEndpoint(endpoint) => {
                let ports = endpoint.spec.ports.iter();
                Some(Somebody {
                    labels: self
                        .with_profiles(endpoint.metadata.labels.clone(), &endpoint.spec.profiles),
                    nets: endpoint
                        .spec
                        .expected_ips
                        .iter()
                        .map(|addr| Cidr::host(*addr))
                        .collect(),
                    ports: ports
                        .map(|port| (port.name.clone(), port.protocol.number(), port.port))
                        .collect(),
                })
            }
            AnyResource::GlobalNetworkSet(set) => Some(Somebody {
                labels: set.metadata.labels.clone(),
                nets: set.spec.nets.iter().map(|net| net.cidr()).collect(),
                ports: Vec::new(),
            }),
            AnyResource::NetworkSet(set) => {
                let namespace = key.namespace.as_deref().unwrap_or_default();
                let mut labels = set.metadata.labels.clone();
                labels.insert(LABEL_NAMESPACE.to_owned(), namespace.to_owned());
                Some(Somebody {
                    labels: self
                        .with_profiles(labels, &[format!("{NAMESPACE_PROFILE_PREFIX}{namespace}")]),
                    nets: set.spec.nets.iter().map(|net| net.cidr()).collect(),
                    ports: Vec::new(),
                })
            }
            _ => None,
        }
    }

    /// All labels of a workload: its own, what it is, and what it inherits.
    pub(super) fn workload_labels(&self, endpoint: &WorkloadEndpoint) -> StringMap {
        let spec = &endpoint.spec;
        let mut labels = endpoint.metadata.labels.clone();
        for (label, value) in [
            (
                LABEL_NAMESPACE,
                endpoint.metadata.namespace.as_deref().unwrap_or_default(),
            ),
            (LABEL_ORCHESTRATOR, &spec.orchestrator),
            (LABEL_SERVICE_ACCOUNT, &spec.service_account_name),
        ] {
            if !value.is_empty() {
                labels.insert(label.to_owned(), value.to_owned());
            }
        }
        self.with_profiles(labels, &spec.profiles)
    }

    pub(super) fn with_profiles(&self, mut labels: StringMap, profiles: &[String]) -> StringMap {
        for name in profiles {
            let key = Key::cluster(Kind::Profile, name.as_str());
            if let Some(AnyResource::Profile(profile)) =
                self.objects.get(&key).map(|object| &**object)
            {
                for (label, value) in &profile.spec.labels_to_apply {
                    labels.entry(label.clone()).or_insert_with(|| value.clone());
                }
            }
        }
        labels
    }
}

/// The selectors that the peer must satisfy, all of them; none when the rule does not ask who it is.
fn positive_selectors(
    namespace: Option<&str>,
    entity: &EntityRule,
) -> Result<Vec<Selector>, SelectorError> {
    let mut all = Vec::new();
    if !entity.selector.is_empty() {
        all.push(Selector::parse(&entity.selector)?);
    }
    if !entity.namespace_selector.is_empty() {
        all.push(Selector::parse(&entity.namespace_selector)?.of_namespaces());
    }
    if let Some(accounts) = &entity.service_accounts {
        all.push(
            Selector::parse(&accounts.selector)?.with_label_prefix(SERVICE_ACCOUNT_LABEL_PREFIX),
        );
        if !accounts.names.is_empty() {
            all.push(Selector::is_in(
                LABEL_SERVICE_ACCOUNT,
                accounts.names.iter().map(String::as_str),
            ));
        }
    }
    // A peer of a namespaced policy is meant to live in the same namespace, unless it says which.
    if let (Some(namespace), false, true) = (
        namespace,
        all.is_empty(),
        entity.namespace_selector.is_empty(),
    ) {
        all.push(Selector::equals(LABEL_NAMESPACE, namespace));
    }
    Ok(all)
}

fn icmp_matches(icmp: &Icmp, packet: &Packet) -> bool {
    packet.icmp.is_some_and(|(icmp_type, code)| {
        icmp.type_.is_none_or(|wanted| wanted == icmp_type)
            && icmp.code.is_none_or(|wanted| wanted == code)
    })
}
