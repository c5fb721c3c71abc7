//! The TCP sockets of a network namespace, as `/proc/net/tcp` lists them (`Documentation/networking/proc_net_tcp.rst`).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use cali_netlink::NetNs;

/// `TCP_ESTABLISHED` and `TCP_LISTEN` of `include/net/tcp_states.h`.
const ESTABLISHED: &str = "01";
const LISTEN: &str = "0A";

/// Sockets that are connected or listen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sockets {
    /// Own and other end.
    pub(super) connected: BTreeSet<(SocketAddr, SocketAddr)>,
    pub(super) listening: BTreeSet<u16>,
}

/// Reads them; what cannot be read is left out.
pub(super) fn read(netns: &NetNs) -> Sockets {
    let mut found = Sockets::default();
    for name in ["tcp", "tcp6"] {
        let path = format!("/proc/thread-self/net/{name}");
        if let Ok(Ok(text)) = netns.run(|| std::fs::read_to_string(path)) {
            found.take(&text);
        }
    }
    found
}

impl Sockets {
    fn take(&mut self, text: &str) {
        for line in text.lines().skip(1) {
            let mut words = line.split_whitespace().skip(1);
            let mut word = || words.next().unwrap_or_default();
            let (Some(own), Some(other)) = (socket(word()), socket(word())) else {
                continue;
            };
            match word() {
                ESTABLISHED => {
                    self.connected.insert((own, other));
                }
                LISTEN => {
                    self.listening.insert(own.port());
                }
                _ => {}
            }
        }
    }
}

/// `0100007F:0016`: 32-bit words in the host's order, the port in the usual one.
fn socket(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = address.get(at * 8..at * 8 + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let address = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_are_read_as_the_kernel_writes_them() {
        let mut found = Sockets::default();
        found.take(
            "  sl  local_address rem_address   st tx_queue rx_queue\n\
             0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000\n\
             1: 0100007F:B3A0 0200007F:192B 01 00000000:00000000 00:00000000\n\
             2: 000000000000000000000000FFFF00000100007F:0016 000000000000000000000000FFFF0000 01\n",
        );
        found.take("head\n0: B80D0120000000000000000001000000:0016 B80D0120000000000000000002000000:0400 01 x\n");
        assert_eq!(found.listening, BTreeSet::from([22]));
        let pair = |a: &str, b: &str| (a.parse().unwrap(), b.parse().unwrap());
        let expected = BTreeSet::from([
            pair("127.0.0.1:45984", "127.0.0.2:6443"),
            pair("[2001:db8::1]:22", "[2001:db8::2]:1024"),
        ]);
        assert_eq!(found.connected, expected);
    }
}
