//! The wire: length-prefixed frames that hold one protobuf [`Envelope`] each.
//!
//! ```text
//!  0               4       5
//!  +---------------+-------+--------------------------+
//!  | length (u32)  | flags | payload (length-1 bytes) |
//!  | big endian    | bit 0 = payload is one zstd frame |
//!  +---------------+-------+--------------------------+
//! ```
//! The first frame of each direction is a hello that carries [`PROTOCOL`]. Fields are only ever added: an older
//! reader skips what it does not know (protobuf), so the two sides may be upgraded in any order. The tags below are
//! the schema; a tag is never reused.
//!
//! Everything that comes from the other side is bounded before it is allocated: the length prefix by the limit of the
//! direction, the decompressed size by [`MAX_RAW`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{
    WireType, decode_key, decode_varint, encode_key, encode_varint, encoded_len_varint,
};

/// Version of the protocol. A server refuses a client whose major version it does not speak.
pub const PROTOCOL: u32 = 1;
/// Version of the scope of a subscription: a client names it where it wants a part of the endpoints, and the server where it takes part.
/// Either side that does not know it leaves the field out, and everything is sent.
pub const SCOPE: u32 = 1;
/// Most selectors of one client, and their length together. Who needs more asks for everything.
pub const MAX_SELECTORS: usize = 4096;
/// See [`MAX_SELECTORS`].
pub const MAX_SELECTOR_BYTES: usize = 512 * 1024;
/// Largest frame that a server accepts from a client: a hello with 2,048 digests needs 17 KiB.
pub const MAX_FROM_CLIENT: usize = 64 * 1024;
/// Largest object that a server sends. etcd stops at 1.5 MiB; the embedded store does not.
pub const MAX_OBJECT: usize = 4 * 1024 * 1024;
/// Largest frame that a client accepts from a server. Batches are cut near 256 KiB; only one large object exceeds that.
pub const MAX_FROM_SERVER: usize = 8 * 1024 * 1024;
/// Largest payload after decompression.
pub const MAX_RAW: usize = 8 * 1024 * 1024;
/// Largest sum of the messages of one frame that are no objects: 2,048 stale buckets need 4 KiB. What these hold is decoded into
/// lists, of up to eight times the size.
pub const MAX_CONTROL: usize = 64 * 1024;
/// Most objects in one frame. Batches are cut near 256 KiB and no object is smaller than its key, so that none has as many; the smallest
/// encodings (two bytes) cannot be blown up to gigabytes.
pub const MAX_OBJECTS: usize = 65_536;
/// Payloads below this are not worth the zstd header.
const COMPRESS_FROM: usize = 256;
/// Flag of a frame whose payload is one zstd frame.
pub const FLAG_ZSTD: u8 = 1;
/// Tag of [`Body::Updates`].
const UPDATES_TAG: u32 = 4;

/// Why bytes from the other side were refused. Each closes the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The length prefix exceeds the limit of this direction.
    #[error("frame of {length} bytes exceeds the limit of {limit}")]
    Oversized {
        /// Announced length.
        length: usize,
        /// Limit of this direction.
        limit: usize,
    },
    /// A frame has at least the flag byte.
    #[error("empty frame")]
    Empty,
    /// Flags of a later protocol, or a compressed frame where none is allowed.
    #[error("frame flags {0:#04x} are not allowed here")]
    Flags(u8),
    /// zstd refused the payload, or it would grow beyond [`MAX_RAW`].
    #[error("payload cannot be decompressed: {0}")]
    Compression(String),
    /// protobuf refused the payload.
    #[error("payload is not a message: {0}")]
    Encoding(String),
    /// See [`MAX_OBJECTS`].
    #[error("more than {MAX_OBJECTS} objects in one frame, or groups")]
    TooMany,
    /// See [`MAX_CONTROL`].
    #[error("more than {MAX_CONTROL} bytes of messages other than objects in one frame")]
    Control,
    /// The envelope holds nothing that this version knows.
    #[error("message of an unknown type")]
    UnknownMessage,
}

