//! One atomic batch of changes, and what becomes of it.

use std::{fmt, sync::Arc};

use super::{Chain, Elem, Key, Rule, Set, TableName, message};
use crate::{
    error::Error,
    wire::{
        Attrs, HEADER, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, Writer,
    },
};

/// Bytes of elements in one message; attribute lengths are 16 bits wide.
const ELEMENTS_LIMIT: usize = 56 * 1024;
const NLM_F_ECHO: u16 = 0x08;

/// The object that a message of a transaction is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A table.
    Table(TableName),
    /// A chain.
    Chain(TableName, Arc<str>),
    /// A rule of a chain; the tag is the owner's.
    Rule(TableName, Arc<str>, Option<u64>),
    /// A set or map.
    Set(TableName, Arc<str>),
    /// Elements of a set or map.
    Elements(TableName, Arc<str>),
    /// A flowtable.
    Flowtable(TableName, Arc<str>),
    /// The whole batch.
    Batch,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(table) => write!(f, "table {table}"),
            Self::Chain(table, chain) => write!(f, "chain {table} {chain}"),
            Self::Rule(table, chain, None) => write!(f, "rule in {table} {chain}"),
            Self::Rule(table, chain, Some(tag)) => write!(f, "rule {tag:016x} in {table} {chain}"),
            Self::Set(table, set) => write!(f, "set {table} {set}"),
            Self::Elements(table, set) => write!(f, "elements of {table} {set}"),
            Self::Flowtable(table, name) => write!(f, "flowtable {table} {name}"),
            Self::Batch => f.write_str("nf_tables batch"),
        }
    }
}

/// One reason why a transaction was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The object that the kernel objected to.
    pub object: Object,
    /// The element, for [`Object::Elements`], where the kernel said which.
    pub element: Option<Key>,
    /// Operation, object and cause.
    pub error: Error,
}

/// The kernel has refused a transaction; nothing of it was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Every objection; at least one.
    pub failures: Vec<Failure>,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.failures.as_slice() {
            [] => f.write_str("nf_tables transaction refused"),
            [one] => write!(f, "nf_tables transaction refused: {}", one.error),
            [first, rest @ ..] => {
                write!(
                    f,
                    "nf_tables transaction refused: {} (and {} more)",
                    first.error,
                    rest.len()
                )
            }
        }
    }
}

impl std::error::Error for Rejected {}

/// What a committed transaction yielded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Committed {
    /// Handles of the rules that were added, in the order in which they were added; only after
    /// [`Transaction::echo_handles`]. Empty if the kernel's answers did not fit into the socket: dump then.
    pub rule_handles: Vec<u64>,
}

#[derive(Debug, Clone)]
pub(super) struct Origin {
    operation: &'static str,
    object: Object,
    /// Where its message starts in the buffer.
    start: usize,
}

/// A batch that is being put together. Messages are applied in order, all or none.
///
/// Additions are idempotent unless they say otherwise; a deletion of what is not there fails the transaction.
#[derive(Debug)]
pub struct Transaction {
    table: TableName,
    writer: Writer,
    origins: Vec<Origin>,
    echo: bool,
    next_set_id: u32,
}

/// Where a rule goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// At the end of its chain.
    Last,
    /// At the start of its chain.
    First,
    /// Before the rule with this handle.
    Before(u64),
    /// After the rule with this handle.
    After(u64),
}

/// One message may name so many devices (`NFT_NETDEVICE_MAX`).
const FLOWTABLE_DEVICES: usize = 256;

impl Transaction {
    /// An empty transaction whose messages are about `table`.
    pub fn new(table: TableName) -> Self {
        let mut writer = Writer::with_capacity(4096);
        message::write_batch_begin(&mut writer, NLM_F_REQUEST, 1);
        Self {
            table,
            writer,
            origins: Vec::new(),
            echo: false,
            next_set_id: 0,
        }
    }

