//! Who enforces policy in the kernel: nf_tables rules of our own, or iptables in one of its variants; and the way from
//! one to another without a gap.
//!
//! A new backend is built completely beside the old one. While both stand, both enforce the same policy, so a packet that
//! is denied meets a denial and one that is allowed is allowed twice; the old one is taken away only when the new one
//! holds everything. What an earlier run has left of the other backend is taken away in the same way.
//!
//! The compiled state is kept whatever the backend is: established flows are judged by it. Programs run on threads of
//! their own, each for a bounded time; netlink is quick enough to be spoken here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::Key;
use cali_api::v3::{FelixConfigurationSpec, IptablesBackend, NFTablesMode};
use cali_netlink::conntrack::Tuple;
use cali_netlink::nft::{Nft, NftEvent};
use cali_netlink::{Error, NetNs};
use tracing::{info, warn};

use super::iptables::{Iptables, Tools, Variant};
use super::ruleset::{Refused, Ruleset};
use crate::calc::{Batch, Delta};
use crate::compile::{Compiler, KeptOpen, Suspects, held_flow, held_set};
use crate::iptables::{Program, Renderer};

use super::enforcer_side::{IptablesSide, Side, off_task};

/// After this time a backend that could not be started is tried again.
const START_RETRY: Duration = Duration::from_secs(10);

/// What is not enforced, and what to do.
const IPVS_IN_IPTABLES: &str = "kube-proxy works in IPVS mode (device kube-ipvs0), and this node enforces policy by iptables, which does not \
    see what IPVS forwards: POLICY DOES NOT HOLD FOR CONNECTIONS THROUGH SERVICES. Set nftablesMode of FelixConfiguration default to \
    Enabled (and unset FELIX_NFTABLESMODE), or run kube-proxy with another mode";

/// Between the last write of a new backend, or a try, and the removal of the former one.
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// What the environment says of the backend; it comes before FelixConfiguration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BackendOverride {
    /// `FELIX_NFTABLESMODE`.
    pub nftables: Option<NFTablesMode>,
    /// `FELIX_IPTABLESBACKEND`.
    pub iptables: Option<IptablesBackend>,
}

impl BackendOverride {
    /// Reads the environment; values that mean nothing are reported and left out.
    #[must_use]
    pub fn from_env() -> Self {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        fn parse<T: std::str::FromStr>(name: &str, text: Option<String>) -> Option<T> {
            let text = text.filter(|text| !text.is_empty())?;
            let parsed = text.parse().ok();
            if parsed.is_none() {
                warn!(name, text, "this value means nothing and is left out");
            }
            parsed
        }
        let [nftables, iptables] = ["FELIX_NFTABLESMODE", "FELIX_IPTABLESBACKEND"];
        Self {
            nftables: parse(nftables, variable(nftables)),
            iptables: parse(iptables, variable(iptables)),
        }
    }
}

/// A backend that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Nftables,
    Iptables(IptablesBackend),
}

impl Choice {
    /// `Auto` is nf_tables: it needs nothing from kube-proxy's choice, its table stands beside everybody's.
    fn of(spec: &FelixConfigurationSpec, environment: BackendOverride) -> Self {
        let mode = environment.nftables.or(spec.nftables_mode);
        match mode.unwrap_or(NFTablesMode::Auto) {
            NFTablesMode::Enabled | NFTablesMode::Auto => Self::Nftables,
            NFTablesMode::Disabled => {
                let backend = environment.iptables.or(spec.iptables_backend);
                Self::Iptables(backend.unwrap_or(IptablesBackend::Auto))
            }
        }
    }
}

