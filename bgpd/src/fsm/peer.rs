//! The transition function of [`Peer`].

use std::time::Duration;

use super::{Action, DownCause, Event, Jitter, OpenFacts, Role, Settings, State, Timer, Wait};
use crate::wire::{ErrorCode, Notification, cease, open_error};

/// Hold time while the peer's OPEN is awaited (RFC 4271 §8.2.2: "a large value", suggested 4 minutes).
const OPEN_WAIT: Duration = Duration::from_secs(240);

/// How long after Established a second connection still counts as a collision.
const SETTLE: Duration = Duration::from_secs(10);

/// How long the connection that a collision prefers may take to prove itself, while the other waits.
const COLLISION: Duration = Duration::from_secs(2);

/// Protocol errors in a row that still lengthen the wait.
const MAX_DOUBLINGS: u32 = 4;

/// One connection that reached the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Connection {
    phase: Phase,
    facts: Option<OpenFacts>,
    /// Negotiated hold time in seconds; meaningful from OpenConfirm on.
    hold: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    OpenSent,
    /// The peer's OPEN is here, but the other connection may be the one that stays: our KEEPALIVE waits until that
    /// is decided. Shown as OpenSent.
    Held {
        /// The peer's KEEPALIVE is here as well.
        confirmed: bool,
    },
    OpenConfirm,
    Established,
}

impl Phase {
    /// Our KEEPALIVE is out.
    const fn is_confirmed(self) -> bool {
        matches!(self, Self::OpenConfirm | Self::Established)
    }
}

/// Whether and how we dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialing {
    /// No dial is planned: passive, stopped, or a session stands.
    Off,
    /// The Dial timer runs.
    Waiting,
    /// The Dial timer runs after a protocol error of this peer: nothing is accepted meanwhile.
    HeldDown,
    /// A dial is under way.
    UnderWay,
}

/// Both connections of one peer. See the module for what it promises.
#[derive(Debug, Clone)]
pub struct Peer {
    settings: Settings,
    started: bool,
    dialing: Dialing,
    connections: [Option<Connection>; 2],
    /// The Established session is older than the settle time.
    settled: bool,
    /// Protocol errors since the last settled session.
    errors: u32,
}

