//! Policy routing rules (`ip rule`): the model.

use std::fmt;

use ipnetwork::IpNetwork;

/// One rule. Equal rules may exist more than once in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Family.
    pub v6: bool,
    /// Order; smaller first.
    pub priority: u32,
    /// Table to look into.
    pub table: u32,
    /// Mark value, with its mask.
    pub fwmark: Option<(u32, u32)>,
    /// Source prefix.
    pub from: Option<IpNetwork>,
    /// Destination prefix.
    pub to: Option<IpNetwork>,
    /// Input device name.
    pub iif: Option<String>,
    /// Output device name.
    pub oif: Option<String>,
    /// The rule applies when its selector does not match (`FIB_RULE_INVERT`).
    pub invert: bool,
    /// Ignore routes of the table with this prefix length or shorter.
    pub suppress_prefix_len: Option<u32>,
    /// Who wrote it (`FRA_PROTOCOL`).
    pub protocol: u8,
}

impl Rule {
    /// A rule that looks into `table` at `priority`, for every packet.
    pub fn new(v6: bool, priority: u32, table: u32) -> Self {
        Self {
            v6,
            priority,
            table,
            fwmark: None,
            from: None,
            to: None,
            iif: None,
            oif: None,
            invert: false,
            suppress_prefix_len: None,
            protocol: 0,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.priority)?;
        if let Some((mark, mask)) = self.fwmark {
            write!(f, " fwmark {mark:#x}/{mask:#x}")?;
        }
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        write!(f, " lookup {}", self.table)
    }
}
