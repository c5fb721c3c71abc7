//! The kinds of objects and the keys that name single ones.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::text::serde_as_text;

/// Group and version of Calico's resources.
pub const CALICO_API_VERSION: &str = "projectcalico.org/v3";

macro_rules! kinds {
    ($($variant:ident = $version:literal $kind:literal $plural:literal $namespaced:literal [$($alias:literal),*]),+ $(,)?) => {
        /// What an object is: Calico's kinds, and the native Kubernetes ones (`K8s...`) that are
        /// converted to them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs)]
        pub enum Kind { $($variant),+ }

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// `kind` in a manifest. `Node` and `NetworkPolicy` name a Calico and a native kind.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $kind),+ }
            }

            /// `apiVersion` in a manifest.
            #[must_use]
            pub const fn api_version(self) -> &'static str {
                match self { $(Self::$variant => $version),+ }
            }

            /// The lower-case plural in paths and keys.
            #[must_use]
            pub const fn plural(self) -> &'static str {
                match self { $(Self::$variant => $plural),+ }
            }

            /// Whether objects of this kind live in a namespace.
            #[must_use]
            pub const fn is_namespaced(self) -> bool {
                match self { $(Self::$variant => $namespaced),+ }
            }

            const fn aliases(self) -> &'static [&'static str] {
                match self { $(Self::$variant => &[$($alias),*]),+ }
            }

            const fn text(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant)),+ }
            }
        }
    };
}

kinds! {
    BGPConfiguration = "projectcalico.org/v3" "BGPConfiguration" "bgpconfigurations" false ["bgpconfig", "bgpconfigs"],
    BGPFilter = "projectcalico.org/v3" "BGPFilter" "bgpfilters" false ["bgpf", "bgpfs", "bf", "bfs"],
    BGPPeer = "projectcalico.org/v3" "BGPPeer" "bgppeers" false ["bgpp", "bgpps", "bp", "bps"],
    BlockAffinity = "projectcalico.org/v3" "BlockAffinity" "blockaffinities" false ["affinity", "affinities"],
    CalicoNodeStatus = "projectcalico.org/v3" "CalicoNodeStatus" "caliconodestatuses" false ["nodestatus", "nodestatuses"],
    ClusterInformation = "projectcalico.org/v3" "ClusterInformation" "clusterinformations" false ["clusterinfo", "clusterinfos"],
    FelixConfiguration = "projectcalico.org/v3" "FelixConfiguration" "felixconfigurations" false ["felixconfig", "felixconfigs"],
    GlobalNetworkPolicy = "projectcalico.org/v3" "GlobalNetworkPolicy" "globalnetworkpolicies" false ["gnp", "gnps", "cgnp"],
    GlobalNetworkSet = "projectcalico.org/v3" "GlobalNetworkSet" "globalnetworksets" false ["gns", "gnetset", "gnetsets"],
    HostEndpoint = "projectcalico.org/v3" "HostEndpoint" "hostendpoints" false ["hep", "heps"],
    IPAMBlock = "projectcalico.org/v3" "IPAMBlock" "ipamblocks" false [],
    IPAMConfiguration = "projectcalico.org/v3" "IPAMConfiguration" "ipamconfigurations" false ["ipamconfig", "ipamconfigs"],
    IPAMHandle = "projectcalico.org/v3" "IPAMHandle" "ipamhandles" false [],
    IPPool = "projectcalico.org/v3" "IPPool" "ippools" false ["ipp", "ipps", "pool", "pools"],
    IPReservation = "projectcalico.org/v3" "IPReservation" "ipreservations" false ["reservation", "reservations"],
    KubeControllersConfiguration = "projectcalico.org/v3" "KubeControllersConfiguration" "kubecontrollersconfigurations" false ["kcc", "kccs", "kubecontrollersconfig", "kubecontrollersconfigs"],
    NetworkPolicy = "projectcalico.org/v3" "NetworkPolicy" "networkpolicies" true ["policy", "policies", "np", "nps", "pol", "pols", "cnp", "caliconetworkpolicy"],
    NetworkSet = "projectcalico.org/v3" "NetworkSet" "networksets" true ["netset", "netsets"],
    Node = "projectcalico.org/v3" "Node" "nodes" false ["no", "nos"],
    Profile = "projectcalico.org/v3" "Profile" "profiles" false ["pro", "pros"],
    StagedGlobalNetworkPolicy = "projectcalico.org/v3" "StagedGlobalNetworkPolicy" "stagedglobalnetworkpolicies" false ["sgnp", "sgnps"],
    StagedKubernetesNetworkPolicy = "projectcalico.org/v3" "StagedKubernetesNetworkPolicy" "stagedkubernetesnetworkpolicies" true ["sknp", "sknps", "skpol", "skpols"],
    StagedNetworkPolicy = "projectcalico.org/v3" "StagedNetworkPolicy" "stagednetworkpolicies" true ["snp", "snps", "scnp", "spol", "spols"],
    Tier = "projectcalico.org/v3" "Tier" "tiers" false [],
    WorkloadEndpoint = "projectcalico.org/v3" "WorkloadEndpoint" "workloadendpoints" true ["wep", "weps"],
    K8sAdminNetworkPolicy = "policy.networking.k8s.io/v1alpha1" "AdminNetworkPolicy" "adminnetworkpolicies" false ["anp", "anps"],
    K8sBaselineAdminNetworkPolicy = "policy.networking.k8s.io/v1alpha1" "BaselineAdminNetworkPolicy" "baselineadminnetworkpolicies" false ["banp", "banps"],
    K8sClusterNetworkPolicy = "policy.networking.k8s.io/v1alpha2" "ClusterNetworkPolicy" "clusternetworkpolicies" false ["kcnp", "kcnps"],
    K8sEndpointSlice = "discovery.k8s.io/v1" "EndpointSlice" "endpointslices" true [],
    K8sNamespace = "v1" "Namespace" "namespaces" false ["ns"],
    K8sNetworkPolicy = "networking.k8s.io/v1" "NetworkPolicy" "networkpolicies" true ["knp", "knps", "k8snetworkpolicy", "k8snetworkpolicies", "networkpolicy.networking.k8s.io", "networkpolicies.networking.k8s.io"],
    K8sNode = "v1" "Node" "nodes" false ["k8snode", "k8snodes"],
    K8sPod = "v1" "Pod" "pods" true ["po"],
    K8sService = "v1" "Service" "services" true ["svc"],
    K8sServiceAccount = "v1" "ServiceAccount" "serviceaccounts" true ["sa"],
}

