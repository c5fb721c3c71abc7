//! `calictl bgp`: the BGP speaker of this node, seen from close up.

use crate::bgp_table::{since, table};
use crate::node::{Output, now};
use crate::{output, sockets};
use anyhow::{Result, bail};
use cali_api::Cidr;
use cali_control::paths::run_dir;
use cali_control::status::{
    BgpRequest, BgpResponse, BgpStatus, Direction, PeerStatus, RouteStatus, SessionState,
};
use clap::{Args, Subcommand};
use serde::Serialize;
use std::fmt::Write;
use std::net::IpAddr;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All neighbors, with how many routes each of them sends and gets
    Peers {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// The table: best and other paths, with the reason why a path is not used
    Routes(Routes),
    /// Everything about one neighbor
    Neighbor {
        address: IpAddr,
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Ask a neighbor for its routes again, without ending the session
    Refresh { address: IpAddr },
}

#[derive(Debug, Args)]
pub(crate) struct Routes {
    /// Only this prefix and what lies inside of it
    prefix: Option<Cidr>,
    /// Only the routes of this neighbor: what it sent
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["accepted", "advertised"])]
    received: Option<IpAddr>,
    /// Only the routes of this neighbor: what was left by loop checks and filters
    #[arg(long, value_name = "ADDRESS", conflicts_with = "advertised")]
    accepted: Option<IpAddr>,
    /// What this neighbor is sent
    #[arg(long, value_name = "ADDRESS")]
    advertised: Option<IpAddr>,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

impl Routes {
    fn request(&self) -> BgpRequest {
        let of = |peer: IpAddr, direction| BgpRequest::PeerRoutes { peer, direction };
        match (self.received, self.accepted, self.advertised) {
            (Some(peer), ..) => of(peer, Direction::Received),
            (_, Some(peer), _) => of(peer, Direction::Accepted),
            (.., Some(peer)) => of(peer, Direction::Advertised),
            _ => BgpRequest::Routes {
                within: self.prefix,
            },
        }
    }

    /// The daemon narrows the table itself, but not the routes of one neighbor.
    fn wants(&self, route: &RouteStatus) -> bool {
        self.prefix
            .is_none_or(|outer| outer.contains_cidr(&route.prefix))
    }
}

pub(crate) async fn run(command: &Command) -> Result<()> {
    match command {
        Command::Peers { output } => {
            let status = status().await?;
            show(*output, &status.peers, || Ok(peers(&status, now()?)))
        }
        Command::Routes(wanted) => {
            let mut routes = match ask(wanted.request()).await? {
                BgpResponse::Routes(routes) => routes,
                other => bail!("bgpd answered {other:?}"),
            };
            routes.retain(|route| wanted.wants(route));
            let sent = wanted.advertised.is_some();
            show(wanted.output, &routes, || Ok(render_routes(&routes, sent)))
        }
        Command::Neighbor { address, output } => {
            let status = status().await?;
            let Some(peer) = status.peers.iter().find(|p| p.address == *address) else {
                bail!("there is no BGP peer {address}");
            };
            show(*output, peer, || Ok(neighbor(peer, now()?)))
        }
        Command::Refresh { address } => match ask(BgpRequest::Refresh { peer: *address }).await? {
            BgpResponse::Done => Ok(()),
            other => bail!("bgpd answered {other:?}"),
        },
    }
}

async fn ask(request: BgpRequest) -> Result<BgpResponse> {
    match sockets::bgp(&run_dir(), request).await? {
        BgpResponse::Error(reason) => bail!(reason),
        answer => Ok(answer),
    }
}

async fn status() -> Result<BgpStatus> {
    match ask(BgpRequest::Status).await? {
        BgpResponse::Status(status) => Ok(status),
        other => bail!("bgpd answered {other:?}"),
    }
}

