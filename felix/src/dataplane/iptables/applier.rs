//! [`Iptables`]: chains and sets of both families in one variant.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use cali_api::v3::{FelixConfigurationSpec, GoDuration};
use cali_netlink::nft::{Family as NftFamily, NftEvent};
use cali_netlink::{Error, NetNs};
use tracing::{info, warn};

use super::look::{concerns_us, differences, read, unreadable, versions};
use super::sets::Sets;
use super::tools::{Failure, Tools, Variant};
use crate::calc::IpVersion;
use crate::dataplane::Refused;
use crate::iptables::{
    Chain, ChainKey, Family, Line, Observed, Program, RestorePlan, Table, culprit, joined,
    misplaced_hooks, plan_restore,
};

/// A refused write is tried so often with fewer chains.
const TRIES: usize = 8;
/// Pause after a step that could not be done, doubled with each failure.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// What is refused is tried again after this time, even if nothing changed.
const RETRY: Duration = Duration::from_secs(60);
/// A set that is still referred to is tried again after this time.
const DESTROY_PAUSE: Duration = Duration::from_millis(500);
/// The first look after a write; each further one comes after twice the time.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// `iptablesRefreshInterval` where nothing is said.
const REFRESH: Duration = Duration::from_secs(180);
/// `ipsetsRefreshInterval` where nothing is said.
const SETS_REFRESH: Duration = Duration::from_secs(90);
/// A notification leads to a look after this time: what else the program changes is seen with it.
const SETTLE: Duration = Duration::from_millis(50);
/// Foreign changes within [`FIGHT_WINDOW`] that make a fight (docs/architecture.md §5).
const FIGHT_CHANGES: usize = 5;
const FIGHT_WINDOW: Duration = Duration::from_secs(60);
/// Time between two corrections during a fight.
const FIGHT_PAUSE: Duration = Duration::from_secs(30);
/// Own processes that are remembered, to know their notifications.
const OWN_PROCESSES: usize = 16;

/// See the module's head.
#[derive(Debug)]
pub struct Iptables {
    tools: Tools,
    /// Families that the host has.
    versions: Vec<IpVersion>,
    pub(super) sets: Sets,
    seen: [Observed; 2],
    /// Sets to compare with the wish.
    open_sets: BTreeSet<Arc<str>>,
    open: bool,
    unused_sets: bool,
    /// Another variant uses the same sets.
    sets_stay: bool,
    max_set_size: u32,
    refused: BTreeMap<(usize, ChainKey), String>,
    refused_at: Option<Instant>,
    refresh: Duration,
    sets_refresh: Duration,
    first_look: Duration,
    /// The host's IPv6 is left alone otherwise (`ipv6Support`).
    ipv6: bool,
    look_at: Instant,
    sets_look_at: Instant,
    look_pause: Duration,
    /// Changes of the nf_tables variant whose writer is not known yet, by its port.
    rumours: BTreeSet<u32>,
    own: VecDeque<u32>,
    corrections: VecDeque<Instant>,
    failures: u32,
    not_before: Option<Instant>,
    problem: Option<String>,
}

impl Iptables {
    /// Reads what the tables hold of ours and takes it over.
    ///
    /// # Errors
    /// The tables or the sets cannot be read.
    pub fn adopt(netns: &NetNs, variant: Variant, now: Instant) -> Result<Self, Error> {
        let tools = Tools::new(netns.clone(), variant);
        let sets = Sets::adopt(netns)?;
        let versions = versions(netns);
        let seen = read(&tools, &versions).map_err(|failure| unreadable(variant, failure))?;
        let chains: usize = seen.iter().map(|seen| seen.chains.len()).sum();
        info!(%variant, chains, "adopted the chains");
        Ok(Self {
            tools,
            versions,
            sets,
            seen,
            open_sets: BTreeSet::new(),
            open: true,
            unused_sets: true,
            sets_stay: false,
            max_set_size: 1 << 20,
            refused: BTreeMap::new(),
            refused_at: None,
            refresh: REFRESH,
            sets_refresh: SETS_REFRESH,
            first_look: FIRST_LOOK,
            ipv6: true,
            look_at: now + FIRST_LOOK,
            sets_look_at: now + SETS_REFRESH,
            look_pause: FIRST_LOOK,
            rumours: BTreeSet::new(),
            own: VecDeque::new(),
            corrections: VecDeque::new(),
            failures: 0,
            not_before: None,
            problem: None,
        })
    }

