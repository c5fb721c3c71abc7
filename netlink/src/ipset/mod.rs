//! IP sets of the `ip_set` subsystem, which iptables rules look up (`include/uapi/linux/netfilter/ipset/ip_set.h`).
//!
//! [`IpSets`] makes, fills, reads, swaps and destroys the sets of one namespace, each change of members in as few
//! messages as possible. Adding what is there and deleting what is not are no errors, so that a change can be repeated.
//! The subsystem tells nobody of changes: who wants to know reads the sets again.

mod message;

use std::{
    collections::BTreeSet,
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{errno::Errno, sys::socket::SockProtocol};

use crate::{
    NetNs,
    error::{Cause, Error, Result},
    socket::Socket,
    wire::Writer,
};

/// Longest name of a set (`IPSET_MAXNAMELEN` without its NUL).
pub const NAME_LIMIT: usize = 31;
/// Members in one message: the largest member takes 60 bytes, and attributes end at 64 KiB.
const MEMBERS: usize = 500;

/// What a set's members are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetType {
    /// Single addresses: `hash:ip`.
    Ip,
    /// Networks, of which the most specific one decides: `hash:net`.
    Net,
    /// Address, protocol and port: `hash:ip,port`.
    IpPort,
    /// Address, protocol and port, and another address: `hash:ip,port,ip`.
    IpPortIp,
}

impl SetType {
    /// The kernel's name of the type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ip => "hash:ip",
            Self::Net => "hash:net",
            Self::IpPort => "hash:ip,port",
            Self::IpPortIp => "hash:ip,port,ip",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Ip, Self::Net, Self::IpPort, Self::IpPortIp]
            .into_iter()
            .find(|kind| kind.name() == name)
    }

    /// The revision that is asked for: every `ipset` program since 2013 can list it.
    const fn revision(self) -> u8 {
        match self {
            Self::Ip => 4,
            Self::Net => 6,
            Self::IpPort | Self::IpPortIp => 5,
        }
    }
}

impl fmt::Display for SetType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set without its members.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpSet {
    /// Its name, at most [`NAME_LIMIT`] bytes.
    pub name: Arc<str>,
    /// Its type; `None` for types that are not ours to make, which are only listed.
    pub kind: Option<SetType>,
    /// Whether its addresses are IPv6.
    pub v6: bool,
    /// Most members.
    pub max: u32,
    /// Seconds after which a member goes by itself, where nothing else is said of it.
    pub timeout: Option<u32>,
}

/// A member of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetMember {
    /// A network; in a set of single addresses the prefix is the address' whole length. Never of length 0, which the
    /// kernel cannot hold: two halves say the same.
    Net(IpAddr, u8),
    /// An address, a protocol and a port.
    Port(IpAddr, u8, u16),
    /// An address, a protocol and a port, and another address of the same family.
    PortBetween(IpAddr, u8, u16, IpAddr),
}

impl SetMember {
    /// A single address.
    #[must_use]
    pub const fn address(address: IpAddr) -> Self {
        Self::Net(address, if address.is_ipv4() { 32 } else { 128 })
    }
}

/// A set as it is in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedIpSet {
    /// The set.
    pub set: IpSet,
    /// How many rules and list sets refer to it.
    pub references: u32,
    /// Its members.
    pub members: BTreeSet<SetMember>,
}

/// A handle to the IP sets of ONE namespace. Clones share the socket.
#[derive(Debug, Clone)]
pub struct IpSets {
    socket: Arc<Mutex<Socket>>,
    protocol: u8,
}

impl IpSets {
    /// Opens the socket inside `netns` and agrees on the protocol's version.
    ///
    /// # Errors
    /// The kernel has no `ip_set`, or speaks no version that is known here.
    pub fn open(netns: &NetNs) -> Result<Self> {
        let mut socket = netns.run(|| Socket::open(SockProtocol::NetlinkNetFilter))??;
        let protocol =
            message::agree(&mut socket).map_err(|cause| Error::new("open", "IP sets", cause))?;
        Ok(Self {
            socket: Arc::new(Mutex::new(socket)),
            protocol,
        })
    }

    fn socket(&self) -> MutexGuard<'_, Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sets whose names begin with `prefix`, with their members.
    pub fn list(&self, prefix: &str) -> Result<Vec<ListedIpSet>> {
        let protocol = self.protocol;
        let parts = self
            .socket()
            .dump(
                |writer, sequence| message::write_list(writer, sequence, protocol, None, 0),
                message::read_part,
            )
            .map_err(|cause| Error::new("list", "IP sets", cause))?;
        Ok(message::join(parts, prefix))
    }

