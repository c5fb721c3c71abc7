//! BMP messages, version 3 (RFC 7854 §4). Pure: octets out.
//!
//! ```text
//! common header                      per-peer header
//! +---------+----------+------+      +------+-------+---------------+---------+----+--------+-----------+
//! | version | length   | type |      | type | flags | distinguisher | address | AS | BGP ID | timestamp |
//! | 1       | 4        | 1    |      | 1    | 1     | 8             | 16      | 4  | 4      | 4 + 4     |
//! +---------+----------+------+      +------+-------+---------------+---------+----+--------+-----------+
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use bytes::{BufMut, Bytes, BytesMut};

use crate::fsm::DownCause;
use crate::wire::{Codec, Message, Notification, PeerKind};

const VERSION: u8 = 3;
const ROUTE_MONITORING: u8 = 0;
const STATISTICS: u8 = 1;
const PEER_DOWN: u8 = 2;
const PEER_UP: u8 = 3;
const INITIATION: u8 = 4;
const TERMINATION: u8 = 5;

/// Whether routes are told as received, or as they came through the import filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Adj-RIB-In before policy.
    Before,
    /// Adj-RIB-In after policy (flag L).
    After,
}

/// A peer, as the per-peer header names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerHeader {
    /// Its address.
    pub address: IpAddr,
    /// Its AS number.
    pub asn: u32,
    /// Its BGP identifier.
    pub id: Ipv4Addr,
    /// Seconds since the epoch.
    pub time: u32,
}

/// Numbers of a peer (RFC 7854 §4.8).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerStatistics {
    /// Routes in Adj-RIB-In that the import policy or a loop check refuses; type 0.
    pub refused: u32,
    /// Routes in Adj-RIB-In; type 7.
    pub received: u64,
    /// Those of them that are not refused; type 8.
    pub accepted: u64,
}

fn message(kind: u8, write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::with_capacity(128);
    out.put_u8(VERSION);
    out.put_u32(0);
    out.put_u8(kind);
    write(&mut out);
    let length = u32::try_from(out.len()).unwrap_or(u32::MAX);
    out[1..5].copy_from_slice(&length.to_be_bytes());
    out.freeze()
}

fn put_address(out: &mut BytesMut, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => {
            out.put_bytes(0, 12);
            out.put_slice(&v4.octets());
        }
        IpAddr::V6(v6) => out.put_slice(&v6.octets()),
    }
}

fn put_peer(out: &mut BytesMut, peer: &PeerHeader, stage: Stage) {
    const IPV6: u8 = 0x80;
    const AFTER_POLICY: u8 = 0x40;
    // A global instance peer, without a distinguisher.
    out.put_u8(0);
    let v6 = if peer.address.is_ipv6() { IPV6 } else { 0 };
    let after = match stage {
        Stage::Before => 0,
        Stage::After => AFTER_POLICY,
    };
    out.put_u8(v6 | after);
    out.put_u64(0);
    put_address(out, peer.address);
    out.put_u32(peer.asn);
    out.put_slice(&peer.id.octets());
    out.put_u32(peer.time);
    out.put_u32(0);
}

fn put_tlv(out: &mut BytesMut, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
    out.put_u16(kind);
    out.put_u16(length);
    out.put_slice(&value[..length.into()]);
}

/// The first message of a connection: who we are.
pub fn initiation(name: &str, description: &str) -> Bytes {
    const SYS_DESCR: u16 = 1;
    const SYS_NAME: u16 = 2;
    message(INITIATION, |out| {
        put_tlv(out, SYS_DESCR, description.as_bytes());
        put_tlv(out, SYS_NAME, name.as_bytes());
    })
}

/// The last message of a connection that we end on purpose.
pub fn termination() -> Bytes {
    const REASON: u16 = 1;
    const ADMINISTRATIVELY_CLOSED: [u8; 2] = [0, 0];
    message(TERMINATION, |out| {
        put_tlv(out, REASON, &ADMINISTRATIVELY_CLOSED);
    })
}

/// A session stands; with both whole OPEN messages.
pub fn peer_up(
    peer: &PeerHeader,
    local: SocketAddr,
    remote_port: u16,
    sent: &[u8],
    received: &[u8],
) -> Bytes {
    message(PEER_UP, |out| {
        put_peer(out, peer, Stage::Before);
        put_address(out, local.ip().to_canonical());
        out.put_u16(local.port());
        out.put_u16(remote_port);
        out.put_slice(sent);
        out.put_slice(received);
    })
}

fn pdu(notification: &Notification) -> Bytes {
    let codec = Codec::basic(PeerKind::Ebgp);
    let message = Message::Notification(notification.clone()).encode(&codec);
    message.unwrap_or_default()
}

