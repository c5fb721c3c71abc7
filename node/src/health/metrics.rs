//! Gauges of the node, made from the latest snapshot when they are asked for. Calico's names where Calico has them.

use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use tokio::sync::watch;

use super::Snapshot;

/// Adds the node's gauges to a registry.
pub(super) fn register(
    registry: &Registry,
    latest: watch::Receiver<Option<Arc<Snapshot>>>,
) -> prometheus::Result<()> {
    registry.register(Box::new(NodeCollector::new(latest)?))
}

struct NodeCollector {
    latest: watch::Receiver<Option<Arc<Snapshot>>>,
    endpoints: IntGauge,
    unprogrammed: IntGauge,
    routes: IntGauge,
    waiting: IntGauge,
    tunnel_endpoints: IntGauge,
    quarantined: IntGauge,
    notices: IntGauge,
    ready: IntGaugeVec,
}

impl NodeCollector {
    fn new(latest: watch::Receiver<Option<Arc<Snapshot>>>) -> prometheus::Result<Self> {
        let gauge = IntGauge::new;
        Ok(Self {
            latest,
            endpoints: gauge("felix_active_local_endpoints", "Endpoints of this node.")?,
            unprogrammed: gauge(
                "cali_endpoints_not_programmed",
                "Endpoints of this node whose policy, routes or interface are not in the kernel.",
            )?,
            routes: gauge(
                "felix_route_table_num_routes",
                "Routes that this node wants in the kernel.",
            )?,
            waiting: gauge("cali_routes_waiting", "Routes that wait for their device.")?,
            tunnel_endpoints: gauge(
                "cali_tunnel_endpoints",
                "Remote tunnel endpoints whose entries are in the kernel.",
            )?,
            quarantined: gauge(
                "cali_quarantined_objects",
                "Objects that the kernel refused or that cannot be used; everything else is programmed.",
            )?,
            notices: gauge(
                "cali_notices",
                "Things that an operator should know, as shown by calictl node status.",
            )?,
            ready: IntGaugeVec::new(
                Opts::new("cali_part_ready", "Whether a part of the node is ready."),
                &["part"],
            )?,
        })
    }

    fn gauges(&self) -> [&IntGauge; 7] {
        [
            &self.endpoints,
            &self.unprogrammed,
            &self.routes,
            &self.waiting,
            &self.tunnel_endpoints,
            &self.quarantined,
            &self.notices,
        ]
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl Collector for NodeCollector {
    fn desc(&self) -> Vec<&Desc> {
        let mut all: Vec<&Desc> = self
            .gauges()
            .iter()
            .flat_map(|gauge| gauge.desc())
            .collect();
        all.extend(self.ready.desc());
        all
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Some(snapshot) = self.latest.borrow().clone() else {
            return Vec::new();
        };
        let unprogrammed = snapshot
            .endpoints
            .iter()
            .filter(|endpoint| !endpoint.programmed)
            .count();
        self.endpoints.set(count(snapshot.endpoints.len()));
        self.unprogrammed.set(count(unprogrammed));
        self.routes.set(count(snapshot.routes));
        self.waiting.set(count(snapshot.waiting));
        self.tunnel_endpoints.set(count(snapshot.tunnel_endpoints));
        self.quarantined.set(count(snapshot.node.quarantined.len()));
        self.notices.set(count(snapshot.node.notices.len()));
        for part in &snapshot.node.readiness {
            self.ready
                .with_label_values(&[part.part.as_str()])
                .set(i64::from(part.ready));
        }
        let mut all: Vec<MetricFamily> = self
            .gauges()
            .iter()
            .flat_map(|gauge| gauge.collect())
            .collect();
        all.extend(self.ready.collect());
        all
    }
}
