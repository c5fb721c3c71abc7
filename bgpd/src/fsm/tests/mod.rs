//! The machine against its table, its invariants in every reachable state, and two machines against each other.

mod collision;
mod invariants;
mod pair;
mod table;

use std::net::Ipv4Addr;

use super::*;
use crate::wire::Notification;

fn notify(code: u8, subcode: u8) -> Notification {
    Notification {
        code,
        subcode,
        data: bytes::Bytes::new(),
    }
}

fn ceased(subcode: u8) -> Notification {
    notify(6, subcode)
}

fn id(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, last)
}

fn settings() -> Settings {
    Settings::new(64512, id(1), Some(64512))
}

fn facts(last: u8) -> OpenFacts {
    OpenFacts {
        asn: 64512,
        id: id(last),
        hold_time: 90,
        graceful_restart: true,
    }
}

/// Runs events and returns the actions of the last one.
fn run(peer: &mut Peer, events: &[Event]) -> Vec<Action> {
    let mut last = Vec::new();
    for event in events {
        last = peer.handle(event.clone());
    }
    last
}

fn started() -> Peer {
    let mut peer = Peer::new(settings());
    let _ = peer.handle(Event::Start);
    peer
}

const TO_ESTABLISHED: [fn() -> Event; 4] = [
    || Event::Timer(Timer::Dial),
    || Event::DialSucceeded,
    || Event::Open(Role::Dialed, facts(2)),
    || Event::Keepalive(Role::Dialed),
];

fn in_state(state: State) -> Peer {
    let mut peer = Peer::new(settings());
    if state == State::Idle {
        return peer;
    }
    let _ = peer.handle(Event::Start);
    let steps = match state {
        State::Idle | State::Active => 0,
        State::Connect => 1,
        State::OpenSent => 2,
        State::OpenConfirm => 3,
        State::Established => 4,
    };
    for step in &TO_ESTABLISHED[..steps] {
        let _ = peer.handle(step());
    }
    assert_eq!(peer.state(), state);
    peer
}

fn sent(actions: &[Action]) -> Option<(u8, u8)> {
    actions.iter().find_map(|a| match a {
        Action::SendNotification(_, n) => Some((n.code, n.subcode)),
        _ => None,
    })
}