/// A session has ended. Routes of its peer are withdrawn with it.
pub fn peer_down(peer: &PeerHeader, cause: Option<&DownCause>) -> Bytes {
    const LOCAL_NOTIFICATION: u8 = 1;
    const LOCAL_SILENT: u8 = 2;
    const REMOTE_NOTIFICATION: u8 = 3;
    const REMOTE_SILENT: u8 = 4;
    const DECONFIGURED: u8 = 5;
    /// Events by number: RFC 4271 §8.1, RFC 9687; 0 is none of them.
    const MANUAL_STOP: u16 = 2;
    const SEND_HOLD_EXPIRED: u16 = 29;
    const NO_EVENT: u16 = 0;
    let silent = |out: &mut BytesMut, event| {
        out.put_u8(LOCAL_SILENT);
        out.put_u16(event);
    };
    message(PEER_DOWN, |out| {
        put_peer(out, peer, Stage::Before);
        match cause {
            None => out.put_u8(DECONFIGURED),
            Some(DownCause::Sent(notification)) => {
                out.put_u8(LOCAL_NOTIFICATION);
                out.put_slice(&pdu(notification));
            }
            Some(DownCause::Received(notification)) => {
                out.put_u8(REMOTE_NOTIFICATION);
                out.put_slice(&pdu(notification));
            }
            Some(DownCause::Stopped) => silent(out, MANUAL_STOP),
            Some(DownCause::SendStalled) => silent(out, SEND_HOLD_EXPIRED),
            Some(DownCause::PathLost) => silent(out, NO_EVENT),
            Some(DownCause::Closed | DownCause::Replaced) => out.put_u8(REMOTE_SILENT),
        }
    })
}

/// Routes of a peer: a whole UPDATE message.
pub fn route_monitoring(peer: &PeerHeader, stage: Stage, update: &[u8]) -> Bytes {
    message(ROUTE_MONITORING, |out| {
        put_peer(out, peer, stage);
        out.put_slice(update);
    })
}

/// Numbers of a peer.
pub fn statistics(peer: &PeerHeader, numbers: &PeerStatistics) -> Bytes {
    const REFUSED: u16 = 0;
    const ADJ_RIB_IN: u16 = 7;
    const LOC_RIB: u16 = 8;
    message(STATISTICS, |out| {
        put_peer(out, peer, Stage::Before);
        out.put_u32(3);
        put_tlv(out, REFUSED, &numbers.refused.to_be_bytes());
        put_tlv(out, ADJ_RIB_IN, &numbers.received.to_be_bytes());
        put_tlv(out, LOC_RIB, &numbers.accepted.to_be_bytes());
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: &str) -> PeerHeader {
        PeerHeader {
            address: address.parse().unwrap(),
            asn: 64513,
            id: Ipv4Addr::new(10, 0, 0, 2),
            time: 7,
        }
    }

    /// RFC 7854 §4.2: 42 octets.
    fn header(flags: u8, address: [u8; 16]) -> Vec<u8> {
        let mut out = vec![0, flags, 0, 0, 0, 0, 0, 0, 0, 0];
        out.extend(address);
        out.extend([0, 0, 0xfc, 1, 10, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0, 0]);
        out
    }

    #[test]
    fn headers_are_laid_out_as_the_rfc_says() {
        let v4 = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2];
        let seen = route_monitoring(&peer("10.0.0.2"), Stage::After, &[1, 2, 3]);
        let mut expected = vec![3, 0, 0, 0, 51, 0];
        expected.extend(header(0x40, v4));
        expected.extend([1, 2, 3]);
        assert_eq!(seen.to_vec(), expected);
        let mut v6 = [0; 16];
        v6[0] = 0xfd;
        v6[15] = 2;
        let seen = route_monitoring(&peer("fd00::2"), Stage::Before, &[]);
        assert_eq!(seen[6..], header(0x80, v6));
    }

    #[test]
    fn a_session_that_ends_has_the_reason_of_the_rfc() {
        let ended = Notification::new(crate::wire::ErrorCode::Cease, 2);
        for (cause, reason, more) in [
            (Some(DownCause::Sent(ended.clone())), 1, 21),
            (Some(DownCause::Stopped), 2, 2),
            (Some(DownCause::Received(ended)), 3, 21),
            (Some(DownCause::Closed), 4, 0),
            (None, 5, 0),
        ] {
            let seen = peer_down(&peer("10.0.0.2"), cause.as_ref());
            assert_eq!((seen[5], seen[48]), (PEER_DOWN, reason), "{cause:?}");
            assert_eq!(seen.len(), 49 + more, "{cause:?}");
        }
    }

    #[test]
    fn the_first_message_names_us_and_the_last_says_why() {
        let first = initiation("node1", "bgpd");
        assert_eq!(first[..6], [3, 0, 0, 0, 23, INITIATION]);
        assert_eq!(&first[6..], b"\0\x01\0\x04bgpd\0\x02\0\x05node1");
        assert_eq!(termination()[..], [3, 0, 0, 0, 12, 5, 0, 1, 0, 2, 0, 0]);
    }
}
