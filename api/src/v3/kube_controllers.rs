//! KubeControllersConfiguration.

use serde::{Deserialize, Serialize};

use super::{GoDuration, LogLevel, Toggle};
use crate::Cidr;
use crate::metadata::StringMap;
use crate::text::text_enum;

/// Settings of the cluster-wide controllers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeControllersConfigurationSpec {
    /// Level of the log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_severity_screen: Option<LogLevel>,
    /// Whether health is reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_checks: Option<Toggle>,
    /// Time between compactions of etcd.
    #[serde(
        rename = "etcdV3CompactionPeriod",
        skip_serializing_if = "Option::is_none"
    )]
    pub etcd_v3_compaction_period: Option<GoDuration>,
    /// Port of the metrics server; 0 switches it off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prometheus_metrics_port: Option<u16>,
    /// The controllers; an absent one is off.
    pub controllers: ControllersConfig,
    /// Port of the profiler; absent means off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debug_profile_port: Option<u16>,
}

/// The controllers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ControllersConfig {
    /// Cleans up after nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeControllerConfig>,
    /// Copies Kubernetes policies (etcd only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<ReconcilerConfig>,
    /// Copies pod labels (etcd only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload_endpoint: Option<ReconcilerConfig>,
    /// Copies service accounts (etcd only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<ReconcilerConfig>,
    /// Copies namespaces (etcd only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<ReconcilerConfig>,
    /// Gives addresses to LoadBalancer services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancerControllerConfig>,
    /// Renames policies of older versions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_migration: Option<MigrationControllerConfig>,
}

/// Settings of the node controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeControllerConfig {
    /// Time between full passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconciler_period: Option<GoDuration>,
    /// Whether node labels are copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_labels: Option<Toggle>,
    /// Host endpoints made for nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_endpoint: Option<AutoHostEndpointConfig>,
    /// How long an address without owner is kept; 0 keeps it for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leak_grace_period: Option<GoDuration>,
}

/// Host endpoints made for nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AutoHostEndpointConfig {
    /// Whether they are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_create: Option<Toggle>,
    /// Whether each node gets one for all its interfaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub create_default_host_endpoint: Option<Toggle>,
    /// Further ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub templates: Vec<HostEndpointTemplate>,
}

/// How further host endpoints are made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HostEndpointTemplate {
    /// End of the name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub generate_name: String,
    /// Node addresses within these are expected on the interface.
    #[serde(rename = "interfaceCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub interface_cidrs: Vec<Cidr>,
    /// Regular expression for interface names.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub interface_pattern: String,
    /// Labels of the host endpoint.
    #[serde(skip_serializing_if = "StringMap::is_empty")]
    pub labels: StringMap,
    /// The nodes for which it is made.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node_selector: String,
}

/// Settings of a controller that only copies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ReconcilerConfig {
    /// Time between full passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconciler_period: Option<GoDuration>,
}

text_enum! {
    /// Which services get an address.
    pub enum AssignIPs { AllServices = "AllServices", RequestedServicesOnly = "RequestedServicesOnly" }
}

/// Settings of the LoadBalancer controller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadBalancerControllerConfig {
    /// Which services get an address.
    #[serde(rename = "assignIPs", skip_serializing_if = "Option::is_none")]
    pub assign_ips: Option<AssignIPs>,
}

/// Settings of the migration controllers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationControllerConfig {
    /// Whether policies of older versions are renamed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<Toggle>,
}

/// The settings in force.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeControllersConfigurationStatus {
    /// After merging the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running_config: Option<KubeControllersConfigurationSpec>,
    /// The environment variables that had an influence.
    #[serde(skip_serializing_if = "StringMap::is_empty")]
    pub environment_vars: StringMap,
}
