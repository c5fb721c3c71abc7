//! Decides what is garbage. Pure: what was read and the time go in, a plan comes out.
//!
//! - Addresses: those of a deleted node at once; those of a deleted pod after they have looked so for the grace period.
//!   All addresses of a handle, or none.
//! - Affinities of deleted nodes at once, once nothing in this plan is still to be released in their blocks.
//! - Empty blocks of live nodes, claims that were never finished, and handles that name a block in which they hold
//!   nothing: when they were seen so at least twice, the grace period apart, with no write in between.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_api::Cidr;
use cali_api::v3::{Affinity, AffinityType};
use cali_ipam::block::Block;
use cali_ipam::collect::Inventory;
use cali_ipam::{Owner, names};

use crate::facts::Facts;
use crate::judge::{Judge, Orphan, Use, Verdict, WINDOWS_HANDLE};

/// How garbage is collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// How long something must have looked like garbage. `None`: only what a deleted node left behind is collected.
    pub grace: Option<Duration>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            grace: Some(Duration::from_secs(15 * 60)),
        }
    }
}

/// One held address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// The address.
    pub address: IpAddr,
    /// Its block.
    pub block: Cidr,
    /// The block's owner.
    pub affinity: Option<Affinity>,
    /// Who holds it.
    pub owner: Owner,
}

/// All addresses of one handle, none of which is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leak {
    /// The addresses.
    pub addresses: Vec<Allocation>,
    /// Why they are not in use.
    pub orphan: Orphan,
    /// For how long they have been seen so.
    pub waited: Duration,
}

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be released.
    pub leaks: Vec<Leak>,
    /// To be released if they still look so when the grace period is over.
    pub candidates: Vec<Leak>,
    /// Blocks of deleted nodes, to be given up: node and block.
    pub deserted: Vec<(String, Cidr)>,
    /// Blocks without owner, or whose owner is a deleted node without an affinity object.
    pub ownerless: Vec<Cidr>,
    /// Empty blocks and unfinished claims of live nodes.
    pub idle: Vec<(String, Cidr)>,
    /// Handles that name a block in which they hold nothing; without block: that name no block at all.
    pub stale_handles: Vec<(String, Option<Cidr>)>,
    /// Blocks in which released addresses rest, and nothing else is to be done.
    pub resting: Vec<Cidr>,
    /// Why no address is collected, if so.
    pub blind: Vec<String>,
}

/// Something that looks like garbage.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Suspect {
    /// By handle, or by address where there is no handle.
    Handle(String),
    Address(IpAddr),
    Idle(String, Cidr),
    Stale(String, Option<Cidr>),
}

/// Since when it looks just so.
#[derive(Debug, Clone)]
struct Suspicion {
    since: Instant,
    /// Changes when something was written.
    mark: String,
}

/// Remembers what looked like garbage in earlier passes.
#[derive(Debug, Clone)]
pub struct Collector {
    rules: Rules,
    suspects: BTreeMap<Suspect, Suspicion>,
}

impl Collector {
    /// Nothing is suspected yet.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            suspects: BTreeMap::new(),
        }
    }

    /// Other rules from now on; what is suspected stays.
    pub fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Decides. What is not seen as a suspect this time is forgotten.
    pub fn plan(&mut self, inventory: &Inventory, facts: &Facts, now: Instant) -> Plan {
        let mut watch = Watch {
            rules: self.rules,
            known: std::mem::take(&mut self.suspects),
            seen: BTreeMap::new(),
            now,
        };
        let mut plan = Plan {
            blind: facts.unreadable.clone(),
            ..Plan::default()
        };
        let sound: Vec<&Block> = inventory
            .blocks
            .iter()
            .filter(|b| b.defect().is_none())
            .collect();
        if plan.blind.is_empty() {
            plan_leaks(&sound, facts, &mut watch, &mut plan);
            plan_blocks(inventory, &sound, facts, &mut watch, &mut plan);
        }
        plan_handles(inventory, &mut watch, &mut plan);
        self.suspects = watch.seen;
        plan
    }
}

struct Watch {
    rules: Rules,
    known: BTreeMap<Suspect, Suspicion>,
    seen: BTreeMap<Suspect, Suspicion>,
    now: Instant,
}

