//! Compares what address management has stored with who is in the cluster, for people. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_ipam::collect::Inventory;
use cali_ipam::{Owner, names};

use crate::facts::Facts;
use crate::judge::{Judge, Orphan, Use, Verdict};

/// A held address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Who holds it.
    pub owner: Owner,
    /// What is to be said about it.
    pub verdict: Verdict,
}

/// Something that should not be so.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    /// An address is held and nobody uses it.
    NotUsed {
        /// The address.
        address: IpAddr,
        /// Its handle.
        handle: Option<String>,
        /// Why it is not in use.
        orphan: Orphan,
    },
    /// A tunnel has an address that is in no pool.
    NotInPool {
        /// The address.
        address: IpAddr,
        /// Who uses it.
        user: String,
    },
    /// An address of a pool is in use and nobody holds it: it can be given out a second time.
    NotAllocated {
        /// The address.
        address: IpAddr,
        /// Who uses it.
        user: String,
    },
    /// A handle holds nothing.
    HandleWithoutAddresses {
        /// The handle.
        handle: String,
    },
    /// An address is held by a handle that does not exist or does not know the block.
    AddressWithoutHandle {
        /// The address.
        address: IpAddr,
        /// The handle.
        handle: String,
    },
    /// A block is damaged.
    InvalidBlock {
        /// The block.
        block: String,
        /// What is wrong.
        reason: String,
    },
}

/// The result.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Check {
    /// Every held address.
    pub held: BTreeMap<IpAddr, Held>,
    /// Every address in use by a pod, an endpoint or a tunnel, and who uses it.
    pub used: BTreeMap<IpAddr, String>,
    /// Addresses of tunnels among them.
    pub tunnels: usize,
    /// Addresses of workloads among them that nobody holds and that no pool gives out: another plugin's.
    pub foreign: usize,
    /// Handles that hold something.
    pub sound_handles: usize,
    /// Held addresses of each node.
    pub by_node: BTreeMap<String, usize>,
    /// What should not be so.
    pub problems: Vec<Problem>,
}

/// Compares.
pub fn check(inventory: &Inventory, facts: &Facts) -> Check {
    let mut check = Check::default();
    judge_held(inventory, facts, &mut check);
    for (name, node) in &facts.nodes {
        check.tunnels += node.tunnels.len();
        let user = format!("tunnel of {name}");
        check
            .used
            .extend(node.tunnels.iter().map(|a| (*a, user.clone())));
    }
    check.used.extend(facts.endpoints.clone());
    for (address, (namespace, pod)) in facts.pods_by_address() {
        check.used.insert(address, format!("pod {namespace}/{pod}"));
    }
    for (address, user) in &check.used {
        let (address, user) = (*address, user.clone());
        if check.held.contains_key(&address) {
            continue;
        }
        let mut of_address = inventory
            .pools
            .iter()
            .filter(|p| p.spec.cidr.contains(address));
        if of_address.any(|p| !p.spec.disabled) {
            check.problems.push(Problem::NotAllocated { address, user });
        } else if facts.nodes.values().any(|n| n.tunnels.contains(&address)) {
            check.problems.push(Problem::NotInPool { address, user });
        } else {
            check.foreign += 1;
        }
    }
    compare_handles(inventory, &mut check);
    let damaged = inventory.blocks.iter().filter_map(|block| {
        let reason = block.defect()?;
        Some(Problem::InvalidBlock {
            block: block.cidr().to_string(),
            reason,
        })
    });
    let unreadable = inventory
        .unreadable_blocks
        .iter()
        .map(|name| Problem::InvalidBlock {
            block: name.clone(),
            reason: "it cannot be read".to_owned(),
        });
    check.problems.extend(damaged.chain(unreadable));
    check.problems.sort();
    check
}