/// One frame's content.
#[derive(Clone, PartialEq, Message)]
pub struct Envelope {
    /// The message.
    #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
    pub body: Option<Body>,
}

/// The messages of the protocol.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Body {
    /// Client's first frame.
    #[prost(message, tag = "1")]
    ClientHello(ClientHello),
    /// Server's first frame.
    #[prost(message, tag = "2")]
    ServerHello(ServerHello),
    /// What follows is a snapshot of some buckets of the key space.
    #[prost(message, tag = "3")]
    SyncStart(SyncStart),
    /// Objects and deletions.
    #[prost(message, tag = "4")]
    Updates(Updates),
    /// Everything announced by the last `SyncStart` has been sent: what was not seen in these buckets is gone.
    #[prost(message, tag = "5")]
    SyncDone(SyncDone),
    /// Server asks whether the client lives.
    #[prost(message, tag = "6")]
    Ping(Ping),
    /// Client's answer.
    #[prost(message, tag = "7")]
    Pong(Pong),
    /// Last frame before a deliberate close.
    #[prost(message, tag = "8")]
    Goodbye(Goodbye),
    /// Client asks for other endpoints than before; only where both sides said that they know it ([`SCOPE`]).
    #[prost(message, tag = "9")]
    ScopeChange(ScopeChange),
    /// What follows is every endpoint that the client asks for: what of endpoints is not seen until `ScopeDone` is not asked for.
    #[prost(message, tag = "10")]
    ScopeStart(ScopeStart),
    /// All that a `ScopeChange` asked for has been sent.
    #[prost(message, tag = "11")]
    ScopeDone(ScopeDone),
}

/// Who the client is, what it wants, and what it already has.
#[derive(Clone, PartialEq, Message)]
pub struct ClientHello {
    /// [`PROTOCOL`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// Node name of the client, for people.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Program and version, for people.
    #[prost(string, tag = "3")]
    pub info: String,
    /// The subscription.
    #[prost(message, optional, tag = "4")]
    pub interest: Option<Interest>,
    /// Digests of what the client holds; absent for a client that holds nothing.
    #[prost(message, optional, tag = "5")]
    pub resume: Option<ResumeToken>,
}

/// What a client wants to receive.
#[derive(Clone, PartialEq, Message)]
pub struct Interest {
    /// Kind names (`IPPool`).
    #[prost(string, repeated, tag = "1")]
    pub kinds: Vec<String>,
    /// Which part of the workload endpoints; all of them without it.
    #[prost(message, optional, tag = "2")]
    pub scope: Option<Scope>,
}

/// The endpoints of a node, and what `ScopeChange` adds. The first of these follows the server's hello, and the server sends nothing
/// before it.
#[derive(Clone, PartialEq, Message)]
pub struct Scope {
    /// [`SCOPE`].
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Endpoints of this node are asked for.
    #[prost(string, tag = "2")]
    pub node: String,
}

/// Other selectors. A long list comes in several of them, of which all but the last have `more`.
#[derive(Clone, PartialEq, Message)]
pub struct ScopeChange {
    /// Number of what is asked for now; grows.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Selectors of endpoints, in their canonical form.
    #[prost(string, repeated, tag = "2")]
    pub add: Vec<String>,
    /// Selectors that are asked for no longer.
    #[prost(string, repeated, tag = "3")]
    pub remove: Vec<String>,
    /// The change goes on.
    #[prost(bool, tag = "4")]
    pub more: bool,
}

/// See [`Body::ScopeStart`].
#[derive(Clone, PartialEq, Message)]
pub struct ScopeStart {}

/// See [`Body::ScopeDone`].
#[derive(Clone, PartialEq, Message)]
pub struct ScopeDone {
    /// Of the last change that is done; so are those before it.
    #[prost(uint64, tag = "1")]
    pub id: u64,
}

