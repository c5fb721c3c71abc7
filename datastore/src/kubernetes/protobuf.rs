//! Lists of Pods in the encoding that the API server's own components use. Pure.
//!
//! A Pod in protobuf is half as large as in JSON and costs the API server, which holds it so, a fraction of the work; of
//! what it contains only the fields of [`super::wire`] are read here, the rest is passed over. Field numbers are those of
//! `generated.proto` in `k8s.io/api/core/v1` and `k8s.io/apimachinery/pkg/apis/meta/v1`, which never change.

use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use cali_api::kubernetes::{Pod, PodSpec, PodStatus};
use cali_api::{ObjectMeta, OwnerReference, Resource, StringMap};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta;
use kube::core::Status;
use prost::{DecodeError, Message};

use super::cluster::{Answer, Item, PageMetadata};
use super::wire::LAST_APPLIED;
use crate::timestamp;

/// The media type of the encoding.
pub(super) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// What is asked for: something on the way may speak JSON only.
pub(super) const ACCEPTED: &str = "application/vnd.kubernetes.protobuf, application/json";
/// What each object in it begins with.
const MAGIC: &[u8] = b"k8s\0";

/// The envelope of an object.
#[derive(Clone, PartialEq, Message)]
struct Unknown {
    #[prost(bytes = "bytes", tag = "2")]
    raw: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct List {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ListMetadata>,
    #[prost(message, repeated, tag = "2")]
    items: Vec<Object>,
}

#[derive(Clone, PartialEq, Message)]
struct ListMetadata {
    #[prost(string, tag = "2")]
    resource_version: String,
    #[prost(string, tag = "3")]
    next: String,
}

#[derive(Clone, PartialEq, Message)]
struct Object {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, optional, tag = "2")]
    spec: Option<Spec>,
    #[prost(message, optional, tag = "3")]
    status: Option<State>,
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    generate_name: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(string, tag = "5")]
    uid: String,
    #[prost(string, tag = "6")]
    resource_version: String,
    #[prost(int64, tag = "7")]
    generation: i64,
    #[prost(message, optional, tag = "8")]
    creation: Option<Instant>,
    #[prost(message, optional, tag = "9")]
    deletion: Option<Instant>,
    #[prost(int64, optional, tag = "10")]
    deletion_grace_period: Option<i64>,
    #[prost(btree_map = "string, string", tag = "11")]
    labels: StringMap,
    #[prost(btree_map = "string, string", tag = "12")]
    annotations: StringMap,
    #[prost(message, repeated, tag = "13")]
    owners: Vec<Owner>,
    #[prost(string, repeated, tag = "14")]
    finalizers: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Instant {
    /// Since 1970.
    #[prost(int64, tag = "1")]
    seconds: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Owner {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    uid: String,
    #[prost(string, tag = "5")]
    api_version: String,
    #[prost(bool, optional, tag = "6")]
    controller: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    block_owner_deletion: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Spec {
    #[prost(message, repeated, tag = "2")]
    containers: Vec<Container>,
    #[prost(string, tag = "8")]
    service_account_name: String,
    #[prost(string, tag = "10")]
    node_name: String,
    #[prost(bool, tag = "11")]
    host_network: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "6")]
    ports: Vec<Port>,
}

#[derive(Clone, PartialEq, Message)]
struct Port {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int32, tag = "2")]
    host_port: i32,
    #[prost(int32, tag = "3")]
    container_port: i32,
    #[prost(string, tag = "4")]
    protocol: String,
    #[prost(string, tag = "5")]
    host_ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct State {
    #[prost(string, tag = "1")]
    phase: String,
    #[prost(string, tag = "5")]
    host_ip: String,
    #[prost(string, tag = "6")]
    pod_ip: String,
    #[prost(message, repeated, tag = "12")]
    pod_ips: Vec<Address>,
}

#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct Refusal {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ListMetadata>,
    #[prost(string, tag = "3")]
    message: String,
    #[prost(string, tag = "4")]
    reason: String,
    #[prost(int32, tag = "6")]
    code: i32,
}

/// What is in an answer's envelope.
fn opened<T: Message + Default>(mut body: Bytes) -> Result<T, DecodeError> {
    if body.starts_with(MAGIC) {
        drop(body.split_to(MAGIC.len()));
    }
    T::decode(Unknown::decode(body)?.raw)
}

/// A page of Pods.
pub(super) fn pods(body: Bytes) -> Result<Answer, DecodeError> {
    let octets = body.len();
    let list: List = opened(body)?;
    let metadata = list.metadata.unwrap_or_default();
    Ok(Answer {
        metadata: PageMetadata {
            resource_version: metadata.resource_version,
            next: some(metadata.next),
        },
        items: list.items.into_iter().map(Item::from).collect(),
        octets,
    })
}

/// Why the server refused.
pub(super) fn status(body: Bytes) -> Result<Status, DecodeError> {
    let refusal: Refusal = opened(body)?;
    let next = refusal.metadata.unwrap_or_default().next;
    Ok(Status {
        code: u16::try_from(refusal.code).unwrap_or_default(),
        metadata: Some(ListMeta {
            continue_: some(next),
            ..ListMeta::default()
        }),
        ..Status::failure(&refusal.message, &refusal.reason)
    })
}

