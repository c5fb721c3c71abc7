//! Established flows past the rules: when the flowtable stands, and with which devices.
//!
//! Invariant: while a change is on its way that may forbid a flow, nothing is offloaded. The table goes before the rules
//! change, and comes back when the flows that must end have ended. Nobody's policy depends on it: what the kernel refuses
//! of it is told, and the packets take the long way.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::v3::{FelixConfigurationSpec, FlowTableOffload};
use cali_netlink::nft::{Nft, NftEvent, Transaction};
use cali_netlink::{Error, Netlink};
use regex::Regex;
use tracing::{info, warn};

use crate::calc::{Endpoint, Limits};
use crate::compile::{Offload as Plan, offload_table};

/// What the kernel refused is tried again after this time: a module may have come.
const RETRY: Duration = Duration::from_secs(60);
/// Taking it away is tried sooner: flows that are forbidden may go through it.
const RETRY_SOON: Duration = Duration::from_secs(1);

/// See the module's head.
pub(super) struct Offload {
    nft: Nft,
    netlink: Netlink,
    settings: Settings,
    /// What the kernel holds of it.
    stands: Stands,
    /// Interfaces, endpoints or settings have changed since the last look.
    outdated: bool,
    retry_at: Option<Instant>,
    problem: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stands {
    Nothing,
    /// The table, with this in it; `None`: somebody else wrote it, or an earlier run.
    Table(Option<Plan>),
}

/// What FelixConfiguration says of it.
#[derive(Debug, Clone, Default)]
struct Settings {
    on: bool,
    /// Host interfaces that take part.
    pattern: Option<Regex>,
    problem: Option<String>,
}

impl Settings {
    fn of(spec: &FelixConfigurationSpec) -> Self {
        let on = spec.nftables_flow_table_offload == Some(FlowTableOffload::All);
        let pattern = spec.nftables_flow_table_data_iface_pattern.as_deref();
        let pattern = pattern.filter(|pattern| on && !pattern.is_empty());
        let (pattern, problem) = match pattern.map(Regex::new).transpose() {
            Ok(pattern) => (pattern, None),
            Err(error) => (
                None,
                Some(format!(
                    "nftablesFlowTableDataIfacePattern of FelixConfiguration default: {error}; no host interface takes part"
                )),
            ),
        };
        Self {
            on,
            pattern,
            problem,
        }
    }

    fn is(&self, other: &Self) -> bool {
        let text = |settings: &Self| settings.pattern.as_ref().map(|p| p.as_str().to_owned());
        self.on == other.on && text(self) == text(other) && self.problem == other.problem
    }
}

/// Which devices take part: workloads without limits, `tunnels`, and host interfaces that the pattern names. Pure.
fn plan(
    settings: &Settings,
    links: impl Iterator<Item = (u32, Arc<str>)>,
    workloads: Workloads,
    tunnels: &[&str],
    ipvs: bool,
) -> Plan {
    let Workloads { free, spared } = workloads;
    let takes_part = |name: &str| {
        !spared.contains(name)
            && (free.contains(name)
                || tunnels.contains(&name)
                || settings.pattern.as_ref().is_some_and(|p| p.is_match(name)))
    };
    let devices = links.filter(|(_, name)| takes_part(name)).collect();
    Plan {
        devices,
        spared,
        ipvs,
    }
}

/// Interfaces of local workloads.
#[derive(Debug, Default)]
struct Workloads {
    free: BTreeSet<Arc<str>>,
    /// With limits or marks: all of their packets must be seen.
    spared: BTreeSet<Arc<str>>,
}

impl Workloads {
    fn of<'a>(endpoints: impl Iterator<Item = &'a Arc<Endpoint>>) -> Self {
        let mut all = Self::default();
        for endpoint in endpoints {
            let names = if endpoint.limits == Limits::default() {
                &mut all.free
            } else {
                &mut all.spared
            };
            names.insert(endpoint.interface.clone());
        }
        all
    }
}

