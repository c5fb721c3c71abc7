//! What has no safe wrapper: socket options with structures of our own, sockets on the runtime's poller.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use tokio::io::{Interest, unix::AsyncFd};

use crate::events::EventSocket;

/// `setsockopt` with a plain-data value.
///
/// `T` must be a plain C structure or integer without padding that matters; all callers are in this crate.
pub(crate) fn set_option<T: Copy>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> Result<(), Errno> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` points to `len` readable bytes for the whole call, the kernel only reads them, and the
    // descriptor is open because it is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            len,
        )
    };
    Errno::result(result).map(drop)
}

/// The socket on the poller of the running tokio runtime.
pub(crate) fn readable_socket(socket: EventSocket) -> std::io::Result<AsyncFd<EventSocket>> {
    // SAFETY: the socket owns its descriptor, never gives it away, and lives in the `AsyncFd` until that is dropped,
    // so the number stays open and the same for as long as it is registered.
    let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
    registered.map_err(std::io::Error::from)
}
