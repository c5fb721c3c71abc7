//! Netlink framing: an append-only writer with nested attributes, and borrowed readers for messages and attributes.
//!
//! Layout (`include/uapi/linux/netlink.h`): a message is `nlmsghdr` (16 bytes: length u32, type u16, flags u16,
//! sequence u32, port u32), a protocol header, then attributes (`nlattr`: length u16, type u16, payload), all aligned
//! to 4 bytes. Integers are host-endian except where nf_tables says otherwise.

use std::net::IpAddr;

pub(crate) const HEADER: usize = 16;

pub(crate) const NLM_F_REQUEST: u16 = 0x001;
pub(crate) const NLM_F_ACK: u16 = 0x004;
pub(crate) const NLM_F_DUMP_INTR: u16 = 0x010;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
pub(crate) const NLM_F_DUMP: u16 = 0x300;

pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_DONE: u16 = 3;
pub(crate) const NLMSG_NOOP: u16 = 1;
pub(crate) const NLMSG_OVERRUN: u16 = 4;

/// The payload was capped (`NETLINK_CAP_ACK`) and the extended acknowledgement follows the inner header.
pub(crate) const NLM_F_CAPPED: u16 = 0x100;
pub(crate) const NLM_F_ACK_TLVS: u16 = 0x200;

pub(crate) const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

const fn align(len: usize) -> usize {
    (len + 3) & !3
}

/// Appends messages to one buffer. The header's length is patched when the message is ended.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    buffer: Vec<u8>,
    message: usize,
}

/// An attribute that is being written; end it with [`Writer::end`].
#[must_use]
pub(crate) struct Nest(usize);

impl Writer {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            buffer: Vec::with_capacity(capacity),
            message: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.buffer.len()
    }

    pub(crate) fn clear(&mut self) {
        self.buffer.clear();
        self.message = 0;
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.buffer
    }

    /// Starts a message; the port is left to the kernel.
    pub(crate) fn begin(&mut self, kind: u16, flags: u16, sequence: u32) {
        debug_assert_eq!(self.buffer.len() % 4, 0, "the message before is padded");
        self.message = self.buffer.len();
        self.buffer.extend_from_slice(&[0; 4]);
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(&flags.to_ne_bytes());
        self.buffer.extend_from_slice(&sequence.to_ne_bytes());
        self.buffer.extend_from_slice(&[0; 4]);
    }

    /// Ends the message.
    pub(crate) fn finish(&mut self) {
        let len = (self.buffer.len() - self.message) as u32;
        self.buffer[self.message..self.message + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Numbers the message that begins at `at`.
    pub(crate) fn set_sequence(&mut self, at: usize, sequence: u32) {
        self.buffer[at + 8..at + 12].copy_from_slice(&sequence.to_ne_bytes());
    }

    /// Takes a flag off the message that starts at `at`.
    pub(crate) fn clear_flag(&mut self, at: usize, flag: u16) {
        let flags = u16::from_ne_bytes([self.buffer[at + 6], self.buffer[at + 7]]) & !flag;
        self.buffer[at + 6..at + 8].copy_from_slice(&flags.to_ne_bytes());
    }

    /// Raw bytes of a protocol header; its length is a multiple of 4.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.buffer.resize(align(self.buffer.len()), 0);
    }

    /// One attribute. Payloads beyond the 16-bit length are a programming error of the caller, who splits.
    pub(crate) fn attr(&mut self, kind: u16, payload: &[u8]) {
        let len = payload.len() + 4;
        debug_assert!(len <= usize::from(u16::MAX));
        self.buffer.extend_from_slice(&(len as u16).to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(payload);
        self.pad();
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) {
        self.attr(kind, &[value]);
    }

    pub(crate) fn u16(&mut self, kind: u16, value: u16) {
        self.attr(kind, &value.to_ne_bytes());
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_ne_bytes());
    }

    pub(crate) fn be16(&mut self, kind: u16, value: u16) {
        self.attr(kind, &value.to_be_bytes());
    }

    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }

    pub(crate) fn be64(&mut self, kind: u16, value: u64) {
        self.attr(kind, &value.to_be_bytes());
    }

    /// Text with its terminating NUL.
    pub(crate) fn text(&mut self, kind: u16, text: &str) {
        let len = text.len() + 5;
        self.buffer.extend_from_slice(&(len as u16).to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(text.as_bytes());
        self.buffer.push(0);
        self.pad();
    }

    pub(crate) fn ip(&mut self, kind: u16, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.attr(kind, &address.octets()),
            IpAddr::V6(address) => self.attr(kind, &address.octets()),
        }
    }

    /// Starts an attribute that holds attributes (`NLA_F_NESTED` set).
    pub(crate) fn nest(&mut self, kind: u16) -> Nest {
        self.nest_plain(kind | NLA_F_NESTED)
    }

    /// Starts an attribute that holds attributes, without the flag.
    pub(crate) fn nest_plain(&mut self, kind: u16) -> Nest {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&[0; 2]);
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        Nest(start)
    }

    pub(crate) fn end(&mut self, nest: Nest) {
        let len = self.buffer.len() - nest.0;
        debug_assert!(
            len <= usize::from(u16::MAX),
            "nested attribute too long: {len}"
        );
        self.buffer[nest.0..nest.0 + 2].copy_from_slice(&(len as u16).to_ne_bytes());
    }

    /// Bytes written since the nest was started, its header included.
    pub(crate) fn nest_len(&self, nest: &Nest) -> usize {
        self.buffer.len() - nest.0
    }
}

