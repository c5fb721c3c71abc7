//! Whose traces are looked for, and how they are told from everybody else's. Pure.
//!
//! Names of Calico's objects: its Felix (`rules`, `ifacemonitor`, `ipsets`, `nftables`), confd's BIRD templates and its CNI installer.
//! flannel's: `pkg/trafficmngr`, `pkg/backend`, `pkg/subnet` of its sources. Cali's: docs/architecture.md §5.

use cali_netlink::route::protocol;
use cali_netlink::{Link, LinkKind};
use std::fmt;
use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Calico,
    Flannel,
    Cali,
}

/// What a device is to an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Device {
    /// A tunnel, which carries nobody's traffic without its daemon.
    Tunnel,
    /// The one device of a module, which cannot be deleted.
    Fallback,
    /// The host's end of a pod's interface.
    Pod,
    /// A bridge that pods' interfaces are ports of.
    Bridge,
    /// It bears the name, but is of another kind: somebody else's.
    NamedAlike,
    /// Nothing.
    Foreign,
}

/// What a file is to an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum File {
    Goes,
    /// The cluster's data.
    Datastore,
    /// Addresses that running pods hold.
    OfPods,
    Foreign,
}

/// Places of CNI configuration, of containerd and of k3s.
pub(super) const LISTS: [&str; 3] = [
    "/etc/cni/net.d",
    "/var/lib/rancher/k3s/agent/etc/cni/net.d",
    "/var/lib/rancher/rke2/agent/etc/cni/net.d",
];
/// Places of CNI programs.
pub(super) const PROGRAMS: [&str; 3] = [
    "/opt/cni/bin",
    "/var/lib/rancher/k3s/data/cni",
    "/usr/lib/cni",
];

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Calico => "Calico",
            Self::Flannel => "flannel",
            Self::Cali => "Cali",
        })
    }
}

