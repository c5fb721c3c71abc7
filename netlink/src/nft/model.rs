//! Tables, chains and rules as plain values.

use std::{fmt, sync::Arc};

use super::Expr;

/// Family of a table (`NFPROTO_*`, `include/uapi/linux/netfilter.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4.
    Ip = 2,
    /// ARP.
    Arp = 3,
    /// Ingress and egress of one device.
    Netdev = 5,
    /// Bridged frames.
    Bridge = 7,
    /// IPv6.
    Ip6 = 10,
}

impl Family {
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [
            Self::Inet,
            Self::Ip,
            Self::Arp,
            Self::Netdev,
            Self::Bridge,
            Self::Ip6,
        ]
        .into_iter()
        .find(|family| *family as u8 == number)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Arp => "arp",
            Self::Netdev => "netdev",
            Self::Bridge => "bridge",
            Self::Ip6 => "ip6",
        })
    }
}

/// A table's family and name: what every other object is found by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName {
    /// Family.
    pub family: Family,
    /// Name.
    pub name: Arc<str>,
}

impl TableName {
    /// From its parts.
    pub fn new(family: Family, name: impl Into<Arc<str>>) -> Self {
        Self {
            family,
            name: name.into(),
        }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// A table as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Family and name.
    pub name: TableName,
    /// `NFT_TABLE_F_*`: 1 dormant, 2 owned by a socket.
    pub flags: u32,
    /// Number of chains, sets and objects in it.
    pub uses: u32,
    /// Handle.
    pub handle: u64,
}

/// Where a base chain is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Hook {
    /// Before routing (ARP: input).
    Prerouting = 0,
    /// To this host (ARP: output).
    Input = 1,
    /// Through this host.
    Forward = 2,
    /// From this host.
    Output = 3,
    /// After routing.
    Postrouting = 4,
}

impl Hook {
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        [
            Self::Prerouting,
            Self::Input,
            Self::Forward,
            Self::Output,
            Self::Postrouting,
        ]
        .into_iter()
        .find(|hook| *hook as u32 == number)
    }

    /// The number that tables of this family use: ARP has its own hooks (`NF_ARP_IN` 0, `NF_ARP_OUT` 1).
    pub(crate) fn number(self, family: Family) -> u32 {
        match (family, self) {
            (Family::Arp, Self::Input) => 0,
            (Family::Arp, Self::Output) => 1,
            (_, hook) => hook as u32,
        }
    }

    pub(crate) fn of_family(family: Family, number: u32) -> Option<Self> {
        match (family, number) {
            (Family::Arp, 0) => Some(Self::Input),
            (Family::Arp, 1) => Some(Self::Output),
            (_, number) => Self::from_number(number),
        }
    }
}

/// Type of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainType {
    /// Accepts and drops.
    Filter,
    /// Sees the first packet of a flow and translates it.
    Nat,
    /// Re-routes packets whose header or mark it changed.
    Route,
}

impl ChainType {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

/// What happens at the end of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Policy {
    /// Drop.
    Drop,
    /// Accept (for this base chain; later ones still see the packet).
    #[default]
    Accept,
}

/// What makes a chain a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseHook {
    /// Chain type.
    pub chain_type: ChainType,
    /// Where.
    pub hook: Hook,
    /// Order among all base chains of the hook; smaller first.
    pub priority: i32,
    /// What happens at the end.
    pub policy: Policy,
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain {
    /// Name, at most 255 bytes (`NFT_NAME_MAXLEN`).
    pub name: Arc<str>,
    /// Set for base chains.
    pub base: Option<BaseHook>,
    /// Shown by `nft list`.
    pub comment: Option<String>,
}

impl Chain {
    /// A chain that is only reached by jump or goto.
    pub fn regular(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            base: None,
            comment: None,
        }
    }

    /// A base chain.
    pub fn base(name: impl Into<Arc<str>>, base: BaseHook) -> Self {
        Self {
            name: name.into(),
            base: Some(base),
            comment: None,
        }
    }
}

/// A chain as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedChain {
    /// Table.
    pub table: TableName,
    /// The chain.
    pub chain: Chain,
    /// Number of references (rules in it and jumps to it).
    pub uses: u32,
    /// Handle.
    pub handle: u64,
}

/// A verdict.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Ends this base chain; later base chains still see the packet.
    Accept,
    /// Ends everything.
    Drop,
    /// Next rule.
    Continue,
    /// Back to the calling chain.
    Return,
    /// Into a chain, and back at its end.
    Jump(Arc<str>),
    /// Into a chain, for good.
    Goto(Arc<str>),
    /// To a user space queue.
    Queue(u16),
}

/// A rule: expressions in order, and data that survives dumps but no packet sees.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Rule {
    /// Expressions.
    pub exprs: Vec<Expr>,
    /// Shown by `nft list`; at most 128 bytes.
    pub comment: Option<String>,
    /// The owner's identity of the rule, for comparison with a dump.
    pub tag: Option<u64>,
}

impl Rule {
    /// A rule with nothing but expressions.
    pub fn new(exprs: impl Into<Vec<Expr>>) -> Self {
        Self {
            exprs: exprs.into(),
            comment: None,
            tag: None,
        }
    }

    /// The same rule with a comment.
    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// The same rule with a tag.
    #[must_use]
    pub fn tag(mut self, tag: u64) -> Self {
        self.tag = Some(tag);
        self
    }

    /// Packets and bytes of its first counter.
    pub fn counter(&self) -> Option<(u64, u64)> {
        self.exprs.iter().find_map(|expr| match expr {
            Expr::Counter { packets, bytes } => Some((*packets, *bytes)),
            _ => None,
        })
    }
}

/// A rule as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedRule {
    /// Table.
    pub table: TableName,
    /// Chain.
    pub chain: Arc<str>,
    /// Handle, for replacing and deleting it.
    pub handle: u64,
    /// The rule.
    pub rule: Rule,
}
