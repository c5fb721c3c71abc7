//! Reading path attributes with the error handling of RFC 7606.
//!
//! Each attribute has its own action on error (RFC 7606 §7, RFC 8092, RFC 6793 §6); the strongest one wins
//! for the UPDATE. Duplicates: the first counts (§3 g), except MP_REACH and MP_UNREACH, which end the session.

use std::net::{Ipv4Addr, Ipv6Addr};

use bytes::Bytes;

use super::as_path::AsPath;
use super::attribute::{Aggregator, Attributes, NextHop, Origin, UnknownAttribute, attr};
use super::community::{Community, ExtendedCommunity, LargeCommunity};
use super::family::Family;
use super::notification::{ErrorCode, Notification, update_error};
use super::open::{AS_TRANS, Codec, PeerKind};
use super::prefix::NlriBlock;
use super::update::{AttributeFault, MpReach, MpUnreach, Treatment};

/// Everything found in the attribute field.
#[derive(Default)]
pub(super) struct Parsed {
    pub(super) attributes: Attributes,
    pub(super) next_hop: Option<NextHop>,
    pub(super) mp_reach: Option<MpReach>,
    pub(super) mp_unreach: Option<MpUnreach>,
    pub(super) ignored_families: Vec<Family>,
    pub(super) faults: Vec<AttributeFault>,
    pub(super) has_origin: bool,
    pub(super) has_as_path: bool,
    as4_path: Option<AsPath>,
    as4_aggregator: Option<Aggregator>,
}

/// One attribute as it stands in the field, with its header for NOTIFICATION data.
struct Raw {
    flags: u8,
    code: u8,
    value: Bytes,
    whole: Bytes,
}

const WELL_KNOWN: u8 = attr::TRANSITIVE;
const OPTIONAL_TRANSITIVE: u8 = attr::OPTIONAL | attr::TRANSITIVE;
const OPTIONAL_NON_TRANSITIVE: u8 = attr::OPTIONAL;

/// Flags (without partial and extended length) that an attribute must have, and what its errors lead to.
const fn rules(code: u8) -> Option<(u8, Treatment)> {
    use Treatment::{
        AttributeDiscard as Discard, SessionReset as Reset, TreatAsWithdraw as Withdraw,
    };
    Some(match code {
        attr::ORIGIN | attr::AS_PATH | attr::NEXT_HOP | attr::LOCAL_PREF => (WELL_KNOWN, Withdraw),
        attr::ATOMIC_AGGREGATE => (WELL_KNOWN, Discard),
        attr::MED | attr::ORIGINATOR_ID | attr::CLUSTER_LIST => (OPTIONAL_NON_TRANSITIVE, Withdraw),
        attr::COMMUNITIES | attr::EXT_COMMUNITIES | attr::LARGE_COMMUNITIES => {
            (OPTIONAL_TRANSITIVE, Withdraw)
        }
        attr::AGGREGATOR | attr::AS4_PATH | attr::AS4_AGGREGATOR => (OPTIONAL_TRANSITIVE, Discard),
        attr::MP_REACH | attr::MP_UNREACH => (OPTIONAL_NON_TRANSITIVE, Reset),
        _ => return None,
    })
}

/// Reads the whole attribute field.
pub(super) fn decode(field: &Bytes, codec: &Codec) -> Result<Parsed, Notification> {
    let mut parsed = Parsed::default();
    let mut seen = [0u64; 4];
    let mut offset = 0;
    while offset < field.len() {
        let Some(raw) = split(field, offset) else {
            // RFC 7606 §4: the NLRI field is still known, so the routes can be withdrawn.
            parsed.fault(
                0,
                "attribute overruns the field",
                Treatment::TreatAsWithdraw,
            );
            break;
        };
        offset += raw.whole.len();
        let (word, bit) = (usize::from(raw.code >> 6), 1u64 << (raw.code & 63));
        if seen[word] & bit != 0 {
            if matches!(raw.code, attr::MP_REACH | attr::MP_UNREACH) {
                return Err(reset(update_error::MALFORMED_ATTRIBUTE_LIST, &Bytes::new()));
            }
            parsed.fault(raw.code, "repeated", Treatment::AttributeDiscard);
            continue;
        }
        seen[word] |= bit;
        parsed.attribute(raw, codec)?;
    }
    parsed.merge_as4(codec);
    Ok(parsed)
}

