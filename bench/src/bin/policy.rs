//! What policy costs; see `docs/benchmarks.md`, section "Policy".
//!
//! `policy` runs all scenarios, each in a process of its own, so that resident memory is the scenario's; `policy NAME`
//! runs one: `large`, `small`, `packets`, `set`. Root, because the rules go into a kernel.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cali_bench::bgp::cost::{machine, own_cpu};
use cali_bench::namespace::{Namespace, percentiles};
use cali_bench::policy::{
    Change, Cluster, Node, Path, Rates, connect, established_flow, forget_flows, greet,
    policies_for, received, send_established, send_new,
};
use cali_netlink::NetNs;
use cali_netlink::nft::{DataType, Elem, Family, Key, KeyType, Nft, Set, TableName, Transaction};
use clap::Parser;

const SCENARIOS: [&str; 4] = ["large", "small", "set", "packets"];
/// Single changes of one kind.
const CHANGES: u32 = 300;

/// What policy costs
#[derive(Debug, Parser)]
struct Arguments {
    /// One scenario: large, small, set, packets
    scenario: Option<String>,
    /// Rounds of the packet scenario
    #[arg(long, default_value_t = 15)]
    rounds: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.scenario.as_deref() {
        None => all(&arguments),
        Some("large") => cluster(Cluster {
            pods: 250_000,
            local: 200,
        }),
        Some("small") => cluster(Cluster {
            pods: 3_000,
            local: 30,
        }),
        Some("set") => large_set(),
        Some("packets") => packets(arguments.rounds),
        Some(other) => bail!("no scenario '{other}'; there are {}", SCENARIOS.join(", ")),
    }
}

fn all(arguments: &Arguments) -> Result<()> {
    println!("{}\n", machine());
    let program = std::env::current_exe()?;
    for scenario in SCENARIOS {
        let status = Command::new(&program)
            .arg(scenario)
            .args(["--rounds", &arguments.rounds.to_string()])
            .status()?;
        ensure!(status.success(), "scenario {scenario} failed: {status}");
        println!();
    }
    Ok(())
}

/// Resident memory, now and at most, in MB.
fn memory() -> Result<(f64, f64)> {
    let text = fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| -> Option<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: f64 = line
            .trim_start_matches(':')
            .split_whitespace()
            .next()?
            .parse()
            .ok()?;
        Some(kilobytes / 1024.0)
    };
    field("VmRSS")
        .zip(field("VmHWM"))
        .context("/proc/self/status has no VmRSS")
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn cluster(shape: Cluster) -> Result<()> {
    let (empty, _) = memory()?;
    let namespace = Namespace::new("scale")?;
    let mut node = Node::new(&namespace.netns, false)?;
    let (mut hearing, mut hearing_cpu) = (Duration::ZERO, Duration::ZERO);
    let mut chunk = Vec::new();
    let mut updates = shape.policy_objects().chain(shape.pods()).peekable();
    while let Some(update) = updates.next() {
        chunk.push(update);
        if chunk.len() == 1000 || updates.peek().is_none() {
            let (cpu, start) = (own_cpu(), Instant::now());
            node.hear(std::mem::take(&mut chunk));
            hearing += start.elapsed();
            hearing_cpu += own_cpu().saturating_sub(cpu);
        }
    }
    node.in_sync();
    let first = node.step(Vec::new())?;
    let (resident, peak) = memory()?;
    let [chains, rules, sets, elements] = node.size();
    println!(
        "### {} endpoints, {} policies in the cluster, {} endpoints on this node\n",
        shape.pods,
        shape.policies(),
        shape.local
    );
    println!("| what | elapsed | processor time | |\n|---|---:|---:|---|");
    println!(
        "| start from nothing: objects | {:.0} ms | {:.0} ms | |",
        milliseconds(hearing),
        milliseconds(hearing_cpu)
    );
    println!(
        "| start from nothing: rules in the kernel | {:.0} ms | {:.0} ms | {chains} chains, {rules} rules, {sets} sets, {elements} elements |",
        milliseconds(first.elapsed),
        milliseconds(first.cpu)
    );
    let mut table: BTreeMap<&str, Vec<Change>> = BTreeMap::new();
    for number in 0..CHANGES {
        let remote = shape.remote_neighbour(number);
        let local = shape.local_pod(number);
        let app = (number / shape.local + 1) % 4;
        table
            .entry("one remote pod's label")
            .or_default()
            .push(node.step(vec![shape.pod(remote, app)])?);
        table
            .entry("one local pod's label")
            .or_default()
            .push(node.step(vec![shape.pod(local, app)])?);
    }
    for (what, changes) in table {
        let [median, worst] = spread(&changes, |change| milliseconds(change.cpu));
        let [elapsed, _] = spread(&changes, |change| milliseconds(change.elapsed));
        println!(
            "| {what} changes ({} times) | {elapsed:.2} ms | {median:.2} ms, 99th percentile {worst:.2} ms | |",
            changes.len()
        );
    }
    println!(
        "| resident memory after the start | | | {resident:.0} MB, {peak:.0} MB at most ({empty:.0} MB before) |"
    );
    drop(node);
    transaction_sizes(shape, &namespace)
}