/// Digests of key and revision, bucket by bucket (see [`crate::digest`]). Any server can answer it: it
/// names no connection and no server-side generation.
#[derive(Clone, PartialEq, Message)]
pub struct ResumeToken {
    /// How the digests were computed; another value than the server's means a full snapshot.
    #[prost(uint32, tag = "1")]
    pub digest_version: u32,
    /// One digest for each bucket; the length is a power of two.
    #[prost(fixed64, repeated, tag = "2")]
    pub digests: Vec<u64>,
}

/// Server's answer to a client that it accepts.
#[derive(Clone, PartialEq, Message)]
pub struct ServerHello {
    /// [`PROTOCOL`].
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    /// Program and version, for people.
    #[prost(string, tag = "2")]
    pub info: String,
    /// Kinds of the subscription that this server does not know and will not send.
    #[prost(string, repeated, tag = "3")]
    pub unknown_kinds: Vec<String>,
    /// A silent server is dead after three of these.
    #[prost(uint32, tag = "4")]
    pub ping_interval_secs: u32,
    /// [`SCOPE`] where the client's is taken up; zero otherwise: everything is sent.
    #[prost(uint32, tag = "5")]
    pub scope: u32,
}

/// Start of a snapshot: which part of the key space it covers.
#[derive(Clone, PartialEq, Message)]
pub struct SyncStart {
    /// Number of buckets that the key space is divided into (a power of two).
    #[prost(uint32, tag = "1")]
    pub buckets: u32,
    /// The buckets that differ and are sent; all of them when the client sent no usable token.
    #[prost(uint32, repeated, tag = "2")]
    pub stale: Vec<u32>,
    /// Every bucket is sent.
    #[prost(bool, tag = "3")]
    pub full: bool,
}

/// Objects and deletions, each already encoded (see [`encode_object`]).
#[derive(Clone, PartialEq, Message)]
pub struct Updates {
    /// In the order in which they are to be applied.
    #[prost(message, repeated, tag = "1")]
    pub objects: Vec<Object>,
}

/// One object, or its deletion.
#[derive(Clone, PartialEq, Message)]
pub struct Object {
    /// Kind name.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// Empty for cluster-wide kinds.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Object name.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Opaque.
    #[prost(string, tag = "4")]
    pub revision: String,
    /// The object as JSON; absent means deleted.
    #[prost(bytes = "bytes", optional, tag = "5")]
    pub json: Option<Bytes>,
}

/// End of the snapshot.
#[derive(Clone, PartialEq, Message)]
pub struct SyncDone {
    /// As [`ScopeDone::id`], for a client with a scope.
    #[prost(uint64, tag = "1")]
    pub scope: u64,
}

/// See [`Body::Ping`].
#[derive(Clone, PartialEq, Message)]
pub struct Ping {
    /// Returned unchanged.
    #[prost(uint64, tag = "1")]
    pub id: u64,
}

/// See [`Body::Pong`].
#[derive(Clone, PartialEq, Message)]
pub struct Pong {
    /// From the ping.
    #[prost(uint64, tag = "1")]
    pub id: u64,
}

/// Why the sender closes.
#[derive(Clone, PartialEq, Message)]
pub struct Goodbye {
    /// For logs.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// The client should go to another server for a while.
    #[prost(bool, tag = "2")]
    pub elsewhere: bool,
}

/// Encodes one object as the `Updates.objects` field that it will be in every batch: tag, length, message. Batches
/// are then made by concatenation, so that an object is encoded once however often it is sent.
pub fn encode_object(object: &Object) -> Bytes {
    let len = object.encoded_len();
    let mut out = BytesMut::with_capacity(len + 6);
    encode_key(1, WireType::LengthDelimited, &mut out);
    encode_varint(len as u64, &mut out);
    object.encode_raw(&mut out);
    out.freeze()
}

