//! What follows from each event in each state, and the checks of a peer's OPEN.

use super::*;
use crate::wire::cease;

/// For each state, the one that follows and the NOTIFICATION that is sent.
type Row = [(State, Option<(u8, u8)>); 6];

#[test]
fn table_of_states_and_events() {
    use State::{Active, Connect, Established, Idle, OpenConfirm, OpenSent};
    let d = Role::Dialed;
    // For each event: the state that follows from each state, and the NOTIFICATION that is sent, if any.
    let table: Vec<(Event, Row)> = vec![
        (
            Event::Start,
            [
                (Active, None),
                (Connect, None),
                (Active, None),
                (OpenSent, None),
                (OpenConfirm, None),
                (Established, None),
            ],
        ),
        (Event::Stop(None), [(Idle, None); 6]),
        (
            Event::Stop(Some(ceased(2))),
            [
                (Idle, None),
                (Idle, None),
                (Idle, None),
                (Idle, Some((6, 2))),
                (Idle, Some((6, 2))),
                (Idle, Some((6, 2))),
            ],
        ),
        (
            Event::Reset(ceased(6)),
            [
                (Idle, None),
                (Active, None),
                (Active, None),
                (Active, Some((6, 6))),
                (Active, Some((6, 6))),
                (Active, Some((6, 6))),
            ],
        ),
        (
            Event::DialSucceeded,
            [
                (Idle, None),
                (OpenSent, None),
                (Active, None),
                (OpenSent, None),
                (OpenConfirm, None),
                (Established, None),
            ],
        ),
        (
            Event::DialFailed,
            [
                (Idle, None),
                (Active, None),
                (Active, None),
                (OpenSent, None),
                (OpenConfirm, None),
                (Established, None),
            ],
        ),
        (
            Event::Closed(d),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Active, None),
                (Active, None),
                (Active, None),
            ],
        ),
        (
            Event::Open(d, facts(2)),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (OpenConfirm, None),
                (Idle, Some((5, 2))),
                (Idle, Some((5, 3))),
            ],
        ),
        (
            Event::Keepalive(d),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Idle, Some((5, 1))),
                (Established, None),
                (Established, None),
            ],
        ),
        (
            Event::Update(d),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Idle, Some((5, 1))),
                (Idle, Some((5, 2))),
                (Established, None),
            ],
        ),
        (
            Event::Refresh(d),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Idle, Some((5, 1))),
                (Idle, Some((5, 2))),
                (Established, None),
            ],
        ),
        (
            Event::Notification(d, notify(6, 4)),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Active, None),
                (Active, None),
                (Active, None),
            ],
        ),
        (
            Event::Malformed(d, notify(1, 2)),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Idle, Some((1, 2))),
                (Idle, Some((1, 2))),
                (Idle, Some((1, 2))),
            ],
        ),
        (
            Event::Timer(Timer::Dial),
            [
                (Idle, None),
                (Connect, None),
                (Connect, None),
                (OpenSent, None),
                (OpenConfirm, None),
                (Established, None),
            ],
        ),
        (
            Event::Timer(Timer::Hold(d)),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Active, Some((4, 0))),
                (Active, Some((4, 0))),
                (Active, Some((4, 0))),
            ],
        ),
        (
            Event::Timer(Timer::Keepalive(d)),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (OpenSent, None),
                (OpenConfirm, None),
                (Established, None),
            ],
        ),
        (
            Event::SendStalled(d),
            [
                (Idle, None),
                (Connect, None),
                (Active, None),
                (Active, Some((8, 0))),
                (Active, Some((8, 0))),
                (Active, Some((8, 0))),
            ],
        ),
    ];
    for (event, row) in table {
        for (from, (to, notification)) in
            [Idle, Connect, Active, OpenSent, OpenConfirm, Established]
                .into_iter()
                .zip(row)
        {
            let mut peer = in_state(from);
            let actions = peer.handle(event.clone());
            assert_eq!(
                (peer.state(), sent(&actions)),
                (to, notification),
                "{event:?} in {from:?}: {actions:?}"
            );
        }
    }
}

