//! Why things are as they are: which rule refused a path, to whom a route goes and why not to others. Reads only;
//! decisions are made again from the same inputs.

use super::engine::Rib;
use super::event::{PeerSlot, RouteSource};
use super::export::{self, GroupKey, Withheld};
use super::import::Refusal;
use super::view::{PathStatus, PathView};
use crate::policy::{RouteView, Verdict};
use crate::wire::{Family, Prefix};

/// A selected route that a peer is not told of.
#[derive(Clone, Debug)]
pub struct WithheldRoute<'a> {
    /// The route.
    pub path: PathView<'a>,
    /// Why.
    pub reason: Withheld,
}

impl Rib {
    /// The import rule that refused a path, by its name ("BGPFilter x importV4[2]"); `None` if no rule did.
    pub fn refusing_rule(&self, path: &PathView<'_>) -> Option<&str> {
        if path.status != PathStatus::Refused(Refusal::Filter) {
            return None;
        }
        let peer = self.peers.get(usize::from(path.peer.0))?.as_ref()?;
        let config = peer.config.as_ref()?;
        let view = RouteView {
            prefix: path.prefix,
            attributes: path.attributes,
            source: path.source,
            interface: None,
            peer: config.codec.peer,
        };
        match config.import.evaluate(&view) {
            Verdict::Reject(Some(number)) => config.import.rule_origin(number),
            _ => None,
        }
    }

    /// The export rule with this number of a peer's policy, by its name.
    pub fn export_rule(&self, slot: PeerSlot, number: u16) -> Option<&str> {
        let peer = self.peers.get(usize::from(slot.0))?.as_ref()?;
        peer.config.as_ref()?.export.rule_origin(number)
    }

    /// The selected route of a prefix and why this peer is not told of it; the reason is `None` if it is told.
    /// `None` where there is no selected route, or no session.
    pub fn told_to(
        &self,
        slot: PeerSlot,
        prefix: &Prefix,
    ) -> Option<(PathView<'_>, Option<Withheld>)> {
        let best = self.paths(prefix).into_iter().next()?;
        let family = prefix.family().index()?;
        let table = &self.base.tables[family];
        let id = table.find(prefix)?;
        let dest = table.get(id);
        let path = dest.best()?;
        let peer = self.peers.get(usize::from(slot.0))?.as_ref()?;
        peer.group?;
        let key = GroupKey::of(peer.config.as_ref()?);
        let reason = export::withheld(&self.base, &key, family, id, path, slot.0);
        Some((best, reason))
    }

    /// Selected routes that a peer is not told of, of up to `count` destinations from number `from` on, and where to go
    /// on.
    pub fn withheld(
        &self,
        slot: PeerSlot,
        family: Family,
        from: u32,
        count: u32,
    ) -> (Vec<WithheldRoute<'_>>, Option<u32>) {
        let (views, next) = self.page(family, from, count);
        let selected = views.into_iter().filter(|v| v.status == PathStatus::Best);
        let withheld = selected.filter_map(|path| {
            let (_, reason) = self.told_to(slot, &path.prefix)?;
            Some(WithheldRoute {
                path,
                reason: reason?,
            })
        });
        (withheld.collect(), next)
    }

    /// How many routes each peer is told of, by slot number; by family, IPv4 first.
    pub fn advertised_counts(&self) -> Vec<[u64; 2]> {
        let groups: Vec<_> = self
            .groups
            .iter()
            .map(|group| group.as_ref().map(|g| [0, 1].map(|f| g.told_counts(f))))
            .collect();
        let count = |(slot, peer): (usize, &Option<super::engine::Peer>)| {
            let group = peer.as_ref().and_then(|p| p.group);
            let counts = group.and_then(|id| groups.get(id as usize)?.as_ref());
            counts.map_or([0, 0], |families| {
                [0, 1].map(|f| {
                    let (all, by_source) = &families[f];
                    let own = u16::try_from(slot).ok().and_then(|s| by_source.get(&s));
                    all - own.copied().unwrap_or(0)
                })
            })
        };
        self.peers.iter().enumerate().map(count).collect()
    }

    /// What is behind a local route, for people: its kind, and its interface where it has one.
    pub fn local_origin(&self, path: &PathView<'_>) -> Option<String> {
        let RouteSource::Local(kind) = path.source else {
            return None;
        };
        let kind = format!("{kind:?}").to_lowercase();
        Some(match path.interface {
            Some(interface) => format!("{kind} on {interface}"),
            None => kind,
        })
    }
}
