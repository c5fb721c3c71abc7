//! Packets that rules log to a group (`nflog`), over `nfnetlink_log` (`include/uapi/linux/netfilter/nfnetlink_log.h`).
//!
//! One socket has a group at a time: a second reader of the same group is refused. What does not fit into the socket's
//! buffer is lost, and counted by nobody.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockProtocol};
use tokio::io::unix::AsyncFd;

use crate::NetNs;
use crate::conntrack::Tuple;
use crate::error::{Error, Result};
use crate::events::EventSocket;
use crate::link::IfIndex;
use crate::rtnl::{AF_INET, AF_INET6};
use crate::socket::Socket;
use crate::sys::readable_socket;
use crate::wire::{Attr, Attrs, Message, Messages, NLM_F_ACK, NLM_F_REQUEST};

const NFNL_SUBSYS_ULOG: u16 = 4;
const PACKET: u16 = NFNL_SUBSYS_ULOG << 8;
const CONFIG: u16 = NFNL_SUBSYS_ULOG << 8 | 1;
const NFGENMSG: usize = 4;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_TIMEOUT: u16 = 4;
const NFULA_CFG_QTHRESH: u16 = 5;
const CMD_BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const NFULA_IFINDEX_INDEV: u16 = 4;
const NFULA_IFINDEX_OUTDEV: u16 = 5;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_PREFIX: u16 = 10;
/// Headers of both layers fit.
const SNAPLEN: u32 = 128;
const BUFFER: usize = 4 << 20;
/// Datagrams that are read before others get a turn.
const TURN: usize = 256;

/// A packet as a rule logged it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedPacket {
    /// The prefix that the rule gives.
    pub prefix: String,
    /// Where it came in.
    pub input: Option<IfIndex>,
    /// Where it goes out.
    pub output: Option<IfIndex>,
    /// Its ends. For ICMP, the destination port is type and code, as in [`crate::conntrack`].
    pub tuple: Tuple,
}

/// A reader of one group.
#[derive(Debug)]
pub struct PacketLog {
    socket: AsyncFd<EventSocket>,
    waiting: VecDeque<LoggedPacket>,
}

impl PacketLog {
    /// Binds the group inside `netns`. Needs a running tokio runtime, and `CAP_NET_ADMIN`.
    ///
    /// # Errors
    /// `EBUSY` where somebody else reads the group.
    pub fn open(netns: &NetNs, group: u16) -> Result<Self> {
        let mut socket = netns.run(|| Socket::open(SockProtocol::NetlinkNetFilter))??;
        let about = || format!("nflog group {group}");
        socket.set_receive_buffer(BUFFER);
        // A packet is sent on at once: one for each message, and no waiting (in hundredths of a second).
        let settings: [(u16, Vec<u8>); 4] = [
            (NFULA_CFG_CMD, vec![CMD_BIND]),
            (NFULA_CFG_MODE, mode()),
            (NFULA_CFG_QTHRESH, 1_u32.to_be_bytes().to_vec()),
            (NFULA_CFG_TIMEOUT, 1_u32.to_be_bytes().to_vec()),
        ];
        for (kind, payload) in settings {
            let result = socket
                .batch(1, |writer, _, sequence| {
                    writer.begin(CONFIG, NLM_F_REQUEST | NLM_F_ACK, sequence);
                    let [high, low] = group.to_be_bytes();
                    writer.raw(&[0, 0, high, low]);
                    writer.attr(kind, &payload);
                    writer.finish();
                    Ok(())
                })
                .pop();
            if let Some(Err(cause)) = result {
                return Err(Error::new("read", about(), cause));
            }
        }
        socket
            .set_nonblocking()
            .map_err(|errno| Error::errno("read", about(), errno))?;
        let socket = readable_socket(EventSocket(socket))
            .map_err(|error| Error::io("read", about(), &error))?;
        Ok(Self {
            socket,
            waiting: VecDeque::new(),
        })
    }

