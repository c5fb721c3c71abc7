//! The lock-out guard: which ways into and out of this host a policy of host endpoints must not cut. Pure.
//!
//! Calico's fail-safe ports protect fixed ports, and can be configured away. The guard protects what this node really
//! lives by: its API server and datastore, its Typha, its BGP peers, and its administrators' SSH. What policy would cut of
//! these is kept open, for that peer and that port alone, is said loudly, and is given back as soon as policy allows it.
//! Everything else of the policy is enforced.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use cali_api::v3::{FailsafeProtocol, ProtoPort};
use cali_api::{Cidr, Key};

use crate::calc::Direction;
use crate::compile::{Compiler, KeptOpen};
use crate::verdict::Packet;

const TCP: u8 = 6;
const SSH: u16 = 22;
const BGP: u16 = 179;
const API_SERVER: u16 = 6443;
const TYPHA: u16 = 5473;
/// Any port that a client may have.
const CLIENT_PORT: u16 = 40_000;

/// What a way is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// Administrators.
    Ssh,
    /// Routes.
    Bgp,
    /// The API server, or the datastore.
    ApiServer,
    /// What tells this node everything.
    Typha,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ssh => "SSH",
            Self::Bgp => "BGP",
            Self::ApiServer => "the API server",
            Self::Typha => "Typha",
        })
    }
}

/// One way that must stay open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Lifeline {
    /// What for.
    pub(super) purpose: Purpose,
    /// Seen from this host.
    pub(super) direction: Direction,
    /// TCP port of whoever is called.
    pub(super) port: u16,
    /// The other end.
    pub(super) peer: IpAddr,
    /// This host's address, where it is known.
    pub(super) own: Option<IpAddr>,
}

/// Where this node's servers are, as far as its configuration says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Servers {
    /// API server or datastore, and Typha.
    pub known: BTreeSet<(Purpose, SocketAddr)>,
    /// The guard does nothing.
    pub disabled: bool,
}

impl Servers {
    /// What the environment says: `KUBERNETES_SERVICE_HOST` and `..._PORT`, `ETCD_ENDPOINTS`, `FELIX_TYPHAADDR`. Names are
    /// not resolved: what is connected is seen anyway. `FELIX_LOCKOUTGUARD=Disabled` switches the guard off.
    #[must_use]
    pub fn from_env() -> Self {
        let read = |name: &str| std::env::var(name).unwrap_or_default();
        let kubernetes = format!(
            "{}:{}",
            bracketed(&read("KUBERNETES_SERVICE_HOST")),
            read("KUBERNETES_SERVICE_PORT")
        );
        let etcd = read("ETCD_ENDPOINTS");
        let mut known = BTreeSet::new();
        let api = std::iter::once(kubernetes.as_str()).chain(etcd.split(','));
        known.extend(api.filter_map(socket).map(|at| (Purpose::ApiServer, at)));
        let typha = read("FELIX_TYPHAADDR");
        let typha = typha.split(',').filter_map(socket);
        known.extend(typha.map(|at| (Purpose::Typha, at)));
        Self {
            known,
            disabled: read("FELIX_LOCKOUTGUARD").eq_ignore_ascii_case("disabled"),
        }
    }
}

fn bracketed(host: &str) -> String {
    match host.parse::<std::net::Ipv6Addr>() {
        Ok(v6) => format!("[{v6}]"),
        Err(_) => host.to_owned(),
    }
}

fn socket(text: &str) -> Option<SocketAddr> {
    let text = text.trim();
    let text = text.split_once("://").map_or(text, |(_, rest)| rest);
    text.trim_end_matches('/').parse().ok()
}

/// A connection that stands: who called whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Connection {
    /// Who called.
    pub(super) client: IpAddr,
    /// Who was called, after translation.
    pub(super) server: SocketAddr,
}

/// What the decision depends on besides policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Situation {
    /// The host's own addresses.
    pub(super) own: BTreeSet<IpAddr>,
    /// TCP connections of the host.
    pub(super) connections: BTreeSet<Connection>,
    /// TCP ports on which the host listens.
    pub(super) listening: BTreeSet<u16>,
    /// Addresses of other nodes.
    pub(super) nodes: BTreeSet<IpAddr>,
}

/// The purpose of a port that this host calls.
fn called(port: u16, servers: &Servers) -> Option<Purpose> {
    let known = servers.known.iter().find(|(_, at)| at.port() == port);
    known.map(|(purpose, _)| *purpose).or(match port {
        BGP => Some(Purpose::Bgp),
        API_SERVER => Some(Purpose::ApiServer),
        TYPHA => Some(Purpose::Typha),
        _ => None,
    })
}

/// The purpose of a port that others call here.
const fn calling(port: u16) -> Option<Purpose> {
    match port {
        SSH => Some(Purpose::Ssh),
        BGP => Some(Purpose::Bgp),
        API_SERVER => Some(Purpose::ApiServer),
        TYPHA => Some(Purpose::Typha),
        _ => None,
    }
}

