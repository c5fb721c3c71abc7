//! What `export` prints and `import` reads, in Calico's form: manifests, a line `===`, the ClusterInformation as JSON, a line
//! `===`, and the addresses as etcd's keys and values in JSON. Pure.

use std::path::Path;

use anyhow::{Context, Result, bail};
use cali_api::{AnyResource, Kind};
use cali_datastore::etcd::portable;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::manifests::{self, Document};

/// The line between the parts.
const SEPARATOR: &str = "===";

/// The kinds of the first part in the order in which they are written: what others refer to comes first.
pub(super) const RESOURCES: [Kind; 30] = [
    Kind::IPPool,
    Kind::IPReservation,
    Kind::K8sNode,
    Kind::Node,
    Kind::Tier,
    Kind::K8sNamespace,
    Kind::K8sServiceAccount,
    Kind::Profile,
    Kind::BGPConfiguration,
    Kind::BGPFilter,
    Kind::BGPPeer,
    Kind::FelixConfiguration,
    Kind::KubeControllersConfiguration,
    Kind::GlobalNetworkSet,
    Kind::NetworkSet,
    Kind::GlobalNetworkPolicy,
    Kind::NetworkPolicy,
    Kind::StagedGlobalNetworkPolicy,
    Kind::StagedNetworkPolicy,
    Kind::StagedKubernetesNetworkPolicy,
    Kind::K8sNetworkPolicy,
    Kind::K8sClusterNetworkPolicy,
    Kind::K8sAdminNetworkPolicy,
    Kind::K8sBaselineAdminNetworkPolicy,
    Kind::K8sService,
    Kind::K8sEndpointSlice,
    Kind::HostEndpoint,
    Kind::K8sPod,
    Kind::WorkloadEndpoint,
    Kind::CalicoNodeStatus,
];

/// The kinds of the last part, in the order in which they are written.
pub(super) const ADDRESSES: [Kind; 4] = [
    Kind::BlockAffinity,
    Kind::IPAMBlock,
    Kind::IPAMHandle,
    Kind::IPAMConfiguration,
];

/// Metadata that belongs to the place where an object lies. Owners are named by a `uid` that means nothing elsewhere, and a
/// finalizer waits for somebody who may not be there.
const LOCAL_METADATA: [&str; 9] = [
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "managedFields",
    "ownerReferences",
    "finalizers",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
];

/// An object without what belongs to the place where it lies.
pub(crate) fn portable(object: &AnyResource) -> Value {
    let mut value = object.to_json();
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in LOCAL_METADATA {
            metadata.remove(field);
        }
    }
    value
}

/// One of the last part's entries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    key: String,
    value: Value,
    /// Nanoseconds; none of these keys has one.
    #[serde(default, rename = "TTL")]
    ttl: u64,
}

/// The last part.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Addresses {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    block_affinities: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    blocks: Vec<Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    handles: Vec<Entry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<Entry>,
}

/// The text of a whole datastore.
pub(super) fn render(
    resources: &[AnyResource],
    information: &AnyResource,
    addresses: &[AnyResource],
) -> Result<String> {
    let mut text = String::new();
    for kind in RESOURCES {
        let items: Vec<Value> = resources
            .iter()
            .filter(|object| object.kind() == kind)
            .map(portable)
            .collect();
        if !items.is_empty() {
            let list = json!({
                "apiVersion": kind.api_version(), "kind": format!("{}List", kind.name()), "metadata": {}, "items": items,
            });
            text += &serde_saphyr::to_string(&list).context("cannot write YAML")?;
            text += "---\n";
        }
    }
    let mut parts = Addresses::default();
    for object in addresses {
        let (key, value) = portable::entry(object)
            .with_context(|| format!("{} has no place in an export", object.key()))?;
        let entry = Entry { key, value, ttl: 0 };
        match object.kind() {
            Kind::BlockAffinity => parts.block_affinities.push(entry),
            Kind::IPAMBlock => parts.blocks.push(entry),
            Kind::IPAMHandle => parts.handles.push(entry),
            _ => parts.config = Some(entry),
        }
    }
    let json = |value: &Value| serde_json::to_string_pretty(value);
    Ok(format!(
        "{text}{SEPARATOR}\n{}\n{SEPARATOR}\n{}\n",
        json(&portable(information))?,
        json(&serde_json::to_value(&parts)?)?
    ))
}

/// What was read of a file.
pub(super) struct Archive {
    pub(super) resources: Vec<Document>,
    pub(super) information: AnyResource,
    pub(super) addresses: Vec<AnyResource>,
}

impl Archive {
    pub(super) fn read(file: &Path) -> Result<Self> {
        let texts = manifests::texts(file, false)?;
        let [(name, text)] = texts.as_slice() else {
            bail!(
                "{} is a folder: it must be the one file that export has printed",
                file.display()
            );
        };
        Self::parse(name, text)
    }

