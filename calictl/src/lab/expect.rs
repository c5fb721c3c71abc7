//! What the policies say about a connection, by the reference evaluator over the lab's datastore.

use anyhow::{Context, Result, bail};
use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::{Key, Kind};
use cali_datastore::Datastore;
use felix::calc::Direction;
use felix::verdict::{Model, Outcome, Packet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// `IPPROTO_TCP`.
const TCP: u8 = 6;
/// Any port of the ephemeral range: no policy of a lab names source ports there.
const SOURCE_PORT: u16 = 40_000;
const LIMIT: Duration = Duration::from_secs(10);

/// All policies and endpoints of a datastore, as of one instant.
pub(super) struct Oracle {
    model: Model,
}

impl Oracle {
    pub(super) async fn read(store: &Arc<dyn Datastore>) -> Result<Self> {
        let kinds = [
            Kind::NetworkPolicy,
            Kind::GlobalNetworkPolicy,
            Kind::Tier,
            Kind::NetworkSet,
            Kind::GlobalNetworkSet,
            Kind::Profile,
            Kind::WorkloadEndpoint,
        ];
        let mut model = Model::default();
        let mut events = cali_datastore::sync::start(Arc::clone(store), &kinds);
        let fill = async {
            while let Some(event) = events.recv().await {
                match event {
                    SyncEvent::Status(SyncStatus::InSync) => return Ok(()),
                    SyncEvent::Status(_) | SyncEvent::Complete(_) => {}
                    SyncEvent::Updates(updates) => {
                        for update in updates {
                            match update.value {
                                Some(object) => model.put(object),
                                None => model.remove(&update.key),
                            }
                        }
                    }
                }
            }
            bail!("the datastore's stream ended before it was in sync")
        };
        tokio::time::timeout(LIMIT, fill)
            .await
            .context("the datastore was not in sync in time")??;
        Ok(Self { model })
    }

    /// Whether a first TCP packet passes the sender's egress and the receiver's ingress policy.
    pub(super) fn allows(&self, from: IpAddr, to: IpAddr, port: u16) -> Result<bool> {
        let packet = Packet {
            source: from,
            destination: to,
            protocol: TCP,
            source_port: SOURCE_PORT,
            destination_port: port,
            icmp: None,
        };
        let passes = |address: IpAddr, direction: Direction| -> Result<bool> {
            let endpoint: Key = self
                .model
                .endpoint_of(address)
                .with_context(|| format!("no endpoint in the datastore has address {address}"))?;
            Ok(self.model.verdict(&endpoint, &packet, direction).outcome == Outcome::Allow)
        };
        Ok(passes(from, Direction::Egress)? && passes(to, Direction::Ingress)?)
    }
}
