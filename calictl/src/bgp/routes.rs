//! `calictl bgp routes`.

use super::or_dash;
use crate::bgp_table::table_of_used;
use crate::node::Output;
use cali_api::Cidr;
use cali_control::status::{BgpRequest, Direction, RouteStatus};
use clap::Args;
use std::net::IpAddr;

#[derive(Debug, Args)]
pub(crate) struct Routes {
    /// Only this prefix and what lies inside of it
    pub(super) prefix: Option<Cidr>,
    /// Only the routes of this neighbor: what it sent
    #[arg(long, value_name = "ADDRESS", group = "peer")]
    pub(super) received: Option<IpAddr>,
    /// Only the routes of this neighbor: what was left by loop checks and filters
    #[arg(long, value_name = "ADDRESS", group = "peer")]
    pub(super) accepted: Option<IpAddr>,
    /// What this neighbor is sent
    #[arg(long, value_name = "ADDRESS", group = "peer")]
    pub(super) advertised: Option<IpAddr>,
    /// Best routes that this neighbor is not sent, with the reason
    #[arg(long, value_name = "ADDRESS", group = "peer")]
    pub(super) withheld: Option<IpAddr>,
    /// How it is printed
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(super) output: Output,
}

/// Whose side the routes are seen from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// The table, or a neighbor's part of it.
    Table,
    /// What goes out.
    Sent,
}

impl Routes {
    pub(super) fn request(&self) -> BgpRequest {
        let directions = [
            (self.received, Direction::Received),
            (self.accepted, Direction::Accepted),
            (self.advertised, Direction::Advertised),
            (self.withheld, Direction::Withheld),
        ];
        let asked = directions
            .into_iter()
            .find_map(|(peer, direction)| Some((peer?, direction)));
        match asked {
            Some((peer, direction)) => BgpRequest::PeerRoutes { peer, direction },
            None => BgpRequest::Routes {
                within: self.prefix,
            },
        }
    }

    pub(super) const fn view(&self) -> View {
        if self.advertised.is_some() {
            View::Sent
        } else {
            View::Table
        }
    }

    /// The daemon narrows the table itself, but not the routes of one neighbor.
    pub(super) fn wants(&self, route: &RouteStatus) -> bool {
        self.prefix
            .is_none_or(|outer| outer.contains_cidr(&route.prefix))
    }
}

const HEADER: [&str; 9] = [
    "",
    "PREFIX",
    "NEXT HOP",
    "FROM",
    "PREF",
    "MED",
    "AS PATH",
    "COMMUNITIES",
    "REASON",
];

fn marks(route: &RouteStatus, view: View) -> String {
    let best = view == View::Table;
    [
        (best && route.best, '*'),
        (best && route.multipath, '='),
        (route.stale, 'S'),
    ]
    .iter()
    .filter(|(set, _)| *set)
    .map(|(_, mark)| mark)
    .collect()
}

/// Where a route comes from: a neighbor, or what it is of this node.
fn from(route: &RouteStatus) -> String {
    match (&route.peer, &route.local) {
        (Some(peer), _) => peer.to_string(),
        (None, Some(local)) => format!("this node: {local}"),
        (None, None) => "this node".to_owned(),
    }
}

pub(super) fn row(route: &RouteStatus, view: View) -> [String; 9] {
    let text = |number: Option<u32>| number.map_or_else(String::new, |n| n.to_string());
    [
        marks(route, view),
        route.prefix.to_string(),
        or_dash(route.next_hop),
        if view == View::Sent {
            String::new()
        } else {
            from(route)
        },
        text(route.local_pref),
        text(route.med),
        route.as_path.clone(),
        route.communities.join(" "),
        route.reason.clone().unwrap_or_default(),
    ]
}

pub(super) fn render(routes: &[RouteStatus], view: View) -> String {
    if routes.is_empty() {
        return "No routes.\n".to_owned();
    }
    let mut sorted: Vec<&RouteStatus> = routes.iter().collect();
    // Within a prefix the order is the daemon's: the best path first.
    sorted.sort_by_key(|route| (route.prefix.addr(), route.prefix.prefix_len()));
    let rows: Vec<[String; 9]> = sorted.iter().map(|route| row(route, view)).collect();
    let mut text = table_of_used(&HEADER, &rows);
    let legend = [
        (sorted.iter().any(|r| r.best), "* best"),
        (sorted.iter().any(|r| r.multipath), "= as good, also used"),
        (
            sorted.iter().any(|r| r.stale),
            "S stale: its neighbor restarts",
        ),
    ];
    let legend: Vec<&str> = legend
        .iter()
        .filter(|(used, _)| *used && view == View::Table)
        .map(|(_, words)| *words)
        .collect();
    if !legend.is_empty() {
        text.push_str(&legend.join("   "));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn a_path_that_is_not_used_says_why() {
        let routes = [
            RouteStatus {
                best: false,
                reason: Some("refused by BGPFilter f importV4[0]".into()),
                ..sample::route("10.1.0.0/26")
            },
            sample::route("10.0.1.0/26"),
            RouteStatus {
                best: false,
                multipath: true,
                peer: Some([10, 0, 0, 3].into()),
                ..sample::route("10.0.1.0/26")
            },
            RouteStatus {
                best: false,
                stale: true,
                peer: Some([10, 0, 0, 4].into()),
                reason: Some("lower LOCAL_PREF: 50 against 100".into()),
                local_pref: Some(50),
                ..sample::route("10.0.1.0/26")
            },
            RouteStatus {
                peer: None,
                next_hop: None,
                local: Some("workload on cali12345678901".into()),
                as_path: String::new(),
                communities: vec![],
                ..sample::route("10.0.2.7/32")
            },
        ];
        insta::assert_snapshot!(render(&routes, View::Table));
    }

    #[test]
    fn what_is_sent_has_no_sender_and_no_marks() {
        insta::assert_snapshot!(render(&[sample::route("10.0.1.0/26")], View::Sent));
    }

    #[test]
    fn a_prefix_narrows_the_routes_of_a_neighbor_as_well() {
        let wanted = Routes {
            prefix: Some("10.0.0.0/16".parse().unwrap()),
            received: Some([10, 0, 0, 2].into()),
            accepted: None,
            advertised: None,
            withheld: None,
            output: Output::Table,
        };
        assert!(wanted.wants(&sample::route("10.0.1.0/26")));
        assert!(!wanted.wants(&sample::route("10.1.0.0/26")));
    }
}
