//! Brings one family's device, peers, rule and table to the plan. Everything is read back on every look, since WireGuard
//! sends no notifications: what somebody else changed is put right with the next look.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cali_api::Cidr;
use cali_netlink::{
    Address, Change, Error, IfIndex, IpNetwork, LinkChange, LinkKind, Netlink, NewLink,
    NewLinkKind, Route, RouteFilter, RouteKey, RouteKind, Rule, Target, WgChange, WgDevice, WgKey,
    Wireguard, route,
};
use tracing::{info, warn};
use x25519_dalek::{PublicKey, StaticSecret};

use super::{FamilySettings, WgPlan, WireguardSettings, network};
use crate::Wish;
use crate::devices::DeviceProblem;

/// How often the device is looked at while it is in use.
const LOOK: Duration = Duration::from_millis(400);
/// And while a peer has not shaken hands: a handshake takes a round trip, or some seconds if its first packet is lost.
const LOOK_SOON: Duration = Duration::from_millis(50);
/// So long after a change of ours, or a handshake. Later, whoever has not answered is most likely not there.
const SOON: Duration = Duration::from_secs(7);

/// One family's objects in the kernel.
#[derive(Debug)]
pub(crate) struct Crypt {
    v4: bool,
    /// Generic netlink; opened once the module is there.
    control: Option<Wireguard>,
    /// Device, rule and table that we made or adopted, under the settings of then.
    made: Option<WireguardSettings>,
    /// Since when nobody wants it any more.
    unasked_since: Option<Instant>,
    /// Encryption was switched off and on again: others have forgotten our sessions.
    resumed: bool,
    /// A device that somebody removed comes back under its key: no node has to be told, and none waits for the datastore.
    private: Option<WgKey>,
    public: Option<WgKey>,
    handshakes: BTreeMap<WgKey, i64>,
    waiting: usize,
    /// When something was changed, or another peer shook hands.
    progress: Instant,
    mtu: u32,
    has_address: bool,
    next_look: Option<Instant>,
}

/// What one look came to.
#[derive(Debug, Default)]
pub(crate) struct CryptState {
    /// The public key, while the device takes packets for us.
    pub(crate) key: Option<WgKey>,
    /// The device and its MTU.
    pub(crate) device: Option<(String, u32)>,
    /// The device has the node's address for it.
    pub(crate) has_address: bool,
}

impl Crypt {
    pub(crate) fn new(v4: bool) -> Self {
        Self {
            v4,
            control: None,
            made: None,
            unasked_since: None,
            resumed: false,
            private: None,
            public: None,
            handshakes: BTreeMap::new(),
            waiting: 0,
            progress: Instant::now(),
            mtu: 0,
            has_address: false,
            next_look: None,
        }
    }

