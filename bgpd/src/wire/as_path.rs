//! AS_PATH (RFC 4271 §4.3 b, RFC 5065, RFC 6793).

use std::fmt;

use bytes::{BufMut, BytesMut};

use super::open::AS_TRANS;

/// Kind of an AS_PATH segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SegmentKind {
    /// Unordered set.
    Set = 1,
    /// Ordered sequence.
    Sequence = 2,
    /// Sequence inside a confederation.
    ConfedSequence = 3,
    /// Set inside a confederation.
    ConfedSet = 4,
}

impl SegmentKind {
    const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Set,
            2 => Self::Sequence,
            3 => Self::ConfedSequence,
            4 => Self::ConfedSet,
            _ => return None,
        })
    }

    const fn is_confed(self) -> bool {
        matches!(self, Self::ConfedSequence | Self::ConfedSet)
    }
}

/// One segment, borrowed from an [`AsPath`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Kind.
    pub kind: SegmentKind,
    raw: &'a [u8],
}

impl<'a> Segment<'a> {
    /// AS numbers in order.
    pub fn asns(&self) -> impl DoubleEndedIterator<Item = u32> + use<'a> {
        self.raw
            .chunks_exact(4)
            .map(|c| u32::from_be_bytes([c[0], c[1], c[2], c[3]]))
    }

    /// Number of AS numbers.
    #[expect(clippy::len_without_is_empty, reason = "a segment is never empty")]
    pub const fn len(&self) -> usize {
        self.raw.len() / 4
    }
}

/// An AS path, always kept in the four-octet wire form and always well formed.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct AsPath(Box<[u8]>);

impl AsPath {
    /// The empty path of a route that starts here.
    pub fn empty() -> Self {
        Self::default()
    }

    /// One sequence, split as often as 255 AS numbers per segment need.
    pub fn from_sequence(asns: &[u32]) -> Self {
        let mut out = BytesMut::with_capacity(2 + asns.len() * 4);
        for chunk in asns.chunks(255) {
            put_segment(&mut out, SegmentKind::Sequence, chunk.iter().copied());
        }
        Self(out[..].into())
    }

    /// Reads the attribute. `None` when malformed (RFC 7606 §7.2): unknown kind, empty segment, overrun,
    /// or AS 0 (RFC 7607).
    pub fn decode(value: &[u8], four_octet: bool) -> Option<Self> {
        let width = if four_octet { 4 } else { 2 };
        let mut out = BytesMut::with_capacity(value.len() * 4 / width);
        let mut rest = value;
        while let Some((head, tail)) = rest.split_first_chunk::<2>() {
            SegmentKind::from_u8(head[0])?;
            let count = usize::from(head[1]);
            let (numbers, tail) = tail.split_at_checked(count * width)?;
            if count == 0 {
                return None;
            }
            out.put_slice(head);
            for number in numbers.chunks_exact(width) {
                let asn = number.iter().fold(0u32, |n, b| n << 8 | u32::from(*b));
                if asn == 0 {
                    return None;
                }
                out.put_u32(asn);
            }
            rest = tail;
        }
        rest.is_empty().then(|| Self(out[..].into()))
    }

    /// The four-octet wire form.
    pub const fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The two-octet wire form: numbers that do not fit become AS_TRANS.
    pub fn to_two_octet(&self) -> BytesMut {
        let mut out = BytesMut::with_capacity(self.0.len());
        for segment in self.segments() {
            out.put_u8(segment.kind as u8);
            out.put_u8(segment.len() as u8);
            for asn in segment.asns() {
                out.put_u16(u16::try_from(asn).unwrap_or(AS_TRANS as u16));
            }
        }
        out
    }

    /// Whether some number needs four octets.
    pub fn needs_four_octets(&self) -> bool {
        self.asns().any(|asn| asn > u32::from(u16::MAX))
    }

