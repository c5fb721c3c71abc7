//! The fixed names by which Kubernetes objects and Calico objects refer to each other.

/// Label of endpoints and sets: the namespace they are in.
pub const LABEL_NAMESPACE: &str = "projectcalico.org/namespace";
/// Label of endpoints: who runs them.
pub const LABEL_ORCHESTRATOR: &str = "projectcalico.org/orchestrator";
/// Label of endpoints: their service account.
pub const LABEL_SERVICE_ACCOUNT: &str = "projectcalico.org/serviceaccount";
/// Label that namespaces and service accounts pass on: their own name.
pub const LABEL_NAME: &str = "projectcalico.org/name";
/// Value of [`LABEL_ORCHESTRATOR`] for pods.
pub const ORCHESTRATOR_KUBERNETES: &str = "k8s";

/// Prefix of labels that endpoints inherit from their namespace.
pub const NAMESPACE_LABEL_PREFIX: &str = "pcns.";
/// Prefix of labels that endpoints inherit from their service account.
pub const SERVICE_ACCOUNT_LABEL_PREFIX: &str = "pcsa.";

/// Prefix of the profiles of namespaces.
pub const NAMESPACE_PROFILE_PREFIX: &str = "kns.";
/// Prefix of the profiles of service accounts.
pub const SERVICE_ACCOUNT_PROFILE_PREFIX: &str = "ksa.";
/// Prefix of the policies made from Kubernetes policies.
pub const NETWORK_POLICY_PREFIX: &str = "knp.default.";
/// Order of the policies made from Kubernetes policies.
pub const NETWORK_POLICY_ORDER: f64 = 1000.0;
/// Prefix of host interfaces of pods.
pub const INTERFACE_PREFIX: &str = "cali";
/// Name of the interface within a pod.
pub const POD_INTERFACE: &str = "eth0";

/// Annotations of pods and namespaces.
pub mod annotation {
    /// Pools to allocate from; JSON list of names or CIDRs.
    pub const IPV4_POOLS: &str = "cni.projectcalico.org/ipv4pools";
    /// Pools to allocate from; JSON list of names or CIDRs.
    pub const IPV6_POOLS: &str = "cni.projectcalico.org/ipv6pools";
    /// Families to allocate; JSON list of `IPv4` and `IPv6`.
    pub const IP_FAMILIES: &str = "cni.projectcalico.org/ipFamilies";
    /// Addresses to allocate; JSON list.
    pub const IP_ADDRS: &str = "cni.projectcalico.org/ipAddrs";
    /// Addresses to use without allocation; JSON list.
    pub const IP_ADDRS_NO_IPAM: &str = "cni.projectcalico.org/ipAddrsNoIpam";
    /// Addresses to translate to the pod's; JSON list.
    pub const FLOATING_IPS: &str = "cni.projectcalico.org/floatingIPs";
    /// Ethernet address to use.
    pub const HW_ADDR: &str = "cni.projectcalico.org/hwAddr";
    /// Further prefixes that the pod may send from; JSON list.
    pub const ALLOWED_SOURCE_PREFIXES: &str = "cni.projectcalico.org/allowedSourcePrefixes";
    /// The pod's address; written by the CNI plugin.
    pub const POD_IP: &str = "cni.projectcalico.org/podIP";
    /// The pod's addresses, comma separated; written by the CNI plugin.
    pub const POD_IPS: &str = "cni.projectcalico.org/podIPs";
    /// The sandbox whose namespace the interface is in; written by the CNI plugin.
    pub const CONTAINER_ID: &str = "cni.projectcalico.org/containerID";
    /// The pod's addresses; written by the AWS plugin.
    pub const AWS_POD_IPS: &str = "vpc.amazonaws.com/pod-ips";
    /// Prefix of the annotations of limits.
    pub const QOS_PREFIX: &str = "qos.projectcalico.org/";
    /// Kubernetes' own limit towards the pod.
    pub const INGRESS_BANDWIDTH: &str = "kubernetes.io/ingress-bandwidth";
    /// Kubernetes' own limit from the pod.
    pub const EGRESS_BANDWIDTH: &str = "kubernetes.io/egress-bandwidth";
    /// Prefix of the annotations in which a Kubernetes Node keeps Calico's fields.
    pub const NODE_PREFIX: &str = "projectcalico.org/";
}
