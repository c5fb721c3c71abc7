//! Pieces of rules that every program needs: what is compared, and where it stands in a packet (IPv4 RFC 791 §3.1, IPv6 RFC 8200 §3).

use super::{Base, CmpOp, Expr, Key, Meta, Reg};

/// `NFPROTO_IPV4`, `NFPROTO_IPV6` (`include/uapi/linux/netfilter.h`).
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

/// Compares the first register with a value.
pub fn cmp(op: CmpOp, value: Key) -> Expr {
    Expr::Cmp {
        op,
        sreg: Reg::R1,
        value,
    }
}

/// `meta nfproto ipv4|ipv6`.
pub fn family(v4: bool) -> [Expr; 2] {
    let number = if v4 { NFPROTO_IPV4 } else { NFPROTO_IPV6 };
    [
        Expr::Meta {
            key: Meta::NfProto,
            dreg: Reg::R1,
        },
        cmp(CmpOp::Eq, Key::byte(number)),
    ]
}

/// Loads the packet's source or destination address.
pub fn load_address(source: bool, v4: bool, dreg: Reg) -> Expr {
    let (offset, len) = match (v4, source) {
        (true, true) => (12, 4),
        (true, false) => (16, 4),
        (false, true) => (8, 16),
        (false, false) => (24, 16),
    };
    Expr::Payload {
        base: Base::Network,
        offset,
        len,
        dreg,
    }
}
