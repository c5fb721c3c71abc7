//! Connection tracking entries: dump and deletion over ctnetlink
//! (`include/uapi/linux/netfilter/nfnetlink_conntrack.h`).

use std::{
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{errno::Errno, sys::socket::SockProtocol};

use crate::{
    NetNs,
    error::{Cause, Error, Result},
    rtnl::{AF_INET, AF_INET6},
    socket::Socket,
    wire::{Attr, Attrs, Message, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, Writer},
};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const CT_NEW: u16 = NFNL_SUBSYS_CTNETLINK << 8;
const CT_GET: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 1;
const CT_DELETE: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 2;
const CT_GET_STATS: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 5;
const NFGENMSG: usize = 4;
/// `CTA_STATS_GLOBAL_ENTRIES`: of the namespace, in spite of its name.
const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_TIMEOUT: u16 = 7;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_TUPLE_MASTER: u16 = 14;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
/// `CTA_FILTER_ORIG_FLAGS` and `CTA_FILTER_REPLY_FLAGS`: which fields of the tuple count.
const CTA_FILTER_FLAGS: [u16; 2] = [1, 2];
/// `CTA_FILTER_F_CTA_IP_SRC` of `nf_internals.h`, the same in every kernel that has `CTA_FILTER`.
const FILTER_SOURCE: u32 = 1;

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Layer 4 protocol.
    pub protocol: u8,
    /// Source port; the id for ICMP.
    pub source_port: u16,
    /// Destination port; type and code for ICMP.
    pub destination_port: u16,
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} port {} -> {} port {}",
            self.protocol, self.source, self.source_port, self.destination, self.destination_port
        )
    }
}

/// One tracked flow.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// As the first packet came.
    pub original: Tuple,
    /// As answers come; differs from the mirror of `original` when addresses are translated.
    pub reply: Tuple,
    /// `IPS_*` bits.
    pub status: u32,
    /// Conntrack mark.
    pub mark: u32,
    /// Zone.
    pub zone: u16,
    /// Seconds until it expires.
    pub timeout: u32,
    /// The kernel's id of the entry.
    pub id: u32,
    /// The flow that this one belongs to, where a helper expected it (the data connection of FTP).
    pub master: Option<Tuple>,
}

/// One end of a flow, as a filter that the kernel applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// Who sent the first packet.
    Originator(IpAddr),
    /// Who answers, after any translation of the destination.
    Responder(IpAddr),
}

impl Flow {
    /// The address is one of the four ends.
    pub fn involves(&self, address: IpAddr) -> bool {
        [
            self.original.source,
            self.original.destination,
            self.reply.source,
            self.reply.destination,
        ]
        .contains(&address)
    }

    /// Its destination was translated (`IPS_DST_NAT`).
    pub fn is_dnat(&self) -> bool {
        self.status & 0x20 != 0
    }

    /// Its source was translated (`IPS_SRC_NAT`).
    pub fn is_snat(&self) -> bool {
        self.status & 0x10 != 0
    }
}

/// A handle to the connection tracking of ONE namespace. Clones share the socket.
#[derive(Debug, Clone)]
pub struct Conntrack {
    socket: Arc<Mutex<Socket>>,
}

impl Conntrack {
    /// Opens the socket inside `netns`.
    pub fn open(netns: &NetNs) -> Result<Self> {
        let socket = netns.run(|| Socket::open(SockProtocol::NetlinkNetFilter))??;
        Ok(Self {
            socket: Arc::new(Mutex::new(socket)),
        })
    }

