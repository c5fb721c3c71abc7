//! The task that brings the kernel to the plan and keeps it there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_netlink::events::{Event, EventStream, Group, Notice};
use cali_netlink::{Error, Link, Netlink, WgKey};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::addressless::Addressless;
use crate::devices::{apply_device, retire_device};
use crate::entries::{Entries, Indices};
use crate::farewell::Farewell;
use crate::plan::{Plan, Settings, Underlay, plan};
use crate::receives::DIRECT;
use crate::reverse_path::{self, ReversePath};
use crate::transition::Transition;
use crate::wireguard::apply::Crypt;
use crate::{
    Holders, IPIP_DEVICE, Receives, Resolver, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE, WireguardSettings,
    wireguard,
};

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
    /// Settings of the encryption.
    pub wireguard: WireguardSettings,
    /// Which node holds which prefix: what lies behind each peer.
    pub holders: Holders,
    /// The datastore is in sync: devices that no pool asks for may go.
    pub in_sync: bool,
    /// How long a device outlives the last pool that asked for it: peers see a pool's edit later than this node, and
    /// still send the old way.
    pub linger: Duration,
    /// Which wish this is, for [`Tunnels::followed`].
    pub number: u64,
}

impl Wish {
    /// The wish of a node that knows nothing yet.
    #[must_use]
    pub fn new(resolver: Resolver) -> Self {
        Self {
            resolver,
            settings: Settings::default(),
            wireguard: WireguardSettings::default(),
            holders: Holders::new(),
            in_sync: false,
            linger: Duration::from_secs(60),
            number: 0,
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
    /// MTU of each device that carries or may carry pods' packets, WireGuard's and lingering ones among them.
    pub mtus: BTreeMap<String, u32>,
    /// What this node can receive: its word for others, once its pods' MTU fits.
    pub receives: Receives,
    /// WireGuard devices for IPv4 and IPv6 that are to encrypt stand, and want an address.
    pub encrypts: [bool; 2],
    /// Their public keys, once they receive.
    pub keys: [Option<WgKey>; 2],
    /// Remote endpoints whose entries are in the kernel.
    pub endpoints: usize,
    /// What is not as planned, for people.
    pub problems: Vec<String>,
}

/// A running applier; dropping it ends the task and leaves the kernel as it is.
#[derive(Debug)]
pub struct Tunnels {
    state: watch::Receiver<TunnelState>,
    followed: watch::Receiver<u64>,
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
        let (followed_out, followed) = watch::channel(0);
        let applier = Applier {
            netlink,
            wish,
            in_use,
            plan: Plan::default(),
            indices: Indices::new(),
            entries: Entries::default(),
            unasked_since: BTreeMap::new(),
            silent: BTreeSet::new(),
            farewell: Farewell::default(),
            look: Look {
                devices: true,
                entries: true,
            },
            retry_at: None,
            crypts: [Crypt::new(true), Crypt::new(false)],
            addressless: Addressless::default(),
            reverse_path: ReversePath::default(),
            transition: Transition::default(),
            state: state_out,
            followed: followed_out,
        };
        Ok(Self {
            state,
            followed,
            task: tokio::spawn(applier.run(events)),
        })
    }

    /// The number of the last [`Wish`] of which devices and entries are in the kernel, as far as they can be: routes may lead
    /// to its gateways. A route before its neighbour would have the kernel ask for one, in vain, and drop what waits for it.
    #[must_use]
    pub fn followed(&self) -> watch::Receiver<u64> {
        self.followed.clone()
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
    /// Devices that still stand, but are not told any more.
    silent: BTreeSet<&'static str>,
    farewell: Farewell,
    look: Look,
    retry_at: Option<Instant>,
    /// WireGuard over IPv4 and over IPv6.
    crypts: [Crypt; 2],
    addressless: Addressless,
    reverse_path: ReversePath,
    transition: Transition,
    state: watch::Sender<TunnelState>,
    followed: watch::Sender<u64>,
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
                self.farewell.next_due(now),
                self.transition.end(self.wish.borrow().linger, now),
                self.crypts[0].next_due(),
                self.crypts[1].next_due(),
                self.addressless.next_due(now),
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
                burst = events.next_burst(BURST, BURST_LIMIT) => match burst {
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
        self.transition.see(&wish.resolver, now);
        let asked = plan(&wish.resolver, &wish.settings, &underlay);
        problems.extend(asked.problems.iter().map(ToString::to_string));
        let needed = self.needed(&asked, &in_use, &wish, now);
        let next = asked.keeping(&self.plan, &needed);
        self.retry_at = None;
        let anew = self.apply_devices(&next, now, &mut problems).await;
        self.entries.wish(&next);
        if std::mem::take(&mut self.look.entries) || !self.entries.fdb.is_synced() {
            self.read_entries(now, &mut problems);
        }
        for device in anew {
            self.entries.start_over(device, &next);
        }
        problems.extend(self.entries.write(&self.netlink, &self.indices, now));
        self.encrypt(&wish, &underlay, now, &mut problems).await;
        self.relax(&wish, now);
        self.retire(&next, &wish, now, &mut problems).await;
        self.plan = next;
        self.publish(&wish, now, problems);
        self.followed.send_if_modified(|number| {
            let changed = *number != wish.number;
            *number = wish.number;
            changed
        });
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
        let behind = Transition::behind(&wish.resolver);
        let word = own_word(&wish.resolver);
        self.silent.clear();
        for device in self.plan.devices.keys() {
            let asked = asked.devices.contains_key(device);
            let tells = if asked {
                self.unasked_since.remove(device);
                true
            } else {
                let since = *self.unasked_since.entry(device).or_insert(now);
                behind || now.saturating_duration_since(since) < wish.linger
            };
            let told = word.map(|word| word.has(device));
            if !self.farewell.stands(device, tells, told, now) || asked {
                continue;
            }
            if !tells {
                self.silent.insert(device);
            }
            let entries = self.plan.vteps.keys().filter(|(owner, _)| owner == device);
            needed.extend(entries.map(|(owner, gateway)| ((*owner).to_owned(), *gateway)));
            // A device without entries lingers as well: peers may send to it.
            needed.insert(((*device).to_owned(), IpAddr::from([0, 0, 0, 0])));
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

    /// Makes the devices as planned; those that are new or have come up.
    async fn apply_devices(
        &mut self,
        next: &Plan,
        now: Instant,
        problems: &mut Vec<String>,
    ) -> Vec<&'static str> {
        let dirty = std::mem::take(&mut self.look.devices);
        let mut anew = Vec::new();
        for (name, device) in &next.devices {
            let unchanged =
                self.plan.devices.get(name) == Some(device) && self.indices.contains_key(name);
            if unchanged && !dirty {
                continue;
            }
            match apply_device(&self.netlink, name, device).await {
                Ok((index, fresh)) => {
                    reverse_path::loosen(&self.netlink, name);
                    if self.indices.insert(name, index) != Some(index) || fresh {
                        self.look.entries = true;
                        anew.push(*name);
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
        anew
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

    /// Removes devices that nothing asks for or uses; at start those of an earlier incarnation as well, once its word has been
    /// taken back.
    async fn retire(&mut self, next: &Plan, wish: &Wish, now: Instant, problems: &mut Vec<String>) {
        if !wish.in_sync {
            return;
        }
        let word = own_word(&wish.resolver);
        for name in [VXLAN_V4_DEVICE, VXLAN_V6_DEVICE, IPIP_DEVICE] {
            if next.devices.contains_key(name) {
                continue;
            }
            let known = self.plan.devices.get(name);
            if known.is_none() {
                let told = word.map(|word| word.has(name));
                if name == IPIP_DEVICE || self.farewell.stands(name, false, told, now) {
                    continue;
                }
            }
            let kind = known.map_or_else(leftover_vxlan, |device| device.kind.clone());
            self.indices.remove(name);
            if let Err(problem) = retire_device(&self.netlink, name, &kind).await {
                problems.push(with_cause(&problem));
            }
        }
    }

    /// WireGuard, in each family that is to be encrypted.
    async fn encrypt(
        &mut self,
        wish: &Wish,
        underlay: &Underlay,
        now: Instant,
        problems: &mut Vec<String>,
    ) {
        for (crypt, v4) in self.crypts.iter_mut().zip([true, false]) {
            let settings = &wish.wireguard;
            if settings.family(v4).enabled {
                let plan = wireguard::plan(&wish.resolver, &wish.holders, settings, underlay, v4);
                crypt.look(&self.netlink, settings, plan, problems).await;
                if let Some((device, _)) = crypt.state(settings).device {
                    reverse_path::loosen(&self.netlink, &device);
                }
            } else {
                // The node's key is its word that it receives this way; it is taken back as soon as nobody asks for it.
                let told = wish.resolver.local();
                let told = told.map(|local| local.wireguard(v4).key.is_some());
                let lingers = crypt.lingers(wish.linger, now);
                let way = if v4 { "WireGuard" } else { "WireGuard IPv6" };
                let stands = self.farewell.stands(way, lingers, told, now);
                crypt.rest(&self.netlink, wish, stands, now, problems).await;
            }
        }
    }

    /// Whether the node says that it receives unencapsulated packets.
    fn tells_direct(&self, wish: &Wish, now: Instant) -> bool {
        Transition::asks_direct(&wish.resolver) || self.transition.lasts(wish.linger, now)
    }

    /// No pool asks for unencapsulated packets any more, and the others may still send them.
    fn direct_stands(&mut self, wish: &Wish, now: Instant) -> bool {
        let told = own_word(&wish.resolver).map(|word| word.direct);
        let tells = self.tells_direct(wish, now);
        let stands = self.farewell.stands(DIRECT, tells, told, now);
        self.transition.lasts(wish.linger, now)
            || (stands && !Transition::asks_direct(&wish.resolver))
    }

    /// Whether packets may come in more ways than one, and what that means for the links of the underlay.
    fn relax(&mut self, wish: &Wish, now: Instant) {
        let encrypted = self
            .crypts
            .iter()
            .any(|crypt| crypt.state(&wish.wireguard).device.is_some());
        let needed = encrypted
            || !self.unasked_since.is_empty()
            || Transition::behind(&wish.resolver)
            || self.direct_stands(wish, now);
        let own = wish.resolver.local().and_then(|local| local.v4);
        let links: Vec<String> = match self.carrier(own) {
            Ok(link) => link.into_iter().map(|link| link.name).collect(),
            Err(_) => Vec::new(),
        };
        self.reverse_path.underlay(&self.netlink, &links, needed);
    }

    /// The link that has an address of the node.
    fn carrier(&self, own: Option<cali_netlink::IpNetwork>) -> Result<Option<Link>, Error> {
        let Some(own) = own else {
            return Ok(None);
        };
        let addresses = self.netlink.dump_addresses(None)?;
        match addresses
            .iter()
            .find(|address| address.address.ip() == own.ip())
        {
            Some(address) => self.netlink.link_by_index(address.ifindex),
            None => Ok(None),
        }
    }

    /// The MTU of the links that carry the node's own addresses.
    fn underlay(&self, resolver: &Resolver) -> Result<Underlay, Error> {
        let Some(local) = resolver.local() else {
            return Ok(Underlay::default());
        };
        Ok(Underlay {
            mtu_v4: self.carrier(local.v4)?.map(|link| link.mtu),
            mtu_v6: self.carrier(local.v6)?.map(|link| link.mtu),
        })
    }

    fn publish(&mut self, wish: &Wish, now: Instant, problems: Vec<String>) {
        let devices: BTreeSet<&'static str> = self
            .indices
            .keys()
            .copied()
            .filter(|name| self.plan.devices.contains_key(name))
            .collect();
        let crypts = [0, 1].map(|at| self.crypts[at].state(&wish.wireguard));
        let mut mtus: BTreeMap<String, u32> = devices
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.plan.devices.get(name)?.mtu)))
            .collect();
        mtus.extend(crypts.iter().filter_map(|crypt| crypt.device.clone()));
        let mut receives = Receives {
            direct: self.tells_direct(wish, now),
            ..Receives::default()
        };
        let tunnels = devices
            .iter()
            .map(|name| ((*name).to_owned(), self.plan.has_address(name)));
        let encrypting = crypts
            .iter()
            .filter_map(|crypt| Some((crypt.device.as_ref()?.0.clone(), crypt.has_address)));
        self.addressless.see(tunnels.chain(encrypting), now);
        for device in &devices {
            if self.addressless.receives(device, now) && !self.silent.contains(device) {
                receives.add_device(device);
            }
        }
        let encrypts = [0, 1].map(|at| crypts[at].key.is_some());
        let keys = crypts.map(|crypt| {
            let (device, _) = crypt.device?;
            crypt
                .key
                .filter(|_| self.addressless.receives(&device, now))
        });
        let state = TunnelState {
            mtus,
            receives,
            encrypts,
            keys,
            devices,
            endpoints: self.entries.fdb.all_observed().count(),
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

/// What this node has said that it receives, as the datastore gives it.
fn own_word(resolver: &Resolver) -> Option<Receives> {
    resolver.local().and_then(|local| local.receives)
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

pub(crate) fn with_cause(problem: &dyn std::error::Error) -> String {
    match problem.source() {
        Some(source) => format!("{problem}: {source}"),
        None => problem.to_string(),
    }
}
