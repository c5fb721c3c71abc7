//! nf_tables messages: headers, object attributes, user data (`include/uapi/linux/netfilter/nf_tables.h`).

use std::{sync::Arc, time::Duration};

use super::{
    BaseHook, Chain, ChainType, Data, Elem, Expr, Family, Hook, Key, KeyType, ListedChain,
    ListedRule, ListedSet, MapData, Policy, Rule, Set, Table, TableName, expr_wire,
};
use crate::wire::{Attr, Attrs, Message, Writer};

pub(super) const NEWTABLE: u16 = 0;
pub(super) const GETTABLE: u16 = 1;
pub(super) const DELTABLE: u16 = 2;
pub(super) const NEWCHAIN: u16 = 3;
pub(super) const GETCHAIN: u16 = 4;
pub(super) const DELCHAIN: u16 = 5;
pub(super) const NEWRULE: u16 = 6;
pub(super) const GETRULE: u16 = 7;
pub(super) const DELRULE: u16 = 8;
pub(super) const NEWSET: u16 = 9;
pub(super) const GETSET: u16 = 10;
pub(super) const DELSET: u16 = 11;
pub(super) const NEWSETELEM: u16 = 12;
pub(super) const GETSETELEM: u16 = 13;
pub(super) const DELSETELEM: u16 = 14;
pub(super) const NEWGEN: u16 = 15;
pub(super) const GETGEN: u16 = 16;
pub(super) const NEWFLOWTABLE: u16 = 22;

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
/// `struct nfgenmsg`.
pub(super) const NFGENMSG: usize = 4;

const SET_INTERVAL: u32 = 0x04;
const SET_MAP: u32 = 0x08;
const SET_TIMEOUT: u32 = 0x10;
const SET_EVAL: u32 = 0x20;
const SET_CONCAT: u32 = 0x80;
const ELEM_INTERVAL_END: u32 = 1;
const DATA_VERDICT: u32 = 0xffff_ff00;

/// User data of nftables is type u8, length u8, value; 0 is the comment of tables, chains, rules and elements.
const UDATA_COMMENT: u8 = 0;
const UDATA_SET_KEY_ORDER: u8 = 0;
const UDATA_SET_DATA_ORDER: u8 = 1;
const UDATA_SET_COMMENT: u8 = 7;
/// A type that nftables does not know and skips.
const UDATA_TAG: u8 = 0xca;

/// Starts a message of nf_tables.
pub(super) fn begin(writer: &mut Writer, op: u16, flags: u16, family: u8, sequence: u32) {
    writer.begin(NFNL_SUBSYS_NFTABLES << 8 | op, flags, sequence);
    writer.raw(&[family, 0, 0, 0]);
}

/// The operation of a message of nf_tables, and its family.
pub(super) fn operation(message: &Message<'_>) -> Option<(u16, u8)> {
    if message.kind >> 8 != NFNL_SUBSYS_NFTABLES {
        return None;
    }
    Some((message.kind & 0xff, *message.payload.first()?))
}

pub(super) fn write_batch_begin(writer: &mut Writer, flags: u16, sequence: u32) {
    write_batch_mark(writer, NFNL_MSG_BATCH_BEGIN, flags, sequence);
}

pub(super) fn write_batch_end(writer: &mut Writer, flags: u16, sequence: u32) {
    write_batch_mark(writer, NFNL_MSG_BATCH_END, flags, sequence);
}

fn write_batch_mark(writer: &mut Writer, kind: u16, flags: u16, sequence: u32) {
    writer.begin(kind, flags, sequence);
    let subsystem = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    writer.raw(&[0, 0, subsystem[0], subsystem[1]]);
    writer.finish();
}

/// Text with its NUL; nftables allows 128 bytes.
fn push_comment(data: &mut Vec<u8>, kind: u8, comment: &str) {
    let text = &comment[..comment.floor_char_boundary(127)];
    data.extend_from_slice(&[kind, text.len() as u8 + 1]);
    data.extend_from_slice(text.as_bytes());
    data.push(0);
}

fn write_user_data(writer: &mut Writer, kind: u16, comment: Option<&str>, tag: Option<u64>) {
    let mut data = Vec::new();
    if let Some(comment) = comment {
        push_comment(&mut data, UDATA_COMMENT, comment);
    }
    if let Some(tag) = tag {
        data.extend_from_slice(&[UDATA_TAG, 8]);
        data.extend_from_slice(&tag.to_be_bytes());
    }
    if !data.is_empty() {
        writer.attr(kind, &data);
    }
}

