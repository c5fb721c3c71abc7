//! WireGuard devices over generic netlink (`include/uapi/linux/wireguard.h`): keys, ports, peers and their prefixes.
//!
//! The device itself is a link ([`crate::NewLinkKind::Wireguard`]). What is set here is written in messages of bounded
//! size: peers, and the prefixes of one peer, go over several messages where they do not fit into one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnetwork::IpNetwork;
use nix::sys::socket::SockProtocol;

use crate::{
    IfIndex, NetNs,
    error::{Cause, Error, Result},
    genetlink::{self, HEADER},
    rtnl::{AF_INET, AF_INET6},
    socket::Socket,
    wire::{Attr, Attrs, Message, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Writer},
};

const FAMILY: &str = "wireguard";
const WG_CMD_GET_DEVICE: u8 = 0;
const WG_CMD_SET_DEVICE: u8 = 1;

const WGDEVICE_A_IFINDEX: u16 = 1;
const WGDEVICE_A_PRIVATE_KEY: u16 = 3;
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_FWMARK: u16 = 7;
const WGDEVICE_A_PEERS: u16 = 8;

const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_FLAGS: u16 = 3;
const WGPEER_A_ENDPOINT: u16 = 4;
const WGPEER_A_KEEPALIVE: u16 = 5;
const WGPEER_A_LAST_HANDSHAKE: u16 = 6;
const WGPEER_A_RX_BYTES: u16 = 7;
const WGPEER_A_TX_BYTES: u16 = 8;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGPEER_F_REMOVE_ME: u32 = 1;
const WGPEER_F_REPLACE_ALLOWEDIPS: u32 = 2;

const WGALLOWEDIP_A_FAMILY: u16 = 1;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// Prefixes per message: 28 to 40 bytes each, well under the 64 KB of a nested attribute.
const PREFIXES_PER_MESSAGE: usize = 1024;

/// A Curve25519 key; shown in base64. Never printed by `Debug`, since it may be a private one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WgKey(pub [u8; 32]);

impl WgKey {
    /// All zero: the kernel's form of "none".
    pub fn is_zero(&self) -> bool {
        self.0 == [0; 32]
    }
}

impl fmt::Display for WgKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for WgKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WgKey(..)")
    }
}

/// The text is not 32 bytes in base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a WireGuard key: expected 32 bytes in base64")]
pub struct BadKey;

impl FromStr for WgKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        let bytes = STANDARD.decode(text.trim()).map_err(|_| BadKey)?;
        bytes.try_into().map(Self).map_err(|_| BadKey)
    }
}

/// A peer as it is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WgPeer {
    /// Where it is reached.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives; 0: none.
    pub keepalive: u16,
    /// Prefixes that lie behind it: the routes inside the device, and the sources that it may use.
    pub prefixes: BTreeSet<IpNetwork>,
}

/// What the kernel counts about a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WgPeerState {
    /// Seconds since the epoch of the last handshake; 0: none yet.
    pub last_handshake: i64,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
}

/// A device as the kernel has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WgDevice {
    /// Its private key, if it has one (readable with `CAP_NET_ADMIN`).
    pub private_key: Option<WgKey>,
    /// Its public key.
    pub public_key: Option<WgKey>,
    /// UDP port.
    pub port: u16,
    /// Mark of outer packets; 0: none.
    pub fwmark: u32,
    /// Peers by public key.
    pub peers: BTreeMap<WgKey, (WgPeer, WgPeerState)>,
}

/// What to set; `None` leaves as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WgChange {
    /// Private key.
    pub private_key: Option<WgKey>,
    /// UDP port.
    pub port: Option<u16>,
    /// Mark of outer packets; 0 takes it away.
    pub fwmark: Option<u32>,
    /// Peers to be made or changed. Their prefixes are replaced, during which the kernel has none of them for a moment, but for
    /// those in `add_only`.
    pub peers: BTreeMap<WgKey, WgPeer>,
    /// Peers that only get further prefixes: those that are given.
    pub add_only: BTreeSet<WgKey>,
    /// Peers to be removed.
    pub remove: BTreeSet<WgKey>,
}

