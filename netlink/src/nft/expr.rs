//! The expressions of rules, as plain values (`include/uapi/linux/netfilter/nf_tables.h`).
//!
//! Expressions read and write 4-byte registers; a 16-byte value takes four of them in a row.

use std::{sync::Arc, time::Duration};

use super::{Family, Key, Verdict};

/// A register: one of sixteen 4-byte words. Larger values start at a word and take the following ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reg(u8);

impl Reg {
    /// Words 0 to 3.
    pub const R1: Self = Self(0);
    /// Words 4 to 7.
    pub const R2: Self = Self(4);
    /// Words 8 to 11.
    pub const R3: Self = Self(8);
    /// Words 12 to 15.
    pub const R4: Self = Self(12);

    /// The word with this index, 0 to 15 (taken modulo 16).
    pub const fn word(index: u8) -> Self {
        Self(index % 16)
    }

    /// The kernel's number: `NFT_REG_1..4` on 16-byte bounds, `NFT_REG32_00..15` elsewhere, as the kernel dumps them.
    pub(crate) fn number(self) -> u32 {
        if self.0.is_multiple_of(4) {
            u32::from(self.0 / 4) + 1
        } else {
            u32::from(self.0) + 8
        }
    }

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        match number {
            1..=4 => Some(Self((number as u8 - 1) * 4)),
            8..=23 => Some(Self(number as u8 - 8)),
            _ => None,
        }
    }
}

