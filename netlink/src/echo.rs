//! Echo requests of a given size that nobody may fragment: whether a path carries them.
//!
//! The kernel's own idea of the path's MTU is left out (`IP_PMTUDISC_PROBE`), so that the path is tried and not what was
//! learned of it. Blocking; needs `CAP_NET_RAW`.

use std::{
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    error::{Error, Result},
    sys::set_option,
};

/// `include/uapi/linux/in.h`, `in6.h`: never fragment, and send beyond the known path MTU.
const IP_PMTUDISC_PROBE: libc::c_int = 3;
/// ICMP header: type, code, checksum, identifier, sequence number.
const ICMP_HEADER: usize = 8;

/// What became of an echo request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It was answered.
    Answered,
    /// This host's device, or a router on the way, said that it is too big.
    TooBig,
    /// Nothing was heard of it.
    Lost,
}

/// A socket for echo requests to one address.
#[derive(Debug)]
pub struct Echo {
    socket: Socket,
    to: IpAddr,
    ident: u16,
    sequence: u16,
}

impl Echo {
    /// Opens the socket in the namespace of the calling thread. `ident` tells its answers from those of others.
    pub fn open(to: IpAddr, ident: u16) -> Result<Self> {
        let object = || format!("ICMP socket to {to}");
        let (domain, protocol, level, option) = match to {
            IpAddr::V4(_) => (
                Domain::IPV4,
                Protocol::ICMPV4,
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
            ),
            IpAddr::V6(_) => (
                Domain::IPV6,
                Protocol::ICMPV6,
                libc::IPPROTO_IPV6,
                libc::IPV6_MTU_DISCOVER,
            ),
        };
        let io = |error: std::io::Error| Error::io("open", object(), &error);
        let socket = Socket::new(domain, Type::RAW, Some(protocol)).map_err(io)?;
        set_option(socket.as_fd(), level, option, &IP_PMTUDISC_PROBE)
            .map_err(|errno| Error::errno("set up", object(), errno))?;
        if to.is_ipv6() {
            // Without it the kernel keeps "too big" to itself while it sends beyond the known path MTU.
            set_option(socket.as_fd(), level, libc::IPV6_RECVERR, &1_i32)
                .map_err(|errno| Error::errno("set up", object(), errno))?;
        }
        // Connected, so that "too big" of a router is heard as an error of this socket.
        socket.connect(&SocketAddr::new(to, 0).into()).map_err(io)?;
        Ok(Self {
            socket,
            to,
            ident,
            sequence: 0,
        })
    }

    /// Sends one request, an IP packet of `size` bytes with its headers, and waits for what becomes of it.
    pub fn send(&mut self, size: usize, limit: Duration) -> Result<Fate> {
        self.sequence = self.sequence.wrapping_add(1);
        let headers = if self.to.is_ipv4() { 20 } else { 40 };
        let request = request(
            self.to.is_ipv4(),
            size.saturating_sub(headers),
            (self.ident, self.sequence),
        );
        let deadline = Instant::now() + limit;
        // What is said late of the last request is not said of this one.
        let _ = self.socket.take_error();
        if let Err(error) = self.socket.send(&request) {
            return self.failed("send", &error);
        }
        let mut answer = vec![0; request.len() + 60];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Fate::Lost);
            }
            let read = self
                .socket
                .set_read_timeout(Some(left))
                .and_then(|()| (&mut &self.socket).read(&mut answer));
            match read {
                Ok(len) => {
                    let packet = answer.get(..len).unwrap_or_default();
                    if is_answer(self.to.is_ipv4(), packet, (self.ident, self.sequence)) {
                        return Ok(Fate::Answered);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.failed("receive", &error),
            }
        }
    }

    fn failed(&self, operation: &'static str, error: &std::io::Error) -> Result<Fate> {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMSGSIZE) => Ok(Fate::TooBig),
            Some(
                Errno::EAGAIN
                | Errno::EHOSTUNREACH
                | Errno::ENETUNREACH
                | Errno::ECONNREFUSED
                | Errno::EACCES
                | Errno::EPERM,
            ) => Ok(Fate::Lost),
            _ => Err(Error::io(
                operation,
                format!("echo request to {}", self.to),
                error,
            )),
        }
    }
}

/// RFC 792 and RFC 4443 §4.1. The kernel fills in the checksum of ICMPv6 itself.
fn request(v4: bool, len: usize, (ident, sequence): (u16, u16)) -> Vec<u8> {
    let mut packet = vec![0; len.max(ICMP_HEADER)];
    packet[0] = if v4 { 8 } else { 128 };
    packet[4..6].copy_from_slice(&ident.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    if v4 {
        // All further bytes are zero and add nothing.
        let sum = u32::from(8_u16 << 8) + u32::from(ident) + u32::from(sequence);
        let folded = (sum & 0xffff) + (sum >> 16);
        let folded = (folded & 0xffff) + (folded >> 16);
        packet[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    }
    packet
}

/// Whether this is the answer to that request; raw IPv4 sockets show the IP header, too.
fn is_answer(v4: bool, packet: &[u8], (ident, sequence): (u16, u16)) -> bool {
    let header = match packet.first() {
        Some(first) if v4 => usize::from(first & 0xf) * 4,
        _ => 0,
    };
    let message = packet.get(header..).unwrap_or_default();
    message.first() == Some(if v4 { &0 } else { &129 })
        && message.get(4..6) == Some(&ident.to_be_bytes())
        && message.get(6..8) == Some(&sequence.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        for ids in [(1, 1), (0xffff, 0xffff), (0xf7ff, 0x0000)] {
            let packet = request(true, 64, ids);
            let words = packet
                .chunks(2)
                .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
            let mut sum: u32 = words.sum();
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            assert_eq!(sum, 0xffff, "{ids:?}");
        }
    }

    #[test]
    fn only_the_answer_to_this_request_counts() {
        let mut answer = vec![0x45; 20];
        answer.extend([0, 0, 0, 0, 0, 7, 0, 9]);
        assert!(is_answer(true, &answer, (7, 9)));
        assert!(!is_answer(true, &answer, (7, 8)));
        assert!(!is_answer(true, &answer[..21], (7, 9)));
        assert!(!is_answer(true, &[], (7, 9)));
        assert!(is_answer(false, &[129, 0, 0, 0, 0, 7, 0, 9], (7, 9)));
    }
}
