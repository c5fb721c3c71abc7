//! SCTP by hand: an INIT and its INIT ACK over raw sockets (RFC 9260 §3.3.2, §3.3.3), for kernels without SCTP.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::probe::{bound, fresh_number};

const SCTP: i32 = 132;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const HEADER: usize = 12;

/// CRC-32C (Castagnoli), reflected, as RFC 9260 appendix A wants it.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let low = crc & 1;
            crc >>= 1;
            if low == 1 {
                crc ^= 0x82f6_3b78;
            }
        }
    }
    !crc
}

/// Common header and one INIT or INIT ACK chunk without parameters.
fn message(chunk: u8, from: u16, to: u16, tag: u32, own_tag: u32) -> Vec<u8> {
    let mut data = Vec::with_capacity(HEADER + 20);
    data.extend(from.to_be_bytes());
    data.extend(to.to_be_bytes());
    data.extend(tag.to_be_bytes());
    data.extend([0; 4]);
    data.extend([chunk, 0, 0, 20]);
    data.extend(own_tag.to_be_bytes());
    data.extend(65_536_u32.to_be_bytes());
    data.extend([0, 1, 0, 1]);
    data.extend(1_u32.to_be_bytes());
    let sum = crc32c(&data);
    data[8..12].copy_from_slice(&sum.to_le_bytes());
    data
}

/// The SCTP message of a received packet: raw sockets see the IPv4 header, too.
fn body(v4: bool, packet: &[u8]) -> &[u8] {
    let start = match (v4, packet.first()) {
        (true, Some(first)) => usize::from(first & 0xf) * 4,
        _ => 0,
    };
    packet.get(start..).unwrap_or_default()
}

fn ports(message: &[u8]) -> Option<(u16, u16, u8)> {
    let number = |at: usize| {
        Some(u16::from_be_bytes(
            message.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    Some((number(0)?, number(2)?, *message.get(HEADER)?))
}

/// Sends an INIT and waits for the INIT ACK.
pub(super) fn initiate(
    to: IpAddr,
    port: u16,
    source_port: u16,
    limit: Duration,
) -> std::io::Result<()> {
    let source_port = match source_port {
        0 => fresh_number(),
        port => port,
    };
    let socket = bound(to, Type::RAW, Protocol::from(SCTP), 0, limit)?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    socket.send(&message(INIT, source_port, port, 0, 0x0ca1_1000))?;
    let end = Instant::now() + limit;
    let mut data = [0; 256];
    while Instant::now() < end {
        let len = (&mut &socket).read(&mut data)?;
        if ports(body(to.is_ipv4(), &data[..len])) == Some((port, source_port, INIT_ACK)) {
            return Ok(());
        }
    }
    Err(ErrorKind::TimedOut.into())
}

/// Answers INITs to one port, over both families, until it is dropped.
#[derive(Debug)]
pub struct Responder {
    ended: Arc<AtomicBool>,
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl Responder {
    pub(super) fn start(port: u16) -> std::io::Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        for v4 in [true, false] {
            let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(SCTP)))?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            // For its methods only, which read into bytes; the socket stays raw.
            let socket = UdpSocket::from(socket);
            let ended = ended.clone();
            thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    answer(&socket, v4, port);
                }
            });
        }
        Ok(Self { ended })
    }
}

fn answer(socket: &UdpSocket, v4: bool, port: u16) {
    let mut packet = [0_u8; 256];
    let Ok((len, from)) = socket.recv_from(&mut packet) else {
        return;
    };
    let request = body(v4, &packet[..len]);
    let Some((source, destination, INIT)) = ports(request) else {
        return;
    };
    let Some(Ok(tag)) = request.get(HEADER + 4..HEADER + 8).map(TryInto::try_into) else {
        return;
    };
    if destination == port {
        let tag = u32::from_be_bytes(tag);
        let _ = socket.send_to(&message(INIT_ACK, port, source, tag, 0x0ca1_1001), from);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 3720 appendix B.4.
        assert_eq!(super::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(super::crc32c(&[0xff; 32]), 0x62a8_ab43);
    }
}
