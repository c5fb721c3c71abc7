//! What becomes of a received UPDATE: loop checks, filter, and the path that is stored.

use smallvec::SmallVec;

use super::base::Base;
use super::event::{PeerConfig, RouteSource};
use super::hops::Hop;
use super::store::AttrId;
use super::table::mark;
use crate::policy::{EditSet, RouteView, Verdict};
use crate::wire::{Attributes, NextHop, PeerKind, Prefix};

/// Why an announcement was refused. It still replaced the peer's former path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Refusal {
    /// An import rule.
    Filter = 1,
    /// Our AS number occurs too often in AS_PATH.
    AsLoop = 2,
    /// ORIGINATOR_ID is our identifier (RFC 4456 §8).
    OriginatorLoop = 3,
    /// CLUSTER_LIST holds our cluster (RFC 4456 §8).
    ClusterLoop = 4,
    /// The leftmost AS is not the peer's.
    FirstAs = 5,
    /// The next hop is ourselves.
    OwnNextHop = 6,
}

impl Refusal {
    pub(super) const fn marks(self) -> u16 {
        (self as u16) << mark::REFUSAL_SHIFT
    }

    pub(super) const fn from_marks(marks: u16) -> Option<Self> {
        Some(match marks >> mark::REFUSAL_SHIFT {
            1 => Self::Filter,
            2 => Self::AsLoop,
            3 => Self::OriginatorLoop,
            4 => Self::ClusterLoop,
            5 => Self::FirstAs,
            6 => Self::OwnNextHop,
            _ => return None,
        })
    }
}

/// Outcome for one prefix: counted attributes and marks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accepted {
    pub(super) attr: AttrId,
    pub(super) marks: u16,
}

/// Import of one block of routes with common attributes and next hop. Attributes are interned once for each combination of
/// edits, not for each prefix.
pub(super) struct Importer<'a> {
    config: &'a PeerConfig,
    attributes: &'a Attributes,
    refused: Option<Refusal>,
    done: SmallVec<[(EditSet, Accepted); 2]>,
    plain: AttrId,
}

impl<'a> Importer<'a> {
    pub(super) fn new(
        base: &mut Base,
        config: &'a PeerConfig,
        attributes: &'a Attributes,
        next_hop: &NextHop,
    ) -> Self {
        let refused = check(base, config, attributes, next_hop);
        let plain = base.attrs.intern(attributes);
        Self {
            config,
            attributes,
            refused,
            done: SmallVec::new(),
            plain,
        }
    }

    /// Decides about one prefix; the result holds a reference of its own.
    pub(super) fn import(&mut self, base: &mut Base, prefix: Prefix) -> Accepted {
        let accepted = match self.refused {
            Some(refusal) => Accepted {
                attr: self.plain,
                marks: refusal.marks(),
            },
            None => self.filter(base, prefix),
        };
        base.attrs.retain(accepted.attr);
        accepted
    }

    fn filter(&mut self, base: &mut Base, prefix: Prefix) -> Accepted {
        let view = RouteView {
            prefix,
            attributes: self.attributes,
            source: RouteSource::Bgp(self.config.codec.peer),
            interface: None,
            peer: self.config.codec.peer,
        };
        let Verdict::Accept(edits) = self.config.import.evaluate(&view) else {
            return Accepted {
                attr: self.plain,
                marks: Refusal::Filter.marks(),
            };
        };
        if edits.is_empty() {
            return Accepted {
                attr: self.plain,
                marks: 0,
            };
        }
        if let Some((_, accepted)) = self.done.iter().find(|(done, _)| *done == edits) {
            return *accepted;
        }
        let mut edited = self.attributes.clone();
        let preferred = self.config.import.apply(&edits, &mut edited);
        let marks = if preferred { mark::PREFERRED } else { 0 };
        let accepted = Accepted {
            attr: base.attrs.intern(&edited),
            marks,
        };
        self.done.push((edits, accepted));
        accepted
    }

    /// Gives back the importer's own references.
    pub(super) fn finish(self, base: &mut Base) {
        base.attrs.release(self.plain);
        for (_, accepted) in self.done {
            base.attrs.release(accepted.attr);
        }
    }
}

/// Checks that concern the attributes, whatever the prefix.
fn check(
    base: &Base,
    config: &PeerConfig,
    attributes: &Attributes,
    next_hop: &NextHop,
) -> Option<Refusal> {
    let path = &attributes.as_path;
    let allowed = usize::from(config.allow_own_as);
    let own = [config.local_as, base.config.own_as];
    if own.iter().any(|asn| path.count(*asn) > allowed) {
        return Some(Refusal::AsLoop);
    }
    let external = config.codec.peer == PeerKind::Ebgp;
    if external && config.enforce_first_as && path.neighbor_as() != Some(config.remote_as) {
        return Some(Refusal::FirstAs);
    }
    if attributes.originator_id == Some(base.config.router_id) {
        return Some(Refusal::OriginatorLoop);
    }
    let cluster = base.config.cluster();
    let ours = |id: &std::net::Ipv4Addr| *id == cluster || config.reflector_client == Some(*id);
    if attributes.cluster_list.iter().any(ours) {
        return Some(Refusal::ClusterLoop);
    }
    let own_address = config
        .local_v4
        .map(NextHop::V4)
        .is_some_and(|own| own == *next_hop)
        || config
            .local_v6
            .is_some_and(|own| own.global() == next_hop.global());
    own_address.then_some(Refusal::OwnNextHop)
}

/// Where a path of this peer leads.
pub(super) fn hop(config: &PeerConfig, next_hop: NextHop) -> Hop {
    let link_local = match next_hop {
        NextHop::V6(a) | NextHop::V6Pair { link_local: a, .. } => a.is_unicast_link_local(),
        NextHop::V4(_) => false,
    };
    Hop::Remote {
        next_hop,
        scope: if link_local { config.scope } else { 0 },
    }
}
