//! What this host can do: each capability tried out for real, in a namespace that is thrown away, and what is missing
//! said so that an operator can act on it.

use std::fmt;

use nix::unistd::Uid;

use crate::{
    NetNs, Netlink, NewLink, NewLinkKind, Vxlan,
    error::Error,
    nft::{Family, Nft, TableName, Transaction},
};

/// Something that a node may need from its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Capability {
    /// Running as root with `CAP_NET_ADMIN` and `CAP_SYS_ADMIN`.
    Root,
    /// Making network namespaces.
    Namespaces,
    /// veth pairs.
    Veth,
    /// Bridges.
    Bridge,
    /// nf_tables with the `inet` family.
    NfTables,
    /// Connection tracking over netlink.
    Conntrack,
    /// VXLAN devices.
    Vxlan,
    /// IP-in-IP devices.
    IpIp,
    /// WireGuard devices.
    Wireguard,
    /// Nexthop objects (Linux 5.3).
    NexthopObjects,
    /// nf_tables flowtables.
    Flowtable,
}

impl Capability {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::Root,
        Self::Namespaces,
        Self::Veth,
        Self::Bridge,
        Self::NfTables,
        Self::Conntrack,
        Self::Vxlan,
        Self::IpIp,
        Self::Wireguard,
        Self::NexthopObjects,
        Self::Flowtable,
    ];

    fn what(self) -> &'static str {
        match self {
            Self::Root => "root privileges (CAP_NET_ADMIN and CAP_SYS_ADMIN)",
            Self::Namespaces => "network namespaces",
            Self::Veth => "veth devices",
            Self::Bridge => "bridge devices",
            Self::NfTables => "nf_tables",
            Self::Conntrack => "connection tracking over netlink",
            Self::Vxlan => "VXLAN devices",
            Self::IpIp => "IP-in-IP devices",
            Self::Wireguard => "WireGuard devices",
            Self::NexthopObjects => "nexthop objects",
            Self::Flowtable => "nf_tables flowtables",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Root => {
                "run it as root, in a container with --privileged or these capabilities added"
            }
            Self::Namespaces => "use a kernel with CONFIG_NET_NS, and allow unshare(CLONE_NEWNET)",
            Self::Veth => "load the module: modprobe veth (CONFIG_VETH)",
            Self::Bridge => "load the module: modprobe bridge (CONFIG_BRIDGE)",
            Self::NfTables => {
                "load the module: modprobe nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)"
            }
            Self::Conntrack => {
                "load the module: modprobe nf_conntrack_netlink (CONFIG_NF_CT_NETLINK)"
            }
            Self::Vxlan => {
                "load the module: modprobe vxlan (CONFIG_VXLAN), or use pools without vxlanMode"
            }
            Self::IpIp => {
                "load the module: modprobe ipip (CONFIG_NET_IPIP), or use pools without ipipMode"
            }
            Self::Wireguard => {
                "load the module: modprobe wireguard (CONFIG_WIREGUARD), or leave encryption off"
            }
            Self::NexthopObjects => {
                "use Linux 5.3 or later; without them routes are written one by one with gateways"
            }
            Self::Flowtable => {
                "load the module: modprobe nf_flow_table_inet (CONFIG_NF_FLOW_TABLE_INET); it is optional"
            }
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what())
    }
}

