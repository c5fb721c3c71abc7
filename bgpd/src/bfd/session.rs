//! The state machine of one BFD session (RFC 5880 §6), asynchronous mode.
//!
//! Time comes in as [`Instant`]s and chance as a number between 0 and 1; what goes out are [`Output`]s. The caller
//! hands in every packet whose discriminators belong here, and calls [`Session::on_timer`] when
//! [`Session::next_timer`] is due.

use std::time::{Duration, Instant};

use super::packet::Packet;
use super::{Diagnostic, Settings, State};

/// §6.8.3: the least interval while a session is not up.
const SLOW: Duration = Duration::from_secs(1);

/// What a session wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Send this to the neighbour.
    Send(Packet),
    /// The state changed.
    Changed(Change),
}

/// A change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Before.
    pub from: State,
    /// After.
    pub to: State,
    /// Why it is down.
    pub diagnostic: Diagnostic,
    /// The neighbour went down on purpose: no failure of the path (RFC 5882 §3.2).
    pub on_purpose: bool,
    /// The neighbour's packets carried C bit 1.
    pub independent: bool,
}

/// Both intervals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Intervals {
    transmit: Duration,
    receive: Duration,
}

/// What is known of the neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Remote {
    state: State,
    discriminator: u32,
    demand: bool,
    required_rx: Duration,
    desired_tx: Duration,
    multiplier: u8,
    independent: bool,
}

impl Remote {
    /// §6.8.1.
    const UNKNOWN: Self = Self {
        state: State::Down,
        discriminator: 0,
        demand: false,
        required_rx: Duration::from_micros(1),
        desired_tx: Duration::ZERO,
        multiplier: 0,
        independent: false,
    };
}

/// One session.
#[derive(Debug, Clone)]
pub struct Session {
    settings: Settings,
    discriminator: u32,
    state: State,
    diagnostic: Diagnostic,
    remote: Remote,
    /// What we tell the neighbour.
    advertised: Intervals,
    /// What we go by: until the neighbour has confirmed a change, the more cautious of both (§6.8.3).
    active: Intervals,
    polling: bool,
    send_at: Option<Instant>,
    expires_at: Option<Instant>,
}

impl Session {
    /// A session that begins Down and sends at once. The discriminator is this system's number of it, not 0.
    #[must_use]
    pub fn new(settings: Settings, discriminator: u32, now: Instant) -> Self {
        let intervals = Intervals {
            transmit: settings.transmit.max(SLOW),
            receive: settings.receive,
        };
        Self {
            settings,
            discriminator,
            state: State::Down,
            diagnostic: Diagnostic::None,
            remote: Remote::UNKNOWN,
            advertised: intervals,
            active: intervals,
            polling: false,
            send_at: Some(now),
            expires_at: None,
        }
    }

    /// The state.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Why it was last down.
    #[must_use]
    pub const fn diagnostic(&self) -> Diagnostic {
        self.diagnostic
    }

    /// How long nothing may be heard before the session goes down (§6.8.4); zero before the neighbour was heard.
    #[must_use]
    pub fn detection_time(&self) -> Duration {
        self.active.receive.max(self.remote.desired_tx) * u32::from(self.remote.multiplier)
    }

    /// The interval that we send at (§6.8.7).
    #[must_use]
    pub fn transmit_interval(&self) -> Duration {
        self.active.transmit.max(self.remote.required_rx)
    }

    /// When [`Self::on_timer`] must be called.
    #[must_use]
    pub fn next_timer(&self) -> Option<Instant> {
        self.send_at.into_iter().chain(self.expires_at).min()
    }

    /// Takes new settings without ending the session.
    pub fn configure(&mut self, settings: Settings) {
        self.settings = settings;
        self.adopt_intervals();
    }

    /// Holds the session down on purpose, and says so (§6.8.16).
    #[must_use]
    pub fn shut_down(&mut self, now: Instant, chance: f64) -> Vec<Output> {
        let mut out = Vec::new();
        self.enter(State::AdminDown, Diagnostic::AdministrativelyDown, &mut out);
        self.expires_at = None;
        self.send(now, chance, &mut out);
        out
    }

