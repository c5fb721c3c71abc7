//! What the dataplane counts, in a registry that whoever serves `/metrics` can be given.

use std::time::{Duration, Instant};

use cali_api::Kind;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, Registry};
use tracing::warn;

/// Upper bounds in seconds: what matters is on which side of 100 ms.
const BUCKETS: [f64; 12] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
];

/// The dataplane's metrics.
pub(super) struct Metrics {
    policy_latency: Histogram,
    transaction: Histogram,
    pub(super) flows_ended: IntCounter,
    pub(super) flows_held: IntGauge,
    pub(super) offload_devices: IntGauge,
    /// When the oldest change that is not enforced yet came in.
    waiting_since: Option<Instant>,
}

impl Metrics {
    /// Registers them. One that another instance has registered stays out of the registry, and works all the same.
    pub(super) fn new(registry: &Registry) -> Self {
        let histogram = |name: &str, help: &str| {
            let options = HistogramOpts::new(name, help).buckets(BUCKETS.to_vec());
            registered(registry, Histogram::with_opts(options))
        };
        Self {
            policy_latency: histogram(
                "felix_policy_enforced_seconds",
                "Time from the arrival of a policy, set, tier, profile or endpoint until the kernel enforces it",
            ),
            transaction: histogram(
                "felix_ruleset_transaction_seconds",
                "Time of one step of the rule set in the kernel",
            ),
            flows_ended: registered(
                registry,
                IntCounter::new(
                    "felix_forbidden_flows_ended_total",
                    "Established flows that a change of policy has ended",
                ),
            ),
            flows_held: registered(
                registry,
                IntGauge::new(
                    "felix_forbidden_flows_held",
                    "Flows whose packets are dropped because policy forbade them while they were established",
                ),
            ),
            offload_devices: registered(
                registry,
                IntGauge::new(
                    "felix_nft_flowtable_devices",
                    "Devices between which established flows are offloaded",
                ),
            ),
            waiting_since: None,
        }
    }

    /// Something arrived.
    pub(super) fn on_update(&mut self, kind: Kind, now: Instant) {
        let enforced = matches!(
            kind,
            Kind::NetworkPolicy
                | Kind::GlobalNetworkPolicy
                | Kind::NetworkSet
                | Kind::GlobalNetworkSet
                | Kind::Tier
                | Kind::Profile
                | Kind::WorkloadEndpoint
                | Kind::HostEndpoint
        );
        if enforced {
            self.waiting_since.get_or_insert(now);
        }
    }

    /// A step of the rule set is over.
    pub(super) fn on_step(&mut self, took: Duration, settled: bool, now: Instant) {
        self.transaction.observe(took.as_secs_f64());
        if settled && let Some(since) = self.waiting_since.take() {
            let latency = now.saturating_duration_since(since);
            self.policy_latency.observe(latency.as_secs_f64());
        }
    }
}

fn registered<M: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<M>,
) -> M {
    let metric = match made {
        Ok(metric) => metric,
        // Names and buckets are constants of this module.
        Err(error) => unreachable!("a metric of the dataplane: {error}"),
    };
    if let Err(error) = registry.register(Box::new(metric.clone())) {
        warn!(%error, "a metric is not published");
    }
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latency_runs_from_the_oldest_waiting_change_to_the_settled_step() {
        let registry = Registry::new();
        let mut metrics = Metrics::new(&registry);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let step = Duration::from_millis(1);
        metrics.on_update(Kind::Node, at(0));
        metrics.on_step(step, true, at(1));
        metrics.on_update(Kind::NetworkPolicy, at(10));
        metrics.on_update(Kind::NetworkPolicy, at(20));
        metrics.on_step(step, false, at(30));
        metrics.on_step(step, true, at(60));
        metrics.on_step(step, true, at(90));
        assert_eq!(metrics.policy_latency.get_sample_count(), 1);
        assert!((metrics.policy_latency.get_sample_sum() - 0.05).abs() < 1e-6);
        assert_eq!(metrics.transaction.get_sample_count(), 4);
        assert_eq!(registry.gather().len(), 5);
    }
}