/// A capability that this host does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub capability: Capability,
    /// What the kernel said.
    pub cause: Option<Error>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "this host lacks {}: {}",
            self.capability,
            self.capability.remedy()
        )?;
        match &self.cause {
            Some(cause) => write!(f, " (the kernel said: {cause})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Missing {}

/// Tries each capability; one result each, in order. Needs a running tokio runtime.
pub async fn probe(wanted: &[Capability]) -> Vec<(Capability, Result<(), Missing>)> {
    let sandbox = sandbox();
    let mut results = Vec::with_capacity(wanted.len());
    for capability in wanted {
        let result = match (capability, &sandbox) {
            (Capability::Root, _) => root(),
            // Without privileges nothing else can be tried; one clear message is enough.
            _ if root().is_err() => continue,
            (Capability::Namespaces, Err(cause)) => Err(Some(cause.clone())),
            (Capability::Namespaces, Ok(_)) => Ok(()),
            // Without namespaces nothing can be tried where it does no harm; that is reported on its own.
            (_, Err(cause)) => Err(Some(cause.clone())),
            (capability, Ok(netns)) => attempt(*capability, netns).await.map_err(Some),
        };
        results.push((
            *capability,
            result.map_err(|cause| Missing {
                capability: *capability,
                cause,
            }),
        ));
    }
    results
}

/// The needs of a lab on one machine: namespaces, veth, bridges, nf_tables, VXLAN; blocking, for programs without a
/// runtime.
pub fn lab_needs() -> Vec<Result<(), Missing>> {
    const NEEDS: &[Capability] = &[
        Capability::Root,
        Capability::Namespaces,
        Capability::Veth,
        Capability::Bridge,
        Capability::NfTables,
        Capability::Vxlan,
    ];
    blocking(NEEDS)
        .into_iter()
        .map(|(_, result)| result)
        .collect()
}

/// [`probe`] for programs without a runtime, or from within one: it runs on a thread of its own.
pub fn blocking(wanted: &[Capability]) -> Vec<(Capability, Result<(), Missing>)> {
    let work = || match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime.block_on(probe(wanted)),
        Err(error) => {
            let cause = Error::io("start", "a runtime for probing", &error);
            let missing = |capability| Missing {
                capability,
                cause: Some(cause.clone()),
            };
            wanted
                .iter()
                .map(|capability| (*capability, Err(missing(*capability))))
                .collect()
        }
    };
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(results) => results,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn root() -> Result<(), Option<Error>> {
    if !Uid::effective().is_root() {
        return Err(None);
    }
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    if has_capabilities(&status) {
        Ok(())
    } else {
        Err(None)
    }
}

/// `CapEff` of `/proc/PID/status` holds `CAP_NET_ADMIN` (12) and `CAP_SYS_ADMIN` (21).
fn has_capabilities(status: &str) -> bool {
    let needed = 1_u64 << 12 | 1 << 21;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .is_some_and(|effective| effective & needed == needed)
}

/// A namespace without a name: it ends with its handle.
fn sandbox() -> Result<NetNs, Error> {
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(|errno| Error::errno("make", "network namespace", errno))?;
            NetNs::current()
        });
        match made.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

async fn attempt(capability: Capability, netns: &NetNs) -> Result<(), Error> {
    let netlink = Netlink::open(netns)?;
    let link = |name: &str, kind| NewLink {
        up: false,
        ..NewLink::new(name, kind)
    };
    let made = match capability {
        Capability::Root | Capability::Namespaces => return Ok(()),
        Capability::Veth => {
            let peer = crate::VethPeer {
                name: "probe-veth2".into(),
                mac: None,
                mtu: None,
                netns: None,
                up: false,
            };
            netlink
                .add_link(&link("probe-veth", NewLinkKind::Veth(peer)))
                .await
        }
        Capability::Bridge => {
            netlink
                .add_link(&link("probe-bridge", NewLinkKind::Bridge))
                .await
        }
        Capability::Vxlan => {
            let vxlan = Vxlan {
                vni: 1,
                port: 4789,
                local: None,
                device: None,
                learning: false,
                udp_csum: true,
            };
            netlink
                .add_link(&link("probe-vxlan", NewLinkKind::Vxlan(vxlan)))
                .await
        }
        Capability::IpIp => {
            netlink
                .add_link(&link(
                    "probe-ipip",
                    NewLinkKind::IpIp(crate::IpIp {
                        local: Some(std::net::Ipv4Addr::LOCALHOST),
                        pmtudisc: true,
                        ..crate::IpIp::default()
                    }),
                ))
                .await
        }
        Capability::Wireguard => {
            netlink
                .add_link(&link("probe-wg", NewLinkKind::Wireguard))
                .await
        }
        Capability::NfTables => return nf_tables(netns),
        Capability::Flowtable => return flowtable(netns),
        Capability::Conntrack => return crate::conntrack::Conntrack::open(netns)?.dump().map(drop),
        Capability::NexthopObjects => return netlink.dump_nexthops().map(drop),
    };
    made.map(drop)
}

fn nf_tables(netns: &NetNs) -> Result<(), Error> {
    let mut transaction = Transaction::new(TableName::new(Family::Inet, "probe"));
    transaction.add_table();
    Nft::open(netns)?.commit_all(transaction)
}

fn flowtable(netns: &NetNs) -> Result<(), Error> {
    let mut transaction = Transaction::new(TableName::new(Family::Inet, "probe-flow"));
    transaction.add_table();
    transaction.add_flowtable("probe", 0, []);
    Nft::open(netns)?.commit_all(transaction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_capabilities_are_needed() {
        assert!(has_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(
            !has_capabilities("CapEff:\t0000000000001000\n"),
            "only CAP_NET_ADMIN"
        );
        assert!(!has_capabilities(""));
    }

    #[test]
    fn what_is_missing_is_said_with_its_remedy() {
        let cause = Error::errno("add", "link probe-vxlan", crate::Errno::EOPNOTSUPP);
        let missing = Missing {
            capability: Capability::Vxlan,
            cause: Some(cause),
        };
        assert_eq!(
            missing.to_string(),
            "this host lacks VXLAN devices: load the module: modprobe vxlan (CONFIG_VXLAN), or use pools without \
             vxlanMode (the kernel said: add link probe-vxlan: Operation not supported on transport endpoint)"
        );
    }
}
