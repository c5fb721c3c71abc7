//! Answers for the status socket.

use std::net::IpAddr;

use cali_api::{Asn, Cidr};
use cali_control::status::{
    BgpRequest, BgpResponse, BgpStatus, Direction, FamilyStatus, PeerStatus, RestartStatus,
    RouteStatus, SessionState,
};

use super::State;
use super::neighbours::Running;
use crate::fsm;
use crate::rib::{PathStatus, PathView, PeerSlot};
use crate::session::Command;
use crate::wire::{Attributes, Capability, Family, Prefix, SegmentKind};

/// Most routes in one answer.
const ROUTES: usize = 100_000;
/// Destinations that are read from the table at once.
const PAGE: u32 = 1024;

const fn session_state(state: fsm::State) -> SessionState {
    match state {
        fsm::State::Idle => SessionState::Idle,
        fsm::State::Connect => SessionState::Connect,
        fsm::State::Active => SessionState::Active,
        fsm::State::OpenSent => SessionState::OpenSent,
        fsm::State::OpenConfirm => SessionState::OpenConfirm,
        fsm::State::Established => SessionState::Established,
    }
}

fn capability_name(capability: &Capability) -> String {
    match capability {
        Capability::Multiprotocol(family) => family.to_string(),
        Capability::RouteRefresh => "route-refresh".to_owned(),
        Capability::ExtendedNextHop(_) => "extended-next-hop".to_owned(),
        Capability::ExtendedMessage => "extended-message".to_owned(),
        Capability::GracefulRestart(gr) => format!("graceful-restart({}s)", gr.restart_time),
        Capability::FourOctetAs(_) => "four-octet-as".to_owned(),
        Capability::AddPath(_) => "add-path".to_owned(),
        Capability::EnhancedRouteRefresh => "enhanced-route-refresh".to_owned(),
        Capability::LongLivedGracefulRestart(_) => "long-lived-graceful-restart".to_owned(),
        Capability::Unknown { code, .. } => format!("unknown({code})"),
    }
}

pub(super) fn cidr(prefix: Prefix) -> Option<Cidr> {
    Cidr::new(prefix.addr(), prefix.len()).ok()
}

fn as_path(attributes: &Attributes) -> String {
    let segment = |s: crate::wire::Segment<'_>| {
        let numbers: Vec<String> = s.asns().map(|a| a.to_string()).collect();
        match s.kind {
            SegmentKind::Sequence | SegmentKind::ConfedSequence => numbers.join(" "),
            SegmentKind::Set | SegmentKind::ConfedSet => format!("{{{}}}", numbers.join(",")),
        }
    };
    attributes
        .as_path
        .segments()
        .map(segment)
        .collect::<Vec<_>>()
        .join(" ")
}

fn communities(attributes: &Attributes) -> Vec<String> {
    let standard = attributes.communities.iter().map(ToString::to_string);
    let large = attributes.large_communities.iter();
    let extended = attributes.ext_communities.iter();
    standard
        .chain(large.map(ToString::to_string))
        .chain(extended.map(ToString::to_string))
        .collect()
}

impl State {
    pub(super) fn answer(&mut self, request: BgpRequest) -> BgpResponse {
        match request {
            BgpRequest::Status => BgpResponse::Status(self.status()),
            BgpRequest::Routes { within } => BgpResponse::Routes(self.routes(|view| {
                within
                    .is_none_or(|outer| cidr(view.prefix).is_some_and(|c| outer.contains_cidr(&c)))
            })),
            BgpRequest::PeerRoutes { peer, direction } => self.peer_routes(peer, direction),
            BgpRequest::Explain { of } => BgpResponse::Explanation(self.explain(of)),
            BgpRequest::Mrt { cursor } => {
                let (records, next) = self.dump(cursor);
                BgpResponse::Mrt { records, next }
            }
            BgpRequest::Refresh { peer } => match self.neighbours.get(&peer) {
                Some(running) if running.live.is_some() => {
                    self.command(running, Command::Refresh);
                    BgpResponse::Done
                }
                Some(_) => {
                    BgpResponse::Error(format!("the session with {peer} is not established"))
                }
                None => no_peer(peer),
            },
            BgpRequest::Drain { message } => {
                self.drain(message.as_deref());
                BgpResponse::Done
            }
        }
    }

