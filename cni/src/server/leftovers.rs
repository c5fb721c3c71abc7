//! What calls have left behind: containers that vanished without `DEL`, and pods that were answered for and not
//! published before the daemon ended.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::Cidr;
use cali_control::cni::Failure;
use cali_ipam::Owner;
use cali_netlink::route::protocol;
use cali_netlink::{Hop, Link, Netlink, RouteFilter, Target};
use serde_json::Value;

use super::calls::{Calls, kernel};
use super::pods::{self, Standing, Who};
use super::publish::News;
use super::sink::Endpoint;
use crate::config::Config;
use crate::spec::{code, failure};

impl Calls {
    /// Frees what belongs to none of the valid attachments; never the address of an interface that still exists.
    pub(super) async fn collect(&self, config: &Config) -> Result<Value, Failure> {
        let Some(valid) = &config.valid_attachments else {
            return Err(failure(
                code::CONFIGURATION,
                "GC needs cni.dev/valid-attachments",
            ));
        };
        let keep: BTreeSet<String> = valid
            .iter()
            .map(|a| config.handle(&a.container_id, &a.ifname).to_lowercase())
            .collect();
        let prefix = format!("{}.", config.name.to_lowercase());
        let links = self
            .host
            .dump_links()
            .map_err(|e| kernel("list the interfaces", &e))?;
        let standing: BTreeSet<String> = links
            .into_iter()
            .filter_map(|l| l.alias)
            .filter_map(|alias| {
                alias
                    .split_once('/')
                    .map(|(id, ifname)| config.handle(id, ifname).to_lowercase())
            })
            .collect();
        let mut failures = Vec::new();
        let gone = |handle: &str| !keep.contains(handle) && !standing.contains(handle);
        if let Some(translations) = &self.translations {
            for handle in translations.handles() {
                let ours = handle.to_lowercase();
                if ours.starts_with(&prefix)
                    && gone(&ours)
                    && let Err(e) = translations.take(&handle)
                {
                    failures.push(format!("{handle}: {}: {}", e.msg, e.details));
                }
            }
        }
        for (handle, attachment) in self.keeper.attachments().await {
            let Some(container) = handle.strip_prefix(&prefix) else {
                continue;
            };
            if !gone(&handle) {
                continue;
            }
            let who = who_owns(&attachment.owner).unwrap_or_else(|| Who::Container {
                id: container.to_owned(),
            });
            tracing::info!(handle, addresses = ?attachment.addresses, "frees addresses of a container that no longer exists");
            self.publisher.tell(
                who,
                News::Down {
                    container_id: container.to_owned(),
                },
            );
            if let Err(e) = self.release(&handle).await {
                failures.push(format!("{handle}: {}", e.details));
            }
        }
        if failures.is_empty() {
            return Ok(Value::Null);
        }
        let mut failure = failure(code::TRY_AGAIN, "some addresses could not be freed");
        failure.details = failures.join("; ");
        Err(failure)
    }

    /// After a start: endpoints that were answered and not published before the daemon ended are published now. `found` is
    /// what stood when this run began.
    pub(super) async fn resume(self: Arc<Self>, found: Vec<Found>) {
        self.directory.complete().await;
        let attachments = self.keeper.attachments().await;
        for found in found {
            let (who, addresses) = match attachments.iter().find(|(handle, _)| found.is_of(handle))
            {
                Some((_, attachment)) => {
                    let addresses = attachment.addresses.iter().map(|h| h.address).collect();
                    (who_owns(&attachment.owner), addresses)
                }
                // Its addresses are another plugin's, or nobody's: only the kernel knows them.
                None => (
                    self.directory.pod_of_interface(&found.interface),
                    found.addresses.clone(),
                ),
            };
            let Some(who) = who.filter(|_| !addresses.is_empty()) else {
                continue;
            };
            let turn = self.turn(&who);
            let guard = turn.lock().await;
            if let Err(e) = self.resume_one(&who, &found, &addresses).await {
                tracing::warn!(
                    ?who,
                    error = e.msg,
                    details = e.details,
                    "cannot take up a pod of an earlier run"
                );
            }
            drop(guard);
            self.end_turn(&who, turn);
        }
    }

