//! [`Nft`]: the handle to the nf_tables of one namespace.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockProtocol},
};

use super::{
    Committed, Elem, ListedChain, ListedRule, ListedSet, Rejected, Set, Table, TableName,
    Transaction,
    foreign::{self, Dropper},
    message::{self, NFGENMSG, RawElem},
    quiet::{QUIET_FROM, Quiet},
    transaction::{Failure, Object},
};
use crate::{
    NetNs,
    error::{Cause, Error, Result},
    socket::{Socket, read_ack},
    wire::{Attr, Attrs, Message, Messages, NLM_F_DUMP, NLM_F_REQUEST, Writer},
};

/// Room beyond a batch that the send buffer needs.
const SEND_MARGIN: usize = 64 * 1024;
/// `NFTA_SET_COUNT`.
const SET_COUNT: u16 = 20;
/// A dump of so few elements is one message and one walk of the table.
const SAFE_ELEMENTS: usize = 100;
/// A dump of elements is started again so often.
const ELEMENT_TRIES: u32 = 10;

/// A handle to the nf_tables of ONE namespace. Clones share the socket.
#[derive(Debug, Clone)]
pub struct Nft {
    socket: Arc<Mutex<Socket>>,
    port: u32,
    /// [`NetNs::id`].
    namespace: (u64, u64),
}

/// The number that every change of nf_tables in the namespace raises, and who made this change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// The number.
    pub id: u32,
    /// Process id of the writer.
    pub pid: u32,
    /// Its name (`comm`).
    pub process: String,
}

impl Nft {
    /// Opens the socket inside `netns`.
    pub fn open(netns: &NetNs) -> Result<Self> {
        let socket = netns.run(|| Socket::open(SockProtocol::NetlinkNetFilter))??;
        let port = socket
            .port()
            .map_err(|errno| Error::errno("open", "nf_tables socket", errno))?;
        Ok(Self {
            socket: Arc::new(Mutex::new(socket)),
            port,
            namespace: netns.id()?,
        })
    }

    /// The port number that events of our own changes carry ([`super::NftEvent`]).
    pub fn port(&self) -> u32 {
        self.port
    }

    fn socket(&self) -> MutexGuard<'_, Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies a transaction: all of it, or nothing.
    ///
    /// Listeners of this process ([`Nft::events`]) are told of small transactions only: the kernel takes several times as long
    /// for one that it tells of. They hear [`crate::events::Event::Overflow`] if somebody else changed something meanwhile.
    pub fn commit(&self, transaction: Transaction) -> Result<Committed, Rejected> {
        if transaction.bytes() < QUIET_FROM {
            return self.apply(transaction);
        }
        // Asked for before they leave: what somebody else changes in between is told of, or counted, or both.
        let before = self.generation();
        let quiet = Quiet::begin(self.namespace);
        let outcome = self.apply(transaction);
        let changes = u32::from(outcome.is_ok());
        quiet.end(self, before.map(|before| before.wrapping_add(changes)));
        outcome
    }

    fn apply(&self, mut transaction: Transaction) -> Result<Committed, Rejected> {
        if transaction.is_empty() {
            return Ok(Committed::default());
        }
        let mut socket = self.socket();
        // Answers to a request that nobody waits for any more.
        while socket.receive(MsgFlags::MSG_DONTWAIT).is_ok() {}
        let sent = send(&mut socket, transaction.sealed());
        let outcome = collect(&mut socket, &transaction);
        match (sent, outcome) {
            // `ENOBUFS` from send and an empty answer: the batch did not fit.
            (Err(errno), Ok(_)) => Err(refused_whole(errno)),
            (_, Err(failures)) => Err(Rejected { failures }),
            (Ok(()), Ok(committed)) => Ok(committed),
        }
    }

    /// [`Self::commit`] for whoever has nothing to leave out: the first objection is the error.
    ///
    /// # Errors
    /// The kernel's reason.
    pub fn commit_all(&self, transaction: Transaction) -> Result<()> {
        match self.commit(transaction) {
            Ok(_) => Ok(()),
            Err(rejected) => match rejected.failures.into_iter().next() {
                Some(failure) => Err(failure.error),
                None => Ok(()),
            },
        }
    }

