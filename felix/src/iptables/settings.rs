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
    /// Policy before connection tracking or destination NAT has accepted the packet: that of host endpoints is not asked again.
    pub early: u32,
    /// The host has sent the packet and translated its destination: its interface is known only after routing.
    pub translated: u32,
}

impl Marks {
    /// The bits of a mask; the default's where it has too few.
    fn of_mask(mask: u32) -> Option<Self> {
        let mut bits = (0..32).map(|bit| 1 << bit).filter(|bit| mask & bit != 0);
        Some(Self {
            accept: bits.next()?,
            pass: bits.next()?,
            early: bits.next()?,
            translated: bits.next()?,
        })
    }

    const DEFAULT: Self = Self {
        accept: 0x1_0000,
        pass: 0x2_0000,
        early: 0x4_0000,
        translated: 0x8_0000,
    };

    pub(super) fn clear_of_hosts(self) -> String {
        clear(self.early | self.translated)
    }

    pub(super) fn set_early(self) -> String {
        set(self.early)
    }

    pub(super) fn set_translated(self) -> String {
        set(self.translated)
    }

    pub(super) fn early(self) -> String {
        has(self.early)
    }

    pub(super) fn not_early(self) -> String {
        format!("-m mark --mark 0x0/{:#x}", self.early)
    }

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
        has(self.accept)
    }

    pub(super) fn not_passed(self) -> String {
        format!("-m mark --mark 0x0/{:#x}", self.pass)
    }
}

fn has(bits: u32) -> String {
    format!("-m mark --mark {bits:#x}/{bits:#x}")
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

impl Allowed {
    const fn of(action: Option<AllowAction>) -> Self {
        match action {
            Some(AllowAction::Return) => Self::Return,
            Some(AllowAction::Accept) | None => Self::Accept,
        }
    }
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
    /// The same before destination NAT and after routing (`iptablesMangleAllowAction`).
    pub mangle_allow: Allowed,
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
            filter_allow: Allowed::of(spec.iptables_filter_allow_action),
            mangle_allow: Allowed::of(spec.iptables_mangle_allow_action),
            host_accept: spec.default_endpoint_to_host_action == Some(EndpointToHostAction::Accept),
            insert: spec.chain_insert_mode != Some(ChainInsertMode::Append),
            max_set_size: spec
                .max_ipset_size
                .filter(|size| *size > 0)
                .unwrap_or(1 << 20),
        }
    }
}
