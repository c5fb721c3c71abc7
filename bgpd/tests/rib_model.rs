//! The table against a naive model: random events, then what the kernel and every peer were told must be what the
//! model computes from scratch.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use bgpd::policy::{
    Action, Condition, DEFAULT_LOCAL_PREF, Edit, LocalKind, Policy, PolicyBuilder, PrefixSet,
};
use bgpd::rib::{
    Gateway, LocalRoute, NextHopMode, NextHopState, PeerConfig, PeerId, PeerSlot, Rib, RibConfig,
    RibInput,
};
use bgpd::wire::{
    AsPath, Attributes, Codec, Community, Family, FamilySet, Framer, Message, MpReach, MpUnreach,
    NextHop, Nlri, NlriBlock, Origin, PeerKind, Prefix, Update,
};
use bytes::BytesMut;
use proptest::prelude::*;

const OWN_AS: u32 = 65000;
const PEERS: usize = 7;
const PREFIXES: usize = 6;
const OWN_ID: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);

#[derive(Clone, Debug)]
struct Announcement {
    peer: usize,
    prefix: usize,
    path_id: u32,
    tail: Vec<u32>,
    med: Option<u32>,
    local_pref: Option<u32>,
    origin: Origin,
    community: Option<Community>,
    gateway: usize,
}

