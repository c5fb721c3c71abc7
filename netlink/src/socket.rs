//! One netlink socket: sending, receiving, and the exchange patterns (batch with a result per item, dump).
//!
//! A socket keeps the namespace of its creation, so it is opened inside a short [`crate::NetNs::run`] and used from
//! anywhere afterwards. Requests and notifications never share one: notifications caused by our own requests carry
//! our sequence numbers and would be taken for replies.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind,
            getsockname, recvmsg, sendto, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};

use crate::{
    error::{Cause, Error, Result},
    sys::set_option,
    wire::{
        Attr, Attrs, HEADER, Message, Messages, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED,
        NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, Writer, read_u32,
    },
};

const SOL_NETLINK: libc::c_int = 270;
const NETLINK_ADD_MEMBERSHIP: libc::c_int = 1;
const NETLINK_DROP_MEMBERSHIP: libc::c_int = 2;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;
const NETLINK_GET_STRICT_CHK: libc::c_int = 12;

/// `NLMSGERR_ATTR_MSG`.
const ERROR_TEXT: u16 = 1;
/// `NLMSGERR_ATTR_OFFS`.
const ERROR_OFFSET: u16 = 2;

/// Messages per send: the acknowledgements of 256 still fit into the default receive buffer, 272 do not.
const BATCH_MESSAGES: usize = 256;
/// Bytes per send, well under the default send buffer.
const BATCH_BYTES: usize = 64 * 1024;
/// The kernel answers while it handles the send; an answer that is not there after this long was lost.
const ANSWER_LIMIT: i64 = 10;
/// A dump that was interrupted by changes is started again so often.
const DUMP_TRIES: usize = 8;
/// Receive and send buffers of request sockets.
const REQUEST_BUFFER: usize = 8 << 20;

/// Joins a multicast group.
pub(crate) fn join_group(socket: BorrowedFd<'_>, group: u32) -> Result<(), Errno> {
    set_option(socket, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &(group as i32))
}

/// Leaves a multicast group. What is queued stays.
pub(crate) fn leave_group(socket: BorrowedFd<'_>, group: u32) -> Result<(), Errno> {
    set_option(
        socket,
        SOL_NETLINK,
        NETLINK_DROP_MEMBERSHIP,
        &(group as i32),
    )
}

/// A netlink socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    receive: Vec<u8>,
    send: Writer,
    /// Bytes that one send may have.
    send_limit: usize,
}

/// What the kernel acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ack {
    pub(crate) sequence: u32,
    pub(crate) result: Result<(), Cause>,
    /// Where in the request the bad attribute is (`NLMSGERR_ATTR_OFFS`).
    pub(crate) offset: Option<u32>,
}

/// The sequence number of messages that have not been sent.
const UNNUMBERED: u32 = 0;

/// The messages of one send, which have no sequence numbers yet.
#[derive(Debug)]
struct Send {
    writer: Writer,
    /// Where each message begins, and the index of its result.
    messages: Vec<(usize, usize)>,
}

impl Send {
    /// Takes as many of the messages from `next` on as one send may have.
    fn fill(
        mut writer: Writer,
        count: usize,
        next: &mut usize,
        write: &mut impl FnMut(&mut Writer, usize, u32) -> Result<(), Cause>,
        results: &mut [Option<Result<(), Cause>>],
    ) -> Self {
        writer.clear();
        let mut messages: Vec<(usize, usize)> = Vec::with_capacity(BATCH_MESSAGES);
        while *next < count && messages.len() < BATCH_MESSAGES && writer.len() < BATCH_BYTES - 4096
        {
            let at = writer.len();
            match write(&mut writer, *next, UNNUMBERED) {
                Ok(()) => {
                    if let Some((before, _)) = messages.last() {
                        writer.clear_flag(*before, NLM_F_ACK);
                    }
                    messages.push((at, *next));
                }
                Err(cause) => results[*next] = Some(Err(cause)),
            }
            *next += 1;
        }
        Self { writer, messages }
    }
}

/// Messages in the form in which they are sent. They can be made by one thread while another one sends those before.
#[derive(Debug)]
pub(crate) struct Ready {
    sends: Vec<Send>,
    results: Vec<Option<Result<(), Cause>>>,
}