#[test]
fn refuses_a_bad_open_with_the_subcode_of_its_fault() {
    let cases = [
        (OpenFacts { asn: 1, ..facts(2) }, (2, 2)),
        (OpenFacts { asn: 0, ..facts(2) }, (2, 2)),
        (
            OpenFacts {
                id: Ipv4Addr::UNSPECIFIED,
                ..facts(2)
            },
            (2, 3),
        ),
        (facts(1), (2, 3)),
        (
            OpenFacts {
                hold_time: 1,
                ..facts(2)
            },
            (2, 6),
        ),
        (
            OpenFacts {
                hold_time: 2,
                ..facts(2)
            },
            (2, 6),
        ),
    ];
    for (open, expected) in cases {
        let mut peer = in_state(State::OpenSent);
        let actions = peer.handle(Event::Open(Role::Dialed, open));
        assert_eq!(sent(&actions), Some(expected), "{open:?}");
        assert_eq!(
            peer.handle(Event::Accepted),
            [Action::Refuse(ceased(cease::CONNECTION_REJECTED))]
        );
    }
}

#[test]
fn equal_identifier_with_other_as_is_accepted() {
    let mut peer = Peer::new(Settings {
        remote_as: Some(65000),
        ..settings()
    });
    let open = OpenFacts {
        asn: 65000,
        ..facts(1)
    };
    run(
        &mut peer,
        &[
            Event::Start,
            Event::Timer(Timer::Dial),
            Event::DialSucceeded,
            Event::Open(Role::Dialed, open),
        ],
    );
    assert_eq!(peer.state(), State::OpenConfirm);
}

#[test]
fn hold_time_is_the_smaller_and_zero_turns_timers_off() {
    let mut peer = in_state(State::Established);
    assert_eq!(peer.hold_time(), Some(90));
    let refresh = peer.handle(Event::Keepalive(Role::Dialed));
    let wait = Wait {
        duration: Duration::from_secs(90),
        jitter: Jitter::None,
    };
    assert_eq!(refresh, [Action::Set(Timer::Hold(Role::Dialed), wait)]);

    let mut peer = in_state(State::OpenSent);
    let open = OpenFacts {
        hold_time: 0,
        ..facts(2)
    };
    let actions = peer.handle(Event::Open(Role::Dialed, open));
    assert!(
        !actions
            .iter()
            .any(|a| matches!(a, Action::Set(Timer::Hold(_) | Timer::Keepalive(_), _))),
        "{actions:?}"
    );
    assert!(
        actions.contains(&Action::Cancel(Timer::Hold(Role::Dialed))),
        "{actions:?}"
    );
}

#[test]
fn passive_peer_never_dials() {
    let mut peer = Peer::new(Settings {
        passive: true,
        ..settings()
    });
    let mut seen = Vec::new();
    for event in [
        Event::Start,
        Event::Timer(Timer::Dial),
        Event::Accepted,
        Event::Open(Role::Accepted, facts(2)),
        Event::Keepalive(Role::Accepted),
        Event::Closed(Role::Accepted),
        Event::Timer(Timer::Dial),
    ] {
        seen.extend(peer.handle(event));
    }
    assert!(!seen.contains(&Action::Dial), "{seen:?}");
    assert!(seen.contains(&Action::Up(Role::Accepted)), "{seen:?}");
}

#[test]
fn error_waits_double_to_their_maximum() {
    let mut peer = started();
    let mut waits = Vec::new();
    for _ in 0..5 {
        let actions = run(
            &mut peer,
            &[
                Event::Timer(Timer::Dial),
                Event::DialSucceeded,
                Event::Malformed(Role::Dialed, notify(1, 2)),
            ],
        );
        waits.extend(actions.iter().filter_map(|a| match a {
            Action::Set(Timer::Dial, wait) => Some(wait.duration.as_secs()),
            _ => None,
        }));
    }
    assert_eq!(waits, [5, 10, 20, 30, 30]);
}

#[test]
fn silent_stop_sends_nothing() {
    let mut peer = in_state(State::Established);
    let actions = peer.handle(Event::Stop(None));
    assert_eq!(sent(&actions), None);
    assert!(actions.contains(&Action::Down(DownCause::Stopped)));
}