impl Kind {
    /// Whether the kind is Kubernetes' own.
    #[must_use]
    pub const fn is_native(self) -> bool {
        matches!(
            self,
            Self::K8sAdminNetworkPolicy
                | Self::K8sBaselineAdminNetworkPolicy
                | Self::K8sClusterNetworkPolicy
                | Self::K8sEndpointSlice
                | Self::K8sNamespace
                | Self::K8sNetworkPolicy
                | Self::K8sNode
                | Self::K8sPod
                | Self::K8sService
                | Self::K8sServiceAccount
        )
    }

    /// The kind that a user means: kind, plural or short name, in any case. Where Calico and
    /// Kubernetes share a name, Calico's is meant.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        Self::ALL.iter().copied().find(|kind| {
            kind.name().eq_ignore_ascii_case(&text)
                || kind.plural() == text
                || kind.aliases().contains(&text.as_str())
        })
    }

    /// The kind that a manifest means. Both groups under which Calico's kinds are served are read.
    #[must_use]
    pub fn from_type_meta(api_version: &str, kind: &str) -> Option<Self> {
        let api_version = match api_version {
            "crd.projectcalico.org/v1" => CALICO_API_VERSION,
            other => other,
        };
        Self::ALL
            .iter()
            .copied()
            .find(|known| known.api_version() == api_version && known.name() == kind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.text())
    }
}

/// A text that names no kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a kind of resource")]
pub struct UnknownKind(pub String);

/// Reads what `Display` writes, so that native and Calico kinds stay apart.
impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .iter()
            .copied()
            .find(|kind| kind.text() == text)
            .ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

serde_as_text!(Kind, "a kind of resource");

/// The name of one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// What it is.
    pub kind: Kind,
    /// Where it lives; set exactly for namespaced kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    /// Its name.
    pub name: Arc<str>,
}

impl Key {
    /// The key of a cluster-scoped object.
    #[must_use]
    pub fn cluster(kind: Kind, name: impl Into<Arc<str>>) -> Self {
        Self {
            kind,
            namespace: None,
            name: name.into(),
        }
    }

    /// The key of an object in a namespace.
    #[must_use]
    pub fn namespaced(
        kind: Kind,
        namespace: impl Into<Arc<str>>,
        name: impl Into<Arc<str>>,
    ) -> Self {
        Self {
            kind,
            namespace: Some(namespace.into()),
            name: name.into(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{}({namespace}/{})", self.kind, self.name),
            None => write!(f, "{}({})", self.kind, self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_by_each_of_its_names() {
        for kind in Kind::ALL.iter().copied() {
            assert_eq!(
                Kind::from_type_meta(kind.api_version(), kind.name()),
                Some(kind)
            );
            assert_eq!(kind.to_string().parse(), Ok(kind));
            for alias in kind.aliases() {
                assert_eq!(Kind::parse(alias), Some(kind), "{alias}");
            }
            let shared = matches!(kind, Kind::K8sNode | Kind::K8sNetworkPolicy);
            assert_eq!(Kind::parse(kind.plural()) == Some(kind), !shared, "{kind}");
        }
    }

    #[test]
    fn crd_group_names_the_same_kinds() {
        assert_eq!(
            Kind::from_type_meta("crd.projectcalico.org/v1", "IPPool"),
            Some(Kind::IPPool)
        );
        assert_eq!(Kind::from_type_meta("apps/v1", "IPPool"), None);
    }

    #[test]
    fn keys_read_as_kind_and_place() {
        assert_eq!(
            Key::namespaced(Kind::NetworkPolicy, "ns", "web").to_string(),
            "NetworkPolicy(ns/web)"
        );
        assert_eq!(Key::cluster(Kind::Node, "node1").to_string(), "Node(node1)");
    }
}