fn show<T: Serialize>(
    format: Output,
    value: &T,
    text: impl FnOnce() -> Result<String>,
) -> Result<()> {
    match format {
        Output::Json => output::line(serde_json::to_string_pretty(value)?),
        Output::Table => output::write(text()?),
    }
    Ok(())
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

/// Why the session is not up, or how its path is watched.
fn info(peer: &PeerStatus) -> String {
    let mut parts: Vec<String> = Vec::new();
    if peer.graceful_restart {
        parts.push("restarting, its routes are kept".to_owned());
    }
    if peer.state != SessionState::Established {
        parts.extend(peer.info.clone());
    }
    parts.extend(peer.bfd.as_ref().map(|bfd| format!("BFD {}", bfd.state)));
    parts.join("; ")
}

const PEERS: [&str; 9] = [
    "NEIGHBOR",
    "NAME",
    "AS",
    "STATE",
    "SINCE",
    "RECEIVED",
    "ACCEPTED",
    "ADVERTISED",
    "INFO",
];

fn peers(status: &BgpStatus, now: u64) -> String {
    let mut text = format!(
        "Router {}, AS {}: {} IPv4 and {} IPv6 prefixes{}\n",
        status.router_id,
        status.local_as,
        status.prefixes_v4,
        status.prefixes_v6,
        if status.restarting {
            "; restarting, waiting for its neighbors' routes"
        } else {
            ""
        }
    );
    let mut sorted: Vec<&PeerStatus> = status.peers.iter().collect();
    sorted.sort_by_key(|peer| peer.address);
    let rows: Vec<[String; 9]> = sorted
        .into_iter()
        .map(|peer| {
            [
                peer.address.to_string(),
                or_dash(peer.name.as_ref()),
                peer.remote_as.to_string(),
                peer.state.as_str().to_owned(),
                since(peer.since, now),
                peer.received.to_string(),
                peer.accepted.to_string(),
                peer.advertised.to_string(),
                info(peer),
            ]
        })
        .collect();
    text.push_str(&table(&PEERS, &rows));
    text
}

const ROUTES: [&str; 8] = [
    "",
    "PREFIX",
    "NEXT HOP",
    "FROM",
    "PREF",
    "AS PATH",
    "COMMUNITIES",
    "REASON",
];

fn render_routes(routes: &[RouteStatus], sent: bool) -> String {
    if routes.is_empty() {
        return "No routes.\n".to_owned();
    }
    let rows: Vec<[String; 8]> = routes
        .iter()
        .map(|route| {
            let marks = [(route.best && !sent, '*'), (route.stale, 'S')];
            let from = match route.peer {
                _ if sent => "-".to_owned(),
                Some(peer) => peer.to_string(),
                None => "this node".to_owned(),
            };
            [
                marks
                    .iter()
                    .filter(|(set, _)| *set)
                    .map(|(_, mark)| mark)
                    .collect(),
                route.prefix.to_string(),
                or_dash(route.next_hop),
                from,
                or_dash(route.local_pref),
                route.as_path.clone(),
                route.communities.join(" "),
                route.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let mut text = table(&ROUTES, &rows);
    if !sent {
        text.push_str("* best   S stale: its neighbor restarts\n");
    }
    text
}

fn neighbor(peer: &PeerStatus, now: u64) -> String {
    let mut text = format!("BGP neighbor {}", peer.address);
    if let Some(name) = &peer.name {
        let _ = write!(text, " ({name})");
    }
    text.push('\n');
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<20} {value}");
    };
    line("type", peer.kind.as_str().to_owned());
    line("AS", format!("{} (ours {})", peer.remote_as, peer.local_as));
    line("port", peer.port.to_string());
    line(
        "state",
        format!("{} since {}", peer.state.as_str(), since(peer.since, now)),
    );
    if let Some(info) = &peer.info {
        line("last error", info.clone());
    }
    if peer.graceful_restart {
        line(
            "graceful restart",
            "the neighbor restarts, its routes are kept".to_owned(),
        );
    }
    line("hold time", format!("{} s", peer.hold_time));
    line("sessions so far", peer.established_count.to_string());
    if !peer.capabilities.is_empty() {
        line("its capabilities", peer.capabilities.join(", "));
    }
    line(
        "routes",
        format!(
            "{} received, {} accepted, {} advertised",
            peer.received, peer.accepted, peer.advertised
        ),
    );
    line(
        "UPDATEs",
        format!("{} received, {} sent", peer.updates_in, peer.updates_out),
    );
    if let Some(bfd) = &peer.bfd {
        let reason = bfd
            .reason
            .as_ref()
            .map_or_else(String::new, |r| format!(": {r}"));
        line(
            "BFD",
            format!(
                "{}{reason}, every {} ms, down after {} ms",
                bfd.state, bfd.transmit_ms, bfd.detection_ms
            ),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::Asn;
    use cali_control::status::{BfdStatus, PeerKind};

    fn peer() -> PeerStatus {
        PeerStatus {
            address: [10, 0, 0, 2].into(),
            port: 179,
            name: Some("node2".into()),
            kind: PeerKind::Mesh,
            remote_as: Asn(64512),
            local_as: Asn(64512),
            state: SessionState::Established,
            since: 33_321,
            info: None,
            graceful_restart: false,
            hold_time: 240,
            capabilities: vec!["route-refresh".into()],
            received: 3,
            accepted: 2,
            advertised: 1,
            updates_in: 5,
            updates_out: 4,
            established_count: 1,
            bfd: Some(BfdStatus {
                state: "Up".into(),
                reason: None,
                transmit_ms: 300,
                detection_ms: 900,
            }),
        }
    }

    fn route(prefix: &str) -> RouteStatus {
        RouteStatus {
            prefix: prefix.parse().unwrap(),
            next_hop: Some([10, 0, 0, 2].into()),
            peer: Some([10, 0, 0, 2].into()),
            as_path: "64513".into(),
            origin: "igp".into(),
            local_pref: Some(100),
            med: None,
            communities: vec!["64512:1".into()],
            best: true,
            stale: false,
            reason: None,
        }
    }

    #[test]
    fn a_neighbor_is_told_whole() {
        let expected = "\
BGP neighbor 10.0.0.2 (node2)
  type                 node-to-node mesh
  AS                   64512 (ours 64512)
  port                 179
  state                Established since 09:15:21
  hold time            240 s
  sessions so far      1
  its capabilities     route-refresh
  routes               3 received, 2 accepted, 1 advertised
  UPDATEs              5 received, 4 sent
  BFD                  Up, every 300 ms, down after 900 ms
";
        assert_eq!(neighbor(&peer(), 40_000), expected);
    }

    #[test]
    fn a_path_that_is_not_used_says_why() {
        let refused = RouteStatus {
            best: false,
            reason: Some("refused: Filter".into()),
            ..route("10.1.0.0/26")
        };
        let text = render_routes(&[route("10.0.1.0/26"), refused], false);
        let expected = "\
+---+-------------+----------+----------+------+---------+-------------+-----------------+
|   |   PREFIX    | NEXT HOP |   FROM   | PREF | AS PATH | COMMUNITIES |     REASON      |
+---+-------------+----------+----------+------+---------+-------------+-----------------+
| * | 10.0.1.0/26 | 10.0.0.2 | 10.0.0.2 | 100  | 64513   | 64512:1     |                 |
|   | 10.1.0.0/26 | 10.0.0.2 | 10.0.0.2 | 100  | 64513   | 64512:1     | refused: Filter |
+---+-------------+----------+----------+------+---------+-------------+-----------------+
* best   S stale: its neighbor restarts
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_prefix_narrows_the_routes_of_a_neighbor_as_well() {
        let wanted = Routes {
            prefix: Some("10.0.0.0/16".parse().unwrap()),
            received: Some([10, 0, 0, 2].into()),
            accepted: None,
            advertised: None,
            output: Output::Table,
        };
        assert!(wanted.wants(&route("10.0.1.0/26")));
        assert!(!wanted.wants(&route("10.1.0.0/26")));
    }
}