#[derive(Clone, Debug)]
enum Op {
    Announce(Announcement),
    Withdraw {
        peer: usize,
        prefix: usize,
        path_id: u32,
    },
    Down {
        peer: usize,
        retain: bool,
    },
    Up {
        peer: usize,
        preserved: bool,
    },
    EndOfRib {
        peer: usize,
    },
    Refresh {
        peer: usize,
    },
    Hop {
        gateway: usize,
        metric: Option<u32>,
    },
    Originate {
        prefix: usize,
        local_pref: u32,
    },
    Retract {
        prefix: usize,
    },
    Export {
        peer: usize,
        strict: bool,
    },
    Commit,
    Pull {
        peer: usize,
        budget: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let announce = (
        (0..PEERS, 0..PREFIXES, 1u32..3),
        proptest::collection::vec(prop_oneof![9 => 1u32..4, 1 => Just(OWN_AS)], 0..3),
        (
            proptest::option::of(0u32..3),
            proptest::option::of(90u32..93),
            0..3,
        ),
        prop_oneof![
            6 => Just(None),
            1 => Just(Some(Community::NO_EXPORT)),
            1 => Just(Some(Community::NO_ADVERTISE)),
        ],
        0usize..3,
    )
        .prop_map(
            |((peer, prefix, path_id), tail, (med, local_pref, origin), community, gateway)| {
                let origin = [Origin::Igp, Origin::Egp, Origin::Incomplete][origin as usize];
                Op::Announce(Announcement {
                    peer,
                    prefix,
                    path_id,
                    tail,
                    med,
                    local_pref,
                    origin,
                    community,
                    gateway,
                })
            },
        );
    let (peer, prefix) = (0..PEERS, 0..PREFIXES);
    prop_oneof![
        20 => announce,
        6 => (peer.clone(), prefix.clone(), 1u32..3)
            .prop_map(|(peer, prefix, path_id)| Op::Withdraw { peer, prefix, path_id }),
        1 => (peer.clone(), any::<bool>()).prop_map(|(peer, retain)| Op::Down { peer, retain }),
        3 => (peer.clone(), any::<bool>()).prop_map(|(peer, preserved)| Op::Up { peer, preserved }),
        1 => peer.clone().prop_map(|peer| Op::EndOfRib { peer }),
        1 => peer.clone().prop_map(|peer| Op::Refresh { peer }),
        2 => (0usize..3, proptest::option::of(0u32..3))
            .prop_map(|(gateway, metric)| Op::Hop { gateway, metric }),
        1 => (prefix.clone(), 90u32..93)
            .prop_map(|(prefix, local_pref)| Op::Originate { prefix, local_pref }),
        1 => prefix.prop_map(|prefix| Op::Retract { prefix }),
        1 => (peer.clone(), any::<bool>()).prop_map(|(peer, strict)| Op::Export { peer, strict }),
        8 => Just(Op::Commit),
        8 => (peer, 1usize..400).prop_map(|(peer, budget)| Op::Pull { peer, budget }),
    ]
}

fn prefix(index: usize) -> Prefix {
    match index % 3 {
        2 => Prefix::v6((0x2001_0db8_0001u128 << 80) | (index as u128) << 64, 64),
        _ => Prefix::v4(0x0a00_0000 | (index as u32) << 8, 24),
    }
}

fn gateway(index: usize, family: Family) -> IpAddr {
    let text = match family.afi {
        1 => format!("10.1.0.{}", index + 1),
        _ => format!("2001:db8::1:{}", index + 1),
    };
    text.parse().expect("an address")
}

fn strict_policy() -> Policy {
    let odd: PrefixSet = (0..PREFIXES).filter(|i| i % 2 == 1).map(prefix).collect();
    PolicyBuilder::default()
        .rule("odd", vec![Condition::OneOf(odd)], vec![], Action::Reject)
        .rule(
            "mark",
            vec![],
            vec![Edit::AddCommunity(Community(65000 << 16 | 1))],
            Action::Next,
        )
        .rule(
            "longer",
            vec![],
            vec![Edit::PrependAsPath([64999].into())],
            Action::Accept,
        )
        .build(false)
}

/// The cast: external peers of two ASes, internal ones, clients, one of them with add-path.
fn config(index: usize, strict: bool) -> PeerConfig {
    let (kind, remote_as) = match index {
        0 | 5 => (PeerKind::Ebgp, 65001),
        1 => (PeerKind::Ebgp, 65002),
        _ => (PeerKind::Ibgp, OWN_AS),
    };
    let add_path = if index == 4 {
        FamilySet::ALL
    } else {
        FamilySet::EMPTY
    };
    let id = Ipv4Addr::new(10, 0, 0, 1 + index as u8);
    PeerConfig {
        codec: Codec {
            peer: kind,
            four_octet_as: index != 1,
            extended_message: false,
            families: FamilySet::ALL,
            add_path_rx: add_path,
            add_path_tx: add_path,
            extended_next_hop: FamilySet::EMPTY,
        },
        local_as: OWN_AS,
        remote_as,
        remote_id: id,
        remote_addr: IpAddr::V4(id),
        scope: 0,
        local_v4: Some(Ipv4Addr::new(10, 0, 0, 100)),
        local_v6: Some(NextHop::V6("2001:db8::100".parse().expect("an address"))),
        next_hop: NextHopMode::Auto,
        reflector_client: matches!(index, 3 | 4).then_some(OWN_ID),
        allow_own_as: 0,
        enforce_first_as: false,
        long_lived: false,
        enhanced_refresh: index == 2,
        max_prefixes: 0,
        import: Arc::new(Policy::accept_all()),
        export: Arc::new(if strict {
            strict_policy()
        } else {
            Policy::accept_all()
        }),
    }
}

#[derive(Clone, Debug)]
struct ModelPath {
    attributes: Attributes,
    gateway: Option<usize>,
    stale: bool,
}

/// Peer index (`None`: originated here), prefix index, path identifier.
type PathKey = (Option<usize>, usize, u32);
type Told = BTreeMap<Nlri, (NextHop, Attributes)>;

#[derive(Default)]
struct Model {
    paths: BTreeMap<PathKey, ModelPath>,
    metrics: [Option<u32>; 3],
    strict: [bool; PEERS],
}

impl Model {
    fn eligible(&self, path: &ModelPath) -> bool {
        let looped = path.attributes.as_path.count(OWN_AS) > 0;
        !looped && path.gateway.is_none_or(|g| self.metrics[g].is_some())
    }

