//! Bidirectional Forwarding Detection: whether the path to a neighbour works, within a second.
//!
//! [`packet`] is the codec, [`session`] the state machine of one neighbour (RFC 5880), both pure; [`monitor`] runs
//! all sessions on a thread of its own with its own sockets, so that a busy BGP table delays no packet: single hop
//! over UDP port 3784 (RFC 5881) and multihop over 4784 (RFC 5883).
//!
//! BFD here shares fate with the process (C bit 0). So a peer that runs graceful restart must not take the loss of
//! our packets for a broken path (RFC 5882 §4.3.2.2), and likewise we: when a peer whose packets carry C bit 0 goes
//! silent, the BGP session closes without NOTIFICATION and its routes are kept for the restart time; a peer with
//! C bit 1 has lost its forwarding plane, and its routes go at once. Before a planned restart all sessions
//! signal AdminDown, which no peer takes for a failure (RFC 5882 §4.3.2).
//!
//! Not here: demand mode of our own, echo, authentication.

pub mod monitor;
pub mod packet;
pub mod session;
mod socket;

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a session is run; a change of intervals needs no new session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Whether there may be routers in between.
    pub hops: Hops,
    /// The interval that we send at, if the neighbour can take it.
    pub transmit: Duration,
    /// The least interval that we accept.
    pub receive: Duration,
    /// How many packets may be missed.
    pub multiplier: u8,
}

impl Settings {
    /// 300 ms x 3.
    #[must_use]
    pub const fn new(hops: Hops) -> Self {
        Self {
            hops,
            transmit: Duration::from_millis(300),
            receive: Duration::from_millis(300),
            multiplier: 3,
        }
    }
}

/// Distance of a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hops {
    /// On a shared link: packets must arrive with TTL 255 (RFC 5881 §5).
    Single,
    /// Anywhere (RFC 5883).
    Multi,
}

impl Hops {
    /// Destination port (RFC 5881 §4, RFC 5883 §5).
    #[must_use]
    pub const fn port(self) -> u16 {
        match self {
            Self::Single => 3784,
            Self::Multi => 4784,
        }
    }
}

/// State of a session (RFC 5880 §6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// Held down by its operator.
    AdminDown,
    /// No path, or the neighbour has not been heard.
    Down,
    /// The neighbour is heard, and does not hear us yet.
    Init,
    /// The path works both ways.
    Up,
}

impl State {
    const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::AdminDown,
            1 => Self::Down,
            2 => Self::Init,
            _ => Self::Up,
        }
    }

    const fn bits(self) -> u8 {
        match self {
            Self::AdminDown => 0,
            Self::Down => 1,
            Self::Init => 2,
            Self::Up => 3,
        }
    }
}

/// Why a session was last down (RFC 5880 §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Diagnostic {
    /// 0.
    None,
    /// 1: nothing was heard for the detection time.
    TimeExpired,
    /// 3: the neighbour says that its session is down.
    NeighbourDown,
    /// 7: the operator, or a planned restart.
    AdministrativelyDown,
    /// Any other.
    Other(u8),
}

impl Diagnostic {
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::None,
            1 => Self::TimeExpired,
            3 => Self::NeighbourDown,
            7 => Self::AdministrativelyDown,
            other => Self::Other(other),
        }
    }

    const fn bits(self) -> u8 {
        match self {
            Self::None => 0,
            Self::TimeExpired => 1,
            Self::NeighbourDown => 3,
            Self::AdministrativelyDown => 7,
            Self::Other(other) => other & 0x1f,
        }
    }

    /// In words.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "no diagnostic",
            Self::TimeExpired => "control detection time expired",
            Self::NeighbourDown => "neighbor signaled session down",
            Self::AdministrativelyDown => "administratively down",
            Self::Other(_) => "other",
        }
    }
}
