//! Notifications of the kernel, on a socket of their own.
//!
//! An [`EventStream`] says what has changed; it is not the truth. [`Event::Overflow`] means that notifications were
//! lost: everything has to be dumped again. And some changes come without a notification of their own: a link that
//! goes down, an address or a nexthop object that is removed take routes with them and no route event tells of it.

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockProtocol},
};
use tokio::io::unix::AsyncFd;

use crate::{
    Address, FdbEntry, Link, Neighbour, NetNs, Netlink, Nexthop, Route, Rule,
    error::{Error, Result},
    nft,
    rtnl::{self, link, neighbour, nexthop, route},
    socket::Socket,
    sys::readable_socket,
    wire::{Message, Messages},
};

/// Receive buffer of an event socket: a burst of tens of thousands of notifications. The default overflows after 256.
const EVENT_BUFFER: usize = 32 << 20;
/// Datagrams read in one go before the task gives others a turn.
const TURN: usize = 64;
/// Datagrams thrown away in one go after an overflow.
const OVERFLOW_TURN: usize = 200_000;

/// What to be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Devices.
    Link,
    /// Neighbours and forwarding entries.
    Neighbour,
    /// IPv4 addresses.
    Ipv4Address,
    /// IPv6 addresses.
    Ipv6Address,
    /// IPv4 routes.
    Ipv4Route,
    /// IPv6 routes.
    Ipv6Route,
    /// IPv4 rules.
    Ipv4Rule,
    /// IPv6 rules.
    Ipv6Rule,
    /// Nexthop objects.
    Nexthop,
}

impl Group {
    /// `RTNLGRP_*` (`include/uapi/linux/rtnetlink.h`).
    fn number(self) -> u32 {
        match self {
            Self::Link => 1,
            Self::Neighbour => 3,
            Self::Ipv4Address => 5,
            Self::Ipv4Route => 7,
            Self::Ipv4Rule => 8,
            Self::Ipv6Address => 9,
            Self::Ipv6Route => 11,
            Self::Ipv6Rule => 19,
            Self::Nexthop => 32,
        }
    }

    /// Everything that has to do with routes.
    pub const ROUTING: &'static [Self] = &[
        Self::Link,
        Self::Ipv4Address,
        Self::Ipv6Address,
        Self::Ipv4Route,
        Self::Ipv6Route,
        Self::Nexthop,
    ];
}

/// An object that has appeared or changed, or is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice<T> {
    /// There, as given.
    Present(T),
    /// Gone; this is what it was.
    Gone(T),
}

impl<T> Notice<T> {
    /// The object, present or gone.
    pub fn object(&self) -> &T {
        match self {
            Self::Present(object) | Self::Gone(object) => object,
        }
    }

    /// The object if it is there.
    pub fn present(self) -> Option<T> {
        match self {
            Self::Present(object) => Some(object),
            Self::Gone(_) => None,
        }
    }

    fn new(gone: bool, object: T) -> Self {
        if gone {
            Self::Gone(object)
        } else {
            Self::Present(object)
        }
    }
}

/// One notification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A device.
    Link(Notice<Link>),
    /// An address.
    Address(Notice<Address>),
    /// A route.
    Route(Notice<Route>),
    /// A neighbour.
    Neighbour(Notice<Neighbour>),
    /// A forwarding entry.
    Fdb(Notice<FdbEntry>),
    /// A rule.
    Rule(Notice<Rule>),
    /// A nexthop object.
    Nexthop(Notice<Nexthop>),
    /// A change of nf_tables.
    Nft(nft::NftEvent),
    /// Notifications were lost; dump again.
    Overflow,
}

