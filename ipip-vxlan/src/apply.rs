//! The task that brings the kernel to the plan and keeps it there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_netlink::events::{Event, EventStream, Group, Notice};
use cali_netlink::{Error, Netlink};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::devices::{apply_device, retire_device};
use crate::entries::{Entries, Indices};
use crate::plan::{Plan, Settings, Underlay, plan};
use crate::{IPIP_DEVICE, Resolver, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE};

/// Time in which further reasons for a look at the devices are collected.
const SETTLE: Duration = Duration::from_millis(20);
/// Notifications that come within this time are taken in together.
const BURST: Duration = Duration::from_millis(5);
/// And at most this many.
const BURST_LIMIT: usize = 1 << 16;
/// The safety net: everything is read again after this time.
const AUDIT: Duration = Duration::from_secs(300);
/// A device that could not be made is tried again after this time.
const RETRY: Duration = Duration::from_secs(2);

/// What the tunnels follow.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Pools and nodes.
    pub resolver: Resolver,
    /// Settings.
    pub settings: Settings,
    /// The datastore is in sync: devices that no pool asks for may go.
    pub in_sync: bool,
    /// How long a device outlives the last pool that asked for it: peers see a pool's edit later than this node, and
    /// still send the old way.
    pub linger: Duration,
}

impl Wish {
    /// The wish of a node that knows nothing yet.
    #[must_use]
    pub fn new(resolver: Resolver) -> Self {
        Self {
            resolver,
            settings: Settings::default(),
            in_sync: false,
            linger: Duration::from_secs(60),
        }
    }
}

/// (device, gateway) pairs that routes in the kernel use.
pub type GatewaysInUse = BTreeSet<(String, IpAddr)>;

/// What stands and what does not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TunnelState {
    /// Devices that are as planned.
    pub devices: BTreeSet<&'static str>,
    /// Remote endpoints whose entries are in the kernel.
    pub endpoints: usize,
    /// What is not as planned, for people.
    pub problems: Vec<String>,
}