    /// The next packet; waits for it. Safe to drop while waiting.
    ///
    /// # Errors
    /// The socket is broken.
    pub async fn next(&mut self) -> Result<LoggedPacket> {
        loop {
            if let Some(packet) = self.waiting.pop_front() {
                return Ok(packet);
            }
            let mut ready = self
                .socket
                .readable_mut()
                .await
                .map_err(|error| Error::io("wait for", "logged packets", &error))?;
            let socket = &mut ready.get_inner_mut().0;
            let mut empty = false;
            for _ in 0..TURN {
                match socket.receive(MsgFlags::MSG_DONTWAIT) {
                    Ok(bytes) => self
                        .waiting
                        .extend(Messages(bytes).filter_map(|message| read(&message))),
                    Err(Errno::EAGAIN) => {
                        empty = true;
                        break;
                    }
                    // Packets were lost: the ones after them are still of use.
                    Err(Errno::ENOBUFS | Errno::EINTR) => {}
                    Err(errno) => return Err(Error::errno("read", "logged packets", errno)),
                }
            }
            if empty {
                ready.clear_ready();
            }
        }
    }
}

/// `struct nfulnl_msg_config_mode`.
fn mode() -> Vec<u8> {
    let mut mode = SNAPLEN.to_be_bytes().to_vec();
    mode.extend([COPY_PACKET, 0]);
    mode
}

fn read(message: &Message<'_>) -> Option<LoggedPacket> {
    if message.kind != PACKET {
        return None;
    }
    let attrs = Attrs::after(message.payload, NFGENMSG);
    let device = |kind| attrs.find(kind).and_then(Attr::get_be32);
    let prefix = attrs
        .find(NFULA_PREFIX)
        .map_or_else(String::new, Attr::get_text);
    Some(LoggedPacket {
        prefix,
        input: device(NFULA_IFINDEX_INDEV),
        output: device(NFULA_IFINDEX_OUTDEV),
        tuple: read_packet(attrs.find(NFULA_PAYLOAD)?.payload, message.payload.first())?,
    })
}

/// The ends of a packet from its headers (RFC 791 §3.1, RFC 8200 §3).
fn read_packet(data: &[u8], family: Option<&u8>) -> Option<Tuple> {
    let version = data.first()? >> 4;
    let (source, destination, protocol, transport): (IpAddr, IpAddr, u8, usize) =
        match (version, family) {
            (4, Some(&AF_INET) | None) => {
                let word = |at: usize| <[u8; 4]>::try_from(data.get(at..at + 4)?).ok();
                (
                    Ipv4Addr::from(word(12)?).into(),
                    Ipv4Addr::from(word(16)?).into(),
                    *data.get(9)?,
                    usize::from(data.first()? & 0x0f) * 4,
                )
            }
            (6, Some(&AF_INET6) | None) => {
                let word = |at: usize| <[u8; 16]>::try_from(data.get(at..at + 16)?).ok();
                (
                    Ipv6Addr::from(word(8)?).into(),
                    Ipv6Addr::from(word(24)?).into(),
                    *data.get(6)?,
                    40,
                )
            }
            _ => return None,
        };
    let half = |at: usize| {
        let bytes = data.get(transport + at..transport + at + 2)?;
        Some(u16::from_be_bytes([*bytes.first()?, *bytes.get(1)?]))
    };
    let (source_port, destination_port) = match protocol {
        // Type and code come first, the identifier after the checksum (RFC 792, RFC 4443).
        1 | 58 => (half(4).unwrap_or(0), half(0).unwrap_or(0)),
        6 | 17 | 33 | 132 | 136 => (half(0).unwrap_or(0), half(2).unwrap_or(0)),
        _ => (0, 0),
    };
    Some(Tuple {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_from_both_families_and_short_packets_are_refused() {
        let mut v4 = vec![
            0x46, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        // Four octets of options.
        v4.extend([0, 0, 0, 0]);
        v4.extend([0x9c, 0x40, 0, 53, 0, 8, 0, 0]);
        let tuple = read_packet(&v4, Some(&AF_INET)).expect("a packet");
        assert_eq!(
            tuple.to_string(),
            "17 10.0.0.1 port 40000 -> 10.0.0.2 port 53"
        );
        let mut v6 = vec![0x60, 0, 0, 0, 0, 8, 58, 64];
        v6.extend([0xfd; 16]);
        v6.extend([0xfe; 16]);
        v6.extend([128, 0, 0, 0, 0, 7, 0, 1]);
        let tuple = read_packet(&v6, Some(&AF_INET6)).expect("a packet");
        assert_eq!((tuple.source_port, tuple.destination_port), (7, 128 << 8));
        for len in 0..20 {
            assert_eq!(read_packet(&v4[..len], Some(&AF_INET)), None);
        }
        assert_eq!(read_packet(&v6, Some(&AF_INET)), None);
    }
}
