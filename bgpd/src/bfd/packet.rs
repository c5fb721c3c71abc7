//! BFD Control packets (RFC 5880 §4.1). Authentication is not supported: a packet that carries it is refused.

use std::time::Duration;

use thiserror::Error;

use super::{Diagnostic, State};

/// Octets of a packet without authentication.
pub const LEN: usize = 24;
const VERSION: u8 = 1;

const POLL: u8 = 0x20;
const FINAL: u8 = 0x10;
const CONTROL_PLANE_INDEPENDENT: u8 = 0x08;
const AUTHENTICATION: u8 = 0x04;
const DEMAND: u8 = 0x02;
const MULTIPOINT: u8 = 0x01;

/// A BFD Control packet.
///
/// ```text
///  0                   1                   2                   3
///  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |Vers |  Diag   |Sta|P|F|C|A|D|M|  Detect Mult  |    Length     |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |                       My Discriminator                        |
/// |                      Your Discriminator                       |
/// |                    Desired Min TX Interval                    |
/// |                   Required Min RX Interval                    |
/// |                 Required Min Echo RX Interval                 |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
///
/// Intervals are microseconds on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Why the sender's session was last down.
    pub diagnostic: Diagnostic,
    /// The sender's state.
    pub state: State,
    /// The sender wants a packet with [`Self::is_final`] in answer.
    pub poll: bool,
    /// Answers a poll.
    pub is_final: bool,
    /// The sender's BFD does not share fate with its control plane (C bit).
    pub control_plane_independent: bool,
    /// The sender wants no periodic packets while both ends are up.
    pub demand: bool,
    /// How many packets may be missed.
    pub multiplier: u8,
    /// The sender's number of the session; never 0.
    pub mine: u32,
    /// Our number of it, as the sender knows it; 0 if it does not.
    pub yours: u32,
    /// The least interval that the sender would like to send at.
    pub desired_tx: Duration,
    /// The least interval between packets that the sender can take; 0: it wants none.
    pub required_rx: Duration,
    /// The same for echo packets; 0: it supports none.
    pub required_echo_rx: Duration,
}

/// Why a packet is not taken (RFC 5880 §6.8.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PacketError {
    /// Shorter than the header, or than it says of itself.
    #[error("the packet is too short")]
    Short,
    /// Not version 1.
    #[error("BFD version {0} is not supported")]
    Version(u8),
    /// No packet may be missed at all.
    #[error("the detection multiplier is 0")]
    Multiplier,
    /// A bit that must be zero.
    #[error("the multipoint bit is set")]
    Multipoint,
    /// The sender's number is 0.
    #[error("the sender's discriminator is 0")]
    Discriminator,
    /// Our number is 0 although the sender has heard of us.
    #[error("our discriminator is 0 in state {0:?}")]
    Unaddressed(State),
    /// Authentication, which no session here uses.
    #[error("the packet is authenticated, which is not configured")]
    Authenticated,
}

fn microseconds(interval: Duration) -> [u8; 4] {
    u32::try_from(interval.as_micros())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
}

impl Packet {
    /// Reads and checks a packet.
    pub fn decode(bytes: &[u8]) -> Result<Self, PacketError> {
        let Some(head) = bytes.first_chunk::<LEN>() else {
            return Err(PacketError::Short);
        };
        let word =
            |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let interval = |at: usize| Duration::from_micros(u64::from(word(at)));
        let (version, flags, length) = (head[0] >> 5, head[1], usize::from(head[3]));
        if version != VERSION {
            return Err(PacketError::Version(version));
        }
        if length < LEN || length > bytes.len() {
            return Err(PacketError::Short);
        }
        let has = |bit: u8| flags & bit != 0;
        if head[2] == 0 {
            return Err(PacketError::Multiplier);
        }
        if has(MULTIPOINT) {
            return Err(PacketError::Multipoint);
        }
        let state = State::from_bits(flags >> 6);
        let (mine, yours) = (word(4), word(8));
        if mine == 0 {
            return Err(PacketError::Discriminator);
        }
        if yours == 0 && !matches!(state, State::Down | State::AdminDown) {
            return Err(PacketError::Unaddressed(state));
        }
        if has(AUTHENTICATION) {
            return Err(PacketError::Authenticated);
        }
        Ok(Self {
            diagnostic: Diagnostic::from_bits(head[0] & 0x1f),
            state,
            poll: has(POLL),
            is_final: has(FINAL),
            control_plane_independent: has(CONTROL_PLANE_INDEPENDENT),
            demand: has(DEMAND),
            multiplier: head[2],
            mine,
            yours,
            desired_tx: interval(12),
            required_rx: interval(16),
            required_echo_rx: interval(20),
        })
    }

