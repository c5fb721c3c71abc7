//! `calictl node checksystem`: whether this host can do what Cali asks of it, each thing tried out, and whether the paths to
//! the other nodes carry what the links promise.

use super::path::{self, Path};
use crate::connection;
use crate::output::{self, Style};
use anyhow::{Context, Result};
use cali_api::v3::EncapMode;
use cali_api::{AnyResource, Kind};
use cali_netlink::Netlink;
use cali_netlink::probe::{self, Capability, Missing};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

/// How long the datastore may take. Without it the host is checked all the same.
const DATASTORE_LIMIT: Duration = Duration::from_secs(5);
/// Paths that are tried at the same time.
const AT_ONCE: usize = 32;

/// What the cluster asks for, as far as its datastore answers.
#[derive(Debug, Default)]
struct Wishes {
    /// What else than the kernel's basics is needed, and for what.
    needs: BTreeMap<Capability, String>,
    /// Nodes and their addresses.
    nodes: Vec<(String, IpAddr)>,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    grade: Grade,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    Ok,
    /// Missing, but nothing asks for it.
    Skip,
    Fail,
}

pub(super) async fn run() -> Result<ExitCode> {
    let wishes = tokio::time::timeout(DATASTORE_LIMIT, wishes())
        .await
        .unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {DATASTORE_LIMIT:?}")));
    let (wishes, unknown) = match wishes {
        Ok(wishes) => (wishes, None),
        Err(error) => (Wishes::default(), Some(error)),
    };
    output::line(Style::TITLE.paint(format!("Kernel {}", kernel())));
    let probed = probe::blocking(Capability::ALL);
    let is_root = probed
        .iter()
        .any(|(capability, result)| *capability == Capability::Root && result.is_ok());
    let mut findings = host(probed, &wishes.needs);
    print(&findings);
    output::line(Style::TITLE.paint("Paths to the other nodes"));
    match unknown {
        Some(error) => output::line(format!(
            "  not tried: the datastore does not say which nodes there are: {error:#}"
        )),
        None if is_root => {
            let nodes = wishes.nodes;
            let paths = tokio::task::spawn_blocking(move || paths(&nodes))
                .await
                .context("trying the paths failed")??;
            if paths.is_empty() {
                output::line("  there is no other node");
            }
            print(&paths);
            findings.extend(paths);
        }
        None => output::line("  not tried: that takes root privileges (CAP_NET_RAW)"),
    }
    if findings.iter().any(|finding| finding.grade == Grade::Fail) {
        output::line(
            Style::BAD.paint("System does not meet minimum system requirements to run Calico"),
        );
        return Ok(ExitCode::FAILURE);
    }
    output::line(Style::GOOD.paint("System meets minimum system requirements to run Calico!"));
    Ok(ExitCode::SUCCESS)
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(
        |_| "of unknown version".to_owned(),
        |text| text.trim().to_owned(),
    )
}

async fn wishes() -> Result<Wishes> {
    let store = connection::open().await?;
    let mut wishes = Wishes::default();
    for kind in [Kind::IPPool, Kind::FelixConfiguration, Kind::Node] {
        let list = store
            .list(kind, None)
            .await
            .with_context(|| format!("cannot list {kind}"))?;
        for item in &list.items {
            wishes.take(&item.object);
        }
    }
    Ok(wishes)
}

impl Wishes {
    fn take(&mut self, object: &AnyResource) {
        let mut need = |capability, by: String| {
            self.needs.entry(capability).or_insert(by);
        };
        match object {
            AnyResource::IPPool(pool) if !pool.spec.disabled => {
                let by = format!("IPPool({})", pool.metadata.name);
                if pool.spec.vxlan() != EncapMode::Never {
                    need(Capability::Vxlan, by.clone());
                }
                if pool.spec.ipip() != EncapMode::Never {
                    need(Capability::IpIp, by);
                }
            }
            AnyResource::FelixConfiguration(config) => {
                let wireguard = [
                    config.spec.wireguard_enabled,
                    config.spec.wireguard_enabled_v6,
                ];
                if wireguard.contains(&Some(true)) {
                    need(
                        Capability::Wireguard,
                        format!("FelixConfiguration({})", config.metadata.name),
                    );
                }
            }
            AnyResource::Node(node) => {
                let addresses = [node.spec.ipv4(), node.spec.ipv6()].into_iter().flatten();
                let name = &node.metadata.name;
                self.nodes
                    .extend(addresses.map(|address| (name.clone(), address.ip())));
            }
            _ => {}
        }
    }
}

