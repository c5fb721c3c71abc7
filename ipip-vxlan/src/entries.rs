//! Forwarding entries and neighbours of the tunnel devices: desired against observed, through the reconciler.
//!
//! Keys name the device, not its index, so that a device that was re-created is filled again by the same plan.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use cali_netlink::reconcile::{Drift, Op};
use cali_netlink::{Change, Error, FdbEntry, IfIndex, MacAddr, Neighbour, Netlink, Reconciler};

use crate::plan::Plan;

/// Device and MAC of a forwarding entry.
pub(crate) type FdbKey = (&'static str, MacAddr);
/// Device and overlay address of a neighbour.
pub(crate) type NeighbourKey = (&'static str, IpAddr);

/// A neighbour's value: only a permanent one is as planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) mac: Option<MacAddr>,
    pub(crate) permanent: bool,
}

/// Indices of our tunnel devices.
pub(crate) type Indices = BTreeMap<&'static str, IfIndex>;

/// Both tables of all tunnel devices. Everything on our devices is ours (as on Calico's).
#[derive(Debug)]
pub(crate) struct Entries {
    pub(crate) fdb: Reconciler<FdbKey, IpAddr>,
    pub(crate) neighbours: Reconciler<NeighbourKey, Resolved>,
}

impl Default for Entries {
    fn default() -> Self {
        // A neighbour that is not permanent was resolved by the kernel and ages by itself.
        Self {
            fdb: Reconciler::new(|_, _| true),
            neighbours: Reconciler::new(|_, entry: &Resolved| entry.permanent),
        }
    }
}

impl Entries {
    /// Takes the plan's entries as the wish.
    pub(crate) fn wish(&mut self, plan: &Plan) {
        self.fdb.set_desired(
            plan.vteps
                .iter()
                .map(|((device, _), entry)| ((*device, entry.mac), entry.node)),
        );
        self.neighbours
            .set_desired(plan.vteps.iter().map(|((device, address), entry)| {
                (
                    (*device, *address),
                    Resolved {
                        mac: Some(entry.mac),
                        permanent: true,
                    },
                )
            }));
    }

    /// Reads all entries of the devices; what differs from our belief is returned in words.
    pub(crate) fn read(
        &mut self,
        netlink: &Netlink,
        indices: &Indices,
        now: Instant,
    ) -> Result<Vec<String>, Error> {
        let (mut fdb, mut neighbours) = (Vec::new(), Vec::new());
        for (device, index) in indices {
            let entries = netlink.dump_fdb(Some(*index))?.into_iter();
            fdb.extend(entries.filter_map(|entry| Some(((*device, entry.mac), entry.dst?))));
            let entries = netlink.dump_neighbours(Some(*index))?.into_iter();
            neighbours.extend(entries.map(|entry| ((*device, entry.address), resolved(&entry))));
        }
        let mut found: Vec<String> = self
            .fdb
            .on_dump(fdb, now)
            .iter()
            .map(describe_fdb)
            .collect();
        found.extend(
            self.neighbours
                .on_dump(neighbours, now)
                .iter()
                .filter_map(describe_neighbour),
        );
        Ok(found)
    }

    /// A device was made anew, or has come up: its entries went with it, and nobody is to blame for that.
    pub(crate) fn start_over(&mut self, device: &'static str, plan: &Plan) {
        let own = plan.vteps.iter().filter(|((owner, _), _)| *owner == device);
        for ((_, address), entry) in own {
            self.fdb.start_over(&(device, entry.mac));
            self.neighbours.start_over(&(device, *address));
        }
    }

    /// Takes in one notification about a forwarding entry.
    pub(crate) fn on_fdb(
        &mut self,
        indices: &Indices,
        entry: &FdbEntry,
        present: bool,
        now: Instant,
    ) -> Option<String> {
        let device = device_of(indices, entry.ifindex)?;
        let dst = entry.dst?;
        let drift = self
            .fdb
            .on_observed(&(device, entry.mac), present.then_some(dst), now)?;
        Some(describe_fdb(&drift))
    }

    /// Takes in one notification about a neighbour.
    pub(crate) fn on_neighbour(
        &mut self,
        indices: &Indices,
        entry: &Neighbour,
        present: bool,
        now: Instant,
    ) -> Option<String> {
        let device = device_of(indices, entry.ifindex)?;
        let value = present.then(|| resolved(entry));
        let drift = self
            .neighbours
            .on_observed(&(device, entry.address), value, now)?;
        describe_neighbour(&drift)
    }

    /// Writes what is due. Neighbours first: a frame that finds a neighbour without a forwarding entry is dropped,
    /// and so is one the other way round, so the order only has to be the same at both ends of an entry's life.
    pub(crate) fn write(
        &mut self,
        netlink: &Netlink,
        indices: &Indices,
        now: Instant,
    ) -> Vec<String> {
        let mut problems = Vec::new();
        // Two addresses never share a MAC within a plan, so an entry that moves is one replacement.
        let ops = self.fdb.plan(now);
        let changes: Vec<_> = ops
            .iter()
            .map(|op| match op {
                Op::Set {
                    key: (device, mac),
                    value,
                    ..
                } => indices
                    .get(device)
                    .map(|index| Change::Replace(FdbEntry::vxlan(*index, *mac, *value))),
                Op::Delete {
                    key: (device, mac),
                    old,
                } => indices
                    .get(device)
                    .map(|index| Change::Delete(FdbEntry::vxlan(*index, *mac, *old))),
            })
            .collect();
        for (op, result) in ops
            .iter()
            .zip(apply(&changes, |changes| netlink.apply_fdb(changes)))
        {
            problems.extend(result.as_ref().err().cloned());
            self.fdb.on_result(op, result, now);
        }
        let ops = self.neighbours.plan(now);
        let changes: Vec<_> = ops
            .iter()
            .map(|op| match op {
                Op::Set {
                    key: (device, address),
                    value,
                    ..
                } => {
                    let index = indices.get(device)?;
                    Some(Change::Replace(Neighbour::permanent(
                        *index, *address, value.mac?,
                    )))
                }
                Op::Delete {
                    key: (device, address),
                    old,
                } => {
                    let index = indices.get(device)?;
                    Some(Change::Delete(Neighbour::permanent(
                        *index,
                        *address,
                        old.mac.unwrap_or_default(),
                    )))
                }
            })
            .collect();
        for (op, result) in ops
            .iter()
            .zip(apply(&changes, |changes| netlink.apply_neighbours(changes)))
        {
            problems.extend(result.as_ref().err().cloned());
            self.neighbours.on_result(op, result, now);
        }
        problems
    }

    /// When something is due again that failed or is fought over.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Instant> {
        [self.fdb.next_due(now), self.neighbours.next_due(now)]
            .into_iter()
            .flatten()
            .min()
    }
}