impl Peer {
    /// A stopped peer.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self {
            settings,
            started: false,
            dialing: Dialing::Off,
            connections: [None, None],
            settled: false,
            errors: 0,
        }
    }

    /// The settings in force.
    #[must_use]
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Replaces the settings. Those that an existing session negotiated take effect with the next one.
    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// The state of the most advanced connection.
    #[must_use]
    pub fn state(&self) -> State {
        let best = self.connections.iter().flatten().map(|c| match c.phase {
            Phase::OpenSent | Phase::Held { .. } => State::OpenSent,
            Phase::OpenConfirm => State::OpenConfirm,
            Phase::Established => State::Established,
        });
        best.max().unwrap_or(match self.dialing {
            _ if !self.started => State::Idle,
            Dialing::HeldDown => State::Idle,
            Dialing::UnderWay => State::Connect,
            Dialing::Waiting | Dialing::Off => State::Active,
        })
    }

    /// The connection that carries the session.
    #[must_use]
    pub fn established(&self) -> Option<Role> {
        Role::ALL
            .into_iter()
            .find(|r| self.phase(*r) == Some(Phase::Established))
    }

    /// The negotiated hold time of the session, in seconds.
    #[must_use]
    pub fn hold_time(&self) -> Option<u16> {
        let role = self.established()?;
        self.connections[role.index()].map(|c| c.hold)
    }

    /// Takes one event and says what to do.
    #[must_use]
    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        if !self.started && !matches!(event, Event::Start) {
            if matches!(event, Event::Accepted) {
                out.push(Action::Refuse(ceased(cease::CONNECTION_REJECTED)));
            }
            return out;
        }
        match event {
            Event::Start => self.on_start(&mut out),
            Event::Stop(notify) => self.on_stop(notify, &mut out),
            Event::Reset(notify) => self.on_reset(&notify, &mut out),
            Event::DialSucceeded => self.on_dialed(&mut out),
            Event::DialFailed => self.on_dial_failed(&mut out),
            Event::PathLost => {
                for role in Role::ALL {
                    self.on_ended(role, DownCause::PathLost, &mut out);
                }
            }
            Event::Accepted => self.on_accepted(&mut out),
            Event::Closed(role) => self.on_ended(role, DownCause::Closed, &mut out),
            Event::SendStalled(role) => self.on_send_stalled(role, &mut out),
            Event::Open(role, facts) => self.on_open(role, facts, &mut out),
            Event::Keepalive(role) => self.on_keepalive(role, &mut out),
            Event::Update(role) | Event::Refresh(role) => self.on_routes(role, &mut out),
            Event::Notification(role, n) => self.on_notification(role, n, &mut out),
            Event::Malformed(role, n) => self.fail(role, n, &mut out),
            Event::Timer(timer) => self.on_timer(timer, &mut out),
        }
        for role in Role::ALL {
            if self.is_held(role) && self.phase(role.other()).is_none() {
                self.release(role, &mut out);
            }
        }
        out
    }

    fn phase(&self, role: Role) -> Option<Phase> {
        self.connections[role.index()].map(|c| c.phase)
    }

    fn is_held(&self, role: Role) -> bool {
        matches!(self.phase(role), Some(Phase::Held { .. }))
    }

    fn on_start(&mut self, out: &mut Vec<Action>) {
        if self.started {
            return;
        }
        self.started = true;
        self.errors = 0;
        self.wait_to_dial(self.settings.connect_delay, Jitter::Full, out);
    }

    fn on_stop(&mut self, notify: Option<Notification>, out: &mut Vec<Action>) {
        for role in Role::ALL {
            let cause = notify.clone().map_or(DownCause::Stopped, DownCause::Sent);
            self.drop_connection(role, cause, out);
        }
        self.stop_dialing(out);
        self.started = false;
    }

    fn on_reset(&mut self, notify: &Notification, out: &mut Vec<Action>) {
        for role in Role::ALL {
            self.drop_connection(role, DownCause::Sent(notify.clone()), out);
        }
        self.stop_dialing(out);
        if is_cease(notify) && notify.subcode == cease::MAX_PREFIXES {
            self.hold_down(out);
        } else {
            self.wait_to_dial(self.settings.connect_delay, Jitter::Full, out);
        }
    }

    fn on_dialed(&mut self, out: &mut Vec<Action>) {
        if self.dialing != Dialing::UnderWay || self.phase(Role::Dialed).is_some() {
            return;
        }
        self.dialing = Dialing::Off;
        out.push(Action::Cancel(Timer::Dial));
        self.send_open(Role::Dialed, out);
    }

    fn on_dial_failed(&mut self, out: &mut Vec<Action>) {
        if self.dialing == Dialing::UnderWay {
            self.wait_to_dial(self.settings.connect_retry, Jitter::Quarter, out);
        }
    }

    fn on_accepted(&mut self, out: &mut Vec<Action>) {
        if self.dialing == Dialing::HeldDown {
            out.push(Action::Refuse(ceased(cease::CONNECTION_REJECTED)));
            return;
        }
        if let Some(role) = self.established() {
            let restartable = self.connections[role.index()]
                .and_then(|c| c.facts)
                .is_some_and(|f| f.graceful_restart);
            if !(self.settled && restartable) {
                out.push(Action::Refuse(ceased(cease::COLLISION)));
                return;
            }
            // RFC 4724 §5: the peer restarted and we had not noticed; no NOTIFICATION on the dead session.
            self.drop_connection(role, DownCause::Replaced, out);
        } else if self.phase(Role::Accepted).is_some() {
            // The peer gave its former attempt up and tries again.
            self.drop_connection(
                Role::Accepted,
                DownCause::Sent(ceased(cease::COLLISION)),
                out,
            );
        }
        out.push(Action::Take);
        self.send_open(Role::Accepted, out);
        // Should this one fail, the dial goes on.
        if self.dialing == Dialing::Off && self.phase(Role::Dialed).is_none() {
            self.wait_to_dial(self.settings.connect_retry, Jitter::Quarter, out);
        }
    }

    fn send_open(&mut self, role: Role, out: &mut Vec<Action>) {
        self.connections[role.index()] = Some(Connection {
            phase: Phase::OpenSent,
            facts: None,
            hold: 0,
        });
        out.push(Action::SendOpen(role));
        out.push(Action::Set(
            Timer::Hold(role),
            Wait {
                duration: OPEN_WAIT,
                jitter: Jitter::None,
            },
        ));
    }

    fn on_open(&mut self, role: Role, facts: OpenFacts, out: &mut Vec<Action>) {
        match self.phase(role) {
            None => return,
            Some(Phase::OpenSent) => {}
            Some(phase) => return self.fail(role, unexpected(phase), out),
        }
        if let Err(notify) = self.check_open(&facts) {
            return self.fail(role, notify, out);
        }
        self.connections[role.index()] = Some(Connection {
            phase: Phase::Held { confirmed: false },
            hold: self.settings.hold_time.min(facts.hold_time),
            facts: Some(facts),
        });
        self.resolve_collision(role, &facts, out);
    }

    /// RFC 4271 §6.8, for the connection that the peer's OPEN has just arrived on.
    ///
    /// The identifiers say which connection stays. But it stays only if it works, and a peer that has come further on
    /// the other one would close it (some refuse every second connection, some do not compare with connections in
    /// OpenSent). So neither is given up for one that has not proved itself:
    ///
    /// - the loser is not confirmed while the winner's OPEN is outstanding, so the peer cannot take it as Established;
    /// - where the loser is confirmed already, the peer's word counts: its KEEPALIVE establishes the loser, its
    ///   closing the loser leaves the winner.
    ///
    /// Either wait is bounded by [`Timer::Collision`].
    fn resolve_collision(&mut self, role: Role, facts: &OpenFacts, out: &mut Vec<Action>) {
        let other = role.other();
        let preferred = if self.prefers_dialed(facts) {
            Role::Dialed
        } else {
            Role::Accepted
        };
        let lost = DownCause::Sent(ceased(cease::COLLISION));
        match self.phase(other) {
            // The one is left alone, the other released at the end of this event.
            None => {}
            Some(Phase::Established) => self.drop_connection(role, lost, out),
            Some(Phase::OpenSent | Phase::Held { .. }) if preferred == role => {
                self.drop_connection(other, lost, out);
            }
            Some(Phase::OpenConfirm | Phase::Held { .. }) if preferred == other => {
                self.drop_connection(role, lost, out);
            }
            Some(_) => out.push(Action::Set(
                Timer::Collision,
                Wait {
                    duration: COLLISION,
                    jitter: Jitter::None,
                },
            )),
        }
    }

    /// Confirms a connection that no other one stands in the way of.
    fn release(&mut self, role: Role, out: &mut Vec<Action>) {
        let Some(connection) = self.connections[role.index()] else {
            return;
        };
        let Phase::Held { confirmed } = connection.phase else {
            return;
        };
        self.connections[role.index()] = Some(Connection {
            phase: Phase::OpenConfirm,
            ..connection
        });
        out.push(Action::Cancel(Timer::Collision));
        out.push(Action::SendKeepalive(role));
        self.restart_hold(role, connection.hold, out);
        self.restart_keepalive(role, connection.hold, out);
        // A dial that is still under way would only make the next collision.
        if self.dialing == Dialing::UnderWay {
            out.push(Action::CancelDial);
            self.wait_to_dial(self.settings.connect_retry, Jitter::Quarter, out);
        }
        if confirmed {
            self.on_keepalive(role, out);
        }
    }

    /// The preferred connection took too long: the one that the peer has answered on is taken.
    fn on_collision_timer(&mut self, out: &mut Vec<Action>) {
        if let Some(role) = Role::ALL.into_iter().find(|r| self.is_held(*r)) {
            let cause = DownCause::Sent(ceased(cease::COLLISION));
            self.drop_connection(role.other(), cause, out);
        }
    }

    /// OPEN checks of RFC 4271 §6.2, RFC 6286 §2.2 and RFC 7607.
    fn check_open(&self, facts: &OpenFacts) -> Result<(), Notification> {
        let wrong_as = self.settings.remote_as.is_some_and(|asn| asn != facts.asn);
        if facts.asn == 0 || wrong_as {
            return Err(Notification::new(ErrorCode::Open, open_error::BAD_PEER_AS));
        }
        let ours = facts.id == self.settings.local_id && facts.asn == self.settings.local_as;
        if facts.id.is_unspecified() || ours {
            return Err(Notification::new(
                ErrorCode::Open,
                open_error::BAD_IDENTIFIER,
            ));
        }
        if matches!(facts.hold_time, 1 | 2) {
            return Err(Notification::new(
                ErrorCode::Open,
                open_error::UNACCEPTABLE_HOLD_TIME,
            ));
        }
        Ok(())
    }

    /// RFC 4271 §6.8 and RFC 6286 §2.3: the connection dialled by the end with the greater identifier
    /// (with equal identifiers, the greater AS) stays.
    fn prefers_dialed(&self, facts: &OpenFacts) -> bool {
        (self.settings.local_id, self.settings.local_as) > (facts.id, facts.asn)
    }

    fn on_keepalive(&mut self, role: Role, out: &mut Vec<Action>) {
        let Some(connection) = self.connections[role.index()] else {
            return;
        };
        match connection.phase {
            Phase::OpenSent => self.fail(role, unexpected(Phase::OpenSent), out),
            Phase::Held { .. } => {
                self.connections[role.index()] = Some(Connection {
                    phase: Phase::Held { confirmed: true },
                    ..connection
                });
            }
            Phase::OpenConfirm => {
                self.connections[role.index()] = Some(Connection {
                    phase: Phase::Established,
                    ..connection
                });
                self.restart_hold(role, connection.hold, out);
                let cause = DownCause::Sent(ceased(cease::COLLISION));
                self.drop_connection(role.other(), cause, out);
                self.stop_dialing(out);
                self.settled = false;
                out.push(Action::Set(
                    Timer::Settle,
                    Wait {
                        duration: SETTLE,
                        jitter: Jitter::None,
                    },
                ));
                out.push(Action::Up(role));
            }
            Phase::Established => self.restart_hold(role, connection.hold, out),
        }
    }

    fn on_routes(&mut self, role: Role, out: &mut Vec<Action>) {
        let Some(connection) = self.connections[role.index()] else {
            return;
        };
        match connection.phase {
            Phase::Established => self.restart_hold(role, connection.hold, out),
            phase => self.fail(role, unexpected(phase), out),
        }
    }

    fn on_notification(&mut self, role: Role, notify: Notification, out: &mut Vec<Action>) {
        if self.phase(role).is_none() {
            return;
        }
        let quiet = is_cease(&notify) && notify.subcode != cease::MAX_PREFIXES;
        self.drop_connection(role, DownCause::Received(notify), out);
        if self.connections.iter().any(Option::is_some) {
            return;
        }
        if quiet {
            self.dial_again(out);
        } else {
            self.back_off(out);
        }
    }

    fn on_ended(&mut self, role: Role, cause: DownCause, out: &mut Vec<Action>) {
        if self.phase(role).is_some() {
            self.drop_connection(role, cause, out);
            self.dial_again(out);
        }
    }

    fn on_send_stalled(&mut self, role: Role, out: &mut Vec<Action>) {
        if self.phase(role).is_none() {
            return;
        }
        // Nothing can be sent; RFC 9687 still asks for the attempt.
        out.push(Action::SendNotification(
            role,
            Notification::new(ErrorCode::SendHoldTimer, 0),
        ));
        self.on_ended(role, DownCause::SendStalled, out);
    }

    fn on_timer(&mut self, timer: Timer, out: &mut Vec<Action>) {
        match timer {
            Timer::Dial => self.on_dial_timer(out),
            Timer::Collision => self.on_collision_timer(out),
            Timer::Hold(role) if self.phase(role).is_some() => {
                self.fail(role, Notification::new(ErrorCode::HoldTimer, 0), out);
            }
            Timer::Keepalive(role) => {
                if let Some(connection) = self.connections[role.index()]
                    && connection.phase.is_confirmed()
                {
                    out.push(Action::SendKeepalive(role));
                    self.restart_keepalive(role, connection.hold, out);
                }
            }
            Timer::Settle if self.established().is_some() => {
                self.settled = true;
                self.errors = 0;
            }
            Timer::Hold(_) | Timer::Settle => {}
        }
    }

    fn on_dial_timer(&mut self, out: &mut Vec<Action>) {
        if self.dialing == Dialing::Off {
            return;
        }
        if self.settings.passive {
            self.dialing = Dialing::Off;
            return;
        }
        if self.dialing == Dialing::UnderWay {
            out.push(Action::CancelDial);
        }
        // A connection that got as far as OpenConfirm is about to stand; see again later.
        if matches!(self.phase(Role::Accepted), Some(Phase::OpenConfirm)) {
            return self.wait_to_dial(self.settings.connect_retry, Jitter::Quarter, out);
        }
        self.dialing = Dialing::UnderWay;
        out.push(Action::Dial);
        out.push(self.dial_timer(self.settings.connect_retry, Jitter::Quarter));
    }

    /// A protocol error that we found: NOTIFICATION, close, and wait before the next attempt.
    fn fail(&mut self, role: Role, notify: Notification, out: &mut Vec<Action>) {
        if self.phase(role).is_none() {
            return;
        }
        let hold_expired = notify.kind() == Some(ErrorCode::HoldTimer);
        self.drop_connection(role, DownCause::Sent(notify), out);
        if self.connections.iter().any(Option::is_some) {
            return;
        }
        if hold_expired {
            self.dial_again(out);
        } else {
            self.hold_down(out);
        }
    }

    /// Closes a connection, after a NOTIFICATION where the cause is one that we send.
    fn drop_connection(&mut self, role: Role, cause: DownCause, out: &mut Vec<Action>) {
        let Some(connection) = self.connections[role.index()].take() else {
            return;
        };
        if let DownCause::Sent(notify) = &cause {
            out.push(Action::SendNotification(role, notify.clone()));
        }
        out.push(Action::Close(role));
        out.push(Action::Cancel(Timer::Hold(role)));
        if connection.phase.is_confirmed() {
            out.push(Action::Cancel(Timer::Keepalive(role)));
        } else if connection.phase != Phase::OpenSent {
            out.push(Action::Cancel(Timer::Collision));
        }
        if connection.phase == Phase::Established {
            self.settled = false;
            out.push(Action::Cancel(Timer::Settle));
            out.push(Action::Down(cause));
        }
    }

    /// The next dial after a connection ended without a protocol error.
    fn dial_again(&mut self, out: &mut Vec<Action>) {
        if self.dialing == Dialing::Off && self.connections.iter().all(Option::is_none) {
            self.wait_to_dial(self.settings.connect_delay, Jitter::Full, out);
        }
    }

    fn wait_to_dial(&mut self, wait: Duration, jitter: Jitter, out: &mut Vec<Action>) {
        if self.settings.passive {
            self.dialing = Dialing::Off;
            return;
        }
        self.dialing = Dialing::Waiting;
        out.push(self.dial_timer(wait, jitter));
    }

    /// Waits longer before the next dial, but still accepts the peer.
    fn back_off(&mut self, out: &mut Vec<Action>) {
        self.cancel_dial(out);
        let wait = self.error_wait();
        self.wait_to_dial(wait, Jitter::Quarter, out);
    }

    /// Neither dials nor accepts for a while. Passive peers are held down as well.
    fn hold_down(&mut self, out: &mut Vec<Action>) {
        self.cancel_dial(out);
        let wait = self.error_wait();
        self.dialing = Dialing::HeldDown;
        out.push(self.dial_timer(wait, Jitter::Quarter));
    }

    fn error_wait(&mut self) -> Duration {
        let wait = self.settings.error_wait_min * 2_u32.pow(self.errors);
        self.errors = (self.errors + 1).min(MAX_DOUBLINGS);
        wait.min(self.settings.error_wait_max)
    }

    fn cancel_dial(&mut self, out: &mut Vec<Action>) {
        if self.dialing == Dialing::UnderWay {
            out.push(Action::CancelDial);
        }
    }

    fn stop_dialing(&mut self, out: &mut Vec<Action>) {
        self.cancel_dial(out);
        if self.dialing != Dialing::Off {
            out.push(Action::Cancel(Timer::Dial));
        }
        self.dialing = Dialing::Off;
    }

    const fn dial_timer(&self, duration: Duration, jitter: Jitter) -> Action {
        Action::Set(Timer::Dial, Wait { duration, jitter })
    }

    fn restart_hold(&self, role: Role, hold: u16, out: &mut Vec<Action>) {
        out.push(if hold == 0 {
            Action::Cancel(Timer::Hold(role))
        } else {
            let duration = Duration::from_secs(u64::from(hold));
            Action::Set(
                Timer::Hold(role),
                Wait {
                    duration,
                    jitter: Jitter::None,
                },
            )
        });
    }

    fn restart_keepalive(&self, role: Role, hold: u16, out: &mut Vec<Action>) {
        if hold == 0 {
            return;
        }
        let third = u64::from(hold / 3).max(1);
        let seconds = self
            .settings
            .keepalive
            .map_or(third, |k| u64::from(k).clamp(1, third));
        let wait = Wait {
            duration: Duration::from_secs(seconds),
            jitter: Jitter::Quarter,
        };
        out.push(Action::Set(Timer::Keepalive(role), wait));
    }
}

const fn ceased(subcode: u8) -> Notification {
    Notification::new(ErrorCode::Cease, subcode)
}

fn is_cease(notify: &Notification) -> bool {
    notify.kind() == Some(ErrorCode::Cease)
}

/// RFC 6608: which state a message was unexpected in.
const fn unexpected(phase: Phase) -> Notification {
    let subcode = match phase {
        Phase::OpenSent | Phase::Held { .. } => 1,
        Phase::OpenConfirm => 2,
        Phase::Established => 3,
    };
    Notification::new(ErrorCode::Fsm, subcode)
}