    /// Candidates after each step of the decision process, written as the RFC tells it.
    fn best(&self, prefix: usize) -> Option<(PathKey, BTreeSet<usize>)> {
        let mut left: Vec<(&PathKey, &ModelPath)> = self
            .paths
            .iter()
            .filter(|((_, p, _), path)| *p == prefix && self.eligible(path))
            .collect();
        if left.iter().any(|((peer, ..), _)| peer.is_none()) {
            left.retain(|((peer, ..), _)| peer.is_none());
        }
        let kind = |key: &PathKey| key.0.map(|p| config(p, false).codec.peer == PeerKind::Ibgp);
        let keep_min = |left: &mut Vec<(&PathKey, &ModelPath)>,
                        f: &dyn Fn(&PathKey, &ModelPath) -> u64| {
            let min = left.iter().map(|(k, p)| f(k, p)).min();
            left.retain(|(k, p)| Some(f(k, p)) == min);
        };
        let pref = |p: &ModelPath| p.attributes.local_pref.unwrap_or(DEFAULT_LOCAL_PREF);
        keep_min(&mut left, &|_, p| u64::from(u32::MAX - pref(p)));
        keep_min(&mut left, &|_, p| p.attributes.as_path.hops() as u64);
        keep_min(&mut left, &|_, p| p.attributes.origin as u64);
        let all = left.clone();
        left.retain(|(_, p)| {
            let med = |p: &ModelPath| p.attributes.med.unwrap_or(0);
            !all.iter().any(|(_, q)| {
                q.attributes.as_path.neighbor_as() == p.attributes.as_path.neighbor_as()
                    && med(q) < med(p)
            })
        });
        keep_min(&mut left, &|k, _| u64::from(kind(k).unwrap_or(false)));
        keep_min(&mut left, &|_, p| {
            p.gateway
                .map_or(0, |g| u64::from(self.metrics[g].unwrap_or(0)))
        });
        let gateways = left.iter().filter_map(|(_, p)| p.gateway).collect();
        let id = |k: &PathKey| {
            k.0.map_or(0, |p| u64::from(u32::from(config(p, false).remote_id)))
        };
        keep_min(&mut left, &|k, _| id(k));
        keep_min(&mut left, &|k, _| u64::from(k.2));
        left.first().map(|(key, _)| (**key, gateways))
    }

    /// What `peer` must have been told about a path, before path identifiers.
    fn export(&self, peer: usize, key: &PathKey) -> Option<(NextHop, Attributes)> {
        let (source, index, _) = *key;
        let path = &self.paths[key];
        let target = config(peer, false);
        let external = target.codec.peer == PeerKind::Ebgp;
        let from = source.map(|s| config(s, false));
        let internal_source = from
            .as_ref()
            .is_some_and(|c| c.codec.peer == PeerKind::Ibgp);
        let client = |c: &PeerConfig| c.reflector_client.is_some();
        let mut a = path.attributes.clone();
        if source == Some(peer)
            || a.has_community(Community::NO_ADVERTISE)
            || (external && a.has_community(Community::NO_EXPORT))
            || (internal_source
                && !external
                && !client(&target)
                && !from.as_ref().is_some_and(client))
            || (self.strict[peer] && index % 2 == 1)
        {
            return None;
        }
        if external && source.is_some() {
            a.med = None;
        }
        if self.strict[peer] {
            a.add_community(Community(65000 << 16 | 1));
            a.as_path = a.as_path.prepend(&[64999]);
        }
        if external {
            a.as_path = a.as_path.prepend(&[OWN_AS]);
            a.local_pref = None;
        } else {
            a.local_pref.get_or_insert(DEFAULT_LOCAL_PREF);
            if internal_source {
                a.originator_id = from.map(|c| c.remote_id);
                a.cluster_list = [OWN_ID].into();
            }
        }
        let family = prefix(index).family();
        let own = external || path.gateway.is_none();
        let next_hop = match (own, family == Family::IPV4_UNICAST) {
            (true, true) => NextHop::V4(Ipv4Addr::new(10, 0, 0, 100)),
            (true, false) => NextHop::V6("2001:db8::100".parse().expect("an address")),
            (false, _) => gateway(path.gateway?, family).into(),
        };
        Some((next_hop, a))
    }

