//! A peer that writes what the test wants.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bgpd::transport::memory::Network;
use bgpd::transport::{Connection, Protection, Target, Transport};
use bgpd::wire::{
    AsPath, Attributes, Capability, Codec, Family, FamilySet, Framer, GracefulRestart,
    GracefulRestartFamily, Message, NextHop, Nlri, Open, Packer, PeerKind, Prefix,
};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::addr;

/// A connection with the messages that came in on it.
pub(crate) struct Raw {
    pub(crate) connection: Connection,
    framer: Framer,
    buffer: BytesMut,
    codec: Codec,
}

/// What a raw peer of this number says first.
pub(crate) fn open(n: u8, asn: u32) -> Open {
    let kept = GracefulRestartFamily {
        family: Family::IPV4_UNICAST,
        forwarding_preserved: true,
    };
    Open {
        asn,
        hold_time: 90,
        router_id: Ipv4Addr::new(10, 0, 0, n),
        capabilities: vec![
            Capability::Multiprotocol(Family::IPV4_UNICAST),
            Capability::RouteRefresh,
            Capability::GracefulRestart(GracefulRestart {
                restarting: false,
                notification: false,
                restart_time: 120,
                families: vec![kept],
            }),
        ],
        four_octet_as: true,
    }
}

/// What both sides use once OPENs of [`open`] are exchanged.
pub(crate) fn codec() -> Codec {
    Codec {
        four_octet_as: true,
        families: FamilySet::IPV4,
        ..Codec::basic(PeerKind::Ebgp)
    }
}

/// An UPDATE of an external peer that announces these prefixes.
pub(crate) fn announcement(n: u8, asn: u32, prefixes: &[Prefix]) -> Vec<Bytes> {
    let attributes = Attributes {
        as_path: AsPath::from_sequence(&[asn]),
        ..Attributes::default()
    };
    let routes: Vec<Nlri> = prefixes.iter().map(|p| Nlri::new(*p)).collect();
    let next_hop = NextHop::V4(Ipv4Addr::new(10, 0, 0, n));
    let mut out = Vec::new();
    let _ = Packer::new(codec()).announce(
        Family::IPV4_UNICAST,
        &attributes,
        &next_hop,
        &routes,
        &mut out,
    );
    out
}

/// The octets of a message before OPENs have been exchanged.
pub(crate) fn octets(message: &Message) -> Bytes {
    message.encode(&Codec::basic(PeerKind::Ebgp)).unwrap()
}

impl Raw {
    /// Dials speaker `to` from the address of `n`.
    pub(crate) async fn dial(network: &Network, n: u8, to: u8) -> std::io::Result<Self> {
        let target = Target {
            remote: SocketAddr::new(addr(to), 179),
            source: None,
            interface: None,
            protection: Protection::default(),
        };
        let connection = network.host(&[addr(n)]).dial(&target).await?;
        Ok(Self {
            connection,
            framer: Framer::new(),
            buffer: BytesMut::new(),
            codec: codec(),
        })
    }

    /// Writes; what the other end does with it is its affair.
    pub(crate) async fn write(&mut self, octets: &[u8]) {
        let write = self.connection.stream.write_all(octets);
        let _ = tokio::time::timeout(Duration::from_secs(1), write).await;
    }

    /// The next message; `None` at the end of the stream or after a while.
    pub(crate) async fn next(&mut self, limit: Duration) -> Option<Message> {
        let read = async {
            loop {
                if let Ok(Some(frame)) = self.framer.next(&mut self.buffer) {
                    return Message::decode(&frame, &self.codec).ok();
                }
                match self.connection.stream.read_buf(&mut self.buffer).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        tokio::time::timeout(limit, read).await.ok().flatten()
    }

    /// Becomes Established as an external peer of this AS.
    pub(crate) async fn establish(&mut self, n: u8, asn: u32) {
        self.write(&octets(&Message::Open(open(n, asn)))).await;
        self.write(&octets(&Message::Keepalive)).await;
        let first = self.next(Duration::from_secs(5)).await;
        assert!(matches!(first, Some(Message::Open(_))), "{first:?}");
        let second = self.next(Duration::from_secs(5)).await;
        assert_eq!(second, Some(Message::Keepalive));
    }
}
