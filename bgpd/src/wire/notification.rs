//! NOTIFICATION messages (RFC 4271 §4.5) and their code points.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};

/// Error codes of NOTIFICATION (IANA "BGP Error (Notification) Codes").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ErrorCode {
    /// Header of a message (RFC 4271 §6.1).
    MessageHeader = 1,
    /// OPEN (RFC 4271 §6.2).
    Open = 2,
    /// UPDATE (RFC 4271 §6.3).
    Update = 3,
    /// No KEEPALIVE or UPDATE within the hold time.
    HoldTimer = 4,
    /// Message not allowed in the state (RFC 6608).
    Fsm = 5,
    /// Orderly end (RFC 4486).
    Cease = 6,
    /// ROUTE-REFRESH (RFC 7313 §5).
    RouteRefresh = 7,
    /// The peer stopped reading (RFC 9687).
    SendHoldTimer = 8,
}

impl ErrorCode {
    /// The code point's meaning, if it is assigned.
    pub const fn from_u8(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::MessageHeader,
            2 => Self::Open,
            3 => Self::Update,
            4 => Self::HoldTimer,
            5 => Self::Fsm,
            6 => Self::Cease,
            7 => Self::RouteRefresh,
            8 => Self::SendHoldTimer,
            _ => return None,
        })
    }
}

/// Subcodes of [`ErrorCode::MessageHeader`].
pub mod header_error {
    /// Marker is not all ones.
    pub const NOT_SYNCHRONIZED: u8 = 1;
    /// Length out of range for the type; data is the length.
    pub const BAD_LENGTH: u8 = 2;
    /// Unknown type; data is the type.
    pub const BAD_TYPE: u8 = 3;
}

/// Subcodes of [`ErrorCode::Open`].
pub mod open_error {
    /// Not explained further.
    pub const UNSPECIFIC: u8 = 0;
    /// Version is not 4; data is the largest supported version.
    pub const UNSUPPORTED_VERSION: u8 = 1;
    /// AS number is not the configured one.
    pub const BAD_PEER_AS: u8 = 2;
    /// Identifier is zero or our own.
    pub const BAD_IDENTIFIER: u8 = 3;
    /// Optional parameter that is not a capability.
    pub const UNSUPPORTED_PARAMETER: u8 = 4;
    /// Hold time 1 or 2 seconds.
    pub const UNACCEPTABLE_HOLD_TIME: u8 = 6;
    /// A capability that we require is absent.
    pub const UNSUPPORTED_CAPABILITY: u8 = 7;
    /// Roles do not fit (RFC 9234).
    pub const ROLE_MISMATCH: u8 = 11;
}

/// Subcodes of [`ErrorCode::Update`].
pub mod update_error {
    /// Attribute list cannot be walked.
    pub const MALFORMED_ATTRIBUTE_LIST: u8 = 1;
    /// Well-known attribute that we do not know.
    pub const UNRECOGNIZED_WELL_KNOWN: u8 = 2;
    /// Mandatory attribute absent.
    pub const MISSING_WELL_KNOWN: u8 = 3;
    /// Flags conflict with the type.
    pub const ATTRIBUTE_FLAGS: u8 = 4;
    /// Length conflicts with the type.
    pub const ATTRIBUTE_LENGTH: u8 = 5;
    /// ORIGIN value.
    pub const INVALID_ORIGIN: u8 = 6;
    /// NEXT_HOP value.
    pub const INVALID_NEXT_HOP: u8 = 8;
    /// Optional attribute's value.
    pub const OPTIONAL_ATTRIBUTE: u8 = 9;
    /// NLRI cannot be read.
    pub const INVALID_NETWORK: u8 = 10;
    /// AS_PATH.
    pub const MALFORMED_AS_PATH: u8 = 11;
}

/// Subcodes of [`ErrorCode::Cease`] (RFC 4486, 8538, 9384).
pub mod cease {
    /// More prefixes than allowed.
    pub const MAX_PREFIXES: u8 = 1;
    /// Administrator took the session down; may carry text (RFC 9003).
    pub const ADMIN_SHUTDOWN: u8 = 2;
    /// The neighbour was removed from the configuration.
    pub const PEER_DECONFIGURED: u8 = 3;
    /// Administrator reset the session; may carry text (RFC 9003).
    pub const ADMIN_RESET: u8 = 4;
    /// Not configured or not wanted now.
    pub const CONNECTION_REJECTED: u8 = 5;
    /// Other change of configuration.
    pub const OTHER_CONFIG_CHANGE: u8 = 6;
    /// Loser of a collision (RFC 4271 §6.8).
    pub const COLLISION: u8 = 7;
    /// No memory or other resource.
    pub const OUT_OF_RESOURCES: u8 = 8;
    /// End without graceful restart; data holds the real code, subcode and data (RFC 8538).
    pub const HARD_RESET: u8 = 9;
    /// BFD saw the path fail (RFC 9384).
    pub const BFD_DOWN: u8 = 10;
}

