//! What a group of peers is told about a path: export rules, filter, edited attributes, next hop.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use super::base::Base;
use super::event::{NextHopMode, PeerConfig, RouteSource};
use super::hops::{Hop, HopId};
use super::store::AttrId;
use super::table::{DestId, Path, mark};
use crate::policy::{DEFAULT_LOCAL_PREF, EditSet, Policy, RouteView, Verdict};
use crate::wire::{Attributes, Codec, Community, Family, FamilySet, NextHop, PeerKind};

/// Everything that decides what a peer is sent. Peers with equal keys share one stream. Export reads nothing else of a
/// session's settings, so a setting that is not in the key cannot have an effect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct GroupKey {
    pub(super) codec: Codec,
    local_as: u32,
    local_v4: Option<Ipv4Addr>,
    local_v6: Option<NextHop>,
    next_hop: NextHopMode,
    client: Option<Ipv4Addr>,
    long_lived: bool,
    export: Arc<Policy>,
}

impl GroupKey {
    pub(super) fn of(config: &PeerConfig) -> Self {
        Self {
            // How the peer's messages are read does not matter here.
            codec: Codec {
                add_path_rx: FamilySet::EMPTY,
                ..config.codec
            },
            local_as: config.local_as,
            local_v4: config.local_v4,
            local_v6: config.local_v6,
            next_hop: config.next_hop,
            client: config.reflector_client,
            long_lived: config.long_lived,
            export: Arc::clone(&config.export),
        }
    }

    pub(super) fn add_path(&self, family: usize) -> bool {
        self.codec.add_path_tx.contains(Family::SUPPORTED[family])
    }

    /// Our own address as next hop for a family; `None` if the session cannot carry one.
    fn self_next_hop(&self, family: Family) -> Option<NextHop> {
        if family == Family::IPV6_UNICAST {
            return self.local_v6;
        }
        let classic = self.local_v4.map(NextHop::V4);
        let extended = self
            .local_v6
            .filter(|_| self.codec.extended_next_hop.contains(family));
        classic.or(extended)
    }
}

/// A route as a group was told; both numbers are counted references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Out {
    pub(super) attr: AttrId,
    pub(super) hop: HopId,
    /// Slot of the peer that the route came from: that peer is not told.
    pub(super) source: u16,
}

impl Out {
    pub(super) const NONE: Self = Self {
        attr: AttrId::NONE,
        hop: HopId::NONE,
        source: 0,
    };

    pub(super) fn release(self, base: &mut Base) {
        base.attrs.release(self.attr);
        base.hops.release(self.hop);
    }
}

/// Routes of one destination for a group: path identifier and route.
pub(super) type Outs = SmallVec<[(u32, Out); 1]>;

