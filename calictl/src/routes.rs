//! `calictl routes`: the routes of a node that are Cali's, each with its owner and the resource that it comes from.

use crate::bgp_table::table_of_used;
use crate::node::reports::{self, Answer};
use crate::node::status::Local;
use crate::output::{self, Form};
use crate::{connection, sockets};
use anyhow::{Context, Result, bail};
use cali_api::Cidr;
use cali_control::paths::run_dir;
use cali_control::status::{
    BgpStatus, NodeRequest, NodeResponse, OwnedRoute, ReportQuery, RouteQuery,
};
use clap::Args;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Debug, Args)]
pub(crate) struct Routes {
    /// Only the routes around this address, or around and inside of this prefix
    #[arg(value_parser = destination)]
    destination: Option<Cidr>,
    /// Only the routes of this owner: workload, block, affinity, static, bgp
    #[arg(long, value_name = "OWNER")]
    owner: Option<String>,
    /// Only what is not in the kernel as it should be
    #[arg(long)]
    problems: bool,
    /// Of this node of the cluster, wherever it is (repeatable): it is asked by way of the datastore
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    node: Vec<String>,
    /// Of every node of the cluster, one after the other
    #[arg(long)]
    all: bool,
    /// How long other nodes may take to answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    /// How it is printed
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
}

/// An address stands for itself alone.
fn destination(text: &str) -> Result<Cidr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Cidr::host(address));
    }
    text.parse()
        .with_context(|| "it is an address or a prefix, as in 10.0.1.5 or 10.0.1.0/26".to_owned())
}

const OWNERS: [(&str, &str); 5] = [
    ("workload", "local workload"),
    ("block", "local block"),
    ("affinity", "block affinity"),
    ("static", "this node"),
    ("bgp", "BGP"),
];

pub(crate) async fn run(wanted: &Routes) -> Result<ExitCode> {
    if let Some(owner) = &wanted.owner
        && !OWNERS.iter().any(|(word, _)| word == owner)
    {
        let words: Vec<&str> = OWNERS.iter().map(|(word, _)| *word).collect();
        bail!(
            "no owner is called {owner:?}: --owner is {}",
            words.join(", ")
        );
    }
    if wanted.all || !wanted.node.is_empty() {
        return of_others(wanted).await;
    }
    let mut routes = match sockets::node(&run_dir(), NodeRequest::Routes).await {
        Ok(NodeResponse::Routes(routes)) => routes,
        Ok(NodeResponse::Error(reason)) => bail!("cali-node cannot show its routes: {reason}"),
        Ok(other) => bail!("the node answered {other:?}"),
        Err(error) if sockets::nobody_listens(&error) => {
            bail!(
                "Calico process is not running: nobody listens at {}",
                run_dir().join("node.sock").display()
            )
        }
        Err(error) => return Err(error.context("cali-node does not answer")),
    };
    let query = wanted.query();
    routes.retain(|route| query.wants(route));
    sort(&mut routes);
    if wanted.output == Form::Json {
        output::line(serde_json::to_string_pretty(&routes)?);
        return Ok(ExitCode::SUCCESS);
    }
    // Only for the peers' names: without bgpd the routes are as they are.
    let bgp = Local::ask().await.ok().and_then(|local| local.bgp);
    output::write(render(&routes, bgp.as_ref(), wanted.output == Form::Wide));
    Ok(ExitCode::SUCCESS)
}

