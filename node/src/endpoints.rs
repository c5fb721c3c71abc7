//! Pods that come and go, told to the dataplane on behalf of the CNI server.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cali_cni::server::{Endpoint, EndpointSink, Leaving, NotProgrammed};
use cali_netlink::conntrack::Conntrack;
use cali_netlink::together::Together;
use cali_netlink::{Error, Netlink};
use felix::dataplane::Handle;

/// Longer than any call waits: the caller decides when to give up.
const LIMIT: Duration = Duration::from_secs(60);

/// See the module's text.
#[derive(Debug)]
pub struct Endpoints {
    dataplane: Handle,
    /// Ends the connections of addresses.
    ending: Together<Vec<IpAddr>, Result<(), Error>>,
}

impl Endpoints {
    /// Speaks to this dataplane, which works in the namespace of `netlink`.
    pub fn new(dataplane: Handle, netlink: &Netlink) -> Result<Self, Error> {
        let conntrack = Conntrack::open(netlink.netns())?;
        let ending = Together::start("connections", move |leaving: Vec<Vec<IpAddr>>| {
            let ended = conntrack.delete_addresses(&leaving.concat());
            vec![ended.map(|_| ()); leaving.len()]
        })?;
        Ok(Self { dataplane, ending })
    }
}

fn refused(error: impl std::fmt::Display) -> NotProgrammed {
    NotProgrammed(error.to_string())
}

#[async_trait]
impl EndpointSink for Endpoints {
    async fn endpoint_up(&self, endpoint: Endpoint) -> Result<(), NotProgrammed> {
        let key = endpoint.workload.key();
        self.dataplane
            .announce(key.clone(), Some(Arc::new(endpoint.workload)))
            .await
            .map_err(refused)?;
        self.dataplane
            .programmed(&key, LIMIT)
            .await
            .map(|_| ())
            .map_err(refused)
    }

    async fn endpoint_down(&self, leaving: Leaving) -> Result<(), NotProgrammed> {
        self.dataplane
            .announce(leaving.key, None)
            .await
            .map_err(refused)?;
        // The datastore may show the endpoint a little longer than its interface exists; its connections end now in any
        // case, before anybody else can have the addresses.
        let ended = self.ending.ask(leaving.addresses).await;
        ended.and_then(|ended| ended).map_err(refused)
    }

    fn ready(&self) -> Result<(), NotProgrammed> {
        if self.dataplane.state().borrow().ready {
            Ok(())
        } else {
            Err(NotProgrammed(
                "policy has not been programmed yet since the start".to_owned(),
            ))
        }
    }
}
