//! A stack: the tiers, policies and profiles that decide on a packet, in order.
//!
//! Endpoints with equal tiers and profiles share one stack, and its name is a hash of these. A
//! policy is a chain that the stack jumps to; it decides or returns. `Pass` must skip the rest of
//! the tier, which no return from a shared chain can do, so a policy that passes is written out in
//! the stack, and its `Pass` goes to the stack of what follows the tier.

use std::fmt::Write;
use std::sync::Arc;

use cali_netlink::nft::{Expr, Rule as NftRule, Verdict};

use super::collapse::{self, Allowed};
use super::expr::{self, counter};
use super::rule::{Rendered, Sets};
use super::settings::Settings;
use super::{log, names};
use crate::calc::{Action, Direction, Rule, TierDefault, TierPolicies};

/// Where a stack is asked, which decides how it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// At an endpoint: what the tiers leave goes to the profiles, and is denied if they do not allow it.
    Endpoint,
    /// The same after routing, where the kernel can only drop.
    Postrouting,
    /// At a host endpoint that forwards: what the tiers leave goes on.
    Forward,
    /// Before destination NAT: what is allowed is not asked about again, what is left goes on.
    PreDnat,
    /// Before connection tracking: as before destination NAT, and what is allowed is not tracked.
    Untracked,
}

impl Place {
    /// Whether policies are written out in the stack: their verdicts are others here than in the chains
    /// that stacks share.
    pub(super) const fn writes_out(self) -> bool {
        matches!(self, Self::Postrouting | Self::PreDnat | Self::Untracked)
    }
}

/// What a stack consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stack {
    pub(super) place: Place,
    pub(super) direction: Direction,
    pub(super) tiers: Vec<TierPolicies>,
    pub(super) profiles: Vec<Arc<str>>,
}

impl Stack {
    /// The name of its chain.
    pub(super) fn name(&self) -> Arc<str> {
        names::stack_chain(self.direction, &self.text())
    }

    /// What it consists of, for people, as short as a comment must be.
    pub(super) fn comment(&self) -> String {
        comment(&self.text())
    }

    fn text(&self) -> String {
        let mut text = match self.place {
            Place::Endpoint => "",
            Place::Postrouting => "after routing: ",
            Place::Forward => "forwarded: ",
            Place::PreDnat => "before DNAT: ",
            Place::Untracked => "untracked: ",
        }
        .to_owned();
        for tier in &self.tiers {
            let end = match tier.default_action {
                TierDefault::Deny => "deny",
                TierDefault::Pass => "pass",
            };
            let policies: Vec<String> = tier.policies.iter().map(names::policy_text).collect();
            let _ = write!(text, "{}[{}]{end} ", tier.tier, policies.join(" "));
        }
        let _ = write!(text, "profiles[{}]", self.profiles.join(" "));
        text
    }

    /// The tiers that its chain looks into: a tier that ends with a denial hides all later ones, which
    /// only `Pass` reaches, through the stack of what follows.
    pub(super) fn reached(&self) -> &[TierPolicies] {
        let end = self
            .tiers
            .iter()
            .position(|tier| tier.default_action == TierDefault::Deny);
        &self.tiers[..end.map_or(self.tiers.len(), |end| end + 1)]
    }

    /// Whether its chain looks into the profiles.
    pub(super) fn reaches_profiles(&self) -> bool {
        matches!(self.place, Place::Endpoint | Place::Postrouting)
            && self
                .tiers
                .iter()
                .all(|tier| tier.default_action == TierDefault::Pass)
    }

    /// What is left after the tier at `position`.
    pub(super) fn after(&self, position: usize) -> Self {
        Self {
            tiers: self.tiers.get(position + 1..).unwrap_or_default().to_vec(),
            ..self.clone()
        }
    }
}

/// Octets of a comment, and of a log prefix (`NFT_USERDATA_MAXLEN`, `NF_LOG_PREFIXLEN`, less the final zero).
const LONGEST: usize = 127;

/// At most 127 bytes: what `nft` prints of a comment.
pub(super) fn comment(text: &str) -> String {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// How the actions of rules end in one place.
pub(super) struct Endings<'a> {
    pub(super) settings: &'a Settings,
    pub(super) place: Place,
    pub(super) direction: Direction,
    /// Policy or profile, as in log prefixes.
    pub(super) owner: &'a str,
    /// Where `Pass` leads; `None` where nothing may pass.
    pub(super) pass: Option<Arc<str>>,
}

impl Endings<'_> {
    /// Adds the kernel rules of all rules.
    pub(super) fn render(&self, rules: &[Rule], sets: &impl Sets, into: &mut Rendered) {
        let mut number = 0;
        while let Some(rule) = rules.get(number) {
            let run = if self.place.writes_out() {
                0
            } else {
                sets.thresholds().run_within(rules, number)
            };
            if run > 0 {
                let items = rules[number..number + run].iter().enumerate();
                let items = items.map(|(index, rule)| Allowed {
                    owner: self.owner,
                    number: number + index,
                    rule,
                });
                collapse::collapse(items, self.direction, sets, into);
                number += run;
                continue;
            }
            let verdict = self.verdict(rule.action, number);
            let action = match rule.action {
                Action::Allow => "allow",
                Action::Deny => "deny",
                Action::Log => "log",
                Action::Pass => "pass",
            };
            let text = comment(&format!(
                "{} {} {number} {action}",
                self.owner, self.direction
            ));
            into.push(rule, sets, &verdict, &text);
            number += 1;
        }
    }

    fn verdict(&self, action: Action, number: usize) -> Vec<Expr> {
        match action {
            Action::Allow => {
                let mut exprs = vec![counter()];
                if self.place == Place::Untracked {
                    exprs.push(Expr::Notrack);
                }
                if matches!(self.place, Place::Untracked | Place::PreDnat) {
                    exprs.extend(expr::set_mark(self.settings.accept_mark, true));
                }
                exprs.push(Expr::Verdict(Verdict::Accept));
                exprs
            }
            Action::Deny => vec![counter(), deny(self.settings, self.place)],
            Action::Pass => match &self.pass {
                Some(next) => vec![counter(), Expr::Verdict(Verdict::Goto(next.clone()))],
                // A profile has nothing to pass on to: the next profile is asked.
                None => vec![counter(), Expr::Verdict(Verdict::Return)],
            },
            Action::Log => {
                let mut exprs = vec![counter()];
                exprs.extend(self.settings.log_rate.map(|rate| Expr::Limit {
                    rate: rate.packets.into(),
                    per: rate.per.duration(),
                    burst: rate.burst,
                    bytes: false,
                    over: false,
                }));
                exprs.push(Expr::NfLog {
                    group: log::group(self.direction),
                    prefix: log::prefix(self.owner, self.direction, number, LONGEST),
                    snaplen: 128,
                });
                exprs
            }
        }
    }
}

/// A rule that denies what is left.
pub(super) fn deny_rest(settings: &Settings, place: Place, reason: &str) -> NftRule {
    NftRule::new([counter(), deny(settings, place)]).comment(comment(reason))
}

/// After routing there is nothing that the kernel could answer.
fn deny(settings: &Settings, place: Place) -> Expr {
    match place {
        Place::Postrouting => Expr::Verdict(Verdict::Drop),
        _ => settings.deny.expr(),
    }
}

/// A rule that asks another chain.
pub(super) fn ask(chain: Arc<str>) -> NftRule {
    NftRule::new([Expr::Verdict(Verdict::Jump(chain))])
}
