//! Expressions as attributes. All integers are big-endian.

use std::{sync::Arc, time::Duration};

use super::{
    Base, CmpOp, Ct, DynsetOp, Expr, Family, FibResult, Key, Meta, NatKind, Reg, Reject, Rt,
    Verdict, nat_flag,
};
use crate::wire::{Attr, Attrs, Writer};

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NFT_REG_VERDICT: u32 = 0;
const EXTHDR_OP_TCPOPT: u32 = 1;

/// A nested attribute `kind` that holds a value.
pub(crate) fn write_value(writer: &mut Writer, kind: u16, value: &Key) {
    let nest = writer.nest(kind);
    writer.attr(NFTA_DATA_VALUE, &value.0);
    writer.end(nest);
}

/// A nested attribute `kind` that holds a verdict.
pub(crate) fn write_verdict(writer: &mut Writer, kind: u16, verdict: &Verdict) {
    let nest = writer.nest(kind);
    let inner = writer.nest(NFTA_DATA_VERDICT);
    let code: i32 = match verdict {
        Verdict::Drop => 0,
        Verdict::Accept => 1,
        // The queue number is in the upper half (`NF_QUEUE_NR`).
        Verdict::Queue(number) => i32::from(*number) << 16 | 3,
        Verdict::Continue => -1,
        Verdict::Jump(_) => -3,
        Verdict::Goto(_) => -4,
        Verdict::Return => -5,
    };
    writer.be32(NFTA_VERDICT_CODE, code as u32);
    if let Verdict::Jump(chain) | Verdict::Goto(chain) = verdict {
        writer.text(NFTA_VERDICT_CHAIN, chain);
    }
    writer.end(inner);
    writer.end(nest);
}

/// The value in a data attribute.
pub(crate) fn read_value(attr: Attr<'_>) -> Option<Key> {
    attr.nested()
        .find(NFTA_DATA_VALUE)
        .map(|value| Key::bytes(value.payload))
}

/// The verdict in a data attribute.
pub(crate) fn read_verdict(attr: Attr<'_>) -> Option<Verdict> {
    let inner = attr.nested().find(NFTA_DATA_VERDICT)?.nested();
    let code = inner.find(NFTA_VERDICT_CODE)?.get_be32()? as i32;
    let chain = || {
        inner
            .find(NFTA_VERDICT_CHAIN)
            .map(|name| Arc::from(name.get_text()))
    };
    Some(match code {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        -1 => Verdict::Continue,
        -3 => Verdict::Jump(chain()?),
        -4 => Verdict::Goto(chain()?),
        -5 => Verdict::Return,
        queue if queue & 0xff == 3 => Verdict::Queue((queue >> 16) as u16),
        _ => return None,
    })
}

/// The list of a rule's expressions.
pub(crate) fn write_list(writer: &mut Writer, kind: u16, exprs: &[Expr]) {
    let list = writer.nest(kind);
    for expr in exprs {
        let elem = writer.nest(NFTA_LIST_ELEM);
        write_expr(writer, expr);
        writer.end(elem);
    }
    writer.end(list);
}

/// The list of a rule's expressions.
pub(crate) fn read_list(attr: Attr<'_>) -> Vec<Expr> {
    attr.nested().map(|elem| read_expr(elem.nested())).collect()
}

fn name(expr: &Expr) -> &str {
    match expr {
        Expr::Meta { .. } | Expr::MetaSet { .. } => "meta",
        Expr::Payload { .. } | Expr::PayloadSet { .. } => "payload",
        Expr::Cmp { .. } => "cmp",
        Expr::Range { .. } => "range",
        Expr::Bitwise { .. } => "bitwise",
        Expr::Byteorder { .. } => "byteorder",
        Expr::Lookup { .. } | Expr::VerdictMap { .. } => "lookup",
        Expr::Dynset { .. } => "dynset",
        Expr::Immediate { .. } | Expr::Verdict(_) => "immediate",
        Expr::Counter { .. } => "counter",
        Expr::Ct { .. } | Expr::CtSet { .. } => "ct",
        Expr::Notrack => "notrack",
        Expr::FlowOffload(_) => "flow_offload",
        Expr::ConnLimit { .. } => "connlimit",
        Expr::Nat { .. } => "nat",
        Expr::Masquerade { .. } => "masq",
        Expr::Redirect { .. } => "redir",
        Expr::Fib { .. } => "fib",
        Expr::Rt { .. } => "rt",
        Expr::Limit { .. } => "limit",
        Expr::NfLog { .. } | Expr::Log { .. } => "log",
        Expr::Reject(_) => "reject",
        Expr::TcpOption { .. } | Expr::TcpOptionSet { .. } => "exthdr",
        Expr::Other(name) => name,
    }
}