/// A stream of notifications.
#[derive(Debug)]
pub struct EventStream {
    socket: AsyncFd<EventSocket>,
    waiting: VecDeque<Event>,
    /// The burst that is being gathered, and until when.
    gathered: Vec<Event>,
    gathered_until: tokio::time::Instant,
    decode: fn(&Message<'_>) -> Option<Event>,
    port: u32,
    /// What writers of this process know of the stream.
    listener: Option<Arc<nft::Listener>>,
}

#[derive(Debug)]
pub(crate) struct EventSocket(pub(crate) Socket);

impl AsRawFd for EventSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Netlink {
    /// Notifications of these groups, from now on. Needs a running tokio runtime.
    ///
    /// Open the stream first and dump afterwards, so that no change falls between the two.
    pub fn events(&self, groups: &[Group]) -> Result<EventStream> {
        let numbers: Vec<u32> = groups.iter().map(|group| group.number()).collect();
        EventStream::open(
            self.netns(),
            SockProtocol::NetlinkRoute,
            &numbers,
            EVENT_BUFFER,
            decode_route,
        )
    }

    /// The same with a receive buffer of this many bytes.
    pub fn events_with_buffer(&self, groups: &[Group], bytes: usize) -> Result<EventStream> {
        let numbers: Vec<u32> = groups.iter().map(|group| group.number()).collect();
        EventStream::open(
            self.netns(),
            SockProtocol::NetlinkRoute,
            &numbers,
            bytes,
            decode_route,
        )
    }
}

impl EventStream {
    pub(crate) fn open(
        netns: &NetNs,
        protocol: SockProtocol,
        groups: &[u32],
        buffer: usize,
        decode: fn(&Message<'_>) -> Option<Event>,
    ) -> Result<Self> {
        let socket = netns.run(|| Socket::open(protocol))??;
        let fail = |errno| Error::errno("subscribe to", format!("notifications of {netns}"), errno);
        socket.set_receive_buffer(buffer);
        for group in groups {
            socket.join(*group).map_err(fail)?;
        }
        socket.set_nonblocking().map_err(fail)?;
        let port = socket.port().map_err(fail)?;
        let socket = readable_socket(EventSocket(socket)).map_err(|error| {
            Error::io("subscribe to", format!("notifications of {netns}"), &error)
        })?;
        Ok(Self {
            socket,
            waiting: VecDeque::new(),
            gathered: Vec::new(),
            gathered_until: tokio::time::Instant::now(),
            decode,
            port,
            listener: None,
        })
    }

    pub(crate) fn with_listener(
        mut self,
        register: impl FnOnce(OwnedFd) -> Arc<nft::Listener>,
    ) -> Result<Self> {
        let socket = self.socket.get_ref().0.duplicate();
        let fail = |errno| Error::errno("subscribe to", "notifications", errno);
        self.listener = Some(register(socket.map_err(fail)?));
        Ok(self)
    }

    /// Where a writer of this process says that notifications were lost, what is known is older.
    fn look_for_loss(&mut self) {
        if self.listener.as_ref().is_some_and(|one| one.take_lost()) {
            self.waiting.clear();
            self.waiting.push_back(Event::Overflow);
        }
    }

    /// The port number of the socket (only of use in tests and logs; requests come from other sockets).
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The next notification; waits for it. Safe to drop while waiting: nothing is lost.
    pub async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            let listener = self.listener.clone();
            let lost = async {
                match &listener {
                    Some(listener) => listener.loses().await,
                    None => std::future::pending().await,
                }
            };
            let mut ready = tokio::select! {
                ready = self.socket.readable_mut() => {
                    ready.map_err(|error| Error::io("wait for", "notifications", &error))?
                }
                () = lost => continue,
            };
            let turn = read_turn(&mut ready.get_inner_mut().0, self.decode, &mut self.waiting);
            if turn? {
                ready.clear_ready();
            }
        }
    }

    /// A notification that has been read already; does not wait.
    pub fn try_next(&mut self) -> Option<Event> {
        self.look_for_loss();
        self.waiting.pop_front()
    }

