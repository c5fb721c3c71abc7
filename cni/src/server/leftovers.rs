//! What calls have left behind: containers that vanished without `DEL`, and pods that were answered for and not
//! published before the daemon ended.

use std::collections::BTreeSet;
use std::sync::Arc;

use cali_api::Cidr;
use cali_control::cni::Failure;
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
            let (namespace, name) = (
                attachment.owner.attribute("namespace"),
                attachment.owner.attribute("pod"),
            );
            let who = match (namespace, name) {
                (Some(namespace), Some(name)) => Who::Pod {
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                },
                _ => Who::Container {
                    id: container.to_owned(),
                },
            };
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

    /// After a start: endpoints that were answered and not published before the daemon ended are published now.
    pub(super) async fn resume(self: Arc<Self>) {
        self.directory.complete().await;
        for (handle, attachment) in self.keeper.attachments().await {
            let (Some(namespace), Some(name)) = (
                attachment.owner.attribute("namespace"),
                attachment.owner.attribute("pod"),
            ) else {
                continue;
            };
            let who = Who::Pod {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            };
            let turn = self.turn(&who);
            let guard = turn.lock().await;
            if let Err(e) = self.resume_one(&who, &handle).await {
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

    pub(super) async fn resume_one(&self, who: &Who, handle: &str) -> Result<(), Failure> {
        let Who::Pod { namespace, name } = who else {
            return Ok(());
        };
        let failed = |e: &cali_netlink::Error| kernel("look at the pod's interface", e);
        let Some(link) = self
            .host
            .link_by_name(&who.interface())
            .map_err(|e| failed(&e))?
        else {
            return Ok(());
        };
        // An ADD brings the interface up before it is answered. This one was cut off, and the runtime asks again: what
        // can never be programmed must not keep it waiting.
        if !link.up {
            return Ok(());
        }
        let alias = link.alias.unwrap_or_default();
        let Some((container_id, ifname)) = alias.split_once('/') else {
            return Ok(());
        };
        // The handle ends in the container's id: it is this sandbox's and not an earlier one's.
        if !handle.ends_with(&format!(".{}", container_id.to_lowercase())) {
            return Ok(());
        }
        let Some(known) = self.directory.now(namespace, name) else {
            return Ok(());
        };
        let Some(attachment) = self.keeper.attachment(handle).await else {
            return Ok(());
        };
        let cidrs: Vec<Cidr> = attachment
            .addresses
            .iter()
            .map(|h| Cidr::host(h.address))
            .collect();
        let annotations = cali_api::kubernetes::address_annotations(&cidrs, container_id);
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
                container_id,
                ifname,
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
