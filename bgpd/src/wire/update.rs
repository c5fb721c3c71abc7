//! UPDATE (RFC 4271 §4.3, RFC 4760, RFC 7606).

use bytes::{BufMut, Bytes, BytesMut};

use super::attribute::{Attributes, NextHop, attr};
use super::attribute_decode::{self, Parsed};
use super::attribute_encode;
use super::family::Family;
use super::notification::{ErrorCode, Notification, update_error};
use super::open::Codec;
use super::pack::EncodeError;
use super::prefix::{Nlri, NlriBlock};

/// What a faulty attribute leads to, weakest first (RFC 7606 §2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Treatment {
    /// The message is as it should be.
    Accept,
    /// The attribute is left out, the rest counts.
    AttributeDiscard,
    /// All routes that the message announces are withdrawn.
    TreatAsWithdraw,
    /// The session ends. Never found in a decoded [`Update`]: decoding returns the NOTIFICATION instead.
    SessionReset,
}

/// One thing that was wrong in an UPDATE, for the log and the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttributeFault {
    /// Attribute type; 0 for the attribute field as a whole.
    pub code: u8,
    /// What was wrong.
    pub reason: &'static str,
    /// What it leads to.
    pub treatment: Treatment,
}

/// Routes of an MP_REACH_NLRI attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MpReach {
    /// Their next hop.
    pub next_hop: NextHop,
    /// The routes (with their family).
    pub nlri: NlriBlock,
}

/// Routes of an MP_UNREACH_NLRI attribute; none means End-of-RIB (RFC 4724 §2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MpUnreach {
    /// The routes (with their family).
    pub nlri: NlriBlock,
}

/// A decoded UPDATE.
///
/// ```text
/// +-----------------------------------------------------+
/// |   Withdrawn routes length (2 octets)                |
/// +-----------------------------------------------------+
/// |   Withdrawn routes (IPv4 unicast)                   |
/// +-----------------------------------------------------+
/// |   Total path attribute length (2 octets)            |
/// +-----------------------------------------------------+
/// |   Path attributes (MP_REACH, MP_UNREACH among them) |
/// +-----------------------------------------------------+
/// |   NLRI (IPv4 unicast, to the end of the message)    |
/// +-----------------------------------------------------+
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// Withdrawn routes field.
    pub withdrawn: NlriBlock,
    /// Routes withdrawn by MP_UNREACH_NLRI.
    pub mp_unreach: Option<MpUnreach>,
    /// Routes announced by MP_REACH_NLRI.
    pub mp_reach: Option<MpReach>,
    /// NEXT_HOP, for `nlri`.
    pub next_hop: Option<NextHop>,
    /// NLRI field.
    pub nlri: NlriBlock,
    /// Attributes of everything announced.
    pub attributes: Attributes,
    /// What was wrong, in the order found.
    pub faults: Vec<AttributeFault>,
    /// Families that were not negotiated; their routes were left unread (RFC 4760 §7).
    pub ignored_families: Vec<Family>,
}

fn reset(subcode: u8) -> Notification {
    Notification::new(ErrorCode::Update, subcode)
}

/// Takes a field that is preceded by its two-octet length.
fn split_field(body: &Bytes, at: usize) -> Option<(Bytes, usize)> {
    let len = body.get(at..at + 2)?;
    let end = at + 2 + usize::from(u16::from_be_bytes([len[0], len[1]]));
    (end <= body.len()).then(|| (body.slice(at + 2..end), end))
}

impl Update {
    /// An UPDATE without any routes: the IPv4 End-of-RIB marker when sent as it is.
    pub fn empty() -> Self {
        Self {
            withdrawn: NlriBlock::empty(Family::IPV4_UNICAST),
            mp_unreach: None,
            mp_reach: None,
            next_hop: None,
            nlri: NlriBlock::empty(Family::IPV4_UNICAST),
            attributes: Attributes::default(),
            faults: Vec::new(),
            ignored_families: Vec::new(),
        }
    }

    /// The End-of-RIB marker of `family` (RFC 4724 §2).
    pub fn end_of_rib(family: Family) -> Self {
        let mut update = Self::empty();
        if family != Family::IPV4_UNICAST {
            update.mp_unreach = Some(MpUnreach {
                nlri: NlriBlock::empty(family),
            });
        }
        update
    }

    /// Reads the body. `Err` only where RFC 7606 leaves no choice but a session reset.
    pub(super) fn decode(body: &Bytes, codec: &Codec) -> Result<Self, Notification> {
        let malformed = || reset(update_error::MALFORMED_ATTRIBUTE_LIST);
        let (withdrawn, at) = split_field(body, 0).ok_or_else(malformed)?;
        let (attribute_field, at) = split_field(body, at).ok_or_else(malformed)?;
        let v4 = Family::IPV4_UNICAST;
        let routes = |bytes| {
            NlriBlock::decode(v4, codec.add_path_rx.contains(v4), bytes)
                .map_err(|_| reset(update_error::INVALID_NETWORK))
        };
        let mut withdrawn = routes(withdrawn)?;
        let mut nlri = routes(body.slice(at..))?;
        let mut parsed = attribute_decode::decode(&attribute_field, codec)?;
        check_mandatory(&mut parsed, !nlri.is_empty());
        let has_v4 = !nlri.is_empty() || !withdrawn.is_empty();
        if has_v4 && !codec.families.contains(v4) {
            parsed.ignored_families.push(v4);
            nlri = NlriBlock::empty(v4);
            withdrawn = NlriBlock::empty(v4);
        }
        Ok(Self {
            withdrawn,
            mp_unreach: parsed.mp_unreach,
            mp_reach: parsed.mp_reach,
            next_hop: parsed.next_hop,
            nlri,
            attributes: parsed.attributes,
            faults: parsed.faults,
            ignored_families: parsed.ignored_families,
        })
    }

