//! Settings of the controllers: `KubeControllersConfiguration default`, read at every pass, so that a change needs no restart.

use std::time::Duration;

use cali_api::v3::{AssignIPs, AutoHostEndpointConfig};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::{Datastore, Error as StoreError};

use crate::error::Error;
use crate::gc::Rules;

/// What the resource says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How garbage is collected.
    pub rules: Rules,
    /// Which host endpoints are made.
    pub host_endpoints: AutoHostEndpointConfig,
    /// Which services get an address.
    pub assign_ips: AssignIPs,
}

impl Settings {
    /// Reads the resource; what it does not say has Calico's default.
    pub async fn read(store: &dyn Datastore) -> Result<Self, Error> {
        let key = Key::cluster(Kind::KubeControllersConfiguration, "default");
        let controllers = match store.get(&key).await {
            Ok(found) => match found.object.as_ref() {
                AnyResource::KubeControllersConfiguration(object) => {
                    Some(object.spec.controllers.clone())
                }
                _ => None,
            },
            Err(StoreError::NotFound { .. }) => None,
            Err(source) => return Err(Error::datastore(format!("read {key}"))(source)),
        };
        let controllers = controllers.unwrap_or_default();
        let node = controllers.node.unwrap_or_default();
        let balancer = controllers.load_balancer.unwrap_or_default();
        let grace = node.leak_grace_period.map(|g| g.0);
        let mut rules = Rules::default();
        if let Some(grace) = grace {
            rules.grace = (!grace.is_zero()).then_some(grace);
        }
        Ok(Self {
            rules,
            host_endpoints: node.host_endpoint.unwrap_or_default(),
            assign_ips: balancer.assign_ips.unwrap_or(AssignIPs::AllServices),
        })
    }

    /// Time between passes: half the grace period, so that garbage is seen at least twice before it goes; five minutes
    /// where only deleted nodes are cleaned up after.
    pub fn period(&self) -> Duration {
        match self.rules.grace {
            Some(grace) => (grace / 2).max(Duration::from_millis(10)),
            None => Duration::from_secs(300),
        }
    }
}