/// A handle to the WireGuard devices of ONE namespace. Clones share the socket.
#[derive(Debug, Clone)]
pub struct Wireguard {
    socket: Arc<Mutex<Socket>>,
    family: u16,
}

impl Wireguard {
    /// Opens the socket inside `netns`. The family is there once a WireGuard device has been made.
    ///
    /// # Errors
    /// No module has registered the family, or the socket cannot be opened.
    pub fn open(netns: &NetNs) -> Result<Self> {
        let mut socket = netns.run(|| Socket::open(SockProtocol::NetlinkGeneric))??;
        let family = genetlink::family(&mut socket, FAMILY)
            .map_err(|cause| Error::new("find", format!("netlink family {FAMILY}"), cause))?;
        Ok(Self {
            socket: Arc::new(Mutex::new(socket)),
            family,
        })
    }

    /// One device with all its peers.
    ///
    /// # Errors
    /// There is none of that index, or it is of another kind.
    pub fn get(&self, index: IfIndex) -> Result<WgDevice> {
        let write = |writer: &mut Writer, sequence| {
            genetlink::begin(
                writer,
                self.family,
                WG_CMD_GET_DEVICE,
                NLM_F_REQUEST | NLM_F_DUMP,
                sequence,
            );
            writer.u32(WGDEVICE_A_IFINDEX, index);
            writer.finish();
        };
        let parts = self
            .lock()
            .dump(write, read_part)
            .map_err(|cause| Error::new("read", format!("WireGuard device #{index}"), cause))?;
        Ok(merge(parts))
    }

    /// Changes a device.
    ///
    /// # Errors
    /// The first message that the kernel refused.
    pub fn set(&self, index: IfIndex, change: &WgChange) -> Result<()> {
        let messages = split(change);
        let results = self.lock().batch(messages.len(), |writer, at, sequence| {
            write_set(writer, self.family, index, &messages[at], sequence);
            Ok(())
        });
        results
            .into_iter()
            .collect::<std::result::Result<(), Cause>>()
            .map_err(|cause| Error::new("change", format!("WireGuard device #{index}"), cause))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One message's part of a change.
#[derive(Debug, Default, PartialEq, Eq)]
struct Piece<'a> {
    private_key: Option<WgKey>,
    port: Option<u16>,
    fwmark: Option<u32>,
    peers: Vec<PeerPiece<'a>>,
}

/// A peer, or some of its prefixes.
#[derive(Debug, PartialEq, Eq)]
struct PeerPiece<'a> {
    key: WgKey,
    flags: u32,
    /// Endpoint and keepalive; absent in continuations and removals.
    peer: Option<&'a WgPeer>,
    prefixes: Vec<IpNetwork>,
}

/// Divides a change so that no message becomes too long. Removals come first: a prefix belongs to one peer only, and
/// a key that was exchanged hands its prefixes to the new one.
fn split(change: &WgChange) -> Vec<Piece<'_>> {
    let mut split = Split {
        pieces: Vec::new(),
        last: Piece {
            private_key: change.private_key,
            port: change.port,
            fwmark: change.fwmark,
            peers: Vec::new(),
        },
        room: PREFIXES_PER_MESSAGE,
    };
    for key in &change.remove {
        split.push(PeerPiece {
            key: *key,
            flags: WGPEER_F_REMOVE_ME,
            peer: None,
            prefixes: Vec::new(),
        });
    }
    for (key, peer) in &change.peers {
        let all: Vec<IpNetwork> = peer.prefixes.iter().copied().collect();
        let mut chunks = all.chunks(PREFIXES_PER_MESSAGE - PEER_COST);
        split.push(PeerPiece {
            key: *key,
            flags: if change.add_only.contains(key) {
                0
            } else {
                WGPEER_F_REPLACE_ALLOWEDIPS
            },
            peer: Some(peer),
            prefixes: chunks.next().unwrap_or_default().to_vec(),
        });
        for chunk in chunks {
            split.push(PeerPiece {
                key: *key,
                flags: 0,
                peer: None,
                prefixes: chunk.to_vec(),
            });
        }
    }
    split.pieces.push(split.last);
    split.pieces
}