/// Judges what was probed: the basics must be there, the rest where something asks for it.
fn host(
    probed: Vec<(Capability, Result<(), Missing>)>,
    needs: &BTreeMap<Capability, String>,
) -> Vec<Finding> {
    let optional = [
        Capability::Bridge,
        Capability::Vxlan,
        Capability::IpIp,
        Capability::Wireguard,
        Capability::NexthopObjects,
        Capability::Flowtable,
    ];
    let findings = probed.into_iter().map(|(capability, result)| {
        let (grade, text) = match (result, needs.get(&capability)) {
            (Ok(()), _) => (Grade::Ok, capability.to_string()),
            (Err(missing), Some(by)) => (Grade::Fail, format!("{missing}; {by} asks for it")),
            (Err(missing), None) if optional.contains(&capability) => {
                (Grade::Skip, format!("{missing}; nothing asks for it"))
            }
            (Err(missing), None) => (Grade::Fail, missing.to_string()),
        };
        Finding { grade, text }
    });
    findings.collect()
}

/// Tries the ways to all addresses, some at a time, and reports in their order. Blocking.
fn paths(nodes: &[(String, IpAddr)]) -> Result<Vec<Finding>> {
    let netlink = Netlink::current()?;
    let ident = u16::try_from(std::process::id() & 0xffff).unwrap_or_default();
    let mut results = Vec::with_capacity(nodes.len());
    for some in nodes.chunks(AT_ONCE) {
        let tried: Vec<Result<Path>> = std::thread::scope(|scope| {
            let threads: Vec<_> = some
                .iter()
                .map(|(_, to)| scope.spawn(|| path::try_path(&netlink, *to, ident)))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        });
        for ((node, to), path) in some.iter().zip(tried) {
            let path = path.with_context(|| format!("cannot try the path to {node} ({to})"))?;
            results.push((node.clone(), *to, path));
        }
    }
    let own: BTreeSet<String> = results
        .iter()
        .filter(|(_, _, path)| *path == Path::Own)
        .map(|(node, ..)| node.clone())
        .collect();
    results.retain(|(node, ..)| !own.contains(node));
    Ok(results
        .iter()
        .map(|(node, to, path)| describe(node, *to, *path))
        .collect())
}

fn describe(node: &str, to: IpAddr, path: Path) -> Finding {
    let (grade, what) = match path {
        Path::Own => (Grade::Ok, "this host".to_owned()),
        Path::Whole(mtu) => (Grade::Ok, format!("packets of {mtu} bytes arrive")),
        Path::Silent => (
            Grade::Skip,
            "no answer to pings, so that its path cannot be tried".to_owned(),
        ),
        Path::NoRoute => (
            Grade::Fail,
            "this host has no route to it: add one, or correct the node's address".to_owned(),
        ),
        Path::Narrow {
            link,
            carries,
            told: true,
        } => (
            Grade::Fail,
            format!(
                "the link here promises {link} bytes, a router on the way carries only {carries} and says so: packets of tunnels \
                 are fragmented or lost; set the link's MTU to {carries}"
            ),
        ),
        Path::Narrow {
            link,
            carries,
            told: false,
        } => (
            Grade::Fail,
            format!(
                "black hole: the link here promises {link} bytes, packets of more than {carries} disappear on the way and nobody \
                 says so; set the link's MTU to {carries}, or mend the way (and let ICMP \"fragmentation needed\" pass)"
            ),
        ),
    };
    Finding {
        grade,
        text: format!("{node} ({to}): {what}"),
    }
}

fn print(findings: &[Finding]) {
    for Finding { grade, text } in findings {
        let word = match grade {
            Grade::Ok => Style::GOOD.paint("OK  "),
            Grade::Skip => Style::DIM.paint("SKIP"),
            Grade::Fail => Style::BAD.paint("FAIL"),
        };
        output::line(format!("  {word}  {text}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(capability: Capability) -> (Capability, Result<(), Missing>) {
        let missing = Missing {
            capability,
            cause: None,
        };
        (capability, Err(missing))
    }

    #[test]
    fn what_is_missing_fails_only_where_it_is_needed() {
        let needs = BTreeMap::from([(Capability::IpIp, "IPPool(p)".to_owned())]);
        let probed = vec![
            (Capability::Veth, Ok(())),
            missing(Capability::Conntrack),
            missing(Capability::IpIp),
            missing(Capability::Wireguard),
        ];
        let grades: Vec<Grade> = host(probed, &needs)
            .iter()
            .map(|found| found.grade)
            .collect();
        assert_eq!(grades, [Grade::Ok, Grade::Fail, Grade::Fail, Grade::Skip]);
    }

    #[test]
    fn a_narrow_path_names_what_to_do() {
        let path = Path::Narrow {
            link: 1500,
            carries: 1400,
            told: false,
        };
        let found = describe("n2", "10.0.0.2".parse().expect("an address"), path);
        assert_eq!(found.grade, Grade::Fail);
        assert_eq!(
            found.text,
            "n2 (10.0.0.2): black hole: the link here promises 1500 bytes, packets of more than 1400 disappear on the way and nobody \
             says so; set the link's MTU to 1400, or mend the way (and let ICMP \"fragmentation needed\" pass)"
        );
    }
}