    /// From here on, messages are about another table.
    pub fn switch_table(&mut self, table: TableName) {
        self.table = table;
    }

    /// Asks the kernel for the handles of rules that are added after this call.
    pub fn echo_handles(&mut self) {
        self.echo = true;
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.origins.is_empty()
    }

    /// Number of messages.
    pub fn len(&self) -> usize {
        self.origins.len()
    }

    /// Size in bytes; one transaction is one send.
    pub fn bytes(&self) -> usize {
        self.writer.len()
    }

    fn begin(&mut self, op: u16, flags: u16, operation: &'static str, object: Object) {
        let start = self.writer.len();
        // Sequence 1 is the begin mark, so message n has n + 2.
        let sequence = self.origins.len() as u32 + 2;
        self.origins.push(Origin {
            operation,
            object,
            start,
        });
        message::begin(
            &mut self.writer,
            op,
            NLM_F_REQUEST | flags,
            self.table.family as u8,
            sequence,
        );
    }

    /// Makes the table. It belongs to the socket of this [`super::Nft`]: nobody else can change it, and it goes with the
    /// last clone of the handle (`NFT_TABLE_F_OWNER`, Linux 5.12).
    pub fn add_owned_table(&mut self) {
        self.add_table_with(2);
    }

    /// Makes the table.
    pub fn add_table(&mut self) {
        self.add_table_with(0);
    }

    fn add_table_with(&mut self, flags: u32) {
        self.begin(
            message::NEWTABLE,
            NLM_F_CREATE,
            "add",
            Object::Table(self.table.clone()),
        );
        self.writer.text(1, &self.table.name);
        self.writer.be32(2, flags);
        self.writer.finish();
    }

    /// Removes the table and all in it.
    pub fn delete_table(&mut self) {
        self.begin(
            message::DELTABLE,
            0,
            "delete",
            Object::Table(self.table.clone()),
        );
        self.writer.text(1, &self.table.name);
        self.writer.finish();
    }

    /// Makes a chain, or changes the policy of one that is there. Hook and priority of a chain cannot be changed.
    pub fn add_chain(&mut self, chain: &Chain) {
        let object = Object::Chain(self.table.clone(), Arc::clone(&chain.name));
        self.begin(message::NEWCHAIN, NLM_F_CREATE, "add", object);
        message::write_chain(&mut self.writer, &self.table, chain);
        self.writer.finish();
    }

    /// Removes a chain; its rules go with it, but rules that jump to it must be gone.
    pub fn delete_chain(&mut self, chain: &Arc<str>) {
        let object = Object::Chain(self.table.clone(), Arc::clone(chain));
        self.begin(message::DELCHAIN, 0, "delete", object);
        self.writer.text(1, &self.table.name);
        self.writer.text(3, chain);
        self.writer.finish();
    }

    /// Removes all rules of a chain.
    pub fn flush_chain(&mut self, chain: &Arc<str>) {
        let object = Object::Chain(self.table.clone(), Arc::clone(chain));
        self.begin(message::DELRULE, 0, "flush", object);
        self.writer.text(1, &self.table.name);
        self.writer.text(2, chain);
        self.writer.finish();
    }

    /// Adds a rule. Not idempotent: equal rules may stand twice.
    pub fn add_rule(&mut self, chain: &Arc<str>, position: Position, rule: &Rule) {
        let place = match position {
            Position::Last | Position::After(_) => NLM_F_APPEND,
            Position::First | Position::Before(_) => 0,
        };
        let echo = if self.echo { NLM_F_ECHO } else { 0 };
        let object = Object::Rule(self.table.clone(), Arc::clone(chain), rule.tag);
        self.begin(message::NEWRULE, NLM_F_CREATE | place | echo, "add", object);
        self.writer.text(1, &self.table.name);
        self.writer.text(2, chain);
        if let Position::Before(handle) | Position::After(handle) = position {
            self.writer.be64(6, handle);
        }
        message::write_rule_body(&mut self.writer, rule);
        self.writer.finish();
    }