    fn parse(name: &str, text: &str) -> Result<Self> {
        let mut parts = vec![String::new()];
        for line in text.lines() {
            if line == SEPARATOR {
                parts.push(String::new());
            } else if let Some(part) = parts.last_mut() {
                part.push_str(line);
                part.push('\n');
            }
        }
        let [resources, information, addresses] = parts.as_slice() else {
            bail!(
                "{name} is no export of a datastore: it has {} parts between lines {SEPARATOR} instead of 3; make it again with: calictl datastore export",
                parts.len()
            );
        };
        let resources = manifests::parse(&[(name.to_owned(), resources.clone())], None)?;
        let information: Value = serde_json::from_str(information)
            .with_context(|| format!("the second part of {name} is no JSON"))?;
        let information = AnyResource::from_json(information)
            .with_context(|| format!("the second part of {name} is no ClusterInformation"))?;
        if !matches!(information, AnyResource::ClusterInformation(_)) {
            bail!(
                "the second part of {name} is {}, it must be the ClusterInformation",
                information.key()
            );
        }
        let entries: Addresses = serde_json::from_str(addresses)
            .with_context(|| format!("the last part of {name} is no list of addresses"))?;
        let Addresses {
            block_affinities,
            blocks,
            handles,
            config,
        } = entries;
        let all = block_affinities
            .into_iter()
            .chain(blocks)
            .chain(handles)
            .chain(config);
        let addresses = all
            .map(|entry| {
                portable::object(&entry.key, entry.value)
                    .with_context(|| format!("{name}: {} is no key of Calico's", entry.key))?
                    .with_context(|| format!("{name}: the value of {}", entry.key))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            resources,
            information,
            addresses,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> AnyResource {
        AnyResource::from_json(value).expect("an object")
    }

    #[test]
    fn every_kind_has_its_place() {
        for kind in Kind::ALL {
            let times = RESOURCES
                .iter()
                .chain(&ADDRESSES)
                .filter(|known| *known == kind)
                .count();
            assert_eq!(
                times,
                usize::from(*kind != Kind::ClusterInformation),
                "{kind}"
            );
        }
    }

    #[test]
    fn what_was_written_is_read_and_calicos_too() {
        let pool = object(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
            "metadata": {"name": "p", "uid": "1", "resourceVersion": "7", "annotations": {"a": "x\n===\ny"}},
            "spec": {"cidr": "10.0.0.0/16"},
        }));
        let information = object(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "ClusterInformation", "metadata": {"name": "default"},
            "spec": {"clusterGUID": "g", "datastoreReady": false},
        }));
        let handle = object(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPAMHandle", "metadata": {"name": "h"},
            "spec": {"handleID": "h", "block": {"10.0.0.0/26": 2}},
        }));
        let text = render(
            std::slice::from_ref(&pool),
            &information,
            std::slice::from_ref(&handle),
        )
        .expect("a text");
        let read = Archive::parse("f", &text).expect("an archive");
        assert_eq!(read.resources.len(), 1);
        assert_eq!(portable(&read.resources[0].value), portable(&pool));
        assert_eq!(
            (read.information, read.addresses),
            (information, vec![handle])
        );

        let calicos = "apiVersion: projectcalico.org/v3\nitems: []\nkind: IPPoolList\nmetadata:\n  resourceVersion: \"5\"\n---\n===\n\
            {\"kind\": \"ClusterInformation\", \"apiVersion\": \"projectcalico.org/v3\", \"metadata\": {\"name\": \"default\", \
            \"creationTimestamp\": null}, \"spec\": {\"datastoreReady\": false}}\n===\n\
            {\"block_affinities\": [{\"Key\": \"/calico/ipam/v2/host/n/ipv4/block/10.0.0.0-26\", \
            \"Value\": {\"state\": \"confirmed\"}, \"TTL\": 0}]}\n";
        let read = Archive::parse("f", calicos).expect("an archive");
        assert_eq!(read.addresses[0].kind(), Kind::BlockAffinity);
    }

    #[test]
    fn what_is_no_export_is_refused_with_the_reason() {
        let head = "===\n{\"apiVersion\": \"projectcalico.org/v3\", \"kind\": \"ClusterInformation\", \"metadata\": {\"name\": \"default\"}}\n===\n";
        for (text, reason) in [
            ("".to_owned(), "has 1 parts"),
            ("===\n{}\n===\n{}\n".to_owned(), "no ClusterInformation"),
            (format!("{head}{{\"other\": 1}}"), "no list of addresses"),
            (
                format!("{head}{{\"blocks\": [{{\"Key\": \"/x\", \"Value\": {{}}}}]}}"),
                "/x is no key",
            ),
            (format!("kind: Nothing\n{head}{{}}"), "f:1"),
        ] {
            let error = Archive::parse("f", &text).map(drop).expect_err(&text);
            let error = format!("{error:#}");
            assert!(error.contains(reason), "{error}");
        }
    }
}
