//! Descriptors over unix sockets (`SCM_RIGHTS`, `unix(7)`), and who is at the other end.
#![allow(unsafe_code)]

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, getsockopt, recvmsg, sendmsg,
    sockopt::PeerCredentials,
};

use crate::error::{Error, Result};

/// Most descriptors taken from one message; more are closed.
const LIMIT: usize = 4;

/// Sends bytes (at least one) together with a descriptor.
pub fn send(socket: impl AsFd, bytes: &[u8], fd: BorrowedFd<'_>) -> Result<usize> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<UnixAddr>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(bytes)],
        &rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(|errno| Error::errno("send", "descriptor", errno))
}

/// Receives bytes, and the descriptors that came with them (close-on-exec). Zero bytes: the other end has closed.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>)> {
    let fail = |errno| Error::errno("receive", "descriptor", errno);
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; LIMIT]);
    let mut parts = [IoSliceMut::new(buffer)];
    let socket = socket.as_fd().as_raw_fd();
    let message = recvmsg::<UnixAddr>(
        socket,
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .map_err(fail)?;
    let mut fds = Vec::new();
    for control in message.cmsgs().map_err(fail)? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows their numbers.
            fds.extend(
                raw.into_iter()
                    .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }),
            );
        }
    }
    Ok((message.bytes, fds))
}

/// Process, user and group at the other end of a unix stream socket, as they were when it connected.
pub fn peer(socket: impl AsFd) -> Result<(i32, u32, u32)> {
    getsockopt(&socket.as_fd(), PeerCredentials)
        .map(|peer| (peer.pid(), peer.uid(), peer.gid()))
        .map_err(|errno| Error::errno("inspect", "unix socket", errno))
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_its_bytes() {
        let (one, two) = UnixStream::pair().unwrap();
        let (mut kept, sent) = UnixStream::pair().unwrap();
        send(&one, b"hello", sent.as_fd()).unwrap();
        drop(sent);
        let mut buffer = [0; 16];
        let (len, mut fds) = receive(&two, &mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"hello");
        let mut arrived = UnixStream::from(fds.pop().unwrap());
        std::io::Write::write_all(&mut arrived, b"x").unwrap();
        let mut byte = [0; 1];
        kept.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _two) = UnixStream::pair().unwrap();
        assert_eq!(peer(&one).unwrap().0, std::process::id() as i32);
    }
}
