//! Random policies, labels, sets and probes: the kernel and `felix::verdict` must agree.
//!
//! One graph, one compiler and one kernel table live through all rounds, so that every round is also
//! a change of a running node. A disagreement is narrowed down, object by object, before it is
//! reported. `CALI_RANDOM_SEED` and `CALI_RANDOM_ROUNDS` repeat or lengthen a run.

mod policy_lab;
mod random_policy;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Revision};
use felix::calc::{Direction, Graph, Input};
use felix::compile::{Compiler, Thresholds};
use felix::dataplane::Variant;
use felix::iptables::Renderer;
use felix::verdict::{Model, Packet};
use policy_lab::{By, Lab, Listener, Place, Probe, expected, listen, probe};
use random_policy::{Dice, TCP_PORTS, UDP_PORTS, World};

const PODS: u8 = 4;
const ROUNDS: u64 = 40;
const PROBES_PER_ROUND: usize = 40;

type Objects = BTreeMap<Key, Arc<AnyResource>>;

/// The node under test: from objects to the kernel, with everything it remembers on the way.
struct Node {
    lab: Lab,
    graph: Graph,
    compiler: Compiler,
    renderer: Renderer,
    known: Objects,
}

impl Node {
    fn new(by: By, thresholds: Thresholds) -> Self {
        let mut graph = Graph::new(random_policy::NODE.into());
        graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
        Self {
            lab: Lab::with(PODS, by),
            graph,
            compiler: Compiler::with_thresholds(thresholds),
            renderer: Renderer::default(),
            known: Objects::new(),
        }
    }

    /// Brings the kernel to these objects, by what differs from those before.
    fn enforce(&mut self, objects: &Objects) {
        let gone = self.known.keys().filter(|key| !objects.contains_key(*key));
        let gone = gone.map(|key| (key.clone(), None));
        let changed = objects
            .iter()
            .filter(|(key, object)| self.known.get(*key) != Some(*object))
            .map(|(key, object)| (key.clone(), Some(object.clone())));
        let updates = gone.chain(changed).map(|(key, value)| Update {
            key,
            value,
            revision: Revision::from("1"),
        });
        let updates = SyncEvent::Updates(updates.collect());
        self.graph.handle(Input::Sync(updates));
        self.known = objects.clone();
        if let Some(batch) = self.graph.flush() {
            self.compiler.apply(&batch);
            self.renderer.apply(&batch);
        }
        match self.lab.by {
            By::Nftables => self.lab.enforce(self.compiler.program()),
            By::Iptables(_) => self.lab.enforce_chains(self.renderer.program()),
        }
    }

    fn places(&self) -> Vec<&Place> {
        self.lab.pods.iter().chain([&self.lab.world]).collect()
    }
}

/// One flow to try.
#[derive(Debug, Clone, Copy)]
struct Try {
    from: usize,
    to: usize,
    v4: bool,
    what: Probe,
    source_port: u16,
}

/// Draws flows; no two of a run have the same source port, so that no flow finds another's state.
struct Tries {
    used: u16,
}

impl Tries {
    fn source_port(&mut self, dice: &mut Dice) -> u16 {
        self.used += 1;
        assert!(self.used < 10_000, "too many probes for one run");
        random_policy::SOURCE_RANGES[dice.below(2)].0 + self.used
    }

    fn draw(&mut self, dice: &mut Dice) -> Try {
        let places = usize::from(PODS) + 1;
        let from = dice.below(places);
        let to = (from + 1 + dice.below(places - 1)) % places;
        let what = match dice.below(7) {
            0 => Probe::Ping,
            1..=4 => Probe::Tcp(dice.pick(&TCP_PORTS)),
            _ => Probe::Udp(dice.pick(&UDP_PORTS)),
        };
        let source_port = match what {
            Probe::Ping => 0,
            _ => self.source_port(dice),
        };
        Try {
            from,
            to,
            v4: dice.percent(50),
            what,
            source_port,
        }
    }
}

/// What the kernel does with each flow, and what the model says to it, where the two differ.
fn disagreements(node: &mut Node, objects: &Objects, tries: &[Try]) -> Vec<(Try, String)> {
    node.enforce(objects);
    let model: Model = objects.values().cloned().collect();
    let places = node.places();
    thread::scope(|scope| {
        let sent: Vec<_> = tries
            .iter()
            .map(|flow| {
                let (from, to) = (places[flow.from], places[flow.to].address(flow.v4));
                scope.spawn(move || probe(from.ns.netns(), to, flow.what, flow.source_port))
            })
            .collect();
        let mut differing = Vec::new();
        for (flow, sent) in tries.iter().zip(sent) {
            let address = |place: usize| -> IpAddr { places[place].address(flow.v4) };
            let packet = flow
                .what
                .packet(address(flow.from), address(flow.to), flow.source_port);
            let (from, to) = (places[flow.from], places[flow.to]);
            let (said, why) = expected(&node.lab, &model, &packet, from, to);
            let seen = sent.join().expect("a probe");
            if let Some(enforced) = enforced(&node.compiler, &model, &packet)
                && enforced != said
            {
                let text = format!("{flow:?}: enforced state {enforced}, model {said} ({why})");
                differing.push((*flow, text));
            }
            if seen != Ok(said) {
                differing.push((
                    *flow,
                    format!("{flow:?}: kernel {seen:?}, model {said} ({why})"),
                ));
            }
        }
        differing
    })
}

