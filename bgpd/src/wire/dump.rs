//! Path attributes as MRT tables have them (RFC 6396 §4.3.4): AS numbers with four octets, and MP_REACH_NLRI cut
//! down to its next hop.

use std::net::Ipv4Addr;

use bytes::{Bytes, BytesMut};

use super::attribute::{Attributes, NextHop, attr};
use super::attribute_encode;
use super::family::Family;

/// The attribute field of a RIB entry. Local routes have no next hop; theirs is the unspecified address.
pub fn table_dump_attributes(a: &Attributes, family: Family, next_hop: Option<NextHop>) -> Bytes {
    let mut out = BytesMut::new();
    let classic = match (family, next_hop) {
        (Family::IPV4_UNICAST, Some(NextHop::V4(addr))) => Some(addr),
        (Family::IPV4_UNICAST, None) => Some(Ipv4Addr::UNSPECIFIED),
        _ => None,
    };
    if classic.is_none() {
        let mut value = BytesMut::new();
        match next_hop {
            Some(NextHop::V4(addr)) => value.extend_from_slice(&addr.to_ipv6_mapped().octets()),
            Some(NextHop::V6(addr)) => value.extend_from_slice(&addr.octets()),
            Some(NextHop::V6Pair { global, link_local }) => {
                value.extend_from_slice(&global.octets());
                value.extend_from_slice(&link_local.octets());
            }
            None => value.extend_from_slice(&[0; 16]),
        }
        let mut reach = BytesMut::with_capacity(1 + value.len());
        reach.extend_from_slice(&[value.len() as u8]);
        reach.extend_from_slice(&value);
        attribute_encode::put(&mut out, attr::OPTIONAL, attr::MP_REACH, &reach);
    }
    attribute_encode::attributes(&mut out, a, classic, true);
    out.freeze()
}