/// One frame with the given pre-encoded objects.
pub fn frame_updates<'a>(objects: impl Iterator<Item = &'a Bytes> + Clone) -> Bytes {
    let len: usize = objects.clone().map(Bytes::len).sum();
    let mut payload = Vec::with_capacity(len + 8);
    encode_key(UPDATES_TAG, WireType::LengthDelimited, &mut payload);
    encode_varint(len as u64, &mut payload);
    debug_assert!(payload.len() == 1 + encoded_len_varint(len as u64));
    for object in objects {
        payload.put_slice(object);
    }
    frame_payload(&payload, true)
}

impl Body {
    /// The message's name, for logs and close reasons.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ClientHello(_) => "ClientHello",
            Self::ServerHello(_) => "ServerHello",
            Self::SyncStart(_) => "SyncStart",
            Self::Updates(_) => "Updates",
            Self::SyncDone(_) => "SyncDone",
            Self::Ping(_) => "Ping",
            Self::Pong(_) => "Pong",
            Self::Goodbye(_) => "Goodbye",
            Self::ScopeChange(_) => "ScopeChange",
            Self::ScopeStart(_) => "ScopeStart",
            Self::ScopeDone(_) => "ScopeDone",
        }
    }
}

/// One frame with one message.
pub fn frame(body: Body, compress: bool) -> Bytes {
    frame_payload(&Envelope { body: Some(body) }.encode_to_vec(), compress)
}

fn frame_payload(payload: &[u8], compress: bool) -> Bytes {
    if compress && payload.len() >= COMPRESS_FROM
        // A failure of the compressor only costs bandwidth.
        && let Ok(packed) = zstd::bulk::compress(payload, 1)
        && packed.len() < payload.len()
    {
        return assemble(FLAG_ZSTD, &packed);
    }
    assemble(0, payload)
}

fn assemble(flags: u8, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(payload.len() + 5);
    out.put_u32(u32::try_from(payload.len() + 1).unwrap_or(u32::MAX));
    out.put_u8(flags);
    out.put_slice(payload);
    out.freeze()
}

/// Cuts a byte stream into messages. Holds at most one incomplete frame.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    limit: usize,
    compressed: bool,
}

impl Decoder {
    /// For what a server reads. Compressed frames are refused: nothing that a client says needs them, and a
    /// small frame can then not cost a large allocation.
    pub fn from_clients() -> Self {
        Self {
            buffer: BytesMut::new(),
            limit: MAX_FROM_CLIENT,
            compressed: false,
        }
    }

    /// For what a client reads.
    pub fn from_servers() -> Self {
        Self {
            buffer: BytesMut::new(),
            limit: MAX_FROM_SERVER,
            compressed: true,
        }
    }

    /// Takes bytes from the connection.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that wait for the rest of their frame.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// The next complete message.
    pub fn next_message(&mut self) -> Result<Option<Body>, WireError> {
        if self.buffer.len() < 4 {
            return Ok(None);
        }
        let length = u32::from_be_bytes([
            self.buffer[0],
            self.buffer[1],
            self.buffer[2],
            self.buffer[3],
        ]) as usize;
        if length > self.limit {
            return Err(WireError::Oversized {
                length,
                limit: self.limit,
            });
        }
        if length == 0 {
            return Err(WireError::Empty);
        }
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        self.buffer.advance(4);
        let mut frame = self.buffer.split_to(length).freeze();
        let payload = match frame.get_u8() {
            0 => frame,
            FLAG_ZSTD if self.compressed => Bytes::from(
                zstd::bulk::decompress(&frame, decompressed_size(&frame)?)
                    .map_err(|e| WireError::Compression(e.to_string()))?,
            ),
            flags => return Err(WireError::Flags(flags)),
        };
        if self.compressed {
            affordable(&payload)?;
        }
        let envelope = Envelope::decode(payload).map_err(|e| WireError::Encoding(e.to_string()))?;
        envelope.body.map(Some).ok_or(WireError::UnknownMessage)
    }
}

