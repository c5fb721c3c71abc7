//! `calictl diff`: which pairs of pods get another verdict if a file were applied.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, bail};
use cali_api::v3::{EntityRule, Port, Rule};
use cali_api::{AnyResource, kubernetes};
use clap::Args;

use super::explain::matrix;
use super::query::Service;
use super::world::World;
use crate::manifests;
use crate::output::{self, Style};

/// Pairs beyond this number are not worked out: the answer would take minutes.
const PAIRS: usize = 250_000;
/// Ports that are tried, the most used first.
const SERVICES: usize = 32;

/// What would change
#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// Manifests, `-` for standard input
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The namespace of objects that name none
    #[arg(short, long)]
    namespace: Option<String>,
    /// What if they were deleted instead
    #[arg(long)]
    delete: bool,
    /// Compare IPv6 flows
    #[arg(short = '6', long)]
    ipv6: bool,
}

/// Runs it. The exit code is 1 where something changes, as with diff(1).
pub(crate) async fn diff(arguments: &Diff) -> Result<ExitCode> {
    let documents = manifests::read(&arguments.files, false, arguments.namespace.as_deref())?;
    let before = World::read().await?;
    let objects = documents.into_iter().map(|document| document.value);
    let after = changed(&before, objects, arguments.delete);
    let changes = compare(&before, &after, arguments.ipv6)?;
    output::write(render(&changes));
    Ok(if changes.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The world after the objects were written or deleted.
fn changed(before: &World, objects: impl Iterator<Item = AnyResource>, delete: bool) -> World {
    let mut after = before.clone();
    for mut object in objects {
        cali_api::defaults(&mut object);
        let resources = if object.kind().is_native() {
            kubernetes::convert(&object).resources
        } else {
            vec![object]
        };
        for resource in resources {
            let key = resource.key();
            if delete {
                after.objects.remove(&key);
            } else {
                after.objects.insert(key, Arc::new(resource));
            }
        }
    }
    after
}

/// Flows whose verdict differs: source, destination, and by service whether it would be allowed.
type Changes = BTreeMap<(String, String), Vec<(String, bool)>>;

fn compare(before: &World, after: &World, v6: bool) -> Result<Changes> {
    let services = services(before, after);
    let pods = before.workloads(v6).len().max(after.workloads(v6).len());
    if pods * pods * services.len() > PAIRS * 8 {
        bail!(
            "{pods} pods make {} flows to compare; calictl diff works out {} at most",
            pods * pods * services.len(),
            PAIRS * 8
        );
    }
    let (was, would) = (matrix(before, &services, v6), matrix(after, &services, v6));
    let mut changes = Changes::new();
    for (key, allowed) in would {
        // A pod that comes with the file has had no flow.
        if was.get(&key).is_some_and(|before| *before == allowed) {
            continue;
        }
        let (source, destination, service) = key;
        changes
            .entry((source, destination))
            .or_default()
            .push((service, allowed));
    }
    Ok(changes)
}

/// The services that rules of either world tell apart, and one that no rule names.
fn services(before: &World, after: &World) -> Vec<Service> {
    let mut found: BTreeMap<(u8, u16), usize> = BTreeMap::new();
    for object in before.objects.values().chain(after.objects.values()) {
        let (ingress, egress) = match &**object {
            AnyResource::NetworkPolicy(policy) => (&policy.spec.ingress, &policy.spec.egress),
            AnyResource::GlobalNetworkPolicy(policy) => (&policy.spec.ingress, &policy.spec.egress),
            AnyResource::WorkloadEndpoint(endpoint) => {
                for port in &endpoint.spec.ports {
                    *found
                        .entry((port.protocol.number(), port.port))
                        .or_default() += 1;
                }
                continue;
            }
            _ => continue,
        };
        for rule in ingress.iter().chain(egress) {
            rule_ports(rule).for_each(|key| *found.entry(key).or_default() += 1);
        }
    }
    let mut sorted: Vec<((u8, u16), usize)> = found.into_iter().collect();
    sorted.sort_by_key(|(key, uses)| (std::cmp::Reverse(*uses), *key));
    let named: BTreeSet<(u8, u16)> = sorted.iter().map(|(key, _)| *key).collect();
    let other = (1024..=u16::MAX)
        .rev()
        .find(|port| !named.contains(&(6, *port)));
    let mut services: Vec<Service> = sorted
        .into_iter()
        .take(SERVICES)
        .map(|((protocol, port), _)| Service { protocol, port })
        .collect();
    services.extend(other.map(|port| Service { protocol: 6, port }));
    services.push(Service {
        protocol: 1,
        port: 0,
    });
    services
}

fn rule_ports(rule: &Rule) -> impl Iterator<Item = (u8, u16)> + '_ {
    let protocol = rule.protocol.map_or(6, |protocol| protocol.number());
    let ports = |side: &EntityRule| -> Vec<u16> {
        let both = side.ports.iter().chain(&side.not_ports);
        let edges = both.flat_map(|port| match port {
            Port::Number(number) => vec![*number],
            Port::Range(first, last) => vec![*first, *last],
            Port::Named(_) => Vec::new(),
        });
        edges.collect()
    };
    ports(&rule.destination)
        .into_iter()
        .map(move |port| (protocol, port))
}

fn render(changes: &Changes) -> String {
    let mut text = String::new();
    if changes.is_empty() {
        return "no flow between pods changes\n".to_owned();
    }
    let (mut opened, mut closed) = (0, 0);
    for ((source, destination), services) in changes {
        for (allowed, sign) in [(true, '+'), (false, '-')] {
            let names: Vec<&str> = services
                .iter()
                .filter(|(_, would)| *would == allowed)
                .map(|(service, _)| service.as_str())
                .collect();
            if names.is_empty() {
                continue;
            }
            if allowed {
                opened += names.len();
            } else {
                closed += names.len();
            }
            let style = if allowed { Style::GOOD } else { Style::BAD };
            let line = format!("{sign} {source} to {destination}: {}", names.join(", "));
            let _ = writeln!(text, "{}", style.paint(line));
        }
    }
    let _ = writeln!(
        text,
        "\n{opened} flows would be allowed, {closed} would be denied, of {} pairs of pods",
        changes.len()
    );
    text
}

#[cfg(test)]
mod tests {
    use super::super::{SHOP, objects_of, world_of};
    use super::*;

    #[test]
    fn a_new_policy_shows_which_flows_it_closes_and_opens() {
        let before = world_of(SHOP);
        let new = objects_of(
            r#"[{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"namespace":"shop","name":"web"},
            "spec":{"podSelector":{"matchLabels":{"app":"web"}},"policyTypes":["Ingress"],
            "ingress":[{"from":[{"podSelector":{"matchLabels":{"app":"client"}}}],"ports":[{"port":80}]}]}}]"#,
        );
        let after = changed(&before, new.into_iter(), false);
        insta::assert_snapshot!(render(&compare(&before, &after, false).expect("few pairs")));
    }

    #[test]
    fn the_same_objects_again_change_nothing() {
        let before = world_of(SHOP);
        let after = changed(&before, objects_of(SHOP).into_iter(), false);
        let changes = compare(&before, &after, false).expect("few pairs");
        assert_eq!(render(&changes), "no flow between pods changes\n");
    }
}