    /// Takes a packet that belongs to this session (§6.8.6).
    #[must_use]
    pub fn on_packet(&mut self, packet: &Packet, now: Instant, chance: f64) -> Vec<Output> {
        let mut out = Vec::new();
        let interval = self.transmit_interval();
        self.remote = Remote {
            state: packet.state,
            discriminator: packet.mine,
            demand: packet.demand,
            required_rx: packet.required_rx,
            desired_tx: packet.desired_tx,
            multiplier: packet.multiplier,
            independent: packet.control_plane_independent,
        };
        if self.polling && packet.is_final {
            self.polling = false;
            self.active = self.advertised;
        }
        if self.state == State::AdminDown {
            return out;
        }
        let before = self.state;
        match (self.state, packet.state) {
            (State::Init | State::Up, State::AdminDown) | (State::Up, State::Down) => {
                self.enter(State::Down, Diagnostic::NeighbourDown, &mut out);
            }
            (State::Down, State::Down) => self.enter(State::Init, self.diagnostic, &mut out),
            (State::Down, State::Init) | (State::Init, State::Init | State::Up) => {
                self.enter(State::Up, Diagnostic::None, &mut out);
            }
            _ => {}
        }
        self.expires_at = Some(now + self.detection_time());
        if packet.poll {
            out.push(Output::Send(self.packet(true)));
        }
        if self.state != before {
            // What we have to say differs from what we said last (§6.8.7).
            self.send(now, chance, &mut out);
        } else if self.transmit_interval() != interval || self.send_at.is_none() {
            self.schedule(now, chance);
        }
        out
    }

    /// Sends what is due and notices silence.
    #[must_use]
    pub fn on_timer(&mut self, now: Instant, chance: f64) -> Vec<Output> {
        let mut out = Vec::new();
        if self.expires_at.is_some_and(|at| at <= now) {
            self.expires_at = None;
            if matches!(self.state, State::Init | State::Up) {
                self.enter(State::Down, Diagnostic::TimeExpired, &mut out);
                self.send_at = Some(now);
            }
            // §6.8.1: whoever was there is not there any more. Its C bit has gone out with the change.
            self.remote = Remote::UNKNOWN;
        }
        if self.send_at.is_some_and(|at| at <= now) {
            self.send(now, chance, &mut out);
        }
        out
    }

    fn enter(&mut self, to: State, diagnostic: Diagnostic, out: &mut Vec<Output>) {
        let from = std::mem::replace(&mut self.state, to);
        self.diagnostic = diagnostic;
        if from == to {
            return;
        }
        self.adopt_intervals();
        out.push(Output::Changed(Change {
            from,
            to,
            diagnostic,
            on_purpose: self.remote.state == State::AdminDown || to == State::AdminDown,
            independent: self.remote.independent,
        }));
    }

    /// §6.8.3: outside of Up at most one packet a second, changed at once; in Up a change is polled for, and until
    /// the neighbour confirms it, we send at the faster and expect the slower of both.
    fn adopt_intervals(&mut self) {
        let up = self.state == State::Up;
        let wanted = Intervals {
            transmit: if up {
                self.settings.transmit
            } else {
                self.settings.transmit.max(SLOW)
            },
            receive: self.settings.receive,
        };
        if !up {
            self.polling = false;
            self.active = wanted;
        } else if wanted != self.advertised {
            self.polling = true;
            self.active = Intervals {
                transmit: self.active.transmit.min(wanted.transmit),
                receive: self.active.receive.max(wanted.receive),
            };
        }
        self.advertised = wanted;
    }

    fn send(&mut self, now: Instant, chance: f64, out: &mut Vec<Output>) {
        out.push(Output::Send(self.packet(false)));
        self.schedule(now, chance);
    }

    /// §6.8.7: between 75 % and 100 % of the interval; at most 90 % where no packet may be missed.
    fn schedule(&mut self, now: Instant, chance: f64) {
        let both_up = self.state == State::Up && self.remote.state == State::Up;
        let unwanted = self.remote.required_rx.is_zero();
        if unwanted || (self.remote.demand && both_up && !self.polling) {
            self.send_at = None;
            return;
        }
        let width = if self.settings.multiplier == 1 {
            0.15
        } else {
            0.25
        };
        let part = 0.75 + width * chance.clamp(0.0, 1.0);
        self.send_at = Some(now + self.transmit_interval().mul_f64(part));
    }

    const fn packet(&self, is_final: bool) -> Packet {
        Packet {
            diagnostic: self.diagnostic,
            state: self.state,
            // A packet is one or the other (§6.5).
            poll: self.polling && !is_final,
            is_final,
            control_plane_independent: false,
            demand: false,
            multiplier: self.settings.multiplier,
            mine: self.discriminator,
            yours: self.remote.discriminator,
            desired_tx: self.advertised.transmit,
            required_rx: self.advertised.receive,
            required_echo_rx: Duration::ZERO,
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
