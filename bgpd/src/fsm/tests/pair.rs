//! Two machines and a network between them that delivers in any order.
//!
//! A connection is a thing of its own: what was sent on an earlier one of the same direction can neither reach a later
//! one nor be lost with it. A dial that succeeds on one end may be heard of by the other much later, and a dial that is
//! given up may have reached it.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

/// What travels on a connection.
#[derive(Debug, Clone)]
enum Message {
    Open,
    Keepalive,
    Notification(Notification),
    Fin,
}

/// One connection, from the moment that its SYN was answered.
#[derive(Debug, Default)]
struct Wire {
    /// In flight to the end that dialled, and to the one that was dialled.
    queues: [VecDeque<Message>; 2],
    /// The other end's listener has handed it to its machine.
    accepted: bool,
}

/// A dial of one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dial {
    None,
    /// The SYN is on its way.
    Sent,
    /// Answered; the machine does not know yet.
    Answered(usize),
}

/// Something that can happen next.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// An end's SYN is answered.
    Answer(usize),
    /// An end hears that its dial succeeded.
    Hear(usize),
    /// An end's listener hands over a connection.
    Accept(usize, usize),
    /// An end takes a message of one of its connections.
    Deliver(usize, Role),
    /// An end's timer runs out.
    Run(usize, Timer),
}

/// Two machines and the connections between them.
struct Net {
    peers: [Peer; 2],
    wires: Vec<Wire>,
    /// For each end and role: the number of the connection.
    uses: [[Option<usize>; 2]; 2],
    dials: [Dial; 2],
    /// For each end: connections that its listener has and its machine does not know.
    backlog: [VecDeque<usize>; 2],
    timers: [BTreeSet<Timer>; 2],
    /// Connection that the listener hands over in this event.
    fresh: Option<usize>,
    history: Vec<String>,
    /// Established sessions that ended, and protocol errors.
    faults: Vec<String>,
}

impl Net {
    fn new(ids: [u8; 2]) -> Self {
        let peers = ids.map(|n| Peer::new(Settings::new(64512, id(n), Some(64512))));
        let mut net = Self {
            peers,
            wires: Vec::new(),
            uses: [[None; 2]; 2],
            dials: [Dial::None; 2],
            backlog: [VecDeque::new(), VecDeque::new()],
            timers: [BTreeSet::new(), BTreeSet::new()],
            fresh: None,
            history: Vec::new(),
            faults: Vec::new(),
        };
        net.event(0, Event::Start);
        net.event(1, Event::Start);
        net
    }

    fn send(&mut self, end: usize, role: Role, message: Message) {
        let wire = self.uses[end][role.index()].expect("sent on a connection in use");
        // Of the queues, the dialling end's is the first: what we dialled is the other's second.
        self.wires[wire].queues[role.other().index()].push_back(message);
    }

    fn close(&mut self, end: usize, role: Role) {
        self.send(end, role, Message::Fin);
        let wire = self.uses[end][role.index()].take().expect("in use");
        self.wires[wire].queues[role.index()].clear();
    }

    fn event(&mut self, end: usize, event: Event) {
        let actions = self.peers[end].handle(event.clone());
        self.history
            .push(format!("{end}: {event:?} -> {actions:?}"));
        let mut dialed = match (&event, self.dials[end]) {
            (Event::DialSucceeded, Dial::Answered(wire)) => {
                self.dials[end] = Dial::None;
                Some(wire)
            }
            _ => None,
        };
        for action in actions {
            match action {
                Action::Dial => self.dials[end] = Dial::Sent,
                Action::CancelDial => {
                    // What was answered already is there for the other end, and ends at once.
                    if let Dial::Answered(wire) = self.dials[end] {
                        self.wires[wire].queues[1].push_back(Message::Fin);
                    }
                    self.dials[end] = Dial::None;
                }
                Action::Set(timer, _) => {
                    self.timers[end].insert(timer);
                }
                Action::Cancel(timer) => {
                    self.timers[end].remove(&timer);
                }
                Action::Refuse(notification) => {
                    let wire = self.fresh.take().expect("a connection to refuse");
                    let queue = &mut self.wires[wire].queues[0];
                    queue.extend([Message::Notification(notification), Message::Fin]);
                }
                Action::Take => {
                    self.uses[end][Role::Accepted.index()] = self.fresh.take();
                }
                Action::SendOpen(role) => {
                    if role == Role::Dialed {
                        self.uses[end][role.index()] = dialed.take();
                    }
                    self.send(end, role, Message::Open);
                }
                Action::SendKeepalive(role) => self.send(end, role, Message::Keepalive),
                Action::SendNotification(role, notification) => {
                    if notification.code != 6 {
                        self.faults.push(format!("{end} sent {notification}"));
                    }
                    self.send(end, role, Message::Notification(notification));
                }
                Action::Close(role) => self.close(end, role),
                Action::Up(_) => {}
                Action::Down(cause) => self
                    .faults
                    .push(format!("{end} lost its session: {cause:?}")),
            }
        }
        if let Some(wire) = dialed {
            self.wires[wire].queues[1].push_back(Message::Fin);
        }
    }