    /// Segments in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (head, tail) = rest.split_first_chunk::<2>()?;
            let (raw, tail) = tail.split_at_checked(usize::from(head[1]) * 4)?;
            rest = tail;
            Some(Segment {
                kind: SegmentKind::from_u8(head[0])?,
                raw,
            })
        })
    }

    /// Every number of every segment.
    pub fn asns(&self) -> impl Iterator<Item = u32> + '_ {
        self.segments().flat_map(|s| s.asns())
    }

    /// Length for route selection: a set counts 1 (RFC 4271 §9.1.2.2 a), confederation segments 0 (RFC 5065 §5.3).
    pub fn hops(&self) -> usize {
        self.segments()
            .map(|s| match s.kind {
                SegmentKind::Sequence => s.len(),
                SegmentKind::Set => 1,
                SegmentKind::ConfedSequence | SegmentKind::ConfedSet => 0,
            })
            .sum()
    }

    /// The neighbouring AS for MED: first number of the leading sequence, skipping confederation segments;
    /// `None` for a route of our own AS, or when the path starts with a set.
    pub fn neighbor_as(&self) -> Option<u32> {
        let first = self.segments().find(|s| !s.kind.is_confed())?;
        (first.kind == SegmentKind::Sequence).then(|| first.asns().next())?
    }

    /// The AS that originated the route, if the path ends in a sequence.
    pub fn origin_as(&self) -> Option<u32> {
        let last = self.segments().last()?;
        (last.kind == SegmentKind::Sequence).then(|| last.asns().next_back())?
    }

    /// How often `asn` occurs.
    pub fn count(&self, asn: u32) -> usize {
        self.asns().filter(|a| *a == asn).count()
    }

    /// Whether the path, read as one list, starts with `numbers`.
    pub fn starts_with(&self, numbers: &[u32]) -> bool {
        let mut path = self.asns();
        numbers.iter().all(|n| path.next() == Some(*n))
    }

    /// The path with `asns` in front, in that order. Starts a new segment when the first one is full or
    /// not a sequence (RFC 4271 §5.1.2).
    #[must_use]
    pub fn prepend(&self, asns: &[u32]) -> Self {
        let mut out = BytesMut::with_capacity(self.0.len() + asns.len() * 4 + 4);
        let first = self.segments().next().filter(|s| {
            s.kind == SegmentKind::Sequence && s.len() + asns.len() <= usize::from(u8::MAX)
        });
        match first {
            Some(first) => {
                put_segment(
                    &mut out,
                    SegmentKind::Sequence,
                    asns.iter().copied().chain(first.asns()),
                );
                out.put_slice(&self.0[2 + first.raw.len()..]);
            }
            None => {
                for chunk in asns.chunks(255) {
                    put_segment(&mut out, SegmentKind::Sequence, chunk.iter().copied());
                }
                out.put_slice(&self.0);
            }
        }
        Self(out[..].into())
    }

    /// The path without confederation segments, as it leaves the confederation or goes into AS4_PATH.
    #[must_use]
    pub fn without_confed(&self) -> Self {
        let mut out = BytesMut::with_capacity(self.0.len());
        for s in self.segments().filter(|s| !s.kind.is_confed()) {
            put_segment(&mut out, s.kind, s.asns());
        }
        Self(out[..].into())
    }

    /// RFC 6793 §4.2.3: the path from a two-octet AS_PATH (`self`) and AS4_PATH. AS4_PATH is ignored when
    /// it is longer; otherwise it is preceded by what AS_PATH has more at its front.
    #[must_use]
    pub fn merge_as4(&self, as4: &Self) -> Self {
        let as4 = as4.without_confed();
        let Some(mut lead) = self.hops().checked_sub(as4.hops()) else {
            return self.clone();
        };
        if as4.0.is_empty() {
            return self.clone();
        }
        let mut out = BytesMut::with_capacity(self.0.len() + as4.0.len());
        for segment in self.segments() {
            match segment.kind {
                kind if kind.is_confed() => put_segment(&mut out, kind, segment.asns()),
                _ if lead == 0 => break,
                SegmentKind::Sequence => {
                    let take = lead.min(segment.len());
                    put_segment(&mut out, SegmentKind::Sequence, segment.asns().take(take));
                    lead -= take;
                }
                kind => {
                    put_segment(&mut out, kind, segment.asns());
                    lead -= 1;
                }
            }
        }
        join(out, &as4)
    }
}

/// Appends `tail` to the segments in `head`, joining two sequences that meet when they fit into one.
fn join(head: BytesMut, tail: &AsPath) -> AsPath {
    let head = AsPath(head[..].into());
    let Some(last) = head
        .segments()
        .last()
        .filter(|s| s.kind == SegmentKind::Sequence)
    else {
        return AsPath([&head.0[..], &tail.0[..]].concat().into());
    };
    let asns: Vec<u32> = last.asns().collect();
    let keep = head.0.len() - 2 - last.raw.len();
    let joined = tail.prepend(&asns);
    AsPath([&head.0[..keep], &joined.0[..]].concat().into())
}

/// `asns` yields 1..=255 numbers.
fn put_segment(out: &mut BytesMut, kind: SegmentKind, asns: impl Iterator<Item = u32>) {
    let start = out.len();
    out.put_u8(kind as u8);
    out.put_u8(0);
    let mut count = 0u8;
    for asn in asns {
        out.put_u32(asn);
        count = count.saturating_add(1);
    }
    out[start + 1] = count;
}

impl fmt::Display for AsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, segment) in self.segments().enumerate() {
            let (open, close) = match segment.kind {
                SegmentKind::Sequence => ("", ""),
                SegmentKind::Set => ("{", "}"),
                SegmentKind::ConfedSequence => ("(", ")"),
                SegmentKind::ConfedSet => ("[", "]"),
            };
            f.write_str(if i > 0 { " " } else { "" })?;
            f.write_str(open)?;
            for (j, asn) in segment.asns().enumerate() {
                write!(f, "{}{asn}", if j > 0 { " " } else { "" })?;
            }
            f.write_str(close)?;
        }
        Ok(())
    }
}

impl fmt::Debug for AsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AsPath[{self}]")
    }
}