impl Owner {
    pub(super) const fn how_to_stop(self) -> &'static str {
        match self {
            Self::Calico => "kubectl -n kube-system delete daemonset calico-node",
            Self::Flannel => {
                "kubectl -n kube-flannel delete daemonset kube-flannel-ds, or k3s with --flannel-backend=none"
            }
            Self::Cali => {
                "kubectl -n kube-system delete daemonset cali-node, or systemctl stop cali-node"
            }
        }
    }

    /// Whether a process keeps the traces alive. `command` is its command line, words separated by blanks.
    pub(super) fn runs_as(self, name: &str, command: &str) -> bool {
        match self {
            Self::Calico => match name {
                "calico-node" | "calico-felix" => true,
                // Somebody else's BIRD is none of our business.
                "bird" | "bird6" | "confd" => command.contains("calico"),
                _ => false,
            },
            Self::Flannel => name == "flanneld",
            Self::Cali => {
                matches!(name, "cali-node" | "bgpd" | "felix") && {
                    // FRR has a bgpd as well.
                    name != "bgpd" || !command.contains("frr")
                }
            }
        }
    }

    /// A table of nf_tables, by family and name.
    pub(super) fn table(self, family: &str, name: &str) -> bool {
        match self {
            Self::Calico => name == "calico" && matches!(family, "ip" | "ip6"),
            Self::Flannel => matches!(
                (family, name),
                ("ip", "flannel-ipv4") | ("ip6", "flannel-ipv6")
            ),
            Self::Cali => matches!(
                (family, name),
                ("inet", "calico" | "calico-nat" | "calico-offload") | ("arp", "calico")
            ),
        }
    }

    /// A chain of iptables.
    pub(super) fn chain(self, name: &str) -> bool {
        match self {
            Self::Calico | Self::Cali => name.starts_with("cali-"),
            Self::Flannel => name.starts_with("FLANNEL-"),
        }
    }

    /// A rule in somebody else's chain, by its comment.
    pub(super) fn commented(self, rule: &str) -> bool {
        match self {
            Self::Calico | Self::Cali => rule
                .split_once("--comment \"cali:")
                .and_then(|(_, rest)| rest.split('"').next())
                .is_some_and(|hash| hash.len() == 16),
            Self::Flannel => {
                rule.contains("--comment \"flanneld masq\"")
                    || rule.contains("--comment \"flanneld forward\"")
            }
        }
    }

    /// Beginnings of the names of IP sets.
    pub(super) const fn sets(self) -> &'static [&'static str] {
        match self {
            Self::Calico | Self::Cali => &["cali40", "cali60"],
            Self::Flannel => &[],
        }
    }

    /// Protocol numbers of routes.
    pub(super) const fn protocols(self) -> &'static [u8] {
        match self {
            Self::Calico => &[protocol::FELIX, protocol::BIRD],
            // Its library says nothing, so that the kernel shows `boot`.
            Self::Flannel => &[protocol::BOOT],
            Self::Cali => &[protocol::FELIX, protocol::BIRD, protocol::BGP],
        }
    }

    pub(super) fn device(self, link: &Link) -> Device {
        let kind = &link.kind;
        match self {
            Self::Calico | Self::Cali => match link.name.as_str() {
                "tunl0" if matches!(kind, LinkKind::IpIp(_)) => Device::Fallback,
                "vxlan.calico" | "vxlan-v6.calico" if matches!(kind, LinkKind::Vxlan(_)) => {
                    Device::Tunnel
                }
                "wireguard.cali" | "wg-v6.cali" if *kind == LinkKind::Wireguard => Device::Tunnel,
                "tunl0" | "vxlan.calico" | "vxlan-v6.calico" | "wireguard.cali" | "wg-v6.cali" => {
                    Device::NamedAlike
                }
                name if name.starts_with("cali") => match kind {
                    LinkKind::Veth => Device::Pod,
                    LinkKind::Other(other) if **other == *"netkit" => Device::Pod,
                    _ => Device::NamedAlike,
                },
                _ => Device::Foreign,
            },
            Self::Flannel => match link.name.as_str() {
                "cni0" if *kind == LinkKind::Bridge => Device::Bridge,
                "cni0" => Device::NamedAlike,
                name if name.starts_with("flannel") => match kind {
                    LinkKind::Vxlan(_) | LinkKind::Wireguard | LinkKind::IpIp(_) => Device::Tunnel,
                    _ => Device::NamedAlike,
                },
                _ => Device::Foreign,
            },
        }
    }

    /// Files and folders that may hold traces; those of a folder are judged one by one.
    pub(super) fn places(self, run_dir: &Path, state_dir: &Path) -> Vec<std::path::PathBuf> {
        let mut all: Vec<std::path::PathBuf> = Vec::new();
        let mut below = |folders: &[&str], names: &[&str]| {
            for folder in folders {
                all.extend(names.iter().map(|name| Path::new(folder).join(name)));
            }
        };
        match self {
            Self::Calico | Self::Cali => {
                below(&LISTS, &["10-calico.conflist"]);
                below(&PROGRAMS, &["calico", "calico-ipam"]);
                if self == Self::Cali {
                    below(&PROGRAMS, &["loopback"]);
                }
                if self == Self::Calico {
                    below(&LISTS, &["calico-kubeconfig", "calico-tls"]);
                    all.push("/var/log/calico".into());
                }
                all.extend([run_dir.to_owned(), state_dir.to_owned()]);
            }
            Self::Flannel => {
                below(&LISTS, &["10-flannel.conflist", "10-flannel.conf"]);
                let more = [
                    "/run/flannel",
                    "/var/lib/cni/flannel",
                    "/var/lib/cni/networks/cbr0",
                ];
                all.extend(more.map(Into::into));
            }
        }
        all
    }

    /// A file below one of [`Self::places`].
    pub(super) fn file(self, path: &Path, state_dir: &Path) -> File {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match self {
            Self::Calico | Self::Cali if name.starts_with("cali.db") => File::Datastore,
            // In the folder that both share, Calico has these only.
            Self::Calico if path.starts_with(state_dir) && path != state_dir => match &*name {
                "nodename" | "mtu" | "shutdownTS" => File::Goes,
                _ => File::Foreign,
            },
            Self::Flannel if path.starts_with("/var/lib/cni") => File::OfPods,
            _ => File::Goes,
        }
    }
}