/// Edits of one batch: the same path attributes are edited once for all prefixes that share them.
#[derive(Debug, Default)]
pub(super) struct EditCache {
    done: HashMap<EditKey, Option<(AttrId, HopId)>, RandomState>,
    /// The last answer: the paths of one UPDATE follow each other.
    last: Option<(EditKey, Option<(AttrId, HopId)>)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EditKey {
    attr: AttrId,
    hop: HopId,
    peer: u16,
    long_lived: bool,
    family: u8,
    edits: EditSet,
}

impl EditCache {
    /// Gives back the references that the cache holds.
    pub(super) fn clear(&mut self, base: &mut Base) {
        self.last = None;
        for (attr, hop) in self.done.drain().filter_map(|(_, value)| value) {
            base.attrs.release(attr);
            base.hops.release(hop);
        }
    }
}

/// What a group with this key is told about a destination now.
pub(super) fn evaluate(
    base: &mut Base,
    cache: &mut EditCache,
    key: &GroupKey,
    family: usize,
    id: DestId,
) -> Outs {
    let mut outs = Outs::new();
    if !key.codec.families.contains(Family::SUPPORTED[family]) {
        return outs;
    }
    let dest = base.tables[family].get(id);
    if !key.add_path(family) {
        if let Some(path) = dest.best().copied()
            && let Some(out) = export(base, cache, key, family, id, &path)
        {
            outs.push((0, out));
        }
        return outs;
    }
    let context = base.context();
    let paths: SmallVec<[Path; 4]> = dest
        .paths
        .iter()
        .filter(|p| context.eligible(p))
        .copied()
        .collect();
    for path in paths {
        if let Some(out) = export(base, cache, key, family, id, &path) {
            outs.push((u32::from(path.local_id), out));
        }
    }
    outs
}

fn export(
    base: &mut Base,
    cache: &mut EditCache,
    key: &GroupKey,
    family: usize,
    id: DestId,
    path: &Path,
) -> Option<Out> {
    let source = base.source(path);
    if !may_leave(base, key, path, source) {
        return None;
    }
    let view = view(base, key, family, id, path);
    let Verdict::Accept(edits) = key.export.evaluate(&view) else {
        return None;
    };
    let cache_key = EditKey {
        attr: path.attr,
        hop: path.hop,
        peer: path.peer,
        long_lived: path.has(mark::LONG_LIVED),
        family: family as u8,
        edits,
    };
    if let Some((last, edited)) = &cache.last
        && *last == cache_key
    {
        return told(base, *edited, path);
    }
    let edited = match cache.done.get(&cache_key) {
        Some(edited) => *edited,
        None => {
            let family = Family::SUPPORTED[family];
            let edited = next_hop(base, key, family, path, source).map(|next_hop| {
                let attributes = edit(base, key, path, source, &cache_key.edits);
                let hop = Hop::Remote { next_hop, scope: 0 };
                (base.attrs.intern(&attributes), base.hops.intern(hop))
            });
            cache.done.insert(cache_key.clone(), edited);
            edited
        }
    };
    cache.last = Some((cache_key, edited));
    told(base, edited, path)
}

/// The route, with references of its own.
fn told(base: &mut Base, edited: Option<(AttrId, HopId)>, path: &Path) -> Option<Out> {
    let (attr, hop) = edited?;
    base.attrs.retain(attr);
    base.hops.retain(hop);
    Some(Out {
        attr,
        hop,
        source: path.peer,
    })
}

/// Why a path that is selected is not sent to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Withheld {
    /// The peer has no session for the family.
    NoFamily,
    /// It came from this peer.
    FromThisPeer,
    /// It carries NO_ADVERTISE (RFC 1997).
    NoAdvertise,
    /// It carries NO_EXPORT or its kin, and the peer is external (RFC 1997).
    NoExport,
    /// It is long-lived stale, and the peer does not know what that means (RFC 9494 §4.3).
    LongLivedStale,
    /// From one internal peer to another, neither of which is our client (RFC 4271 §9.2, RFC 4456 §6).
    NotReflected,
    /// An export rule, by its number in the policy; none for the policy's default.
    Filter(Option<u16>),
    /// There is no next hop that the session can carry.
    NoNextHop,
}

/// Rules that come before any filter.
fn may_leave(base: &Base, key: &GroupKey, path: &Path, source: RouteSource) -> bool {
    kept_back(base, key, path, source).is_none()
}

fn kept_back(base: &Base, key: &GroupKey, path: &Path, source: RouteSource) -> Option<Withheld> {
    let facts = base.attrs.key(path.attr);
    let external = key.codec.peer == PeerKind::Ebgp;
    if facts.no_advertise {
        return Some(Withheld::NoAdvertise);
    }
    if external && facts.no_export {
        return Some(Withheld::NoExport);
    }
    // RFC 9494 §4.3: only to peers that know what LLGR_STALE means.
    if (path.has(mark::LONG_LIVED) || facts.llgr_stale) && !key.long_lived {
        return Some(Withheld::LongLivedStale);
    }
    // RFC 4271 §9.2, RFC 4456 §6: between internal peers only from or to a client.
    let internal = source == RouteSource::Bgp(PeerKind::Ibgp) && !external;
    let reflected = key.client.is_some() || base.clients[usize::from(path.peer)].is_some();
    (internal && !reflected).then_some(Withheld::NotReflected)
}

