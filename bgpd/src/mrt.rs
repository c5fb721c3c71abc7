//! MRT table dumps, version 2 (RFC 6396 §4.3, RFC 8050 for path identifiers): what routing archives and their
//! tools read. Pure: octets out.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +---------------------------------------------------------------+
//! |                           timestamp                           |
//! +-------------------------------+-------------------------------+
//! |      type: 13, TABLE_DUMP_V2  |            subtype            |
//! +-------------------------------+-------------------------------+
//! |                    length of what follows                     |
//! +---------------------------------------------------------------+
//! ```

use std::net::{IpAddr, Ipv4Addr};

use bytes::{BufMut, BytesMut};

use crate::wire::{Attributes, Family, NextHop, Prefix, table_dump_attributes};

const TABLE_DUMP_V2: u16 = 13;
const PEER_INDEX_TABLE: u16 = 1;
const RIB_IPV4_UNICAST: u16 = 2;
const RIB_IPV6_UNICAST: u16 = 4;
/// RFC 8050 §4.
const RIB_IPV4_UNICAST_ADDPATH: u16 = 8;
const RIB_IPV6_UNICAST_ADDPATH: u16 = 10;

/// A peer in the index table, which RIB entries name by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerEntry {
    /// Its BGP identifier, 0.0.0.0 if it is not known.
    pub id: Ipv4Addr,
    /// Its address; for routes that start here, the unspecified one.
    pub address: IpAddr,
    /// Its AS number.
    pub asn: u32,
}

/// A path of a destination.
#[derive(Debug, Clone, Copy)]
pub struct RibEntry<'a> {
    /// Number in the index table.
    pub peer: u16,
    /// Seconds since the epoch.
    pub originated: u32,
    /// Path identifier of the peer (RFC 7911), 0 without.
    pub path_id: u32,
    /// Attributes after import.
    pub attributes: &'a Attributes,
    /// Next hop.
    pub next_hop: Option<NextHop>,
}