impl Watch {
    /// For how long the suspect has looked just so; not more than once in a pass.
    fn waited(&mut self, suspect: Suspect, mark: String) -> Duration {
        let since = match self.known.remove(&suspect) {
            Some(before) if before.mark == mark => before.since,
            _ => self.now,
        };
        self.seen.insert(suspect, Suspicion { since, mark });
        self.now.saturating_duration_since(since)
    }

    /// Whether that is long enough. The first sight never is.
    fn is_over(&self, waited: Duration) -> bool {
        !waited.is_zero() && self.rules.grace.is_some_and(|grace| waited >= grace)
    }
}

fn plan_leaks(blocks: &[&Block], facts: &Facts, watch: &mut Watch, plan: &mut Plan) {
    let mut groups: BTreeMap<Suspect, Vec<Allocation>> = BTreeMap::new();
    for block in blocks {
        for (address, owner) in block.held() {
            let suspect = match owner.handle() {
                // One handle for the whole cluster: each block's share is a matter of its own.
                Some(handle) if owner.has_handle(WINDOWS_HANDLE) => {
                    Suspect::Handle(format!("{handle} {}", block.cidr()))
                }
                Some(handle) => Suspect::Handle(handle.to_owned()),
                None => Suspect::Address(address),
            };
            groups.entry(suspect).or_default().push(Allocation {
                address,
                block: block.cidr(),
                affinity: block.affinity().cloned(),
                owner,
            });
        }
    }
    let all: Vec<Owner> = groups.values().flatten().map(|a| a.owner.clone()).collect();
    let judge = Judge::new(facts, all.iter());
    for (suspect, mut addresses) in groups {
        let mut orphans = Vec::with_capacity(addresses.len());
        let mut used = false;
        for allocation in &addresses {
            match judge.judge(
                allocation.address,
                &allocation.owner,
                allocation.affinity.as_ref(),
            ) {
                Verdict::Orphan(orphan) => orphans.push(orphan),
                Verdict::Used(_) => used = true,
            }
        }
        if used {
            continue;
        }
        let Some(orphan) = orphans.iter().min_by_key(|o| o.is_certain()).cloned() else {
            continue;
        };
        addresses.sort_by_key(|a| a.address);
        let mark = format!("{orphan} {addresses:?}");
        let waited = watch.waited(suspect, mark);
        let leak = Leak {
            addresses,
            waited,
            orphan,
        };
        if leak.orphan.is_certain() || watch.is_over(waited) {
            plan.leaks.push(leak);
        } else {
            plan.candidates.push(leak);
        }
    }
}

fn plan_blocks(
    inventory: &Inventory,
    blocks: &[&Block],
    facts: &Facts,
    watch: &mut Watch,
    plan: &mut Plan,
) {
    let by_cidr: BTreeMap<Cidr, &Block> = blocks.iter().map(|b| (b.cidr(), *b)).collect();
    let waiting: BTreeSet<Cidr> = plan
        .candidates
        .iter()
        .flat_map(|leak| leak.addresses.iter().map(|a| a.block))
        .collect();
    let mut announced: BTreeSet<(&str, Cidr)> = BTreeSet::new();
    let mut owned: BTreeMap<(&str, bool), Vec<(Cidr, bool)>> = BTreeMap::new();
    for affinity in &inventory.affinities {
        let (node, cidr) = (affinity.node.as_str(), affinity.cidr);
        announced.insert((node, cidr));
        if is_unreadable(inventory, &cidr) {
            continue;
        }
        if !facts.nodes.contains_key(node) {
            plan.deserted.push((node.to_owned(), cidr));
            continue;
        }
        let block = by_cidr
            .get(&cidr)
            .filter(|b| b.affinity() == Some(&Affinity::host(node)));
        let suspect = Suspect::Idle(node.to_owned(), cidr);
        let mark = block.map_or(0, |b| b.sequence());
        match block {
            Some(block) if block.is_unused() => {
                let waited = watch.waited(suspect, format!("{mark} {:?}", affinity.state));
                let family = owned.entry((node, cidr.is_v4())).or_default();
                family.push((cidr, watch.is_over(waited)));
            }
            Some(_) => owned
                .entry((node, cidr.is_v4()))
                .or_default()
                .push((cidr, false)),
            None if is_damaged(inventory, &by_cidr, &cidr) => {}
            // Somebody else's block, or none: a claim that was lost or never finished.
            None => {
                let waited = watch.waited(suspect, format!("{mark} {:?}", affinity.state));
                if watch.is_over(waited) {
                    plan.idle.push((node.to_owned(), cidr));
                }
            }
        }
    }
    for ((node, _), mut blocks) in owned {
        // One block of each family stays with the node, better one that is in use.
        blocks.sort_by_key(|(cidr, idle)| (*idle, *cidr));
        let idle = blocks.iter().skip(1).filter(|(_, idle)| *idle);
        plan.idle
            .extend(idle.map(|(cidr, _)| (node.to_owned(), *cidr)));
    }
    for block in blocks {
        let cidr = block.cidr();
        let resting = !block.is_unused() && block.held().len() + block.free() < block.capacity();
        match block.affinity() {
            None if block.is_unused() => plan.ownerless.push(cidr),
            Some(Affinity {
                owner: AffinityType::Host,
                name,
            }) if !facts.nodes.contains_key(name.as_str())
                && !announced.contains(&(name.as_str(), cidr))
                && !waiting.contains(&cidr) =>
            {
                plan.ownerless.push(cidr);
            }
            _ if resting => plan.resting.push(cidr),
            _ => {}
        }
    }
}