/// What the compiler's own evaluation says, by which established flows are judged.
fn enforced(compiler: &Compiler, model: &Model, packet: &Packet) -> Option<bool> {
    let ends = [
        (packet.source, Direction::Egress),
        (packet.destination, Direction::Ingress),
    ];
    let verdicts = ends.into_iter().filter_map(|(addr, direction)| {
        compiler.allows(&model.endpoint_of(addr)?, packet, direction)
    });
    verdicts.reduce(|a, b| a && b)
}

/// Leaves out every object that the disagreement does not need.
fn narrow(
    node: &mut Node,
    objects: &Objects,
    flow: Try,
    tries: &mut Tries,
    dice: &mut Dice,
) -> Objects {
    let mut needed = objects.clone();
    for key in objects.keys() {
        let mut fewer = needed.clone();
        fewer.remove(key);
        let mut again = flow;
        if again.source_port != 0 {
            // The same side of the ranges: rules may ask for it.
            let range = usize::from(again.source_port >= random_policy::SOURCE_RANGES[1].0);
            let fresh = tries.source_port(dice);
            let offset = random_policy::SOURCE_RANGES
                .iter()
                .rev()
                .find(|(first, _)| fresh >= *first);
            again.source_port = random_policy::SOURCE_RANGES[range].0
                + (fresh - offset.map_or(0, |(first, _)| *first));
        }
        if !disagreements(node, &fewer, &[again]).is_empty() {
            needed = fewer;
        }
    }
    needed
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[test]
fn nf_tables_and_the_model_agree_on_random_policies() {
    let seed = setting("CALI_RANDOM_SEED", 1);
    agree(By::Nftables, Thresholds::default(), seed, ROUNDS);
}

/// The same where every run of Allow rules is collapsed into lookups, however short it is.
#[test]
fn nf_tables_and_the_model_agree_on_collapsed_policies() {
    let seed = setting("CALI_RANDOM_SEED", 7);
    agree(By::Nftables, Thresholds::EAGER, seed, ROUNDS);
}

#[test]
fn iptables_nft_and_the_model_agree_on_random_policies() {
    let seed = setting("CALI_RANDOM_SEED", 2);
    let by = By::Iptables(Variant::Nft);
    agree(by, Thresholds::default(), seed, ROUNDS / 2);
}

#[test]
fn iptables_legacy_and_the_model_agree_on_random_policies() {
    let seed = setting("CALI_RANDOM_SEED", 3);
    let by = By::Iptables(Variant::Legacy);
    agree(by, Thresholds::default(), seed, ROUNDS / 2);
}

fn agree(by: By, thresholds: Thresholds, seed: u64, rounds: u64) {
    let rounds = setting("CALI_RANDOM_ROUNDS", rounds);
    let mut node = Node::new(by, thresholds);
    let listeners: Vec<Listener> = node
        .places()
        .iter()
        .flat_map(|place| {
            let tcp = TCP_PORTS.into_iter().map(Probe::Tcp);
            tcp.chain(UDP_PORTS.into_iter().map(Probe::Udp))
                .map(|what| listen(place.ns.netns(), what))
        })
        .collect();
    let mut tries = Tries { used: 0 };
    let mut allowed = [0_usize; 2];
    for round in 0..rounds {
        let mut dice = Dice::new(seed.wrapping_mul(1_000_003).wrapping_add(round));
        let objects = World::draw(&mut dice, &node.lab).objects(&node.lab);
        let flows: Vec<Try> = (0..PROBES_PER_ROUND)
            .map(|_| tries.draw(&mut dice))
            .collect();
        listeners.iter().for_each(Listener::drain);
        let differing = disagreements(&mut node, &objects, &flows);
        let model: Model = objects.values().cloned().collect();
        for flow in &flows {
            let places = node.places();
            let address = |place: usize| places[place].address(flow.v4);
            let packet = flow
                .what
                .packet(address(flow.from), address(flow.to), flow.source_port);
            let (from, to) = (places[flow.from], places[flow.to]);
            allowed[usize::from(expected(&node.lab, &model, &packet, from, to).0)] += 1;
        }
        if let Some((flow, text)) = differing.first() {
            eprintln!("seed {seed} round {round}: {text}; narrowing");
            let needed = narrow(&mut node, &objects, *flow, &mut tries, &mut dice);
            node.enforce(&needed);
            let manifests: Vec<String> = needed
                .values()
                .map(|object| object.to_json().to_string())
                .collect();
            panic!(
                "seed {seed} round {round}:\n{}\nneeds only:\n{}\n{}",
                differing
                    .iter()
                    .map(|(_, text)| text.as_str())
                    .collect::<Vec<_>>()
                    .join("\n"),
                manifests.join("\n"),
                node.lab.ruleset()
            );
        }
    }
    let [denied, allowed] = allowed;
    eprintln!("{by:?}: {rounds} rounds: {allowed} flows allowed, {denied} denied");
    assert!(
        allowed > denied / 8 && denied > allowed / 8,
        "one-sided policies show little: {allowed} allowed, {denied} denied"
    );
}