/// The same again, with a plan kept beside, to see what is sent.
fn transaction_sizes(shape: Cluster, namespace: &Namespace) -> Result<()> {
    let mut node = Node::new(&namespace.netns, true)?;
    node.hear(shape.policy_objects().collect());
    node.in_sync();
    node.step(shape.pods().collect())?;
    let mut changes = Vec::new();
    for number in 0..50 {
        let remote = shape.remote_neighbour(number);
        let app = (number / shape.local + 1) % 4;
        changes.push(node.step(vec![shape.pod(remote, app)])?);
    }
    let [bytes, most] = spread(&changes, |change| change.bytes as f64);
    let [messages, _] = spread(&changes, |change| change.messages as f64);
    println!(
        "| its transaction, remote pod | | | {messages:.0} messages, {bytes:.0} octets (at most {most:.0}) |"
    );
    Ok(())
}

/// Median and 99th percentile.
fn spread(changes: &[Change], of: impl Fn(&Change) -> f64) -> [f64; 2] {
    percentiles(changes.iter().map(of).collect())
}

/// One more address in a set of 100,000.
fn large_set() -> Result<()> {
    const MEMBERS: u32 = 100_000;
    let namespace = Namespace::new("set")?;
    let nft = Nft::open(&namespace.netns)?;
    let table = TableName::new(Family::Inet, "calico");
    let set = Set::exact("cali40bench", KeyType::one(DataType::Ipv4Addr));
    let element = |number: u32| {
        Elem::new(Key::ip(
            std::net::Ipv4Addr::from(0x0a00_0000 + number).into(),
        ))
    };
    let mut transaction = Transaction::new(table.clone());
    transaction.add_table();
    transaction.add_set(&set);
    let all: Vec<Elem> = (0..MEMBERS).map(element).collect();
    transaction.add_elements(&set, &all);
    let start = Instant::now();
    nft.commit(transaction)?;
    let filled = start.elapsed();
    let mut times = Vec::new();
    for number in 0..1000 {
        let mut transaction = Transaction::new(table.clone());
        transaction.add_elements(&set, &[element(MEMBERS + number)]);
        let start = Instant::now();
        nft.commit(transaction)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let [median, worst] = percentiles(times);
    println!("### One more address in a set of {MEMBERS}\n");
    println!(
        "Transaction: {median:.0} µs, 99th percentile {worst:.0} µs, of 1000. Filling the set: {:.0} ms.",
        milliseconds(filled)
    );
    Ok(())
}

/// A node and three pods.
struct Scene {
    node: Namespace,
    pods: Vec<Namespace>,
}

impl Scene {
    fn new() -> Result<Self> {
        let node = Namespace::new("node")?;
        node.ip("link set lo up")?;
        node.netns
            .command("sysctl")
            .args(["-qw", "net.ipv4.ip_forward=1"])
            .status()?;
        let mut pods = Vec::new();
        for (number, label) in ["sender", "one", "many"].iter().enumerate() {
            let pod = Namespace::new(label)?;
            let address = format!("10.66.0.{}", number + 1);
            node.ip(&format!(
                "link add calipod{number} type veth peer name eth0 netns {}",
                pod.name
            ))?;
            node.ip(&format!(
                "link set calipod{number} address ee:ee:ee:ee:ee:ee up"
            ))?;
            pod.ip("link set lo up")?;
            pod.ip(&format!(
                "link set eth0 address 02:00:00:00:00:0{number} up"
            ))?;
            pod.ip(&format!("addr add {address}/32 dev eth0"))?;
            pod.ip("neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent")?;
            pod.ip("route add default via 169.254.1.1 dev eth0 onlink")?;
            node.ip(&format!("neigh add {address} lladdr 02:00:00:00:00:0{number} dev calipod{number} nud permanent"))?;
            node.ip(&format!("route add {address} dev calipod{number}"))?;
            pods.push(pod);
        }
        Ok(Self { node, pods })
    }
}

fn packets(rounds: usize) -> Result<()> {
    const POLICIES: usize = 1000;
    const RULES: usize = 10;
    const PACKETS: usize = 50_000;
    const CONNECTIONS: usize = 1000;
    let scene = Scene::new()?;
    let mut node = Node::new(&scene.node.netns, false)?;
    node.in_sync();
    let change = node.step(policies_for(POLICIES, RULES)?)?;
    let pods: Vec<NetNs> = scene.pods.iter().map(|pod| pod.netns.clone()).collect();
    let mut rates = [Rates::default(), Rates::default()];
    let mut flows = Vec::new();
    for path in [Path::One, Path::Many] {
        flows.push(established_flow(&pods, path)?);
    }
    for round in 0..rounds {
        for step in 0..2 {
            // Neither path is always the first.
            let path = if (step + round) % 2 == 0 {
                Path::One
            } else {
                Path::Many
            };
            let into = &mut rates[path.pod() - 1];
            let pod = &pods[path.pod()];
            let before = received(pod)?;
            into.established
                .push(send_established(&flows[path.pod() - 1].0, PACKETS)?);
            arrived(pod, before, PACKETS)?;
            let before = received(pod)?;
            into.new_flows.push(send_new(&pods[0], path, PACKETS)?);
            arrived(pod, before, PACKETS)?;
            into.connections.push(connect(&pods, path, CONNECTIONS)?);
            forget_flows(&scene.node.netns)?;
            // The flow is made again, as an established one.
            let (client, server) = &flows[path.pod() - 1];
            greet(client, server)?;
        }
    }
    let [chains, rules, sets, elements] = node.size();
    println!("### A pod with {POLICIES} policies of {RULES} rules, against a pod with one\n");
    println!(
        "{chains} chains, {rules} rules, {sets} sets, {elements} elements; programmed in {:.0} ms ({:.0} ms of processor time). Medians of {rounds} rounds.\n",
        milliseconds(change.elapsed),
        milliseconds(change.cpu)
    );
    println!("| 1/s | one policy | {POLICIES} policies | ratio |\n|---|---:|---:|---:|");
    type Column = fn(&Rates) -> &Vec<f64>;
    let rows: [(&str, Column); 3] = [
        ("packets of an established flow", |rates| &rates.established),
        ("packets of new flows", |rates| &rates.new_flows),
        ("new TCP connections", |rates| &rates.connections),
    ];
    for (what, values) in rows {
        let [one, many] = [&rates[0], &rates[1]].map(|rates| Rates::median(values(rates)));
        // Of each round its own ratio: what else the machine does changes from round to round.
        let ratios: Vec<f64> = values(&rates[0])
            .iter()
            .zip(values(&rates[1]))
            .map(|(one, many)| many / one)
            .collect();
        println!(
            "| {what} | {one:.0} | {many:.0} | {:.1} % (median of the rounds' ratios) |",
            Rates::median(&ratios) * 100.0
        );
    }
    Ok(())
}

/// All packets have arrived: what was measured is the way to the pod and not the way into a drop.
fn arrived(pod: &NetNs, before: u64, packets: usize) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    let wanted = before + packets as u64;
    loop {
        let seen = received(pod)?;
        if seen >= wanted - packets as u64 / 50 {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "{} of {packets} packets arrived",
            seen - before
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