    /// Adds a rule at the end of its chain.
    pub fn append_rule(&mut self, chain: &Arc<str>, rule: &Rule) {
        self.add_rule(chain, Position::Last, rule);
    }

    /// Puts a rule in the place of the one with this handle. The new rule has a handle of its own.
    pub fn replace_rule(&mut self, chain: &Arc<str>, handle: u64, rule: &Rule) {
        let echo = if self.echo { NLM_F_ECHO } else { 0 };
        let object = Object::Rule(self.table.clone(), Arc::clone(chain), rule.tag);
        self.begin(message::NEWRULE, NLM_F_REPLACE | echo, "replace", object);
        self.writer.text(1, &self.table.name);
        self.writer.text(2, chain);
        self.writer.be64(3, handle);
        message::write_rule_body(&mut self.writer, rule);
        self.writer.finish();
    }

    /// Removes the rule with this handle.
    pub fn delete_rule(&mut self, chain: &Arc<str>, handle: u64) {
        let object = Object::Rule(self.table.clone(), Arc::clone(chain), None);
        self.begin(message::DELRULE, 0, "delete", object);
        self.writer.text(1, &self.table.name);
        self.writer.text(2, chain);
        self.writer.be64(3, handle);
        self.writer.finish();
    }

    /// Makes a set or map. One that is there must be of the same kind.
    pub fn add_set(&mut self, set: &Set) {
        let object = Object::Set(self.table.clone(), Arc::clone(&set.name));
        self.begin(message::NEWSET, NLM_F_CREATE, "add", object);
        self.next_set_id += 1;
        message::write_set(&mut self.writer, &self.table, set, self.next_set_id);
        self.writer.finish();
    }

    /// Removes a set or map; rules that use it must be gone.
    pub fn delete_set(&mut self, set: &Arc<str>) {
        let object = Object::Set(self.table.clone(), Arc::clone(set));
        self.begin(message::DELSET, 0, "delete", object);
        self.writer.text(1, &self.table.name);
        self.writer.text(2, set);
        self.writer.finish();
    }

    /// Removes all elements of a set or map.
    pub fn flush_set(&mut self, set: &Arc<str>) {
        let object = Object::Elements(self.table.clone(), Arc::clone(set));
        self.begin(message::DELSETELEM, 0, "flush", object);
        self.writer.text(1, &self.table.name);
        self.writer.text(2, set);
        self.writer.finish();
    }