    fn status(&self) -> BgpStatus {
        let counts = self.rib.counts();
        let advertised = self.rib.advertised_counts();
        let peers: Vec<PeerStatus> = self
            .neighbours
            .iter()
            .map(|(address, n)| self.peer(*address, n, &advertised))
            .collect();
        let originated = |v4| {
            let own = self.settings.originated.keys();
            own.filter(|p| p.addr().is_ipv4() == v4).count() as u64
        };
        let notices = self.settings.host.notices.iter();
        BgpStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            router_id: self.settings.router_id,
            local_as: Asn(self.settings.local_as),
            started_at: self.started_at,
            configured_at: self.configured_at,
            prefixes_v4: counts.prefixes[0] as u64,
            prefixes_v6: counts.prefixes[1] as u64,
            restarting: !self.restarter.is_complete(),
            notices: notices
                .map(|n| format!("{}: {}", n.object, n.reason))
                .collect(),
            originated_v4: originated(true),
            originated_v6: originated(false),
            paths: peers.iter().map(|p| p.received).sum::<u64>()
                + self.settings.originated.len() as u64,
            attribute_sets: counts.attribute_sets as u64,
            update_groups: counts.groups as u64,
            peers,
        }
    }

    fn peer(&self, address: IpAddr, running: &Running, advertised: &[[u64; 2]]) -> PeerStatus {
        let session = &running.config.session;
        let live = running.live.as_ref();
        let negotiated = live.map(|l| &l.negotiated);
        let families = self.families(running, advertised);
        let sum = |count: fn(&FamilyStatus) -> u64| families.iter().map(count).sum();
        let capabilities = live.map(|l| l.capabilities.iter().map(capability_name).collect());
        let (messages_in, mut messages_out) = running.counters.read();
        messages_out.update = running.shown.updates_out;
        PeerStatus {
            address,
            port: session.port,
            name: running.config.name.clone(),
            kind: running.config.origin,
            remote_as: Asn(negotiated.map_or(session.remote_as.unwrap_or(0), |n| n.remote_as)),
            local_as: Asn(session.local_as),
            state: session_state(running.shown.state),
            since: running.shown.since,
            info: running.shown.info.clone(),
            graceful_restart: live.is_none() && !running.helper.stale().is_empty(),
            hold_time: negotiated.map_or(session.hold_time, |n| n.hold_time),
            capabilities: capabilities.unwrap_or_default(),
            received: sum(|f| f.received),
            accepted: sum(|f| f.accepted),
            advertised: sum(|f| f.advertised),
            updates_in: running.shown.updates_in,
            updates_out: running.shown.updates_out,
            established_count: running.shown.established_count,
            bfd: self.path_status(&address),
            local_address: live.map_or(session.source, |l| Some(l.local.ip().to_canonical())),
            router_id: negotiated.map(|n| n.remote_id),
            last_error: running.shown.last_error.clone(),
            last_down: running.shown.last_down.clone(),
            messages_in,
            messages_out,
            restart: restart(running),
            families,
            password: session.protection.password.is_some(),
            ttl_hops: session.protection.ttl_hops,
            reflector_client: running.config.exchange.reflector_client.is_some(),
        }
    }

    fn families(&self, running: &Running, advertised: &[[u64; 2]]) -> Vec<FamilyStatus> {
        let configured = running.config.session.families;
        let session = running.live.as_ref().map(|l| l.negotiated.codec.families);
        let wanted = session.unwrap_or(configured);
        let told = advertised
            .get(usize::from(running.slot.index()))
            .copied()
            .unwrap_or_default();
        let status = |(index, family): (usize, Family)| {
            let counts = self.rib.peer_counts(running.slot, family);
            let used = wanted.contains(family) || counts.received > 0;
            used.then(|| FamilyStatus {
                family: family_name(family).to_owned(),
                received: counts.received.into(),
                accepted: counts.accepted.into(),
                advertised: told[index],
            })
        };
        Family::SUPPORTED
            .into_iter()
            .enumerate()
            .filter_map(status)
            .collect()
    }

    fn routes(&self, wanted: impl Fn(&PathView<'_>) -> bool) -> Vec<RouteStatus> {
        let mut out = Vec::new();
        for family in Family::SUPPORTED {
            let mut from = Some(0);
            while let Some(start) = from
                && out.len() < ROUTES
            {
                let (views, next) = self.rib.page(family, start, PAGE);
                for paths in views.chunk_by(|a, b| a.prefix == b.prefix) {
                    out.extend(self.route_statuses(paths, &wanted));
                }
                from = next;
            }
        }
        out.truncate(ROUTES);
        out
    }

    /// The paths of one destination, of which some are wanted.
    pub(super) fn route_statuses(
        &self,
        paths: &[PathView<'_>],
        wanted: impl Fn(&PathView<'_>) -> bool,
    ) -> Vec<RouteStatus> {
        let Some(best) = paths.first() else {
            return Vec::new();
        };
        let chosen = paths.iter().filter(|v| wanted(v));
        chosen.filter_map(|v| self.route(v, best)).collect()
    }

    fn route(&self, view: &PathView<'_>, best: &PathView<'_>) -> Option<RouteStatus> {
        Some(RouteStatus {
            peer: self.slots.get(&view.peer).copied(),
            next_hop: view.next_hop.map(|nh| nh.global()),
            best: view.status == PathStatus::Best,
            multipath: view.status == PathStatus::Multipath,
            stale: view.stale,
            local: self.rib.local_origin(view),
            reason: self.why_not_used(view, best),
            ..describe(view.prefix, view.attributes)?
        })
    }

    fn peer_routes(&self, peer: IpAddr, direction: Direction) -> BgpResponse {
        let Some(running) = self.neighbours.get(&peer) else {
            return no_peer(peer);
        };
        BgpResponse::Routes(match direction {
            Direction::Received => self.routes(|v| v.peer == running.slot),
            Direction::Accepted => self
                .routes(|v| v.peer == running.slot && !matches!(v.status, PathStatus::Refused(_))),
            Direction::Advertised => self.advertised(running.slot),
            Direction::Withheld => self.withheld(running.slot),
        })
    }

    /// Selected routes that a peer is not told of.
    fn withheld(&self, slot: PeerSlot) -> Vec<RouteStatus> {
        let mut out = Vec::new();
        for family in Family::SUPPORTED {
            let mut from = Some(0);
            while let Some(start) = from
                && out.len() < ROUTES
            {
                let (routes, next) = self.rib.withheld(slot, family, start, PAGE);
                out.extend(routes.iter().filter_map(|withheld| {
                    let route = self.route(&withheld.path, &withheld.path)?;
                    Some(RouteStatus {
                        reason: Some(self.why_withheld(slot, withheld.reason)),
                        ..route
                    })
                }));
                from = next;
            }
        }
        out.truncate(ROUTES);
        out
    }

    fn advertised(&self, slot: PeerSlot) -> Vec<RouteStatus> {
        let mut out = Vec::new();
        for family in Family::SUPPORTED {
            for (nlri, attributes, next_hop) in self.rib.advertised(slot, family) {
                let next_hop = next_hop.map(|nh| nh.global());
                out.extend(
                    describe(nlri.prefix, attributes).map(|r| RouteStatus { next_hop, ..r }),
                );
            }
        }
        out.truncate(ROUTES);
        out
    }
}

fn describe(prefix: Prefix, attributes: &Attributes) -> Option<RouteStatus> {
    Some(RouteStatus {
        prefix: cidr(prefix)?,
        next_hop: None,
        peer: None,
        as_path: as_path(attributes),
        origin: format!("{:?}", attributes.origin).to_lowercase(),
        local_pref: attributes.local_pref,
        med: attributes.med,
        communities: communities(attributes),
        best: false,
        stale: false,
        multipath: false,
        local: None,
        reason: None,
    })
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::IPV4_UNICAST => "ipv4",
        _ => "ipv6",
    }
}

/// A peer whose routes are kept until it sends them again.
fn restart(running: &Running) -> Option<RestartStatus> {
    let stale = running.helper.stale();
    if stale.is_empty() {
        return None;
    }
    let left = running.next_timer().map(|at| {
        let left = at.saturating_duration_since(tokio::time::Instant::now());
        left.as_secs()
    });
    Some(RestartStatus {
        families: stale.iter().map(|f| family_name(f).to_owned()).collect(),
        seconds_left: left,
    })
}

fn no_peer(peer: IpAddr) -> BgpResponse {
    BgpResponse::Error(format!("there is no BGP peer {peer}"))
}