    /// The names of all sets that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<BTreeSet<Arc<str>>> {
        let protocol = self.protocol;
        let names = self
            .socket()
            .dump(
                |writer, sequence| {
                    message::write_list(writer, sequence, protocol, None, message::ONLY_NAMES);
                },
                message::read_name,
            )
            .map_err(|cause| Error::new("list", "IP sets", cause))?;
        Ok(names
            .into_iter()
            .filter(|name| name.starts_with(prefix))
            .collect())
    }

    /// One set with its members; `None` if there is none of this name.
    pub fn get(&self, name: &str) -> Result<Option<ListedIpSet>> {
        let protocol = self.protocol;
        let parts = self.socket().dump(
            |writer, sequence| message::write_list(writer, sequence, protocol, Some(name), 0),
            message::read_part,
        );
        match parts {
            Ok(parts) => Ok(message::join(parts, name).pop()),
            Err(Cause::Kernel {
                errno: Errno::ENOENT,
                ..
            }) => Ok(None),
            Err(cause) => Err(Error::new("list", format!("IP set {name}"), cause)),
        }
    }

    /// Makes a set. One that is there already with the same type and size is no error.
    ///
    /// # Errors
    /// A set of the name has another type or size, or the kernel does not know the type.
    pub fn create(&self, set: &IpSet) -> Result<()> {
        let fail = |cause| Error::new("create", format!("IP set {}", set.name), cause);
        if set.name.is_empty() || set.name.len() > NAME_LIMIT {
            let why = format!(
                "the name has {} bytes, the most is {NAME_LIMIT}",
                set.name.len()
            );
            return Err(fail(Cause::Invalid(why)));
        }
        let kind = set
            .kind
            .ok_or_else(|| fail(Cause::Invalid("the type is not known".into())))?;
        let mut socket = self.socket();
        let revision = message::revision(&mut socket, self.protocol, kind, set.v6).map_err(fail)?;
        let write = |writer: &mut Writer, _, sequence| {
            message::write_create(writer, sequence, self.protocol, set, kind, revision);
            Ok(())
        };
        one(socket.batch(1, write)).map_err(fail)
    }

    /// Adds and then deletes members of one set, in that order only if the two lists are disjoint.
    ///
    /// Returns at the first message that the kernel refuses; the members of later messages are then not changed.
    pub fn change(&self, name: &str, deleted: &[SetMember], added: &[SetMember]) -> Result<()> {
        for (members, add) in [(deleted, false), (added, true)] {
            let chunks: Vec<&[SetMember]> = members.chunks(MEMBERS).collect();
            let results = self
                .socket()
                .batch(chunks.len(), |writer, index, sequence| {
                    message::write_members(
                        writer,
                        sequence,
                        self.protocol,
                        name,
                        chunks[index],
                        add,
                    );
                    Ok(())
                });
            let operation = if add {
                "add members to"
            } else {
                "delete members of"
            };
            results
                .into_iter()
                .collect::<std::result::Result<(), Cause>>()
                .map_err(|cause| Error::new(operation, format!("IP set {name}"), cause))?;
        }
        Ok(())
    }

    /// Exchanges the content of two sets at once; rules keep referring to the name.
    ///
    /// # Errors
    /// Their types or families differ.
    pub fn swap(&self, one_name: &str, other: &str) -> Result<()> {
        let results = self.socket().batch(1, |writer, _, sequence| {
            message::write_named(
                writer,
                sequence,
                self.protocol,
                message::SWAP,
                one_name,
                Some(other),
            );
            Ok(())
        });
        one(results).map_err(|cause| {
            let object = format!("IP sets {one_name} and {other}");
            Error::new("swap", object, cause)
        })
    }

    /// Destroys sets; one result each. One that is not there is an error on some
    /// kernels ([`Error::is_not_found`]); one that rules refer
    /// to stays ([`Error::code`] is `EBUSY`).
    pub fn destroy(&self, names: &[Arc<str>]) -> Vec<Result<()>> {
        let results = self.socket().batch(names.len(), |writer, index, sequence| {
            message::write_named(
                writer,
                sequence,
                self.protocol,
                message::DESTROY,
                &names[index],
                None,
            );
            Ok(())
        });
        results
            .into_iter()
            .zip(names)
            .map(|(result, name)| {
                result.map_err(|cause| Error::new("destroy", format!("IP set {name}"), cause))
            })
            .collect()
    }
}

fn one(results: Vec<std::result::Result<(), Cause>>) -> std::result::Result<(), Cause> {
    results.into_iter().next().unwrap_or(Err(Cause::NoAnswer))
}