macro_rules! numbered {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $number:expr,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum $name { $($(#[$inner])* $variant = $number,)* }

        impl $name {
            pub(crate) fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

numbered! {
    /// Packet metadata (`NFT_META_*`).
    Meta {
        /// Length of the packet.
        Len = 0,
        /// EtherType.
        Protocol = 1,
        /// Queueing priority.
        Priority = 2,
        /// Packet mark.
        Mark = 3,
        /// Input interface index.
        Iif = 4,
        /// Output interface index.
        Oif = 5,
        /// Input interface name.
        IifName = 6,
        /// Output interface name.
        OifName = 7,
        /// Uid of the sending socket.
        SkUid = 10,
        /// Trace flag.
        NfTrace = 12,
        /// Layer 3 family.
        NfProto = 15,
        /// Layer 4 protocol.
        L4Proto = 16,
        /// Unicast, broadcast, multicast.
        PktType = 19,
        /// Group of the input interface.
        IifGroup = 21,
        /// Group of the output interface.
        OifGroup = 22,
        /// Control group (v1 class id).
        Cgroup = 23,
        /// Kind of the input interface, as text.
        IifKind = 26,
        /// Kind of the output interface, as text.
        OifKind = 27,
    }
}

numbered! {
    /// Where a payload offset counts from.
    Base {
        /// Link layer header.
        Link = 0,
        /// Network header.
        Network = 1,
        /// Transport header.
        Transport = 2,
    }
}

numbered! {
    /// Comparison.
    CmpOp {
        /// Equal.
        Eq = 0,
        /// Not equal.
        Neq = 1,
        /// Less.
        Lt = 2,
        /// Less or equal.
        Lte = 3,
        /// Greater.
        Gt = 4,
        /// Greater or equal.
        Gte = 5,
    }
}

numbered! {
    /// What is known of the flow (`NFT_CT_*`).
    Ct {
        /// State bits, see [`ct_state`].
        State = 0,
        /// Original (0) or reply (1).
        Direction = 1,
        /// Status bits (`IPS_*`).
        Status = 2,
        /// Conntrack mark.
        Mark = 3,
        /// Layer 3 family.
        L3Proto = 7,
        /// Source address.
        Src = 8,
        /// Destination address.
        Dst = 9,
        /// Layer 4 protocol.
        Protocol = 10,
        /// Source port.
        ProtoSrc = 11,
        /// Destination port.
        ProtoDst = 12,
        /// Zone.
        Zone = 17,
        /// IPv4 source.
        SrcIp = 19,
        /// IPv4 destination.
        DstIp = 20,
        /// IPv6 source.
        SrcIp6 = 21,
        /// IPv6 destination.
        DstIp6 = 22,
        /// Id of the flow.
        Id = 23,
    }
}

/// Bits of [`Ct::State`].
pub mod ct_state {
    /// Does not belong to any flow.
    pub const INVALID: u32 = 1;
    /// Seen in both directions.
    pub const ESTABLISHED: u32 = 2;
    /// Belongs to another flow (ICMP errors, helpers).
    pub const RELATED: u32 = 4;
    /// First packet.
    pub const NEW: u32 = 8;
    /// Not tracked.
    pub const UNTRACKED: u32 = 64;
}

/// Bits of [`Ct::Status`] (`enum ip_conntrack_status`).
pub mod ct_status {
    /// Source was translated.
    pub const SNAT: u32 = 1 << 4;
    /// Destination was translated.
    pub const DNAT: u32 = 1 << 5;
}

numbered! {
    /// What a route lookup yields.
    FibResult {
        /// Output interface index; 0 when there is no route.
        Oif = 1,
        /// Output interface name.
        OifName = 2,
        /// Kind of address (`RTN_*`).
        AddrType = 3,
    }
}

/// What a route lookup goes by (`NFTA_FIB_F_*`); combine with `|`.
pub mod fib_flag {
    /// Look up the source address.
    pub const SADDR: u32 = 1;
    /// Look up the destination address.
    pub const DADDR: u32 = 2;
    /// With the packet mark.
    pub const MARK: u32 = 4;
    /// Only through the input interface.
    pub const IIF: u32 = 8;
    /// Only through the output interface.
    pub const OIF: u32 = 16;
    /// Yield only whether there is a route.
    pub const PRESENT: u32 = 32;
}

numbered! {
    /// Kind of translation.
    NatKind {
        /// Source.
        Snat = 0,
        /// Destination.
        Dnat = 1,
    }
}

/// Flags of translations (`NF_NAT_RANGE_*`).
pub mod nat_flag {
    /// Addresses are given.
    pub const MAP_IPS: u32 = 1;
    /// Ports are given.
    pub const PROTO_SPECIFIED: u32 = 2;
    /// Random port.
    pub const PROTO_RANDOM: u32 = 4;
    /// Same address for every flow of a client.
    pub const PERSISTENT: u32 = 8;
    /// Fully random port (`masquerade fully-random`).
    pub const PROTO_RANDOM_FULLY: u32 = 16;
}

numbered! {
    /// Route facts of a packet.
    Rt {
        /// Realm.
        ClassId = 0,
        /// IPv4 next hop.
        Nexthop4 = 1,
        /// IPv6 next hop.
        Nexthop6 = 2,
        /// MSS that fits the route's MTU.
        TcpMss = 3,
    }
}

numbered! {
    /// What [`Expr::Dynset`] does.
    DynsetOp {
        /// Add.
        Add = 0,
        /// Add, or start its life time again.
        Update = 1,
        /// Remove.
        Delete = 2,
    }
}

/// How a packet is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reject {
    /// ICMP or ICMPv6 unreachable with this code of the family's own numbering.
    Icmp(u8),
    /// TCP reset.
    TcpReset,
    /// Unreachable for both families (`NFT_REJECT_ICMPX_*`): 0 no route, 1 port, 2 host, 3 administratively prohibited.
    Icmpx(u8),
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expr {
    /// Loads metadata.
    Meta {
        /// Which.
        key: Meta,
        /// Into.
        dreg: Reg,
    },
    /// Sets metadata.
    MetaSet {
        /// Which.
        key: Meta,
        /// From.
        sreg: Reg,
    },
    /// Loads bytes of the packet.
    Payload {
        /// Counted from.
        base: Base,
        /// Offset in bytes.
        offset: u32,
        /// Bytes.
        len: u32,
        /// Into.
        dreg: Reg,
    },
    /// Writes bytes of the packet.
    PayloadSet {
        /// Counted from.
        base: Base,
        /// Offset in bytes.
        offset: u32,
        /// Bytes.
        len: u32,
        /// From.
        sreg: Reg,
        /// Where, counted from the same, the Internet checksum (RFC 1071) over these bytes stands, which is brought
        /// up to date; `None` where there is none.
        checksum: Option<u32>,
    },
    /// Compares; the rule ends unless it holds.
    Cmp {
        /// How.
        op: CmpOp,
        /// What.
        sreg: Reg,
        /// With.
        value: Key,
    },
    /// Ends the rule unless the value is in the range (or, negated, outside).
    Range {
        /// Outside instead of inside.
        negated: bool,
        /// What.
        sreg: Reg,
        /// First.
        from: Key,
        /// Last.
        to: Key,
    },
    /// `(value & mask) ^ xor`.
    Bitwise {
        /// From.
        sreg: Reg,
        /// Into.
        dreg: Reg,
        /// Mask; its length is the length of the value.
        mask: Key,
        /// Exclusive or; as long as the mask.
        xor: Key,
    },
    /// Changes the byte order between host and network.
    Byteorder {
        /// From.
        sreg: Reg,
        /// Into.
        dreg: Reg,
        /// Host to network, instead of network to host.
        to_network: bool,
        /// Bytes in all.
        len: u32,
        /// Bytes of one integer.
        size: u32,
    },
    /// Looks a key up in a set or map.
    Lookup {
        /// Set or map.
        set: Arc<str>,
        /// Key.
        sreg: Reg,
        /// Where a map's value goes; `None` for sets, and see [`Self::VerdictMap`].
        dreg: Option<Reg>,
        /// Ends the rule when the key is in it.
        negated: bool,
    },
    /// Looks a key up in a verdict map and does what it says.
    VerdictMap {
        /// Map.
        map: Arc<str>,
        /// Key.
        sreg: Reg,
    },
    /// Adds the key to a dynamic set, or removes it.
    Dynset {
        /// Set.
        set: Arc<str>,
        /// What to do.
        op: DynsetOp,
        /// Key.
        sreg: Reg,
        /// Life time of the element.
        timeout: Option<Duration>,
    },
    /// Loads a constant.
    Immediate {
        /// Into.
        dreg: Reg,
        /// What.
        value: Key,
    },
    /// A verdict.
    Verdict(Verdict),
    /// Counts.
    Counter {
        /// Packets so far.
        packets: u64,
        /// Bytes so far.
        bytes: u64,
    },
    /// Loads what is known of the flow.
    Ct {
        /// Which.
        key: Ct,
        /// `Some(true)`: of the original direction; `Some(false)`: of the reply direction.
        original: Option<bool>,
        /// Into.
        dreg: Reg,
    },
    /// Sets something of the flow.
    CtSet {
        /// Which.
        key: Ct,
        /// From.
        sreg: Reg,
    },
    /// Does not track the flow.
    Notrack,
    /// Hands the flow to this flowtable: its next packets take a short cut before routing and rules (hook forward only).
    FlowOffload(Arc<str>),
    /// Matches while there are no more than so many flows in this rule (`negated`: once there are more).
    ConnLimit {
        /// How many.
        count: u32,
        /// Over instead of under.
        over: bool,
    },
    /// Translates addresses or ports.
    Nat {
        /// Source or destination.
        kind: NatKind,
        /// Family of the address.
        family: Family,
        /// First and last address.
        addr: Option<(Reg, Reg)>,
        /// First and last port.
        port: Option<(Reg, Reg)>,
        /// [`nat_flag`] bits beyond those that addr and port imply.
        flags: u32,
    },
    /// Source becomes the address of the output device.
    Masquerade {
        /// First and last port.
        port: Option<(Reg, Reg)>,
        /// [`nat_flag`] bits beyond those that the ports imply.
        flags: u32,
    },
    /// Destination becomes this host.
    Redirect {
        /// First and last port.
        port: Option<(Reg, Reg)>,
    },
    /// Looks up a route.
    Fib {
        /// What it yields.
        result: FibResult,
        /// [`fib_flag`] bits.
        flags: u32,
        /// Into.
        dreg: Reg,
    },
    /// Loads route facts.
    Rt {
        /// Which.
        key: Rt,
        /// Into.
        dreg: Reg,
    },
    /// Holds while packets are within the rate.
    Limit {
        /// Packets (or bytes).
        rate: u64,
        /// Per.
        per: Duration,
        /// More at once.
        burst: u32,
        /// Bytes instead of packets.
        bytes: bool,
        /// Holds when beyond the rate.
        over: bool,
    },
    /// Sends a copy to user space.
    NfLog {
        /// Group.
        group: u16,
        /// Text in front, at most 127 bytes.
        prefix: String,
        /// Bytes of the packet; 0 for all.
        snaplen: u32,
    },
    /// Writes a line to the kernel's log.
    Log {
        /// Text in front, at most 127 bytes.
        prefix: String,
        /// Syslog level.
        level: u32,
    },
    /// Refuses the packet.
    Reject(Reject),
    /// Loads a TCP option's bytes.
    TcpOption {
        /// Kind (RFC 9293 §3.2; 2 is MSS).
        kind: u8,
        /// Offset in the option.
        offset: u32,
        /// Bytes.
        len: u32,
        /// Into.
        dreg: Reg,
    },
    /// Sets a TCP option's bytes (`tcp option maxseg size set`: only ever lowers the MSS).
    TcpOptionSet {
        /// Kind.
        kind: u8,
        /// Offset in the option.
        offset: u32,
        /// Bytes.
        len: u32,
        /// From.
        sreg: Reg,
    },
    /// An expression that this crate does not know, from somebody else's table, by its name; `target NAME` and
    /// `match NAME` are extensions of xtables.
    Other(String),
}