/// Ends with 1 if a node says nothing.
async fn of_others(wanted: &Routes) -> Result<ExitCode> {
    let store = connection::open().await?;
    let nodes = reports::names(store.as_ref(), &wanted.node).await?;
    let limit = cali_lab::patient(Duration::from_secs(wanted.timeout.max(1)));
    let query = ReportQuery {
        routes: Some(wanted.query()),
    };
    let answers = reports::ask(&store, &nodes, &query, limit).await?;
    let told: Vec<(String, Result<Told, String>)> = answers
        .into_iter()
        .map(|(name, answer)| (name, told(answer, limit)))
        .collect();
    if wanted.output == Form::Json {
        let list: Vec<Value> = told
            .iter()
            .map(|(name, told)| json_of(name, told))
            .collect();
        output::line(serde_json::to_string_pretty(&list)?);
    } else {
        let texts: Vec<String> = told
            .iter()
            .map(|(name, told)| text_of(name, told, wanted.output == Form::Wide))
            .collect();
        output::write(texts.join("\n"));
    }
    Ok(if told.iter().any(|(_, told)| told.is_err()) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// What another node told of its routes.
struct Told {
    routes: Vec<OwnedRoute>,
    /// More than fit into its answer.
    left_out: usize,
    bgp: Option<BgpStatus>,
}

/// The routes in a node's answer, or why there are none.
fn told(answer: Answer, limit: Duration) -> Result<Told, String> {
    let report = match answer {
        Answer::Report(report) => report,
        // What it keeps for others has no owners.
        Answer::Standing(_) => return Err(reports::silence(limit)),
        Answer::Silent(problem) => return Err(problem),
    };
    let packed = report
        .routes
        .ok_or_else(|| format!("version {} does not tell its routes", report.node.version))?;
    let mut routes = packed
        .unpack()
        .map_err(|error| format!("it answers what cannot be read: {error}"))?;
    sort(&mut routes);
    Ok(Told {
        routes,
        left_out: packed.left_out,
        bgp: report.bgp,
    })
}

fn json_of(name: &str, told: &Result<Told, String>) -> Value {
    match told {
        Ok(told) => json!({"node": name, "routes": told.routes, "leftOut": told.left_out}),
        Err(problem) => json!({"node": name, "routes": null, "problem": problem}),
    }
}

fn text_of(name: &str, told: &Result<Told, String>, wide: bool) -> String {
    match told {
        Ok(told) => {
            let table = render(&told.routes, told.bgp.as_ref(), wide);
            let more = match told.left_out {
                0 => String::new(),
                count => format!(
                    "{} more do not fit into the answer: ask for some, as in `calictl routes 10.0.1.0/24 --node {name}`\n",
                    counted(count)
                ),
            };
            format!("Node {name}\n{table}{more}")
        }
        Err(problem) => format!("Node {name}\nDoes not report: {problem}\n"),
    }
}

fn sort(routes: &mut [OwnedRoute]) {
    routes.sort_by_key(|route| (route.prefix.addr(), route.prefix.prefix_len()));
}

impl Routes {
    fn query(&self) -> RouteQuery {
        RouteQuery {
            around: self.destination,
            owner: self.owner.clone(),
            problems: self.problems,
        }
    }
}

fn render(routes: &[OwnedRoute], bgp: Option<&BgpStatus>, wide: bool) -> String {
    if routes.is_empty() {
        return "No routes.\n".to_owned();
    }
    let header = [
        "PREFIX",
        "NEXT HOP",
        "ENCAPSULATION",
        "OWNER",
        "FROM",
        "IN KERNEL",
        "KERNEL ROUTE",
    ];
    let rows: Vec<[String; 7]> = routes
        .iter()
        .map(|route| {
            [
                route.prefix.to_string(),
                next_hop(route),
                route.encapsulation.clone().unwrap_or_default(),
                owner(&route.source).to_owned(),
                from(route, bgp),
                in_kernel(route),
                if wide {
                    route.kernel.clone()
                } else {
                    String::new()
                },
            ]
        })
        .collect();
    let mut text = table_of_used(&header, &rows);
    let missing = routes.iter().filter(|route| !route.programmed).count();
    text.push_str(&match missing {
        0 => format!("{}, all in the kernel\n", counted(routes.len())),
        missing => format!("{}, {missing} not in the kernel\n", counted(routes.len())),
    });
    text
}

fn counted(count: usize) -> String {
    format!("{count} route{}", if count == 1 { "" } else { "s" })
}

fn owner(word: &str) -> &str {
    OWNERS
        .iter()
        .find(|(known, _)| *known == word)
        .map_or(word, |(_, words)| words)
}

/// Where it leads; what leads nowhere is dropped or taken by this host.
fn next_hop(route: &OwnedRoute) -> String {
    let hops: Vec<String> = route
        .hops
        .iter()
        .map(|hop| match hop.gateway {
            Some(gateway) => format!("{gateway} dev {}", hop.device),
            None => format!("dev {}", hop.device),
        })
        .collect();
    if !hops.is_empty() {
        return hops.join(", ");
    }
    match route.kernel.split_whitespace().next() {
        Some("blackhole") => "dropped".to_owned(),
        Some("local") => "this host".to_owned(),
        _ => "-".to_owned(),
    }
}

/// The resource; for what BGP told, also who the peer is.
fn from(route: &OwnedRoute, bgp: Option<&BgpStatus>) -> String {
    let peer = route
        .because
        .strip_prefix("BGP peer ")
        .and_then(|address| address.parse::<IpAddr>().ok())
        .and_then(|address| bgp?.peers.iter().find(|peer| peer.address == address));
    let Some(peer) = peer else {
        return if route.because.is_empty() {
            "-".to_owned()
        } else {
            route.because.clone()
        };
    };
    let name = peer
        .name
        .as_ref()
        .map_or_else(String::new, |name| format!(" {name}"));
    format!("{}{name} ({})", route.because, peer.kind.as_str())
}

fn in_kernel(route: &OwnedRoute) -> String {
    match (&route.problem, route.programmed) {
        (None, true) => "yes".to_owned(),
        (Some(problem), true) => format!("yes, but {problem}"),
        (None, false) => "not yet".to_owned(),
        (Some(problem), false) => format!("no: {problem}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bgp::sample;
    use cali_control::status::{NodeReport, PackedRoutes, PeerKind, PeerStatus, RouteHop};

    fn route(prefix: &str, source: &str, because: &str) -> OwnedRoute {
        OwnedRoute {
            prefix: prefix.parse().expect("a prefix"),
            kernel: String::new(),
            source: source.into(),
            because: because.into(),
            programmed: true,
            problem: None,
            hops: Vec::new(),
            encapsulation: None,
        }
    }

    fn hop(gateway: Option<[u8; 4]>, device: &str) -> RouteHop {
        RouteHop {
            gateway: gateway.map(Into::into),
            device: device.into(),
        }
    }

    fn all() -> Vec<OwnedRoute> {
        vec![
            OwnedRoute {
                kernel: "blackhole proto 80".into(),
                ..route("10.0.1.0/26", "block", "IPAMBlock(10-0-1-0-26)")
            },
            OwnedRoute {
                kernel: "dev cali1 scope link proto 80 metric 0".into(),
                hops: vec![hop(None, "cali1")],
                ..route("10.0.1.7/32", "workload", "WorkloadEndpoint(shop/web-1)")
            },
            OwnedRoute {
                kernel: "via 10.0.2.0 dev vxlan.calico onlink proto 80".into(),
                hops: vec![hop(Some([10, 0, 2, 0]), "vxlan.calico")],
                encapsulation: Some("VXLAN".into()),
                ..route("10.0.2.0/26", "affinity", "BlockAffinity(n2-10-0-2-0-26)")
            },
            OwnedRoute {
                kernel: "nexthop via 10.0.0.2 dev eth0 onlink nexthop via 10.0.0.3 dev eth1 onlink proto bird"
                    .into(),
                hops: vec![
                    hop(Some([10, 0, 0, 2]), "eth0"),
                    hop(Some([10, 0, 0, 3]), "eth1"),
                ],
                ..route("10.0.3.0/26", "bgp", "BGP peer 10.0.0.2")
            },
            OwnedRoute {
                programmed: false,
                problem: Some("waiting for a BGP path".into()),
                ..route("10.0.4.0/26", "affinity", "")
            },
        ]
    }

    #[test]
    fn every_route_names_its_owner_and_its_resource() {
        let status = BgpStatus {
            peers: vec![PeerStatus {
                kind: PeerKind::LocalWorkload,
                ..sample::peer()
            }],
            ..sample::status()
        };
        insta::assert_snapshot!(render(&all(), Some(&status), false));
        insta::assert_snapshot!(render(&all(), None, true));
        assert_eq!(render(&[], None, false), "No routes.\n");
    }

    #[test]
    fn another_node_tells_its_routes_or_why_it_cannot() {
        let answer = |routes: Option<PackedRoutes>| {
            let node = cali_control::status::NodeStatus {
                node: "n2".into(),
                version: "0".into(),
                pid: 1,
                started_at: 0,
                ipv4: None,
                ipv6: None,
                readiness: Vec::new(),
                quarantined: Vec::new(),
                notices: Vec::new(),
                bgpd_pid: None,
            };
            Answer::Report(Box::new(NodeReport {
                node,
                bgp: None,
                figures: Default::default(),
                routes,
            }))
        };
        let packed = PackedRoutes {
            left_out: 7,
            ..PackedRoutes::pack(&all(), 10_000)
        };
        let limit = Duration::from_secs(10);
        let text = |answer| text_of("n2", &told(answer, limit), false);
        let table = render(&all(), None, false);
        let more = "7 routes more do not fit into the answer: ask for some, as in `calictl routes 10.0.1.0/24 --node n2`\n";
        assert_eq!(
            text(answer(Some(packed))),
            format!("Node n2\n{table}{more}")
        );
        assert_eq!(
            text(answer(None)),
            "Node n2\nDoes not report: version 0 does not tell its routes\n"
        );
        let silent = Answer::Silent("refused".into());
        assert_eq!(text(silent), "Node n2\nDoes not report: refused\n");
    }

    #[test]
    fn an_address_selects_what_is_around_it_and_a_prefix_also_what_is_inside() {
        let shown = |text: &str, owner: Option<&str>, problems| {
            let wanted = Routes {
                destination: Some(destination(text).expect("a destination")),
                owner: owner.map(str::to_owned),
                problems,
                node: Vec::new(),
                all: false,
                timeout: 1,
                output: Form::Table,
            }
            .query();
            let kept = all().into_iter().filter(|route| wanted.wants(route));
            kept.map(|route| route.prefix.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            shown("10.0.1.7", None, false),
            ["10.0.1.0/26", "10.0.1.7/32"]
        );
        assert_eq!(shown("10.0.1.8", None, false), ["10.0.1.0/26"]);
        assert_eq!(shown("10.0.0.0/16", Some("bgp"), false), ["10.0.3.0/26"]);
        assert_eq!(shown("0.0.0.0/0", None, true), ["10.0.4.0/26"]);
        assert!(destination("web").is_err());
    }
}
