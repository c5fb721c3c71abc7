//! An object of any kind.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::decode::{self, DecodeError};
use crate::metadata::StringMap;
use crate::resource::{NoStatus, Spec};
use crate::schema::{Probe, Stop};
use crate::{Key, Kind, ObjectMeta, Resource, kubernetes, v3};

macro_rules! any_resource {
    ($($kind:ident: $spec:ty, $status:ty $(, $inline:literal)?;)+) => {
        $(
            impl Spec for $spec {
                const KIND: Kind = Kind::$kind;
                $(const INLINE: bool = $inline;)?
                type Status = $status;
            }
        )+

        /// An object of any kind. Calico's kinds hold the types of [`crate::v3`], Kubernetes' own
        /// hold the specifications of `k8s_openapi` with our metadata.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum AnyResource { $($kind(Box<Resource<$spec>>)),+ }

        impl AnyResource {
            /// What it is.
            #[must_use]
            pub fn kind(&self) -> Kind {
                match self { $(Self::$kind(_) => Kind::$kind),+ }
            }

            /// Its name.
            #[must_use]
            pub fn key(&self) -> Key {
                match self { $(Self::$kind(object) => object.key()),+ }
            }

            /// Name, labels and the like.
            #[must_use]
            pub fn metadata(&self) -> &ObjectMeta {
                match self { $(Self::$kind(object) => &object.metadata),+ }
            }

            /// Name, labels and the like.
            pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
                match self { $(Self::$kind(object) => &mut object.metadata),+ }
            }

            fn decode(kind: Kind, fields: Map<String, Value>) -> Result<Self, DecodeError> {
                match kind { $(Kind::$kind => decode::resource(fields).map(|object| Self::$kind(Box::new(object)))),+ }
            }
        }

        /// Asks the specification's type of a kind what it reads.
        pub(crate) fn probe_spec(kind: Kind, probe: Probe<'_>) -> Result<(), Stop> {
            match kind { $(Kind::$kind => <$spec>::deserialize(probe).map(drop)),+ }
        }

        /// Asks the status' type of a kind what it reads.
        pub(crate) fn probe_status(kind: Kind, probe: Probe<'_>) -> Result<(), Stop> {
            match kind { $(Kind::$kind => <$status>::deserialize(probe).map(drop)),+ }
        }

        $(
            impl From<Resource<$spec>> for AnyResource {
                fn from(object: Resource<$spec>) -> Self {
                    Self::$kind(Box::new(object))
                }
            }

            impl TryFrom<AnyResource> for Resource<$spec> {
                type Error = AnyResource;

                /// The object, if it is of this kind; otherwise what was given.
                fn try_from(any: AnyResource) -> Result<Self, AnyResource> {
                    match any {
                        AnyResource::$kind(object) => Ok(*object),
                        other => Err(other),
                    }
                }
            }

            impl<'a> TryFrom<&'a AnyResource> for &'a Resource<$spec> {
                type Error = Kind;

                /// The object, if it is of this kind; otherwise the kind that it is of.
                fn try_from(any: &'a AnyResource) -> Result<Self, Kind> {
                    match any {
                        AnyResource::$kind(object) => Ok(object),
                        other => Err(other.kind()),
                    }
                }
            }
        )+

        impl Serialize for AnyResource {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self { $(Self::$kind(object) => object.serialize(serializer)),+ }
            }
        }
    };
}

