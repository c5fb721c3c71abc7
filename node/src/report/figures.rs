//! What has been counted, taken from the metrics and from the counters of the rules.

use std::sync::Arc;

use cali_control::status::Figures;
use cali_netlink::nft::{Expr, Family, ListedRule, TableName, Verdict};
use cali_netlink::{NetNs, Nft};
use cali_telemetry::Registry;
use felix::dataplane::State;
use prometheus::proto::{Histogram, Metric, MetricFamily};

/// The dataplane's name for the time until a change is enforced.
const LATENCY: &str = "felix_policy_enforced_seconds";
/// Its name for the flows that it has ended.
const ENDED: &str = "felix_forbidden_flows_ended_total";

/// Blocking: reads the rules of the kernel.
pub(super) fn take(registry: &Registry, netns: &NetNs, state: &Arc<State>) -> Figures {
    let families = registry.gather();
    let (policy_changes, policy_latency_ms) = latency(&families);
    Figures {
        policy_changes,
        policy_latency_ms,
        denied_packets: rules(netns).map(|rules| denied(&rules)),
        // A counter of whole flows.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count"
        )]
        flows_ended: first(&families, ENDED).map_or(0.0, |metric| metric.get_counter().get_value())
            as u64,
        endpoints: state.endpoints.len() as u64,
        routes: state.routes.desired as u64,
    }
}

fn first<'a>(families: &'a [MetricFamily], name: &str) -> Option<&'a Metric> {
    let family = families.iter().find(|family| family.name() == name);
    family.and_then(|family| family.get_metric().first())
}

/// How many changes of policy were enforced, and the time that took: median and 99th percentile, in milliseconds.
pub(crate) fn policy_latency(registry: &Registry) -> (u64, Option<[f64; 2]>) {
    latency(&registry.gather())
}

fn latency(families: &[MetricFamily]) -> (u64, Option<[f64; 2]>) {
    let latency = first(families, LATENCY).map(|metric| metric.get_histogram());
    let shares = latency.and_then(|latency| {
        let ms = |share| Some(quantile(latency, share)? * 1000.0);
        Some([ms(0.5)?, ms(0.99)?])
    });
    (latency.map_or(0, Histogram::get_sample_count), shares)
}

fn rules(netns: &NetNs) -> Option<Vec<ListedRule>> {
    let rules = Nft::open(netns)
        .and_then(|nft| nft.rules(&TableName::new(Family::Inet, "calico"), None))
        .inspect_err(|error| tracing::debug!(%error, "the rules' counters cannot be read"))
        .ok()?;
    (!rules.is_empty()).then_some(rules)
}

/// Packets of the rules that end with a denial.
fn denied(rules: &[ListedRule]) -> u64 {
    rules
        .iter()
        .filter(|listed| {
            matches!(
                listed.rule.exprs.last(),
                Some(Expr::Verdict(Verdict::Drop) | Expr::Reject(_))
            )
        })
        .filter_map(|listed| listed.rule.counter())
        .map(|(packets, _)| packets)
        .sum()
}

/// The upper bound of the bucket that the share falls into, in the histogram's unit; `None` while nothing was observed. What
/// is above all bounds counts as the last of them.
fn quantile(histogram: &Histogram, share: f64) -> Option<f64> {
    let count = histogram.get_sample_count();
    if count == 0 {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let wanted = count as f64 * share;
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let holds = |cumulative: u64| cumulative as f64 >= wanted;
    let buckets = histogram.get_bucket();
    let finite = || {
        buckets
            .iter()
            .filter(|bucket| bucket.upper_bound().is_finite())
    };
    finite()
        .find(|bucket| holds(bucket.cumulative_count()))
        .or(finite().next_back())
        .map(|bucket| bucket.upper_bound())
}

#[cfg(test)]
mod tests {
    use cali_netlink::nft::Rule;
    use prometheus::HistogramOpts;

    use super::*;

    #[test]
    fn a_share_is_found_in_its_bucket() {
        let options = HistogramOpts::new("h", "h").buckets(vec![0.01, 0.1, 1.0]);
        let histogram = prometheus::Histogram::with_opts(options).unwrap();
        let registry = Registry::new();
        registry.register(Box::new(histogram.clone())).unwrap();
        let now = |share| {
            let families = registry.gather();
            quantile(families[0].get_metric()[0].get_histogram(), share)
        };
        assert_eq!(now(0.5), None);
        for value in [0.005, 0.005, 0.05, 7.0] {
            histogram.observe(value);
        }
        assert_eq!(now(0.5), Some(0.01));
        assert_eq!(now(0.75), Some(0.1));
        assert_eq!(now(0.99), Some(1.0), "above all bounds");
    }

    #[test]
    fn only_what_denies_is_counted() {
        let rule = |packets, end| ListedRule {
            table: TableName::new(Family::Inet, "calico"),
            chain: "c".into(),
            handle: 1,
            rule: Rule::new([Expr::Counter { packets, bytes: 0 }, end]),
        };
        let rules = [
            rule(3, Expr::Verdict(Verdict::Drop)),
            rule(4, Expr::Verdict(Verdict::Accept)),
            rule(5, Expr::Verdict(Verdict::Drop)),
        ];
        assert_eq!(denied(&rules), 8);
    }
}