/// Name and data of one expression, without an attribute around them.
pub(crate) fn write_expr(writer: &mut Writer, expr: &Expr) {
    writer.text(NFTA_EXPR_NAME, name(expr));
    let data = writer.nest(NFTA_EXPR_DATA);
    match expr {
        Expr::Cmp { .. } | Expr::Range { .. } | Expr::Bitwise { .. } | Expr::Byteorder { .. } => {
            write_arithmetic(writer, expr);
        }
        Expr::Lookup { .. } | Expr::VerdictMap { .. } | Expr::Dynset { .. } => {
            write_set_use(writer, expr)
        }
        Expr::Nat { .. } | Expr::Masquerade { .. } | Expr::Redirect { .. } => {
            write_nat(writer, expr)
        }
        Expr::Meta { key, dreg } => {
            writer.be32(2, *key as u32);
            writer.be32(1, dreg.number());
        }
        Expr::MetaSet { key, sreg } => {
            writer.be32(2, *key as u32);
            writer.be32(3, sreg.number());
        }
        Expr::Payload {
            base,
            offset,
            len,
            dreg,
        } => {
            writer.be32(1, dreg.number());
            writer.be32(2, *base as u32);
            writer.be32(3, *offset);
            writer.be32(4, *len);
        }
        Expr::PayloadSet {
            base,
            offset,
            len,
            sreg,
            checksum,
        } => {
            writer.be32(2, *base as u32);
            writer.be32(3, *offset);
            writer.be32(4, *len);
            writer.be32(5, sreg.number());
            // NFT_PAYLOAD_CSUM_INET or _NONE
            writer.be32(6, u32::from(checksum.is_some()));
            writer.be32(7, checksum.unwrap_or(0));
        }
        Expr::Immediate { dreg, value } => {
            writer.be32(1, dreg.number());
            write_value(writer, 2, value);
        }
        Expr::Verdict(verdict) => {
            writer.be32(1, NFT_REG_VERDICT);
            write_verdict(writer, 2, verdict);
        }
        Expr::Counter { packets, bytes } => {
            writer.be64(1, *bytes);
            writer.be64(2, *packets);
        }
        Expr::Ct {
            key,
            original,
            dreg,
        } => {
            writer.be32(1, dreg.number());
            writer.be32(2, *key as u32);
            if let Some(original) = original {
                writer.u8(3, u8::from(!original));
            }
        }
        Expr::CtSet { key, sreg } => {
            writer.be32(2, *key as u32);
            writer.be32(4, sreg.number());
        }
        Expr::ConnLimit { count, over } => {
            writer.be32(1, *count);
            writer.be32(2, u32::from(*over));
        }
        Expr::Fib {
            result,
            flags,
            dreg,
        } => {
            writer.be32(1, dreg.number());
            writer.be32(2, *result as u32);
            writer.be32(3, *flags);
        }
        Expr::Rt { key, dreg } => {
            writer.be32(1, dreg.number());
            writer.be32(2, *key as u32);
        }
        Expr::Limit {
            rate,
            per,
            burst,
            bytes,
            over,
        } => {
            writer.be64(1, *rate);
            writer.be64(2, per.as_secs().max(1));
            writer.be32(3, *burst);
            writer.be32(4, u32::from(*bytes));
            writer.be32(5, u32::from(*over));
        }
        Expr::NfLog {
            group,
            prefix,
            snaplen,
        } => {
            writer.be16(1, *group);
            if !prefix.is_empty() {
                writer.text(2, prefix);
            }
            if *snaplen != 0 {
                writer.be32(3, *snaplen);
            }
        }
        Expr::Log { prefix, level } => {
            if !prefix.is_empty() {
                writer.text(2, prefix);
            }
            writer.be32(5, *level);
        }
        Expr::Reject(how) => {
            let (kind, code) = match how {
                Reject::Icmp(code) => (0, *code),
                Reject::TcpReset => (1, 0),
                Reject::Icmpx(code) => (2, *code),
            };
            writer.be32(1, kind);
            writer.u8(2, code);
        }
        Expr::TcpOption {
            kind,
            offset,
            len,
            dreg,
        } => {
            writer.be32(1, dreg.number());
            writer.u8(2, *kind);
            writer.be32(3, *offset);
            writer.be32(4, *len);
            writer.be32(6, EXTHDR_OP_TCPOPT);
        }
        Expr::TcpOptionSet {
            kind,
            offset,
            len,
            sreg,
        } => {
            writer.be32(7, sreg.number());
            writer.u8(2, *kind);
            writer.be32(3, *offset);
            writer.be32(4, *len);
            writer.be32(6, EXTHDR_OP_TCPOPT);
        }
        Expr::FlowOffload(table) => writer.text(1, table),
        Expr::Notrack | Expr::Other(_) => {}
    }
    writer.end(data);
}