any_resource! {
    BGPConfiguration: v3::BGPConfigurationSpec, NoStatus;
    BGPFilter: v3::BGPFilterSpec, NoStatus;
    BGPPeer: v3::BGPPeerSpec, v3::ConditionsStatus;
    BlockAffinity: v3::BlockAffinitySpec, NoStatus;
    CalicoNodeStatus: v3::CalicoNodeStatusSpec, v3::CalicoNodeStatusStatus;
    ClusterInformation: v3::ClusterInformationSpec, NoStatus;
    FelixConfiguration: v3::FelixConfigurationSpec, NoStatus;
    GlobalNetworkPolicy: v3::GlobalNetworkPolicySpec, NoStatus;
    GlobalNetworkSet: v3::GlobalNetworkSetSpec, NoStatus;
    HostEndpoint: v3::HostEndpointSpec, NoStatus;
    IPAMBlock: v3::IPAMBlockSpec, NoStatus;
    IPAMConfiguration: v3::IPAMConfigurationSpec, NoStatus;
    IPAMHandle: v3::IPAMHandleSpec, NoStatus;
    IPPool: v3::IPPoolSpec, v3::ConditionsStatus;
    IPReservation: v3::IPReservationSpec, NoStatus;
    KubeControllersConfiguration: v3::KubeControllersConfigurationSpec, v3::KubeControllersConfigurationStatus;
    NetworkPolicy: v3::NetworkPolicySpec, NoStatus;
    NetworkSet: v3::NetworkSetSpec, NoStatus;
    Node: v3::NodeSpec, v3::NodeStatus;
    Profile: v3::ProfileSpec, NoStatus;
    StagedGlobalNetworkPolicy: v3::StagedGlobalNetworkPolicySpec, NoStatus;
    StagedKubernetesNetworkPolicy: v3::StagedKubernetesNetworkPolicySpec, NoStatus;
    StagedNetworkPolicy: v3::StagedNetworkPolicySpec, NoStatus;
    Tier: v3::TierSpec, v3::ConditionsStatus;
    WorkloadEndpoint: v3::WorkloadEndpointSpec, NoStatus;
    K8sAdminNetworkPolicy: kubernetes::AdminNetworkPolicySpec, Value;
    K8sBaselineAdminNetworkPolicy: kubernetes::BaselineAdminNetworkPolicySpec, Value;
    K8sClusterNetworkPolicy: kubernetes::ClusterNetworkPolicySpec, Value;
    K8sEndpointSlice: kubernetes::EndpointSliceSpec, NoStatus, true;
    K8sNamespace: kubernetes::NamespaceSpec, kubernetes::NamespaceStatus;
    K8sNetworkPolicy: kubernetes::NetworkPolicySpec, NoStatus;
    K8sNode: kubernetes::NodeSpec, kubernetes::NodeStatus;
    K8sPod: kubernetes::PodSpec, kubernetes::PodStatus;
    K8sService: kubernetes::ServiceSpec, kubernetes::ServiceStatus;
    K8sServiceAccount: kubernetes::ServiceAccountSpec, NoStatus, true;
}

impl AnyResource {
    /// The object's labels.
    #[must_use]
    pub fn labels(&self) -> &StringMap {
        &self.metadata().labels
    }

    /// Reads an object from the text or bytes of its JSON form.
    pub fn from_slice(json: &[u8]) -> Result<Self, DecodeError> {
        let value = serde_json::from_slice(json)
            .map_err(|error| DecodeError::new("", error.to_string()))?;
        Self::from_json(value)
    }

    /// Reads an object from its JSON form.
    pub fn from_json(value: Value) -> Result<Self, DecodeError> {
        let Value::Object(fields) = value else {
            return Err(DecodeError::new(
                "",
                "an object must be a map with apiVersion, kind, metadata and spec",
            ));
        };
        let text = |name: &str| match fields.get(name) {
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(_) => Err(DecodeError::new(name, "must be a text")),
            None => Err(DecodeError::new(name, "is missing")),
        };
        let (api_version, kind) = (text("apiVersion")?, text("kind")?);
        let known = Kind::from_type_meta(api_version, kind)
            .ok_or_else(|| decode::unknown_kind(api_version, kind))?;
        Self::decode(known, fields)
    }

    /// The JSON form.
    #[must_use]
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }
}

impl<'de> Deserialize<'de> for AnyResource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_json(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