    /// Adds elements. One that is there stays as it is; a map element with other data fails the transaction.
    pub fn add_elements<'a>(&mut self, set: &Set, elements: impl IntoIterator<Item = &'a Elem>) {
        self.elements(message::NEWSETELEM, NLM_F_CREATE, "add", set, elements);
    }

    /// Adds elements, none of which may be there.
    pub fn create_elements<'a>(&mut self, set: &Set, elements: impl IntoIterator<Item = &'a Elem>) {
        self.elements(
            message::NEWSETELEM,
            NLM_F_CREATE | NLM_F_EXCL,
            "create",
            set,
            elements,
        );
    }

    /// Removes elements; all must be there.
    pub fn delete_elements<'a>(&mut self, set: &Set, elements: impl IntoIterator<Item = &'a Elem>) {
        self.elements(message::DELSETELEM, 0, "delete", set, elements);
    }

    fn elements<'a>(
        &mut self,
        op: u16,
        flags: u16,
        operation: &'static str,
        set: &Set,
        elements: impl IntoIterator<Item = &'a Elem>,
    ) {
        let mut elements = elements.into_iter().peekable();
        while elements.peek().is_some() {
            let object = Object::Elements(self.table.clone(), Arc::clone(&set.name));
            self.begin(op, flags, operation, object);
            self.writer.text(1, &self.table.name);
            self.writer.text(2, &set.name);
            let list = self.writer.nest(3);
            while self.writer.nest_len(&list) < ELEMENTS_LIMIT
                && let Some(elem) = elements.next()
            {
                message::write_elem(&mut self.writer, set, elem);
            }
            self.writer.end(list);
            self.writer.finish();
        }
    }

    /// Makes a flowtable, or adds devices to the one that is there (`include/uapi/linux/netfilter/nf_tables.h`,
    /// `NFTA_FLOWTABLE_*`). The kernel refuses devices that are not there or are in another flowtable.
    pub fn add_flowtable<'a>(
        &mut self,
        name: &str,
        priority: i32,
        devices: impl IntoIterator<Item = &'a Arc<str>>,
    ) {
        let mut devices = devices.into_iter().peekable();
        loop {
            self.begin(
                message::NEWFLOWTABLE,
                NLM_F_CREATE,
                "add",
                Object::Flowtable(self.table.clone(), name.into()),
            );
            self.writer.text(1, &self.table.name);
            self.writer.text(2, name);
            let hook = self.writer.nest(3);
            // `NF_NETDEV_INGRESS`.
            self.writer.be32(1, 0);
            self.writer.be32(2, priority as u32);
            if devices.peek().is_some() {
                let list = self.writer.nest(3);
                for device in devices.by_ref().take(FLOWTABLE_DEVICES) {
                    self.writer.text(1, device);
                }
                self.writer.end(list);
            }
            self.writer.end(hook);
            self.writer.finish();
            if devices.peek().is_none() {
                break;
            }
        }
    }

    /// The whole batch as one send.
    pub(super) fn sealed(&mut self) -> &[u8] {
        let sequence = self.origins.len() as u32 + 2;
        message::write_batch_end(&mut self.writer, NLM_F_REQUEST, sequence);
        self.writer.as_slice()
    }

    /// Number of the rule (counted among the added ones) that an echo with this sequence number is about.
    pub(super) fn is_added_rule(&self, sequence: u32) -> bool {
        (sequence as usize)
            .checked_sub(2)
            .and_then(|index| self.origins.get(index))
            .is_some_and(|origin| matches!(origin.object, Object::Rule(..)))
    }

    /// What the kernel objected to, from the sequence number and the offset in the message.
    pub(super) fn failure(
        &self,
        sequence: u32,
        offset: Option<u32>,
        cause: crate::Cause,
    ) -> Failure {
        let origin = (sequence as usize)
            .checked_sub(2)
            .and_then(|index| self.origins.get(index));
        let Some(origin) = origin else {
            let error = Error::new("commit", Object::Batch.to_string(), cause);
            return Failure {
                object: Object::Batch,
                element: None,
                error,
            };
        };
        let element = match origin.object {
            Object::Elements(..) => {
                offset.and_then(|offset| self.element_at(origin.start, offset as usize))
            }
            _ => None,
        };
        let object = match &element {
            Some(element) => format!("{} ({element})", origin.object),
            None => origin.object.to_string(),
        };
        Failure {
            object: origin.object.clone(),
            element,
            error: Error::new(origin.operation, object, cause),
        }
    }

    /// The key of the element that holds byte `offset` of the message at `start`.
    fn element_at(&self, start: usize, offset: usize) -> Option<Key> {
        let bytes = self.writer.as_slice().get(start..)?;
        let message = crate::wire::Messages(bytes).next()?;
        let list = Attrs::after(message.payload, message::NFGENMSG).find(3)?;
        let base = HEADER + message.payload.len()
            - (message.payload.as_ptr_range().end as usize
                - list.payload.as_ptr_range().start as usize);
        let mut at = base;
        for entry in list.nested() {
            let next = at + (entry.payload.len() + 4).next_multiple_of(4);
            if (at..next).contains(&offset) {
                return message::read_elem(entry).map(|raw| raw.elem.key);
            }
            at = next;
        }
        None
    }
}