    /// Writes the packet.
    #[must_use]
    pub fn encode(&self) -> [u8; LEN] {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        let mut out = [0; LEN];
        out[0] = VERSION << 5 | self.diagnostic.bits();
        out[1] = self.state.bits() << 6
            | bit(self.poll, POLL)
            | bit(self.is_final, FINAL)
            | bit(self.control_plane_independent, CONTROL_PLANE_INDEPENDENT)
            | bit(self.demand, DEMAND);
        out[2] = self.multiplier;
        out[3] = LEN as u8;
        let words = [
            self.mine.to_be_bytes(),
            self.yours.to_be_bytes(),
            microseconds(self.desired_tx),
            microseconds(self.required_rx),
            microseconds(self.required_echo_rx),
        ];
        for (chunk, word) in out[4..].chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Packet {
        Packet {
            diagnostic: Diagnostic::TimeExpired,
            state: State::Init,
            poll: true,
            is_final: false,
            control_plane_independent: true,
            demand: false,
            multiplier: 3,
            mine: 0x0102_0304,
            yours: 7,
            desired_tx: Duration::from_millis(300),
            required_rx: Duration::from_millis(50),
            required_echo_rx: Duration::ZERO,
        }
    }

    #[test]
    fn the_layout_is_that_of_the_rfc() {
        // RFC 5880 §4.1, written by hand: version 1, diagnostic 1, state Init, P and C.
        let expected = [
            0x21, 0xa8, 3, 24, 1, 2, 3, 4, 0, 0, 0, 7, 0, 4, 0x93, 0xe0, 0, 0, 0xc3, 0x50, 0, 0, 0,
            0,
        ];
        assert_eq!(sample().encode(), expected);
        assert_eq!(Packet::decode(&expected), Ok(sample()));
    }

    #[test]
    fn what_the_rfc_discards_is_refused_with_its_reason() {
        let broken = |change: fn(&mut [u8; LEN])| {
            let mut bytes = sample().encode();
            change(&mut bytes);
            Packet::decode(&bytes).unwrap_err()
        };
        assert_eq!(broken(|b| b[0] = 0), PacketError::Version(0));
        assert_eq!(broken(|b| b[2] = 0), PacketError::Multiplier);
        assert_eq!(broken(|b| b[3] = 23), PacketError::Short);
        assert_eq!(broken(|b| b[3] = 25), PacketError::Short);
        assert_eq!(broken(|b| b[1] |= MULTIPOINT), PacketError::Multipoint);
        assert_eq!(broken(|b| b[4..8].fill(0)), PacketError::Discriminator);
        assert_eq!(
            broken(|b| b[8..12].fill(0)),
            PacketError::Unaddressed(State::Init)
        );
        assert_eq!(
            broken(|b| b[1] |= AUTHENTICATION),
            PacketError::Authenticated
        );
    }

    proptest! {
        #[test]
        fn any_octets_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(packet) = Packet::decode(&bytes) {
                prop_assert_eq!(Packet::decode(&packet.encode()), Ok(packet));
            }
        }
    }
}
