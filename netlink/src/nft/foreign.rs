//! Base chains of others that can drop what our tables accept.
//!
//! `accept` ends one base chain only; the packet still passes all others of the hook and of later hooks, also those
//! of the legacy `ip_tables`. So what firewalld, ufw or Docker drop is dropped, whatever our policies say. This
//! module is pure: from a dump it says which base chains drop packets, how many of them, and whose they seem to be.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use super::{Expr, Family, Hook, ListedChain, ListedRule, Policy, TableName, Verdict};

/// How much a base chain drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drops {
    /// Packets that meet a condition of some rule.
    Some,
    /// By a rule, every packet that no rule before it accepts.
    Rest,
    /// By its policy, every packet that no rule accepts.
    Policy,
}

/// A base chain that can drop what we accept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dropper {
    /// Its table.
    pub table: TableName,
    /// Its name.
    pub chain: Arc<str>,
    /// Where.
    pub hook: Hook,
    /// Order in the hook.
    pub priority: i32,
    /// How much.
    pub drops: Drops,
    /// It belongs to the legacy `ip_tables`, and `nft` does not show it.
    pub legacy: bool,
    /// Programs whose chains it passes packets to, as far as their names tell.
    pub programs: BTreeSet<&'static str>,
}

impl fmt::Display for Dropper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let legacy = if self.legacy { "legacy " } else { "" };
        write!(f, "{legacy}{} {} (", self.table, self.chain)?;
        let (priority, drops) = (Priority(self.priority, self.hook), self.drops.text());
        write!(f, "priority {priority}, {drops}")?;
        if !self.programs.is_empty() {
            let programs: Vec<_> = self.programs.iter().copied().collect();
            write!(f, ", of {}", programs.join(" and "))?;
        }
        let what = match self.hook {
            Hook::Input => "what Cali needs to receive on this host",
            Hook::Output => "what Cali needs to send from this host",
            Hook::Prerouting | Hook::Forward | Hook::Postrouting => "what Cali allows",
        };
        write!(f, ") can drop {what}")
    }
}

impl Drops {
    fn text(self) -> &'static str {
        match self {
            Self::Some => "drops some packets",
            Self::Rest => "drops the rest by a rule",
            Self::Policy => "drops by policy",
        }
    }
}

/// A priority as `nft` prints it (`nft(8)`, "standard priority names").
struct Priority(i32, Hook);

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(value, hook) = *self;
        let named = [
            (-300, "raw"),
            (-150, "mangle"),
            (0, "filter"),
            (50, "security"),
        ];
        let nat = match hook {
            Hook::Prerouting => Some((-100, "dstnat")),
            Hook::Postrouting => Some((100, "srcnat")),
            _ => None,
        };
        let near = |(base, _): &(i32, &str)| value.abs_diff(*base) <= 10;
        match named.into_iter().chain(nat).find(near) {
            Some((base, name)) if base == value => f.write_str(name),
            Some((base, name)) => write!(f, "{name}{:+}", value - base),
            None => write!(f, "{value}"),
        }
    }
}

/// Base chains of tables that are not ours, in the order in which packets meet them, as far as they drop something.
pub fn droppers(chains: &[ListedChain], rules: &[ListedRule], ours: &[TableName]) -> Vec<Dropper> {
    let mut tables: BTreeMap<&TableName, Table> = BTreeMap::new();
    for chain in chains {
        let by_family = matches!(chain.table.family, Family::Inet | Family::Ip | Family::Ip6);
        if by_family && !ours.contains(&chain.table) {
            let table = tables.entry(&chain.table).or_default();
            table.0.entry(Arc::clone(&chain.chain.name)).or_default();
        }
    }
    for rule in rules {
        if let Some(table) = tables.get_mut(&rule.table) {
            let chain = table.0.entry(Arc::clone(&rule.chain)).or_default();
            chain.push(Step::of(&rule.rule.exprs));
        }
    }
    let mut found: Vec<_> = chains
        .iter()
        .filter_map(|chain| {
            let base = chain.chain.base?;
            let table = tables.get(&chain.table)?;
            let drops = table.judge(&chain.chain.name, base.policy)?;
            let mut programs = table.programs(&chain.chain.name);
            programs.extend(program_of(&chain.table.name));
            Some(Dropper {
                table: chain.table.clone(),
                chain: Arc::clone(&chain.chain.name),
                hook: base.hook,
                priority: base.priority,
                drops,
                legacy: false,
                programs,
            })
        })
        .collect();
    sort(&mut found);
    found
}