    async fn resume_one(
        &self,
        who: &Who,
        found: &Found,
        addresses: &[IpAddr],
    ) -> Result<(), Failure> {
        let Who::Pod { namespace, name } = who else {
            return Ok(());
        };
        let failed = |e: &cali_netlink::Error| kernel("look at the pod's interface", e);
        let link = self
            .host
            .link_by_name(&who.interface())
            .map_err(|e| failed(&e))?;
        // A newer sandbox of the pod may have taken its place meanwhile.
        let Some(link) = link.filter(|link| found.is_still(link)) else {
            return Ok(());
        };
        let Some(known) = self.directory.now(namespace, name) else {
            return Ok(());
        };
        let cidrs: Vec<Cidr> = addresses.iter().copied().map(Cidr::host).collect();
        let annotations = cali_api::kubernetes::address_annotations(&cidrs, &found.container_id);
        if known
            .pod
            .as_ref()
            .is_some_and(|pod| pods::shows(pod, &annotations))
        {
            return Ok(());
        }
        let workload = pods::endpoint(
            &known,
            &Standing {
                node: &self.settings.node,
                who,
                network: "",
                container_id: &found.container_id,
                ifname: &found.ifname,
                addresses: &cidrs,
                mac: cali_api::MacAddr([0; 6]),
            },
        )
        .map(|mut workload| {
            workload.spec.mac = None;
            workload
        })?;
        let endpoint = Endpoint {
            workload: workload.clone(),
            host_index: link.index,
        };
        self.publisher
            .tell(who.clone(), News::Up(Box::new(workload)));
        self.program(endpoint, self.settings.wait_for_policy).await
    }
}

/// The pod that an owner of addresses is.
pub(super) fn who_owns(owner: &Owner) -> Option<Who> {
    Some(Who::Pod {
        namespace: owner.attribute("namespace")?.to_owned(),
        name: owner.attribute("pod")?.to_owned(),
    })
}

/// The host's side of a container's interface that an earlier run has made and brought up. An `ADD` does that before it is
/// answered; one that was cut off before is left out: the runtime asks again, and what can never be programmed must not keep
/// it waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    interface: String,
    container_id: String,
    ifname: String,
    /// Where routes over it lead to.
    addresses: Vec<IpAddr>,
}

impl Found {
    fn new(link: &Link) -> Option<Self> {
        let alias = link.alias.as_deref().filter(|_| link.up)?;
        let (container_id, ifname) = alias.split_once('/')?;
        Some(Self {
            interface: link.name.clone(),
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
            addresses: Vec::new(),
        })
    }

    /// A handle ends in the container's id: it is this sandbox's and not an earlier one's.
    fn is_of(&self, handle: &str) -> bool {
        handle.ends_with(&format!(".{}", self.container_id.to_lowercase()))
    }

    fn is_still(&self, link: &Link) -> bool {
        Self::new(link).is_some_and(|now| {
            (now.container_id, now.ifname) == (self.container_id.clone(), self.ifname.clone())
        })
    }
}

/// Looks for such interfaces, before anybody has taken a route away that is not known any more.
pub(super) fn find(host: &Netlink) -> cali_netlink::Result<Vec<Found>> {
    let mut found: BTreeMap<u32, Found> = host
        .dump_links()?
        .iter()
        .filter_map(|link| Some((link.index, Found::new(link)?)))
        .collect();
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let ours = RouteFilter {
        protocol: Some(protocol::FELIX),
        ..RouteFilter::default()
    };
    for route in host.dump_routes(&ours)? {
        let whole = if route.prefix.is_ipv4() { 32 } else { 128 };
        if let Target::Hop(Hop {
            oif: Some(index), ..
        }) = &route.target
            && let Some(found) = found.get_mut(index)
            && route.prefix.prefix() == whole
        {
            found.addresses.push(route.prefix.ip());
        }
    }
    Ok(found.into_values().collect())
}
