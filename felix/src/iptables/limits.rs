//! What limits and marks the traffic of single workloads: packet rates, connections at a time, code points.
//!
//! A packet rate is a chain of its own, which the endpoint's chain asks before anything else: packets of established flows
//! count too. What the sender's chain has accepted of an established flow between two workloads of this node the receiver's
//! chain does not see, nor does its rate. IPv4 and IPv6 count apart.

use std::collections::BTreeSet;
use std::sync::Arc;

use cali_api::Cidr;

use super::names;
use super::program::Table;
use super::render::{Renderer, VERSIONS, comment};
use crate::calc::Direction;

/// What `xt_limit` can count at most (`XT_LIMIT_SCALE`).
const MAX_RATE: u32 = 10_000;

/// Refuses connections beyond the limit.
pub(super) fn connections(limit: u32) -> String {
    let about = comment("too many connections");
    format!(
        "-p 6 -m tcp --syn -m connlimit --connlimit-above {limit} --connlimit-mask 0 {about} -j REJECT --reject-with tcp-reset"
    )
}

impl Renderer {
    /// The chain that lets packets within a rate return.
    pub(super) fn put_rate(
        &mut self,
        interface: &Arc<str>,
        direction: Direction,
        rate: Option<(u64, u32)>,
    ) {
        let name = names::rate_chain(interface, direction);
        let Some((rate, burst)) = rate else {
            self.remove_chain(Table::Filter, &name);
            return;
        };
        let (rate, burst) = (rate.min(MAX_RATE.into()), burst.min(MAX_RATE));
        let rules = vec![
            format!("-m limit --limit {rate}/second --limit-burst {burst} -j RETURN"),
            format!("{} -j DROP", comment("packet rate")),
        ];
        for version in VERSIONS {
            self.put_chain(version, Table::Filter, name.clone(), rules.clone());
        }
    }

    /// Addresses of workloads whose packets out of the cluster get a code point.
    pub(super) fn code_points(&self) -> Vec<(Cidr, u8)> {
        let owners = self.interfaces.values().filter_map(BTreeSet::first);
        owners
            .filter_map(|id| self.endpoints.get(id))
            .filter_map(|endpoint| Some((endpoint, endpoint.limits.dscp?)))
            .flat_map(|(endpoint, code)| endpoint.addresses.iter().map(move |net| (*net, code)))
            .collect()
    }
}
