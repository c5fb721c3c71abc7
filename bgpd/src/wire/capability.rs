//! Capabilities of OPEN (RFC 5492). Unknown ones keep their bytes.

use bytes::{BufMut, Bytes, BytesMut};

use super::family::Family;

/// Direction of add-path for one family (RFC 7911 §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddPathMode {
    /// The sender of the capability can receive several paths.
    pub receive: bool,
    /// The sender of the capability would like to send several paths.
    pub send: bool,
}

impl AddPathMode {
    /// One path for each prefix.
    pub const OFF: Self = Self {
        receive: false,
        send: false,
    };
    /// Both directions.
    pub const BOTH: Self = Self {
        receive: true,
        send: true,
    };
}

/// One family of a [`GracefulRestart`] capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GracefulRestartFamily {
    /// The family.
    pub family: Family,
    /// F bit: forwarding state was kept over the restart.
    pub forwarding_preserved: bool,
}

/// Graceful restart (RFC 4724 §3, RFC 8538 §2).
///
/// ```text
/// +--------------------------------------------------+
/// | R | N | 0 0 |  Restart time in seconds (12 bits) |
/// +--------------------------------------------------+
/// | AFI (16)  | SAFI (8) | F |  0 0 0 0 0 0 0        |  repeated
/// +--------------------------------------------------+
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GracefulRestart {
    /// R bit: the sender has just restarted.
    pub restarting: bool,
    /// N bit: NOTIFICATION also keeps routes (RFC 8538).
    pub notification: bool,
    /// How long the sender's restart may take, at most 4095 s.
    pub restart_time: u16,
    /// Families whose routes are kept.
    pub families: Vec<GracefulRestartFamily>,
}

/// One family of the long-lived graceful restart capability (RFC 9494 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongLivedFamily {
    /// The family.
    pub family: Family,
    /// F bit: forwarding state was kept.
    pub forwarding_preserved: bool,
    /// Seconds (24 bits) to keep stale routes.
    pub stale_time: u32,
}

/// A capability of OPEN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Multiprotocol (1, RFC 4760 §8).
    Multiprotocol(Family),
    /// Route refresh (2, RFC 2918).
    RouteRefresh,
    /// Extended next hop (5, RFC 8950): family and the AFI its next hops may have.
    ExtendedNextHop(Vec<(Family, u16)>),
    /// Extended message (6, RFC 8654).
    ExtendedMessage,
    /// Graceful restart (64).
    GracefulRestart(GracefulRestart),
    /// Four-octet AS number (65, RFC 6793).
    FourOctetAs(u32),
    /// Add-path (69, RFC 7911).
    AddPath(Vec<(Family, AddPathMode)>),
    /// Enhanced route refresh (70, RFC 7313).
    EnhancedRouteRefresh,
    /// Long-lived graceful restart (71, RFC 9494).
    LongLivedGracefulRestart(Vec<LongLivedFamily>),
    /// Anything else, and known codes whose length we do not understand: code and value as received.
    Unknown {
        /// Capability code.
        code: u8,
        /// Value.
        value: Bytes,
    },
}

fn family_at(raw: &[u8]) -> Family {
    Family {
        afi: u16::from_be_bytes([raw[0], raw[1]]),
        safi: raw[2],
    }
}

impl Capability {
    /// Reads one capability. A known code with an impossible length is kept as [`Capability::Unknown`]
    /// and so has no effect (RFC 5492 §4 has no error for it).
    pub fn decode(code: u8, value: Bytes) -> Self {
        Self::decode_known(code, &value).unwrap_or(Self::Unknown { code, value })
    }

