//! OPEN (RFC 4271 §4.2, RFC 9072) and what two OPENs agree on.

use std::net::Ipv4Addr;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::capability::{AddPathMode, Capability, GracefulRestart, LongLivedFamily};
use super::family::{Family, FamilySet};
use super::frame::{MAX_EXTENDED_LEN, MAX_LEN};
use super::notification::{ErrorCode, Notification, open_error};
use super::pack::EncodeError;

/// Stands for an AS number that does not fit into two octets (RFC 6793 §9).
pub const AS_TRANS: u32 = 23456;

const VERSION: u8 = 4;
const PARAMETER_CAPABILITIES: u8 = 2;
/// RFC 9072 §2: non-extended length and type that announce the long form.
const EXTENDED_PARAMETERS: u8 = 255;

/// An OPEN message.
///
/// ```text
/// +-+-+-+-+-+-+-+-+
/// |    Version    |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |     My AS (or AS_TRANS)       |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |           Hold time           |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |                         BGP identifier                        |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// | Opt. length   |  255 (RFC 9072)  |  Ext. length (16)          |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |  Parameters: type, length (8, or 16 in the long form), value  |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The sender's AS number (from capability 65 when present; the two-octet field follows from it).
    pub asn: u32,
    /// Proposed hold time in seconds.
    pub hold_time: u16,
    /// BGP identifier (RFC 6286: unique within the AS).
    pub router_id: Ipv4Addr,
    /// Capabilities in the order sent, without [`Capability::FourOctetAs`] when
    /// `four_octet_as` says that it was there.
    pub capabilities: Vec<Capability>,
    /// Whether capability 65 is present.
    pub four_octet_as: bool,
}

impl Open {
    /// Reads the body. Checks version, parameters and identifier; AS number, hold time and capabilities
    /// are judged by the state machine, which knows the configuration.
    pub(super) fn decode(body: &Bytes) -> Result<Self, Notification> {
        let fault = |subcode| Notification::new(ErrorCode::Open, subcode);
        let mut head = body.clone();
        if head.len() < 10 {
            return Err(fault(open_error::UNSPECIFIC));
        }
        if head.get_u8() != VERSION {
            let supported = Bytes::copy_from_slice(&u16::from(VERSION).to_be_bytes());
            return Err(Notification::with_data(
                ErrorCode::Open,
                open_error::UNSUPPORTED_VERSION,
                supported,
            ));
        }
        let as_field = u32::from(head.get_u16());
        let hold_time = head.get_u16();
        let router_id = Ipv4Addr::from(head.get_u32());
        if router_id.is_unspecified() {
            return Err(fault(open_error::BAD_IDENTIFIER));
        }
        let mut capabilities = decode_parameters(&head)?;
        let mut asn = None;
        capabilities.retain(|capability| match capability {
            Capability::FourOctetAs(value) => {
                asn.get_or_insert(*value);
                false
            }
            _ => true,
        });
        let four_octet_as = asn.is_some();
        let asn = asn.unwrap_or(as_field);
        if asn == 0 || as_field == 0 {
            return Err(fault(open_error::BAD_PEER_AS));
        }
        Ok(Self {
            asn,
            hold_time,
            router_id,
            capabilities,
            four_octet_as,
        })
    }

    /// Appends the body.
    pub(super) fn encode(&self, out: &mut BytesMut) -> Result<(), EncodeError> {
        out.put_u8(VERSION);
        out.put_u16(u16::try_from(self.asn).unwrap_or(AS_TRANS as u16));
        out.put_u16(self.hold_time);
        out.put_u32(self.router_id.into());
        let mut values = Vec::new();
        let four_octet = self
            .four_octet_as
            .then_some(Capability::FourOctetAs(self.asn));
        for capability in self.capabilities.iter().chain(four_octet.as_ref()) {
            let mut value = BytesMut::new();
            capability.encode_value(&mut value);
            let len = u8::try_from(value.len()).map_err(|_| EncodeError::TooLong {
                what: "capability",
                len: value.len(),
                max: usize::from(u8::MAX),
            })?;
            values.push((capability.code(), len, value));
        }
        // One parameter per capability is what every implementation accepts.
        let short: usize = values.iter().map(|(_, len, _)| 4 + usize::from(*len)).sum();
        let extended = short > usize::from(u8::MAX - 1);
        if extended {
            let total: usize = values.iter().map(|(_, len, _)| 5 + usize::from(*len)).sum();
            let total = u16::try_from(total).map_err(|_| EncodeError::TooLong {
                what: "optional parameters",
                len: total,
                max: usize::from(u16::MAX),
            })?;
            out.put_u8(EXTENDED_PARAMETERS);
            out.put_u8(EXTENDED_PARAMETERS);
            out.put_u16(total);
        } else {
            out.put_u8(u8::try_from(short).unwrap_or(u8::MAX));
        }
        for (code, len, value) in values {
            out.put_u8(PARAMETER_CAPABILITIES);
            if extended {
                out.put_u16(u16::from(len) + 2);
            } else {
                out.put_u8(len + 2);
            }
            out.put_u8(code);
            out.put_u8(len);
            out.put_slice(&value);
        }
        Ok(())
    }

