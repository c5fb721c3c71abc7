//! Chains of policies and profiles, in each table in which somebody asks them, and the sets of constants of their rules.

use std::collections::BTreeSet;
use std::sync::Arc;

use cali_api::Key;
use cali_netlink::ipset::SetType;

use super::names;
use super::program::Table;
use super::render::{Asked, DIRECTIONS, Renderer, VERSIONS, plain, remark};
use super::rule::{self, Literals};
use crate::calc::{Action, Direction, Endpoint, Rules};
use crate::compile::DenyAction;
use crate::compile::log::{self, LogRate};
use crate::compile::names::policy_text;

/// Longest prefix of NFLOG (`NF_LOG_PREFIXLEN` is 128; iptables takes 63).
const LOG_PREFIX: usize = 63;

/// Tables that have policy.
const TABLES: [Table; 3] = [Table::Raw, Table::Mangle, Table::Filter];

impl Renderer {
    pub(super) fn put_policy(&mut self, id: &Key, rules: &Rules) {
        let owner = policy_text(id);
        for (direction, table) in places() {
            let chain = names::policy_chain(id, direction);
            let asked = Asked::Policy(id.clone(), direction, table);
            if self.asked.contains_key(&asked) {
                self.put_rules((table, chain), &owner, rules, direction, true);
            } else {
                self.remove_chain(table, &chain);
            }
        }
    }

    /// Counts what a workload asks.
    pub(super) fn ask_all(&mut self, endpoint: &Endpoint, more: bool) {
        for direction in DIRECTIONS {
            let tiers = endpoint.tiers(direction).iter();
            for id in tiers.flat_map(|tier| &tier.policies) {
                self.ask(&Asked::Policy(id.clone(), direction, Table::Filter), more);
            }
        }
    }

    /// What is asked for the first time, or no longer, gets or loses its chain.
    pub(super) fn ask(&mut self, asked: &Asked, more: bool) {
        let before = self.asked.get(asked).copied().unwrap_or_default();
        let after = if more {
            before + 1
        } else {
            before.saturating_sub(1)
        };
        if after == 0 {
            self.asked.remove(asked);
        } else {
            self.asked.insert(asked.clone(), after);
        }
        if (before == 0) == (after == 0) {
            return;
        }
        match asked {
            Asked::Policy(id, ..) => {
                if let Some(rules) = self.policies.get(id).cloned() {
                    self.put_policy(id, &rules);
                }
            }
            Asked::Profile(name, ..) => {
                if let Some(rules) = self.profiles.get(name).cloned() {
                    self.put_profile(name, &rules);
                }
            }
        }
    }

    pub(super) fn put_profile(&mut self, name: &Arc<str>, rules: &Rules) {
        let owner = format!("pro/{name}");
        for (direction, table) in places() {
            let chain = names::profile_chain(name, direction);
            let asked = Asked::Profile(name.clone(), direction, table);
            if table == Table::Filter || self.asked.contains_key(&asked) {
                self.put_rules((table, chain), &owner, rules, direction, false);
            } else {
                self.remove_chain(table, &chain);
            }
        }
    }

    fn put_rules(
        &mut self,
        (table, chain): (Table, Arc<str>),
        owner: &str,
        rules: &Rules,
        direction: Direction,
        may_pass: bool,
    ) {
        let mut literals = Literals::new();
        for version in VERSIONS {
            let mut texts = Vec::new();
            for (number, rule) in rules.of(direction).iter().enumerate() {
                let target = match rule.action {
                    Action::Allow => format!("-g {}", names::ALLOW),
                    Action::Deny => self.deny(table),
                    Action::Pass if may_pass => format!("-g {}", names::PASS),
                    // A profile has nothing to pass on to: the next profile is asked.
                    Action::Pass => "-j RETURN".to_owned(),
                    Action::Log => log(owner, direction, number, self.settings.common.log_rate),
                };
                for matches in rule::matches(rule, version, &mut literals) {
                    let space = if matches.is_empty() { "" } else { " " };
                    texts.push(format!("{matches}{space}{target}"));
                }
            }
            remark(&mut texts, &format!("{owner} {direction}"));
            self.put_chain(version, table, chain.clone(), texts);
        }
        self.put_literals(&(table, chain), literals);
    }

    /// Only the filter table can answer.
    pub(super) fn deny(&self, table: Table) -> String {
        match (self.settings.common.deny, table) {
            (DenyAction::Reject, Table::Filter) => "-j REJECT".to_owned(),
            _ => "-j DROP".to_owned(),
        }
    }

    /// The sets of constants that a chain uses now; those of its former rules go with their last user.
    pub(super) fn put_literals(&mut self, chain: &(Table, Arc<str>), literals: Literals) {
        let names: BTreeSet<Arc<str>> = literals.keys().cloned().collect();
        for (name, (version, nets)) in literals {
            let users = self.literal_users.entry(name.clone()).or_default();
            *users += 1;
            if *users == 1 {
                let members = nets.into_iter().flat_map(rule::members).collect();
                self.put_set(name, SetType::Net, version, members);
            }
        }
        let former = if names.is_empty() {
            self.literals.remove(chain)
        } else {
            self.literals.insert(chain.clone(), names)
        };
        for name in former.into_iter().flatten() {
            if let Some(users) = self.literal_users.get_mut(&name) {
                *users -= 1;
                if *users == 0 {
                    self.literal_users.remove(&name);
                    self.remove_set(&name);
                }
            }
        }
    }
}

/// Where rules may be asked for.
pub(super) fn places() -> impl Iterator<Item = (Direction, Table)> {
    DIRECTIONS
        .into_iter()
        .flat_map(|direction| TABLES.map(|table| (direction, table)))
}

/// Hands the packet to our group of NFLOG, as often as `logActionRateLimit` says.
fn log(owner: &str, direction: Direction, number: usize, rate: Option<LogRate>) -> String {
    let prefix = plain(
        &log::prefix(owner, direction, number, LOG_PREFIX),
        LOG_PREFIX,
    );
    let limit = rate.map_or_else(String::new, |rate| {
        let LogRate {
            packets,
            per,
            burst,
        } = rate;
        format!(
            "-m limit --limit {packets}/{} --limit-burst {burst} ",
            per.text()
        )
    });
    let group = log::group(direction);
    format!("{limit}-j NFLOG --nflog-group {group} --nflog-prefix \"{prefix}\" --nflog-size 128")
}
