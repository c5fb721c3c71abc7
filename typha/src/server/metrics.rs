//! What the server counts, with Calico's names where it counts the same. Names and meaning stand in `docs/metrics-typha.md`.

use std::sync::Weak;

use cali_telemetry::Registry;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge};

use super::Shared;

/// Upper bounds in seconds.
const BUCKETS: [f64; 12] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 20.0, 60.0,
];

/// Connections.
#[derive(Debug)]
pub(super) struct Metrics {
    pub(super) accepted: IntCounter,
    pub(super) refused: IntCounter,
    pub(super) dropped: IntCounter,
    pub(super) violations: IntCounter,
    pub(super) active: IntGauge,
    pub(super) streaming: IntGauge,
    pub(super) sent: IntCounter,
    pub(super) snapshot: Histogram,
    pub(super) write: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            accepted: counter("typha_connections_accepted", "Connections accepted so far"),
            refused: counter(
                "typha_connections_refused",
                "Connections refused so far: too many, or no certificate that is served",
            ),
            dropped: counter(
                "typha_connections_dropped",
                "Connections that this server closed, for whatever reason",
            ),
            violations: counter(
                "typha_protocol_violations_total",
                "Connections closed because what came was none of the protocol: garbage, too large, out of order, cut off",
            ),
            active: gauge("typha_connections_active", "Connections now"),
            streaming: gauge(
                "typha_connections_streaming",
                "Clients that have their snapshot and follow the changes",
            ),
            sent: counter(
                "typha_sent_bytes_total",
                "Bytes sent to clients, before encryption",
            ),
            snapshot: histogram(
                "typha_client_snapshot_send_secs",
                "Time from the connection of a client until it has everything",
            ),
            write: histogram(
                "typha_client_write_latency_secs",
                "Time until a client's socket has taken one frame",
            ),
        }
    }
}

impl Metrics {
    pub(super) fn register(&self, registry: &Registry) {
        let all: [Box<dyn Collector>; 9] = [
            Box::new(self.accepted.clone()),
            Box::new(self.refused.clone()),
            Box::new(self.dropped.clone()),
            Box::new(self.violations.clone()),
            Box::new(self.active.clone()),
            Box::new(self.streaming.clone()),
            Box::new(self.sent.clone()),
            Box::new(self.snapshot.clone()),
            Box::new(self.write.clone()),
        ];
        for one in all {
            register(registry, one);
        }
    }
}

/// Puts a collector into a registry of this server's own; the names are distinct, so that it cannot be refused.
pub(super) fn register(registry: &Registry, one: Box<dyn Collector>) {
    if let Err(error) = registry.register(one) {
        tracing::error!(%error, "a metric cannot be served");
    }
}

fn counter(name: &str, help: &str) -> IntCounter {
    valid(IntCounter::new(name, help))
}

fn gauge(name: &str, help: &str) -> IntGauge {
    valid(IntGauge::new(name, help))
}

fn histogram(name: &str, help: &str) -> Histogram {
    valid(Histogram::with_opts(
        HistogramOpts::new(name, help).buckets(BUCKETS.to_vec()),
    ))
}

#[expect(clippy::expect_used, reason = "the names are literals of this file")]
fn valid<T>(made: prometheus::Result<T>) -> T {
    made.expect("a valid name")
}

/// One more while it lives.
pub(super) struct Counted(IntGauge);

impl Counted {
    pub(super) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What the cache says of itself, read when it is asked for.
pub(super) struct CacheMetrics {
    shared: Weak<Shared>,
    gauges: [IntGauge; 5],
    counters: [IntCounter; 4],
}

impl CacheMetrics {
    pub(super) fn new(shared: Weak<Shared>) -> Self {
        Self {
            shared,
            gauges: [
                gauge("typha_cache_size", "Objects in the cache"),
                gauge(
                    "typha_cache_bytes",
                    "Encoded size of the objects in the cache",
                ),
                gauge(
                    "typha_backlog_bytes",
                    "Encoded size of the changes that are kept for clients that are behind",
                ),
                gauge(
                    "typha_breadcrumb_seq_number",
                    "Number of the newest change since the start",
                ),
                gauge(
                    "typha_selectors",
                    "Different selectors by which clients ask for a part of the workload endpoints",
                ),
            ],
            counters: [
                counter("typha_updates_total", "Changes taken from the datastore"),
                counter(
                    "typha_updates_skipped",
                    "Changes from the datastore that changed nothing",
                ),
                counter(
                    "typha_snapshots_generated",
                    "Pages of the snapshot that were put together and compressed",
                ),
                counter(
                    "typha_snapshots_reused",
                    "Pages of the snapshot that were sent as another client had got them",
                ),
            ],
        }
    }
}

impl Collector for CacheMetrics {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = self.gauges.iter().flat_map(Collector::desc);
        gauges
            .chain(self.counters.iter().flat_map(Collector::desc))
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(shared) = self.shared.upgrade() else {
            return Vec::new();
        };
        let (values, counts) = {
            let cache = shared.cache();
            let values = [
                cache.len(),
                cache.object_bytes(),
                cache.backlog_bytes(),
                usize::try_from(cache.head()).unwrap_or(usize::MAX),
                cache.scopes().selectors(),
            ];
            (values, cache.counts())
        };
        for (gauge, value) in self.gauges.iter().zip(values) {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        let counts = [
            counts.updates,
            counts.skipped,
            counts.pages_built,
            counts.pages_shared,
        ];
        for (counter, count) in self.counters.iter().zip(counts) {
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        let gauges = self.gauges.iter().flat_map(Collector::collect);
        gauges
            .chain(self.counters.iter().flat_map(Collector::collect))
            .collect()
    }
}