    /// When the next look is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.next_look
    }

    pub(crate) fn state(&self, settings: &WireguardSettings) -> CryptState {
        let family = settings.family(self.v4);
        CryptState {
            key: self.public.filter(|_| family.enabled),
            device: self
                .made
                .as_ref()
                .map(|made| (made.family(self.v4).device.clone(), self.mtu)),
            has_address: self.has_address,
        }
    }

    /// One look: the plan is carried out as far as the kernel lets us.
    pub(crate) async fn look(
        &mut self,
        netlink: &Netlink,
        settings: &WireguardSettings,
        plan: Option<WgPlan>,
        problems: &mut Vec<String>,
    ) {
        self.next_look = Some(Instant::now() + LOOK);
        self.resumed |= self.unasked_since.take().is_some() && self.made.is_some();
        // Another name or table: what was made under the former goes first.
        let v4 = self.v4;
        if let Some(made) = self.made.take_if(|made| !same_place(made, settings, v4)) {
            self.remove(netlink, &made, problems).await;
        }
        let Some(plan) = plan else {
            problems.push(format!(
                "{} is needed but this node has no IPv{} address",
                settings.family(self.v4).device,
                if self.v4 { 4 } else { 6 }
            ));
            return;
        };
        problems.extend(plan.problems.iter().cloned());
        match self.carry_out(netlink, settings, &plan, problems).await {
            Ok(()) => self.made = Some(settings.clone()),
            Err(problem) => {
                let text = crate::apply::with_cause(&problem);
                warn!(problem = text, "WireGuard is not as planned");
                problems.push(text);
            }
        }
        if self.waiting > 0 && self.progress.elapsed() < SOON {
            self.next_look = Some(Instant::now() + LOOK_SOON);
        }
    }

    /// Whether nobody has asked for what stands only for so long.
    pub(crate) fn lingers(&self, linger: Duration, now: Instant) -> bool {
        let elapsed = |since| now.saturating_duration_since(since);
        self.made.is_some() && self.unasked_since.map_or(Duration::ZERO, elapsed) < linger
    }

    /// Nobody asks for encryption. Nothing is sent through the device any more, at once; it goes on receiving while it
    /// `stands`: peers learn later than we do.
    pub(crate) async fn rest(
        &mut self,
        netlink: &Netlink,
        wish: &Wish,
        stands: bool,
        now: Instant,
        problems: &mut Vec<String>,
    ) {
        self.next_look = None;
        if !wish.in_sync {
            return;
        }
        let was_made = self.made.is_some();
        let since = *self.unasked_since.get_or_insert_with(|| {
            if was_made {
                info!(v4 = self.v4, "WireGuard is not wanted any more");
            }
            now
        });
        let place = self.made.clone().unwrap_or_else(|| wish.wireguard.clone());
        if was_made && stands {
            let end = since + wish.linger;
            self.next_look = Some(end).filter(|end| *end > now);
            problems.extend(
                self.unroute(netlink, &place)
                    .await
                    .err()
                    .map(|e| e.to_string()),
            );
            return;
        }
        // At the start: what an earlier run left, where it is certain that it is ours.
        if was_made || (since == now && self.is_left_over(netlink, &place)) {
            self.made = None;
            self.remove(netlink, &place, problems).await;
        }
        self.private = None;
        self.public = None;
        self.handshakes.clear();
        self.waiting = 0;
    }

    fn is_left_over(&self, netlink: &Netlink, place: &WireguardSettings) -> bool {
        let device = netlink.link_by_name(&place.family(self.v4).device);
        let is_device = matches!(device, Ok(Some(link)) if link.kind == LinkKind::Wireguard);
        let rule = our_rule(place, self.v4);
        is_device
            || netlink
                .dump_rules()
                .is_ok_and(|rules| rules.contains(&rule))
    }

    async fn carry_out(
        &mut self,
        netlink: &Netlink,
        settings: &WireguardSettings,
        plan: &WgPlan,
        problems: &mut Vec<String>,
    ) -> Result<(), DeviceProblem> {
        let family = settings.family(self.v4);
        let failed = |source: Error| DeviceProblem::Kernel {
            name: family.device.clone(),
            source,
        };
        let index = device(netlink, family, plan).await?;
        self.mtu = plan.mtu;
        self.has_address = plan.address.is_some();
        let control = match &self.control {
            Some(control) => control.clone(),
            None => self
                .control
                .insert(Wireguard::open(netlink.netns()).map_err(failed)?)
                .clone(),
        };
        let mut found = control.get(index).map_err(failed)?;
        if self.resumed {
            let forget = WgChange {
                remove: std::mem::take(&mut found.peers).into_keys().collect(),
                ..WgChange::default()
            };
            control.set(index, &forget).map_err(failed)?;
            self.resumed = false;
        }
        self.handshakes = handshakes(&found);
        let epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs().cast_signed());
        let private = || self.private.or_else(new_key);
        let change = change(&found, family, settings, plan, &self.handshakes, private);
        if let Some(change) = change {
            if takes_away(&change) {
                // A packet that is led to the device and belongs to no peer there is answered by "host unreachable".
                let routes = plan.routes_now(&self.handshakes, epoch);
                self.table(netlink, settings.table, index, &routes, Rows::NotEncrypted)
                    .map_err(failed)?;
            }
            control.set(index, &change).map_err(failed)?;
            found = control.get(index).map_err(failed)?;
            self.progress = Instant::now();
        }
        if found.public_key != self.public {
            info!(device = family.device, key = ?found.public_key.map(|key| key.to_string()), "WireGuard key");
        }
        self.private = found.private_key;
        self.public = found.public_key;
        self.handshakes = handshakes(&found);
        let waiting = plan.waiting(&self.handshakes);
        if waiting.len() < self.waiting {
            self.progress = Instant::now();
        }
        self.waiting = waiting.len();
        if let Some(first) = waiting.first() {
            problems.push(format!(
                "{}: {} of {} peers have not answered yet ({first}, ...); their pods' packets go the pools' own way",
                family.device,
                waiting.len(),
                plan.peers.len()
            ));
        }
        let routes = plan.routes_now(&self.handshakes, epoch);
        // Routes before the rule that leads to them.
        self.table(netlink, settings.table, index, &routes, Rows::All)
            .map_err(failed)?;
        rule(netlink, settings, self.v4, true).await.map_err(failed)
    }

    /// Writes these rows of the wanted ones. What is not wanted in the table goes, if its protocol says that it is ours.
    fn table(
        &self,
        netlink: &Netlink,
        table: u32,
        index: IfIndex,
        wanted: &BTreeMap<Cidr, bool>,
        rows: Rows,
    ) -> Result<(), Error> {
        let filter = RouteFilter {
            v6: Some(!self.v4),
            table: Some(table),
            ..RouteFilter::default()
        };
        let found: BTreeMap<RouteKey, Route> = netlink
            .dump_routes(&filter)?
            .into_iter()
            .map(|route| (route.key(), route))
            .collect();
        let wanted: BTreeMap<RouteKey, Route> = wanted
            .iter()
            .map(|(prefix, encrypted)| {
                let route = row(network(prefix), table, encrypted.then_some(index));
                (route.key(), route)
            })
            .collect();
        let replace = wanted
            .iter()
            .filter(|(key, route)| found.get(*key) != Some(*route))
            .filter(|(_, route)| rows == Rows::All || route.kind == RouteKind::Throw)
            .map(|(_, route)| Change::Replace(route.clone()));
        let delete = found
            .iter()
            .filter(|(key, found)| {
                !wanted.contains_key(*key) && found.protocol == route::protocol::FELIX
            })
            .map(|(_, route)| Change::Delete(route.clone()));
        let changes: Vec<_> = replace.chain(delete).collect();
        for result in netlink.apply_routes(&changes) {
            match result {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Rule first, then the table: packets fall back to the main table in one step.
    async fn unroute(&self, netlink: &Netlink, place: &WireguardSettings) -> Result<(), Error> {
        rule(netlink, place, self.v4, false).await?;
        self.table(netlink, place.table, 0, &BTreeMap::new(), Rows::All)
    }

    async fn remove(
        &self,
        netlink: &Netlink,
        place: &WireguardSettings,
        problems: &mut Vec<String>,
    ) {
        let device = &place.family(self.v4).device;
        let gone = async {
            self.unroute(netlink, place).await?;
            if let Some(link) = netlink.link_by_name(device)?
                && link.kind == LinkKind::Wireguard
            {
                info!(device, "removing the WireGuard device");
                netlink.delete_link(link.index).await?;
            }
            Ok::<(), Error>(())
        };
        problems.extend(gone.await.err().map(|error| error.to_string()));
    }
}

/// Which rows of the table are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    All,
    /// Those that lead past the device.
    NotEncrypted,
}

/// Whether a prefix that the device has for a peer may be gone afterwards.
fn takes_away(change: &WgChange) -> bool {
    let mut peers = change.peers.keys();
    !change.remove.is_empty() || peers.any(|key| !change.add_only.contains(key))
}

fn same_place(made: &WireguardSettings, now: &WireguardSettings, v4: bool) -> bool {
    made.family(v4).device == now.family(v4).device
        && made.table == now.table
        && made.priority == now.priority
        && made.mark == now.mark
}

fn row(prefix: IpNetwork, table: u32, device: Option<IfIndex>) -> Route {
    let protocol = route::protocol::FELIX;
    let route = match device {
        Some(index) => Route::on_device(prefix, protocol, index),
        None => Route {
            kind: RouteKind::Throw,
            ..Route::new(prefix, protocol, Target::None)
        },
    };
    Route { table, ..route }.normalised()
}

fn handshakes(device: &WgDevice) -> BTreeMap<WgKey, i64> {
    device
        .peers
        .iter()
        .map(|(key, (_, state))| (*key, state.last_handshake))
        .collect()
}

/// What differs between the device and its plan. Where it has no private key, `private` gives one.
fn change(
    found: &WgDevice,
    family: &FamilySettings,
    settings: &WireguardSettings,
    plan: &WgPlan,
    handshakes: &BTreeMap<WgKey, i64>,
    private: impl FnOnce() -> Option<WgKey>,
) -> Option<WgChange> {
    let wanted = plan.peers_now(handshakes);
    let differs = |key: &WgKey| {
        let peer = found.peers.get(key).map(|(peer, _)| peer);
        // A peer that roams has another endpoint; that is no fault, and set again it would only be learned again.
        peer.is_none_or(|peer| {
            peer.prefixes != wanted[key].prefixes
                || peer.keepalive != wanted[key].keepalive
                || peer.endpoint.map(|at| at.ip()) != wanted[key].endpoint.map(|at| at.ip())
        })
    };
    let mut peers: BTreeMap<_, _> = wanted
        .iter()
        .filter(|(key, _)| differs(key))
        .map(|(key, peer)| (*key, peer.clone()))
        .collect();
    // Where no prefix has to go, none is replaced: packets flow meanwhile.
    let mut add_only = BTreeSet::new();
    for (key, peer) in &mut peers {
        if let Some((known, _)) = found.peers.get(key)
            && known.prefixes.is_subset(&peer.prefixes)
        {
            add_only.insert(*key);
            peer.prefixes = &peer.prefixes - &known.prefixes;
        }
    }
    let remove: BTreeSet<WgKey> = found
        .peers
        .keys()
        .filter(|key| !wanted.contains_key(*key))
        .copied()
        .collect();
    let change = WgChange {
        private_key: found.private_key.is_none().then(private).flatten(),
        port: (found.port != family.port).then_some(family.port),
        fwmark: (found.fwmark != settings.mark).then_some(settings.mark),
        peers,
        add_only,
        remove,
    };
    (change != WgChange::default()).then_some(change)
}

/// A private key from the kernel's randomness.
fn new_key() -> Option<WgKey> {
    use std::io::Read as _;
    let mut bytes = [0; 32];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    if let Err(error) = read {
        warn!(%error, "no randomness for a WireGuard key");
        return None;
    }
    // Clamped as the kernel does it, so that what is read back equals what was set.
    let secret = StaticSecret::from(bytes);
    let public = PublicKey::from(&secret);
    info!(public = %WgKey(public.to_bytes()), "made a WireGuard key");
    Some(WgKey(secret.to_bytes()))
}

/// The device, up, with its MTU and its one address.
async fn device(
    netlink: &Netlink,
    family: &FamilySettings,
    plan: &WgPlan,
) -> Result<IfIndex, DeviceProblem> {
    let name = &family.device;
    let failed = |source: Error| DeviceProblem::Kernel {
        name: name.clone(),
        source,
    };
    let index = match netlink.link_by_name(name).map_err(failed)? {
        Some(link) if link.kind != LinkKind::Wireguard => {
            return Err(DeviceProblem::Foreign {
                name: name.clone(),
                found: link.kind.name().to_owned(),
            });
        }
        Some(link) => {
            if link.mtu != plan.mtu || !link.up {
                let change = LinkChange {
                    mtu: Some(plan.mtu),
                    up: Some(true),
                    ..LinkChange::default()
                };
                netlink
                    .change_link(link.index, &change)
                    .await
                    .map_err(failed)?;
            }
            link.index
        }
        None => {
            info!(device = name, "creating the WireGuard device");
            let link = NewLink {
                mtu: Some(plan.mtu),
                ..NewLink::new(name, NewLinkKind::Wireguard)
            };
            match netlink.add_link(&link).await {
                Ok(index) => index,
                Err(error) if error.is_unsupported() => {
                    return Err(DeviceProblem::NoModule {
                        name: name.clone(),
                        module: "wireguard",
                    });
                }
                Err(source) => return Err(failed(source)),
            }
        }
    };
    if let Some(address) = plan.address {
        address_of(netlink, index, IpNetwork::from(address.addr()))
            .await
            .map_err(failed)?;
    }
    Ok(index)
}

async fn address_of(netlink: &Netlink, index: IfIndex, wanted: IpNetwork) -> Result<(), Error> {
    let present = netlink.dump_addresses(Some(index))?;
    if !present.iter().any(|address| address.address == wanted) {
        netlink.add_address(&Address::new(index, wanted)).await?;
    }
    for address in present.iter().filter(|address| {
        address.address != wanted && address.address.is_ipv4() == wanted.is_ipv4()
    }) {
        netlink.delete_address(address).await?;
    }
    Ok(())
}

/// `not fwmark MARK/MARK lookup TABLE`, there once or not at all.
async fn rule(
    netlink: &Netlink,
    settings: &WireguardSettings,
    v4: bool,
    wanted: bool,
) -> Result<(), Error> {
    let rule = our_rule(settings, v4);
    let found: Vec<Rule> = netlink
        .dump_rules()?
        .into_iter()
        .filter(|found| found.v6 != v4 && found.table == settings.table)
        .filter(|found| found.priority == settings.priority)
        .collect();
    let right = found.contains(&rule);
    if wanted && !right {
        netlink.add_rule(&rule).await?;
    }
    if !wanted && right {
        netlink.delete_rule(&rule).await?;
    }
    // One of ours with another mark would lead outer packets into the table as well.
    for other in found
        .iter()
        .filter(|found| **found != rule && found.protocol == route::protocol::FELIX)
    {
        netlink.delete_rule(other).await?;
    }
    Ok(())
}

fn our_rule(settings: &WireguardSettings, v4: bool) -> Rule {
    Rule {
        fwmark: Some((settings.mark, settings.mark)),
        invert: true,
        protocol: route::protocol::FELIX,
        ..Rule::new(!v4, settings.priority, settings.table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_as_planned_needs_no_change() {
        let settings = WireguardSettings::default();
        let key = WgKey([3; 32]);
        let peer = cali_netlink::WgPeer {
            endpoint: Some("10.1.0.2:51820".parse().unwrap()),
            keepalive: 0,
            prefixes: BTreeSet::from(["192.168.2.0/26".parse().unwrap()]),
        };
        let plan = WgPlan {
            peers: BTreeMap::from([(key, peer.clone())]),
            ..WgPlan::default()
        };
        let state = cali_netlink::wireguard::WgPeerState {
            last_handshake: 5,
            ..Default::default()
        };
        let mut found = WgDevice {
            private_key: Some(WgKey([9; 32])),
            public_key: Some(WgKey([8; 32])),
            port: 51820,
            fwmark: settings.mark,
            peers: BTreeMap::from([(key, (peer, state))]),
        };
        let seen = handshakes(&found);
        let change = |found: &WgDevice| {
            change(found, &settings.v4, &settings, &plan, &seen, || {
                Some(WgKey([6; 32]))
            })
        };
        assert_eq!(change(&found), None);
        // A stranger's peer goes, a lost prefix comes back.
        let stranger = found.peers[&key].clone();
        found.peers.insert(WgKey([7; 32]), stranger);
        if let Some((peer, _)) = found.peers.get_mut(&key) {
            peer.prefixes.clear();
        }
        let put_right = change(&found).unwrap();
        assert_eq!(put_right.remove, BTreeSet::from([WgKey([7; 32])]));
        assert_eq!(put_right.peers.len(), 1);
        assert_eq!(put_right.add_only.len(), 1, "nothing has to be taken away");
        assert_eq!(put_right.private_key, None);
        // A device that was made anew gets the key that the others know.
        let anew = change(&WgDevice::default()).unwrap();
        assert_eq!(anew.private_key, Some(WgKey([6; 32])));
    }

    #[test]
    fn a_new_key_is_clamped_and_never_the_same() {
        let (one, other) = (new_key().unwrap(), new_key().unwrap());
        assert_ne!(one, other);
        assert!(!one.is_zero());
    }
}