    fn told(&self, peer: usize) -> Vec<(Prefix, NextHop, Attributes)> {
        let mut routes = Vec::new();
        for index in 0..PREFIXES {
            let keys: Vec<PathKey> = if peer == 4 {
                let here = |k: &&PathKey| k.1 == index && self.eligible(&self.paths[*k]);
                self.paths.keys().filter(here).copied().collect()
            } else {
                self.best(index).into_iter().map(|(key, _)| key).collect()
            };
            for key in keys {
                if let Some((next_hop, attributes)) = self.export(peer, &key) {
                    routes.push((prefix(index), next_hop, attributes));
                }
            }
        }
        sort(routes)
    }
}

fn sort(mut routes: Vec<(Prefix, NextHop, Attributes)>) -> Vec<(Prefix, NextHop, Attributes)> {
    routes.sort_by_key(|(prefix, hop, a)| (*prefix, format!("{hop:?}{a:?}")));
    routes
}

struct World {
    rib: Rib,
    model: Model,
    slots: Vec<PeerSlot>,
    epochs: [u32; PEERS],
    up: [bool; PEERS],
    told: Vec<Told>,
    ends: [usize; PEERS],
    ready: [bool; PEERS],
    kernel: BTreeMap<Prefix, Vec<Gateway>>,
    watched: BTreeSet<Gateway>,
}

impl World {
    fn new() -> Self {
        let mut rib_config = RibConfig::new(OWN_AS, OWN_ID);
        rib_config.stream_limit = 150;
        let mut rib = Rib::new(rib_config);
        let slots = (0..PEERS)
            .map(|_| rib.register().expect("a slot"))
            .collect();
        let mut world = Self {
            rib,
            model: Model {
                metrics: [Some(1); 3],
                ..Model::default()
            },
            slots,
            epochs: [0; PEERS],
            up: [false; PEERS],
            told: vec![Told::new(); PEERS],
            ends: [0; PEERS],
            ready: [false; PEERS],
            kernel: BTreeMap::new(),
            watched: BTreeSet::new(),
        };
        for peer in 0..PEERS {
            world.apply(&Op::Up {
                peer,
                preserved: false,
            });
        }
        world
    }

    fn id(&self, peer: usize) -> PeerId {
        PeerId {
            slot: self.slots[peer],
            epoch: self.epochs[peer],
        }
    }

    fn update(&mut self, peer: usize, update: Update) {
        let input = RibInput::Update {
            peer: self.id(peer),
            update: Box::new(update),
        };
        self.rib.handle(input);
    }

    fn drop_stale(&mut self, peer: usize) {
        self.model
            .paths
            .retain(|key, path| key.0 != Some(peer) || !path.stale);
    }

