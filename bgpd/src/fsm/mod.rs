//! The finite state machine of one peer (RFC 4271 §8), as a pure function of events.
//!
//! RFC 4271 describes one machine per connection and says in §6.8 how the two connections of a peer that
//! dialled each other collide. Here both connections live in one [`Peer`], because that is where the
//! decisions are made: which connection survives, whether to dial, whether a new connection of a restarting
//! peer replaces the dead one (RFC 4724 §5).
//!
//! Invariants: no clock, no randomness, no I/O. Timers are [`Action::Set`] / [`Action::Cancel`]; the caller
//! owns the clock and applies jitter where [`Wait::jitter`] asks for it. At most one connection is
//! Established. Every [`Action::Up`] is followed by exactly one [`Action::Down`] before the next.
//!
//! What it does not do: decode messages, negotiate capabilities, or keep routes.

mod peer;
#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::time::Duration;

pub use peer::Peer;

use crate::wire::Notification;

/// Which of the two connections of a peer: the one we dialled, or the one we accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Opened by us.
    Dialed,
    /// Opened by the peer.
    Accepted,
}

impl Role {
    /// Both roles.
    pub const ALL: [Self; 2] = [Self::Dialed, Self::Accepted];

    /// The other connection.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Dialed => Self::Accepted,
            Self::Accepted => Self::Dialed,
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::Dialed => 0,
            Self::Accepted => 1,
        }
    }
}

/// The state of a peer as RFC 4271 §8.2.2 names it: that of its most advanced connection.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum State {
    /// Stopped, or held down after an error.
    Idle,
    /// A connection is being dialled.
    Connect,
    /// Waiting for the peer's connection or for the next dial.
    Active,
    /// Our OPEN is out.
    OpenSent,
    /// The peer's OPEN was accepted; its KEEPALIVE is awaited.
    OpenConfirm,
    /// Routes are exchanged.
    Established,
}

impl State {
    /// The name as shown to operators.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "Idle",
            Self::Connect => "Connect",
            Self::Active => "Active",
            Self::OpenSent => "OpenSent",
            Self::OpenConfirm => "OpenConfirm",
            Self::Established => "Established",
        }
    }
}

/// What the machine needs to know about itself and its peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The AS that we present to this peer.
    pub local_as: u32,
    /// Our BGP identifier.
    pub local_id: Ipv4Addr,
    /// The AS that the peer must present; `None` accepts any.
    pub remote_as: Option<u32>,
    /// Never dial.
    pub passive: bool,
    /// The hold time we propose, in seconds; 0 turns hold and keepalive timers off.
    pub hold_time: u16,
    /// Keepalive interval in seconds; `None` is a third of the negotiated hold time.
    pub keepalive: Option<u16>,
    /// Upper bound of the wait before the first dial.
    pub connect_delay: Duration,
    /// Wait between dials, and the limit of one dial.
    pub connect_retry: Duration,
    /// First wait after a protocol error; doubles up to `error_wait_max`.
    pub error_wait_min: Duration,
    /// Longest wait after protocol errors.
    pub error_wait_max: Duration,
}

impl Settings {
    /// The intervals that Calico configures (connect delay 2 s, retry 5 s, error wait 5..30 s) with
    /// a hold time of 240 s.
    #[must_use]
    pub const fn new(local_as: u32, local_id: Ipv4Addr, remote_as: Option<u32>) -> Self {
        Self {
            local_as,
            local_id,
            remote_as,
            passive: false,
            hold_time: 240,
            keepalive: None,
            connect_delay: Duration::from_secs(2),
            connect_retry: Duration::from_secs(5),
            error_wait_min: Duration::from_secs(5),
            error_wait_max: Duration::from_secs(30),
        }
    }
}

/// The part of a peer's OPEN that decides the state machine's course.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFacts {
    /// The peer's AS, from the 4-octet capability if present (RFC 6793).
    pub asn: u32,
    /// The peer's BGP identifier.
    pub id: Ipv4Addr,
    /// The hold time it proposes, in seconds.
    pub hold_time: u16,
    /// It offered graceful restart for at least one family that we share (RFC 4724).
    pub graceful_restart: bool,
}