/// Why a path is not sent to a peer of a group with this key; `None` if it is.
pub(super) fn withheld(
    base: &Base,
    key: &GroupKey,
    family: usize,
    id: DestId,
    path: &Path,
    slot: u16,
) -> Option<Withheld> {
    if !key.codec.families.contains(Family::SUPPORTED[family]) {
        return Some(Withheld::NoFamily);
    }
    if path.peer == slot {
        return Some(Withheld::FromThisPeer);
    }
    let source = base.source(path);
    if let Some(reason) = kept_back(base, key, path, source) {
        return Some(reason);
    }
    let view = view(base, key, family, id, path);
    if let Verdict::Reject(rule) = key.export.evaluate(&view) {
        return Some(Withheld::Filter(rule));
    }
    let next_hop = next_hop(base, key, Family::SUPPORTED[family], path, source);
    next_hop.is_none().then_some(Withheld::NoNextHop)
}

fn view<'a>(
    base: &'a Base,
    key: &GroupKey,
    family: usize,
    id: DestId,
    path: &Path,
) -> RouteView<'a> {
    let interface = match base.hops.get(path.hop) {
        Hop::Local { interface, .. } => interface.as_deref(),
        Hop::Remote { .. } => None,
    };
    RouteView {
        prefix: base.tables[family].prefix(id),
        attributes: base.attrs.get(path.attr),
        source: base.source(path),
        interface,
        peer: key.codec.peer,
    }
}

fn edit(
    base: &Base,
    key: &GroupKey,
    path: &Path,
    source: RouteSource,
    edits: &[u16],
) -> Attributes {
    let mut a = base.attrs.get(path.attr).clone();
    if path.has(mark::LONG_LIVED) {
        a.add_community(Community::LLGR_STALE);
    }
    match key.codec.peer {
        PeerKind::Ebgp => {
            // RFC 4271 §5.1.4: a received MED does not go on to another AS.
            if matches!(source, RouteSource::Bgp(_)) {
                a.med = None;
            }
            key.export.apply(edits, &mut a);
            a.as_path = a.as_path.without_confed().prepend(&[key.local_as]);
            a.local_pref = None;
            a.originator_id = None;
            a.cluster_list = Box::default();
            if a.ext_communities.iter().any(|c| !c.is_transitive()) {
                a.ext_communities = a
                    .ext_communities
                    .iter()
                    .copied()
                    .filter(|c| c.is_transitive())
                    .collect();
            }
        }
        PeerKind::Ibgp => {
            key.export.apply(edits, &mut a);
            a.local_pref.get_or_insert(DEFAULT_LOCAL_PREF);
            if source == RouteSource::Bgp(PeerKind::Ibgp) {
                reflect(base, key, path, &mut a);
            }
        }
    }
    a
}

/// RFC 4456 §8.
fn reflect(base: &Base, key: &GroupKey, path: &Path, a: &mut Attributes) {
    let slot = usize::from(path.peer);
    a.originator_id
        .get_or_insert(Ipv4Addr::from(base.owners[slot].router_id));
    let cluster = key
        .client
        .or(base.clients[slot])
        .unwrap_or_else(|| base.config.cluster());
    a.cluster_list = std::iter::once(cluster)
        .chain(a.cluster_list.iter().copied())
        .collect();
}

/// The next hop to send; `None` if there is none that the session can carry.
fn next_hop(
    base: &Base,
    key: &GroupKey,
    family: Family,
    path: &Path,
    source: RouteSource,
) -> Option<NextHop> {
    let own = match (source, key.codec.peer, key.next_hop) {
        (RouteSource::Local(_), _, _) | (_, _, NextHopMode::SelfAddress) => true,
        (_, PeerKind::Ebgp, mode) => mode != NextHopMode::Keep,
        (_, PeerKind::Ibgp, _) => false,
    };
    let Hop::Remote { next_hop, .. } = base.hops.get(path.hop) else {
        return key.self_next_hop(family);
    };
    if own {
        return key.self_next_hop(family);
    }
    // A link-local address means nothing beyond its link.
    let kept = match next_hop {
        NextHop::V6Pair { global, .. } => NextHop::V6(*global),
        NextHop::V6(addr) if addr.is_unicast_link_local() => return key.self_next_hop(family),
        other => *other,
    };
    let fits = match kept {
        NextHop::V4(_) => family == Family::IPV4_UNICAST,
        NextHop::V6(_) | NextHop::V6Pair { .. } => {
            family == Family::IPV6_UNICAST || key.codec.extended_next_hop.contains(family)
        }
    };
    if fits {
        Some(kept)
    } else {
        key.self_next_hop(family)
    }
}