impl Offload {
    /// Looks whether an earlier run has left the table.
    pub(super) fn open(nft: Nft, netlink: Netlink) -> Self {
        let left = nft
            .tables()
            .is_ok_and(|tables| tables.iter().any(|table| table.name == offload_table()));
        Self {
            nft,
            netlink,
            settings: Settings::default(),
            stands: if left {
                Stands::Table(None)
            } else {
                Stands::Nothing
            },
            outdated: true,
            retry_at: None,
            problem: None,
        }
    }

    /// Takes the settings in.
    pub(super) fn configure(&mut self, spec: &FelixConfigurationSpec) {
        let settings = Settings::of(spec);
        if !settings.is(&self.settings) {
            self.settings = settings;
            self.take_down();
        }
    }

    /// Interfaces or endpoints have changed; true where that matters.
    pub(super) fn touch(&mut self) -> bool {
        self.outdated = true;
        self.settings.on
    }

    /// Somebody else changed the table.
    pub(super) fn on_events(&mut self, events: &[NftEvent]) {
        let foreign = |event: &NftEvent| {
            matches!(event, NftEvent::Change { table, port, .. }
                if *table == offload_table() && *port != self.nft.port())
        };
        // The kernel itself tells of devices that left, under no port.
        if events
            .iter()
            .any(|event| foreign(event) && event.port() != 0)
        {
            self.stands = Stands::Table(None);
            self.outdated = true;
        }
    }

    /// Ends every short cut: flows may be forbidden by what comes next.
    pub(super) fn take_down(&mut self) {
        self.outdated = true;
        if self.stands == Stands::Nothing {
            return;
        }
        let mut transaction = Transaction::new(offload_table());
        transaction.delete_table();
        match self.nft.commit_all(transaction) {
            Ok(()) => self.stands = Stands::Nothing,
            Err(error) if error.is_not_found() => self.stands = Stands::Nothing,
            Err(error) => {
                warn!(%error, "offloaded flows cannot be ended; trying again");
                self.problem = Some(format!("offloaded flows cannot be ended: {error}"));
                self.stands = Stands::Table(None);
                self.retry_at = Some(Instant::now() + RETRY_SOON);
            }
        }
    }