/// ```text
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |O|T|P|E| 0 0 0 0 |   Type code   |  Length (16 bits if E is set) |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
fn split(field: &Bytes, offset: usize) -> Option<Raw> {
    let rest = &field[offset..];
    let (&[flags, code], after) = rest.split_first_chunk::<2>()?;
    let (head, len) = if flags & attr::EXTENDED_LENGTH != 0 {
        (
            4,
            usize::from(u16::from_be_bytes(*after.first_chunk::<2>()?)),
        )
    } else {
        (3, usize::from(*after.first()?))
    };
    let whole = (rest.len() >= head + len).then(|| field.slice(offset..offset + head + len))?;
    Some(Raw {
        flags,
        code,
        value: whole.slice(head..),
        whole,
    })
}

fn reset(subcode: u8, data: &Bytes) -> Notification {
    Notification::with_data(ErrorCode::Update, subcode, data.clone())
}

fn u32_of(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

fn words<const N: usize, T: Ord>(value: &[u8], make: impl Fn([u8; N]) -> T) -> Option<Box<[T]>> {
    if value.is_empty() || !value.len().is_multiple_of(N) {
        return None;
    }
    let mut list: Vec<T> = value.as_chunks::<N>().0.iter().map(|c| make(*c)).collect();
    list.sort_unstable();
    list.dedup();
    Some(list.into_boxed_slice())
}

impl Parsed {
    fn fault(&mut self, code: u8, reason: &'static str, treatment: Treatment) {
        self.faults.push(AttributeFault {
            code,
            reason,
            treatment,
        });
    }

    fn attribute(&mut self, raw: Raw, codec: &Codec) -> Result<(), Notification> {
        let Some((flags, on_error)) = rules(raw.code) else {
            return self.unrecognized(raw);
        };
        let internal_only = matches!(
            raw.code,
            attr::LOCAL_PREF | attr::ORIGINATOR_ID | attr::CLUSTER_LIST
        );
        if internal_only && codec.peer == PeerKind::Ebgp {
            // RFC 7606 §7.5, §7.9, §7.10: from outside, right or wrong, without effect.
            self.fault(
                raw.code,
                "internal attribute from an external peer",
                Treatment::AttributeDiscard,
            );
            return Ok(());
        }
        let partial_allowed = flags == OPTIONAL_TRANSITIVE;
        if raw.flags & OPTIONAL_TRANSITIVE != flags
            || (raw.flags & attr::PARTIAL != 0 && !partial_allowed)
        {
            if on_error == Treatment::SessionReset {
                return Err(reset(update_error::ATTRIBUTE_FLAGS, &raw.whole));
            }
            self.fault(raw.code, "flags conflict with the type", on_error);
            return Ok(());
        }
        match raw.code {
            attr::MP_REACH => return self.mp_reach(&raw, codec),
            attr::MP_UNREACH => return self.mp_unreach(&raw, codec),
            _ => {}
        }
        if self.value(raw.code, &raw.value, codec).is_none() {
            self.fault(raw.code, "malformed value", on_error);
        }
        Ok(())
    }

    /// `None` when the value is malformed.
    fn value(&mut self, code: u8, v: &[u8], codec: &Codec) -> Option<()> {
        let attributes = &mut self.attributes;
        match code {
            attr::ORIGIN => {
                self.has_origin = true;
                attributes.origin = match v {
                    [0] => Origin::Igp,
                    [1] => Origin::Egp,
                    [2] => Origin::Incomplete,
                    _ => return None,
                };
            }
            attr::AS_PATH => {
                self.has_as_path = true;
                attributes.as_path = AsPath::decode(v, codec.four_octet_as)?;
            }
            attr::NEXT_HOP => {
                let next_hop = NextHop::V4(Ipv4Addr::from(u32_of(v)?));
                // Present also when invalid: the fault already withdraws the routes.
                self.next_hop = Some(next_hop);
                if next_hop.is_martian() {
                    return None;
                }
            }
            attr::MED => attributes.med = Some(u32_of(v)?),
            attr::LOCAL_PREF => attributes.local_pref = Some(u32_of(v)?),
            attr::ATOMIC_AGGREGATE => {
                if !v.is_empty() {
                    return None;
                }
                attributes.atomic_aggregate = true;
            }
            attr::AGGREGATOR => {
                attributes.aggregator = Some(aggregator(v, codec.four_octet_as)?);
            }
            attr::AS4_AGGREGATOR => self.as4_aggregator = Some(aggregator(v, true)?),
            attr::AS4_PATH => self.as4_path = Some(AsPath::decode(v, true)?),
            attr::COMMUNITIES => {
                attributes.communities = words(v, |c| Community(u32::from_be_bytes(c)))?;
            }
            attr::EXT_COMMUNITIES => attributes.ext_communities = words(v, ExtendedCommunity)?,
            attr::LARGE_COMMUNITIES => {
                let part = |c: &[u8; 12], i: usize| {
                    u32::from_be_bytes([c[i], c[i + 1], c[i + 2], c[i + 3]])
                };
                attributes.large_communities = words(v, |c| LargeCommunity {
                    global: part(&c, 0),
                    local1: part(&c, 4),
                    local2: part(&c, 8),
                })?;
            }
            attr::ORIGINATOR_ID => attributes.originator_id = Some(Ipv4Addr::from(u32_of(v)?)),
            attr::CLUSTER_LIST => {
                if v.is_empty() || !v.len().is_multiple_of(4) {
                    return None;
                }
                attributes.cluster_list = v
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|c| Ipv4Addr::from(*c))
                    .collect();
            }
            _ => {}
        }
        Some(())
    }

    fn unrecognized(&mut self, raw: Raw) -> Result<(), Notification> {
        if raw.flags & attr::OPTIONAL == 0 {
            return Err(reset(update_error::UNRECOGNIZED_WELL_KNOWN, &raw.whole));
        }
        if raw.flags & attr::TRANSITIVE == 0 {
            // RFC 4271 §5: quietly ignored and not passed along.
            return Ok(());
        }
        let flags = OPTIONAL_TRANSITIVE | attr::PARTIAL;
        let unknown = UnknownAttribute {
            flags,
            code: raw.code,
            value: raw.value[..].into(),
        };
        let list = &mut self.attributes.unknown;
        let at = list.partition_point(|u| u.code < unknown.code);
        let mut grown = std::mem::take(list).into_vec();
        grown.insert(at, unknown);
        *list = grown.into_boxed_slice();
        Ok(())
    }

    /// ```text
    /// +-----------+----------+---------------+----------+--------------+------+
    /// | AFI (2)   | SAFI (1) | NH length (1) | Next hop | Reserved (1) | NLRI |
    /// +-----------+----------+---------------+----------+--------------+------+
    /// ```
    fn mp_reach(&mut self, raw: &Raw, codec: &Codec) -> Result<(), Notification> {
        let fault = || reset(update_error::OPTIONAL_ATTRIBUTE, &raw.whole);
        let (&[a, b, safi, nh_len], _) = raw.value.split_first_chunk::<4>().ok_or_else(fault)?;
        let family = Family {
            afi: u16::from_be_bytes([a, b]),
            safi,
        };
        let nlri_at = 4 + usize::from(nh_len) + 1;
        if raw.value.len() < nlri_at {
            return Err(fault());
        }
        if !codec.families.contains(family) {
            self.ignored_families.push(family);
            return Ok(());
        }
        let octets = &raw.value[4..nlri_at - 1];
        let next_hop = decode_next_hop(family, octets, codec).ok_or_else(fault)?;
        let nlri = self.nlri(raw, family, codec, nlri_at)?;
        if next_hop.is_martian() {
            self.fault(
                attr::MP_REACH,
                "impossible next hop",
                Treatment::TreatAsWithdraw,
            );
        }
        self.mp_reach = Some(MpReach { next_hop, nlri });
        Ok(())
    }

    fn mp_unreach(&mut self, raw: &Raw, codec: &Codec) -> Result<(), Notification> {
        let Some((&[a, b, safi], _)) = raw.value.split_first_chunk::<3>() else {
            return Err(reset(update_error::OPTIONAL_ATTRIBUTE, &raw.whole));
        };
        let family = Family {
            afi: u16::from_be_bytes([a, b]),
            safi,
        };
        if !codec.families.contains(family) {
            self.ignored_families.push(family);
            return Ok(());
        }
        self.mp_unreach = Some(MpUnreach {
            nlri: self.nlri(raw, family, codec, 3)?,
        });
        Ok(())
    }

    fn nlri(
        &self,
        raw: &Raw,
        family: Family,
        codec: &Codec,
        at: usize,
    ) -> Result<NlriBlock, Notification> {
        NlriBlock::decode(
            family,
            codec.add_path_rx.contains(family),
            raw.value.slice(at..),
        )
        .map_err(|_| reset(update_error::OPTIONAL_ATTRIBUTE, &raw.whole))
    }

    /// RFC 6793 §4.2.3: only from a speaker that uses two octets.
    fn merge_as4(&mut self, codec: &Codec) {
        let (path, aggregator) = (self.as4_path.take(), self.as4_aggregator.take());
        if codec.four_octet_as {
            return;
        }
        match (&self.attributes.aggregator, aggregator) {
            // A newer aggregation by a two-octet speaker makes both AS4 attributes stale.
            (Some(old), Some(_)) if old.asn != AS_TRANS => return,
            (Some(_), Some(new)) => self.attributes.aggregator = Some(new),
            _ => {}
        }
        if let Some(path) = path {
            self.attributes.as_path = self.attributes.as_path.merge_as4(&path);
        }
    }
}