    fn dump<T>(
        &self,
        object: String,
        op: u16,
        family: u8,
        write: impl Fn(&mut Writer),
        decode: impl FnMut(&Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>> {
        let request = |writer: &mut Writer, sequence| {
            message::begin(writer, op, NLM_F_REQUEST | NLM_F_DUMP, family, sequence);
            write(writer);
            writer.finish();
        };
        self.socket()
            .dump(request, decode)
            .map_err(|cause| Error::new("dump", object, cause))
    }

    /// All tables.
    pub fn tables(&self) -> Result<Vec<Table>> {
        self.dump(
            "nf_tables tables".into(),
            message::GETTABLE,
            0,
            |_| {},
            message::read_table,
        )
    }

    /// All chains of a table; of all tables without one.
    pub fn chains(&self, table: Option<&TableName>) -> Result<Vec<ListedChain>> {
        let family = table.map_or(0, |table| table.family as u8);
        let mut all = self.dump(
            "nf_tables chains".into(),
            message::GETCHAIN,
            family,
            |_| {},
            message::read_chain,
        )?;
        all.retain(|chain| table.is_none_or(|table| chain.table == *table));
        Ok(all)
    }

    /// The rules of a table, or of one of its chains, in order. None if there is no such table.
    pub fn rules(&self, table: &TableName, chain: Option<&str>) -> Result<Vec<ListedRule>> {
        let write = |writer: &mut Writer| {
            writer.text(1, &table.name);
            if let Some(chain) = chain {
                writer.text(2, chain);
            }
        };
        let all = self.dump(
            format!("rules of {table}"),
            message::GETRULE,
            table.family as u8,
            write,
            message::read_rule,
        );
        let mut all = none_if_missing(all)?;
        all.retain(|rule| rule.table == *table && chain.is_none_or(|chain| *rule.chain == *chain));
        Ok(all)
    }

    /// The named sets and maps of a table. None if there is no such table.
    pub fn sets(&self, table: &TableName) -> Result<Vec<ListedSet>> {
        let write = |writer: &mut Writer| writer.text(1, &table.name);
        let all = self.dump(
            format!("sets of {table}"),
            message::GETSET,
            table.family as u8,
            write,
            message::read_set,
        );
        let mut all = none_if_missing(all)?;
        all.retain(|set| set.table == *table);
        Ok(all)
    }

    /// The elements of a set or map, with their counters.
    ///
    /// Exact sets are hash tables: while the kernel grows or shrinks its hash table (for some milliseconds after thousands of elements came or
    /// went), a dump may leave elements out and tell others twice without saying so. So a dump only counts when it
    /// holds no element twice and as many as the kernel says there are (Linux 6.16), or as many as the dump before.
    pub fn elements(&self, table: &TableName, set: &Set) -> Result<Vec<Elem>> {
        let object = || format!("elements of {table} {}", set.name);
        let mut before = None;
        for round in 0..ELEMENT_TRIES {
            if round > 0 {
                std::thread::sleep(Duration::from_millis(1 << round.min(7)));
            }
            let counted = self.element_count(table, set)?;
            let mut raw = self.raw_elements(table, set)?;
            raw.sort_by(|a, b| {
                (&a.elem.key, &a.elem.end, b.is_end).cmp(&(&b.elem.key, &b.elem.end, a.is_end))
            });
            let unique = raw.windows(2).all(|pair| {
                (&pair[0].elem.key, &pair[0].elem.end, pair[0].is_end)
                    != (&pair[1].elem.key, &pair[1].elem.end, pair[1].is_end)
            });
            let len = u32::try_from(raw.len()).unwrap_or(u32::MAX);
            // Elements that expire are no longer told but still counted for a while; ranges are not in a hash table.
            let complete = set.timeout
                || set.interval
                || raw.len() < SAFE_ELEMENTS
                || counted.map_or(before == Some(len), |counted| counted == len);
            before = Some(len);
            if unique && complete {
                if set.interval && !set.key.is_concat() {
                    return Ok(message::join_ranges(raw));
                }
                return Ok(raw.into_iter().map(|raw| raw.elem).collect());
            }
        }
        Err(Error::new("dump", object(), Cause::Inconsistent))
    }

    fn raw_elements(&self, table: &TableName, set: &Set) -> Result<Vec<RawElem>> {
        let write = |writer: &mut Writer| {
            writer.text(1, &table.name);
            writer.text(2, &set.name);
        };
        let object = format!("elements of {table} {}", set.name);
        let read = |message: &Message<'_>| {
            let list = Attrs::after(message.payload, NFGENMSG).find(3)?;
            Some(
                list.nested()
                    .filter_map(message::read_elem)
                    .collect::<Vec<_>>(),
            )
        };
        Ok(self
            .dump(object, message::GETSETELEM, table.family as u8, write, read)?
            .concat())
    }

    /// How many elements the kernel says there are (`NFTA_SET_COUNT`); `None` before Linux 6.16.
    fn element_count(&self, table: &TableName, set: &Set) -> Result<Option<u32>> {
        let write = |writer: &mut Writer, sequence| {
            message::begin(
                writer,
                message::GETSET,
                NLM_F_REQUEST,
                table.family as u8,
                sequence,
            );
            writer.text(1, &table.name);
            writer.text(2, &set.name);
            writer.finish();
        };
        let read = |message: &Message<'_>| {
            message::operation(message)?;
            Some(
                Attrs::after(message.payload, NFGENMSG)
                    .find(SET_COUNT)
                    .and_then(Attr::get_be32),
            )
        };
        self.socket()
            .query(write, read)
            .map_err(|cause| Error::new("get", format!("set {table} {}", set.name), cause))
    }

