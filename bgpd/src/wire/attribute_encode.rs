//! Writing path attributes, ascending by type code (RFC 4271 §5), except that MP_REACH and MP_UNREACH come
//! first (RFC 7606 §5.1) and are written by the caller.

use std::net::Ipv4Addr;

use bytes::{BufMut, BytesMut};

use super::attribute::{Aggregator, Attributes, NextHop, UnknownAttribute, attr};
use super::family::Family;
use super::open::AS_TRANS;

/// Appends one attribute, with the extended length when the value needs it. The value must fit into 65535
/// octets, which every caller has checked against the message size.
pub(super) fn put(out: &mut BytesMut, flags: u8, code: u8, value: &[u8]) {
    match u8::try_from(value.len()) {
        Ok(len) => {
            out.put_u8(flags);
            out.put_u8(code);
            out.put_u8(len);
        }
        Err(_) => {
            out.put_u8(flags | attr::EXTENDED_LENGTH);
            out.put_u8(code);
            out.put_u16(u16::try_from(value.len()).unwrap_or(u16::MAX));
        }
    }
    out.put_slice(value);
}

/// Appends all attributes but the MP ones. `next_hop` is NEXT_HOP, for routes in the NLRI field.
pub(super) fn attributes(
    out: &mut BytesMut,
    a: &Attributes,
    next_hop: Option<Ipv4Addr>,
    four_octet_as: bool,
) {
    const WELL_KNOWN: u8 = attr::TRANSITIVE;
    const TRANSITIVE: u8 = attr::OPTIONAL | attr::TRANSITIVE;
    const LOCAL: u8 = attr::OPTIONAL;

    let mut unknown = a.unknown.iter().peekable();
    let mut known = |out: &mut BytesMut, flags: u8, code: u8, value: &[u8]| {
        while let Some(u) = unknown.next_if(|u: &&UnknownAttribute| u.code < code) {
            put(out, u.flags, u.code, &u.value);
        }
        if code != u8::MAX {
            put(out, flags, code, value);
        }
    };
    let two_octet_path = (!four_octet_as).then(|| a.as_path.to_two_octet());
    let path = two_octet_path.as_deref().unwrap_or(a.as_path.as_bytes());
    known(out, WELL_KNOWN, attr::ORIGIN, &[a.origin as u8]);
    known(out, WELL_KNOWN, attr::AS_PATH, path);
    if let Some(addr) = next_hop {
        known(out, WELL_KNOWN, attr::NEXT_HOP, &addr.octets());
    }
    if let Some(med) = a.med {
        known(out, LOCAL, attr::MED, &med.to_be_bytes());
    }
    if let Some(pref) = a.local_pref {
        known(out, WELL_KNOWN, attr::LOCAL_PREF, &pref.to_be_bytes());
    }
    if a.atomic_aggregate {
        known(out, WELL_KNOWN, attr::ATOMIC_AGGREGATE, &[]);
    }
    if let Some(aggregator) = &a.aggregator {
        known(
            out,
            TRANSITIVE,
            attr::AGGREGATOR,
            &aggregator_value(aggregator, four_octet_as),
        );
    }
    if !a.communities.is_empty() {
        let value = concat(a.communities.iter().map(|c| c.0.to_be_bytes()));
        known(out, TRANSITIVE, attr::COMMUNITIES, &value);
    }
    if let Some(id) = a.originator_id {
        known(out, LOCAL, attr::ORIGINATOR_ID, &id.octets());
    }
    if !a.cluster_list.is_empty() {
        let value = concat(a.cluster_list.iter().map(Ipv4Addr::octets));
        known(out, LOCAL, attr::CLUSTER_LIST, &value);
    }
    if !a.ext_communities.is_empty() {
        let value = concat(a.ext_communities.iter().map(|c| c.0));
        known(out, TRANSITIVE, attr::EXT_COMMUNITIES, &value);
    }
    if !four_octet_as && a.as_path.needs_four_octets() {
        // RFC 6793 §4.2.2; confederation segments never go into AS4_PATH.
        known(
            out,
            TRANSITIVE,
            attr::AS4_PATH,
            a.as_path.without_confed().as_bytes(),
        );
    }
    if let Some(aggregator) = a.aggregator.filter(|g| !four_octet_as && g.asn > 0xffff) {
        known(
            out,
            TRANSITIVE,
            attr::AS4_AGGREGATOR,
            &aggregator_value(&aggregator, true),
        );
    }
    if !a.large_communities.is_empty() {
        let words = a
            .large_communities
            .iter()
            .flat_map(|c| [c.global, c.local1, c.local2]);
        known(
            out,
            TRANSITIVE,
            attr::LARGE_COMMUNITIES,
            &concat(words.map(u32::to_be_bytes)),
        );
    }
    known(out, 0, u8::MAX, &[]);
    // 255 is reserved, but nothing forbids a peer to send it.
    for u in unknown {
        put(out, u.flags, u.code, &u.value);
    }
}

fn concat<const N: usize>(items: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
    items.flatten().collect()
}

fn aggregator_value(a: &Aggregator, four_octet_as: bool) -> Vec<u8> {
    let mut value = Vec::with_capacity(8);
    if four_octet_as {
        value.put_u32(a.asn);
    } else {
        value.put_u16(u16::try_from(a.asn).unwrap_or(AS_TRANS as u16));
    }
    value.put_slice(&a.router_id.octets());
    value
}

/// Appends MP_REACH_NLRI; always with the extended length, so that the size is known beforehand.
pub(super) fn mp_reach(out: &mut BytesMut, family: Family, next_hop: &NextHop, nlri: &[u8]) {
    let start = put_mp_head(out, attr::MP_REACH, family);
    let at = out.len();
    out.put_u8(0);
    match next_hop {
        NextHop::V4(a) => out.put_slice(&a.octets()),
        NextHop::V6(a) => out.put_slice(&a.octets()),
        NextHop::V6Pair { global, link_local } => {
            out.put_slice(&global.octets());
            out.put_slice(&link_local.octets());
        }
    }
    out[at] = (out.len() - at - 1) as u8;
    out.put_u8(0);
    out.put_slice(nlri);
    patch_len(out, start);
}

/// Appends MP_UNREACH_NLRI.
pub(super) fn mp_unreach(out: &mut BytesMut, family: Family, nlri: &[u8]) {
    let start = put_mp_head(out, attr::MP_UNREACH, family);
    out.put_slice(nlri);
    patch_len(out, start);
}

fn put_mp_head(out: &mut BytesMut, code: u8, family: Family) -> usize {
    out.put_u8(attr::OPTIONAL | attr::EXTENDED_LENGTH);
    out.put_u8(code);
    out.put_u16(0);
    let start = out.len();
    out.put_u16(family.afi);
    out.put_u8(family.safi);
    start
}

fn patch_len(out: &mut BytesMut, start: usize) {
    let len = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
    out[start - 2..start].copy_from_slice(&len.to_be_bytes());
}