    /// The multiprotocol families; without that capability IPv4 unicast is meant (RFC 4760 §8).
    pub fn families(&self) -> FamilySet {
        let mut any = false;
        let mut set = FamilySet::EMPTY;
        for capability in &self.capabilities {
            if let Capability::Multiprotocol(family) = capability {
                any = true;
                set.insert(*family);
            }
        }
        if any { set } else { FamilySet::IPV4 }
    }

    /// The graceful restart capability, the last one if repeated (RFC 4724 §3).
    pub fn graceful_restart(&self) -> Option<&GracefulRestart> {
        self.capabilities.iter().rev().find_map(|c| match c {
            Capability::GracefulRestart(gr) => Some(gr),
            _ => None,
        })
    }

    /// The long-lived graceful restart families; only meaningful beside graceful restart (RFC 9494 §3.1).
    pub fn long_lived(&self) -> &[LongLivedFamily] {
        self.capabilities
            .iter()
            .rev()
            .find_map(|c| match c {
                Capability::LongLivedGracefulRestart(families) => Some(&families[..]),
                _ => None,
            })
            .unwrap_or_default()
    }

    fn has(&self, wanted: &Capability) -> bool {
        self.capabilities.contains(wanted)
    }

    fn add_path(&self, family: Family) -> AddPathMode {
        let entries = self.capabilities.iter().filter_map(|c| match c {
            Capability::AddPath(entries) => Some(entries),
            _ => None,
        });
        let mode = entries
            .flatten()
            .rev()
            .find(|(f, _)| *f == family)
            .map(|(_, mode)| *mode);
        mode.unwrap_or(AddPathMode {
            receive: false,
            send: false,
        })
    }

    fn extended_next_hop(&self) -> FamilySet {
        self.capabilities
            .iter()
            .filter_map(|c| match c {
                Capability::ExtendedNextHop(entries) => Some(entries),
                _ => None,
            })
            .flatten()
            .filter(|(family, afi)| *family == Family::IPV4_UNICAST && *afi == 2)
            .map(|(family, _)| *family)
            .collect()
    }
}

fn decode_parameters(field: &Bytes) -> Result<Vec<Capability>, Notification> {
    let malformed = || Notification::new(ErrorCode::Open, open_error::UNSPECIFIC);
    let mut rest = field.clone();
    let short_len = rest.try_get_u8().map_err(|_| malformed())?;
    // RFC 9072 §2: the long form is announced by the first parameter's type being 255.
    let extended = short_len != 0 && rest.first() == Some(&EXTENDED_PARAMETERS);
    let len = if extended {
        rest.advance(1);
        usize::from(rest.try_get_u16().map_err(|_| malformed())?)
    } else {
        usize::from(short_len)
    };
    if rest.len() != len {
        return Err(malformed());
    }
    let mut capabilities = Vec::new();
    while rest.has_remaining() {
        let kind = rest.get_u8();
        let len = match extended {
            true => rest.try_get_u16().map(usize::from),
            false => rest.try_get_u8().map(usize::from),
        }
        .map_err(|_| malformed())?;
        if rest.len() < len {
            return Err(malformed());
        }
        let mut value = rest.split_to(len);
        if kind != PARAMETER_CAPABILITIES {
            return Err(Notification::new(
                ErrorCode::Open,
                open_error::UNSUPPORTED_PARAMETER,
            ));
        }
        while value.has_remaining() {
            let code = value.get_u8();
            let len = usize::from(value.try_get_u8().map_err(|_| malformed())?);
            if value.len() < len {
                return Err(malformed());
            }
            capabilities.push(Capability::decode(code, value.split_to(len)));
        }
    }
    Ok(capabilities)
}

