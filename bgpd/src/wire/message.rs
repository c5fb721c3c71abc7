//! The five messages as one type.

use bytes::{BufMut, Bytes, BytesMut};

use super::family::Family;
use super::frame::{Frame, HEADER_LEN, MAX_LEN, MessageType};
use super::notification::{ErrorCode, Notification};
use super::open::{Codec, Open};
use super::pack::EncodeError;
use super::update::Update;

/// Subtype of ROUTE-REFRESH (RFC 7313 §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefreshKind {
    /// Please send everything again.
    Request,
    /// BoRR: what follows replaces all that was sent before.
    Begin,
    /// EoRR: what was not repeated since BoRR is gone.
    End,
    /// To be ignored.
    Unknown(u8),
}

/// ROUTE-REFRESH.
///
/// ```text
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |              AFI              |    Subtype    |      SAFI     |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RouteRefresh {
    /// Which table.
    pub family: Family,
    /// What about it.
    pub kind: RefreshKind,
}

/// Any BGP message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// OPEN.
    Open(Open),
    /// UPDATE.
    Update(Box<Update>),
    /// NOTIFICATION.
    Notification(Notification),
    /// KEEPALIVE.
    Keepalive,
    /// ROUTE-REFRESH.
    RouteRefresh(RouteRefresh),
}

impl Message {
    /// Reads a frame. The error is the NOTIFICATION that ends the session; it must not be sent in answer
    /// to a NOTIFICATION (RFC 4271 §6.4).
    pub fn decode(frame: &Frame, codec: &Codec) -> Result<Self, Notification> {
        Ok(match frame.kind {
            MessageType::Open => Self::Open(Open::decode(&frame.body)?),
            MessageType::Update => Self::Update(Box::new(Update::decode(&frame.body, codec)?)),
            MessageType::Keepalive => Self::Keepalive,
            MessageType::Notification => {
                Self::Notification(Notification::decode(&frame.body).unwrap_or(Notification {
                    code: 0,
                    subcode: 0,
                    data: frame.body.clone(),
                }))
            }
            MessageType::RouteRefresh => Self::RouteRefresh(decode_refresh(&frame.body)?),
        })
    }

    /// The whole message, header included.
    pub fn encode(&self, codec: &Codec) -> Result<Bytes, EncodeError> {
        let mut out = BytesMut::with_capacity(64);
        out.put_bytes(0xff, 16);
        out.put_u16(0);
        let mut max = codec.max_message();
        match self {
            Self::Open(open) => {
                max = MAX_LEN;
                out.put_u8(MessageType::Open as u8);
                open.encode(&mut out)?;
            }
            Self::Update(update) => {
                out.put_u8(MessageType::Update as u8);
                update.encode(codec, &mut out)?;
            }
            Self::Notification(n) => {
                out.put_u8(MessageType::Notification as u8);
                out.put_u8(n.code);
                out.put_u8(n.subcode);
                out.put_slice(&n.data);
            }
            Self::Keepalive => out.put_u8(MessageType::Keepalive as u8),
            Self::RouteRefresh(refresh) => {
                out.put_u8(MessageType::RouteRefresh as u8);
                out.put_u16(refresh.family.afi);
                out.put_u8(match refresh.kind {
                    RefreshKind::Request => 0,
                    RefreshKind::Begin => 1,
                    RefreshKind::End => 2,
                    RefreshKind::Unknown(value) => value,
                });
                out.put_u8(refresh.family.safi);
            }
        }
        finish(out, max)
    }
}

/// Fills in the length of a message whose header has been started.
pub(super) fn finish(mut message: BytesMut, max: usize) -> Result<Bytes, EncodeError> {
    let len = message.len();
    match u16::try_from(len) {
        Ok(field) if len <= max => {
            message[16..18].copy_from_slice(&field.to_be_bytes());
            Ok(message.freeze())
        }
        _ => Err(EncodeError::TooLong {
            what: "message",
            len,
            max,
        }),
    }
}

fn decode_refresh(body: &Bytes) -> Result<RouteRefresh, Notification> {
    let &[afi_high, afi_low, subtype, safi] = &body[..] else {
        // RFC 7313 §5: the data is the whole message; ORF (RFC 5291) is never negotiated.
        let mut data = BytesMut::with_capacity(HEADER_LEN + body.len());
        data.put_bytes(0xff, 16);
        data.put_u16(u16::try_from(HEADER_LEN + body.len()).unwrap_or(u16::MAX));
        data.put_u8(MessageType::RouteRefresh as u8);
        data.put_slice(body);
        return Err(Notification::with_data(
            ErrorCode::RouteRefresh,
            1,
            data.freeze(),
        ));
    };
    let kind = match subtype {
        0 => RefreshKind::Request,
        1 => RefreshKind::Begin,
        2 => RefreshKind::End,
        other => RefreshKind::Unknown(other),
    };
    let family = Family {
        afi: u16::from_be_bytes([afi_high, afi_low]),
        safi,
    };
    Ok(RouteRefresh { family, kind })
}