/// The ways that this host lives by now.
fn lifelines(servers: &Servers, now: &Situation) -> BTreeSet<Lifeline> {
    let mut found = BTreeSet::new();
    for Connection { client, server } in &now.connections {
        let (from_here, to_here) = (now.own.contains(client), now.own.contains(&server.ip()));
        let port = server.port();
        let line = |purpose, direction, peer, own| Lifeline {
            purpose,
            direction,
            port,
            peer,
            own: Some(own),
        };
        match (from_here, to_here) {
            (true, false) => found.extend(
                called(port, servers)
                    .map(|purpose| line(purpose, Direction::Egress, server.ip(), *client)),
            ),
            (false, true) => found.extend(
                calling(port)
                    .map(|purpose| line(purpose, Direction::Ingress, *client, server.ip())),
            ),
            _ => {}
        }
    }
    found.extend(servers.known.iter().map(|(purpose, at)| Lifeline {
        purpose: *purpose,
        direction: Direction::Egress,
        port: at.port(),
        peer: at.ip(),
        own: None,
    }));
    if now.listening.contains(&BGP) {
        for peer in &now.nodes {
            found.extend(
                [Direction::Ingress, Direction::Egress].map(|direction| Lifeline {
                    purpose: Purpose::Bgp,
                    direction,
                    port: BGP,
                    peer: *peer,
                    own: None,
                }),
            );
        }
    }
    found
}

/// What must be kept open, and why, in words.
#[must_use]
pub(super) fn judge(
    compiler: &Compiler,
    servers: &Servers,
    now: &Situation,
) -> (KeptOpen, Vec<String>) {
    let (mut kept, mut said) = (KeptOpen::default(), BTreeMap::new());
    if servers.disabled || !compiler.has_hosts() {
        return (kept, Vec::new());
    }
    for line in lifelines(servers, now) {
        let Some(endpoint) = forbidden(compiler, &line) else {
            continue;
        };
        keep(&mut kept, line.direction, line.port, Some(line.peer));
        let way = (line.purpose, line.direction, line.port, endpoint);
        said.entry(way)
            .or_insert_with(BTreeSet::new)
            .insert(line.peer);
    }
    let mut notices: Vec<String> = said
        .into_iter()
        .map(|((purpose, direction, port, endpoint), peers)| {
            let peers: Vec<String> = peers.iter().take(4).map(IpAddr::to_string).collect();
            notice(purpose, direction, port, &endpoint, &peers.join(", "))
        })
        .collect();
    if now.listening.contains(&SSH)
        && let Some(endpoint) = shut(compiler, now)
    {
        keep(&mut kept, Direction::Ingress, SSH, None);
        notices.push(notice(
            Purpose::Ssh,
            Direction::Ingress,
            SSH,
            &endpoint,
            "everybody",
        ));
    }
    (kept, notices)
}

fn notice(
    purpose: Purpose,
    direction: Direction,
    port: u16,
    endpoint: &Key,
    peers: &str,
) -> String {
    let (word, field) = match direction {
        Direction::Ingress => ("from", "failsafeInboundHostPorts"),
        Direction::Egress => ("to", "failsafeOutboundHostPorts"),
    };
    format!(
        "policy of {endpoint} would cut this host off: {purpose} {word} {peers} (TCP port {port}) is kept open; allow it by a \
         policy, or name it in {field}"
    )
}

fn packet(line: &Lifeline) -> Packet {
    let nobody = match line.peer {
        IpAddr::V4(_) => IpAddr::from([0, 0, 0, 0]),
        IpAddr::V6(_) => IpAddr::from([0_u16; 8]),
    };
    let own = line.own.unwrap_or(nobody);
    let (source, destination) = match line.direction {
        Direction::Ingress => (line.peer, own),
        Direction::Egress => (own, line.peer),
    };
    Packet {
        source,
        destination,
        protocol: TCP,
        source_port: CLIENT_PORT,
        destination_port: line.port,
        icmp: None,
    }
}

/// Whose policy forbids it.
fn forbidden(compiler: &Compiler, line: &Lifeline) -> Option<Key> {
    compiler.host_forbids(line.own, &packet(line), line.direction)
}

/// Whose policy leaves nobody who could come in by SSH, at whatever address of this host.
fn shut(compiler: &Compiler, now: &Situation) -> Option<Key> {
    let mut guilty = None;
    let senders = compiler.named_senders().into_iter();
    let addresses = compiler.host_addresses();
    for peer in senders.chain(now.nodes.iter().copied()) {
        let own = addresses.iter();
        for own in own.filter(|own| own.is_ipv4() == peer.is_ipv4()) {
            let line = Lifeline {
                purpose: Purpose::Ssh,
                direction: Direction::Ingress,
                port: SSH,
                peer,
                own: Some(*own),
            };
            match forbidden(compiler, &line) {
                Some(endpoint) => guilty = Some(endpoint),
                None => return None,
            }
        }
    }
    guilty
}