/// A peer without prefixes takes about as much as so many of them.
const PEER_COST: usize = 3;

struct Split<'a> {
    pieces: Vec<Piece<'a>>,
    last: Piece<'a>,
    /// Prefixes that the last message still has room for.
    room: usize,
}

impl<'a> Split<'a> {
    fn push(&mut self, add: PeerPiece<'a>) {
        let cost = add.prefixes.len() + PEER_COST;
        if cost > self.room {
            self.pieces.push(std::mem::take(&mut self.last));
            self.room = PREFIXES_PER_MESSAGE;
        }
        self.room = self.room.saturating_sub(cost);
        self.last.peers.push(add);
    }
}

fn write_set(writer: &mut Writer, family: u16, index: IfIndex, piece: &Piece<'_>, sequence: u32) {
    genetlink::begin(
        writer,
        family,
        WG_CMD_SET_DEVICE,
        NLM_F_REQUEST | NLM_F_ACK,
        sequence,
    );
    writer.u32(WGDEVICE_A_IFINDEX, index);
    if let Some(key) = piece.private_key {
        writer.attr(WGDEVICE_A_PRIVATE_KEY, &key.0);
    }
    if let Some(port) = piece.port {
        writer.u16(WGDEVICE_A_LISTEN_PORT, port);
    }
    if let Some(fwmark) = piece.fwmark {
        writer.u32(WGDEVICE_A_FWMARK, fwmark);
    }
    if !piece.peers.is_empty() {
        let peers = writer.nest(WGDEVICE_A_PEERS);
        for peer in &piece.peers {
            write_peer(writer, peer);
        }
        writer.end(peers);
    }
    writer.finish();
}

fn write_peer(writer: &mut Writer, piece: &PeerPiece<'_>) {
    let nest = writer.nest(0);
    writer.attr(WGPEER_A_PUBLIC_KEY, &piece.key.0);
    if piece.flags != 0 {
        writer.u32(WGPEER_A_FLAGS, piece.flags);
    }
    if let Some(peer) = piece.peer {
        if let Some(endpoint) = peer.endpoint {
            writer.attr(WGPEER_A_ENDPOINT, &sockaddr(endpoint));
        }
        writer.u16(WGPEER_A_KEEPALIVE, peer.keepalive);
    }
    if !piece.prefixes.is_empty() {
        let list = writer.nest(WGPEER_A_ALLOWEDIPS);
        for prefix in &piece.prefixes {
            let one = writer.nest(0);
            let family = if prefix.is_ipv4() { AF_INET } else { AF_INET6 };
            writer.u16(WGALLOWEDIP_A_FAMILY, u16::from(family));
            writer.ip(WGALLOWEDIP_A_IPADDR, prefix.network());
            writer.u8(WGALLOWEDIP_A_CIDR_MASK, prefix.prefix());
            writer.end(one);
        }
        writer.end(list);
    }
    writer.end(nest);
}

/// `struct sockaddr_in` (16 bytes) or `sockaddr_in6` (28 bytes).
fn sockaddr(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    match address {
        SocketAddr::V4(v4) => {
            bytes.extend(u16::from(AF_INET).to_ne_bytes());
            bytes.extend(v4.port().to_be_bytes());
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend(u16::from(AF_INET6).to_ne_bytes());
            bytes.extend(v6.port().to_be_bytes());
            bytes.extend(v6.flowinfo().to_be_bytes());
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
        }
    }
    bytes
}

