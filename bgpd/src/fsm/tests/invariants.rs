//! What holds in every state that can be reached, whatever happens in it.

use std::collections::{BTreeSet, VecDeque};

use super::*;

fn every_event() -> Vec<Event> {
    let mut events = vec![
        Event::Start,
        Event::Stop(None),
        Event::Stop(Some(ceased(2))),
        Event::Reset(ceased(1)),
        Event::Reset(ceased(6)),
        Event::DialSucceeded,
        Event::DialFailed,
        Event::Accepted,
        Event::Timer(Timer::Dial),
        Event::Timer(Timer::Collision),
        Event::Timer(Timer::Settle),
    ];
    for r in Role::ALL {
        events.extend([
            Event::Closed(r),
            Event::SendStalled(r),
            Event::Open(r, facts(2)),
            Event::Open(r, facts(0)),
            Event::Open(r, facts(1)),
            Event::Keepalive(r),
            Event::Update(r),
            Event::Refresh(r),
            Event::Notification(r, notify(6, 2)),
            Event::Notification(r, notify(2, 2)),
            Event::Malformed(r, notify(3, 1)),
            Event::Timer(Timer::Hold(r)),
            Event::Timer(Timer::Keepalive(r)),
        ]);
    }
    events
}

/// What an edge would have after carrying the actions out.
#[derive(Clone, Default, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Edge {
    open: BTreeSet<Role>,
    dialing: bool,
    up: Option<Role>,
    timers: BTreeSet<Timer>,
}

impl Edge {
    fn carry_out(&mut self, event: &Event, actions: &[Action]) {
        match event {
            Event::DialSucceeded | Event::DialFailed => self.dialing = false,
            Event::Timer(t) => {
                self.timers.remove(t);
            }
            Event::Closed(_) => {}
            _ => {}
        }
        for action in actions {
            match action {
                Action::Dial => {
                    assert!(!self.dialing, "second dial");
                    self.dialing = true;
                }
                Action::CancelDial => {
                    assert!(self.dialing, "cancelled a dial that is not there");
                    self.dialing = false;
                }
                Action::SendOpen(r) => assert!(self.open.insert(*r), "OPEN on a connection in use"),
                Action::SendKeepalive(r) | Action::SendNotification(r, _) => {
                    assert!(self.open.contains(r), "sent on a closed connection")
                }
                Action::Close(r) => assert!(self.open.remove(r), "closed twice"),
                Action::Set(t, _) => {
                    self.timers.insert(*t);
                }
                Action::Cancel(t) => {
                    self.timers.remove(t);
                }
                Action::Up(r) => {
                    assert!(self.up.replace(*r).is_none(), "up twice");
                    assert!(self.open.contains(r));
                }
                Action::Down(_) => assert!(self.up.take().is_some(), "down without up"),
                Action::Take | Action::Refuse(_) => {}
            }
        }
    }
}

#[test]
fn invariants_hold_in_every_reachable_state_for_every_event() {
    let mut seen = BTreeSet::new();
    let mut queue = VecDeque::from([(Peer::new(settings()), Edge::default())]);
    let events = every_event();
    while let Some((peer, edge)) = queue.pop_front() {
        for event in &events {
            // An edge reports only what can happen to it.
            let possible = match event {
                Event::DialSucceeded | Event::DialFailed => edge.dialing,
                Event::Timer(t) => edge.timers.contains(t),
                Event::Closed(r)
                | Event::SendStalled(r)
                | Event::Open(r, _)
                | Event::Keepalive(r)
                | Event::Update(r)
                | Event::Refresh(r)
                | Event::Notification(r, _)
                | Event::Malformed(r, _) => edge.open.contains(r),
                _ => true,
            };
            if !possible {
                continue;
            }
            let (mut peer, mut edge) = (peer.clone(), edge.clone());
            let actions = peer.handle(event.clone());
            edge.carry_out(event, &actions);
            assert_eq!(peer.established(), edge.up, "{event:?}: {peer:?}");
            for role in &edge.open {
                let hold_off = actions.contains(&Action::Cancel(Timer::Hold(*role)));
                assert!(
                    edge.timers.contains(&Timer::Hold(*role)) || hold_off,
                    "no hold timer on {role:?} after {event:?}: {peer:?}"
                );
            }
            if peer.state() != State::Idle && edge.open.is_empty() {
                assert!(
                    edge.timers.contains(&Timer::Dial),
                    "stuck after {event:?}: {peer:?}"
                );
            }
            if seen.insert(format!("{peer:?} {edge:?}")) {
                queue.push_back((peer, edge));
            }
        }
    }
    assert!(seen.len() > 50, "only {} states reached", seen.len());
}