fn keep(kept: &mut KeptOpen, direction: Direction, port: u16, peer: Option<IpAddr>) {
    let open = ProtoPort {
        protocol: FailsafeProtocol::Tcp,
        port,
        net: peer.map(|peer| Cidr::host(peer).into()),
    };
    let list = match direction {
        Direction::Ingress => &mut kept.inbound,
        Direction::Egress => &mut kept.outbound,
    };
    if !list.contains(&open) {
        list.push(open);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cali_api::AnyResource;
    use serde_json::{Value, json};

    use super::*;
    use crate::conformance::compile_batch;

    const OWN: &str = "10.1.0.1";

    fn compiled(policy: Option<Value>) -> Compiler {
        let mut all = vec![
            json!({"apiVersion": "projectcalico.org/v3", "kind": "HostEndpoint", "metadata": {"name": "eth0"},
                   "spec": {"node": "node", "interfaceName": "eth0"}}),
            json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"},
                   "spec": {"failsafeInboundHostPorts": [], "failsafeOutboundHostPorts": []}}),
        ];
        all.extend(policy.map(|spec| {
            json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy", "metadata": {"name": "p"},
                   "spec": spec})
        }));
        let objects: Vec<Arc<AnyResource>> = all
            .into_iter()
            .map(|value| Arc::new(AnyResource::from_json(value).unwrap()))
            .collect();
        let mut compiler = Compiler::default();
        let own = BTreeSet::from([OWN.parse().unwrap()]);
        compiler.set_interfaces(BTreeMap::from([("eth0".into(), own)]));
        compiler.apply(&compile_batch(&objects).unwrap());
        compiler
    }

    fn situation() -> Situation {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let connection = |client: &str, server: &str| Connection {
            client: ip(client),
            server: server.parse().unwrap(),
        };
        Situation {
            own: BTreeSet::from([ip(OWN)]),
            connections: BTreeSet::from([
                connection("10.9.0.7", "10.1.0.1:22"),
                connection(OWN, "10.2.0.1:6443"),
                connection(OWN, "10.2.0.2:5473"),
                connection(OWN, "10.2.0.9:443"),
                connection("10.1.0.2", "10.1.0.1:179"),
            ]),
            listening: BTreeSet::from([22, 179]),
            nodes: BTreeSet::from([ip("10.1.0.2")]),
        }
    }

    fn open(kept: &[ProtoPort]) -> BTreeSet<String> {
        let text = |port: &ProtoPort| match &port.net {
            Some(net) => format!("{} {}", port.port, net.cidr()),
            None => port.port.to_string(),
        };
        kept.iter().map(text).collect()
    }

    fn texts(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn what_the_host_lives_by_is_kept_open_and_nothing_else() {
        let (kept, said) = judge(&compiled(None), &Servers::default(), &situation());
        let inbound = ["179 10.1.0.2/32", "22", "22 10.9.0.7/32"];
        assert_eq!(open(&kept.inbound), texts(&inbound));
        let outbound = ["179 10.1.0.2/32", "5473 10.2.0.2/32", "6443 10.2.0.1/32"];
        assert_eq!(open(&kept.outbound), texts(&outbound));
        assert!(
            said.iter().any(|text| text.contains("SSH from 10.9.0.7")),
            "{said:?}"
        );
        assert!(
            said.iter().any(|text| text.contains("SSH from everybody")),
            "{said:?}"
        );
    }

    #[test]
    fn a_policy_that_lets_administrators_in_is_left_alone() {
        let policy = json!({"selector": "all()", "types": ["Ingress", "Egress"], "egress": [{"action": "Allow"}],
            "ingress": [{"action": "Allow", "protocol": "TCP", "source": {"nets": ["10.9.0.0/24"]}, "destination": {"ports": [22]}},
                        {"action": "Allow", "protocol": "TCP", "destination": {"ports": [179]}}]});
        let judged = judge(&compiled(Some(policy)), &Servers::default(), &situation());
        assert_eq!(judged, (KeptOpen::default(), Vec::new()));
    }

    #[test]
    fn one_that_forgets_the_session_that_is_open_keeps_that_session() {
        let policy = json!({"selector": "all()", "types": ["Ingress", "Egress"], "egress": [{"action": "Allow"}],
            "ingress": [{"action": "Allow", "protocol": "TCP", "source": {"nets": ["10.8.0.0/24"]}, "destination": {"ports": [22]}},
                        {"action": "Allow", "protocol": "TCP", "destination": {"ports": [179]}}]});
        let (kept, said) = judge(&compiled(Some(policy)), &Servers::default(), &situation());
        assert_eq!(open(&kept.inbound), texts(&["22 10.9.0.7/32"]));
        assert_eq!(kept.outbound, []);
        assert_eq!(said.len(), 1);
    }

    #[test]
    fn servers_of_the_configuration_need_no_connection_and_the_guard_can_be_switched_off() {
        let mut servers = Servers::default();
        servers
            .known
            .insert((Purpose::ApiServer, "10.96.0.1:443".parse().unwrap()));
        let now = Situation {
            own: situation().own,
            ..Situation::default()
        };
        let (kept, _) = judge(&compiled(None), &servers, &now);
        assert_eq!(open(&kept.outbound), texts(&["443 10.96.0.1/32"]));
        servers.disabled = true;
        let judged = judge(&compiled(None), &servers, &now);
        assert_eq!(judged, (KeptOpen::default(), Vec::new()));
    }
}