    fn announce(&mut self, a: &Announcement) {
        let settings = config(a.peer, false);
        let external = settings.codec.peer == PeerKind::Ebgp;
        let mut path = if external {
            vec![settings.remote_as]
        } else {
            Vec::new()
        };
        path.extend(&a.tail);
        let attributes = Attributes {
            origin: a.origin,
            as_path: AsPath::from_sequence(&path),
            med: a.med,
            local_pref: a.local_pref.filter(|_| !external),
            communities: a.community.into_iter().collect(),
            ..Attributes::default()
        };
        let (family, add_path) = (prefix(a.prefix).family(), a.peer == 4);
        let path_id = if add_path { a.path_id } else { 0 };
        let route = Nlri {
            prefix: prefix(a.prefix),
            path_id,
        };
        let nlri = NlriBlock::from_routes(family, add_path, &[route]);
        let next_hop = NextHop::from(gateway(a.gateway, family));
        let mut update = Update {
            attributes: attributes.clone(),
            ..Update::empty()
        };
        if family == Family::IPV4_UNICAST {
            update.next_hop = Some(next_hop);
            update.nlri = nlri;
        } else {
            update.mp_reach = Some(MpReach { next_hop, nlri });
        }
        self.update(a.peer, update);
        let path = ModelPath {
            attributes,
            gateway: Some(a.gateway),
            stale: false,
        };
        self.model
            .paths
            .insert((Some(a.peer), a.prefix, path_id), path);
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Announce(a) if self.up[a.peer] => self.announce(a),
            Op::Withdraw {
                peer,
                prefix: index,
                path_id,
            } if self.up[*peer] => {
                let path_id = if *peer == 4 { *path_id } else { 0 };
                let route = Nlri {
                    prefix: prefix(*index),
                    path_id,
                };
                let family = route.prefix.family();
                let nlri = NlriBlock::from_routes(family, *peer == 4, &[route]);
                let mut update = Update::empty();
                if family == Family::IPV4_UNICAST {
                    update.withdrawn = nlri;
                } else {
                    update.mp_unreach = Some(MpUnreach { nlri });
                }
                self.update(*peer, update);
                self.model.paths.remove(&(Some(*peer), *index, path_id));
            }
            Op::Down { peer, retain } if self.up[*peer] => {
                let families = if *retain {
                    FamilySet::ALL
                } else {
                    FamilySet::EMPTY
                };
                self.rib.handle(RibInput::PeerDown {
                    peer: self.id(*peer),
                    retain: families,
                });
                self.up[*peer] = false;
                self.drop_stale(*peer);
                self.model
                    .paths
                    .retain(|key, _| *retain || key.0 != Some(*peer));
                for (key, path) in &mut self.model.paths {
                    path.stale |= key.0 == Some(*peer);
                }
            }
            Op::Up { peer, preserved } if !self.up[*peer] => {
                self.epochs[*peer] += 1;
                self.rib.handle(RibInput::PeerUp {
                    peer: self.id(*peer),
                    config: Arc::new(config(*peer, self.model.strict[*peer])),
                    preserved: if *preserved {
                        FamilySet::ALL
                    } else {
                        FamilySet::EMPTY
                    },
                });
                self.up[*peer] = true;
                self.told[*peer].clear();
                self.ends[*peer] = 0;
                self.ready[*peer] = false;
                if !preserved {
                    self.drop_stale(*peer);
                }
            }
            Op::EndOfRib { peer } if self.up[*peer] => {
                for family in Family::SUPPORTED {
                    self.update(*peer, Update::end_of_rib(family));
                }
                self.drop_stale(*peer);
            }
            Op::Refresh { peer } if self.up[*peer] => {
                for family in Family::SUPPORTED {
                    let peer = self.id(*peer);
                    self.rib.handle(RibInput::RefreshRequested { peer, family });
                }
            }
            Op::Hop { gateway, metric } => {
                self.model.metrics[*gateway] = *metric;
                for family in Family::SUPPORTED {
                    self.track(*gateway, family);
                }
            }
            Op::Originate {
                prefix: index,
                local_pref,
            } => {
                let attributes = Attributes {
                    local_pref: Some(*local_pref),
                    ..Attributes::default()
                };
                self.rib.handle(RibInput::Originate(LocalRoute {
                    prefix: prefix(*index),
                    attributes: attributes.clone(),
                    kind: LocalKind::Block,
                    interface: None,
                }));
                let path = ModelPath {
                    attributes,
                    gateway: None,
                    stale: false,
                };
                self.model.paths.insert((None, *index, 0), path);
            }
            Op::Retract { prefix: index } => {
                self.rib.handle(RibInput::Retract(prefix(*index)));
                self.model.paths.remove(&(None, *index, 0));
            }
            Op::Export { peer, strict } => {
                self.model.strict[*peer] = *strict;
                let config = Arc::new(config(*peer, *strict));
                self.rib.handle(RibInput::PeerChanged {
                    peer: self.id(*peer),
                    config,
                });
            }
            Op::Commit => self.commit(),
            Op::Pull { peer, budget } => {
                self.pull(*peer, *budget);
            }
            _ => {}
        }
    }

    fn track(&mut self, index: usize, family: Family) {
        let state = match self.model.metrics[index] {
            Some(metric) => NextHopState::Reachable { metric },
            None => NextHopState::Unreachable,
        };
        let gateway = Gateway {
            addr: gateway(index, family),
            scope: 0,
        };
        self.rib.handle(RibInput::NextHop { gateway, state });
    }

    /// Commits until the tracker has answered every question.
    fn commit(&mut self) {
        loop {
            let changes = self.rib.commit();
            for change in changes.best {
                match change.best {
                    Some(best) => {
                        self.kernel.insert(change.prefix, best.gateways.clone());
                    }
                    None => {
                        let known = self.kernel.remove(&change.prefix);
                        assert!(known.is_some(), "removal of a route that was not there");
                    }
                }
            }
            for peer in changes.ready {
                let index = self
                    .slots
                    .iter()
                    .position(|s| *s == peer.slot)
                    .expect("known");
                assert_eq!(peer.epoch, self.epochs[index]);
                self.ready[index] = true;
            }
            for gateway in changes.unwatch {
                assert!(self.watched.remove(&gateway));
            }
            let asked = changes.watch.len();
            for watched in changes.watch {
                assert!(self.watched.insert(watched));
                for (index, family) in
                    (0..3).flat_map(|i| Family::SUPPORTED.map(|family| (i, family)))
                {
                    if gateway(index, family) == watched.addr {
                        self.track(index, family);
                    }
                }
            }
            if asked == 0 {
                return;
            }
        }
    }

