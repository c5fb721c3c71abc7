//! Changes of nf_tables, as the kernel tells them: which object, and whose change it was.

use std::sync::Arc;

use nix::sys::socket::SockProtocol;

use super::{Family, Generation, Listener, Nft, TableName, handle::read_generation, message};
use crate::{
    NetNs,
    error::Result,
    events::{Event, EventStream},
    wire::{Attr, Attrs, Message},
};

/// `NFNLGRP_NFTABLES` (`include/uapi/linux/netfilter/nfnetlink.h`).
const GROUP: u32 = 7;
/// A transaction of 100,000 elements tells of every one of them.
const EVENT_BUFFER: usize = 64 << 20;

/// What has changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Changed {
    /// The table itself.
    Table,
    /// A chain.
    Chain(Arc<str>),
    /// A rule of a chain.
    Rule(Arc<str>, u64),
    /// A set or map.
    Set(Arc<str>),
    /// Elements of a set or map.
    Elements(Arc<str>),
    /// Something else (a flowtable, a named counter).
    Other,
}

/// One notification of nf_tables.
///
/// The changes of a transaction come first, its [`NftEvent::Commit`] with the same port comes last. The port of our
/// own changes is [`Nft::port`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NftEvent {
    /// An object has changed.
    Change {
        /// Its table.
        table: TableName,
        /// What.
        object: Changed,
        /// Gone, instead of added or changed.
        gone: bool,
        /// Netlink port of whoever did it.
        port: u32,
    },
    /// A transaction is complete.
    Commit {
        /// The new generation, with process id and name of whoever did it.
        generation: Generation,
        /// Its netlink port.
        port: u32,
    },
}

impl NftEvent {
    /// Netlink port of whoever did it.
    pub fn port(&self) -> u32 {
        match self {
            Self::Change { port, .. } | Self::Commit { port, .. } => *port,
        }
    }
}

impl Nft {
    /// Changes of all tables of a namespace, from now on. Needs a running tokio runtime.
    ///
    /// It does not tell of large transactions of this process ([`Nft::commit`]).
    pub fn events(netns: &NetNs) -> Result<EventStream> {
        let stream = EventStream::open(
            netns,
            SockProtocol::NetlinkNetFilter,
            &[GROUP],
            EVENT_BUFFER,
            decode,
        )?;
        let namespace = netns.id()?;
        stream.with_listener(|socket| Listener::register(socket, namespace, GROUP))
    }
}

fn decode(message: &Message<'_>) -> Option<Event> {
    let (op, family) = message::operation(message)?;
    let port = message.port;
    if op == message::NEWGEN {
        return read_generation(message)
            .map(|generation| Event::Nft(NftEvent::Commit { generation, port }));
    }
    let attrs = Attrs::after(message.payload, message::NFGENMSG);
    let text = |kind| {
        attrs
            .find(kind)
            .map(|attr| Arc::<str>::from(attr.get_text()))
    };
    let object = match op {
        message::NEWTABLE | message::DELTABLE => Changed::Table,
        message::NEWCHAIN | message::DELCHAIN => Changed::Chain(text(3)?),
        message::NEWRULE | message::DELRULE => {
            Changed::Rule(text(2)?, attrs.find(3).and_then(Attr::get_be64)?)
        }
        message::NEWSET | message::DELSET => Changed::Set(text(2)?),
        message::NEWSETELEM | message::DELSETELEM => Changed::Elements(text(2)?),
        _ => Changed::Other,
    };
    let gone = matches!(
        op,
        message::DELTABLE
            | message::DELCHAIN
            | message::DELRULE
            | message::DELSET
            | message::DELSETELEM
    );
    // The name of the table is attribute 1 of every object.
    let table = TableName {
        family: Family::from_number(family)?,
        name: text(1)?,
    };
    Some(Event::Nft(NftEvent::Change {
        table,
        object,
        gone,
        port,
    }))
}
