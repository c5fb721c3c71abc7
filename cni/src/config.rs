//! The network configuration that the runtime gives on standard input: the keys that matter here. Pure.
//!
//! Calico's other keys (datastore access, logging, `policy`, `kubernetes`) are accepted and mean nothing, because the
//! plugin only talks to the node's server. Unknown keys are ignored, as the specification asks.

use cali_control::cni::Failure;
use serde::Deserialize;
use serde_json::Value;

use crate::spec::{DEFAULT_VERSION, VERSIONS, code, failure};

/// `ipam.type` of the addresses that are managed here.
const MANAGED_HERE: &str = "calico-ipam";

/// A network configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Config {
    /// Version of the specification.
    #[serde(rename = "cniVersion", default = "default_version")]
    pub cni_version: String,
    /// Name of the network; first part of the handles of addresses.
    #[serde(default)]
    pub name: String,
    /// MTU of the pods' interfaces; 0: what the node's daemon has written.
    #[serde(default)]
    pub mtu: u32,
    /// Refuse `ADD` while the node's daemon has not written an MTU.
    #[serde(default)]
    pub require_mtu_file: bool,
    /// Address management.
    #[serde(default)]
    pub ipam: Ipam,
    /// Settings of the pod's namespace.
    #[serde(default)]
    pub container_settings: ContainerSettings,
    /// Gates of two annotations.
    #[serde(default)]
    pub feature_control: FeatureControl,
    /// What the runtime asks for beyond the list, by the capabilities that the list names.
    #[serde(rename = "runtimeConfig", default)]
    pub runtime_config: RuntimeConfig,
    /// Longest wait for policy and route, in seconds; 0: the built-in limit.
    #[serde(default)]
    pub policy_setup_timeout_seconds: u64,
    /// Result of the `ADD`, for `CHECK` and `DEL`.
    #[serde(rename = "prevResult", default)]
    pub prev_result: Option<Value>,
    /// What `GC` has to leave alone.
    #[serde(rename = "cni.dev/valid-attachments", default)]
    pub valid_attachments: Option<Vec<Attachment>>,
}

/// Address management.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct Ipam {
    /// `calico-ipam`, or nothing; else the name of another IPAM plugin.
    #[serde(rename = "type", default)]
    pub type_: Option<String>,
    /// `"true"` unless said otherwise.
    #[serde(default)]
    pub assign_ipv4: Option<Switch>,
    /// `"false"` unless said otherwise.
    #[serde(default)]
    pub assign_ipv6: Option<Switch>,
    /// Pools by name or CIDR.
    #[serde(default)]
    pub ipv4_pools: Vec<String>,
    /// Pools by name or CIDR.
    #[serde(default)]
    pub ipv6_pools: Vec<String>,
}

/// Calico writes its switches as texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Switch(pub bool);

impl TryFrom<Value> for Switch {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match &value {
            Value::Bool(on) => Ok(Self(*on)),
            Value::String(text) if text.eq_ignore_ascii_case("true") => Ok(Self(true)),
            Value::String(text) if text.eq_ignore_ascii_case("false") => Ok(Self(false)),
            other => Err(format!("{other} is neither \"true\" nor \"false\"")),
        }
    }
}

/// Settings of the pod's namespace.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct ContainerSettings {
    /// Whether the pod may forward packets.
    #[serde(default)]
    pub allow_ip_forwarding: bool,
}

/// Gates of two annotations.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct FeatureControl {
    /// `cni.projectcalico.org/ipAddrsNoIpam`.
    #[serde(default)]
    pub ip_addrs_no_ipam: bool,
    /// `cni.projectcalico.org/floatingIPs`.
    #[serde(default)]
    pub floating_ips: bool,
}

/// What the runtime fills in for the capabilities of the list (CNI conventions, "dynamic plugin specific fields").
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct RuntimeConfig {
    /// Capability `portMappings`: ports of the host that lead to the container.
    #[serde(rename = "portMappings", default)]
    pub port_mappings: Option<Vec<AskedPort>>,
    /// Capability `bandwidth`.
    #[serde(default)]
    pub bandwidth: Option<Bandwidth>,
    /// Capability `mac`: Ethernet address of the container's interface.
    #[serde(default)]
    pub mac: Option<String>,
}

/// Limits of a container's traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Bandwidth {
    /// Bits per second towards the container; 0: no limit.
    pub ingress_rate: u64,
    /// Bits at once.
    pub ingress_burst: u64,
    /// Bits per second from the container; 0: no limit.
    pub egress_rate: u64,
    /// Bits at once.
    pub egress_burst: u64,
}