/// See the module's head.
pub(super) struct Enforcer {
    netns: NetNs,
    nft: Nft,
    environment: BackendOverride,
    choice: Option<Choice>,
    /// What is to be enforced: by this, flows are judged, and nf_tables is written from it.
    compiler: Compiler,
    /// Addresses of the node's own interfaces.
    interfaces: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    kept_open: KeptOpen,
    /// The one that is to stay.
    side: Option<Side>,
    /// Those that are to go.
    leaving: Vec<Side>,
    /// The table of an earlier run, which goes as well.
    remains: Option<Ruleset>,
    /// Chains that are going: their wish is to be nothing.
    emptied: Vec<Iptables>,
    start_at: Option<Instant>,
    problem: Option<String>,
}

impl Enforcer {
    pub(super) fn new(netns: NetNs, nft: Nft, environment: BackendOverride) -> Self {
        Self {
            netns,
            nft,
            environment,
            choice: None,
            compiler: Compiler::default(),
            interfaces: BTreeMap::new(),
            kept_open: KeptOpen::default(),
            side: None,
            leaving: Vec::new(),
            remains: None,
            emptied: Vec::new(),
            start_at: None,
            problem: None,
        }
    }

    fn sides(&mut self) -> impl Iterator<Item = &mut Side> {
        self.side.iter_mut().chain(&mut self.leaving)
    }

    /// What is to be enforced.
    pub(super) const fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// The addresses of the node's own interfaces.
    pub(super) const fn interfaces(&self) -> &BTreeMap<Arc<str>, BTreeSet<IpAddr>> {
        &self.interfaces
    }

    /// Whose flows may have got another verdict since the last call.
    pub(super) fn take_suspects(&mut self) -> Suspects {
        self.compiler.take_suspects()
    }