    /// What comes within `window` after the first notification, at most `limit` of them. For owners that would rather handle
    /// a burst at once. Safe to drop while waiting: what has come so far is part of the next burst, so a `select!` is free
    /// for its other branches meanwhile.
    pub async fn next_burst(&mut self, window: Duration, limit: usize) -> Result<Vec<Event>> {
        if self.gathered.is_empty() {
            let first = self.next().await?;
            self.gathered.push(first);
            self.gathered_until = tokio::time::Instant::now() + window;
        }
        while self.gathered.len() < limit {
            match tokio::time::timeout_at(self.gathered_until, self.next()).await {
                Ok(event) => {
                    let event = event?;
                    self.gathered.push(event);
                }
                Err(_) => break,
            }
        }
        Ok(std::mem::take(&mut self.gathered))
    }

    /// What has come by now, without waiting for the end of a burst: for owners that are about to act upon what they know.
    ///
    /// # Errors
    /// The socket's; what has come before is kept for the next call.
    pub fn burst_so_far(&mut self) -> Result<Vec<Event>> {
        // Bounded: somebody may be writing faster than this reads.
        for _ in 0..TURN {
            if read_turn(&mut self.socket.get_mut().0, self.decode, &mut self.waiting)? {
                break;
            }
        }
        self.look_for_loss();
        self.gathered.extend(self.waiting.drain(..));
        Ok(std::mem::take(&mut self.gathered))
    }
}

/// Reads up to [`TURN`] datagrams; says whether the socket is empty.
///
/// After an overflow everything that is queued is thrown away, because it is older than the gap: the dump that the
/// owner makes next is newer than all of it.
fn read_turn(
    socket: &mut Socket,
    decode: fn(&Message<'_>) -> Option<Event>,
    waiting: &mut VecDeque<Event>,
) -> Result<bool> {
    let mut overflow = false;
    let mut empty = false;
    for round in 0.. {
        if round >= TURN && !(overflow && round < OVERFLOW_TURN) {
            break;
        }
        match socket.receive(MsgFlags::MSG_DONTWAIT) {
            Ok(_) if overflow => {}
            Ok(bytes) => waiting.extend(Messages(bytes).filter_map(|message| decode(&message))),
            Err(Errno::EAGAIN) => {
                empty = true;
                break;
            }
            Err(Errno::ENOBUFS) => overflow = true,
            Err(errno) => return Err(Error::errno("receive", "notifications", errno)),
        }
    }
    if overflow {
        waiting.clear();
        waiting.push_back(Event::Overflow);
    }
    Ok(empty)
}

fn decode_route(message: &Message<'_>) -> Option<Event> {
    let notice_of = |gone: u16| message.kind == gone;
    match message.kind {
        rtnl::RTM_NEWLINK | rtnl::RTM_DELLINK => link::read_link(message)
            .map(|it| Event::Link(Notice::new(notice_of(rtnl::RTM_DELLINK), it))),
        rtnl::RTM_NEWADDR | rtnl::RTM_DELADDR => link::read_address(message)
            .map(|it| Event::Address(Notice::new(notice_of(rtnl::RTM_DELADDR), it))),
        rtnl::RTM_NEWROUTE | rtnl::RTM_DELROUTE => route::read(message)
            .map(|it| Event::Route(Notice::new(notice_of(rtnl::RTM_DELROUTE), it))),
        rtnl::RTM_NEWNEIGH | rtnl::RTM_DELNEIGH => {
            let gone = notice_of(rtnl::RTM_DELNEIGH);
            neighbour::read(message).map(|it| match it {
                neighbour::Entry::Neighbour(it) => Event::Neighbour(Notice::new(gone, it)),
                neighbour::Entry::Fdb(it) => Event::Fdb(Notice::new(gone, it)),
            })
        }
        rtnl::RTM_NEWRULE | rtnl::RTM_DELRULE => link::read_rule(message)
            .map(|it| Event::Rule(Notice::new(notice_of(rtnl::RTM_DELRULE), it))),
        rtnl::RTM_NEWNEXTHOP | rtnl::RTM_DELNEXTHOP => nexthop::read(message)
            .map(|it| Event::Nexthop(Notice::new(notice_of(rtnl::RTM_DELNEXTHOP), it))),
        _ => None,
    }
}
