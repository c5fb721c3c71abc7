//! The addresses of a call: taken from the node's reserve, and given back.

use std::net::IpAddr;
use std::time::SystemTime;

use cali_control::cni::Failure;
use cali_datastore::timestamp;
use cali_ipam::reserve::Ask;
use cali_ipam::{Error as IpamError, Owner};
use serde_json::Value;

use super::calls::{Calls, Job};
use super::pods::{Known, Who};
use crate::request::{Addresses, addresses};
use crate::result::{Added, render};
use crate::spec::{code, failure, failure_of};

impl Calls {
    pub(super) fn owner(&self, job: &Job<'_>) -> Owner {
        let owner = Owner::new(&job.handle)
            .with("node", &self.settings.node)
            .with("timestamp", timestamp::format(SystemTime::now()));
        match &job.who {
            Who::Pod { namespace, name } => owner.with("namespace", namespace).with("pod", name),
            Who::Container { .. } => owner,
        }
    }

    pub(super) async fn acquire(
        &self,
        job: &Job<'_>,
        known: &Known,
    ) -> Result<Vec<IpAddr>, Failure> {
        if let Some(other) = job.config.delegate() {
            return job.request.delegated.clone().ok_or_else(|| {
                let msg =
                    format!("ipam.type is {other:?}, and the call came without its addresses");
                failure(code::CONFIGURATION, msg)
            });
        }
        if let Some(attachment) = self.keeper.attachment(&job.handle).await {
            return Ok(attachment.addresses.iter().map(|h| h.address).collect());
        }
        let owner = self.owner(job);
        let held = match addresses(
            &job.config,
            &known.namespace_annotations,
            &known.annotations(),
        )? {
            Addresses::Unmanaged(addresses) => return Ok(addresses),
            Addresses::Exact(addresses) => self.keeper.acquire_exact(&owner, &addresses).await,
            Addresses::Pools {
                v4,
                v6,
                pools_v4,
                pools_v6,
            } => {
                let ask = Ask {
                    owner,
                    v4,
                    v6,
                    pools_v4,
                    pools_v6,
                    namespace_labels: known.pod.is_some().then(|| known.namespace_labels.clone()),
                };
                self.keeper.acquire(&ask).await
            }
        };
        held.map(|held| held.iter().map(|h| h.address).collect())
            .map_err(|e| no_address(&e))
    }

    pub(super) async fn add_addresses(&self, job: &Job<'_>) -> Result<Value, Failure> {
        let known = self.known(job).await?;
        let added = Added {
            interfaces: Vec::new(),
            addresses: self.acquire(job, &known).await?,
            gateways: Vec::new(),
        };
        Ok(render(&added, &job.config.cni_version))
    }

    pub(super) async fn check_addresses(&self, job: &Job<'_>) -> Result<Value, Failure> {
        match self.keeper.attachment(&job.handle).await {
            Some(_) => Ok(Value::Null),
            None => Err(failure(code::CHECK, "the container has no address")),
        }
    }

    pub(super) async fn release(&self, handle: &str) -> Result<(), Failure> {
        match self.keeper.release(handle).await {
            Ok(_) => Ok(()),
            Err(e) => Err(failure_of(
                code::TRY_AGAIN,
                "cannot return the container's addresses",
                &e,
            )),
        }
    }
}

fn no_address(error: &IpamError) -> Failure {
    let code = if error.is_transient() {
        code::TRY_AGAIN
    } else {
        code::NO_ADDRESS
    };
    failure_of(code, "no address for the pod", error)
}
