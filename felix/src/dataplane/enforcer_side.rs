//! A backend in the kernel, behind one face.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use cali_api::v3::FelixConfigurationSpec;
use cali_netlink::conntrack::Tuple;
use cali_netlink::nft::Elem;
use cali_netlink::{Cause, Error};

use super::iptables::Iptables;
use super::ruleset::{Refused, Ruleset};
use crate::calc::Batch;
use crate::compile::{KeptOpen, held_elements, held_set, held_tuple};
use crate::iptables::Renderer;

/// iptables in one variant, with what it is to hold.
pub(super) struct IptablesSide {
    pub(super) renderer: Renderer,
    pub(super) kernel: Iptables,
}

/// A backend in the kernel.
pub(super) enum Side {
    Nftables(Box<Ruleset>),
    Iptables(Box<IptablesSide>),
}

/// Does what takes its time on a thread of its own.
///
/// # Errors
/// It panicked.
pub(super) async fn off_task<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::new("run", "a step", Cause::Invalid(error.to_string())))
}

impl IptablesSide {
    /// Takes a batch in.
    pub(super) fn take(&mut self, batch: &Batch) {
        self.renderer.apply(batch);
        if batch.in_sync {
            self.kernel.touch_all(self.renderer.program());
        }
        let touched = self.renderer.take_touched_sets();
        self.kernel.touch(touched);
    }

    pub(super) fn set_interfaces(&mut self, interfaces: &BTreeMap<Arc<str>, BTreeSet<IpAddr>>) {
        self.renderer.set_interfaces(interfaces.clone());
        let touched = self.renderer.take_touched_sets();
        self.kernel.touch(touched);
    }

    pub(super) fn set_kept_open(&mut self, kept: &KeptOpen) {
        self.renderer.set_kept_open(kept.clone());
        let touched = self.renderer.take_touched_sets();
        self.kernel.touch(touched);
    }

    pub(super) fn configure(&mut self, spec: &FelixConfigurationSpec) {
        self.kernel.configure(spec);
        self.kernel
            .set_max_set_size(self.renderer.settings().max_set_size);
    }

    pub(super) fn apply(&mut self) {
        self.kernel.apply(self.renderer.program(), Instant::now());
    }
}

impl Side {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Nftables(_) => "nf_tables".to_owned(),
            Self::Iptables(side) => side.kernel.variant().to_string(),
        }
    }

    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        match self {
            Self::Nftables(ruleset) => ruleset.next_due(now),
            Self::Iptables(side) => Some(side.kernel.next_due(now)),
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        match self {
            Self::Nftables(ruleset) => ruleset.is_settled(),
            Self::Iptables(side) => side.kernel.is_settled(),
        }
    }

    /// It enforces everything, without exception.
    pub(super) fn is_complete(&self) -> bool {
        match self {
            Self::Nftables(ruleset) => {
                ruleset.is_settled() && ruleset.refused().is_empty() && ruleset.problem().is_none()
            }
            Self::Iptables(side) => side.kernel.is_complete(),
        }
    }

    pub(super) fn has_chain(&self, name: &str) -> bool {
        match self {
            Self::Nftables(ruleset) => ruleset.has_chain(name),
            Self::Iptables(side) => side.kernel.has_chain(name),
        }
    }

    pub(super) fn refused(&self) -> Vec<Refused> {
        match self {
            Self::Nftables(ruleset) => ruleset.refused(),
            Self::Iptables(side) => side.kernel.refused(),
        }
    }

    pub(super) fn problem(&self) -> Option<&str> {
        match self {
            Self::Nftables(ruleset) => ruleset.problem(),
            Self::Iptables(side) => side.kernel.problem(),
        }
    }

    /// Changes which flows are held; `kept` are all that are held afterwards.
    pub(super) fn change_held(
        &mut self,
        gone: &BTreeMap<Tuple, Tuple>,
        new: &BTreeMap<Tuple, Tuple>,
        kept: &BTreeMap<Tuple, Tuple>,
    ) -> Result<(), String> {
        match self {
            Self::Nftables(ruleset) => {
                for v4 in [true, false] {
                    ruleset
                        .change_expiring(&held_set(v4), &elements(gone, v4), &elements(new, v4))
                        .map_err(|rejected| rejected.to_string())?;
                }
                Ok(())
            }
            Self::Iptables(side) => {
                let changed = side.kernel.change_held(gone, new, kept);
                changed.map_err(|error| error.to_string())
            }
        }
    }

    /// The tuples of these flows that the kernel still holds.
    pub(super) fn still_held(
        &self,
        held: &BTreeMap<Tuple, Tuple>,
    ) -> Result<BTreeSet<Tuple>, Error> {
        match self {
            Self::Nftables(ruleset) => {
                let mut left = BTreeSet::new();
                for v4 in [true, false] {
                    let elements = ruleset.expiring(&held_set(v4))?;
                    left.extend(elements.iter().filter_map(held_tuple));
                }
                Ok(left)
            }
            Self::Iptables(side) => side.kernel.still_held(held),
        }
    }
}

fn elements(flows: &BTreeMap<Tuple, Tuple>, v4: bool) -> Vec<Elem> {
    let of_family = flows
        .iter()
        .filter(|(original, _)| original.source.is_ipv4() == v4);
    of_family
        .flat_map(|(original, reply)| held_elements(original, reply))
        .collect()
}