    /// The generation: cheap to ask for, and unchanged as long as nobody has changed anything.
    pub fn generation(&self) -> Result<u32> {
        let write = |writer: &mut Writer, sequence| {
            message::begin(writer, message::GETGEN, NLM_F_REQUEST, 0, sequence);
            writer.finish();
        };
        self.socket()
            .query(write, |message| {
                read_generation(message).map(|generation| generation.id)
            })
            .map_err(|cause| Error::new("get", "nf_tables generation", cause))
    }

    /// Base chains of other tables that can drop what ours accept; see [`foreign`].
    ///
    /// Reads every chain and rule that is not ours, so it is not for every notification.
    pub fn droppers(&self, ours: &[TableName]) -> Result<Vec<Dropper>> {
        let chains = self.chains(None)?;
        let tables: BTreeSet<&TableName> = chains.iter().map(|chain| &chain.table).collect();
        let mut rules = Vec::new();
        for table in tables {
            if !ours.contains(table) {
                rules.extend(self.rules(table, None)?);
            }
        }
        Ok(foreign::droppers(&chains, &rules, ours))
    }
}

fn none_if_missing<T>(result: Result<Vec<T>>) -> Result<Vec<T>> {
    match result {
        Err(error) if error.code() == Some(Errno::ENOENT) => Ok(Vec::new()),
        result => result,
    }
}

fn refused_whole(errno: Errno) -> Rejected {
    let error = Error::errno("commit", Object::Batch.to_string(), errno);
    Rejected {
        failures: vec![Failure {
            object: Object::Batch,
            element: None,
            error,
        }],
    }
}

fn send(socket: &mut Socket, bytes: &[u8]) -> Result<(), Errno> {
    if bytes.len() + SEND_MARGIN > socket.send_limit() {
        socket.grow_send(bytes.len() + SEND_MARGIN);
    }
    socket.transmit(bytes)
}

/// The kernel has dealt with the batch when send returns: all its answers are waiting.
fn collect(socket: &mut Socket, transaction: &Transaction) -> Result<Committed, Vec<Failure>> {
    let mut failures = Vec::new();
    let mut committed = Committed::default();
    let mut lost = false;
    loop {
        let bytes = match socket.receive(MsgFlags::MSG_DONTWAIT) {
            Ok(bytes) => bytes,
            Err(Errno::ENOBUFS) => {
                lost = true;
                continue;
            }
            Err(_) => break,
        };
        for message in Messages(bytes) {
            match read_ack(&message) {
                Some(ack) => {
                    if let Err(cause) = ack.result {
                        failures.push(transaction.failure(ack.sequence, ack.offset, cause));
                    }
                }
                None if transaction.is_added_rule(message.sequence) => {
                    committed
                        .rule_handles
                        .extend(message::read_rule(&message).map(|rule| rule.handle));
                }
                None => {}
            }
        }
    }
    if lost {
        committed.rule_handles.clear();
    }
    if failures.is_empty() {
        Ok(committed)
    } else {
        Err(failures)
    }
}

pub(super) fn read_generation(message: &Message<'_>) -> Option<Generation> {
    message::operation(message).filter(|(op, _)| *op == message::NEWGEN)?;
    let attrs = Attrs::after(message.payload, NFGENMSG);
    Some(Generation {
        id: attrs.find(1)?.get_be32()?,
        pid: attrs.find(2).and_then(Attr::get_be32).unwrap_or(0),
        process: attrs.find(3).map(Attr::get_text).unwrap_or_default(),
    })
}