/// A text, unless it is empty: protobuf does not tell an empty one from none, and Kubernetes' JSON leaves both out.
fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn instant(at: Option<Instant>) -> Option<String> {
    // Go's zero time is written as an empty message.
    let seconds = at.map_or(0, |at| at.seconds);
    let seconds = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0)?;
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
    Some(timestamp::format(at))
}

impl From<Metadata> for ObjectMeta {
    fn from(mut read: Metadata) -> Self {
        read.annotations.remove(LAST_APPLIED);
        Self {
            name: read.name,
            generate_name: some(read.generate_name),
            namespace: some(read.namespace),
            labels: read.labels,
            annotations: read.annotations,
            uid: some(read.uid),
            resource_version: some(read.resource_version).map(Into::into),
            generation: Some(read.generation).filter(|generation| *generation != 0),
            creation_timestamp: instant(read.creation),
            deletion_timestamp: instant(read.deletion),
            deletion_grace_period_seconds: read.deletion_grace_period,
            finalizers: read.finalizers,
            owner_references: read.owners.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }
}

impl From<Owner> for OwnerReference {
    fn from(read: Owner) -> Self {
        Self {
            api_version: read.api_version,
            kind: read.kind,
            name: read.name,
            uid: read.uid,
            controller: read.controller,
            block_owner_deletion: read.block_owner_deletion,
        }
    }
}

impl From<Container> for core::Container {
    fn from(read: Container) -> Self {
        let ports: Vec<_> = read.ports.into_iter().map(Into::into).collect();
        Self {
            name: read.name,
            ports: (!ports.is_empty()).then_some(ports),
            ..Self::default()
        }
    }
}

impl From<Port> for core::ContainerPort {
    fn from(read: Port) -> Self {
        Self {
            name: some(read.name),
            host_port: Some(read.host_port).filter(|port| *port != 0),
            container_port: read.container_port,
            protocol: some(read.protocol),
            host_ip: some(read.host_ip),
        }
    }
}

impl From<State> for PodStatus {
    fn from(read: State) -> Self {
        let ips = read.pod_ips.into_iter();
        let ips: Vec<_> = ips.map(|address| core::PodIP { ip: address.ip }).collect();
        Self {
            phase: some(read.phase),
            host_ip: some(read.host_ip),
            pod_ip: some(read.pod_ip),
            pod_ips: (!ips.is_empty()).then_some(ips),
            ..Self::default()
        }
    }
}

impl From<Object> for Item {
    fn from(read: Object) -> Self {
        let spec = read.spec.unwrap_or_default();
        let pod: Pod = Resource {
            metadata: read.metadata.unwrap_or_default().into(),
            spec: PodSpec {
                node_name: some(spec.node_name),
                service_account_name: some(spec.service_account_name),
                host_network: spec.host_network.then_some(true),
                containers: spec.containers.into_iter().map(Into::into).collect(),
                ..PodSpec::default()
            },
            status: read.status.map(Into::into),
        };
        Self::Pod(Box::new(pod))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the server sends it.
    fn sealed(message: &impl Message) -> Bytes {
        let unknown = Unknown {
            raw: message.encode_to_vec().into(),
        };
        [MAGIC, &unknown.encode_to_vec()].concat().into()
    }

    #[test]
    fn a_refusal_says_why_and_where_the_list_goes_on() {
        let refusal = Refusal {
            metadata: Some(ListMetadata {
                resource_version: String::new(),
                next: "token".to_owned(),
            }),
            message: "The provided continue parameter is too old".to_owned(),
            reason: "Expired".to_owned(),
            code: 410,
        };
        let status = status(sealed(&refusal)).expect("a status");
        assert_eq!((status.code, status.reason.as_str()), (410, "Expired"));
        assert_eq!(status.message, refusal.message);
        let next = status.metadata.and_then(|metadata| metadata.continue_);
        assert_eq!(next.as_deref(), Some("token"));
    }

    #[test]
    fn the_next_page_is_as_large_as_it_may_be() {
        let list = |octets: usize| {
            let pod = Object {
                metadata: Some(Metadata {
                    name: "p".repeat(octets),
                    ..Metadata::default()
                }),
                ..Object::default()
            };
            let items = vec![pod; 10];
            let list = List {
                metadata: None,
                items,
            };
            pods(sealed(&list)).expect("a list").next_limit()
        };
        assert_eq!(list(1), 10_000);
        assert!((3_900..4_200).contains(&list(4_096)), "{}", list(4_096));
        assert_eq!(list(100_000), 500);
    }

    #[test]
    fn what_is_cut_off_or_something_else_is_an_error_and_no_list() {
        let list = List {
            metadata: Some(ListMetadata::default()),
            items: vec![Object {
                metadata: Some(Metadata {
                    name: "web".to_owned(),
                    ..Metadata::default()
                }),
                ..Object::default()
            }],
        };
        let whole = sealed(&list);
        assert_eq!(pods(whole.clone()).expect("a list").items.len(), 1);
        for length in MAGIC.len() + 1..whole.len() {
            assert!(pods(whole.slice(..length)).is_err(), "{length}");
        }
        assert!(pods(Bytes::from_static(b"<html>")).is_err());
    }
}