    /// Its variant.
    #[must_use]
    pub const fn variant(&self) -> Variant {
        self.tools.variant()
    }

    /// Whether chains or rules of ours are there, as far as is known.
    #[must_use]
    pub fn has_anything(&self) -> bool {
        self.seen.iter().any(Observed::has_ours)
    }

    /// Takes over what FelixConfiguration says of the ways to write and to look.
    pub fn configure(&mut self, spec: &FelixConfigurationSpec) {
        let or = |time: &Option<GoDuration>, default| {
            let time = time.as_ref().map(|time| time.0);
            time.filter(|time| !time.is_zero()).unwrap_or(default)
        };
        self.refresh = or(&spec.iptables_refresh_interval, REFRESH);
        self.look_pause = self.look_pause.min(self.refresh);
        self.sets_refresh = or(&spec.ipsets_refresh_interval, SETS_REFRESH);
        self.first_look = or(&spec.iptables_post_write_check_interval, FIRST_LOOK);
        self.tools.set_lock(
            or(&spec.iptables_lock_timeout, Duration::ZERO),
            or(&spec.iptables_lock_probe_interval, Duration::ZERO),
        );
        let ipv6 = spec.ipv6_support.unwrap_or(true);
        if std::mem::replace(&mut self.ipv6, ipv6) != ipv6 {
            self.open = true;
        }
    }