/// The same for the legacy `ip_tables`, from what `iptables-legacy-save` or `ip6tables-legacy-save` prints.
pub fn legacy_droppers(family: Family, saved: &str) -> Vec<Dropper> {
    let mut found = Vec::new();
    let mut table_name = "";
    let mut table = Table::default();
    let mut bases: Vec<(&str, Policy)> = Vec::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            (table_name, table) = (name, Table::default());
            bases.clear();
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let name = words.next().unwrap_or_default();
            table.0.entry(name.into()).or_default();
            match words.next() {
                Some("DROP") => bases.push((name, Policy::Drop)),
                Some("ACCEPT") => bases.push((name, Policy::Accept)),
                _ => {}
            }
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let words = words(rule);
            if let Some((chain, rule)) = words.split_first() {
                let chain = table.0.entry(chain.as_str().into()).or_default();
                chain.push(Step::of_words(rule));
            }
        } else if line == "COMMIT" {
            for (name, policy) in &bases {
                let (Some(hook), Some(drops)) = (legacy_hook(name), table.judge(name, *policy))
                else {
                    continue;
                };
                found.push(Dropper {
                    table: TableName::new(family, table_name),
                    chain: (*name).into(),
                    hook,
                    priority: legacy_priority(table_name, hook),
                    drops,
                    legacy: true,
                    programs: table.programs(name),
                });
            }
        }
    }
    sort(&mut found);
    found
}

/// In the order in which packets meet them.
fn sort(droppers: &mut [Dropper]) {
    droppers.sort_by(|a, b| (a.hook, a.priority, a).cmp(&(b.hook, b.priority, b)));
}

fn legacy_hook(chain: &str) -> Option<Hook> {
    Some(match chain {
        "PREROUTING" => Hook::Prerouting,
        "INPUT" => Hook::Input,
        "FORWARD" => Hook::Forward,
        "OUTPUT" => Hook::Output,
        "POSTROUTING" => Hook::Postrouting,
        _ => return None,
    })
}

/// `enum nf_ip_hook_priorities` (`include/uapi/linux/netfilter_ipv4.h`).
fn legacy_priority(table: &str, hook: Hook) -> i32 {
    match (table, hook) {
        ("raw", _) => -300,
        ("mangle", _) => -150,
        ("nat", Hook::Prerouting | Hook::Output) => -100,
        ("nat", _) => 100,
        ("security", _) => 50,
        _ => 0,
    }
}

/// Who names tables and chains like this.
fn program_of(name: &str) -> Option<&'static str> {
    const KNOWN: [(&str, &str); 11] = [
        ("KUBE-", "kube-proxy"),
        ("kube-proxy", "kube-proxy"),
        ("ufw", "ufw"),
        ("DOCKER", "Docker"),
        ("docker", "Docker"),
        ("firewalld", "firewalld"),
        ("cali-", "a Calico that ran here"),
        ("calico", "a Calico that ran here"),
        ("FLANNEL-", "flannel"),
        ("LIBVIRT_", "libvirt"),
        ("CNI-", "CNI plugins"),
    ];
    KNOWN
        .iter()
        .find(|(start, _)| name.starts_with(start))
        .map(|(_, program)| *program)
}

/// What a rule does with the packets that meet its conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Effect {
    Nothing,
    Accept,
    Drop,
    Return,
    Jump(Arc<str>),
    Goto(Arc<str>),
    /// By a verdict map; it may hold anything.
    Map,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    conditional: bool,
    effect: Effect,
}

impl Step {
    fn of(exprs: &[Expr]) -> Self {
        let mut step = Self {
            conditional: false,
            effect: Effect::Nothing,
        };
        for expr in exprs {
            match expr {
                Expr::Cmp { .. }
                | Expr::Range { .. }
                | Expr::Lookup { .. }
                | Expr::Limit { .. }
                | Expr::ConnLimit { .. } => step.conditional = true,
                Expr::VerdictMap { .. } => step.effect = Effect::Map,
                Expr::Verdict(verdict) => {
                    step.effect = match verdict {
                        Verdict::Drop => Effect::Drop,
                        Verdict::Accept | Verdict::Queue(_) => Effect::Accept,
                        Verdict::Continue => Effect::Nothing,
                        Verdict::Return => Effect::Return,
                        Verdict::Jump(chain) => Effect::Jump(Arc::clone(chain)),
                        Verdict::Goto(chain) => Effect::Goto(Arc::clone(chain)),
                    };
                }
                Expr::Reject(_) => step.effect = Effect::Drop,
                Expr::Nat { .. } | Expr::Masquerade { .. } | Expr::Redirect { .. } => {
                    step.effect = Effect::Accept;
                }
                Expr::Other(name) => match name.split_once(' ') {
                    Some(("target", target)) => step.effect = Effect::of_target(target),
                    Some(("match", "comment")) => {}
                    // Whatever it is: to take it for a condition claims less.
                    _ => step.conditional = true,
                },
                _ => {}
            }
        }
        step
    }