fn write_arithmetic(writer: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Cmp { op, sreg, value } => {
            writer.be32(1, sreg.number());
            writer.be32(2, *op as u32);
            write_value(writer, 3, value);
        }
        Expr::Range {
            negated,
            sreg,
            from,
            to,
        } => {
            writer.be32(1, sreg.number());
            writer.be32(2, u32::from(*negated));
            write_value(writer, 3, from);
            write_value(writer, 4, to);
        }
        Expr::Bitwise {
            sreg,
            dreg,
            mask,
            xor,
        } => {
            writer.be32(1, sreg.number());
            writer.be32(2, dreg.number());
            writer.be32(3, mask.0.len() as u32);
            write_value(writer, 4, mask);
            write_value(writer, 5, xor);
        }
        Expr::Byteorder {
            sreg,
            dreg,
            to_network,
            len,
            size,
        } => {
            writer.be32(1, sreg.number());
            writer.be32(2, dreg.number());
            writer.be32(3, u32::from(*to_network));
            writer.be32(4, *len);
            writer.be32(5, *size);
        }
        _ => {}
    }
}

fn write_set_use(writer: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Lookup {
            set,
            sreg,
            dreg,
            negated,
        } => {
            writer.text(1, set);
            writer.be32(2, sreg.number());
            if let Some(dreg) = dreg {
                writer.be32(3, dreg.number());
            }
            if *negated {
                writer.be32(5, 1);
            }
        }
        Expr::VerdictMap { map, sreg } => {
            writer.text(1, map);
            writer.be32(2, sreg.number());
            writer.be32(3, NFT_REG_VERDICT);
        }
        Expr::Dynset {
            set,
            op,
            sreg,
            timeout,
        } => {
            writer.text(1, set);
            writer.be32(3, *op as u32);
            writer.be32(4, sreg.number());
            if let Some(timeout) = timeout {
                writer.be64(6, timeout.as_millis() as u64);
            }
        }
        _ => {}
    }
}

fn write_nat(writer: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Nat {
            kind,
            family,
            addr,
            port,
            flags,
        } => {
            writer.be32(1, *kind as u32);
            writer.be32(2, *family as u32);
            let mut all = *flags;
            if let Some((first, last)) = addr {
                writer.be32(3, first.number());
                writer.be32(4, last.number());
                all |= nat_flag::MAP_IPS;
            }
            if let Some((first, last)) = port {
                writer.be32(5, first.number());
                writer.be32(6, last.number());
                all |= nat_flag::PROTO_SPECIFIED;
            }
            if all & !(nat_flag::MAP_IPS | nat_flag::PROTO_SPECIFIED) != 0 {
                writer.be32(7, all);
            }
        }
        Expr::Masquerade { port, flags } => {
            let specified = port.map_or(0, |_| nat_flag::PROTO_SPECIFIED);
            if flags | specified != 0 {
                writer.be32(1, flags | specified);
            }
            if let Some((first, last)) = port {
                writer.be32(2, first.number());
                writer.be32(3, last.number());
            }
        }
        Expr::Redirect {
            port: Some((first, last)),
        } => {
            writer.be32(1, first.number());
            writer.be32(2, last.number());
            writer.be32(3, nat_flag::PROTO_SPECIFIED);
        }
        _ => {}
    }
}

/// Typed access to the attributes of one expression.
#[derive(Clone, Copy)]
struct Fields<'a>(Attrs<'a>);