/// A running applier; dropping it ends the task and leaves the kernel as it is.
#[derive(Debug)]
pub struct Tunnels {
    state: watch::Receiver<TunnelState>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Tunnels {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Tunnels {
    /// Starts the applier in the namespace of `netlink`. `in_use` says what routes still need.
    ///
    /// # Errors
    /// The subscription to notifications failed.
    pub fn start(
        netlink: Netlink,
        wish: watch::Receiver<Wish>,
        in_use: watch::Receiver<GatewaysInUse>,
    ) -> Result<Self, Error> {
        let events = netlink.events(&[
            Group::Link,
            Group::Ipv4Address,
            Group::Ipv6Address,
            Group::Neighbour,
        ])?;
        let (state_out, state) = watch::channel(TunnelState::default());
        let applier = Applier {
            netlink,
            wish,
            in_use,
            plan: Plan::default(),
            indices: Indices::new(),
            entries: Entries::default(),
            unasked_since: BTreeMap::new(),
            look: Look {
                devices: true,
                entries: true,
            },
            retry_at: None,
            state: state_out,
        };
        Ok(Self {
            state,
            task: tokio::spawn(applier.run(events)),
        })
    }

    /// The state as it changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<TunnelState> {
        self.state.clone()
    }
}

/// What has to be read anew.
#[derive(Debug, Default)]
struct Look {
    devices: bool,
    entries: bool,
}

struct Applier {
    netlink: Netlink,
    wish: watch::Receiver<Wish>,
    in_use: watch::Receiver<GatewaysInUse>,
    plan: Plan,
    indices: Indices,
    entries: Entries,
    /// Since when no pool asks for a device that is still there.
    unasked_since: BTreeMap<&'static str, Instant>,
    look: Look,
    retry_at: Option<Instant>,
    state: watch::Sender<TunnelState>,
}

impl Applier {
    async fn run(mut self, mut events: EventStream) {
        let mut next_audit = Instant::now() + AUDIT;
        let mut turn_at = Some(Instant::now());
        loop {
            let now = Instant::now();
            let due = [
                turn_at,
                self.retry_at,
                self.entries.next_due(now),
                self.linger_end(now),
                Some(next_audit),
            ];
            let due = due.into_iter().flatten().min().unwrap_or(next_audit);
            tokio::select! {
                changed = self.wish.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    turn_at = Some(Instant::now());
                }
                changed = self.in_use.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // Only what is kept for the routes' sake depends on them.
                    if !self.unasked_since.is_empty() || self.keeps_entries() {
                        turn_at.get_or_insert(now + SETTLE);
                    }
                }
                first = events.next() => match burst(&mut events, first).await {
                    Ok(burst) => {
                        if self.on_burst(burst) {
                            turn_at.get_or_insert(now + SETTLE);
                        }
                    }
                    Err(error) => {
                        warn!(%error, "link notifications have ended");
                        return;
                    }
                },
                () = tokio::time::sleep_until(due.into()) => {
                    if Instant::now() >= next_audit {
                        next_audit = Instant::now() + AUDIT;
                        self.look = Look { devices: true, entries: true };
                    }
                    turn_at = None;
                    self.turn().await;
                }
            }
        }
    }

    /// Takes in notifications, of several about one entry only the last: what we wrote ourselves in between is older.
    /// True when something is to be done.
    fn on_burst(&mut self, burst: Vec<Event>) -> bool {
        let now = Instant::now();
        let mut fdb = BTreeMap::new();
        let mut neighbours = BTreeMap::new();
        let mut look = false;
        for event in burst {
            match event {
                Event::Link(_) | Event::Address(_) => {
                    self.look.devices = true;
                    look = true;
                }
                Event::Neighbour(notice) => {
                    neighbours.insert(notice.object().key(), notice);
                }
                // Older kernels (seen: 6.1) follow every notification of the driver by a general one that does not tell
                // the destination (`rtnl_fdb_notify`, net/core/rtnetlink.c); it must not hide the first.
                Event::Fdb(notice) if notice.object().dst.is_some() => {
                    fdb.insert((notice.object().ifindex, notice.object().mac), notice);
                }
                Event::Overflow => {
                    self.look = Look {
                        devices: true,
                        entries: true,
                    };
                    look = true;
                }
                _ => {}
            }
        }
        let mut found = Vec::new();
        for notice in fdb.into_values() {
            let present = matches!(notice, Notice::Present(_));
            found.extend(
                self.entries
                    .on_fdb(&self.indices, notice.object(), present, now),
            );
        }
        for notice in neighbours.into_values() {
            let present = matches!(notice, Notice::Present(_));
            found.extend(
                self.entries
                    .on_neighbour(&self.indices, notice.object(), present, now),
            );
        }
        for found in &found {
            warn!(
                found,
                "a tunnel entry was changed by somebody else; putting it right"
            );
        }
        look || !found.is_empty()
    }

    async fn turn(&mut self) {
        let now = Instant::now();
        let wish = self.wish.borrow_and_update().clone();
        let in_use = self.in_use.borrow_and_update().clone();
        let mut problems = Vec::new();
        let underlay = self.underlay(&wish.resolver).unwrap_or_else(|error| {
            problems.push(error.to_string());
            Underlay::default()
        });
        let asked = plan(&wish.resolver, &wish.settings, &underlay);
        problems.extend(asked.problems.iter().map(ToString::to_string));
        let needed = self.needed(&asked, &in_use, &wish, now);
        let next = asked.keeping(&self.plan, &needed);
        self.retry_at = None;
        self.apply_devices(&next, now, &mut problems).await;
        self.entries.wish(&next);
        if std::mem::take(&mut self.look.entries) || !self.entries.fdb.is_synced() {
            self.read_entries(now, &mut problems);
        }
        problems.extend(self.entries.write(&self.netlink, &self.indices, now));
        self.retire(&next, wish.in_sync, &mut problems).await;
        self.plan = next;
        self.publish(problems);
    }

    /// What routes use, and devices that linger with all their entries.
    fn needed(
        &mut self,
        asked: &Plan,
        in_use: &GatewaysInUse,
        wish: &Wish,
        now: Instant,
    ) -> GatewaysInUse {
        let mut needed = in_use.clone();
        for device in self.plan.devices.keys() {
            if asked.devices.contains_key(device) {
                self.unasked_since.remove(device);
                continue;
            }
            let since = *self.unasked_since.entry(device).or_insert(now);
            if now.saturating_duration_since(since) < wish.linger {
                let entries = self.plan.vteps.keys().filter(|(owner, _)| owner == device);
                needed.extend(entries.map(|(owner, gateway)| ((*owner).to_owned(), *gateway)));
                // A device without entries lingers as well: peers may send to it.
                needed.insert(((*device).to_owned(), IpAddr::from([0, 0, 0, 0])));
            }
        }
        self.unasked_since
            .retain(|device, _| self.plan.devices.contains_key(device));
        needed
    }

    fn linger_end(&self, now: Instant) -> Option<Instant> {
        let linger = self.wish.borrow().linger;
        self.unasked_since
            .values()
            .map(|since| *since + linger)
            .filter(|end| *end > now)
            .min()
    }

    fn keeps_entries(&self) -> bool {
        let wish = self.wish.borrow();
        self.plan.vteps.len() > wish.resolver.remotes().count()
    }

    async fn apply_devices(&mut self, next: &Plan, now: Instant, problems: &mut Vec<String>) {
        let dirty = std::mem::take(&mut self.look.devices);
        for (name, device) in &next.devices {
            let unchanged =
                self.plan.devices.get(name) == Some(device) && self.indices.contains_key(name);
            if unchanged && !dirty {
                continue;
            }
            match apply_device(&self.netlink, name, device).await {
                Ok((index, fresh)) => {
                    if self.indices.insert(name, index) != Some(index) || fresh {
                        self.look.entries = true;
                    }
                }
                Err(problem) => {
                    self.indices.remove(name);
                    let text = with_cause(&problem);
                    warn!(problem = text, "tunnel device is not as planned");
                    problems.push(text);
                    self.retry_at = Some(now + RETRY);
                    self.look.devices = true;
                }
            }
        }
    }

    fn read_entries(&mut self, now: Instant, problems: &mut Vec<String>) {
        match self.entries.read(&self.netlink, &self.indices, now) {
            Ok(found) => {
                for found in found {
                    warn!(
                        found,
                        "a tunnel entry was changed by somebody else; putting it right"
                    );
                }
            }
            Err(error) => {
                problems.push(error.to_string());
                self.look.entries = true;
                self.retry_at = Some(now + RETRY);
            }
        }
    }

    /// Removes devices that nothing asks for or uses; at start those of an earlier incarnation as well.
    async fn retire(&mut self, next: &Plan, in_sync: bool, problems: &mut Vec<String>) {
        if !in_sync {
            return;
        }
        for name in [VXLAN_V4_DEVICE, VXLAN_V6_DEVICE, IPIP_DEVICE] {
            if next.devices.contains_key(name) {
                continue;
            }
            let known = self.plan.devices.get(name);
            if known.is_none() && name == IPIP_DEVICE {
                continue;
            }
            let kind = known.map_or_else(leftover_vxlan, |device| device.kind.clone());
            self.indices.remove(name);
            if let Err(problem) = retire_device(&self.netlink, name, &kind).await {
                problems.push(with_cause(&problem));
            }
        }
    }

    /// The MTU of the links that carry the node's own addresses.
    fn underlay(&self, resolver: &Resolver) -> Result<Underlay, Error> {
        let Some(local) = resolver.local() else {
            return Ok(Underlay::default());
        };
        let addresses = self.netlink.dump_addresses(None)?;
        let mtu = |own: Option<cali_netlink::IpNetwork>| -> Result<Option<u32>, Error> {
            let own = own.map(|own| own.ip());
            let Some(carrier) = addresses
                .iter()
                .find(|address| Some(address.address.ip()) == own)
            else {
                return Ok(None);
            };
            Ok(self
                .netlink
                .link_by_index(carrier.ifindex)?
                .map(|link| link.mtu))
        };
        Ok(Underlay {
            mtu_v4: mtu(local.v4)?,
            mtu_v6: mtu(local.v6)?,
        })
    }

    fn publish(&self, problems: Vec<String>) {
        let state = TunnelState {
            devices: self
                .indices
                .keys()
                .copied()
                .filter(|name| self.plan.devices.contains_key(name))
                .collect(),
            endpoints: self.entries.fdb.observed().len(),
            problems,
        };
        self.state.send_if_modified(|current| {
            let changed = *current != state;
            if changed {
                info!(devices = ?state.devices, endpoints = state.endpoints, problems = ?state.problems, "tunnels");
                *current = state;
            }
            changed
        });
    }
}

/// The kind under which an earlier incarnation's VXLAN device is removed; only the kind counts there.
fn leftover_vxlan() -> crate::DeviceKind {
    crate::DeviceKind::Vxlan {
        vni: 0,
        port: 0,
        local: IpAddr::from([0, 0, 0, 0]),
        mac: cali_netlink::MacAddr::default(),
    }
}

fn with_cause(problem: &dyn std::error::Error) -> String {
    match problem.source() {
        Some(source) => format!("{problem}: {source}"),
        None => problem.to_string(),
    }
}

async fn burst(events: &mut EventStream, first: Result<Event, Error>) -> Result<Vec<Event>, Error> {
    events.burst_after(first?, BURST, BURST_LIMIT).await
}
