//! `calictl routes`: the routes of this node that are Cali's, each with its owner and the resource that it comes from.

use crate::bgp_table::table_of_used;
use crate::node::status::Local;
use crate::output::{self, Form};
use crate::sockets;
use anyhow::{Context, Result, bail};
use cali_api::Cidr;
use cali_control::paths::run_dir;
use cali_control::status::{BgpStatus, NodeRequest, NodeResponse, OwnedRoute};
use clap::Args;
use std::net::IpAddr;

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

pub(crate) async fn run(wanted: &Routes) -> Result<()> {
    if let Some(owner) = &wanted.owner
        && !OWNERS.iter().any(|(word, _)| word == owner)
    {
        let words: Vec<&str> = OWNERS.iter().map(|(word, _)| *word).collect();
        bail!(
            "no owner is called {owner:?}: --owner is {}",
            words.join(", ")
        );
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
    routes.retain(|route| wanted.wants(route));
    routes.sort_by_key(|route| (route.prefix.addr(), route.prefix.prefix_len()));
    if wanted.output == Form::Json {
        output::line(serde_json::to_string_pretty(&routes)?);
        return Ok(());
    }
    // Only for the peers' names: without bgpd the routes are as they are.
    let bgp = Local::ask().await.ok().and_then(|local| local.bgp);
    output::write(render(&routes, bgp.as_ref(), wanted.output == Form::Wide));
    Ok(())
}

impl Routes {
    fn wants(&self, route: &OwnedRoute) -> bool {
        let around = self.destination.is_none_or(|wanted| {
            route.prefix.contains_cidr(&wanted) || wanted.contains_cidr(&route.prefix)
        });
        around
            && self
                .owner
                .as_ref()
                .is_none_or(|owner| *owner == route.source)
            && (!self.problems || !route.programmed || route.problem.is_some())
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
    use cali_control::status::{PeerKind, PeerStatus, RouteHop};

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
    fn an_address_selects_what_is_around_it_and_a_prefix_also_what_is_inside() {
        let shown = |text: &str, owner: Option<&str>, problems| {
            let wanted = Routes {
                destination: Some(destination(text).expect("a destination")),
                owner: owner.map(str::to_owned),
                problems,
                output: Form::Table,
            };
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