/// One received message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) port: u32,
    /// All bytes after the header.
    pub(crate) payload: &'a [u8],
}

/// The messages of one datagram; stops at the first that is cut short.
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let len = read_u32(self.0, 0)? as usize;
        if len < HEADER || len > self.0.len() {
            return None;
        }
        let bytes = &self.0[..len];
        let message = Message {
            kind: read_u16(bytes, 4)?,
            flags: read_u16(bytes, 6)?,
            sequence: read_u32(bytes, 8)?,
            port: read_u32(bytes, 12)?,
            payload: &bytes[HEADER..],
        };
        self.0 = self.0.get(align(len)..).unwrap_or(&[]);
        Some(message)
    }
}

/// One attribute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attr<'a> {
    pub(crate) kind: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Attr<'a> {
    pub(crate) fn nested(self) -> Attrs<'a> {
        Attrs(self.payload)
    }

    pub(crate) fn get_u8(self) -> Option<u8> {
        self.payload.first().copied()
    }

    pub(crate) fn get_u16(self) -> Option<u16> {
        read_u16(self.payload, 0)
    }

    pub(crate) fn get_u32(self) -> Option<u32> {
        read_u32(self.payload, 0)
    }

    pub(crate) fn get_be16(self) -> Option<u16> {
        self.get_u16().map(u16::from_be)
    }

    pub(crate) fn get_be32(self) -> Option<u32> {
        self.get_u32().map(u32::from_be)
    }

    pub(crate) fn get_be64(self) -> Option<u64> {
        Some(u64::from_be_bytes(self.payload.get(..8)?.try_into().ok()?))
    }

    /// Text up to the first NUL; invalid UTF-8 is replaced.
    pub(crate) fn get_text(self) -> String {
        let end = self
            .payload
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.payload.len());
        String::from_utf8_lossy(&self.payload[..end]).into_owned()
    }

    pub(crate) fn get_ip(self) -> Option<IpAddr> {
        if let Ok(v4) = <[u8; 4]>::try_from(self.payload) {
            return Some(IpAddr::from(v4));
        }
        <[u8; 16]>::try_from(self.payload).ok().map(IpAddr::from)
    }
}

/// The attributes of a message or nest; stops at the first that is cut short.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attrs<'a>(pub(crate) &'a [u8]);

impl<'a> Attrs<'a> {
    /// The attributes after a protocol header of `header` bytes.
    pub(crate) fn after(payload: &'a [u8], header: usize) -> Self {
        Self(payload.get(align(header)..).unwrap_or(&[]))
    }

    pub(crate) fn find(mut self, kind: u16) -> Option<Attr<'a>> {
        Iterator::find(&mut self, |attr| attr.kind == kind)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = Attr<'a>;

    fn next(&mut self) -> Option<Attr<'a>> {
        let len = usize::from(read_u16(self.0, 0)?);
        let kind = read_u16(self.0, 2)? & NLA_TYPE_MASK;
        let payload = self.0.get(4..len)?;
        self.0 = self.0.get(align(len)..).unwrap_or(&[]);
        Some(Attr { kind, payload })
    }
}

pub(crate) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nested_attributes_read_back() {
        let mut writer = Writer::default();
        writer.begin(24, NLM_F_REQUEST, 7);
        writer.raw(&[1, 2, 3, 4]);
        let nest = writer.nest(5);
        writer.u8(1, 9);
        writer.text(2, "abc");
        writer.end(nest);
        writer.be32(6, 0x0102_0304);
        writer.finish();
        let message = Messages(writer.as_slice()).next().unwrap();
        assert_eq!((message.kind, message.sequence), (24, 7));
        let attrs = Attrs::after(message.payload, 4);
        let inner = attrs.find(5).unwrap().nested();
        assert_eq!(inner.find(1).unwrap().get_u8(), Some(9));
        assert_eq!(inner.find(2).unwrap().get_text(), "abc");
        assert_eq!(attrs.find(6).unwrap().get_be32(), Some(0x0102_0304));
    }

    proptest! {
        #[test]
        fn readers_stand_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in Messages(&bytes) {
                for attr in Attrs::after(message.payload, 4) {
                    let _ = (attr.get_text(), attr.get_be64(), attr.nested().count());
                }
            }
        }
    }
}
