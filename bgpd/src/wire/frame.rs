//! Cutting the byte stream into messages (RFC 4271 §4.1, RFC 8654).

use bytes::{Buf, Bytes, BytesMut};

use super::notification::{ErrorCode, Notification, header_error};

/// Marker, length and type.
pub const HEADER_LEN: usize = 19;
/// Longest message without RFC 8654, and the longest OPEN and KEEPALIVE in any case.
pub const MAX_LEN: usize = 4096;
/// Longest message when both sides sent the extended message capability (RFC 8654).
pub const MAX_EXTENDED_LEN: usize = 65535;

/// Message types (RFC 4271 §4.1, RFC 2918).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MessageType {
    /// OPEN.
    Open = 1,
    /// UPDATE.
    Update = 2,
    /// NOTIFICATION.
    Notification = 3,
    /// KEEPALIVE.
    Keepalive = 4,
    /// ROUTE-REFRESH.
    RouteRefresh = 5,
}

impl MessageType {
    const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Open,
            2 => Self::Update,
            3 => Self::Notification,
            4 => Self::Keepalive,
            5 => Self::RouteRefresh,
            _ => return None,
        })
    }

    /// Shortest message of this type, header included.
    const fn min_len(self) -> usize {
        match self {
            Self::Open => 29,
            Self::Update => 23,
            Self::Notification => 21,
            Self::Keepalive => HEADER_LEN,
            Self::RouteRefresh => 23,
        }
    }
}

/// One message, header taken off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the body is.
    pub kind: MessageType,
    /// Everything after the header; shares the receive buffer.
    pub body: Bytes,
}

/// Cuts frames from a receive buffer. Holds no bytes of its own.
///
/// ```text
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |                 Marker: 16 octets, all ones                   |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |      Length (with header)     |      Type     |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Framer {
    extended: bool,
}

impl Framer {
    /// A framer for messages of at most 4096 octets.
    pub const fn new() -> Self {
        Self { extended: false }
    }

    /// Allows long messages from now on: call when both OPENs carried the capability (RFC 8654 §4).
    pub const fn set_extended(&mut self, extended: bool) {
        self.extended = extended;
    }

    /// Takes the next complete message from the front of `buffer`; `None` when more bytes are needed.
    ///
    /// The header is checked as soon as it is there, so a bad length never makes us wait for its bytes.
    pub fn next(&self, buffer: &mut BytesMut) -> Result<Option<Frame>, Notification> {
        let Some(header) = buffer.first_chunk::<HEADER_LEN>() else {
            return match buffer.iter().take(16).all(|b| *b == 0xff) {
                true => Ok(None),
                false => Err(not_synchronized()),
            };
        };
        if header[..16].iter().any(|b| *b != 0xff) {
            return Err(not_synchronized());
        }
        let len = u16::from_be_bytes([header[16], header[17]]);
        let size = usize::from(len);
        let bad_length = || {
            let data = Bytes::copy_from_slice(&len.to_be_bytes());
            Notification::with_data(ErrorCode::MessageHeader, header_error::BAD_LENGTH, data)
        };
        if size < HEADER_LEN {
            return Err(bad_length());
        }
        let Some(kind) = MessageType::from_u8(header[18]) else {
            let data = Bytes::copy_from_slice(&header[18..]);
            return Err(Notification::with_data(
                ErrorCode::MessageHeader,
                header_error::BAD_TYPE,
                data,
            ));
        };
        let max = match kind {
            MessageType::Open | MessageType::Keepalive => MAX_LEN,
            _ if self.extended => MAX_EXTENDED_LEN,
            _ => MAX_LEN,
        };
        if size < kind.min_len()
            || size > max
            || (kind == MessageType::Keepalive && size != HEADER_LEN)
        {
            return Err(bad_length());
        }
        if buffer.len() < size {
            return Ok(None);
        }
        let mut message = buffer.split_to(size);
        message.advance(HEADER_LEN);
        Ok(Some(Frame {
            kind,
            body: message.freeze(),
        }))
    }
}

const fn not_synchronized() -> Notification {
    Notification::new(ErrorCode::MessageHeader, header_error::NOT_SYNCHRONIZED)
}