    /// When to look.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Policy stands and no flow waits for its end: what is asked for may stand.
    pub(super) fn put_up<'a>(
        &mut self,
        endpoints: impl Iterator<Item = &'a Arc<Endpoint>>,
        tunnels: &[&str],
        ipvs: bool,
        now: Instant,
    ) {
        if self.retry_at.is_some_and(|at| at > now) || (!self.outdated && self.retry_at.is_none()) {
            return;
        }
        self.retry_at = None;
        self.outdated = false;
        if !self.settings.on {
            self.problem = None;
            self.take_down();
            self.outdated = self.retry_at.is_some();
            return;
        }
        match self.write(endpoints, tunnels, ipvs) {
            Ok(()) => self.problem = None,
            Err(error) => {
                let problem = format!(
                    "nftablesFlowTableOffload: the kernel refuses the flowtable ({error}); packets take the way through the rules. It \
                     needs the modules nf_flow_table_inet and nft_flow_offload"
                );
                if self.problem.as_ref() != Some(&problem) {
                    warn!("{problem}");
                }
                self.problem = Some(problem);
                self.retry_at = Some(now + RETRY);
            }
        }
    }

    fn write<'a>(
        &mut self,
        endpoints: impl Iterator<Item = &'a Arc<Endpoint>>,
        tunnels: &[&str],
        ipvs: bool,
    ) -> Result<(), Error> {
        let links = self.netlink.dump_links()?.into_iter();
        let links = links
            .filter(|link| link.up)
            .map(|link| (link.index, link.name.into()));
        let workloads = Workloads::of(endpoints);
        let wanted = plan(&self.settings, links, workloads, tunnels, ipvs);
        if self.stands == Stands::Table(Some(wanted.clone())) {
            return Ok(());
        }
        let extension = match &self.stands {
            Stands::Table(Some(before)) => wanted.extend(before),
            _ => None,
        };
        // Where more devices alone are refused, somebody has changed the table.
        let extended = extension.is_some_and(|extension| self.nft.commit_all(extension).is_ok());
        if !extended {
            self.rebuild(&wanted)?;
        }
        info!(
            devices = wanted.devices.len(),
            spared = wanted.spared.len(),
            "established flows are offloaded"
        );
        self.stands = Stands::Table(Some(wanted));
        Ok(())
    }

    fn rebuild(&mut self, wanted: &Plan) -> Result<(), Error> {
        let stands = self.stands != Stands::Nothing;
        match self.nft.commit_all(wanted.build(stands)) {
            // Somebody else has taken it away.
            Err(error) if stands && error.is_not_found() => {
                self.nft.commit_all(wanted.build(false))
            }
            done => done,
        }
    }

    /// Devices between which flows are offloaded now.
    pub(super) fn devices(&self) -> usize {
        match &self.stands {
            Stands::Table(Some(plan)) => plan.devices.len(),
            _ => 0,
        }
    }

    /// What an operator should know.
    pub(super) fn notices(&self) -> impl Iterator<Item = &String> {
        self.settings.problem.iter().chain(&self.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> FelixConfigurationSpec {
        serde_json::from_str(json).expect("a spec")
    }

    #[test]
    fn workloads_without_limits_tunnels_and_the_interfaces_of_the_pattern_take_part() {
        let settings = Settings::of(&spec(
            r#"{"nftablesFlowTableOffload":"All","nftablesFlowTableDataIfacePattern":"^eth[0-9]"}"#,
        ));
        let names = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
        let workloads = Workloads {
            free: names(&["cali1"]),
            spared: names(&["cali2"]),
        };
        let links = ["lo", "eth0", "cali1", "cali2", "vxlan.calico", "docker0"].map(Arc::from);
        let links = (1..).zip(links);
        let plan = plan(&settings, links, workloads, &["vxlan.calico"], false);
        let devices: Vec<&str> = plan.devices.values().map(|name| &**name).collect();
        assert_eq!(devices, ["eth0", "cali1", "vxlan.calico"]);
        assert_eq!(plan.spared, BTreeSet::from(["cali2".into()]));
    }

    #[test]
    fn a_pattern_that_is_none_is_told_and_leaves_host_interfaces_out() {
        let settings = Settings::of(&spec(
            r#"{"nftablesFlowTableOffload":"All","nftablesFlowTableDataIfacePattern":"eth["}"#,
        ));
        assert!(settings.on && settings.pattern.is_none());
        assert!(settings.problem.is_some_and(|text| text.contains("eth[")));
        let off = Settings::of(&spec(r#"{"nftablesFlowTableOffload":"Disabled"}"#));
        assert!(!off.on && off.problem.is_none());
    }

    #[test]
    fn more_devices_are_added_and_other_spared_ones_need_a_new_table() {
        let plan = |devices: &[(u32, &str)], spared: &[&str]| Plan {
            devices: devices
                .iter()
                .map(|(at, name)| (*at, Arc::from(*name)))
                .collect(),
            spared: spared.iter().map(|name| Arc::from(*name)).collect(),
            ipvs: false,
        };
        let before = plan(&[(1, "a"), (2, "b")], &[]);
        assert!(
            plan(&[(2, "b"), (3, "c")], &[]).extend(&before).is_some(),
            "one went, one came"
        );
        assert!(
            plan(&[(1, "a"), (2, "b")], &["c"])
                .extend(&before)
                .is_none()
        );
        assert!(
            plan(&[(1, "z"), (2, "b")], &[]).extend(&before).is_none(),
            "renamed"
        );
        let ipvs = Plan {
            ipvs: true,
            ..plan(&[(1, "a"), (2, "b")], &[])
        };
        assert!(ipvs.extend(&before).is_none(), "other rules");
    }
}
