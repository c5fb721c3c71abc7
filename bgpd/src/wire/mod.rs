//! BGP-4 messages on the wire: framing, decoding with validation, encoding.
//!
//! Pure functions over [`bytes`]; no sockets, no clock. Decoding never panics and never allocates more than
//! the message that it reads: prefixes stay in the received buffer ([`NlriBlock`]) and are read by iterator.
//! Decoding happens in two steps, so that each can be tested alone:
//!
//! 1. [`Framer`] cuts the stream into [`Frame`]s and checks marker, length and type (RFC 4271 §6.1);
//! 2. [`Message::decode`] reads a frame in the context of the session ([`Codec`]).
//!
//! A fault that ends the session is returned as the [`Notification`] to send. Faults that RFC 7606 lets a
//! session survive are part of the decoded [`Update`] ([`Update::treatment`], [`Update::faults`]).
//!
//! Not here: whether a message is allowed in a state (`fsm`), loops and route selection (`rib`).

mod as_path;
mod attribute;
mod attribute_decode;
mod attribute_encode;
mod capability;
mod community;
mod dump;
mod family;
mod frame;
mod message;
mod notification;
mod open;
mod pack;
mod prefix;
mod update;

pub use as_path::{AsPath, Segment, SegmentKind};
pub use attribute::{Aggregator, Attributes, NextHop, Origin, UnknownAttribute, attr};
pub use capability::{
    AddPathMode, Capability, GracefulRestart, GracefulRestartFamily, LongLivedFamily,
};
pub use community::{
    AnyCommunity, Community, CommunityParseError, ExtendedCommunity, LargeCommunity,
};
pub use dump::table_dump_attributes;
pub use family::{Family, FamilySet};
pub use frame::{Frame, Framer, HEADER_LEN, MAX_EXTENDED_LEN, MAX_LEN, MessageType};
pub use message::{Message, RefreshKind, RouteRefresh};
pub use notification::{ErrorCode, Notification, cease, header_error, open_error, update_error};
pub use open::{AS_TRANS, Codec, Negotiated, Open, PeerKind};
pub use pack::{EncodeError, Packer};
pub use prefix::{Nlri, NlriBlock, NlriError, Prefix, PrefixParseError};
pub use update::{AttributeFault, MpReach, MpUnreach, Treatment, Update};