impl Fields<'_> {
    fn number(self, kind: u16) -> Option<u32> {
        self.0.find(kind)?.get_be32()
    }

    fn reg(self, kind: u16) -> Option<Reg> {
        Reg::from_number(self.number(kind)?)
    }

    fn regs(self, first: u16, last: u16) -> Option<(Reg, Reg)> {
        let low = self.reg(first)?;
        Some((low, self.reg(last).unwrap_or(low)))
    }

    fn value(self, kind: u16) -> Option<Key> {
        read_value(self.0.find(kind)?)
    }

    fn text(self, kind: u16) -> Option<Arc<str>> {
        self.0.find(kind).map(|attr| Arc::from(attr.get_text()))
    }
}

/// Decodes one expression; what is not understood becomes [`Expr::Other`].
pub(crate) fn read_expr(attrs: Attrs<'_>) -> Expr {
    let name = attrs
        .find(NFTA_EXPR_NAME)
        .map(Attr::get_text)
        .unwrap_or_default();
    let fields = Fields(attrs.find(NFTA_EXPR_DATA).map_or(Attrs(&[]), Attr::nested));
    let known = match name.as_str() {
        "meta" | "payload" | "immediate" | "counter" | "ct" | "fib" | "rt" => {
            read_load(&name, fields)
        }
        "cmp" | "range" | "bitwise" | "byteorder" => read_arithmetic(&name, fields),
        "lookup" | "dynset" => read_set_use(&name, fields),
        "nat" | "masq" | "redir" => read_nat(&name, fields),
        _ => read_statement(&name, fields),
    };
    known.unwrap_or_else(|| match name.as_str() {
        // `NFTA_TARGET_NAME`, `NFTA_MATCH_NAME`: an extension of xtables, in a rule of iptables-nft.
        "target" | "match" => Expr::Other(match fields.text(1) {
            Some(extension) => format!("{name} {extension}"),
            None => name,
        }),
        _ => Expr::Other(name),
    })
}

fn read_load(name: &str, f: Fields<'_>) -> Option<Expr> {
    Some(match name {
        "meta" => {
            let key = Meta::from_number(f.number(2)?)?;
            match f.reg(3) {
                Some(sreg) => Expr::MetaSet { key, sreg },
                None => Expr::Meta {
                    key,
                    dreg: f.reg(1)?,
                },
            }
        }
        "payload" => {
            let (base, offset, len) =
                (Base::from_number(f.number(2)?)?, f.number(3)?, f.number(4)?);
            match f.reg(5) {
                Some(sreg) => Expr::PayloadSet {
                    base,
                    offset,
                    len,
                    sreg,
                    checksum: match f.number(6).unwrap_or(0) {
                        0 => None,
                        _ => Some(f.number(7)?),
                    },
                },
                None => Expr::Payload {
                    base,
                    offset,
                    len,
                    dreg: f.reg(1)?,
                },
            }
        }
        "immediate" if f.number(1)? == NFT_REG_VERDICT => {
            Expr::Verdict(read_verdict(f.0.find(2)?)?)
        }
        "immediate" => Expr::Immediate {
            dreg: f.reg(1)?,
            value: f.value(2)?,
        },
        "counter" => Expr::Counter {
            bytes: f.0.find(1)?.get_be64()?,
            packets: f.0.find(2)?.get_be64()?,
        },
        "ct" => {
            let key = Ct::from_number(f.number(2)?)?;
            match f.reg(4) {
                Some(sreg) => Expr::CtSet { key, sreg },
                None => {
                    let original =
                        f.0.find(3)
                            .and_then(Attr::get_u8)
                            .map(|direction| direction == 0);
                    Expr::Ct {
                        key,
                        original,
                        dreg: f.reg(1)?,
                    }
                }
            }
        }
        "fib" => Expr::Fib {
            result: FibResult::from_number(f.number(2)?)?,
            flags: f.number(3).unwrap_or(0),
            dreg: f.reg(1)?,
        },
        _ => Expr::Rt {
            key: Rt::from_number(f.number(2)?)?,
            dreg: f.reg(1)?,
        },
    })
}