    /// The addresses of the node's own interfaces; true where that changes what is to be enforced.
    pub(super) fn set_interfaces(
        &mut self,
        interfaces: BTreeMap<Arc<str>, BTreeSet<IpAddr>>,
    ) -> bool {
        self.compiler.set_interfaces(interfaces.clone());
        let touched = self.compiler.take_touched();
        let changed = !touched.is_empty();
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            match side {
                Side::Nftables(ruleset) => ruleset.touch(touched.clone()),
                Side::Iptables(side) => side.set_interfaces(&interfaces),
            }
        }
        self.interfaces = interfaces;
        changed
    }

    /// kube-proxy works in IPVS mode, or does not any more; true where that is something else than before.
    pub(super) fn set_ipvs(&mut self, active: bool) -> bool {
        if self.compiler.has_ipvs() == active {
            return false;
        }
        self.compiler.set_ipvs(active);
        let touched = self.compiler.take_touched();
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            if let Side::Nftables(ruleset) = side {
                ruleset.touch(touched.clone());
            }
        }
        true
    }

    /// What the lock-out guard keeps open; true where that is something else than before.
    pub(super) fn set_kept_open(&mut self, kept: &KeptOpen) -> bool {
        if !self.compiler.set_kept_open(kept.clone()) {
            return false;
        }
        self.kept_open = kept.clone();
        let touched = self.compiler.take_touched();
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            match side {
                Side::Nftables(ruleset) => ruleset.touch(touched.clone()),
                Side::Iptables(side) => side.set_kept_open(kept),
            }
        }
        true
    }

    /// Takes a batch in. `whole` says everything so far, this batch included, for a backend that starts with it.
    pub(super) async fn on_batch(
        &mut self,
        batch: &Batch,
        whole: impl Fn() -> Batch,
        now: Instant,
    ) {
        self.compiler.apply(batch);
        let touched = self.compiler.take_touched();
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            match side {
                Side::Nftables(ruleset) => {
                    if batch.in_sync {
                        ruleset.touch_all(self.compiler.program());
                    }
                    ruleset.touch(touched.clone());
                }
                Side::Iptables(side) => side.take(batch),
            }
        }
        let settings = batch.deltas.iter().rev().find_map(|delta| match delta {
            Delta::Settings(spec) => Some(spec),
            _ => None,
        });
        if let Some(spec) = settings {
            let choice = Choice::of(spec, self.environment);
            if self.choice != Some(choice) {
                self.choice = Some(choice);
                self.start(choice, &whole, now).await;
            }
            for side in self.sides() {
                if let Side::Iptables(side) = side {
                    side.configure(spec);
                }
            }
        }
    }

    /// Tries to start what was chosen and could not be started, if that is due.
    pub(super) async fn retry_start(&mut self, whole: impl Fn() -> Batch, now: Instant) {
        if let Some(choice) = self
            .choice
            .filter(|_| self.start_at.is_some_and(|at| at <= now))
        {
            self.start(choice, &whole, now).await;
            let whole = whole();
            let settings = whole.deltas.iter().find_map(|delta| match delta {
                Delta::Settings(spec) => Some(spec),
                _ => None,
            });
            for side in self.sides() {
                if let (Side::Iptables(side), Some(spec)) = (side, settings) {
                    side.configure(spec);
                }
            }
        }
    }

    async fn start(&mut self, choice: Choice, whole: &impl Fn() -> Batch, now: Instant) {
        let first = self.side.is_none();
        let started = match choice {
            Choice::Nftables => self.start_nftables(),
            Choice::Iptables(backend) => self.start_iptables(backend, whole, now).await,
        };
        match started {
            Ok(new) => {
                if let Some(side) = new {
                    info!(backend = side.name(), "enforcing policy with this backend");
                    self.leaving.extend(self.side.replace(side));
                }
                self.start_at = None;
                self.problem = None;
            }
            Err(error) => {
                warn!(%error, "the chosen backend cannot be started; the former one stays");
                self.problem = Some(error.to_string());
                self.start_at = Some(now + START_RETRY);
                return;
            }
        }
        if first {
            self.adopt_remains(now).await;
        }
    }

    /// `None`: it is the one that stands.
    fn start_nftables(&mut self) -> Result<Option<Side>, Error> {
        let is = |side: &Side| matches!(side, Side::Nftables(_));
        if self.stands(is) {
            return Ok(None);
        }
        let mut ruleset = match self.remains.take() {
            Some(ruleset) => ruleset,
            None => Ruleset::adopt(self.nft.clone())?,
        };
        ruleset.touch_all(self.compiler.program());
        Ok(Some(Side::Nftables(Box::new(ruleset))))
    }

    async fn start_iptables(
        &mut self,
        backend: IptablesBackend,
        whole: &impl Fn() -> Batch,
        now: Instant,
    ) -> Result<Option<Side>, Error> {
        let netns = self.netns.clone();
        let variant = match backend {
            IptablesBackend::Legacy => Variant::Legacy,
            IptablesBackend::NFT => Variant::Nft,
            IptablesBackend::Auto => match &self.side {
                // What was found once stands until somebody says otherwise.
                Some(Side::Iptables(side)) => side.kernel.variant(),
                _ => off_task(move || Tools::detect(&netns)).await?,
            },
        };
        let is =
            |side: &Side| matches!(side, Side::Iptables(side) if side.kernel.variant() == variant);
        if self.stands(is) {
            return Ok(None);
        }
        self.emptied.retain(|kernel| kernel.variant() != variant);
        let netns = self.netns.clone();
        let kernel = off_task(move || Iptables::adopt(&netns, variant, now)).await??;
        let mut side = IptablesSide {
            renderer: Renderer::default(),
            kernel,
        };
        side.renderer.set_interfaces(self.interfaces.clone());
        side.renderer.set_kept_open(self.kept_open.clone());
        side.take(&whole());
        Ok(Some(Side::Iptables(Box::new(side))))
    }

    /// Whether such a side stands; one that was to go, and is wanted again before it went, stays.
    fn stands(&mut self, is: impl Fn(&Side) -> bool) -> bool {
        if self.side.as_ref().is_some_and(&is) {
            return true;
        }
        let Some(at) = self.leaving.iter().position(is) else {
            return false;
        };
        let side = self.leaving.remove(at);
        self.leaving.extend(self.side.replace(side));
        true
    }

    /// What an earlier run has left of the backend that was not chosen.
    async fn adopt_remains(&mut self, now: Instant) {
        if matches!(self.side, Some(Side::Iptables(_))) {
            match Ruleset::adopt(self.nft.clone()) {
                Ok(ruleset) => self.remains = Some(ruleset).filter(Ruleset::exists),
                Err(error) => warn!(%error, "what nf_tables holds of ours cannot be read"),
            }
        }
        let used = match &self.side {
            Some(Side::Iptables(side)) => Some(side.kernel.variant()),
            _ => None,
        };
        for variant in [Variant::Legacy, Variant::Nft] {
            if Some(variant) == used {
                continue;
            }
            let (netns, nft) = (self.netns.clone(), self.nft.clone());
            let adopted = off_task(move || {
                let tools = Tools::new(netns.clone(), variant);
                let ours = tools.holds_ours(&nft);
                ours.then(|| Iptables::adopt(&netns, variant, now))
                    .transpose()
            });
            match adopted.await {
                Ok(Ok(Some(kernel))) => {
                    info!(%variant, "an earlier run has left chains here; they go once policy stands");
                    self.emptied.push(kernel);
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) | Err(error) => {
                    warn!(%error, "chains of an earlier run cannot be read");
                }
            }
        }
    }

    pub(super) fn on_events(&mut self, events: Vec<NftEvent>, now: Instant) {
        for side in self.sides() {
            match side {
                Side::Nftables(ruleset) => {
                    ruleset.on_events(events.iter().cloned());
                }
                Side::Iptables(side) => side.kernel.on_events(&events, now),
            }
        }
    }

    pub(super) fn on_overflow(&mut self, now: Instant) {
        for side in self.sides() {
            match side {
                Side::Nftables(ruleset) => ruleset.on_overflow(),
                Side::Iptables(side) => side.kernel.on_overflow(now),
            }
        }
    }

    /// When [`Self::apply`] has something to do.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        let sides = self.side.iter().chain(&self.leaving);
        let complete = self.side.as_ref().is_some_and(Side::is_complete);
        let remains = !self.leaving.is_empty() || self.remains.is_some();
        sides
            .filter_map(|side| side.next_due(now))
            .chain(
                self.emptied
                    .iter()
                    .filter(|_| complete)
                    .map(|kernel| kernel.next_due(now)),
            )
            .chain((complete && remains).then_some(now + REMOVE_PAUSE))
            .chain(self.start_at)
            .min()
    }

    /// Brings the kernel to the wish, and takes away a former backend once the new one holds everything, the flows that
    /// policy forbade while they were established (`held`) included.
    pub(super) async fn apply(&mut self, held: &BTreeMap<Tuple, Tuple>) {
        if let Some(side) = self.side.take() {
            self.side = self.write(side).await;
        }
        for side in std::mem::take(&mut self.leaving) {
            let side = self.write(side).await;
            self.leaving.extend(side);
        }
        if !self.side.as_ref().is_some_and(Side::is_complete) {
            return;
        }
        if (!self.leaving.is_empty() || self.remains.is_some())
            && !held.is_empty()
            && let Some(side) = &mut self.side
            && let Err(problem) = side.change_held(&BTreeMap::new(), held, held)
        {
            warn!(
                problem,
                "flows that policy forbids cannot be held by the new backend"
            );
        }
        for side in std::mem::take(&mut self.leaving) {
            info!(
                backend = side.name(),
                "the new backend holds everything; taking this one away"
            );
            match side {
                Side::Nftables(mut ruleset) => {
                    if let Err(error) = ruleset.remove() {
                        warn!(error, "the former table cannot be removed; trying again");
                        self.leaving.push(Side::Nftables(ruleset));
                    }
                }
                Side::Iptables(side) => self.emptied.push(side.kernel),
            }
        }
        if let Some(mut ruleset) = self.remains.take() {
            info!("taking away the table of an earlier run");
            if let Err(error) = ruleset.remove() {
                warn!(
                    error,
                    "the table of an earlier run cannot be removed; trying again"
                );
                self.remains = Some(ruleset);
            }
        }
        self.vacate().await;
    }

    /// Takes chains away that are not wanted any more.
    async fn vacate(&mut self) {
        let sets_stay = matches!(self.side, Some(Side::Iptables(_)));
        for mut kernel in std::mem::take(&mut self.emptied) {
            let left = off_task(move || {
                if sets_stay {
                    kernel.leave_sets();
                }
                let left = kernel.vacate(&Program::default(), Instant::now());
                left.then_some(kernel)
            });
            match left.await {
                Ok(left) => self.emptied.extend(left),
                Err(error) => warn!(%error, "chains that are not wanted any more stay"),
            }
        }
    }

    async fn write(&mut self, side: Side) -> Option<Side> {
        let now = Instant::now();
        match side {
            Side::Nftables(mut ruleset) => {
                ruleset.apply(self.compiler.program(), now);
                Some(Side::Nftables(ruleset))
            }
            Side::Iptables(side) if side.kernel.next_due(now) > now => Some(Side::Iptables(side)),
            Side::Iptables(mut side) => {
                let written = off_task(move || {
                    side.apply();
                    side
                });
                match written.await {
                    Ok(side) => Some(Side::Iptables(side)),
                    Err(error) => {
                        // What it held is in the kernel still, and is adopted again.
                        warn!(%error, "this backend has failed; starting it again");
                        self.problem = Some(error.to_string());
                        self.start_at = Some(now + START_RETRY);
                        None
                    }
                }
            }
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.side.as_ref().is_some_and(Side::is_settled)
    }

    /// Whether the chains of an endpoint's interface are in the kernel. During a switch those of either backend do.
    pub(super) fn has_endpoint(&self, interface: &str) -> Result<(), String> {
        let mut sides = self.side.iter().chain(&self.leaving);
        let missing = |side: &Side| {
            ["cali-tw-", "cali-fw-"]
                .map(|prefix| format!("{prefix}{interface}"))
                .into_iter()
                .find(|chain| !side.has_chain(chain))
        };
        match self.side.as_ref().map(missing) {
            Some(None) => Ok(()),
            _ if sides.any(|side| missing(side).is_none()) => Ok(()),
            Some(Some(chain)) => Err(format!("its rules (chain {chain}) are not in the kernel")),
            None => Err("no backend could be started yet".to_owned()),
        }
    }

    pub(super) fn refused(&self) -> Vec<Refused> {
        self.side.as_ref().map_or_else(Vec::new, Side::refused)
    }

    /// What an operator should know.
    pub(super) fn notices(&self) -> Vec<String> {
        let mut all: Vec<String> = self.problem.iter().cloned().collect();
        let unplaced: Vec<Key> = self.compiler.unplaced_hosts();
        all.extend(unplaced.iter().map(|host| {
            format!("{host} is not applied: no interface has one of its expected addresses")
        }));
        all.extend(self.side.iter().filter_map(|side| {
            let problem = side.problem();
            problem.map(|problem| format!("{}: {problem}", side.name()))
        }));
        if self.compiler.has_ipvs() && matches!(self.side, Some(Side::Iptables(_))) {
            all.push(IPVS_IN_IPTABLES.to_owned());
        }
        all.extend(self.leaving.iter().map(|side| {
            format!(
                "{} stays until the chosen backend holds everything",
                side.name()
            )
        }));
        all
    }

    // ---- flows that policy forbade while they were established

    /// What a predecessor holds, as far as it tells which packets belong together.
    pub(super) fn held_before(&self) -> BTreeMap<Tuple, Tuple> {
        let (table, chains) = match &self.side {
            Some(Side::Nftables(ruleset)) => (Some(&**ruleset), None),
            Some(Side::Iptables(side)) => (self.remains.as_ref(), Some(&side.kernel)),
            None => (None, None),
        };
        let mut held = BTreeMap::new();
        for kernel in chains.into_iter().chain(&self.emptied) {
            held.extend(kernel.held().unwrap_or_default());
        }
        if let Some(ruleset) = table {
            for v4 in [true, false] {
                let elements = ruleset.expiring(&held_set(v4)).unwrap_or_default();
                held.extend(elements.iter().filter_map(held_flow));
            }
        }
        held
    }

    /// Makes room for held flows, or takes it away.
    pub(super) fn set_holding(&mut self, holding: bool) {
        self.compiler.set_holding(holding);
        self.write_holding();
    }

    /// Whether what was held has been lost since the last call, and must be put in again.
    pub(super) fn write_holding(&mut self) -> bool {
        let touched = self.compiler.take_touched();
        let mut emptied = false;
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            match side {
                Side::Nftables(ruleset) => {
                    ruleset.touch(touched.clone());
                    ruleset.apply(self.compiler.program(), Instant::now());
                    emptied |= ruleset.take_emptied();
                }
                Side::Iptables(side) => emptied |= side.kernel.take_emptied(),
            }
        }
        emptied
    }

    /// Changes what is held. A failure is told; the entries are deleted all the same.
    pub(super) fn change_held(
        &mut self,
        gone: &BTreeMap<Tuple, Tuple>,
        new: &BTreeMap<Tuple, Tuple>,
        kept: &BTreeMap<Tuple, Tuple>,
    ) {
        for side in self.sides() {
            if let Err(problem) = side.change_held(gone, new, kept) {
                warn!(problem, "flows that policy forbids cannot be held");
            }
        }
    }

    /// Releases everything that is held of these addresses, whoever has put it there.
    pub(super) fn release_addresses(&mut self, addresses: &[IpAddr]) {
        for side in self.sides() {
            if let Side::Iptables(side) = side
                && let Err(error) = side.kernel.release_addresses(addresses)
            {
                warn!(%error, "flows of former endpoints are still held");
            }
        }
    }

    /// Those of these flows that the kernel still holds.
    ///
    /// # Errors
    /// The kernel's answer.
    pub(super) fn still_held(
        &self,
        held: &BTreeMap<Tuple, Tuple>,
    ) -> Result<BTreeSet<Tuple>, Error> {
        self.side
            .as_ref()
            .map_or_else(|| Ok(BTreeSet::new()), |side| side.still_held(held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_comes_before_the_configuration_and_nonsense_is_left_out() {
        let spec = |json| -> FelixConfigurationSpec { serde_json::from_str(json).expect("a spec") };
        let environment = |mode: &str, backend: &str| {
            let values = BTreeMap::from([
                ("FELIX_NFTABLESMODE", mode.to_owned()),
                ("FELIX_IPTABLESBACKEND", backend.to_owned()),
            ]);
            BackendOverride::read(|name| values.get(name).cloned())
        };
        let nothing = spec("{}");
        let legacy = spec(r#"{"nftablesMode":"Disabled","iptablesBackend":"Legacy"}"#);
        for (spec, mode, backend, choice) in [
            (&nothing, "", "", Choice::Nftables),
            (
                &nothing,
                "Disabled",
                "",
                Choice::Iptables(IptablesBackend::Auto),
            ),
            (
                &nothing,
                "Disabled",
                "NFT",
                Choice::Iptables(IptablesBackend::NFT),
            ),
            (&nothing, "", "Legacy", Choice::Nftables),
            (&legacy, "", "", Choice::Iptables(IptablesBackend::Legacy)),
            (&legacy, "", "NFT", Choice::Iptables(IptablesBackend::NFT)),
            (&legacy, "Enabled", "", Choice::Nftables),
            (&legacy, "Auto", "", Choice::Nftables),
            (
                &legacy,
                "sometimes",
                "best",
                Choice::Iptables(IptablesBackend::Legacy),
            ),
        ] {
            let chosen = Choice::of(spec, environment(mode, backend));
            assert_eq!(chosen, choice, "{mode} {backend}");
        }
    }
}
