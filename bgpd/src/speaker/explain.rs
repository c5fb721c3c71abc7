//! Reasons in words: why a path is not used, why a peer is not told of it. Each names the step of RFC 4271
//! §9.1 that decided, with the two values that were compared.

use std::net::IpAddr;

use cali_api::Cidr;
use cali_control::status::{Explanation, ToldStatus};

use super::State;
use crate::policy::DEFAULT_LOCAL_PREF;
use crate::rib::{PathStatus, PathView, PeerSlot, Refusal, RouteSource, Step, Withheld};
use crate::wire::{PeerKind, Prefix};

const fn refusal(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Filter => "refused by the import filter",
        Refusal::AsLoop => "refused: our AS number is in the AS path",
        Refusal::OriginatorLoop => "refused: ORIGINATOR_ID is our own identifier",
        Refusal::ClusterLoop => "refused: our cluster is in CLUSTER_LIST",
        Refusal::FirstAs => "refused: the AS path does not begin with the peer's AS",
        Refusal::OwnNextHop => "refused: the next hop is our own address",
    }
}

const fn origin_kind(source: RouteSource) -> &'static str {
    match source {
        RouteSource::Local(_) => "local",
        RouteSource::Bgp(PeerKind::Ebgp) => "external",
        RouteSource::Bgp(_) => "internal",
    }
}

/// Why `path` is not selected but `best` is.
fn lost(step: Step, path: &PathView<'_>, best: &PathView<'_>) -> String {
    let (ours, theirs) = (path.attributes, best.attributes);
    let compared = |what: &str, a: String, b: String| format!("{what}: {a} against {b}");
    match step {
        Step::LongLivedStale => "long-lived stale: its neighbor is away".to_owned(),
        Step::Preferred => {
            "a workload moves in: its route is preferred by an import rule".to_owned()
        }
        Step::LocalOrigin => "the best route starts here".to_owned(),
        Step::LocalPref => {
            let pref = |value: Option<u32>| value.unwrap_or(DEFAULT_LOCAL_PREF).to_string();
            compared(
                "lower LOCAL_PREF",
                pref(ours.local_pref),
                pref(theirs.local_pref),
            )
        }
        Step::AsPathLength => compared(
            "longer AS path",
            ours.as_path.hops().to_string(),
            theirs.as_path.hops().to_string(),
        ),
        Step::Origin => {
            let text = |origin| format!("{origin:?}").to_lowercase();
            compared("worse ORIGIN", text(ours.origin), text(theirs.origin))
        }
        Step::Med => "higher MED than another path of the same neighboring AS".to_owned(),
        Step::PeerKind => format!(
            "{} path against an {} one",
            origin_kind(path.source),
            origin_kind(best.source)
        ),
        Step::InteriorCost => "its next hop is farther away".to_owned(),
        Step::RouterId => "tie: higher router identifier".to_owned(),
        Step::ClusterListLength => compared(
            "tie: longer CLUSTER_LIST",
            ours.cluster_list.len().to_string(),
            theirs.cluster_list.len().to_string(),
        ),
        Step::PeerAddress => "tie: higher neighbor address".to_owned(),
        Step::PathId => "tie: higher path identifier".to_owned(),
    }
}

impl State {
    /// Why a path is not used; `best` is the first path of its destination. `None` if it is used.
    pub(super) fn why_not_used(&self, path: &PathView<'_>, best: &PathView<'_>) -> Option<String> {
        match path.status {
            PathStatus::Best | PathStatus::Multipath => None,
            PathStatus::NotBest(step) => Some(lost(step, path, best)),
            PathStatus::NextHopUnreachable => Some("its next hop cannot be reached".to_owned()),
            PathStatus::Refused(why) => Some(match self.rib.refusing_rule(path) {
                Some(rule) => format!("refused by {rule}"),
                None => refusal(why).to_owned(),
            }),
        }
    }

    /// Why a peer is not told of its best path, in words.
    pub(super) fn why_withheld(&self, slot: PeerSlot, reason: Withheld) -> String {
        match reason {
            Withheld::NoFamily => "the session does not carry this family".to_owned(),
            Withheld::FromThisPeer => "it came from this neighbor".to_owned(),
            Withheld::NoAdvertise => "it carries the community NO_ADVERTISE".to_owned(),
            Withheld::NoExport => "it carries the community NO_EXPORT".to_owned(),
            Withheld::LongLivedStale => {
                "it is long-lived stale, which this neighbor does not know".to_owned()
            }
            Withheld::NotReflected => {
                "it came from an internal neighbor, and neither is a client of ours".to_owned()
            }
            Withheld::Filter(number) => match number.and_then(|n| self.rib.export_rule(slot, n)) {
                Some(rule) => format!("refused by {rule}"),
                None => "no export rule accepts it (not inside an exported IPPool)".to_owned(),
            },
            Withheld::NoNextHop => "the session cannot carry its next hop".to_owned(),
        }
    }

    /// Everything about the longest prefix around `of` that has a path.
    pub(super) fn explain(&self, of: Cidr) -> Explanation {
        let around = |len| Prefix::new(of.addr(), len);
        let found = (0..=of.prefix_len())
            .rev()
            .filter_map(around)
            .find(|prefix| !self.rib.paths(prefix).is_empty());
        let Some(prefix) = found else {
            return Explanation {
                prefix: None,
                paths: Vec::new(),
                kernel: "there is no route to it".to_owned(),
                peers: Vec::new(),
            };
        };
        let paths = self.rib.paths(&prefix);
        let told = self
            .neighbours
            .iter()
            .filter_map(|(address, n)| Some((address, n, self.rib.told_to(n.slot, &prefix)?.1)));
        Explanation {
            prefix: super::status::cidr(prefix),
            paths: self.route_statuses(&paths, |_| true),
            kernel: self.kernel_side(&prefix, &paths),
            peers: told
                .map(|(address, n, withheld)| ToldStatus {
                    peer: *address,
                    name: n.config.name.clone(),
                    withheld: withheld.map(|why| self.why_withheld(n.slot, why)),
                })
                .collect(),
        }
    }

    fn kernel_side(&self, prefix: &Prefix, paths: &[PathView<'_>]) -> String {
        if let Some(gateway) = self.settings.host.static_routes.get(prefix) {
            return format!("via {gateway}, as a BGPPeer's reachableBy says");
        }
        let Some(best) = self.rib.best(prefix).best else {
            return "nothing: no path can be used".to_owned();
        };
        let starts_here = paths.first().and_then(|p| self.rib.local_origin(p));
        if let Some(origin) = starts_here {
            return format!("nothing from BGP: the route starts here ({origin})");
        }
        if self.settings.host.not_programmed.covers(prefix) {
            return "nothing: a service range, which kube-proxy takes on every node".to_owned();
        }
        let hops: Vec<String> = best
            .gateways
            .iter()
            .map(|g| IpAddr::to_string(&g.addr))
            .collect();
        format!("via {}", hops.join(", "))
    }
}