    /// How many flows there are. Costs nothing, whereas for a dump, filtered or not, the kernel walks the table of all
    /// namespaces: 10 ms where it has a quarter of a million buckets.
    pub fn count(&self) -> Result<u32> {
        let write = |writer: &mut Writer, sequence| {
            writer.begin(CT_GET_STATS, NLM_F_REQUEST, sequence);
            writer.raw(&[0; NFGENMSG]);
            writer.finish();
        };
        let read = |message: &Message<'_>| {
            if message.kind != CT_GET_STATS {
                return None;
            }
            Attrs::after(message.payload, NFGENMSG)
                .find(CTA_STATS_GLOBAL_ENTRIES)?
                .get_be32()
        };
        self.socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .query(write, read)
            .map_err(|cause| Error::new("count", "conntrack", cause))
    }

    /// All flows of both families.
    pub fn dump(&self) -> Result<Vec<Flow>> {
        let write = |writer: &mut Writer, sequence| {
            writer.begin(CT_GET, NLM_F_REQUEST | NLM_F_DUMP, sequence);
            writer.raw(&[0; NFGENMSG]);
            writer.finish();
        };
        self.socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .dump(write, read)
            .map_err(|cause| Error::new("dump", "conntrack", cause))
    }

    /// The flows that have this end. The kernel walks its whole table, but only these flows cross the socket.
    pub fn dump_end(&self, end: End) -> Result<Vec<Flow>> {
        let (tuple, flags, address) = match end {
            End::Originator(address) => (CTA_TUPLE_ORIG, CTA_FILTER_FLAGS[0], address),
            End::Responder(address) => (CTA_TUPLE_REPLY, CTA_FILTER_FLAGS[1], address),
        };
        let (family, source) = if address.is_ipv6() {
            (AF_INET6, 3)
        } else {
            (AF_INET, 1)
        };
        let write = |writer: &mut Writer, sequence| {
            writer.begin(CT_GET, NLM_F_REQUEST | NLM_F_DUMP, sequence);
            writer.raw(&[family, 0, 0, 0]);
            let nest = writer.nest(tuple);
            let addresses = writer.nest(1);
            writer.ip(source, address);
            writer.end(addresses);
            writer.end(nest);
            let filter = writer.nest(CTA_FILTER);
            writer.u32(flags, FILTER_SOURCE);
            writer.end(filter);
            writer.finish();
        };
        self.socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .dump(write, read)
            .map_err(|cause| Error::new("dump", format!("conntrack entries of {address}"), cause))
    }

    /// Removes every flow of the namespace.
    pub fn flush(&self) -> Result<()> {
        let result = self
            .socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .batch(1, |writer, _, sequence| {
                writer.begin(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, sequence);
                writer.raw(&[0; NFGENMSG]);
                writer.finish();
                Ok(())
            })
            .pop();
        match result {
            Some(Err(cause)) => Err(Error::new("flush", "conntrack", cause)),
            _ => Ok(()),
        }
    }

    /// Removes the flows for which `which` holds; says how many there were.
    ///
    /// Costs a dump of the whole table, where it has any flows: collect addresses and tuples, and call it once for all of
    /// them. An entry that has expired in between, or was replaced by a new flow with the same tuple, is not an error and not
    /// touched.
    pub fn delete_matching(&self, which: impl Fn(&Flow) -> bool) -> Result<usize> {
        if self.count()? == 0 {
            return Ok(0);
        }
        let flows: Vec<Flow> = self
            .dump()?
            .into_iter()
            .filter(|flow| which(flow))
            .collect();
        let results = self.delete_all(&flows);
        let mut deleted = 0;
        for result in results {
            match result {
                Ok(()) => deleted += 1,
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(deleted)
    }

    /// Removes every flow of these addresses: they have left their endpoint, and the next one must not inherit.
    pub fn delete_addresses(&self, addresses: &[IpAddr]) -> Result<usize> {
        self.delete_matching(|flow| addresses.iter().any(|address| flow.involves(*address)))
    }

    /// Removes these very flows; one result each. One that is gone already is reported as not found.
    pub fn delete_all(&self, flows: &[Flow]) -> Vec<Result<()>> {
        let results = self
            .socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .batch(flows.len(), |writer, index, sequence| {
                let flow = &flows[index];
                begin_delete(writer, &flow.original, sequence)?;
                writer.be32(CTA_ID, flow.id);
                if flow.zone != 0 {
                    writer.be16(CTA_ZONE, flow.zone);
                }
                writer.finish();
                Ok(())
            });
        results
            .into_iter()
            .zip(flows)
            .map(|(result, flow)| {
                result.map_err(|cause| {
                    Error::new(
                        "delete",
                        format!("conntrack entry {}", flow.original),
                        cause,
                    )
                })
            })
            .collect()
    }

    /// Removes the flow with this original tuple, in zone 0; says whether there was one.
    pub fn delete_tuple(&self, tuple: &Tuple) -> Result<bool> {
        let result = self
            .socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .batch(1, |writer, _, sequence| {
                begin_delete(writer, tuple, sequence)?;
                writer.finish();
                Ok(())
            })
            .pop();
        match result {
            Some(Ok(())) => Ok(true),
            Some(Err(Cause::Kernel {
                errno: Errno::ENOENT,
                ..
            })) => Ok(false),
            Some(Err(cause)) => Err(Error::new(
                "delete",
                format!("conntrack entry {tuple}"),
                cause,
            )),
            None => Ok(false),
        }
    }
}

fn begin_delete(
    writer: &mut Writer,
    tuple: &Tuple,
    sequence: u32,
) -> std::result::Result<(), Cause> {
    if tuple.source.is_ipv6() != tuple.destination.is_ipv6() {
        return Err(Cause::Invalid("the ends are of different families".into()));
    }
    writer.begin(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, sequence);
    writer.raw(&[
        if tuple.source.is_ipv6() {
            AF_INET6
        } else {
            AF_INET
        },
        0,
        0,
        0,
    ]);
    write_tuple(writer, tuple);
    Ok(())
}

fn write_tuple(writer: &mut Writer, tuple: &Tuple) {
    let nest = writer.nest(CTA_TUPLE_ORIG);
    let addresses = writer.nest(1);
    let (source, destination) = if tuple.source.is_ipv6() {
        (3, 4)
    } else {
        (1, 2)
    };
    writer.ip(source, tuple.source);
    writer.ip(destination, tuple.destination);
    writer.end(addresses);
    let ports = writer.nest(2);
    writer.u8(1, tuple.protocol);
    match icmp_attributes(tuple.protocol) {
        Some((id, kind, code)) => {
            writer.be16(id, tuple.source_port);
            let [high, low] = tuple.destination_port.to_be_bytes();
            writer.u8(kind, high);
            writer.u8(code, low);
        }
        None => {
            writer.be16(2, tuple.source_port);
            writer.be16(3, tuple.destination_port);
        }
    }
    writer.end(ports);
    writer.end(nest);
}

/// Attributes of id, type and code: `CTA_PROTO_ICMP_*`, `CTA_PROTO_ICMPV6_*`.
fn icmp_attributes(protocol: u8) -> Option<(u16, u16, u16)> {
    match protocol {
        1 => Some((4, 5, 6)),
        58 => Some((7, 8, 9)),
        _ => None,
    }
}

fn read_tuple(attr: Attr<'_>) -> Option<Tuple> {
    let addresses = attr.nested().find(1)?.nested();
    let ports = attr.nested().find(2)?.nested();
    let protocol = ports.find(1)?.get_u8()?;
    let number = |kind| ports.find(kind).and_then(Attr::get_be16).unwrap_or(0);
    let byte = |kind| ports.find(kind).and_then(Attr::get_u8).unwrap_or(0);
    let (source_port, destination_port) = match icmp_attributes(protocol) {
        Some((id, kind, code)) => (number(id), u16::from_be_bytes([byte(kind), byte(code)])),
        None => (number(2), number(3)),
    };
    Some(Tuple {
        source: addresses.find(1).or_else(|| addresses.find(3))?.get_ip()?,
        destination: addresses.find(2).or_else(|| addresses.find(4))?.get_ip()?,
        protocol,
        source_port,
        destination_port,
    })
}

fn read(message: &Message<'_>) -> Option<Flow> {
    if message.kind != CT_NEW {
        return None;
    }
    let attrs = Attrs::after(message.payload, NFGENMSG);
    let number = |kind| attrs.find(kind).and_then(Attr::get_be32).unwrap_or(0);
    Some(Flow {
        original: read_tuple(attrs.find(CTA_TUPLE_ORIG)?)?,
        reply: read_tuple(attrs.find(CTA_TUPLE_REPLY)?)?,
        status: number(CTA_STATUS),
        mark: number(CTA_MARK),
        zone: attrs.find(CTA_ZONE).and_then(Attr::get_be16).unwrap_or(0),
        timeout: number(CTA_TIMEOUT),
        id: number(CTA_ID),
        master: attrs.find(CTA_TUPLE_MASTER).and_then(read_tuple),
    })
}