    /// Reads what there is for a peer; says whether there was anything.
    fn pull(&mut self, peer: usize, budget: usize) -> bool {
        let pull = self.rib.pull(self.id(peer), budget);
        if !pull.more {
            self.ready[peer] = false;
        }
        // Messages are read as the peer reads them.
        let settings = config(peer, false);
        let any = !pull.messages.is_empty();
        for bytes in pull.messages {
            let frame = Framer::new().next(&mut BytesMut::from(&bytes[..]));
            let frame = frame.expect("a good header").expect("a whole message");
            match Message::decode(&frame, &settings.codec).expect("a good message") {
                Message::RouteRefresh(_) => {}
                Message::Update(update) if update.as_end_of_rib().is_some() => self.ends[peer] += 1,
                Message::Update(update) => {
                    assert!(update.faults.is_empty(), "{:?}", update.faults);
                    for route in update.withdrawals() {
                        self.told[peer].remove(&route);
                    }
                    for (next_hop, block) in update.announcements() {
                        for route in block.iter() {
                            self.told[peer].insert(route, (next_hop, update.attributes.clone()));
                        }
                    }
                }
                other => panic!("unexpected message {other:?}"),
            }
        }
        any || pull.more
    }

    fn check(&mut self) {
        self.commit();
        let up = self.up;
        for peer in (0..PEERS).filter(|p| up[*p]) {
            while self.pull(peer, 300) {}
            let told = self.told[peer]
                .iter()
                .map(|(n, (hop, a))| (n.prefix, *hop, a.clone()));
            let expected = self.model.told(peer);
            assert_eq!(
                sort(told.collect()),
                expected,
                "peer {peer} was told something else"
            );
            assert!(self.ends[peer] >= 2, "peer {peer} waits for End-of-RIB");
            let listed = Family::SUPPORTED.map(|f| self.rib.advertised(self.slots[peer], f).len());
            assert_eq!(listed.iter().sum::<usize>(), expected.len());
        }
        for index in 0..PREFIXES {
            let family = prefix(index).family();
            let expected = self.model.best(index).map(|(_, gateways)| {
                let mut list: Vec<Gateway> = gateways
                    .iter()
                    .map(|g| Gateway {
                        addr: gateway(*g, family),
                        scope: 0,
                    })
                    .collect();
                list.sort();
                list
            });
            assert_eq!(
                self.kernel.get(&prefix(index)),
                expected.as_ref(),
                "{}",
                prefix(index)
            );
        }
        let used = |(key, path): (&PathKey, &ModelPath)| {
            let addr = gateway(path.gateway?, prefix(key.1).family());
            Some(Gateway { addr, scope: 0 })
        };
        let used: BTreeSet<Gateway> = self.model.paths.iter().filter_map(used).collect();
        assert_eq!(self.watched, used);
    }

    /// Takes everything away: nothing may be left behind.
    fn end(mut self) {
        for slot in self.slots.clone() {
            self.rib.handle(RibInput::PeerRemoved { slot });
        }
        for index in 0..PREFIXES {
            self.rib.handle(RibInput::Retract(prefix(index)));
        }
        self.rib.commit();
        let counts = self.rib.counts();
        assert_eq!(
            (counts.prefixes, counts.attribute_sets, counts.groups),
            ([0, 0], 0, 0)
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kernel_and_peers_are_told_what_the_model_says(
        rounds in proptest::collection::vec(proptest::collection::vec(op(), 1..40), 1..5)
    ) {
        let mut world = World::new();
        for round in rounds {
            for op in &round {
                world.apply(op);
            }
            world.check();
        }
        world.end();
    }
}