fn read_arithmetic(name: &str, f: Fields<'_>) -> Option<Expr> {
    Some(match name {
        "cmp" => Expr::Cmp {
            op: CmpOp::from_number(f.number(2)?)?,
            sreg: f.reg(1)?,
            value: f.value(3)?,
        },
        "range" => Expr::Range {
            negated: f.number(2)? != 0,
            sreg: f.reg(1)?,
            from: f.value(3)?,
            to: f.value(4)?,
        },
        // Attribute 6 is the operation; only 0 (mask and xor) is ours, the others are shifts.
        "bitwise" if f.number(6).unwrap_or(0) == 0 => Expr::Bitwise {
            sreg: f.reg(1)?,
            dreg: f.reg(2)?,
            mask: f.value(4)?,
            xor: f.value(5)?,
        },
        "byteorder" => Expr::Byteorder {
            sreg: f.reg(1)?,
            dreg: f.reg(2)?,
            to_network: f.number(3)? != 0,
            len: f.number(4)?,
            size: f.number(5)?,
        },
        _ => return None,
    })
}

fn read_set_use(name: &str, f: Fields<'_>) -> Option<Expr> {
    Some(match name {
        "lookup" if f.number(3) == Some(NFT_REG_VERDICT) => Expr::VerdictMap {
            map: f.text(1)?,
            sreg: f.reg(2)?,
        },
        "lookup" => Expr::Lookup {
            set: f.text(1)?,
            sreg: f.reg(2)?,
            dreg: f.reg(3),
            negated: f.number(5).unwrap_or(0) & 1 != 0,
        },
        _ => Expr::Dynset {
            set: f.text(1)?,
            op: DynsetOp::from_number(f.number(3)?)?,
            sreg: f.reg(4)?,
            timeout: f
                .0
                .find(6)
                .and_then(Attr::get_be64)
                .filter(|ms| *ms != 0)
                .map(Duration::from_millis),
        },
    })
}

fn read_nat(name: &str, f: Fields<'_>) -> Option<Expr> {
    Some(match name {
        "nat" => Expr::Nat {
            kind: NatKind::from_number(f.number(1)?)?,
            family: Family::from_number(f.number(2)? as u8)?,
            addr: f.regs(3, 4),
            port: f.regs(5, 6),
            flags: f.number(7).unwrap_or(0) & !(nat_flag::MAP_IPS | nat_flag::PROTO_SPECIFIED),
        },
        "masq" => Expr::Masquerade {
            port: f.regs(2, 3),
            flags: f.number(1).unwrap_or(0) & !nat_flag::PROTO_SPECIFIED,
        },
        _ => Expr::Redirect { port: f.regs(1, 2) },
    })
}

fn read_statement(name: &str, f: Fields<'_>) -> Option<Expr> {
    Some(match name {
        "notrack" => Expr::Notrack,
        "flow_offload" => Expr::FlowOffload(f.text(1)?),
        "connlimit" => Expr::ConnLimit {
            count: f.number(1)?,
            over: f.number(2).unwrap_or(0) & 1 != 0,
        },
        "limit" => Expr::Limit {
            rate: f.0.find(1)?.get_be64()?,
            per: Duration::from_secs(f.0.find(2)?.get_be64()?),
            burst: f.number(3).unwrap_or(0),
            bytes: f.number(4).unwrap_or(0) == 1,
            over: f.number(5).unwrap_or(0) & 1 != 0,
        },
        "log" => {
            let prefix = f.0.find(2).map(Attr::get_text).unwrap_or_default();
            match f.0.find(1) {
                Some(group) => Expr::NfLog {
                    group: group.get_be16()?,
                    prefix,
                    snaplen: f.number(3).unwrap_or(0),
                },
                None => Expr::Log {
                    prefix,
                    level: f.number(5)?,
                },
            }
        }
        "reject" => {
            let code = f.0.find(2).and_then(Attr::get_u8).unwrap_or(0);
            Expr::Reject(match f.number(1)? {
                0 => Reject::Icmp(code),
                1 => Reject::TcpReset,
                2 => Reject::Icmpx(code),
                _ => return None,
            })
        }
        "exthdr" if f.number(6) == Some(EXTHDR_OP_TCPOPT) => {
            let (kind, offset, len) = (f.0.find(2)?.get_u8()?, f.number(3)?, f.number(4)?);
            match f.reg(7) {
                Some(sreg) => Expr::TcpOptionSet {
                    kind,
                    offset,
                    len,
                    sreg,
                },
                None => Expr::TcpOption {
                    kind,
                    offset,
                    len,
                    dreg: f.reg(1)?,
                },
            }
        }
        _ => return None,
    })
}
