//! The native kinds. Specifications are those of `k8s_openapi`; the two kinds that have none get
//! one that holds their top-level fields.

pub use k8s_openapi::api::core::v1::{
    LoadBalancerIngress, LoadBalancerStatus, NamespaceSpec, NamespaceStatus, NodeSpec, NodeStatus,
    PodSpec, PodStatus, ServiceSpec, ServiceStatus,
};
use k8s_openapi::api::core::v1::{LocalObjectReference, ObjectReference};
pub use k8s_openapi::api::discovery::v1::Endpoint;
use k8s_openapi::api::discovery::v1::EndpointPort;
pub use k8s_openapi::api::networking::v1::NetworkPolicySpec;
use serde::{Deserialize, Serialize};

use crate::Resource;

/// A pod.
pub type Pod = Resource<PodSpec>;
/// A namespace.
pub type Namespace = Resource<NamespaceSpec>;
/// A node.
pub type Node = Resource<NodeSpec>;
/// A service account.
pub type ServiceAccount = Resource<ServiceAccountSpec>;
/// A policy of `networking.k8s.io/v1`.
pub type NetworkPolicy = Resource<NetworkPolicySpec>;
/// A service.
pub type Service = Resource<ServiceSpec>;
/// A part of a service's endpoints.
pub type EndpointSlice = Resource<EndpointSliceSpec>;

/// The fields of a ServiceAccount beside its metadata.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceAccountSpec {
    /// Whether pods get a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub automount_service_account_token: Option<bool>,
    /// Secrets for pulling images.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Secrets that pods may mount.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<ObjectReference>,
}

/// The fields of an EndpointSlice beside its metadata.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSliceSpec {
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: String,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Their ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<EndpointPort>,
}
