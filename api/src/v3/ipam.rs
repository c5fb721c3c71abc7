//! IPAMBlock, BlockAffinity, IPAMHandle, IPAMConfiguration and IPReservation.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Toggle;
use crate::metadata::StringMap;
use crate::text::{serde_as_text, text_enum};
use crate::{Cidr, Net};

/// Kubernetes limits object names to 253 characters.
const MAX_NAME: usize = 253;

/// The name of a block: `10.0.0.0/26` as `10-0-0-0-26`.
#[must_use]
pub fn block_name(cidr: &Cidr) -> String {
    cidr.to_string().replace(['.', ':', '/'], "-")
}

/// The name of a node's affinity to a block. Names that would be too long are cut and get a digest
/// (libcalico-go, `blockAffinityClient.parseKey`).
#[must_use]
pub fn affinity_name(node: &str, cidr: &Cidr) -> String {
    use sha2::Digest as _;
    let block = block_name(cidr);
    let name = format!("{node}-{block}");
    if name.len() < MAX_NAME {
        return name;
    }
    let digest: String = sha2::Sha256::digest(format!("{node}+{block}").as_bytes())
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .take(11)
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect();
    let mut end = (MAX_NAME - 1)
        .saturating_sub(block.len() + 13)
        .min(node.len());
    while !node.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{block}-{digest}", &node[..end])
}

/// Who owns a block: `host:<node>` or `virtual:<name>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Affinity {
    /// What kind of owner.
    pub owner: AffinityType,
    /// The node or the virtual owner.
    pub name: String,
}

impl Affinity {
    /// The affinity of a node.
    #[must_use]
    pub fn host(node: impl Into<String>) -> Self {
        Self {
            owner: AffinityType::Host,
            name: node.into(),
        }
    }
}

/// A text that is no affinity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an affinity (\"host:<node>\" or \"virtual:<name>\")")]
pub struct AffinityError(String);

impl fmt::Display for Affinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.owner, self.name)
    }
}

impl FromStr for Affinity {
    type Err = AffinityError;

    fn from_str(text: &str) -> Result<Self, AffinityError> {
        let affinity = text.split_once(':').and_then(|(owner, name)| {
            let owner = AffinityType::ALL
                .iter()
                .copied()
                .find(|known| known.as_str() == owner)?;
            (!name.is_empty()).then(|| Self {
                owner,
                name: name.to_owned(),
            })
        });
        affinity.ok_or_else(|| AffinityError(text.to_owned()))
    }
}

serde_as_text!(Affinity, "\"host:<node>\" or \"virtual:<name>\"");

text_enum! {
    /// What owns a block.
    pub enum AffinityType { Host = "host", Virtual = "virtual" }
}

/// A block of addresses and who holds each of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IPAMBlockSpec {
    /// The block.
    pub cidr: Cidr,
    /// Its owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity_claim_time: Option<String>,
    /// For each ordinal of the block, the index into `attributes`, or nothing when it is free.
    #[serde(default)]
    pub allocations: Vec<Option<u32>>,
    /// The free ordinals, first one first to be given out.
    #[serde(default)]
    pub unallocated: Vec<u32>,
    /// Who holds addresses.
    #[serde(default)]
    pub attributes: Vec<AllocationAttribute>,
    /// Counts the writes of the block.
    #[serde(default)]
    pub sequence_number: u64,
    /// For each allocated ordinal, the block's sequence number at its allocation.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sequence_number_for_allocation: BTreeMap<String, u64>,
    /// First half of the two-step deletion; readers treat the block as absent.
    #[serde(default)]
    pub deleted: bool,
    /// Deprecated and without effect.
    #[serde(default)]
    pub strict_affinity: bool,
}

/// A holder of addresses of a block.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AllocationAttribute {
    /// The handle by which the addresses are found again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handle_id: Option<String>,
    /// Attributes of the owner: node, pod, namespace, type.
    #[serde(rename = "secondary", skip_serializing_if = "Option::is_none")]
    pub owner: Option<StringMap>,
    /// Attributes of a second owner during a live migration.
    #[serde(
        rename = "alternate",
        alias = "alternateOwnerAttrs",
        skip_serializing_if = "Option::is_none"
    )]
    pub alternate_owner: Option<StringMap>,
    /// RFC 3339; the address is free again but rests until its cool-down is over.
    #[serde(rename = "releasedAt", skip_serializing_if = "Option::is_none")]
    pub released_at: Option<String>,
}

/// How far a claim of a block has come.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "camelCase")]
pub enum BlockAffinityState {
    /// Announced; the block may not be the owner's yet.
    Pending,
    /// The block is the owner's.
    #[default]
    #[serde(alias = "")]
    Confirmed,
    /// About to be given up.
    PendingDeletion,
}

/// That a node owns a block, or wants to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BlockAffinitySpec {
    /// How far the claim has come.
    #[serde(default)]
    pub state: BlockAffinityState,
    /// The owner.
    pub node: String,
    /// What kind of owner; absent means a node.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub type_: Option<AffinityType>,
    /// The block.
    pub cidr: Cidr,
    /// First half of the two-step deletion. Calico's internal CRD keeps a text here.
    #[serde(
        default,
        deserialize_with = "bool_or_text",
        skip_serializing_if = "super::is_zero"
    )]
    pub deleted: bool,
}

fn bool_or_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum BoolOrText {
        Bool(bool),
        Text(String),
    }
    match BoolOrText::deserialize(deserializer)? {
        BoolOrText::Bool(value) => Ok(value),
        BoolOrText::Text(text) => match text.as_str() {
            "true" => Ok(true),
            "false" | "" => Ok(false),
            other => Err(serde::de::Error::custom(format_args!(
                "{other:?} is neither true nor false"
            ))),
        },
    }
}

/// The blocks in which a handle holds addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IPAMHandleSpec {
    /// The handle.
    #[serde(rename = "handleID")]
    pub handle_id: String,
    /// Number of addresses for each block.
    #[serde(default)]
    pub block: BTreeMap<String, u32>,
    /// First half of the two-step deletion.
    #[serde(default)]
    pub deleted: bool,
}

/// Cluster-wide settings of address management, in the object `default`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IPAMConfigurationSpec {
    /// Whether a node may only use addresses of its own blocks.
    pub strict_affinity: bool,
    /// Limit of blocks for each node; 0 means the built-in limit.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub max_blocks_per_host: u32,
    /// Whether nodes claim blocks by themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_allocate_blocks: Option<bool>,
    /// Whether virtual machines keep their address.
    #[serde(
        rename = "kubeVirtVMAddressPersistence",
        skip_serializing_if = "Option::is_none"
    )]
    pub kube_virt_vm_address_persistence: Option<Toggle>,
    /// Seconds for which a released address rests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_cooldown_seconds: Option<u32>,
}

impl IPAMConfigurationSpec {
    /// Blocks for each node where nothing else is configured.
    pub const DEFAULT_MAX_BLOCKS: u32 = 20;

    /// Whether nodes claim blocks by themselves; they do unless told otherwise.
    #[must_use]
    pub fn auto_allocates(&self) -> bool {
        self.auto_allocate_blocks.unwrap_or(true)
    }

    /// The effective limit of blocks for each node.
    #[must_use]
    pub const fn max_blocks(&self) -> u32 {
        if self.max_blocks_per_host == 0 {
            Self::DEFAULT_MAX_BLOCKS
        } else {
            self.max_blocks_per_host
        }
    }
}

/// Addresses that are never given out automatically.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IPReservationSpec {
    /// The addresses.
    #[serde(rename = "reservedCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub reserved_cidrs: Vec<Net>,
}