impl Ready {
    /// Makes `count` messages as [`Socket::batch`] does.
    pub(crate) fn new(
        count: usize,
        mut write: impl FnMut(&mut Writer, usize, u32) -> Result<(), Cause>,
    ) -> Self {
        let mut ready = Self {
            sends: Vec::new(),
            results: vec![None; count],
        };
        let mut next = 0;
        while next < count {
            ready.sends.push(Send::fill(
                Writer::default(),
                count,
                &mut next,
                &mut write,
                &mut ready.results,
            ));
        }
        ready
    }
}

fn whole(results: Vec<Option<Result<(), Cause>>>) -> Vec<Result<(), Cause>> {
    results
        .into_iter()
        .map(|result| result.unwrap_or(Err(Cause::NoAnswer)))
        .collect()
}

impl Socket {
    /// Opens a socket in the calling thread's namespace.
    pub(crate) fn open(protocol: SockProtocol) -> Result<Self> {
        let fail = |errno| Error::errno("open", format!("netlink socket ({protocol:?})"), errno);
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )
        .map_err(fail)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(fail)?;
        for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK] {
            set_option(fd.as_fd(), SOL_NETLINK, option, &1_i32).map_err(fail)?;
        }
        if protocol == SockProtocol::NetlinkRoute {
            // Kernels before 4.20 do not know it; they filter less, and the decoders filter again.
            let _ = set_option(fd.as_fd(), SOL_NETLINK, NETLINK_GET_STRICT_CHK, &1_i32);
        }
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_LIMIT, 0)).map_err(fail)?;
        let mut socket = Self {
            fd,
            sequence: 0,
            receive: vec![0; 256 * 1024],
            send: Writer::with_capacity(BATCH_BYTES + 4096),
            send_limit: BATCH_BYTES,
        };
        socket.set_receive_buffer(REQUEST_BUFFER);
        socket.grow_send(REQUEST_BUFFER);
        Ok(socket)
    }

    /// Wants a receive buffer of `bytes`; without privilege the kernel grants what `rmem_max` allows.
    pub(crate) fn set_receive_buffer(&self, bytes: usize) {
        if setsockopt(&self.fd, sockopt::RcvBufForce, &bytes).is_err() {
            let _ = setsockopt(&self.fd, sockopt::RcvBuf, &bytes);
        }
    }

    /// Wants a send buffer of `bytes`, and says how long one send may be.
    pub(crate) fn grow_send(&mut self, bytes: usize) -> usize {
        if setsockopt(&self.fd, sockopt::SndBufForce, &bytes).is_err() {
            let _ = setsockopt(&self.fd, sockopt::SndBuf, &bytes);
        }
        // The kernel reports the doubled value; a message needs its length plus the bookkeeping of a buffer.
        let granted =
            nix::sys::socket::getsockopt(&self.fd, sockopt::SndBuf).unwrap_or(BATCH_BYTES);
        self.send_limit = granted.saturating_sub(4096).max(BATCH_BYTES);
        self.send_limit
    }

    /// Bytes that one send may have.
    pub(crate) fn send_limit(&self) -> usize {
        self.send_limit
    }

    /// Joins a multicast group.
    pub(crate) fn join(&self, group: u32) -> Result<(), Errno> {
        join_group(self.fd.as_fd(), group)
    }

    /// The same socket once more.
    pub(crate) fn duplicate(&self) -> Result<OwnedFd, Errno> {
        let copy = self.fd.try_clone();
        copy.map_err(|error| error.raw_os_error().map_or(Errno::EBADF, Errno::from_raw))
    }

    /// The port number that the kernel gave to the socket.
    pub(crate) fn port(&self) -> Result<u32, Errno> {
        getsockname::<NetlinkAddr>(self.fd.as_raw_fd()).map(|address| address.pid())
    }

    pub(crate) fn set_nonblocking(&self) -> Result<(), Errno> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(&self.fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop)
    }

    pub(crate) fn next_sequence(&mut self) -> u32 {
        // Sequence 0 is what unsolicited messages have.
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        self.sequence
    }

    pub(crate) fn transmit(&self, bytes: &[u8]) -> Result<(), Errno> {
        loop {
            match sendto(
                self.fd.as_raw_fd(),
                bytes,
                &NetlinkAddr::new(0, 0),
                MsgFlags::empty(),
            ) {
                Err(Errno::EINTR) => {}
                result => return result.map(drop),
            }
        }
    }

    /// One datagram from the kernel. `EAGAIN`: nothing came in time.
    pub(crate) fn receive(&mut self, flags: MsgFlags) -> Result<&[u8], Errno> {
        receive(self.fd.as_fd(), &mut self.receive, flags)
    }

    /// Sends `count` messages that `write` makes, in as few sends as possible, and returns the result of each.
    ///
    /// `write` gets the index and a number for the header, in whose place the sequence number comes when the message is sent;
    /// the message must ask for an acknowledgement. Only the last one of
    /// each send is left with that wish: the kernel handles the messages of a send in order and answers those that fail in
    /// any case, so that what has no answer when the last one has it succeeded (`netlink_rcv_skb`, `net/netlink/af_netlink.c`).
    pub(crate) fn batch(
        &mut self,
        count: usize,
        mut write: impl FnMut(&mut Writer, usize, u32) -> Result<(), Cause>,
    ) -> Vec<Result<(), Cause>> {
        let mut results: Vec<Option<Result<(), Cause>>> = vec![None; count];
        let mut next = 0;
        while next < count {
            let mut send = Send::fill(
                std::mem::take(&mut self.send),
                count,
                &mut next,
                &mut write,
                &mut results,
            );
            self.deliver(&mut send, &mut results);
            self.send = send.writer;
        }
        whole(results)
    }

    /// Sends what was made ready before.
    pub(crate) fn send_ready(&mut self, ready: Ready) -> Vec<Result<(), Cause>> {
        let Ready { sends, mut results } = ready;
        for mut send in sends {
            self.deliver(&mut send, &mut results);
        }
        whole(results)
    }

    fn deliver(&mut self, send: &mut Send, results: &mut [Option<Result<(), Cause>>]) {
        if send.messages.is_empty() {
            return;
        }
        let mut sent = Vec::with_capacity(send.messages.len());
        for (at, index) in &send.messages {
            let sequence = self.next_sequence();
            send.writer.set_sequence(*at, sequence);
            sent.push((sequence, *index));
        }
        match self.transmit(send.writer.as_slice()) {
            Ok(()) => self.collect(&sent, results),
            Err(errno) => {
                for (_, index) in sent {
                    results[index] = Some(Err(Cause::Kernel {
                        errno,
                        message: None,
                    }));
                }
            }
        }
    }

    /// Receives answers until the last message of `sent` (ascending sequence numbers) has one. Those before it that have
    /// none succeeded.
    fn collect(&mut self, sent: &[(u32, usize)], results: &mut [Option<Result<(), Cause>>]) {
        let Some((_, last)) = sent.last() else {
            return;
        };
        while results[*last].is_none() {
            let Ok(bytes) = receive(self.fd.as_fd(), &mut self.receive, MsgFlags::empty()) else {
                // Lost (`ENOBUFS`) or late: the caller sees "no answer" and verifies with a dump.
                return;
            };
            for message in Messages(bytes) {
                let Some(ack) = read_ack(&message) else {
                    continue;
                };
                if let Ok(at) = sent.binary_search_by_key(&ack.sequence, |(sequence, _)| *sequence)
                {
                    results[sent[at].1] = Some(ack.result);
                }
            }
        }
        for (_, index) in sent {
            results[*index].get_or_insert(Ok(()));
        }
    }

    /// One request whose answer is one message (not a dump).
    pub(crate) fn query<T>(
        &mut self,
        write: impl FnOnce(&mut Writer, u32),
        mut decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<T, Cause> {
        let sequence = self.next_sequence();
        self.send.clear();
        write(&mut self.send, sequence);
        let errno = |errno| Cause::Kernel {
            errno,
            message: None,
        };
        self.transmit(self.send.as_slice()).map_err(errno)?;
        loop {
            let bytes = receive(self.fd.as_fd(), &mut self.receive, MsgFlags::empty()).map_err(
                |errno| match errno {
                    Errno::EAGAIN | Errno::ENOBUFS => Cause::NoAnswer,
                    errno => Cause::Kernel {
                        errno,
                        message: None,
                    },
                },
            )?;
            // The answer is one message; what comes before it belongs to requests that were given up.
            let Some(message) = Messages(bytes).find(|message| message.sequence == sequence) else {
                continue;
            };
            return match read_ack(&message) {
                Some(Ack {
                    result: Err(cause), ..
                }) => Err(cause),
                Some(Ack { result: Ok(()), .. }) => {
                    Err(Cause::Malformed("an answer without content"))
                }
                None => {
                    decode(&message).ok_or(Cause::Malformed("an answer that cannot be decoded"))
                }
            };
        }
    }

    /// A dump: everything that `decode` keeps. Started again when the kernel says that it is not consistent.
    pub(crate) fn dump<T>(
        &mut self,
        mut write: impl FnMut(&mut Writer, u32),
        mut decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Cause> {
        for _ in 0..DUMP_TRIES {
            let sequence = self.next_sequence();
            self.send.clear();
            write(&mut self.send, sequence);
            self.transmit(self.send.as_slice())
                .map_err(|errno| Cause::Kernel {
                    errno,
                    message: None,
                })?;
            match self.read_dump(sequence, &mut decode) {
                Ok(Some(all)) => return Ok(all),
                // Interrupted, or `EINTR` from the nf_tables generation check.
                Ok(None)
                | Err(Cause::Kernel {
                    errno: Errno::EINTR,
                    ..
                }) => {}
                Err(cause) => return Err(cause),
            }
        }
        Err(Cause::Inconsistent)
    }

    fn read_dump<T>(
        &mut self,
        sequence: u32,
        decode: &mut impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Cause> {
        let mut all = Vec::new();
        let mut consistent = true;
        loop {
            let bytes = receive(self.fd.as_fd(), &mut self.receive, MsgFlags::empty()).map_err(
                |errno| match errno {
                    Errno::EAGAIN | Errno::ENOBUFS => Cause::NoAnswer,
                    errno => Cause::Kernel {
                        errno,
                        message: None,
                    },
                },
            )?;
            for message in Messages(bytes).filter(|message| message.sequence == sequence) {
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => {
                        // An error at the end of a dump is reported in the end message itself.
                        let code = read_u32(message.payload, 0).unwrap_or(0) as i32;
                        if code < 0 {
                            let message = read_text(Attrs::after(message.payload, 4));
                            return Err(Cause::from_code(code.saturating_neg(), message));
                        }
                        return Ok(consistent.then_some(all));
                    }
                    NLMSG_NOOP => {}
                    NLMSG_OVERRUN => consistent = false,
                    NLMSG_ERROR => match read_ack(&message) {
                        Some(Ack {
                            result: Err(cause), ..
                        }) => return Err(cause),
                        _ => return Ok(consistent.then_some(all)),
                    },
                    _ => all.extend(decode(&message)),
                }
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

/// One datagram that really comes from the kernel (port 0): other processes may send to a netlink socket too.
fn receive<'a>(
    fd: BorrowedFd<'_>,
    buffer: &'a mut [u8],
    flags: MsgFlags,
) -> Result<&'a [u8], Errno> {
    let len = loop {
        let mut parts = [std::io::IoSliceMut::new(buffer)];
        match recvmsg::<NetlinkAddr>(fd.as_raw_fd(), &mut parts, None, flags) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(received) if received.address.is_some_and(|from| from.pid() != 0) => {}
            // The rest of the datagram is gone, as with a full receive buffer.
            Ok(received) if received.flags.contains(MsgFlags::MSG_TRUNC) => {
                return Err(Errno::ENOBUFS);
            }
            Ok(received) => break received.bytes,
        }
    };
    Ok(&buffer[..len])
}

/// The result in an `NLMSG_ERROR` message; `None` for other messages.
pub(crate) fn read_ack(message: &Message<'_>) -> Option<Ack> {
    if message.kind != NLMSG_ERROR {
        return None;
    }
    let code = read_u32(message.payload, 0)? as i32;
    if code == 0 {
        return Some(Ack {
            sequence: message.sequence,
            result: Ok(()),
            offset: None,
        });
    }
    // Payload: code, the header of the request, its rest unless capped, then the attributes.
    let inner = read_u32(message.payload, 4).unwrap_or(HEADER as u32) as usize;
    let header = 4 + if message.flags & NLM_F_CAPPED != 0 {
        HEADER
    } else {
        inner
    };
    let attrs = if message.flags & NLM_F_ACK_TLVS == 0 {
        Attrs(&[])
    } else {
        Attrs::after(message.payload, header)
    };
    Some(Ack {
        sequence: message.sequence,
        result: Err(Cause::from_code(code.saturating_neg(), read_text(attrs))),
        offset: attrs.find(ERROR_OFFSET).and_then(Attr::get_u32),
    })
}

fn read_text(attrs: Attrs<'_>) -> Option<Box<str>> {
    attrs
        .find(ERROR_TEXT)
        .map(|text| text.get_text().into_boxed_str())
}

/// The text of an extended acknowledgement: `bytes` starts with the (capped) header of the request.
pub(crate) fn error_text(bytes: &[u8]) -> Option<Box<str>> {
    read_text(Attrs::after(bytes, HEADER))
}
