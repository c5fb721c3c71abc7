//! Packing routes into as few UPDATEs as fit.

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

use super::attribute::{Attributes, NextHop};
use super::attribute_encode;
use super::family::Family;
use super::frame::{HEADER_LEN, MessageType};
use super::message::{Message, finish};
use super::open::Codec;
use super::prefix::Nlri;
use super::update::Update;

/// A message cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// Something is longer than the wire allows.
    #[error("{what} is {len} octets long, only {max} fit")]
    TooLong {
        /// What.
        what: &'static str,
        /// Its size.
        len: usize,
        /// The limit.
        max: usize,
    },
}

/// MP attribute header (4), AFI/SAFI (3).
const MP_UNREACH_OVERHEAD: usize = 7;
/// The same, next hop length, longest next hop, reserved octet.
const MP_REACH_OVERHEAD: usize = 7 + 1 + 32 + 1;

/// Writes UPDATEs for sessions that share a [`Codec`].
#[derive(Clone, Copy, Debug)]
pub struct Packer {
    codec: Codec,
    /// Octets between both length fields and the end of the message.
    budget: usize,
}

impl Packer {
    /// A packer for sessions that negotiated `codec`.
    pub const fn new(codec: Codec) -> Self {
        Self {
            codec,
            budget: codec.max_message() - HEADER_LEN - 4,
        }
    }

    /// Appends UPDATEs that announce `routes` (all of `family`). Returns how many of the first routes were
    /// written: all of them, or none when attributes and one route do not fit into a message. Nothing is
    /// ever cut short.
    pub fn announce(
        &self,
        family: Family,
        attributes: &Attributes,
        next_hop: &NextHop,
        routes: &[Nlri],
        out: &mut Vec<Bytes>,
    ) -> usize {
        let classic = match next_hop {
            NextHop::V4(addr) if family == Family::IPV4_UNICAST => Some(*addr),
            _ => None,
        };
        let mut block = BytesMut::with_capacity(256);
        attribute_encode::attributes(&mut block, attributes, classic, self.codec.four_octet_as);
        let overhead = block.len()
            + if classic.is_some() {
                0
            } else {
                MP_REACH_OVERHEAD
            };
        let longest = 5 + usize::from(family.max_prefix_len() / 8);
        let Some(room) = self
            .budget
            .checked_sub(overhead)
            .filter(|room| *room >= longest)
        else {
            return 0;
        };
        self.split(family, routes, room, |nlri| {
            let mut message = start();
            message.put_u16(0);
            let at = message.len();
            message.put_u16(0);
            if classic.is_none() {
                attribute_encode::mp_reach(&mut message, family, next_hop, nlri);
            }
            message.put_slice(&block);
            patch(&mut message, at);
            if classic.is_some() {
                message.put_slice(nlri);
            }
            self.push(message, out);
        });
        routes.len()
    }

    /// Appends UPDATEs that withdraw `routes` (all of `family`).
    pub fn withdraw(&self, family: Family, routes: &[Nlri], out: &mut Vec<Bytes>) {
        if family == Family::IPV4_UNICAST {
            self.split(family, routes, self.budget, |nlri| {
                let mut message = start();
                let at = message.len();
                message.put_u16(0);
                message.put_slice(nlri);
                patch(&mut message, at);
                message.put_u16(0);
                self.push(message, out);
            });
        } else {
            self.split(family, routes, self.budget - MP_UNREACH_OVERHEAD, |nlri| {
                let mut message = start();
                message.put_u16(0);
                let at = message.len();
                message.put_u16(0);
                attribute_encode::mp_unreach(&mut message, family, nlri);
                patch(&mut message, at);
                self.push(message, out);
            });
        }
    }

    /// Appends the End-of-RIB marker of `family` (RFC 4724 §2).
    pub fn end_of_rib(&self, family: Family, out: &mut Vec<Bytes>) {
        let marker = Message::Update(Box::new(Update::end_of_rib(family)));
        out.extend(marker.encode(&self.codec));
    }

    /// What these messages are written for.
    pub const fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Calls `emit` with NLRI fields of at most `room` octets.
    fn split(&self, family: Family, routes: &[Nlri], room: usize, mut emit: impl FnMut(&[u8])) {
        let add_path = self.codec.add_path_tx.contains(family);
        let mut field = BytesMut::with_capacity(room.min(routes.len() * 21));
        for route in routes {
            if field.len() + route.wire_len(add_path) > room {
                emit(&field);
                field.clear();
            }
            route.encode(add_path, &mut field);
        }
        if !field.is_empty() {
            emit(&field);
        }
    }

    fn push(&self, message: BytesMut, out: &mut Vec<Bytes>) {
        let done = finish(message, self.codec.max_message());
        debug_assert!(done.is_ok(), "packed message exceeds its budget");
        out.extend(done);
    }
}

fn start() -> BytesMut {
    let mut message = BytesMut::with_capacity(512);
    message.put_bytes(0xff, 16);
    message.put_u16(0);
    message.put_u8(MessageType::Update as u8);
    message
}

/// Writes the length of everything after the two octets at `at`.
fn patch(message: &mut BytesMut, at: usize) {
    let len = u16::try_from(message.len() - at - 2).unwrap_or(u16::MAX);
    message[at..at + 2].copy_from_slice(&len.to_be_bytes());
}