/// The timers of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Timer {
    /// RFC 4271's ConnectRetryTimer and IdleHoldTimer in one: the next dial, or the limit of the one under way.
    Dial,
    /// HoldTimer of a connection.
    Hold(Role),
    /// KeepaliveTimer of a connection.
    Keepalive(Role),
    /// How long one of two colliding connections waits for the other.
    Collision,
    /// After this, an Established session counts as settled: a new connection of a peer that can restart
    /// gracefully replaces it. Before, a second connection is an ordinary collision.
    Settle,
}

/// How long a timer runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// The full interval.
    pub duration: Duration,
    /// What the caller may take off it at random.
    pub jitter: Jitter,
}

/// The random part of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jitter {
    /// Exactly the interval.
    None,
    /// Between 75 % and 100 % of the interval (RFC 4271 §10).
    Quarter,
    /// Between nothing and the interval: spreads the first dials of nodes that start together.
    Full,
}

/// Something that happened to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Begin (ManualStart / AutomaticStart).
    Start,
    /// End. With a NOTIFICATION the peer learns of it; without, connections just close, so that a peer with
    /// graceful restart keeps our routes.
    Stop(Option<Notification>),
    /// Close the session with this NOTIFICATION and begin again (configuration change, prefix limit).
    Reset(Notification),
    /// Our dial reached the peer.
    DialSucceeded,
    /// Our dial failed.
    DialFailed,
    /// The path to the peer is broken (RFC 5882).
    PathLost,
    /// The peer's connection was accepted by the listener.
    Accepted,
    /// The transport of a connection ended or failed.
    Closed(Role),
    /// The peer does not take what we send (RFC 9687).
    SendStalled(Role),
    /// A well-formed OPEN.
    Open(Role, OpenFacts),
    /// A KEEPALIVE.
    Keepalive(Role),
    /// An UPDATE that does not reset the session.
    Update(Role),
    /// A ROUTE-REFRESH.
    Refresh(Role),
    /// A NOTIFICATION.
    Notification(Role, Notification),
    /// A message that the decoder refused, with the NOTIFICATION it calls for.
    Malformed(Role, Notification),
    /// A timer ran out.
    Timer(Timer),
}

/// Something to do for a peer, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Dial the peer.
    Dial,
    /// Give up the dial under way.
    CancelDial,
    /// Take the accepted connection as the peer's [`Role::Accepted`].
    Take,
    /// Close the accepted connection, after this NOTIFICATION.
    Refuse(Notification),
    /// Send our OPEN.
    SendOpen(Role),
    /// Send a KEEPALIVE.
    SendKeepalive(Role),
    /// Send a NOTIFICATION.
    SendNotification(Role, Notification),
    /// Close a connection.
    Close(Role),
    /// Start or restart a timer.
    Set(Timer, Wait),
    /// Stop a timer.
    Cancel(Timer),
    /// The session on this connection is Established.
    Up(Role),
    /// The Established session ended.
    Down(DownCause),
}

/// Why a connection or session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownCause {
    /// The transport ended or failed.
    Closed,
    /// The path to the peer is broken.
    PathLost,
    /// A new connection of the peer took its place.
    Replaced,
    /// Stopped by us, without a word to the peer.
    Stopped,
    /// We sent a NOTIFICATION.
    Sent(Notification),
    /// The peer sent a NOTIFICATION.
    Received(Notification),
    /// The peer stopped taking what we send.
    SendStalled,
}

impl DownCause {
    /// Whether the peer's routes may be kept while it restarts (RFC 4724 §4.2: the session ended without
    /// a NOTIFICATION).
    #[must_use]
    pub const fn keeps_routes(&self) -> bool {
        matches!(self, Self::Closed | Self::PathLost | Self::Replaced)
    }

    /// For logs and status.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Closed => "connection closed".to_owned(),
            Self::PathLost => "path to the peer lost (BFD)".to_owned(),
            Self::Replaced => "replaced by a new connection of the peer".to_owned(),
            Self::Stopped => "stopped".to_owned(),
            Self::Sent(n) => format!("sent {}", n),
            Self::Received(n) => format!("received {}", n),
            Self::SendStalled => "peer does not read".to_owned(),
        }
    }
}
