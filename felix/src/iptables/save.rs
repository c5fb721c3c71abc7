//! What `iptables-save` printed: our chains by the hashes of their rules, and our rules among those of the kernel's chains.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::names::OWN_CHAIN;
use super::program::{Chain, Family, Rule, Table};

/// A rule in one of the kernel's chains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedRule {
    /// The hash, where the rule is ours; empty where it is ours only by its target.
    pub ours: Option<Arc<str>>,
    /// The rule as it follows `-A CHAIN `: what deletes it again.
    pub text: Arc<str>,
}

/// A chain of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedChain {
    /// The hashes of its rules; `None` for a rule without one.
    pub hashes: Vec<Option<Arc<str>>>,
    /// The rules as they follow `-A CHAIN `.
    pub texts: Vec<Arc<str>>,
}

/// One family's tables, as far as they concern us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Chains of ours by table and name.
    pub chains: BTreeMap<(Table, Arc<str>), ObservedChain>,
    /// Rules of the kernel's chains that hold any, by table and chain.
    pub hooks: BTreeMap<(Table, Arc<str>), Vec<ObservedRule>>,
    /// How many rules there are in all, ours and others'.
    pub rules: usize,
    /// A chain of the kubelet or of kube-proxy says that they write here.
    pub kubernetes: bool,
}

impl Observed {
    /// Reads the output of `iptables-save`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut seen = Self::default();
        let mut table = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::from_name(name.trim());
            } else if let Some(chain) = line.strip_prefix(':') {
                let name = chain.split(' ').next().unwrap_or_default();
                seen.kubernetes |= matches!(name, "KUBE-IPTABLES-HINT" | "KUBE-KUBELET-CANARY");
                if let Some(table) = table.filter(|_| is_ours(name)) {
                    seen.chains
                        .insert((table, name.into()), ObservedChain::default());
                }
            } else if let Some((chain, rule)) = line
                .strip_prefix("-A ")
                .and_then(|rest| rest.split_once(' '))
            {
                seen.rules += 1;
                if let Some(table) = table {
                    seen.take_rule(table, chain, rule);
                }
            }
        }
        seen
    }

    fn take_rule(&mut self, table: Table, chain: &str, rule: &str) {
        let hash = hash_of(rule);
        if let Some(ours) = self.chains.get_mut(&(table, chain.into())) {
            ours.hashes.push(hash);
            ours.texts.push(rule.into());
            return;
        }
        let ours = hash.or_else(|| leads_to_ours(rule).then(|| Arc::from("")));
        // The kernel's chains have capital names; chains of other programs do not concern us unless they lead to ours.
        if ours.is_some() || is_builtin(chain) {
            let rule = ObservedRule {
                ours,
                text: rule.into(),
            };
            self.hooks
                .entry((table, chain.into()))
                .or_default()
                .push(rule);
        }
    }

    /// Whether the chains are of this program and not of another one with the same names.
    #[must_use]
    pub fn is_cali(&self) -> bool {
        self.chains.contains_key(&(Table::Filter, OWN_CHAIN.into()))
    }

    /// Whether anything of ours is there.
    #[must_use]
    pub fn has_ours(&self) -> bool {
        !self.chains.is_empty()
            || self
                .hooks
                .values()
                .flatten()
                .any(|rule| rule.ours.is_some())
    }
}

impl Observed {
    /// Takes over what a write has done: the wanted chains, and our rules around those of others.
    pub fn adopt(&mut self, wanted: &Family) {
        for (key, chain) in &wanted.chains {
            let observed = ObservedChain {
                hashes: chain
                    .rules
                    .iter()
                    .map(|rule| Some(rule.hash.clone()))
                    .collect(),
                texts: chain.rules.iter().map(|rule| rule.line().into()).collect(),
            };
            self.chains.insert(key.clone(), observed);
        }
        for rules in self.hooks.values_mut() {
            rules.retain(|rule| rule.ours.is_none());
        }
        let ours = |rule: &Rule| ObservedRule {
            ours: Some(rule.hash.clone()),
            text: rule.line().into(),
        };
        for ((table, chain), rules) in &wanted.hooks {
            let place = self.hooks.entry((*table, Arc::from(*chain))).or_default();
            let foreign = std::mem::take(place);
            place.extend(rules.head.iter().map(ours));
            place.extend(foreign);
            place.extend(rules.tail.iter().map(ours));
        }
    }

    /// Takes over that chains which are not wanted were removed.
    pub fn forget_unwanted(&mut self, wanted: &Family) {
        self.chains.retain(|key, _| wanted.chains.contains_key(key));
    }

    /// What a chain of ours held: the rules with our hashes.
    #[must_use]
    pub fn former(&self, key: &(Table, Arc<str>)) -> Option<Chain> {
        let chain = self.chains.get(key)?;
        let rules = chain
            .hashes
            .iter()
            .zip(&chain.texts)
            .filter_map(|(hash, text)| {
                let hash = hash.clone()?;
                let comment = format!("-m comment --comment \"cali:{hash}\"");
                let text = text.replacen(&comment, "", 1).trim().into();
                Some(Rule { hash, text })
            });
        Some(Chain {
            rules: rules.collect(),
            hooked: false,
        })
    }
}

fn is_ours(chain: &str) -> bool {
    chain.starts_with("cali-")
}

fn is_builtin(chain: &str) -> bool {
    matches!(
        chain,
        "PREROUTING" | "INPUT" | "FORWARD" | "OUTPUT" | "POSTROUTING"
    )
}

fn hash_of(rule: &str) -> Option<Arc<str>> {
    let rest = rule.split_once("--comment \"cali:")?.1;
    let hash = rest.split('"').next()?;
    (hash.len() == 16).then(|| hash.into())
}

fn leads_to_ours(rule: &str) -> bool {
    let mut words = rule.split(' ').rev();
    let target = words.next().unwrap_or_default();
    matches!(words.next(), Some("-j" | "-g")) && is_ours(target)
}