fn plan_handles(inventory: &Inventory, watch: &mut Watch, plan: &mut Plan) {
    let mut held: BTreeSet<(String, Cidr)> = BTreeSet::new();
    let mut damaged: BTreeSet<Cidr> = BTreeSet::new();
    for block in &inventory.blocks {
        if block.defect().is_some() {
            damaged.insert(block.cidr());
        }
        let handles = block
            .held()
            .into_iter()
            .filter_map(|(_, owner)| Some((owner.handle()?.to_owned(), block.cidr())));
        held.extend(handles);
    }
    for handle in &inventory.handles {
        let id = names::sanitized_handle(&handle.handle_id);
        let mut stale = |suspect: Option<Cidr>, mark: String| {
            let waited = watch.waited(Suspect::Stale(id.clone(), suspect), mark);
            if watch.is_over(waited) {
                plan.stale_handles.push((id.clone(), suspect));
            }
        };
        if handle.block.is_empty() {
            stale(None, String::new());
        }
        for (text, count) in &handle.block {
            let Ok(cidr) = text.parse::<Cidr>() else {
                continue;
            };
            let known = !is_unreadable(inventory, &cidr) && !damaged.contains(&cidr);
            if known && !held.contains(&(id.clone(), cidr)) {
                stale(Some(cidr), count.to_string());
            }
        }
    }
}

fn is_damaged(inventory: &Inventory, sound: &BTreeMap<Cidr, &Block>, cidr: &Cidr) -> bool {
    !sound.contains_key(cidr) && inventory.blocks.iter().any(|b| b.cidr() == *cidr)
}

fn is_unreadable(inventory: &Inventory, cidr: &Cidr) -> bool {
    let name = names::dashed(cidr);
    inventory.unreadable_blocks.contains(&name)
}

/// How many addresses are in which kind of use.
pub fn uses(inventory: &Inventory, facts: &Facts) -> BTreeMap<&'static str, usize> {
    let held: Vec<_> = inventory
        .blocks
        .iter()
        .flat_map(|b| {
            b.held()
                .into_iter()
                .map(|(a, o)| (a, o, b.affinity().cloned()))
        })
        .collect();
    let judge = Judge::new(facts, held.iter().map(|(_, owner, _)| owner));
    let mut uses = BTreeMap::new();
    for (address, owner, affinity) in &held {
        let name = match judge.judge(*address, owner, affinity.as_ref()) {
            Verdict::Used(Use::Pod(_)) => "pods",
            Verdict::Used(Use::Endpoint(_)) => "endpoints",
            Verdict::Used(Use::Tunnel(_)) => "tunnels",
            Verdict::Used(Use::Reserve(_)) => "reserves",
            Verdict::Used(Use::Journal(_)) => "leftToNodes",
            Verdict::Used(Use::Unclassified) => "unclassified",
            Verdict::Orphan(_) => "unused",
        };
        *uses.entry(name).or_default() += 1;
    }
    uses
}
