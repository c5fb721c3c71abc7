//! Where the API server keeps each kind. Pure.

use cali_api::Kind;

/// The group under which a cluster serves Calico's kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// `crd.projectcalico.org/v1`: what Calico's manifests install.
    Internal,
    /// `projectcalico.org/v3` as custom resources.
    Native,
}

impl Group {
    /// Which one to use, from `CALICO_API_GROUP` and the groups that are served. With both, `projectcalico.org/v3` is
    /// Calico's aggregated API server, which only hands through what lies in the other.
    pub(super) fn choose(wish: Option<&str>, served: impl Fn(&str, &str) -> bool) -> Option<Self> {
        let internal = served("crd.projectcalico.org", "v1");
        let native = served("projectcalico.org", "v3");
        match wish {
            Some(wish) if wish.starts_with("crd.projectcalico.org") => {
                internal.then_some(Self::Internal)
            }
            Some(wish) if wish.starts_with("projectcalico.org") => native.then_some(Self::Native),
            _ if internal => Some(Self::Internal),
            _ => native.then_some(Self::Native),
        }
    }

    const fn version(self) -> &'static str {
        match self {
            Self::Internal => "crd.projectcalico.org/v1",
            Self::Native => "projectcalico.org/v3",
        }
    }
}

/// A resource of the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) version: &'static str,
    /// `kind` in the API server's objects.
    pub(super) name: &'static str,
    plural: &'static str,
    namespaced: bool,
}

impl Place {
    /// The path of the collection, in one namespace or in all.
    pub(super) fn path(&self, namespace: Option<&str>) -> String {
        let root = if self.version == "v1" {
            "/api"
        } else {
            "/apis"
        };
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => format!(
                "{root}/{}/namespaces/{namespace}/{}",
                self.version, self.plural
            ),
            None => format!("{root}/{}/{}", self.version, self.plural),
        }
    }
}

/// The native kinds of which objects of this kind are views; empty where the kind is stored itself.
pub(super) fn viewed(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::Node => &[Kind::K8sNode],
        Kind::WorkloadEndpoint => &[Kind::K8sPod],
        Kind::Profile => &[Kind::K8sNamespace, Kind::K8sServiceAccount],
        _ => &[],
    }
}

/// Where objects of a kind that is stored itself lie.
pub(super) fn place(kind: Kind, group: Group) -> Place {
    let (version, name, plural) = match (kind, group) {
        (Kind::IPAMConfiguration, Group::Internal) => {
            (group.version(), "IPAMConfig", "ipamconfigs")
        }
        _ if kind.is_native() => (kind.api_version(), kind.name(), kind.plural()),
        _ => (group.version(), kind.name(), kind.plural()),
    };
    Place {
        version,
        name,
        plural,
        namespaced: kind.is_namespaced(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_the_api_servers() {
        let path = |kind, group, namespace| place(kind, group).path(namespace);
        assert_eq!(
            path(Kind::K8sPod, Group::Internal, Some("a")),
            "/api/v1/namespaces/a/pods"
        );
        assert_eq!(path(Kind::K8sNode, Group::Native, None), "/api/v1/nodes");
        assert_eq!(
            path(Kind::NetworkPolicy, Group::Native, Some("a")),
            "/apis/projectcalico.org/v3/namespaces/a/networkpolicies"
        );
        assert_eq!(
            path(Kind::IPAMConfiguration, Group::Internal, None),
            "/apis/crd.projectcalico.org/v1/ipamconfigs"
        );
        assert_eq!(
            path(Kind::K8sEndpointSlice, Group::Internal, None),
            "/apis/discovery.k8s.io/v1/endpointslices"
        );
    }

    #[test]
    fn the_aggregated_api_is_not_mistaken_for_storage() {
        let both = |_: &str, _: &str| true;
        let native = |group: &str, _: &str| group == "projectcalico.org";
        assert_eq!(Group::choose(None, both), Some(Group::Internal));
        assert_eq!(Group::choose(None, native), Some(Group::Native));
        assert_eq!(
            Group::choose(Some("projectcalico.org/v3"), both),
            Some(Group::Native)
        );
        assert_eq!(
            Group::choose(Some("crd.projectcalico.org/v1"), native),
            None
        );
        assert_eq!(Group::choose(None, |_, _| false), None);
    }
}