/// Appends a record whose body `write` writes.
fn record(out: &mut BytesMut, time: u32, subtype: u16, write: impl FnOnce(&mut BytesMut)) {
    out.put_u32(time);
    out.put_u16(TABLE_DUMP_V2);
    out.put_u16(subtype);
    let at = out.len();
    out.put_u32(0);
    write(out);
    let length = u32::try_from(out.len() - at - 4).unwrap_or(u32::MAX);
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

/// Appends the index table, the first record of a dump. At most 65535 peers are written.
pub fn peer_index(out: &mut BytesMut, time: u32, collector: Ipv4Addr, peers: &[PeerEntry]) {
    /// Bit 0: the address is IPv6; bit 1: the AS number has four octets.
    const IPV6: u8 = 1;
    const FOUR_OCTET_AS: u8 = 2;
    let peers = &peers[..peers.len().min(usize::from(u16::MAX))];
    record(out, time, PEER_INDEX_TABLE, |out| {
        out.put_slice(&collector.octets());
        // No view name.
        out.put_u16(0);
        out.put_u16(peers.len() as u16);
        for peer in peers {
            let v6 = if peer.address.is_ipv6() { IPV6 } else { 0 };
            out.put_u8(FOUR_OCTET_AS | v6);
            out.put_slice(&peer.id.octets());
            match peer.address {
                IpAddr::V4(address) => out.put_slice(&address.octets()),
                IpAddr::V6(address) => out.put_slice(&address.octets()),
            }
            out.put_u32(peer.asn);
        }
    });
}

/// Appends the paths of one destination. Paths with identifiers need a record type of their own, and some readers
/// know only the plain one, so that is used wherever it suffices.
pub fn rib(out: &mut BytesMut, time: u32, sequence: u32, prefix: Prefix, entries: &[RibEntry<'_>]) {
    let with_ids = entries.iter().any(|e| e.path_id != 0);
    let subtype = match (prefix.addr(), with_ids) {
        (IpAddr::V4(_), false) => RIB_IPV4_UNICAST,
        (IpAddr::V6(_), false) => RIB_IPV6_UNICAST,
        (IpAddr::V4(_), true) => RIB_IPV4_UNICAST_ADDPATH,
        (IpAddr::V6(_), true) => RIB_IPV6_UNICAST_ADDPATH,
    };
    let family = match prefix.addr() {
        IpAddr::V4(_) => Family::IPV4_UNICAST,
        IpAddr::V6(_) => Family::IPV6_UNICAST,
    };
    let entries = &entries[..entries.len().min(usize::from(u16::MAX))];
    record(out, time, subtype, |out| {
        out.put_u32(sequence);
        out.put_u8(prefix.len());
        let octets = usize::from(prefix.len().div_ceil(8));
        match prefix.addr() {
            IpAddr::V4(address) => out.put_slice(&address.octets()[..octets]),
            IpAddr::V6(address) => out.put_slice(&address.octets()[..octets]),
        }
        out.put_u16(entries.len() as u16);
        for entry in entries {
            out.put_u16(entry.peer);
            out.put_u32(entry.originated);
            if with_ids {
                out.put_u32(entry.path_id);
            }
            let attributes = table_dump_attributes(entry.attributes, family, entry.next_hop);
            out.put_u16(u16::try_from(attributes.len()).unwrap_or(u16::MAX));
            out.put_slice(&attributes);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::AsPath;

    /// RFC 6396 §4.3.1 and §4.3.2, octet by octet.
    #[test]
    fn records_are_laid_out_as_the_rfc_says() {
        let mut out = BytesMut::new();
        let peers = [
            PeerEntry {
                id: Ipv4Addr::new(10, 0, 0, 2),
                address: "10.0.0.2".parse().unwrap(),
                asn: 64512,
            },
            PeerEntry {
                id: Ipv4Addr::UNSPECIFIED,
                address: "fd00::2".parse().unwrap(),
                asn: 65537,
            },
        ];
        peer_index(&mut out, 7, Ipv4Addr::new(10, 0, 0, 1), &peers);
        let mut expected = vec![0, 0, 0, 7, 0, 13, 0, 1, 0, 0, 0, 46];
        expected.extend([10, 0, 0, 1, 0, 0, 0, 2]);
        expected.extend([2, 10, 0, 0, 2, 10, 0, 0, 2, 0, 0, 0xfc, 0]);
        expected.extend([
            3, 0, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
        ]);
        expected.extend([0, 1, 0, 1]);
        assert_eq!(out.to_vec(), expected);

        let attributes = Attributes {
            as_path: AsPath::from_sequence(&[64513]),
            local_pref: Some(100),
            ..Attributes::default()
        };
        let entry = RibEntry {
            peer: 1,
            originated: 6,
            path_id: 0,
            attributes: &attributes,
            next_hop: Some(NextHop::V4(Ipv4Addr::new(10, 0, 0, 2))),
        };
        let mut out = BytesMut::new();
        rib(&mut out, 7, 3, "10.1.0.0/20".parse().unwrap(), &[entry]);
        let value = [
            &[0x40, 1, 1, attributes.origin as u8][..],
            &[0x40, 2, 6, 2, 1, 0, 0, 0xfc, 1],
            &[0x40, 3, 4, 10, 0, 0, 2],
            &[0x40, 5, 4, 0, 0, 0, 100],
        ]
        .concat();
        let mut body = vec![
            0,
            0,
            0,
            3,
            20,
            10,
            1,
            0,
            0,
            1,
            0,
            1,
            0,
            0,
            0,
            6,
            0,
            value.len() as u8,
        ];
        body.extend(&value);
        let mut expected = vec![0, 0, 0, 7, 0, 13, 0, 2, 0, 0, 0, body.len() as u8];
        expected.extend(body);
        assert_eq!(out.to_vec(), expected);
    }

    #[test]
    fn paths_with_identifiers_have_the_record_type_for_them() {
        let attributes = Attributes::default();
        let entry = |path_id| RibEntry {
            peer: 0,
            originated: 0,
            path_id,
            attributes: &attributes,
            next_hop: None,
        };
        for (prefix, ids, subtype) in [
            ("10.0.0.0/8", [0, 0], 2),
            ("10.0.0.0/8", [0, 5], 8),
            ("fd00::/16", [0, 0], 4),
            ("fd00::/16", [1, 2], 10),
        ] {
            let mut out = BytesMut::new();
            rib(&mut out, 0, 0, prefix.parse().unwrap(), &ids.map(entry));
            assert_eq!(out[6..8], [0, subtype], "{prefix} {ids:?}");
        }
    }
}
