//! Answers for the status socket.

use std::net::IpAddr;

use cali_api::{Asn, Cidr};
use cali_control::status::{
    BgpRequest, BgpResponse, BgpStatus, Direction, PeerStatus, RouteStatus, SessionState,
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

fn cidr(prefix: Prefix) -> Option<Cidr> {
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

fn reason(status: PathStatus) -> Option<String> {
    match status {
        PathStatus::Best | PathStatus::Multipath => None,
        PathStatus::NotBest(step) => Some(format!("another path is better: {step:?}")),
        PathStatus::NextHopUnreachable => Some("its next hop cannot be reached".to_owned()),
        PathStatus::Refused(refusal) => Some(format!("refused: {refusal:?}")),
    }
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
        BgpStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            router_id: self.settings.router_id,
            local_as: Asn(self.settings.local_as),
            started_at: self.started_at,
            configured_at: self.configured_at,
            peers: self
                .neighbours
                .iter()
                .map(|(address, n)| self.peer(*address, n))
                .collect(),
            prefixes_v4: counts.prefixes[0] as u64,
            prefixes_v6: counts.prefixes[1] as u64,
            restarting: !self.restarter.is_complete(),
        }
    }

    fn peer(&self, address: IpAddr, running: &Running) -> PeerStatus {
        let session = &running.config.session;
        let negotiated = running.live.as_ref().map(|l| &l.negotiated);
        let counts = Family::SUPPORTED.map(|f| self.rib.peer_counts(running.slot, f));
        let advertised =
            Family::SUPPORTED.map(|f| self.rib.advertised(running.slot, f).len() as u64);
        let capabilities = running
            .live
            .as_ref()
            .map(|l| l.capabilities.iter().map(capability_name).collect());
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
            graceful_restart: running.live.is_none() && !running.helper.stale().is_empty(),
            hold_time: negotiated.map_or(session.hold_time, |n| n.hold_time),
            capabilities: capabilities.unwrap_or_default(),
            received: counts.iter().map(|c| u64::from(c.received)).sum(),
            accepted: counts.iter().map(|c| u64::from(c.accepted)).sum(),
            advertised: advertised.iter().sum(),
            updates_in: running.shown.updates_in,
            updates_out: running.shown.updates_out,
            established_count: running.shown.established_count,
            bfd: self.path_status(&address),
        }
    }

    fn routes(&self, wanted: impl Fn(&PathView<'_>) -> bool) -> Vec<RouteStatus> {
        let mut out = Vec::new();
        for family in Family::SUPPORTED {
            let mut from = Some(0);
            while let Some(start) = from
                && out.len() < ROUTES
            {
                let (views, next) = self.rib.page(family, start, PAGE);
                out.extend(
                    views
                        .iter()
                        .filter(|v| wanted(v))
                        .filter_map(|v| self.route(v)),
                );
                from = next;
            }
        }
        out.truncate(ROUTES);
        out
    }

    fn route(&self, view: &PathView<'_>) -> Option<RouteStatus> {
        Some(RouteStatus {
            peer: self.slots.get(&view.peer).copied(),
            next_hop: view.next_hop.map(|nh| nh.global()),
            best: view.status == PathStatus::Best,
            stale: view.stale,
            reason: reason(view.status),
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
        })
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
        reason: None,
    })
}

fn no_peer(peer: IpAddr) -> BgpResponse {
    BgpResponse::Error(format!("there is no BGP peer {peer}"))
}
