//! The resources of `projectcalico.org/v3`.
//!
//! Field names, optionality and text forms are Calico's. A field that Calico leaves out when it
//! is empty is left out here as well. Where absence stands for a default, the field is an
//! `Option` and a method of the specification gives the effective value.

mod bgp;
mod bgp_filter;
mod cluster;
mod duration;
mod endpoints;
mod felix;
mod ipam;
mod ippool;
mod kube_controllers;
mod node;
mod node_status;
mod policy;
mod rule;
mod sets;

pub use bgp::*;
pub use bgp_filter::*;
pub use cluster::*;
pub use duration::*;
pub use endpoints::*;
pub use felix::*;
pub use ipam::*;
pub use ippool::*;
pub use kube_controllers::*;
pub use node::*;
pub use node_status::*;
pub use policy::*;
pub use rule::*;
pub use sets::*;

use crate::Resource;
use crate::text::text_enum;

/// An object of kind BGPConfiguration.
pub type BGPConfiguration = Resource<BGPConfigurationSpec>;
/// An object of kind BGPFilter.
pub type BGPFilter = Resource<BGPFilterSpec>;
/// An object of kind BGPPeer.
pub type BGPPeer = Resource<BGPPeerSpec>;
/// An object of kind BlockAffinity.
pub type BlockAffinity = Resource<BlockAffinitySpec>;
/// An object of kind CalicoNodeStatus.
pub type CalicoNodeStatus = Resource<CalicoNodeStatusSpec>;
/// An object of kind ClusterInformation.
pub type ClusterInformation = Resource<ClusterInformationSpec>;
/// An object of kind FelixConfiguration.
pub type FelixConfiguration = Resource<FelixConfigurationSpec>;
/// An object of kind GlobalNetworkPolicy.
pub type GlobalNetworkPolicy = Resource<GlobalNetworkPolicySpec>;
/// An object of kind GlobalNetworkSet.
pub type GlobalNetworkSet = Resource<GlobalNetworkSetSpec>;
/// An object of kind HostEndpoint.
pub type HostEndpoint = Resource<HostEndpointSpec>;
/// An object of kind IPAMBlock.
pub type IPAMBlock = Resource<IPAMBlockSpec>;
/// An object of kind IPAMConfiguration.
pub type IPAMConfiguration = Resource<IPAMConfigurationSpec>;
/// An object of kind IPAMHandle.
pub type IPAMHandle = Resource<IPAMHandleSpec>;
/// An object of kind IPPool.
pub type IPPool = Resource<IPPoolSpec>;
/// An object of kind IPReservation.
pub type IPReservation = Resource<IPReservationSpec>;
/// An object of kind KubeControllersConfiguration.
pub type KubeControllersConfiguration = Resource<KubeControllersConfigurationSpec>;
/// An object of kind NetworkPolicy.
pub type NetworkPolicy = Resource<NetworkPolicySpec>;
/// An object of kind NetworkSet.
pub type NetworkSet = Resource<NetworkSetSpec>;
/// An object of kind Node.
pub type Node = Resource<NodeSpec>;
/// An object of kind Profile.
pub type Profile = Resource<ProfileSpec>;
/// An object of kind StagedGlobalNetworkPolicy.
pub type StagedGlobalNetworkPolicy = Resource<StagedGlobalNetworkPolicySpec>;
/// An object of kind StagedKubernetesNetworkPolicy.
pub type StagedKubernetesNetworkPolicy = Resource<StagedKubernetesNetworkPolicySpec>;
/// An object of kind StagedNetworkPolicy.
pub type StagedNetworkPolicy = Resource<StagedNetworkPolicySpec>;
/// An object of kind Tier.
pub type Tier = Resource<TierSpec>;
/// An object of kind WorkloadEndpoint.
pub type WorkloadEndpoint = Resource<WorkloadEndpointSpec>;

text_enum! {
    /// A switch.
    pub enum Toggle { Enabled = "Enabled", Disabled = "Disabled" }
}

/// For `skip_serializing_if` of fields that Calico leaves out when they are zero.
#[allow(clippy::trivially_copy_pass_by_ref)]
pub(crate) fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