fn judge_held(inventory: &Inventory, facts: &Facts, check: &mut Check) {
    let all: Vec<_> = inventory
        .blocks
        .iter()
        .flat_map(|b| b.held().into_iter().map(|(a, o)| (a, o, b.affinity())))
        .collect();
    let judge = Judge::new(facts, all.iter().map(|(_, owner, _)| owner));
    for (address, owner, affinity) in &all {
        let mut verdict = judge.judge(*address, owner, *affinity);
        // A node answers for what it keeps, so that it is no problem here; what it published as a tunnel is one in use.
        if let Verdict::Used(Use::Unclassified) = verdict
            && facts.nodes.values().any(|n| n.tunnels.contains(address))
        {
            verdict = Verdict::Used(Use::Tunnel(String::new()));
        }
        if let Verdict::Orphan(orphan) = &verdict {
            check.problems.push(Problem::NotUsed {
                address: *address,
                handle: owner.handle().map(str::to_owned),
                orphan: orphan.clone(),
            });
        }
        if let Some(node) = owner.attribute("node") {
            *check.by_node.entry(node.to_owned()).or_default() += 1;
        }
        let owner = owner.clone();
        check.held.insert(*address, Held { owner, verdict });
    }
}

fn compare_handles(inventory: &Inventory, check: &mut Check) {
    let mut mentioned: BTreeSet<(String, String)> = BTreeSet::new();
    for handle in &inventory.handles {
        let id = names::sanitized_handle(&handle.handle_id);
        mentioned.extend(handle.block.keys().map(|b| (id.clone(), b.clone())));
    }
    let mut holding: BTreeSet<String> = BTreeSet::new();
    for block in &inventory.blocks {
        for (address, owner) in block.held() {
            let Some(handle) = owner.handle() else {
                continue;
            };
            holding.insert(handle.to_owned());
            if !mentioned.contains(&(handle.to_owned(), block.cidr().to_string())) {
                check.problems.push(Problem::AddressWithoutHandle {
                    address,
                    handle: handle.to_owned(),
                });
            }
        }
    }
    for handle in &inventory.handles {
        let id = names::sanitized_handle(&handle.handle_id);
        if holding.contains(&id) {
            check.sound_handles += 1;
        } else {
            check
                .problems
                .push(Problem::HandleWithoutAddresses { handle: id });
        }
    }
}

#[cfg(test)]
mod tests {
    use cali_api::v3::IPPoolSpec;
    use cali_ipam::pools::Pool;

    use super::*;
    use crate::facts::{NodeFacts, PodFacts};

    fn pool(cidr: &str, disabled: bool) -> Pool {
        let spec = serde_json::json!({"cidr": cidr, "disabled": disabled});
        Pool {
            name: cidr.to_owned(),
            spec: serde_json::from_value::<IPPoolSpec>(spec).unwrap(),
        }
    }

    #[test]
    fn addresses_of_another_plugin_are_no_problem_where_no_pool_gives_them_out() {
        let inventory = Inventory {
            pools: vec![pool("10.65.0.0/24", false), pool("10.66.0.0/24", true)],
            ..Inventory::default()
        };
        let pod = |address: &str| PodFacts {
            addresses: BTreeSet::from([address.parse().unwrap()]),
            ..PodFacts::default()
        };
        let pods = ["10.77.0.2", "10.66.0.2", "10.65.0.2"];
        let mut facts = Facts::default();
        for address in pods {
            let name = ("test".to_owned(), address.to_owned());
            facts.pods.insert(name, pod(address));
        }
        let tunnel = NodeFacts {
            tunnels: BTreeSet::from(["10.78.0.1".parse().unwrap()]),
            ..NodeFacts::default()
        };
        facts.nodes.insert("node1".to_owned(), tunnel);
        let found = check(&inventory, &facts);
        assert_eq!(
            found.foreign, 2,
            "outside of all pools, and in one that gives nothing out"
        );
        let expected = [
            // No other plugin makes tunnels of ours.
            Problem::NotInPool {
                address: "10.78.0.1".parse().unwrap(),
                user: "tunnel of node1".to_owned(),
            },
            // The next pod could be given this one.
            Problem::NotAllocated {
                address: "10.65.0.2".parse().unwrap(),
                user: "pod test/10.65.0.2".to_owned(),
            },
        ];
        assert_eq!(found.problems, expected);
    }
}
