//! TCP socket options for BGP: MD5 signatures (RFC 2385) and the TTL guard (RFC 5082).
#![allow(unsafe_code)]

use std::{
    mem,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
};

use ipnetwork::IpNetwork;

use crate::{
    error::{Error, Result},
    sys::set_option,
};

const TCP_MD5SIG: libc::c_int = 14;
const TCP_MD5SIG_EXT: libc::c_int = 32;
const TCP_MD5SIG_FLAG_PREFIX: u8 = 1;
const IPV6_MINHOPCOUNT: libc::c_int = 73;
const IP_MINTTL: libc::c_int = 21;

/// Longest key (`TCP_MD5SIG_MAXKEYLEN`).
pub const MD5_KEY_LIMIT: usize = 80;

/// `struct tcp_md5sig` (`include/uapi/linux/tcp.h`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Md5Sig {
    address: libc::sockaddr_storage,
    flags: u8,
    prefix_len: u8,
    key_len: u16,
    ifindex: i32,
    key: [u8; MD5_KEY_LIMIT],
}

/// Signs and checks all segments to and from `peer` with `key`.
///
/// On a listener it must stand before the peer's first segment arrives: a signed SYN without a key is dropped.
/// `None` removes the key.
pub fn set_md5_key(socket: impl AsFd, peer: IpAddr, key: Option<&[u8]>) -> Result<()> {
    install(socket, TCP_MD5SIG, 0, peer, 0, key)
}

/// The same for all peers of a prefix (Linux 4.13); for listeners with dynamic neighbours.
pub fn set_md5_key_of_prefix(
    socket: impl AsFd,
    peers: IpNetwork,
    key: Option<&[u8]>,
) -> Result<()> {
    install(
        socket,
        TCP_MD5SIG_EXT,
        TCP_MD5SIG_FLAG_PREFIX,
        peers.network(),
        peers.prefix(),
        key,
    )
}

fn install(
    socket: impl AsFd,
    option: libc::c_int,
    flags: u8,
    peer: IpAddr,
    prefix_len: u8,
    key: Option<&[u8]>,
) -> Result<()> {
    let object = || format!("TCP MD5 key for {peer}");
    // The kernel takes an empty key as a removal; an empty password must not silently do that.
    if key.is_some_and(<[u8]>::is_empty) {
        return Err(Error::invalid("set", object(), "the key is empty"));
    }
    let key = key.unwrap_or_default();
    if key.len() > MD5_KEY_LIMIT {
        return Err(Error::invalid(
            "set",
            object(),
            format!("a key has at most {MD5_KEY_LIMIT} bytes"),
        ));
    }
    let mut request = Md5Sig {
        address: storage(SocketAddr::new(peer, 0)),
        flags,
        prefix_len,
        key_len: key.len() as u16,
        ifindex: 0,
        key: [0; MD5_KEY_LIMIT],
    };
    request.key[..key.len()].copy_from_slice(key);
    set_option(socket.as_fd(), libc::IPPROTO_TCP, option, &request)
        .map_err(|errno| Error::errno("set", object(), errno))
}

fn storage(address: SocketAddr) -> libc::sockaddr_storage {
    let source = socket2::SockAddr::from(address);
    // SAFETY: all-zero bytes are a valid `sockaddr_storage`.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let len = (source.len() as usize).min(size_of::<libc::sockaddr_storage>());
    // SAFETY: both sides are valid for `len` bytes (the source says so, the target was just bounded) and do not
    // overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(
            source.as_ptr().cast::<u8>(),
            std::ptr::from_mut(&mut storage).cast::<u8>(),
            len,
        );
    }
    storage
}

/// Drops received segments with a TTL (hop limit) below `ttl`: 255 for a directly connected peer that guards its TTL.
pub fn set_minimum_ttl(socket: impl AsFd, v4: bool, ttl: u8) -> Result<()> {
    let (level, option) = if v4 {
        (libc::IPPROTO_IP, IP_MINTTL)
    } else {
        (libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT)
    };
    set_option(socket.as_fd(), level, option, &i32::from(ttl))
        .map_err(|errno| Error::errno("set", format!("minimum TTL {ttl}"), errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_has_the_kernels_size() {
        assert_eq!(size_of::<Md5Sig>(), 216);
    }

    #[test]
    fn a_key_that_is_too_long_is_refused() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let error =
            set_md5_key(&socket, "127.0.0.1".parse().unwrap(), Some(&[b'x'; 81])).unwrap_err();
        assert!(error.to_string().contains("at most 80 bytes"), "{error}");
    }
}