    fn decode_known(code: u8, v: &[u8]) -> Option<Self> {
        Some(match (code, v.len()) {
            (1, 4) => Self::Multiprotocol(Family {
                afi: u16::from_be_bytes([v[0], v[1]]),
                safi: v[3],
            }),
            (2, 0) => Self::RouteRefresh,
            (5, n) if n % 6 == 0 => Self::ExtendedNextHop(
                v.chunks_exact(6)
                    .filter_map(|c| {
                        let safi = u8::try_from(u16::from_be_bytes([c[2], c[3]])).ok()?;
                        let family = Family {
                            afi: u16::from_be_bytes([c[0], c[1]]),
                            safi,
                        };
                        Some((family, u16::from_be_bytes([c[4], c[5]])))
                    })
                    .collect(),
            ),
            (6, 0) => Self::ExtendedMessage,
            (64, n) if n >= 2 && (n - 2) % 4 == 0 => Self::GracefulRestart(GracefulRestart {
                restarting: v[0] & 0x80 != 0,
                notification: v[0] & 0x40 != 0,
                restart_time: u16::from_be_bytes([v[0] & 0x0f, v[1]]),
                families: v[2..]
                    .chunks_exact(4)
                    .map(|c| GracefulRestartFamily {
                        family: family_at(c),
                        forwarding_preserved: c[3] & 0x80 != 0,
                    })
                    .collect(),
            }),
            (65, 4) => Self::FourOctetAs(u32::from_be_bytes([v[0], v[1], v[2], v[3]])),
            (69, n) if n % 4 == 0 => Self::AddPath(
                v.chunks_exact(4)
                    // RFC 7911 §4: any other value than 1, 2, 3 makes the tuple ignored.
                    .filter(|c| (1..=3).contains(&c[3]))
                    .map(|c| {
                        (
                            family_at(c),
                            AddPathMode {
                                receive: c[3] & 1 != 0,
                                send: c[3] & 2 != 0,
                            },
                        )
                    })
                    .collect(),
            ),
            (70, 0) => Self::EnhancedRouteRefresh,
            (71, n) if n % 7 == 0 => Self::LongLivedGracefulRestart(
                v.chunks_exact(7)
                    .map(|c| LongLivedFamily {
                        family: family_at(c),
                        forwarding_preserved: c[3] & 0x80 != 0,
                        stale_time: u32::from_be_bytes([0, c[4], c[5], c[6]]),
                    })
                    .collect(),
            ),
            _ => return None,
        })
    }

    /// The capability code.
    pub const fn code(&self) -> u8 {
        match self {
            Self::Multiprotocol(_) => 1,
            Self::RouteRefresh => 2,
            Self::ExtendedNextHop(_) => 5,
            Self::ExtendedMessage => 6,
            Self::GracefulRestart(_) => 64,
            Self::FourOctetAs(_) => 65,
            Self::AddPath(_) => 69,
            Self::EnhancedRouteRefresh => 70,
            Self::LongLivedGracefulRestart(_) => 71,
            Self::Unknown { code, .. } => *code,
        }
    }

    /// Appends the value (without code and length).
    pub(super) fn encode_value(&self, out: &mut BytesMut) {
        let put_family = |out: &mut BytesMut, family: Family| {
            out.put_u16(family.afi);
            out.put_u8(family.safi);
        };
        match self {
            Self::Multiprotocol(family) => {
                out.put_u16(family.afi);
                out.put_u8(0);
                out.put_u8(family.safi);
            }
            Self::RouteRefresh | Self::ExtendedMessage | Self::EnhancedRouteRefresh => {}
            Self::ExtendedNextHop(entries) => {
                for (family, next_hop_afi) in entries {
                    out.put_u16(family.afi);
                    out.put_u16(u16::from(family.safi));
                    out.put_u16(*next_hop_afi);
                }
            }
            Self::GracefulRestart(gr) => {
                let flags = u16::from(gr.restarting) << 15 | u16::from(gr.notification) << 14;
                out.put_u16(flags | gr.restart_time.min(0x0fff));
                for entry in &gr.families {
                    put_family(out, entry.family);
                    out.put_u8(u8::from(entry.forwarding_preserved) << 7);
                }
            }
            Self::FourOctetAs(asn) => out.put_u32(*asn),
            Self::AddPath(entries) => {
                for (family, mode) in entries.iter().filter(|(_, m)| m.receive || m.send) {
                    put_family(out, *family);
                    out.put_u8(u8::from(mode.receive) | u8::from(mode.send) << 1);
                }
            }
            Self::LongLivedGracefulRestart(entries) => {
                for entry in entries {
                    put_family(out, entry.family);
                    out.put_u8(u8::from(entry.forwarding_preserved) << 7);
                    out.put_uint(u64::from(entry.stale_time.min(0x00ff_ffff)), 3);
                }
            }
            Self::Unknown { value, .. } => out.put_slice(value),
        }
    }
}