    /// How many routes are announced or withdrawn.
    pub fn routes(&self) -> usize {
        let announced = self.mp_reach.as_ref().map_or(0, |mp| mp.nlri.len());
        let withdrawn = self.mp_unreach.as_ref().map_or(0, |mp| mp.nlri.len());
        self.nlri.len() + self.withdrawn.len() + announced + withdrawn
    }

    /// The strongest consequence of all faults (RFC 7606 §3 h).
    pub fn treatment(&self) -> Treatment {
        self.faults
            .iter()
            .map(|f| f.treatment)
            .max()
            .unwrap_or(Treatment::Accept)
    }

    /// The family whose End-of-RIB this message is (RFC 4724 §2).
    pub fn as_end_of_rib(&self) -> Option<Family> {
        let quiet = self.withdrawn.is_empty()
            && self.nlri.is_empty()
            && self.mp_reach.is_none()
            && self.faults.is_empty()
            && self.ignored_families.is_empty()
            && self.next_hop.is_none()
            && self.attributes == Attributes::default();
        match &self.mp_unreach {
            _ if !quiet => None,
            None => Some(Family::IPV4_UNICAST),
            Some(mp) if mp.nlri.is_empty() => Some(mp.nlri.family()),
            Some(_) => None,
        }
    }

    /// Every withdrawn route, and under [`Treatment::TreatAsWithdraw`] the announced ones as well.
    pub fn withdrawals(&self) -> impl Iterator<Item = Nlri> + '_ {
        let refused = self.treatment() >= Treatment::TreatAsWithdraw;
        let announced = self
            .nlri
            .iter()
            .chain(self.mp_reach.iter().flat_map(|m| m.nlri.iter()));
        self.withdrawn
            .iter()
            .chain(self.mp_unreach.iter().flat_map(|m| m.nlri.iter()))
            .chain(announced.filter(move |_| refused))
    }

    /// The announced blocks with their next hops; none under [`Treatment::TreatAsWithdraw`].
    pub fn announcements(&self) -> impl Iterator<Item = (NextHop, &NlriBlock)> + '_ {
        let accepted = self.treatment() < Treatment::TreatAsWithdraw;
        let classic = self
            .next_hop
            .map(|nh| (nh, &self.nlri))
            .filter(|(_, n)| !n.is_empty());
        let multiprotocol = self.mp_reach.as_ref().map(|m| (m.next_hop, &m.nlri));
        classic
            .into_iter()
            .chain(multiprotocol)
            .filter(move |_| accepted)
    }

    /// Appends the body; the caller checks the total size.
    pub(super) fn encode(&self, codec: &Codec, out: &mut BytesMut) -> Result<(), EncodeError> {
        let field = |out: &mut BytesMut, what, bytes: &[u8]| {
            let len = u16::try_from(bytes.len()).map_err(|_| EncodeError::TooLong {
                what,
                len: bytes.len(),
                max: usize::from(u16::MAX),
            })?;
            out.put_u16(len);
            out.put_slice(bytes);
            Ok(())
        };
        field(out, "withdrawn routes", self.withdrawn.as_bytes())?;
        let mut attributes = BytesMut::new();
        if let Some(mp) = &self.mp_unreach {
            attribute_encode::mp_unreach(&mut attributes, mp.nlri.family(), mp.nlri.as_bytes());
        }
        if let Some(mp) = &self.mp_reach {
            let nlri = &mp.nlri;
            attribute_encode::mp_reach(
                &mut attributes,
                nlri.family(),
                &mp.next_hop,
                nlri.as_bytes(),
            );
        }
        if self.mp_reach.is_some() || !self.nlri.is_empty() {
            let next_hop = match self.next_hop {
                Some(NextHop::V4(addr)) if !self.nlri.is_empty() => Some(addr),
                _ => None,
            };
            attribute_encode::attributes(
                &mut attributes,
                &self.attributes,
                next_hop,
                codec.four_octet_as,
            );
        }
        field(out, "path attributes", &attributes)?;
        out.put_slice(self.nlri.as_bytes());
        Ok(())
    }
}

/// RFC 7606 §3 d: a missing mandatory attribute withdraws the routes.
fn check_mandatory(parsed: &mut Parsed, has_nlri: bool) {
    let announces = has_nlri || parsed.mp_reach.as_ref().is_some_and(|m| !m.nlri.is_empty());
    let required = [
        (attr::ORIGIN, parsed.has_origin || !announces),
        (attr::AS_PATH, parsed.has_as_path || !announces),
        (attr::NEXT_HOP, parsed.next_hop.is_some() || !has_nlri),
    ];
    for (code, _) in required.into_iter().filter(|(_, present)| !present) {
        parsed.faults.push(AttributeFault {
            code,
            reason: "missing",
            treatment: Treatment::TreatAsWithdraw,
        });
    }
}