/// Counts what a payload holds without decoding it. Where this walk ends early, decoding ends at the same place, but for groups,
/// which the protocol has not: they are refused.
fn affordable(payload: &[u8]) -> Result<(), WireError> {
    let (mut objects, mut control) = (0, 0);
    let mut rest = payload;
    while let Some((tag, body, after)) = next_field(rest) {
        rest = after;
        if tag != UPDATES_TAG {
            control += body.len();
            if control > MAX_CONTROL {
                return Err(WireError::Control);
            }
            continue;
        }
        let mut fields = body;
        while let Some((_, _, after)) = next_field(fields) {
            fields = after;
            objects += 1;
        }
        if objects > MAX_OBJECTS || starts_group(fields) {
            return Err(WireError::TooMany);
        }
    }
    if starts_group(rest) {
        return Err(WireError::TooMany);
    }
    Ok(())
}

/// A text of the other side as it may stand in a line of a log: short, and without control characters.
pub(crate) fn for_logs(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    let mut out = String::new();
    for c in text.chars().take(MAX_CHARS) {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    if text.chars().nth(MAX_CHARS).is_some() {
        out.push('…');
    }
    out
}

fn starts_group(mut bytes: &[u8]) -> bool {
    matches!(
        decode_key(&mut bytes),
        Ok((_, WireType::StartGroup | WireType::EndGroup))
    )
}

/// The first field: tag, content where it is length-delimited, and what follows.
fn next_field(mut bytes: &[u8]) -> Option<(u32, &[u8], &[u8])> {
    let (tag, wire_type) = decode_key(&mut bytes).ok()?;
    let length = match wire_type {
        WireType::Varint => {
            decode_varint(&mut bytes).ok()?;
            0
        }
        WireType::SixtyFourBit => 8,
        WireType::ThirtyTwoBit => 4,
        WireType::LengthDelimited => usize::try_from(decode_varint(&mut bytes).ok()?).ok()?,
        WireType::StartGroup | WireType::EndGroup => return None,
    };
    let (body, after) = bytes.split_at_checked(length)?;
    Some((tag, body, after))
}

/// The size that the zstd header promises, bounded, so that the allocation is right and cannot be large.
fn decompressed_size(frame: &[u8]) -> Result<usize, WireError> {
    let promised = zstd::zstd_safe::get_frame_content_size(frame)
        .map_err(|e| WireError::Compression(e.to_string()))?
        .ok_or_else(|| WireError::Compression("no content size in the header".into()))?;
    usize::try_from(promised)
        .ok()
        .filter(|size| *size <= MAX_RAW)
        .ok_or_else(|| {
            WireError::Compression(format!("{promised} bytes exceed the limit of {MAX_RAW}"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode_all(
        decoder: &mut Decoder,
        bytes: &[u8],
        step: usize,
    ) -> Result<Vec<Body>, WireError> {
        let mut out = Vec::new();
        for chunk in bytes.chunks(step) {
            decoder.push(chunk);
            while let Some(body) = decoder.next_message()? {
                out.push(body);
            }
        }
        Ok(out)
    }

    fn object(name: &str, size: usize) -> Object {
        Object {
            kind: "Node".into(),
            namespace: String::new(),
            name: name.into(),
            revision: "7".into(),
            json: Some(Bytes::from(vec![b'x'; size])),
        }
    }

    #[test]
    fn concatenated_objects_decode_as_one_batch_at_any_split() {
        let objects = [
            object("a", 10),
            object("b", 5000),
            Object {
                json: None,
                ..object("c", 0)
            },
        ];
        let encoded: Vec<Bytes> = objects.iter().map(encode_object).collect();
        let bytes = frame_updates(encoded.iter());
        for step in [1, 3, 7, 4096] {
            let got = decode_all(&mut Decoder::from_servers(), &bytes, step).unwrap();
            assert_eq!(
                got,
                vec![Body::Updates(Updates {
                    objects: objects.to_vec()
                })],
                "step {step}"
            );
        }
    }

    #[test]
    fn oversized_frame_is_refused_from_its_length_alone() {
        let mut decoder = Decoder::from_clients();
        decoder.push(&u32::try_from(MAX_FROM_CLIENT + 1).unwrap().to_be_bytes());
        assert_eq!(
            decoder.next_message(),
            Err(WireError::Oversized {
                length: MAX_FROM_CLIENT + 1,
                limit: MAX_FROM_CLIENT
            })
        );
    }

    #[test]
    fn compressed_frame_from_a_client_is_refused() {
        let bytes = frame_updates([encode_object(&object("a", 5000))].iter());
        assert_eq!(
            decode_all(&mut Decoder::from_clients(), &bytes, 4096),
            Err(WireError::Flags(FLAG_ZSTD))
        );
    }

    #[test]
    fn decompression_bomb_is_refused_before_it_is_unpacked() {
        let bomb = zstd::bulk::compress(&vec![0u8; MAX_RAW + 1], 1).unwrap();
        let got = decode_all(
            &mut Decoder::from_servers(),
            &assemble(FLAG_ZSTD, &bomb),
            4096,
        );
        assert!(matches!(got, Err(WireError::Compression(_))), "{got:?}");
    }

    #[test]
    fn millions_of_empty_objects_are_refused_before_they_are_decoded() {
        let bytes = |objects: usize, before: &[u8]| {
            let inner = [0x0a, 0].repeat(objects);
            let mut payload = before.to_vec();
            encode_key(UPDATES_TAG, WireType::LengthDelimited, &mut payload);
            encode_varint(inner.len() as u64, &mut payload);
            payload.extend(inner);
            frame_payload(&payload, true)
        };
        let decode = |bytes: &[u8]| decode_all(&mut Decoder::from_servers(), bytes, 4096);
        // A field of a later version, a number, stands before it or not.
        for before in [
            &[][..],
            &[0x78, 1],
            &[0x7d, 1, 2, 3, 4],
            &[0x79, 1, 2, 3, 4, 5, 6, 7, 8],
        ] {
            assert!(decode(&bytes(MAX_OBJECTS, before)).is_ok());
            for objects in [MAX_OBJECTS + 1, 300_000] {
                assert_eq!(decode(&bytes(objects, before)), Err(WireError::TooMany));
            }
        }
        let group = bytes(300_000, &[0x7b, 0x7c]);
        assert_eq!(decode(&group), Err(WireError::TooMany));
    }

    #[test]
    fn messages_that_are_no_objects_are_small_also_when_they_come_in_pieces() {
        let stale = |count: u32| {
            let start = SyncStart {
                stale: (0..count).map(|n| n % 100).collect(),
                ..SyncStart::default()
            };
            Envelope {
                body: Some(Body::SyncStart(start)),
            }
            .encode_to_vec()
        };
        let decode = |payload: &[u8]| {
            decode_all(
                &mut Decoder::from_servers(),
                &frame_payload(payload, true),
                4096,
            )
        };
        assert!(decode(&stale(2048)).is_ok());
        assert_eq!(decode(&stale(1_000_000)), Err(WireError::Control));
        // protobuf joins what comes in several fields.
        assert_eq!(decode(&stale(2048).repeat(100)), Err(WireError::Control));
    }

    #[test]
    fn texts_of_the_other_side_are_short_and_one_line_in_logs() {
        assert_eq!(for_logs("shutting down"), "shutting down");
        assert_eq!(for_logs("a\nERROR b\u{1b}[31mü"), "a\\nERROR b\\u{1b}[31mü");
        assert_eq!(for_logs(&"ü".repeat(1000)).chars().count(), 201);
    }

    proptest::proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
            // A small length prefix makes sure that payloads are reached.
            let framed = assemble(bytes.first().copied().unwrap_or(0) & 1, &bytes);
            let _ = decode_all(&mut Decoder::from_servers(), &framed, 64);
            let _ = decode_all(&mut Decoder::from_servers(), &bytes, 64);
            let _ = decode_all(&mut Decoder::from_clients(), &bytes, 64);
        }
    }
}