/// Applies the changes whose device is there; an entry of a missing device is gone with it.
fn apply<T: Clone>(
    changes: &[Option<Change<T>>],
    send: impl FnOnce(&[Change<T>]) -> Vec<Result<(), Error>>,
) -> Vec<Result<(), String>> {
    let present: Vec<Change<T>> = changes.iter().flatten().cloned().collect();
    let mut answers = send(&present).into_iter();
    changes
        .iter()
        .map(|change| match change {
            None => Err("its device is not there".to_owned()),
            Some(change) => match answers.next() {
                Some(Err(error)) if matches!(change, Change::Delete(_)) && error.is_not_found() => {
                    Ok(())
                }
                Some(result) => result.map_err(|error| error.to_string()),
                None => Err("no answer from the kernel".to_owned()),
            },
        })
        .collect()
}

fn device_of(indices: &Indices, index: IfIndex) -> Option<&'static str> {
    indices
        .iter()
        .find(|(_, known)| **known == index)
        .map(|(device, _)| *device)
}

fn resolved(entry: &Neighbour) -> Resolved {
    Resolved {
        mac: entry.mac,
        permanent: entry.is_permanent(),
    }
}

fn describe_fdb(drift: &Drift<FdbKey, IpAddr>) -> String {
    match drift {
        Drift::Missing { key: (device, mac) } => {
            format!("forwarding entry {mac} on {device} was removed")
        }
        Drift::Changed {
            key: (device, mac),
            seen,
        } => {
            format!("forwarding entry {mac} on {device} was changed to {seen}")
        }
        Drift::Unwanted {
            key: (device, mac),
            seen,
        } => {
            format!("forwarding entry {mac} to {seen} appeared on {device}")
        }
    }
}

/// Entries that the kernel resolves by itself come and go and are nobody's change.
fn describe_neighbour(drift: &Drift<NeighbourKey, Resolved>) -> Option<String> {
    match drift {
        Drift::Missing {
            key: (device, address),
        } => Some(format!("neighbour {address} on {device} was removed")),
        Drift::Changed {
            key: (device, address),
            seen,
        } => Some(format!(
            "neighbour {address} on {device} was changed to {:?}",
            seen.mac
        )),
        Drift::Unwanted { seen, .. } if !seen.permanent => None,
        Drift::Unwanted {
            key: (device, address),
            ..
        } => Some(format!("neighbour {address} appeared on {device}")),
    }
}