fn read_user_data(mut data: &[u8], comment_type: u8) -> (Option<String>, Option<u64>) {
    let (mut comment, mut tag) = (None, None);
    while let [kind, len, rest @ ..] = data {
        let Some(value) = rest.get(..usize::from(*len)) else {
            break;
        };
        if *kind == comment_type {
            let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
            comment = Some(String::from_utf8_lossy(text).into_owned());
        } else if *kind == UDATA_TAG {
            tag = <[u8; 8]>::try_from(value).ok().map(u64::from_be_bytes);
        }
        data = &rest[value.len()..];
    }
    (comment, tag)
}

pub(super) fn write_chain(writer: &mut Writer, table: &TableName, chain: &Chain) {
    writer.text(1, &table.name);
    writer.text(3, &chain.name);
    if let Some(base) = &chain.base {
        let hook = writer.nest(4);
        writer.be32(1, base.hook.number(table.family));
        writer.be32(2, base.priority as u32);
        writer.end(hook);
        writer.be32(
            5,
            match base.policy {
                Policy::Drop => 0,
                Policy::Accept => 1,
            },
        );
        writer.text(7, base.chain_type.name());
    }
    write_user_data(writer, 12, chain.comment.as_deref(), None);
}

/// Expressions and user data; the caller wrote table, chain and position.
pub(super) fn write_rule_body(writer: &mut Writer, rule: &Rule) {
    expr_wire::write_list(writer, 4, &rule.exprs);
    write_user_data(writer, 7, rule.comment.as_deref(), rule.tag);
}

pub(super) fn write_set(writer: &mut Writer, table: &TableName, set: &Set, id: u32) {
    writer.text(1, &table.name);
    writer.text(2, &set.name);
    let mut flags = 0;
    for (on, flag) in [
        (set.interval, SET_INTERVAL),
        (set.data.is_some(), SET_MAP),
        (set.timeout, SET_TIMEOUT),
        (set.dynamic, SET_EVAL),
        (set.key.is_concat(), SET_CONCAT),
    ] {
        if on {
            flags |= flag;
        }
    }
    writer.be32(3, flags);
    writer.be32(4, set.key.number());
    writer.be32(5, set.key.size());
    match set.data {
        Some(MapData::Verdict) => {
            writer.be32(6, DATA_VERDICT);
            writer.be32(7, 0);
        }
        Some(MapData::Value(kind)) => {
            writer.be32(6, kind.number());
            writer.be32(7, kind.size());
        }
        None => {}
    }
    if set.key.is_concat() || set.size.is_some() {
        let description = writer.nest(9);
        if let Some(size) = set.size {
            writer.be32(1, size);
        }
        if set.key.is_concat() {
            let fields = writer.nest(2);
            for field in &set.key.0 {
                let elem = writer.nest(1);
                writer.be32(1, field.size());
                writer.end(elem);
            }
            writer.end(fields);
        }
        writer.end(description);
    }
    writer.be32(10, id);
    if set.counter {
        let counter = writer.nest(17);
        expr_wire::write_expr(
            writer,
            &Expr::Counter {
                packets: 0,
                bytes: 0,
            },
        );
        writer.end(counter);
    }
    write_set_user_data(writer, set);
}

/// `nft list` needs the byte order of types that are in host order; concatenations are handled field by field.
fn write_set_user_data(writer: &mut Writer, set: &Set) {
    let mut data = Vec::new();
    let mut order = |kind: u8, order: u32| {
        data.extend_from_slice(&[kind, 4]);
        data.extend_from_slice(&order.to_ne_bytes());
    };
    order(
        UDATA_SET_KEY_ORDER,
        if set.key.is_concat() {
            0
        } else {
            set.key.0[0].byte_order()
        },
    );
    if let Some(MapData::Value(kind)) = set.data {
        order(UDATA_SET_DATA_ORDER, kind.byte_order());
    }
    if let Some(comment) = &set.comment {
        push_comment(&mut data, UDATA_SET_COMMENT, comment);
    }
    writer.attr(13, &data);
}

/// One element: one list entry, or two for a range of a set that is not a concatenation.
pub(super) fn write_elem(writer: &mut Writer, set: &Set, elem: &Elem) {
    let entry = writer.nest(1);
    expr_wire::write_value(writer, 1, &elem.key);
    match &elem.data {
        Some(Data::Verdict(verdict)) => expr_wire::write_verdict(writer, 2, verdict),
        Some(Data::Value(value)) => expr_wire::write_value(writer, 2, value),
        None => {}
    }
    if let Some(timeout) = elem.timeout {
        writer.be64(4, timeout.as_millis() as u64);
    }
    write_user_data(writer, 6, elem.comment.as_deref(), None);
    if let Some((packets, bytes)) = elem.counter {
        let counter = writer.nest(7);
        expr_wire::write_expr(writer, &Expr::Counter { packets, bytes });
        writer.end(counter);
    }
    if set.interval && set.key.is_concat() {
        expr_wire::write_value(writer, 10, elem.end.as_ref().unwrap_or(&elem.key));
    }
    writer.end(entry);
    // The end of a range is the first value beyond it; a range up to the greatest value has none.
    if set.interval
        && !set.key.is_concat()
        && let Some(beyond) = elem.end.as_ref().unwrap_or(&elem.key).successor()
    {
        let entry = writer.nest(1);
        expr_wire::write_value(writer, 1, &beyond);
        writer.be32(3, ELEM_INTERVAL_END);
        writer.end(entry);
    }
}

