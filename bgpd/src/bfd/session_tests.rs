use super::super::Hops;
use super::*;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Two sessions on virtual time, joined by a line that can be cut.
struct Pair {
    now: Instant,
    ends: [Session; 2],
    cut: bool,
    changes: [Vec<Change>; 2],
    sent: [Vec<(Instant, Packet)>; 2],
}

impl Pair {
    fn new(settings: [Settings; 2]) -> Self {
        let now = Instant::now();
        let [a, b] = settings;
        Self {
            now,
            ends: [Session::new(a, 11, now), Session::new(b, 22, now)],
            cut: false,
            changes: Default::default(),
            sent: Default::default(),
        }
    }

    fn carry(&mut self, from: usize, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Changed(change) => self.changes[from].push(change),
                Output::Send(packet) => {
                    self.sent[from].push((self.now, packet));
                    if !self.cut {
                        let packet = Packet::decode(&packet.encode()).expect("a good packet");
                        let answer = self.ends[1 - from].on_packet(&packet, self.now, 0.5);
                        self.carry(1 - from, answer);
                    }
                }
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let next = |s: &Session| s.next_timer();
            let Some(at) = self
                .ends
                .iter()
                .filter_map(next)
                .min()
                .filter(|at| *at <= end)
            else {
                break;
            };
            self.now = self.now.max(at);
            for n in 0..2 {
                if self.ends[n].next_timer().is_some_and(|at| at <= self.now) {
                    let outputs = self.ends[n].on_timer(self.now, 0.5);
                    self.carry(n, outputs);
                }
            }
        }
        self.now = end;
    }

    fn states(&self) -> [State; 2] {
        [self.ends[0].state(), self.ends[1].state()]
    }
}

fn default() -> Settings {
    Settings::new(Hops::Single)
}

fn up() -> Pair {
    let mut pair = Pair::new([default(), default()]);
    pair.run(ms(3000));
    assert_eq!(pair.states(), [State::Up, State::Up]);
    pair
}

#[test]
fn both_come_up_and_agree_on_the_configured_intervals() {
    let pair = up();
    for end in &pair.ends {
        assert!(!end.polling, "the poll was answered");
        assert_eq!(end.transmit_interval(), ms(300));
        assert_eq!(end.detection_time(), ms(900));
    }
}

#[test]
fn silence_for_the_detection_time_is_down_and_not_before() {
    let mut pair = up();
    let heard = pair.sent.iter().flatten().map(|(at, _)| *at).max().unwrap();
    pair.cut = true;
    pair.run(ms(899) - (pair.now - heard).min(ms(899)));
    assert!(pair.states().contains(&State::Up), "{:?}", pair.states());
    pair.run(ms(900));
    assert_eq!(pair.states(), [State::Down, State::Down]);
    let change = pair.changes[0].last().unwrap();
    assert_eq!(
        (change.from, change.diagnostic, change.on_purpose),
        (State::Up, Diagnostic::TimeExpired, false)
    );
}

#[test]
fn a_path_that_heals_comes_up_again() {
    let mut pair = up();
    pair.cut = true;
    pair.run(ms(2000));
    pair.cut = false;
    pair.run(ms(3000));
    assert_eq!(pair.states(), [State::Up, State::Up]);
}

#[test]
fn a_planned_restart_is_no_failure_for_the_neighbour() {
    let mut pair = up();
    let outputs = pair.ends[0].shut_down(pair.now, 0.5);
    pair.carry(0, outputs);
    assert_eq!(pair.states(), [State::AdminDown, State::Down]);
    let change = pair.changes[1].last().unwrap();
    assert!(change.on_purpose, "{change:?}");
    pair.run(ms(5000));
    assert_eq!(pair.states(), [State::AdminDown, State::Down]);
}

#[test]
fn a_neighbour_that_says_down_takes_us_down_as_a_failure() {
    let mut pair = up();
    // The neighbour crashed and began anew, with another discriminator.
    pair.ends[1] = Session::new(default(), 33, pair.now);
    let outputs = pair.ends[1].on_timer(pair.now, 0.5);
    pair.carry(1, outputs);
    let down = pair.changes[0]
        .iter()
        .rev()
        .find(|c| c.to == State::Down)
        .unwrap();
    assert_eq!(
        (down.diagnostic, down.on_purpose),
        (Diagnostic::NeighbourDown, false)
    );
    pair.run(ms(3000));
    assert_eq!(pair.states(), [State::Up, State::Up]);
}

#[test]
fn outside_of_up_at_most_one_packet_a_second_is_sent() {
    let mut pair = Pair::new([default(), default()]);
    pair.cut = true;
    pair.run(ms(10_000));
    // Sent at 0 s, then every 0.875 s (jitter 0.5).
    assert_eq!(pair.sent[0].len(), 12, "{:?}", pair.sent[0]);
    assert!(pair.sent[0].iter().all(|(_, p)| p.desired_tx == ms(1000)));
}

#[test]
fn the_slower_of_both_wishes_counts() {
    let mut slow = default();
    slow.receive = ms(700);
    slow.transmit = ms(500);
    let mut pair = Pair::new([default(), slow]);
    pair.run(ms(6000));
    assert_eq!(pair.ends[0].transmit_interval(), ms(700));
    assert_eq!(pair.ends[1].transmit_interval(), ms(500));
    assert_eq!(pair.ends[0].detection_time(), ms(1500));
}

#[test]
fn a_longer_interval_is_used_only_once_the_neighbour_has_confirmed_it() {
    let mut pair = up();
    let mut slower = default();
    slower.transmit = ms(600);
    pair.cut = true;
    pair.ends[0].configure(slower);
    assert_eq!(pair.ends[0].transmit_interval(), ms(300));
    pair.run(ms(300));
    assert!(pair.sent[0].last().unwrap().1.poll);
    pair.cut = false;
    pair.run(ms(600));
    assert_eq!(pair.ends[0].transmit_interval(), ms(600));
    assert_eq!(pair.ends[1].detection_time(), ms(1800));
    assert_eq!(pair.states(), [State::Up, State::Up]);
}

#[test]
fn a_neighbour_that_wants_no_packets_gets_none() {
    let now = Instant::now();
    let mut session = Session::new(default(), 1, now);
    let mut packet = session.packet(false);
    (packet.mine, packet.required_rx) = (9, Duration::ZERO);
    let _ = session.on_packet(&packet, now, 0.0);
    let silent = session.on_packet(&packet, now, 0.0);
    assert_eq!(silent, []);
    assert_eq!(session.send_at, None);
    let at = session.next_timer().expect("silence is still noticed");
    assert!(at > now, "only the detection time runs");
}

mod any_order {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is lost, once the line works for good both ends come up and stay up.
        #[test]
        fn of_losses_ends_up(cuts in proptest::collection::vec((any::<bool>(), 1_u64..2500), 0..20)) {
            let mut pair = Pair::new([default(), default()]);
            for (cut, time) in cuts {
                pair.cut = cut;
                pair.run(ms(time));
            }
            pair.cut = false;
            pair.run(ms(6000));
            prop_assert_eq!(pair.states(), [State::Up, State::Up]);
            let changes = pair.changes.clone();
            pair.run(ms(20_000));
            prop_assert_eq!(changes, pair.changes);
        }
    }
}