/// One wish of `portMappings`, as written; [`crate::nat::ports`] judges it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AskedPort {
    /// Port of the host.
    #[serde(rename = "hostPort")]
    pub host_port: i64,
    /// Port of the container.
    #[serde(rename = "containerPort")]
    pub container_port: i64,
    /// `tcp`, `udp` or `sctp`; TCP if empty.
    #[serde(default)]
    pub protocol: String,
    /// Address of the host; all if empty.
    #[serde(rename = "hostIP", default)]
    pub host_ip: String,
}

/// One interface of one container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// The name of an executable in one of the folders of `CNI_PATH`, and not this one.
fn is_plugin_name(name: &str) -> bool {
    !name.is_empty() && name != "calico" && !name.contains(['/', '\0']) && !name.starts_with('.')
}

fn default_version() -> String {
    DEFAULT_VERSION.to_owned()
}

impl Config {
    /// Reads a configuration.
    pub fn read(value: &Value) -> Result<Self, Failure> {
        if !value.is_object() {
            let msg = "the network configuration is not a JSON object";
            return Err(failure(code::DECODING, msg));
        }
        let config: Self = Deserialize::deserialize(value).map_err(|e| {
            failure(
                code::DECODING,
                format!("the network configuration is not valid: {e}"),
            )
        })?;
        if !VERSIONS.contains(&config.cni_version.as_str()) {
            let msg = format!(
                "cniVersion {:?} is not spoken; known are {}",
                config.cni_version,
                VERSIONS.join(", ")
            );
            return Err(failure(code::INCOMPATIBLE_VERSION, msg));
        }
        if config.name.is_empty() {
            return Err(failure(
                code::CONFIGURATION,
                "the network configuration has no name",
            ));
        }
        match config.delegate() {
            Some(name) if !is_plugin_name(name) => Err(failure(
                code::CONFIGURATION,
                format!("ipam.type is {name:?}, which is not the name of an IPAM plugin"),
            )),
            _ => Ok(config),
        }
    }

    /// The other IPAM plugin that manages addresses; none where they are managed here.
    pub fn delegate(&self) -> Option<&str> {
        let name = self.ipam.type_.as_deref()?;
        (name != MANAGED_HERE).then_some(name)
    }

    /// The handle of a container's addresses. The first interface has Calico's; further ones add their name.
    pub fn handle(&self, container_id: &str, ifname: &str) -> String {
        let handle = format!("{}.{container_id}", self.name);
        if ifname == cali_api::kubernetes::POD_INTERFACE {
            handle
        } else {
            format!("{handle}.{ifname}")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn calicos_configuration_is_read() {
        let config = Config::read(&json!({
            "cniVersion": "1.0.0", "name": "k8s-pod-network", "type": "calico", "log_level": "info", "mtu": 1450,
            "nodename": "n1", "datastore_type": "kubernetes", "policy": {"type": "k8s"},
            "ipam": {"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": "true", "ipv4_pools": ["10.0.0.0/8"]},
            "container_settings": {"allow_ip_forwarding": true}, "kubernetes": {"kubeconfig": "/x"}
        }))
        .unwrap();
        assert_eq!(config.mtu, 1450);
        assert_eq!(config.ipam.assign_ipv6, Some(Switch(true)));
        assert!(config.container_settings.allow_ip_forwarding);
    }

    #[test]
    fn each_mistake_has_its_code() {
        let code = |value| Config::read(&value).unwrap_err().code;
        assert_eq!(code(json!({"cniVersion": "2.0.0", "name": "n"})), 1);
        assert_eq!(
            code(json!({"cniVersion": "1.0.0", "name": "n", "mtu": "many"})),
            6
        );
        assert_eq!(code(json!({"cniVersion": "1.0.0"})), 7);
        for name in ["", "../x", "calico", "/bin/sh"] {
            let config = json!({"cniVersion": "1.0.0", "name": "n", "ipam": {"type": name}});
            assert_eq!(code(config), 7, "{name}");
        }
    }

    #[test]
    fn another_plugin_may_manage_the_addresses() {
        let of = |ipam| {
            let config = json!({"cniVersion": "1.0.0", "name": "n", "ipam": ipam});
            Config::read(&config).unwrap()
        };
        assert_eq!(of(json!({"type": "calico-ipam"})).delegate(), None);
        assert_eq!(of(json!({})).delegate(), None);
        let local = of(json!({"type": "host-local", "subnet": "usePodCidr"}));
        assert_eq!(local.delegate(), Some("host-local"));
    }

    #[test]
    fn handles_are_calicos() {
        let config =
            Config::read(&json!({"cniVersion": "1.0.0", "name": "k8s-pod-network"})).unwrap();
        assert_eq!(config.handle("abc", "eth0"), "k8s-pod-network.abc");
        assert_eq!(config.handle("abc", "net1"), "k8s-pod-network.abc.net1");
    }
}