/// An element as it stands in a message, before the ends of ranges are joined to their starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawElem {
    pub(super) elem: Elem,
    pub(super) is_end: bool,
}

pub(super) fn read_elem(entry: Attr<'_>) -> Option<RawElem> {
    let mut elem = Elem::new(Key::default());
    let mut is_end = false;
    for attr in entry.nested() {
        match attr.kind {
            1 => elem.key = expr_wire::read_value(attr)?,
            2 => {
                elem.data = expr_wire::read_verdict(attr)
                    .map(Data::Verdict)
                    .or_else(|| expr_wire::read_value(attr).map(Data::Value));
            }
            3 => is_end = attr.get_be32()? & ELEM_INTERVAL_END != 0,
            4 => elem.timeout = attr.get_be64().map(Duration::from_millis),
            5 => elem.expires = attr.get_be64().map(Duration::from_millis),
            6 => elem.comment = read_user_data(attr.payload, UDATA_COMMENT).0,
            7 => elem.counter = read_counter(attr.nested()),
            10 => elem.end = expr_wire::read_value(attr),
            11 => elem.counter = attr.nested().find_map(|expr| read_counter(expr.nested())),
            _ => {}
        }
    }
    Some(RawElem { elem, is_end })
}

fn read_counter(expr: Attrs<'_>) -> Option<(u64, u64)> {
    match expr_wire::read_expr(expr) {
        Expr::Counter { packets, bytes } => Some((packets, bytes)),
        _ => None,
    }
}

/// Joins starts and ends of ranges. `elements` may come in any order.
pub(super) fn join_ranges(mut elements: Vec<RawElem>) -> Vec<Elem> {
    // Where one range ends and the next starts at the same key, the end belongs to the range before.
    elements.sort_by(|a, b| a.elem.key.cmp(&b.elem.key).then(b.is_end.cmp(&a.is_end)));
    let mut ranges = Vec::with_capacity(elements.len() / 2);
    let mut open: Option<Elem> = None;
    for RawElem { elem, is_end } in elements {
        if let Some(mut range) = open.take() {
            range.end = elem.key.predecessor();
            ranges.push(range);
        }
        if !is_end {
            open = Some(elem);
        }
    }
    if let Some(mut range) = open {
        range.end = Some(Key::bytes(&vec![0xff; range.key.0.len()]));
        ranges.push(range);
    }
    ranges
}

fn table_name(family: u8, attr: Option<Attr<'_>>) -> Option<TableName> {
    Some(TableName::new(
        Family::from_number(family)?,
        attr?.get_text(),
    ))
}

pub(super) fn read_table(message: &Message<'_>) -> Option<Table> {
    let (_, family) = operation(message).filter(|(op, _)| *op == NEWTABLE)?;
    let attrs = Attrs::after(message.payload, NFGENMSG);
    Some(Table {
        name: table_name(family, attrs.find(1))?,
        flags: attrs.find(2).and_then(Attr::get_be32).unwrap_or(0),
        uses: attrs.find(3).and_then(Attr::get_be32).unwrap_or(0),
        handle: attrs.find(4).and_then(Attr::get_be64).unwrap_or(0),
    })
}

pub(super) fn read_chain(message: &Message<'_>) -> Option<ListedChain> {
    let (_, family) = operation(message).filter(|(op, _)| *op == NEWCHAIN)?;
    let attrs = Attrs::after(message.payload, NFGENMSG);
    let table = table_name(family, attrs.find(1))?;
    let base = attrs.find(4).and_then(|hook| {
        let hook = hook.nested();
        Some(BaseHook {
            chain_type: match attrs.find(7)?.get_text().as_str() {
                "filter" => ChainType::Filter,
                "nat" => ChainType::Nat,
                "route" => ChainType::Route,
                _ => return None,
            },
            hook: Hook::of_family(table.family, hook.find(1)?.get_be32()?)?,
            priority: hook.find(2)?.get_be32()? as i32,
            policy: match attrs.find(5).and_then(Attr::get_be32) {
                Some(0) => Policy::Drop,
                _ => Policy::Accept,
            },
        })
    });
    let comment = attrs
        .find(12)
        .and_then(|data| read_user_data(data.payload, UDATA_COMMENT).0);
    Some(ListedChain {
        chain: Chain {
            name: Arc::from(attrs.find(3)?.get_text()),
            base,
            comment,
        },
        uses: attrs.find(6).and_then(Attr::get_be32).unwrap_or(0),
        handle: attrs.find(2).and_then(Attr::get_be64).unwrap_or(0),
        table,
    })
}

