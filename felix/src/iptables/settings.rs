//! The part of FelixConfiguration that shapes chains: what both backends share, packet marks, and places.

use std::fmt;

use cali_api::v3::{
    self, AllowAction, ChainInsertMode, EndpointToHostAction, FelixConfigurationSpec,
};

use crate::compile::{self, DenyAction};

/// Bits of the packet mark, from the lowest of `iptablesMarkMask` up, as Calico gives them out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Policy allows the packet.
    pub accept: u32,
    /// The rest of the tier is skipped.
    pub pass: u32,
}

impl Marks {
    /// The bits of a mask; the default's where it has too few.
    fn of_mask(mask: u32) -> Option<Self> {
        let mut bits = (0..32).map(|bit| 1 << bit).filter(|bit| mask & bit != 0);
        Some(Self {
            accept: bits.next()?,
            pass: bits.next()?,
        })
    }

    const DEFAULT: Self = Self {
        accept: 0x1_0000,
        pass: 0x2_0000,
    };

    pub(super) fn clear_all(self) -> String {
        clear(self.accept | self.pass)
    }

    pub(super) fn clear_pass(self) -> String {
        clear(self.pass)
    }

    pub(super) fn set_accept(self) -> String {
        set(self.accept)
    }

    pub(super) fn set_pass(self) -> String {
        set(self.pass)
    }

    pub(super) fn accepted(self) -> String {
        format!("-m mark --mark {0:#x}/{0:#x}", self.accept)
    }

    pub(super) fn not_passed(self) -> String {
        format!("-m mark --mark 0x0/{:#x}", self.pass)
    }
}

fn clear(bits: u32) -> String {
    format!("-j MARK --set-xmark 0x0/{bits:#x}")
}

fn set(bits: u32) -> String {
    format!("-j MARK --set-xmark {bits:#x}/{bits:#x}")
}

/// How what policy allows goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// It is accepted: no later rule of the chain sees it.
    Accept,
    /// The rules behind ours decide.
    Return,
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accept => "ACCEPT",
            Self::Return => "RETURN",
        })
    }
}

/// Settings of the chains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What both backends have in common.
    pub common: compile::Settings,
    /// Bits of the packet mark.
    pub marks: Marks,
    /// What becomes of packets that policy allows (`iptablesFilterAllowAction`).
    pub filter_allow: Allowed,
    /// The packet to the host that policy allows is accepted at once, rather than left to the host's rules.
    pub host_accept: bool,
    /// Our rules stand at the start of the kernel's chains, not at their end (`chainInsertMode`).
    pub insert: bool,
    /// Most members of a set (`maxIpsetSize`).
    pub max_set_size: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self::from(&FelixConfigurationSpec::default())
    }
}

impl From<&FelixConfigurationSpec> for Settings {
    fn from(spec: &FelixConfigurationSpec) -> Self {
        let mut common = compile::Settings::from(spec);
        // The backend's own setting comes first.
        if let Some(deny) = spec.iptables_filter_deny_action {
            common.deny = match deny {
                v3::DenyAction::Drop => DenyAction::Drop,
                v3::DenyAction::Reject => DenyAction::Reject,
            };
        }
        Self {
            common,
            marks: spec
                .iptables_mark_mask
                .and_then(Marks::of_mask)
                .unwrap_or(Marks::DEFAULT),
            filter_allow: match spec.iptables_filter_allow_action {
                Some(AllowAction::Return) => Allowed::Return,
                Some(AllowAction::Accept) | None => Allowed::Accept,
            },
            host_accept: spec.default_endpoint_to_host_action == Some(EndpointToHostAction::Accept),
            insert: spec.chain_insert_mode != Some(ChainInsertMode::Append),
            max_set_size: spec
                .max_ipset_size
                .filter(|size| *size > 0)
                .unwrap_or(1 << 20),
        }
    }
}