    fn steps(&self, timers: bool) -> Vec<Step> {
        let mut steps = Vec::new();
        for end in 0..2 {
            match self.dials[end] {
                Dial::None => {}
                Dial::Sent => steps.push(Step::Answer(end)),
                Dial::Answered(_) => steps.push(Step::Hear(end)),
            }
            steps.extend(
                self.backlog[end]
                    .front()
                    .map(|wire| Step::Accept(end, *wire)),
            );
            for role in Role::ALL {
                let wire = self.uses[end][role.index()].map(|wire| &self.wires[wire]);
                if wire.is_some_and(|wire| !wire.queues[role.index()].is_empty()) {
                    steps.push(Step::Deliver(end, role));
                }
            }
            if timers {
                // The other timers are much longer than all that can be on its way.
                let due = self.timers[end].iter();
                let due = due.filter(|t| matches!(t, Timer::Dial | Timer::Collision));
                steps.extend(due.map(|timer| Step::Run(end, *timer)));
            }
        }
        steps
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Answer(end) => {
                self.wires.push(Wire::default());
                let wire = self.wires.len() - 1;
                self.dials[end] = Dial::Answered(wire);
                self.backlog[1 - end].push_back(wire);
            }
            Step::Hear(end) => self.event(end, Event::DialSucceeded),
            Step::Accept(end, wire) => {
                self.backlog[end].pop_front();
                self.wires[wire].accepted = true;
                self.fresh = Some(wire);
                self.event(end, Event::Accepted);
                assert!(self.fresh.is_none(), "neither taken nor refused");
            }
            Step::Deliver(end, role) => {
                let wire = self.uses[end][role.index()].expect("in use");
                let message = self.wires[wire].queues[role.index()].pop_front();
                let event = match message.expect("not empty") {
                    Message::Open => Event::Open(role, facts_of(&self.peers[1 - end])),
                    Message::Keepalive => Event::Keepalive(role),
                    Message::Notification(n) => Event::Notification(role, n),
                    Message::Fin => Event::Closed(role),
                };
                self.event(end, event);
            }
            Step::Run(end, timer) => {
                self.timers[end].remove(&timer);
                self.event(end, Event::Timer(timer));
            }
        }
    }

    /// From here on the network is quiet: everything in flight is delivered, timers fire only when nothing else can.
    fn settle(&mut self) {
        for _ in 0..400 {
            let steps = self.steps(false);
            let Some(step) = steps.first().or(self.steps(true).first()).copied() else {
                return;
            };
            self.take(step);
        }
    }

    fn assert_one_session(&self) {
        let ends = [0, 1].map(|end| self.peers[end].established());
        assert!(
            ends[0].is_some() && ends[0].map(Role::other) == ends[1],
            "{ends:?}\n{}",
            self.history.join("\n")
        );
    }
}

fn facts_of(peer: &Peer) -> OpenFacts {
    OpenFacts {
        id: peer.settings().local_id,
        ..facts(0)
    }
}

fn history(ids: [u8; 2], choices: &[usize], timers: fn(&Step) -> bool) -> Net {
    let mut net = Net::new(ids);
    for choice in choices {
        let mut steps = net.steps(true);
        steps.retain(|step| !matches!(step, Step::Run(..)) || timers(step));
        if !steps.is_empty() {
            net.take(steps[choice % steps.len()]);
        }
    }
    net.settle();
    net
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn two_speakers_that_dial_each_other_end_with_one_session(
        choices in proptest::collection::vec(0_usize..64, 0..80),
        ids in prop_oneof![Just([1, 2]), Just([2, 1])],
    ) {
        let net = history(ids, &choices, |_| true);
        net.assert_one_session();
        // However late messages are, they are never taken for an error of the protocol.
        let errors: Vec<_> = net.faults.iter().filter(|f| f.contains("sent")).collect();
        prop_assert!(errors.is_empty(), "{errors:?}\n{}", net.history.join("\n"));
    }

    #[test]
    fn no_established_session_is_lost_to_a_collision(
        choices in proptest::collection::vec(0_usize..64, 0..80),
        ids in prop_oneof![Just([1, 2]), Just([2, 1])],
    ) {
        // Nothing is so late that a wait for it ends.
        let net = history(ids, &choices, |step| !matches!(step, Step::Run(_, Timer::Collision)));
        net.assert_one_session();
        prop_assert!(net.faults.is_empty(), "{:?}\n{}", net.faults, net.history.join("\n"));
    }
}

/// Both ends dial. The second dial is answered before the first connection is confirmed, and heard of after it: once, the
/// one end closed the first connection in favour of the second, the other the second in favour of the first.
#[test]
fn a_dial_that_succeeds_beside_a_confirmed_connection_costs_no_session() {
    let mut net = Net::new([1, 2]);
    for step in [
        Step::Run(0, Timer::Dial),
        Step::Answer(0),
        Step::Hear(0),
        Step::Accept(1, 0),
        Step::Run(1, Timer::Dial),
        Step::Answer(1),
        // Both OPENs.
        Step::Deliver(0, Role::Dialed),
        Step::Deliver(1, Role::Accepted),
        Step::Accept(0, 1),
        // Both KEEPALIVEs.
        Step::Deliver(1, Role::Accepted),
        Step::Deliver(0, Role::Dialed),
    ] {
        net.take(step);
    }
    net.settle();
    net.assert_one_session();
    assert_eq!(net.peers[0].established(), Some(Role::Dialed));
    assert!(net.faults.is_empty(), "{:?}", net.faults);
}
