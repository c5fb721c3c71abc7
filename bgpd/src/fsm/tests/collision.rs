//! Which of two connections stays: collisions (RFC 4271 §6.8), and peers that come back after a restart.

use super::*;
use crate::wire::cease;

#[test]
fn collision_keeps_the_connection_of_the_greater_identifier_in_either_order() {
    for (remote, winner) in [(9, Role::Accepted), (0, Role::Dialed)] {
        for first in Role::ALL {
            let remote = OpenFacts {
                id: Ipv4Addr::new(10, 0, remote, 1),
                ..facts(1)
            };
            let remote = if winner == Role::Dialed {
                OpenFacts {
                    id: Ipv4Addr::new(9, 0, 0, 1),
                    ..remote
                }
            } else {
                remote
            };
            let mut peer = started();
            run(
                &mut peer,
                &[
                    Event::Timer(Timer::Dial),
                    Event::DialSucceeded,
                    Event::Accepted,
                ],
            );
            let _ = peer.handle(Event::Open(first, remote));
            let _ = peer.handle(Event::Open(first.other(), remote));
            let actions = peer.handle(Event::Keepalive(winner));
            assert!(
                actions.contains(&Action::Up(winner)),
                "first {first:?}, winner {winner:?}: {actions:?}"
            );
        }
    }
}

#[test]
fn established_wins_a_fresh_collision() {
    let mut peer = in_state(State::Established);
    assert_eq!(
        peer.handle(Event::Accepted),
        [Action::Refuse(ceased(cease::COLLISION))]
    );
    assert_eq!(peer.state(), State::Established);
}

#[test]
fn restarting_peer_replaces_its_settled_session_without_a_notification() {
    let mut peer = in_state(State::Established);
    let _ = peer.handle(Event::Timer(Timer::Settle));
    let actions = peer.handle(Event::Accepted);
    assert!(
        actions.contains(&Action::Down(DownCause::Replaced)),
        "{actions:?}"
    );
    assert_eq!(sent(&actions), None);
    assert!(actions.contains(&Action::Take), "{actions:?}");
    run(
        &mut peer,
        &[
            Event::Open(Role::Accepted, facts(2)),
            Event::Keepalive(Role::Accepted),
        ],
    );
    assert_eq!(peer.established(), Some(Role::Accepted));
}

#[test]
fn without_graceful_restart_a_settled_session_is_not_replaced() {
    let mut peer = in_state(State::OpenSent);
    let open = OpenFacts {
        graceful_restart: false,
        ..facts(2)
    };
    run(
        &mut peer,
        &[
            Event::Open(Role::Dialed, open),
            Event::Keepalive(Role::Dialed),
            Event::Timer(Timer::Settle),
        ],
    );
    assert_eq!(
        peer.handle(Event::Accepted),
        [Action::Refuse(ceased(cease::COLLISION))]
    );
}

/// A peer with a greater identifier: the connection that it dials is the one to keep.
fn greater() -> OpenFacts {
    facts(9)
}

/// Both connections reached the transport; neither OPEN is here.
fn both_open() -> Peer {
    let mut peer = started();
    run(
        &mut peer,
        &[
            Event::Timer(Timer::Dial),
            Event::DialSucceeded,
            Event::Accepted,
        ],
    );
    peer
}

#[test]
fn the_loser_is_not_confirmed_before_the_winner_has_proved_itself() {
    let mut peer = both_open();
    let actions = peer.handle(Event::Open(Role::Dialed, greater()));
    assert!(
        matches!(actions[..], [Action::Set(Timer::Collision, _)]),
        "{actions:?}"
    );
    let actions = peer.handle(Event::Open(Role::Accepted, greater()));
    assert_eq!(sent(&actions), Some((6, cease::COLLISION)));
    assert!(actions.contains(&Action::Close(Role::Dialed)));
    assert!(actions.contains(&Action::SendKeepalive(Role::Accepted)));
}

/// FRR and OpenBGPD close every connection beside one that they have taken.
#[test]
fn a_winner_that_the_peer_closes_leaves_the_loser_without_an_error() {
    for confirmed in [false, true] {
        let mut peer = both_open();
        let _ = peer.handle(Event::Open(Role::Dialed, greater()));
        if confirmed {
            assert_eq!(peer.handle(Event::Keepalive(Role::Dialed)), []);
        }
        let actions = peer.handle(Event::Closed(Role::Accepted));
        assert!(
            actions.contains(&Action::SendKeepalive(Role::Dialed)),
            "{actions:?}"
        );
        assert_eq!(sent(&actions), None);
        if !confirmed {
            assert_eq!(peer.state(), State::OpenConfirm);
            let _ = peer.handle(Event::Keepalive(Role::Dialed));
        }
        assert_eq!(peer.established(), Some(Role::Dialed));
    }
}

#[test]
fn a_winner_that_stays_silent_is_given_up() {
    let mut peer = both_open();
    let _ = peer.handle(Event::Open(Role::Dialed, greater()));
    let actions = peer.handle(Event::Timer(Timer::Collision));
    assert_eq!(sent(&actions), Some((6, cease::COLLISION)));
    assert_eq!(peer.state(), State::OpenConfirm);
    let _ = peer.handle(Event::Keepalive(Role::Dialed));
    assert_eq!(peer.established(), Some(Role::Dialed));
}

/// The peer has taken the confirmed connection as Established, or is about to: it decides.
#[test]
fn a_confirmed_loser_stands_when_the_peer_confirms_it() {
    let confirmed = || {
        let mut peer = started();
        run(
            &mut peer,
            &[
                Event::Timer(Timer::Dial),
                Event::DialSucceeded,
                Event::Open(Role::Dialed, greater()),
                Event::Accepted,
                Event::Open(Role::Accepted, greater()),
            ],
        );
        peer
    };
    let mut peer = confirmed();
    let actions = peer.handle(Event::Keepalive(Role::Dialed));
    assert!(actions.contains(&Action::Up(Role::Dialed)), "{actions:?}");
    assert!(actions.contains(&Action::Close(Role::Accepted)));

    let mut peer = confirmed();
    let closed = Event::Notification(Role::Dialed, ceased(cease::COLLISION));
    let actions = peer.handle(closed);
    assert!(
        actions.contains(&Action::SendKeepalive(Role::Accepted)),
        "{actions:?}"
    );
}

#[test]
fn a_confirmed_connection_ends_the_dial_under_way() {
    let mut peer = started();
    let actions = run(
        &mut peer,
        &[
            Event::Timer(Timer::Dial),
            Event::Accepted,
            Event::Open(Role::Accepted, greater()),
        ],
    );
    assert!(actions.contains(&Action::CancelDial), "{actions:?}");
}