    /// What one family is to hold.
    fn wanted<'a>(&self, desired: &'a Program, version: IpVersion) -> &'a Family {
        static NOTHING: LazyLock<Family> = LazyLock::new(Family::default);
        if version == IpVersion::V6 && !self.ipv6 {
            &NOTHING
        } else {
            desired.family(version)
        }
    }

    /// Most members of a set.
    pub fn set_max_set_size(&mut self, max: u32) {
        if std::mem::replace(&mut self.max_set_size, max) != max {
            self.open_sets.extend(self.sets.names());
            self.open = true;
        }
    }

    /// Everything is to be compared with the wish at the next [`Self::apply`]: at start.
    pub fn touch_all(&mut self, desired: &Program) {
        self.open_sets.extend(desired.sets.keys().cloned());
        self.touch(BTreeSet::new());
    }

    /// The wish changed: chains, and these sets. It is tried at once, whatever was refused of the last one.
    pub fn touch(&mut self, sets: BTreeSet<Arc<str>>) {
        self.open_sets.extend(sets);
        self.open = true;
        self.unused_sets = true;
        self.refused.clear();
    }

    /// Takes in notifications of nf_tables, which the nf_tables variant causes.
    pub fn on_events<'a>(&mut self, events: impl IntoIterator<Item = &'a NftEvent>, now: Instant) {
        if self.tools.variant() != Variant::Nft {
            return;
        }
        for event in events {
            match event {
                NftEvent::Change {
                    table,
                    object,
                    port,
                    ..
                } if matches!(table.family, NftFamily::Ip | NftFamily::Ip6)
                    && Table::ALL.iter().any(|known| *table.name == *known.name())
                    && concerns_us(object) =>
                {
                    self.rumours.insert(*port);
                }
                NftEvent::Commit { generation, port } => {
                    if self.rumours.remove(port) && !self.own.contains(&generation.pid) {
                        self.look_at = self.look_at.min(now + SETTLE);
                    }
                }
                NftEvent::Change { .. } => {}
            }
        }
    }

    /// Notifications were lost: the tables are read again.
    pub fn on_overflow(&mut self, now: Instant) {
        self.look_at = self.look_at.min(now + SETTLE);
    }

    /// When [`Self::apply`] has something to do.
    #[must_use]
    pub fn next_due(&self, now: Instant) -> Instant {
        let open = self.open.then_some(now);
        let due = open
            .unwrap_or(self.look_at.min(self.sets_look_at))
            .max(self.not_before.unwrap_or(now));
        match self.refused_at {
            Some(at) => due.min(at + RETRY),
            None => due,
        }
    }

    /// Everything wanted is in the kernel, but for what it refused.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        !self.open
    }

    /// Everything wanted is in the kernel, without exception.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        !self.open
            && self.refused.is_empty()
            && self.sets.refused.is_empty()
            && self.problem.is_none()
    }

    /// Whether a chain of the filter table is in the kernel as it should be, for both families.
    #[must_use]
    pub fn has_chain(&self, name: &str) -> bool {
        let key: ChainKey = (Table::Filter, name.into());
        let versions = self.versions.iter();
        let used = versions.filter(|version| self.ipv6 || **version == IpVersion::V4);
        used.into_iter().all(|version| {
            let family = *version as usize;
            self.seen[family].chains.contains_key(&key)
                && !self.refused.contains_key(&(family, key.clone()))
        })
    }

    /// What was refused.
    #[must_use]
    pub fn refused(&self) -> Vec<Refused> {
        let chains = self
            .refused
            .iter()
            .map(|((family, (table, name)), reason)| {
                let family = if *family == 0 { "IPv4" } else { "IPv6" };
                Refused {
                    object: format!("{family} chain {name} of table {table}"),
                    reason: reason.clone(),
                }
            });
        let sets = self.sets.refused.iter().map(|(name, reason)| Refused {
            object: format!("IP set {name}"),
            reason: reason.clone(),
        });
        chains.chain(sets).collect()
    }

    /// Why nothing can be written at the moment.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Brings the kernel to the wish, as far as it lets us.
    pub fn apply(&mut self, desired: &Program, now: Instant) {
        if self.not_before.is_some_and(|at| at > now) {
            return;
        }
        self.not_before = None;
        if self.look_at <= now
            && let Err(reason) = self.look(desired, now)
        {
            return self.back_off(now, reason);
        }
        if self.sets_look_at <= now
            && let Err(reason) = self.look_at_sets(desired, now)
        {
            return self.back_off(now, reason);
        }
        if self.not_before.is_some() {
            return;
        }
        if self.refused_at.is_some_and(|at| at + RETRY <= now) {
            self.refused_at = None;
            self.refused.clear();
            let failed: Vec<_> = self.sets.refused.keys().cloned().collect();
            self.open_sets.extend(failed);
            self.open = true;
        }
        if self.open {
            self.write(desired, now);
        }
        if self.unused_sets && !self.sets_stay && !self.open && self.refused.is_empty() {
            self.unused_sets = !self.sets.destroy_rest(desired);
            if self.unused_sets {
                self.look_at = self.look_at.min(now + DESTROY_PAUSE);
            }
        }
    }

    /// In words, what of the kernel differs from a program, as far as is known: for audits.
    #[must_use]
    pub fn differing(&self, desired: &Program) -> Vec<String> {
        let mut found = Vec::new();
        for version in &self.versions {
            let seen = &self.seen[*version as usize];
            let plan = plan_restore(seen, self.wanted(desired, *version));
            let lines = plan.write.iter().chain(&plan.remove);
            found.extend(lines.map(|line| line.text.clone()));
        }
        found.extend(self.sets.differing(desired));
        found
    }

    /// The sets are left to another variant, which uses them as well.
    pub fn leave_sets(&mut self) {
        self.sets_stay = true;
    }

    /// Takes everything of ours away: `nothing` is an empty program. True while something is left.
    pub fn vacate(&mut self, nothing: &Program, now: Instant) -> bool {
        self.open |= self.has_anything();
        self.apply(nothing, now);
        let sets = !self.sets_stay && !self.sets.names().is_empty();
        self.unused_sets = sets;
        self.has_anything() || sets
    }

    /// Reads tables and sets again; what somebody else has changed is said and marked for correction.
    fn look(&mut self, desired: &Program, now: Instant) -> Result<(), String> {
        let seen = read(&self.tools, &self.versions).map_err(|failure| failure.reason)?;
        let mut found = self.changed_sets(now)?;
        for version in &self.versions {
            let (before, after) = (&self.seen[*version as usize], &seen[*version as usize]);
            found.extend(differences(before, after));
            if !self.open {
                found.extend(misplaced_hooks(after, self.wanted(desired, *version)));
            }
        }
        self.seen = seen;
        self.look_pause = (self.look_pause * 2).min(self.refresh);
        self.look_at = now + self.look_pause;
        self.correct(found, desired, now);
        Ok(())
    }

    /// The same with the sets alone.
    fn look_at_sets(&mut self, desired: &Program, now: Instant) -> Result<(), String> {
        let found = self.changed_sets(now)?;
        self.correct(found, desired, now);
        Ok(())
    }

    fn changed_sets(&mut self, now: Instant) -> Result<Vec<String>, String> {
        self.sets_look_at = now + self.sets_refresh;
        let sets = self.sets.read().map_err(|error| error.to_string())?;
        let text = |name: &Arc<str>| format!("IP set {name} differs");
        Ok(sets.iter().map(text).collect())
    }

    fn correct(&mut self, found: Vec<String>, desired: &Program, now: Instant) {
        if found.is_empty() {
            return;
        }
        warn!(
            ?found,
            "our chains were changed by somebody else; putting them right"
        );
        self.open_sets.extend(desired.sets.keys().cloned());
        self.open = true;
        self.unused_sets = true;
        self.look_soon(now);
        self.corrections.push_back(now);
        let old = |at: &Instant| now.saturating_duration_since(*at) > FIGHT_WINDOW;
        while self.corrections.front().is_some_and(old) {
            self.corrections.pop_front();
        }
        if self.corrections.len() > FIGHT_CHANGES {
            warn!("our chains are changed again and again; correcting them less often");
            self.problem =
                Some("our chains are changed again and again by somebody else".to_owned());
            self.not_before = Some(now + FIGHT_PAUSE);
        }
    }

    fn look_soon(&mut self, now: Instant) {
        self.look_pause = self.first_look.min(self.refresh);
        self.look_at = now + self.look_pause;
    }

    fn write(&mut self, desired: &Program, now: Instant) {
        let names = std::mem::take(&mut self.open_sets);
        self.sets.fill(desired, &names, self.max_set_size);
        for version in self.versions.clone() {
            if let Err(reason) = self.write_family(self.wanted(desired, version), version, now) {
                self.open_sets.extend(names);
                return self.back_off(now, reason);
            }
        }
        if !self.sets.refused.is_empty() {
            self.refused_at.get_or_insert(now);
        }
        self.open = false;
        self.failures = 0;
        self.problem = None;
    }

    fn write_family(
        &mut self,
        wanted: &Family,
        version: IpVersion,
        now: Instant,
    ) -> Result<(), String> {
        let at = version as usize;
        self.refuse_without_sets(wanted, at, now);
        let mut read_again = false;
        for _ in 0..TRIES {
            let effective = self.effective(wanted, at);
            let plan = plan_restore(&self.seen[at], &effective);
            if plan.write.is_empty() && plan.remove.is_empty() {
                return Ok(());
            }
            let failure = match self.feed(version, &plan.write) {
                Ok(()) => {
                    self.seen[at].adopt(&effective);
                    self.look_soon(now);
                    match self.feed(version, self.removals(&plan)) {
                        Ok(()) => {
                            self.seen[at].forget_unwanted(&effective);
                            return Ok(());
                        }
                        Err(failure) => failure,
                    }
                }
                Err(failure) => failure,
            };
            if !read_again {
                // Perhaps our belief is outdated.
                warn!(
                    reason = failure.reason,
                    "a write was refused; reading the tables again"
                );
                read_again = true;
                self.seen[at] = self.tools.save(version).map_err(|failure| failure.reason)?;
                continue;
            }
            let named = failure
                .line
                .and_then(|line| culprit(&plan.write, line))
                .cloned();
            let guilty = match named {
                Some(key) => vec![(key, failure.reason.clone())],
                None => self.isolate(version, &effective, &plan),
            };
            let mut progress = false;
            for (key, reason) in guilty {
                warn!(chain = %key.1, table = %key.0, reason, "this chain is refused; it keeps its former content");
                progress |= self.refused.insert((at, key), reason).is_none();
            }
            if !progress {
                return Err(failure.reason);
            }
            self.refused_at = Some(now);
        }
        Err("one chain after the other is refused".to_owned())
    }

    /// A chain must not be written before its sets are complete.
    fn refuse_without_sets(&mut self, wanted: &Family, at: usize, now: Instant) {
        if self.sets.refused.is_empty() {
            return;
        }
        for (key, chain) in &wanted.chains {
            let failed = chain.sets().find_map(|set| self.sets.refused.get(set));
            if let Some(reason) = failed {
                self.refused.insert((at, key.clone()), reason.clone());
                self.refused_at.get_or_insert(now);
            }
        }
    }

    /// While chains keep a former content, what that leads to stays as well.
    fn removals<'a>(&self, plan: &'a RestorePlan) -> &'a [Line] {
        if self.refused.is_empty() {
            &plan.remove
        } else {
            &[]
        }
    }

    /// The wish without what was refused.
    fn effective<'a>(&self, wanted: &'a Family, at: usize) -> Cow<'a, Family> {
        let refused = self.refused.keys().filter(|(family, _)| *family == at);
        let mut effective = Cow::Borrowed(wanted);
        for (_, key) in refused {
            let Some(chain) = wanted.chains.get(key) else {
                continue;
            };
            let former = self.seen[at].former(key);
            let content = former.unwrap_or_else(|| closed(key, chain));
            effective.to_mut().chains.insert(key.clone(), content);
        }
        effective
    }

    /// Finds out which chains are refused when the program does not say: each is written by itself.
    fn isolate(
        &mut self,
        version: IpVersion,
        wanted: &Family,
        plan: &RestorePlan,
    ) -> Vec<(ChainKey, String)> {
        let at = version as usize;
        let mut guilty = Vec::new();
        // First all new chains, closed, so that each other one finds what it leads to.
        let mut stage = Family::default();
        for key in &plan.changed {
            if let Some(chain) = wanted
                .chains
                .get(key)
                .filter(|_| !self.seen[at].chains.contains_key(key))
            {
                stage.chains.insert(key.clone(), closed(key, chain));
            }
        }
        let declared = plan_restore(&Observed::default(), &stage);
        if self.feed(version, &declared.write).is_err() {
            return guilty;
        }
        for key in &plan.changed {
            let Some(chain) = wanted.chains.get(key) else {
                continue;
            };
            let mut single = Family::default();
            single.chains.insert(key.clone(), chain.clone());
            let one = plan_restore(&Observed::default(), &single);
            if let Err(failure) = self.feed(version, &one.write) {
                guilty.push((key.clone(), failure.reason));
            }
        }
        if let Ok(seen) = self.tools.save(version) {
            self.seen[at] = seen;
        }
        guilty
    }

    fn feed(&mut self, version: IpVersion, lines: &[Line]) -> Result<(), Failure> {
        if lines.is_empty() {
            return Ok(());
        }
        let pid = self.tools.restore(version, &joined(lines))?;
        self.own.push_back(pid);
        if self.own.len() > OWN_PROCESSES {
            self.own.pop_front();
        }
        Ok(())
    }

    fn back_off(&mut self, now: Instant, reason: String) {
        let pause = PAUSE_FIRST
            .saturating_mul(1 << self.failures.min(10))
            .min(PAUSE_LIMIT);
        self.failures = self.failures.saturating_add(1);
        warn!(reason, ?pause, "chains cannot be written; trying again");
        self.problem = Some(reason);
        self.not_before = Some(now + pause);
        self.open = true;
    }
}

/// What a chain that is refused and new holds: nothing passes it. Packets of the host itself do, where no endpoint is
/// asked for, and the nat table cannot drop.
fn closed(key: &ChainKey, chain: &Chain) -> Chain {
    let rules = match key.0 {
        Table::Nat => Vec::new(),
        _ if chain.hooked => Vec::new(),
        _ => vec!["-m comment --comment \"refused: closed\" -j DROP".to_owned()],
    };
    Chain {
        hooked: chain.hooked,
        ..Chain::new(&key.1, rules)
    }
}