/// Whether the peer is in our AS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerKind {
    /// Internal: same AS.
    Ibgp,
    /// External.
    Ebgp,
}

/// What the codec must know about a session to read and write its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Codec {
    /// Attribute rules differ by it (RFC 7606 §7).
    pub peer: PeerKind,
    /// AS numbers have four octets in AS_PATH and AGGREGATOR (RFC 6793).
    pub four_octet_as: bool,
    /// Messages may be up to 65535 octets (RFC 8654).
    pub extended_message: bool,
    /// Families that may be exchanged.
    pub families: FamilySet,
    /// Families whose received NLRI carries path identifiers.
    pub add_path_rx: FamilySet,
    /// Families whose sent NLRI carries path identifiers.
    pub add_path_tx: FamilySet,
    /// Families (IPv4) whose next hop may be IPv6 (RFC 8950).
    pub extended_next_hop: FamilySet,
}

impl Codec {
    /// The plainest session: what holds before OPENs have been exchanged.
    pub const fn basic(peer: PeerKind) -> Self {
        Self {
            peer,
            four_octet_as: false,
            extended_message: false,
            families: FamilySet::IPV4,
            add_path_rx: FamilySet::EMPTY,
            add_path_tx: FamilySet::EMPTY,
            extended_next_hop: FamilySet::EMPTY,
        }
    }

    /// Longest message we may send, header included.
    pub const fn max_message(&self) -> usize {
        if self.extended_message {
            MAX_EXTENDED_LEN
        } else {
            MAX_LEN
        }
    }
}

/// Everything that two OPENs agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// How messages are read and written.
    pub codec: Codec,
    /// Smaller of both hold times; 0 turns keepalives off.
    pub hold_time: u16,
    /// The peer's AS number.
    pub remote_as: u32,
    /// The AS number that we presented.
    pub local_as: u32,
    /// The peer's identifier.
    pub remote_id: Ipv4Addr,
    /// Both sides know ROUTE-REFRESH.
    pub route_refresh: bool,
    /// Both sides know its BoRR/EoRR form.
    pub enhanced_refresh: bool,
    /// The peer's graceful restart capability, if both sides have it.
    pub graceful_restart: Option<GracefulRestart>,
    /// The peer's long-lived families, if both sides have it.
    pub long_lived: Vec<LongLivedFamily>,
}

impl Negotiated {
    /// What holds for a session on which we sent `local` and received `remote`.
    pub fn between(local: &Open, remote: &Open) -> Self {
        let both = |c: &Capability| local.has(c) && remote.has(c);
        let families = local.families().intersection(remote.families());
        let add_path = |ours: fn(AddPathMode) -> bool, theirs: fn(AddPathMode) -> bool| {
            families
                .iter()
                .filter(|f| ours(local.add_path(*f)) && theirs(remote.add_path(*f)))
                .collect()
        };
        let gr = local
            .graceful_restart()
            .and(remote.graceful_restart())
            .cloned();
        let llgr = gr.is_some() && !local.long_lived().is_empty();
        Self {
            codec: Codec {
                peer: if local.asn == remote.asn {
                    PeerKind::Ibgp
                } else {
                    PeerKind::Ebgp
                },
                four_octet_as: local.four_octet_as && remote.four_octet_as,
                extended_message: both(&Capability::ExtendedMessage),
                families,
                add_path_rx: add_path(|m| m.receive, |m| m.send),
                add_path_tx: add_path(|m| m.send, |m| m.receive),
                extended_next_hop: local
                    .extended_next_hop()
                    .intersection(remote.extended_next_hop()),
            },
            hold_time: local.hold_time.min(remote.hold_time),
            remote_as: remote.asn,
            local_as: local.asn,
            remote_id: remote.router_id,
            route_refresh: both(&Capability::RouteRefresh),
            enhanced_refresh: both(&Capability::EnhancedRouteRefresh),
            graceful_restart: gr,
            long_lived: if llgr {
                remote.long_lived().to_vec()
            } else {
                Vec::new()
            },
        }
    }
}