fn aggregator(v: &[u8], four_octet: bool) -> Option<Aggregator> {
    let (asn, id) = v.split_at_checked(if four_octet { 4 } else { 2 })?;
    let asn = asn.iter().fold(0, |n, b| n << 8 | u32::from(*b));
    // RFC 7607: AS 0 makes the attribute malformed.
    (asn != 0).then_some(Aggregator {
        asn,
        router_id: Ipv4Addr::from(u32_of(id)?),
    })
}

/// Lengths by family: 4 for IPv4; 16 or 32 for IPv6, and for IPv4 with RFC 8950.
fn decode_next_hop(family: Family, octets: &[u8], codec: &Codec) -> Option<NextHop> {
    let v6_allowed = family == Family::IPV6_UNICAST || codec.extended_next_hop.contains(family);
    let v6 = |raw: &[u8]| <[u8; 16]>::try_from(raw).ok().map(Ipv6Addr::from);
    match octets.len() {
        4 if family == Family::IPV4_UNICAST => Some(NextHop::V4(Ipv4Addr::from(u32_of(octets)?))),
        16 if v6_allowed => v6(octets).map(NextHop::V6),
        32 if v6_allowed => {
            let (global, link_local) = (v6(&octets[..16])?, v6(&octets[16..])?);
            Some(
                match (global.is_unspecified(), link_local.is_unicast_link_local()) {
                    // Some speakers send `::` or the link-local address twice when they have no other.
                    (true, true) => NextHop::V6(link_local),
                    (_, true) if global == link_local => NextHop::V6(link_local),
                    (_, true) => NextHop::V6Pair { global, link_local },
                    (_, false) => NextHop::V6(global),
                },
            )
        }
        _ => None,
    }
}