    /// A rule of `iptables-save`, without `-A CHAIN`.
    fn of_words(words: &[String]) -> Self {
        let mut step = Self {
            conditional: false,
            effect: Effect::Nothing,
        };
        let mut words = words.iter().map(String::as_str);
        while let Some(word) = words.next() {
            match word {
                "-j" | "-g" => {
                    let target = words.next().unwrap_or_default();
                    step.effect = match Effect::of_target(target) {
                        // A name that is no built-in target is a chain.
                        Effect::Nothing if !is_extension(target) && word == "-g" => {
                            Effect::Goto(target.into())
                        }
                        Effect::Nothing if !is_extension(target) => Effect::Jump(target.into()),
                        effect => effect,
                    };
                    return step;
                }
                "--comment" => {
                    words.next();
                }
                "-m" => step.conditional |= words.next() != Some("comment"),
                _ => step.conditional = true,
            }
        }
        step
    }
}

impl Effect {
    fn of_target(target: &str) -> Self {
        match target {
            "DROP" | "REJECT" | "TARPIT" => Self::Drop,
            "ACCEPT" | "MASQUERADE" | "SNAT" | "DNAT" | "REDIRECT" | "NETMAP" | "NFQUEUE" => {
                Self::Accept
            }
            "RETURN" => Self::Return,
            _ => Self::Nothing,
        }
    }
}

/// Targets after which the next rule is looked at (`iptables-extensions(8)`).
fn is_extension(target: &str) -> bool {
    const THROUGH: [&str; 14] = [
        "AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CT", "DSCP", "LOG", "MARK", "NFLOG",
        "NOTRACK", "SET", "TCPMSS", "TOS", "TTL",
    ];
    THROUGH.contains(&target)
}

/// Where a packet ends that meets no condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Accepted,
    Dropped,
    Through,
}

/// Chains with their rules.
#[derive(Debug, Default)]
struct Table(BTreeMap<Arc<str>, Vec<Step>>);

impl Table {
    fn judge(&self, base: &str, policy: Policy) -> Option<Drops> {
        let mut known = BTreeMap::new();
        let (fate, some) = self.walk(base, &mut known);
        match (fate, policy) {
            (Fate::Dropped | Fate::Through, Policy::Drop) => Some(Drops::Policy),
            (Fate::Dropped, Policy::Accept) => Some(Drops::Rest),
            (Fate::Accepted | Fate::Through, _) => some.then_some(Drops::Some),
        }
    }

    /// The fate of a packet that meets no condition, and whether one that meets some can be dropped.
    fn walk<'a>(
        &'a self,
        chain: &'a str,
        known: &mut BTreeMap<&'a str, (Fate, bool)>,
    ) -> (Fate, bool) {
        if let Some(answer) = known.get(chain) {
            return *answer;
        }
        // The kernel refuses loops; if a dump shows one nevertheless (it is no snapshot), it ends here.
        known.insert(chain, (Fate::Through, false));
        let (mut fate, mut some) = (Fate::Through, false);
        for step in self.0.get(chain).into_iter().flatten() {
            let (end, inner) = match &step.effect {
                Effect::Nothing => continue,
                Effect::Map => {
                    some = true;
                    continue;
                }
                Effect::Accept => (Some(Fate::Accepted), false),
                Effect::Drop => (Some(Fate::Dropped), false),
                Effect::Return => (Some(Fate::Through), false),
                Effect::Goto(target) => {
                    let (fate, inner) = self.walk(target, known);
                    (Some(fate), inner)
                }
                Effect::Jump(target) => match self.walk(target, known) {
                    (Fate::Through, inner) => (None, inner),
                    (fate, inner) => (Some(fate), inner),
                },
            };
            some |= inner;
            match end {
                Some(Fate::Dropped) if step.conditional => some = true,
                Some(end) if !step.conditional => {
                    fate = end;
                    break;
                }
                _ => {}
            }
        }
        known.insert(chain, (fate, some));
        (fate, some)
    }

    /// Whose chains are reached from here.
    fn programs(&self, base: &str) -> BTreeSet<&'static str> {
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        let mut next = vec![base];
        while let Some(chain) = next.pop() {
            let fresh = seen.insert(chain);
            for step in self.0.get(chain).into_iter().flatten().filter(|_| fresh) {
                if let Effect::Jump(target) | Effect::Goto(target) = &step.effect {
                    next.push(target);
                }
            }
        }
        seen.into_iter().filter_map(program_of).collect()
    }
}

/// The words of a line of `iptables-save`, which quotes those with spaces.
fn words(line: &str) -> Vec<String> {
    let mut all = Vec::new();
    let (mut word, mut quoted, mut escaped, mut open) = (String::new(), false, false, false);
    for char in line.chars() {
        match char {
            _ if escaped => {
                word.push(char);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => {
                quoted = !quoted;
                open = true;
            }
            ' ' if !quoted => {
                if open {
                    all.push(std::mem::take(&mut word));
                }
                open = false;
            }
            _ => {
                word.push(char);
                open = true;
            }
        }
    }
    if open {
        all.push(word);
    }
    all
}

#[cfg(test)]
#[path = "foreign_tests.rs"]
mod tests;
