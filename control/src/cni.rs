//! Calls of the CNI plugin to `cali-node`.
//!
//! One connection is one call: `Hello` both ways, one [`Request`], one [`Response`]. The plugin opens the network
//! namespace itself and passes the descriptor (`SCM_RIGHTS`, with the first byte of the connection), so that the
//! server trusts no path. The socket has mode 0600 and the server checks the peer's uid (`SO_PEERCRED`).

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Name in the [`crate::Hello`].
pub const PROTOCOL: &str = "cali-cni";
/// Version of this protocol.
pub const VERSION: u32 = 1;

/// The byte that precedes the first frame; a namespace descriptor may travel with it.
pub const WITH_NAMESPACE: u8 = b'N';
/// The byte that precedes the first frame where there is no namespace (`DEL` of a vanished sandbox, `STATUS`, `GC`).
pub const WITHOUT_NAMESPACE: u8 = b'-';

/// `CNI_COMMAND` (CNI specification 1.1, "CNI operations").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    /// Not the runtime's: the plugin asks for the ranges that Kubernetes gave to the node. The answer is a list of texts.
    PodCidrs,
}

/// Which executable was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Plugin {
    /// `calico`: interface, address, routes, policy.
    Network,
    /// `calico-ipam`: address only.
    Ipam,
}

/// One call, as the runtime made it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub plugin: Plugin,
    pub command: Command,
    /// `CNI_CONTAINERID`; empty for `STATUS` and `GC`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_NETNS` as given, for results and messages only; the descriptor is what is used.
    pub netns: String,
    /// `CNI_ARGS`, split (`K8S_POD_NAMESPACE`, `K8S_POD_NAME`, `K8S_POD_UID`, ...).
    pub args: BTreeMap<String, String>,
    /// The network configuration from standard input.
    pub config: serde_json::Value,
    /// `ADD`: the addresses that another IPAM plugin gave; none where the server manages them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegated: Option<Vec<IpAddr>>,
}

/// The answer: what the plugin prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// Result to print on standard output; `null` where the operation prints nothing.
    Ok(serde_json::Value),
    Err(Failure),
}

/// CNI error object, without its `cniVersion`, which the plugin adds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// CNI specification, "Error": 1–99 reserved (4 environment, 6 decoding, 7 configuration, 11 try again,
    /// 50 and 51 not available), 100 and above ours.
    pub code: u32,
    pub msg: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}