pub(super) fn read_rule(message: &Message<'_>) -> Option<ListedRule> {
    let (_, family) = operation(message).filter(|(op, _)| *op == NEWRULE)?;
    let attrs = Attrs::after(message.payload, NFGENMSG);
    let (comment, tag) = attrs.find(7).map_or((None, None), |data| {
        read_user_data(data.payload, UDATA_COMMENT)
    });
    Some(ListedRule {
        table: table_name(family, attrs.find(1))?,
        chain: Arc::from(attrs.find(2)?.get_text()),
        handle: attrs.find(3)?.get_be64()?,
        rule: Rule {
            exprs: attrs.find(4).map(expr_wire::read_list).unwrap_or_default(),
            comment,
            tag,
        },
    })
}

pub(super) fn read_set(message: &Message<'_>) -> Option<ListedSet> {
    let (_, family) = operation(message).filter(|(op, _)| *op == NEWSET)?;
    let attrs = Attrs::after(message.payload, NFGENMSG);
    let flags = attrs.find(3).and_then(Attr::get_be32).unwrap_or(0);
    let key_len = attrs.find(5)?.get_be32()?;
    let number = |kind| attrs.find(kind).and_then(Attr::get_be32);
    let data = (flags & SET_MAP != 0).then(|| match number(6).unwrap_or(0) {
        DATA_VERDICT => MapData::Verdict,
        kind => MapData::Value(KeyType::from_number(kind, number(7).unwrap_or(0)).0[0]),
    });
    let counter = attrs
        .find(17)
        .is_some_and(|expr| read_counter(expr.nested()).is_some())
        || attrs.find(18).is_some_and(|list| {
            list.nested()
                .any(|expr| read_counter(expr.nested()).is_some())
        });
    Some(ListedSet {
        table: table_name(family, attrs.find(1))?,
        handle: attrs.find(16).and_then(Attr::get_be64).unwrap_or(0),
        set: Set {
            name: Arc::from(attrs.find(2)?.get_text()),
            key: KeyType::from_number(number(4).unwrap_or(0), key_len),
            data,
            interval: flags & SET_INTERVAL != 0,
            timeout: flags & SET_TIMEOUT != 0,
            dynamic: flags & SET_EVAL != 0,
            counter,
            size: attrs
                .find(9)
                .and_then(|description| description.nested().find(1))
                .and_then(Attr::get_be32),
            comment: attrs
                .find(13)
                .and_then(|data| read_user_data(data.payload, UDATA_SET_COMMENT).0),
        },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn user_data_carries_comment_and_tag() {
        let mut writer = Writer::default();
        write_user_data(&mut writer, 7, Some("héllo"), Some(0x0102));
        let attr = Attrs(writer.as_slice()).next().unwrap();
        assert_eq!(
            read_user_data(attr.payload, UDATA_COMMENT),
            (Some("héllo".into()), Some(0x0102))
        );
    }

    #[test]
    fn adjacent_ranges_stay_apart() {
        let raw = |key: u8, is_end| RawElem {
            elem: Elem::new(Key::byte(key)),
            is_end,
        };
        let joined = join_ranges(vec![
            raw(20, true),
            raw(10, true),
            raw(10, false),
            raw(5, false),
            raw(250, false),
        ]);
        let wanted =
            [(5, 9), (10, 19), (250, 255)].map(|(a, b)| Elem::range(Key::byte(a), Key::byte(b)));
        assert_eq!(joined, wanted);
    }

    proptest! {
        #[test]
        fn disjoint_ranges_read_back_as_written(points in proptest::collection::btree_set(any::<u16>(), 2..40)) {
            let set = Set::interval("s", KeyType::one(super::super::DataType::InetService));
            let points: Vec<u16> = points.into_iter().collect();
            let ranges: Vec<Elem> =
                points.chunks_exact(2).map(|pair| Elem::range(Key::port(pair[0]), Key::port(pair[1]))).collect();
            let mut writer = Writer::default();
            for range in &ranges {
                write_elem(&mut writer, &set, range);
            }
            let raw = Attrs(writer.as_slice()).filter_map(read_elem).collect();
            prop_assert_eq!(join_ranges(raw), ranges);
        }
    }
}
