//! Who enforces policy in the kernel: nf_tables rules of our own, or iptables in one of its variants; and the way from
//! one to another without a gap.
//!
//! A new backend is built completely beside the old one. While both stand, both enforce the same policy, so a packet that
//! is denied meets a denial and one that is allowed is allowed twice; the old one is taken away only when the new one
//! holds everything. What an earlier run has left of the other backend is taken away in the same way.

use std::time::{Duration, Instant};

use cali_api::v3::{FelixConfigurationSpec, IptablesBackend, NFTablesMode};
use cali_netlink::nft::{Nft, NftEvent};
use cali_netlink::{Error, NetNs};
use tracing::{info, warn};

use super::iptables::{Iptables, Tools, Variant};
use super::ruleset::{Refused, Ruleset};
use crate::calc::{Batch, Delta};
use crate::compile::Compiler;
use crate::iptables::{Program, Renderer};

/// After this time a backend that could not be started is tried again.
const START_RETRY: Duration = Duration::from_secs(10);

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
        fn read<T: std::str::FromStr>(name: &str) -> Option<T> {
            let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
            let parsed = text.parse().ok();
            if parsed.is_none() {
                warn!(name, text, "this value means nothing and is left out");
            }
            parsed
        }
        Self {
            nftables: read("FELIX_NFTABLESMODE"),
            iptables: read("FELIX_IPTABLESBACKEND"),
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

struct NftSide {
    compiler: Compiler,
    ruleset: Ruleset,
}

struct IptablesSide {
    renderer: Renderer,
    kernel: Iptables,
}

/// A backend in the kernel.
enum Side {
    Nftables(Box<NftSide>),
    Iptables(Box<IptablesSide>),
}

/// See the module's head.
pub(super) struct Enforcer {
    netns: NetNs,
    nft: Nft,
    environment: BackendOverride,
    choice: Option<Choice>,
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
            side: None,
            leaving: Vec::new(),
            remains: None,
            emptied: Vec::new(),
            start_at: None,
            problem: None,
        }
    }

    /// Takes a batch in. `whole` says everything so far, this batch included, for a backend that starts with it.
    pub(super) fn on_batch(&mut self, batch: &Batch, whole: impl Fn() -> Batch, now: Instant) {
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            side.take(batch);
        }
        let settings = batch.deltas.iter().rev().find_map(|delta| match delta {
            Delta::Settings(spec) => Some(spec),
            _ => None,
        });
        if let Some(spec) = settings {
            let choice = Choice::of(spec, self.environment);
            if self.choice != Some(choice) {
                self.choice = Some(choice);
                self.start(choice, &whole, now);
            }
            for side in self.side.iter_mut().chain(&mut self.leaving) {
                if let Side::Iptables(side) = side {
                    let refresh = spec.iptables_refresh_interval.map(|time| time.0);
                    side.kernel.set_refresh(refresh);
                    side.kernel
                        .set_max_set_size(side.renderer.settings().max_set_size);
                }
            }
        }
    }

    /// Tries to start what was chosen and could not be started, if that is due.
    pub(super) fn retry_start(&mut self, whole: impl Fn() -> Batch, now: Instant) {
        if let Some(choice) = self
            .choice
            .filter(|_| self.start_at.is_some_and(|at| at <= now))
        {
            self.start(choice, &whole, now);
        }
    }

    fn start(&mut self, choice: Choice, whole: &impl Fn() -> Batch, now: Instant) {
        let first = self.side.is_none();
        let started = match choice {
            Choice::Nftables => self.start_nftables(),
            Choice::Iptables(backend) => self.start_iptables(backend, now),
        };
        match started {
            Ok(None) => {}
            Ok(Some(mut side)) => {
                side.take(&whole());
                info!(backend = side.name(), "enforcing policy with this backend");
                self.leaving.extend(self.side.replace(side));
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
            self.adopt_remains(now);
        }
    }

    /// `None`: it is the one that stands.
    fn start_nftables(&mut self) -> Result<Option<Side>, Error> {
        if matches!(self.side, Some(Side::Nftables(_))) {
            return Ok(None);
        }
        self.recall(|side| matches!(side, Side::Nftables(_)));
        if matches!(self.side, Some(Side::Nftables(_))) {
            return Ok(None);
        }
        let ruleset = Ruleset::adopt(self.nft.clone())?;
        Ok(Some(Side::Nftables(Box::new(NftSide {
            compiler: Compiler::default(),
            ruleset,
        }))))
    }

    fn start_iptables(
        &mut self,
        backend: IptablesBackend,
        now: Instant,
    ) -> Result<Option<Side>, Error> {
        let variant = match backend {
            IptablesBackend::Legacy => Variant::Legacy,
            IptablesBackend::NFT => Variant::Nft,
            IptablesBackend::Auto => match &self.side {
                // What was found once stands until somebody says otherwise.
                Some(Side::Iptables(side)) => side.kernel.variant(),
                _ => Tools::detect(&self.netns),
            },
        };
        let is =
            |side: &Side| matches!(side, Side::Iptables(side) if side.kernel.variant() == variant);
        if self.side.as_ref().is_some_and(is) {
            return Ok(None);
        }
        self.recall(is);
        if self.side.as_ref().is_some_and(is) {
            return Ok(None);
        }
        self.emptied.retain(|kernel| kernel.variant() != variant);
        let kernel = Iptables::adopt(&self.netns, variant, now)?;
        let renderer = Renderer::default();
        Ok(Some(Side::Iptables(Box::new(IptablesSide {
            renderer,
            kernel,
        }))))
    }

    /// A side that was to go, and is wanted again before it went.
    fn recall(&mut self, is: impl Fn(&Side) -> bool) {
        if let Some(at) = self.leaving.iter().position(is) {
            let side = self.leaving.remove(at);
            self.leaving.extend(self.side.replace(side));
        }
    }

    /// What an earlier run has left of the backend that was not chosen.
    fn adopt_remains(&mut self, now: Instant) {
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
            if Some(variant) == used
                || !Tools::new(self.netns.clone(), variant).holds_ours(&self.nft)
            {
                continue;
            }
            match Iptables::adopt(&self.netns, variant, now) {
                Ok(kernel) => {
                    info!(%variant, "an earlier run has left chains here; they go once policy stands");
                    self.emptied.push(kernel);
                }
                Err(error) => warn!(%error, "chains of an earlier run cannot be read"),
            }
        }
    }

    pub(super) fn on_events(&mut self, events: Vec<NftEvent>, now: Instant) {
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            match side {
                Side::Nftables(side) => {
                    side.ruleset.on_events(events.iter().cloned());
                }
                Side::Iptables(side) => side.kernel.on_events(&events, now),
            }
        }
    }

    pub(super) fn on_overflow(&mut self, now: Instant) {
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            match side {
                Side::Nftables(side) => side.ruleset.on_overflow(),
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

    /// Brings the kernel to the wish, and takes away a former backend once the new one holds everything.
    pub(super) fn apply(&mut self, now: Instant) {
        for side in self.side.iter_mut().chain(&mut self.leaving) {
            side.apply(now);
        }
        if !self.side.as_ref().is_some_and(Side::is_complete) {
            return;
        }
        for side in std::mem::take(&mut self.leaving) {
            info!(
                backend = side.name(),
                "the new backend holds everything; taking this one away"
            );
            match side {
                Side::Nftables(mut side) => {
                    if let Err(error) = side.ruleset.remove() {
                        warn!(error, "the former table cannot be removed; trying again");
                        self.leaving.push(Side::Nftables(side));
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
        let sets_stay = matches!(self.side, Some(Side::Iptables(_)));
        let nothing = Program::default();
        self.emptied.retain_mut(|kernel| {
            if sets_stay {
                kernel.leave_sets();
            }
            kernel.vacate(&nothing, now)
        });
    }

    pub(super) fn is_settled(&self) -> bool {
        self.side.as_ref().is_some_and(|side| match side {
            Side::Nftables(side) => side.ruleset.is_settled(),
            Side::Iptables(side) => side.kernel.is_settled(),
        })
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
        self.side.as_ref().map_or_else(Vec::new, |side| match side {
            Side::Nftables(side) => side.ruleset.refused(),
            Side::Iptables(side) => side.kernel.refused(),
        })
    }

    /// What an operator should know.
    pub(super) fn notices(&self) -> Vec<String> {
        let mut all: Vec<String> = self.problem.iter().cloned().collect();
        all.extend(self.side.iter().filter_map(|side| {
            let problem = match side {
                Side::Nftables(side) => side.ruleset.problem(),
                Side::Iptables(side) => side.kernel.problem(),
            };
            problem.map(|problem| format!("{}: {problem}", side.name()))
        }));
        all.extend(self.leaving.iter().map(|side| {
            format!(
                "{} stays until the chosen backend holds everything",
                side.name()
            )
        }));
        all
    }
}

impl Side {
    fn name(&self) -> String {
        match self {
            Self::Nftables(_) => "nf_tables".to_owned(),
            Self::Iptables(side) => side.kernel.variant().to_string(),
        }
    }

    fn take(&mut self, batch: &Batch) {
        match self {
            Self::Nftables(side) => {
                side.compiler.apply(batch);
                let touched = side.compiler.take_touched();
                if batch.in_sync {
                    side.ruleset.touch_all(side.compiler.program());
                }
                side.ruleset.touch(touched);
            }
            Self::Iptables(side) => {
                side.renderer.apply(batch);
                let touched = side.renderer.take_touched_sets();
                if batch.in_sync {
                    side.kernel.touch_all(side.renderer.program());
                }
                side.kernel.touch(touched);
            }
        }
    }

    fn apply(&mut self, now: Instant) {
        match self {
            Self::Nftables(side) => side.ruleset.apply(side.compiler.program(), now),
            Self::Iptables(side) => side.kernel.apply(side.renderer.program(), now),
        }
    }

    fn next_due(&self, now: Instant) -> Option<Instant> {
        match self {
            Self::Nftables(side) => side.ruleset.next_due(now),
            Self::Iptables(side) => Some(side.kernel.next_due(now)),
        }
    }

    /// It enforces everything, without exception.
    fn is_complete(&self) -> bool {
        match self {
            Self::Nftables(side) => {
                let ruleset = &side.ruleset;
                ruleset.is_settled() && ruleset.refused().is_empty() && ruleset.problem().is_none()
            }
            Self::Iptables(side) => side.kernel.is_complete(),
        }
    }

    fn has_chain(&self, name: &str) -> bool {
        match self {
            Self::Nftables(side) => side.ruleset.has_chain(name),
            Self::Iptables(side) => side.kernel.has_chain(name),
        }
    }
}