fn read_sockaddr(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let ip = if family == u16::from(AF_INET) {
        let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
        IpAddr::V4(Ipv4Addr::from(octets))
    } else {
        let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    Some(SocketAddr::new(ip, port))
}

/// One message of a dump: the device's own settings come in the first, peers in all.
fn read_part(message: &Message<'_>) -> Option<WgDevice> {
    let key = |attr: Attr<'_>| attr.payload.try_into().ok().map(WgKey);
    let mut device = WgDevice::default();
    for attr in Attrs::after(message.payload, HEADER) {
        match attr.kind {
            WGDEVICE_A_PRIVATE_KEY => device.private_key = key(attr).filter(|key| !key.is_zero()),
            WGDEVICE_A_PUBLIC_KEY => device.public_key = key(attr).filter(|key| !key.is_zero()),
            WGDEVICE_A_LISTEN_PORT => device.port = attr.get_u16()?,
            WGDEVICE_A_FWMARK => device.fwmark = attr.get_u32()?,
            WGDEVICE_A_PEERS => device.peers.extend(attr.nested().filter_map(read_peer)),
            _ => {}
        }
    }
    Some(device)
}

fn read_peer(attr: Attr<'_>) -> Option<(WgKey, (WgPeer, WgPeerState))> {
    let mut key = None;
    let mut peer = WgPeer {
        endpoint: None,
        keepalive: 0,
        prefixes: BTreeSet::new(),
    };
    let mut state = WgPeerState::default();
    let number = |attr: Attr<'_>| Some(u64::from_ne_bytes(attr.payload.get(..8)?.try_into().ok()?));
    for attr in attr.nested() {
        match attr.kind {
            WGPEER_A_PUBLIC_KEY => key = attr.payload.try_into().ok().map(WgKey),
            WGPEER_A_ENDPOINT => peer.endpoint = read_sockaddr(attr.payload),
            WGPEER_A_KEEPALIVE => peer.keepalive = attr.get_u16()?,
            WGPEER_A_LAST_HANDSHAKE => state.last_handshake = number(attr)?.cast_signed(),
            WGPEER_A_RX_BYTES => state.received = number(attr)?,
            WGPEER_A_TX_BYTES => state.sent = number(attr)?,
            WGPEER_A_ALLOWEDIPS => peer.prefixes = attr.nested().filter_map(read_prefix).collect(),
            _ => {}
        }
    }
    Some((key?, (peer, state)))
}

fn read_prefix(attr: Attr<'_>) -> Option<IpNetwork> {
    let address = attr.nested().find(WGALLOWEDIP_A_IPADDR)?.get_ip()?;
    let length = attr.nested().find(WGALLOWEDIP_A_CIDR_MASK)?.get_u8()?;
    IpNetwork::new(address, length).ok()
}

/// A peer whose prefixes did not fit into one message is continued in the next.
fn merge(parts: Vec<WgDevice>) -> WgDevice {
    let mut whole = WgDevice::default();
    for part in parts {
        if part.public_key.is_some() || part.port != 0 {
            whole.private_key = part.private_key;
            whole.public_key = part.public_key;
            whole.port = part.port;
            whole.fwmark = part.fwmark;
        }
        for (key, (peer, state)) in part.peers {
            match whole.peers.get_mut(&key) {
                Some((known, _)) => known.prefixes.extend(peer.prefixes),
                None => {
                    whole.peers.insert(key, (peer, state));
                }
            }
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Messages;

    fn key(byte: u8) -> WgKey {
        WgKey([byte; 32])
    }

    fn peer(prefixes: usize) -> WgPeer {
        let prefixes = (0..prefixes).map(|at| {
            let address = Ipv4Addr::from(0x0a00_0000 + (at as u32) * 64);
            IpNetwork::new(address.into(), 26).unwrap()
        });
        WgPeer {
            endpoint: Some("10.1.0.2:51820".parse().unwrap()),
            keepalive: 25,
            prefixes: prefixes.collect(),
        }
    }

    /// Writes a change and reads it back with the reader of dumps: both use the same attributes.
    fn round_trip(change: &WgChange) -> (usize, WgDevice) {
        let pieces = split(change);
        let parts = pieces.iter().map(|piece| {
            let mut writer = Writer::default();
            write_set(&mut writer, 33, 7, piece, 1);
            let message = Messages(writer.as_slice()).next().unwrap();
            assert_eq!(message.kind, 33);
            assert_eq!(message.payload[..2], [WG_CMD_SET_DEVICE, 1]);
            assert!(writer.len() < 60_000, "{}", writer.len());
            read_part(&message).unwrap()
        });
        let parts: Vec<_> = parts.collect();
        (parts.len(), merge(parts))
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut v6 = peer(2);
        v6.endpoint = Some("[fd00::2]:51821".parse().unwrap());
        v6.prefixes.insert("fd00:20::/122".parse().unwrap());
        let change = WgChange {
            private_key: Some(key(1)),
            port: Some(51820),
            fwmark: Some(0x20_0000),
            peers: BTreeMap::from([(key(2), peer(3)), (key(3), v6)]),
            ..WgChange::default()
        };
        let (messages, device) = round_trip(&change);
        assert_eq!(messages, 1);
        assert_eq!(
            (device.private_key, device.port, device.fwmark),
            (Some(key(1)), 51820, 0x20_0000)
        );
        let peers: BTreeMap<WgKey, WgPeer> = device
            .peers
            .into_iter()
            .map(|(key, (peer, _))| (key, peer))
            .collect();
        assert_eq!(peers, change.peers);
    }

    #[test]
    fn many_prefixes_and_peers_are_divided_and_nothing_is_lost() {
        let mut peers: BTreeMap<WgKey, WgPeer> = (0..200).map(|at| (key(at), peer(40))).collect();
        peers.insert(key(250), peer(5000));
        let change = WgChange {
            peers,
            port: Some(51820),
            ..WgChange::default()
        };
        let (messages, device) = round_trip(&change);
        assert!(messages > 10, "{messages}");
        for (key, peer) in &change.peers {
            assert_eq!(&device.peers[key].0, peer);
        }
    }

    #[test]
    fn a_continuation_does_not_replace_what_came_before() {
        let change = WgChange {
            peers: BTreeMap::from([(key(1), peer(3000))]),
            ..WgChange::default()
        };
        let pieces = split(&change);
        let flags: Vec<u32> = pieces
            .iter()
            .flat_map(|piece| piece.peers.iter().map(|peer| peer.flags))
            .collect();
        assert_eq!(flags, [WGPEER_F_REPLACE_ALLOWEDIPS, 0, 0]);
        let change = WgChange {
            add_only: BTreeSet::from([key(1)]),
            ..change
        };
        assert_eq!(split(&change)[0].peers[0].flags, 0);
    }

    #[test]
    fn removals_come_before_the_peers_that_take_over() {
        let change = WgChange {
            peers: BTreeMap::from([(key(1), peer(1))]),
            remove: BTreeSet::from([key(9)]),
            ..WgChange::default()
        };
        let order: Vec<(WgKey, u32)> = split(&change)[0]
            .peers
            .iter()
            .map(|peer| (peer.key, peer.flags))
            .collect();
        assert_eq!(
            order,
            [
                (key(9), WGPEER_F_REMOVE_ME),
                (key(1), WGPEER_F_REPLACE_ALLOWEDIPS)
            ]
        );
    }

    #[test]
    fn keys_are_base64_of_32_bytes() {
        let text = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
        assert_eq!(text.parse(), Ok(key(1)));
        assert_eq!(key(1).to_string(), text);
        for bad in ["", "key", "AQE="] {
            assert_eq!(bad.parse::<WgKey>(), Err(BadKey), "{bad}");
        }
        assert!(!format!("{:?}", key(1)).contains("AQEB"));
    }
}
