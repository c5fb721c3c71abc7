//! The desired chains, hooks and sets as values, found by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use cali_netlink::ipset::{SetMember, SetType};

use super::names;
use crate::calc::IpVersion;

/// A table of iptables, in the order in which packets and writers meet them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Before connection tracking.
    Raw,
    /// Before routing, and behind it.
    Mangle,
    /// Translation of addresses.
    Nat,
    /// Policy.
    Filter,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Mangle, Self::Nat, Self::Filter];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.name() == name)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A rule without its chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Identifies the rule with its place: 16 characters.
    pub hash: Arc<str>,
    /// Matches and target, as iptables writes them.
    pub text: Arc<str>,
}

impl Rule {
    /// The rule with its hash, as it follows `-A CHAIN `.
    pub(super) fn line(&self) -> String {
        format!("-m comment --comment \"cali:{}\" {}", self.hash, self.text)
    }
}

fn hashed(seed: &str, texts: Vec<String>) -> Vec<Rule> {
    let hashes = names::hashes(seed, texts.iter().map(String::as_str));
    let rule = |(hash, text): (Arc<str>, String)| Rule {
        hash,
        text: text.into(),
    };
    hashes.into_iter().zip(texts).map(rule).collect()
}

/// A chain of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its rules in order.
    pub rules: Vec<Rule>,
    /// Whether a kernel's chain leads here, so that packets of the host itself pass it.
    pub hooked: bool,
}

impl Chain {
    /// A chain with these rules.
    pub fn new(name: &str, rules: Vec<String>) -> Self {
        Self {
            rules: hashed(name, rules),
            hooked: false,
        }
    }

    /// The sets that its rules look up.
    pub fn sets(&self) -> impl Iterator<Item = &str> {
        self.rules.iter().flat_map(|rule| {
            let words = rule.text.split(' ');
            let next = rule.text.split(' ').skip(1);
            words
                .zip(next)
                .filter(|(word, _)| *word == "--match-set")
                .map(|(_, set)| set)
        })
    }
}

/// Our rules in a chain of the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HookRules {
    /// At its start.
    pub head: Vec<Rule>,
    /// At its end.
    pub tail: Vec<Rule>,
}

impl HookRules {
    pub(super) fn new(chain: &str, head: Vec<String>, tail: Vec<String>) -> Self {
        Self {
            head: hashed(chain, head),
            tail: hashed(&format!("{chain}-tail"), tail),
        }
    }
}

/// A set and its members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetProgram {
    /// Type of its members.
    pub kind: SetType,
    /// Whether they are IPv6.
    pub v6: bool,
    /// The members; of a set whose members go by themselves only the dataplane knows them.
    pub members: BTreeSet<SetMember>,
    /// Seconds after which a member goes by itself.
    pub timeout: Option<u32>,
}

/// Everything of one family in all tables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Family {
    /// Chains by table and name.
    pub chains: BTreeMap<(Table, Arc<str>), Chain>,
    /// Rules in the kernel's chains, by table and chain.
    pub hooks: BTreeMap<(Table, &'static str), HookRules>,
}

/// What the kernel is to hold of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    families: [Family; 2],
    /// IP sets by name.
    pub sets: BTreeMap<Arc<str>, SetProgram>,
}

impl Program {
    /// One family's tables.
    #[must_use]
    pub fn family(&self, version: IpVersion) -> &Family {
        &self.families[version as usize]
    }

    /// One family's tables, to be changed.
    pub fn family_mut(&mut self, version: IpVersion) -> &mut Family {
        &mut self.families[version as usize]
    }
}