/// Why a session ends: the body of a NOTIFICATION.
///
/// ```text
///  0                   1                   2                   3
///  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |  Error code   | Error subcode |        Data (variable)        |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Error code ([`ErrorCode`] when assigned).
    pub code: u8,
    /// Meaning depends on the code; 0 is "unspecific".
    pub subcode: u8,
    /// Meaning depends on code and subcode.
    pub data: Bytes,
}

/// RFC 9003 §2: at most 255 octets of UTF-8.
const MAX_SHUTDOWN_TEXT: usize = 255;

impl Notification {
    /// A notification without data.
    pub const fn new(code: ErrorCode, subcode: u8) -> Self {
        Self {
            code: code as u8,
            subcode,
            data: Bytes::new(),
        }
    }

    /// A notification with data.
    pub fn with_data(code: ErrorCode, subcode: u8, data: impl Into<Bytes>) -> Self {
        Self {
            code: code as u8,
            subcode,
            data: data.into(),
        }
    }

    /// A Cease (administrative shutdown or reset) with a text for the peer's operator (RFC 9003), cut
    /// at a character border to the 255 octets that fit.
    pub fn cease_with_text(subcode: u8, text: &str) -> Self {
        let mut end = text.len().min(MAX_SHUTDOWN_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let text = &text.as_bytes()[..end];
        let mut data = BytesMut::with_capacity(1 + text.len());
        data.put_u8(u8::try_from(text.len()).unwrap_or(u8::MAX));
        data.put_slice(text);
        Self::with_data(ErrorCode::Cease, subcode, data.freeze())
    }

    /// This notification wrapped in Cease/Hard Reset (RFC 8538 §3.1).
    #[must_use]
    pub fn into_hard_reset(self) -> Self {
        let mut data = BytesMut::with_capacity(2 + self.data.len());
        data.put_u8(self.code);
        data.put_u8(self.subcode);
        data.put_slice(&self.data);
        Self::with_data(ErrorCode::Cease, cease::HARD_RESET, data.freeze())
    }

    /// The code's meaning, if assigned.
    pub const fn kind(&self) -> Option<ErrorCode> {
        ErrorCode::from_u8(self.code)
    }

    /// Whether this is Cease/Hard Reset (RFC 8538): graceful restart does not apply.
    pub fn is_hard_reset(&self) -> bool {
        self.code == ErrorCode::Cease as u8 && self.subcode == cease::HARD_RESET
    }

    /// The operator's text of an administrative shutdown or reset (RFC 9003), invalid UTF-8 replaced.
    pub fn shutdown_text(&self) -> Option<String> {
        let carries = self.code == ErrorCode::Cease as u8
            && matches!(self.subcode, cease::ADMIN_SHUTDOWN | cease::ADMIN_RESET);
        let (&len, rest) = self.data.split_first()?;
        let text = rest.get(..usize::from(len))?;
        (carries && len > 0).then(|| String::from_utf8_lossy(text).into_owned())
    }

    pub(super) fn decode(body: &Bytes) -> Option<Self> {
        let (&[code, subcode], _) = body.split_first_chunk::<2>()?;
        Some(Self {
            code,
            subcode,
            data: body.slice(2..),
        })
    }
}

impl fmt::Display for Notification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.kind() {
            Some(ErrorCode::MessageHeader) => "message header error",
            Some(ErrorCode::Open) => "open error",
            Some(ErrorCode::Update) => "update error",
            Some(ErrorCode::HoldTimer) => "hold timer expired",
            Some(ErrorCode::Fsm) => "state machine error",
            Some(ErrorCode::Cease) => match self.subcode {
                cease::MAX_PREFIXES => "cease: too many prefixes",
                cease::ADMIN_SHUTDOWN => "cease: administrative shutdown",
                cease::PEER_DECONFIGURED => "cease: peer deconfigured",
                cease::ADMIN_RESET => "cease: administrative reset",
                cease::CONNECTION_REJECTED => "cease: connection rejected",
                cease::OTHER_CONFIG_CHANGE => "cease: configuration change",
                cease::COLLISION => "cease: connection collision",
                cease::OUT_OF_RESOURCES => "cease: out of resources",
                cease::HARD_RESET => "cease: hard reset",
                cease::BFD_DOWN => "cease: BFD down",
                _ => "cease",
            },
            Some(ErrorCode::RouteRefresh) => "route refresh error",
            Some(ErrorCode::SendHoldTimer) => "send hold timer expired",
            None => "unknown error",
        };
        write!(f, "{name} ({}/{})", self.code, self.subcode)?;
        if let Some(text) = self.shutdown_text() {
            write!(f, ": {text:?}")?;
        }
        Ok(())
    }
}
