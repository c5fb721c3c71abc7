//! Random policies, labels, sets and probes: the kernel and `felix::verdict` must agree.
//!
//! One graph, one compiler and one kernel table live through all rounds, so that every round is also
//! a change of a running node. A disagreement is narrowed down, object by object, before it is
//! reported. `CALI_RANDOM_SEED` and `CALI_RANDOM_ROUNDS` repeat or lengthen a run.

mod policy_lab;
mod random_policy;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Revision};
use cali_netlink::NetNs;
use felix::calc::{Direction, Graph, Input};
use felix::compile::{Compiler, Thresholds};
use felix::dataplane::Variant;
use felix::iptables::Renderer;
use felix::verdict::{Model, Packet};
use policy_lab::{By, Lab, Listener, Place, Probe, listen, probe};
use random_policy::{Dice, SCTP_PORTS, TCP_PORTS, UDP_PORTS, World};

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
        let lab = Lab::with(PODS, by);
        let mut compiler = Compiler::with_thresholds(thresholds);
        compiler.set_interfaces(lab.interfaces());
        let mut renderer = Renderer::default();
        renderer.set_interfaces(lab.interfaces());
        Self {
            lab,
            graph,
            compiler,
            renderer,
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

    /// A place by its number; `None` for the node itself, which comes last.
    fn place(&self, number: usize) -> Option<&Place> {
        let outside = [&self.lab.world, &self.lab.lan];
        self.lab.pods.iter().chain(outside).nth(number)
    }

    fn netns(&self, number: usize) -> &NetNs {
        let place = self.place(number);
        place.map_or(self.lab.node.netns(), |place| place.ns.netns())
    }

    /// The flow's first packet.
    fn packet(&self, flow: &Try) -> Packet {
        let address = |number: usize, other: usize| match self.place(number) {
            Some(place) => place.address(flow.v4),
            None => {
                let towards = self.place(other).unwrap_or(&self.lab.world);
                self.lab.host_address(towards, flow.v4)
            }
        };
        let (source, destination) = (address(flow.from, flow.to), address(flow.to, flow.from));
        flow.what.packet(source, destination, flow.source_port)
    }

    fn expected(&self, model: &Model, flow: &Try) -> (bool, String) {
        let ends = [flow.from, flow.to]
            .map(|number| self.place(number).map(|place| place.interface.as_str()));
        let packet = self.packet(flow);
        let said = felix::conformance::expected(model, &packet, ends, &self.lab.interfaces());
        (said.allowed, said.reasons.join(", "))
    }
}

/// Pods, both places outside, the node itself.
const PLACES: usize = PODS as usize + 3;

/// One flow to try.
#[derive(Debug, Clone, Copy)]
struct Try {
    from: usize,
    to: usize,
    v4: bool,
    what: Probe,
    source_port: u16,
}

impl Try {
    /// Between pods, or a pod and others that have no policy of their own.
    fn is_of_workloads(&self) -> bool {
        [self.from, self.to]
            .into_iter()
            .all(|place| place < usize::from(PODS))
    }
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
        // Every second one is between pods.
        let places = dice.pick(&[usize::from(PODS), PLACES]);
        let from = dice.below(places);
        let to = (from + 1 + dice.below(places - 1)) % places;
        let what = match dice.below(8) {
            0 => Probe::Ping,
            1 => Probe::Sctp(dice.pick(&SCTP_PORTS)),
            2..=5 => Probe::Tcp(dice.pick(&TCP_PORTS)),
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
    let hosts = objects
        .values()
        .any(|object| matches!(&**object, AnyResource::HostEndpoint(_)));
    let seen = send_all(node, tries);
    let mut differing = Vec::new();
    for (flow, seen) in tries.iter().zip(seen) {
        let (said, why) = node.expected(&model, flow);
        // That judges established flows of workloads.
        if (flow.is_of_workloads() || !hosts && flow.from < PLACES - 1)
            && let Some(enforced) = enforced(&node.compiler, &model, &node.packet(flow))
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
}

/// What the kernel does with each flow.
fn send_all(node: &Node, tries: &[Try]) -> Vec<Result<bool, String>> {
    let send = |flow: &Try| {
        let (from, to) = (node.netns(flow.from), node.packet(flow).destination);
        probe(from, to, flow.what, flow.source_port)
    };
    // A raw socket hears of every refusal of its protocol between two addresses: these go one after another.
    let by_hand = |flow: &&Try| matches!(flow.what, Probe::Sctp(_));
    thread::scope(|scope| {
        let alone = scope.spawn(move || tries.iter().filter(by_hand).map(send).collect::<Vec<_>>());
        let together: Vec<_> = tries
            .iter()
            .filter(|flow| !by_hand(flow))
            .map(|flow| scope.spawn(move || send(flow)))
            .collect();
        let mut alone = alone.join().expect("probes").into_iter();
        let mut together = together.into_iter();
        let answer = |flow: &Try| {
            if by_hand(&flow) {
                alone.next().expect("an answer")
            } else {
                together.next().expect("a probe").join().expect("a probe")
            }
        };
        tries.iter().map(answer).collect()
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
    let listeners: Vec<Listener> = (0..PLACES)
        .flat_map(|place| {
            let tcp = TCP_PORTS.into_iter().map(Probe::Tcp);
            let udp = UDP_PORTS.into_iter().map(Probe::Udp);
            let sctp = SCTP_PORTS.into_iter().map(Probe::Sctp);
            let all: Vec<Probe> = tcp.chain(udp).chain(sctp).collect();
            all.into_iter()
                .map(|what| listen(node.netns(place), what))
                .collect::<Vec<_>>()
        })
        .collect();
    let mut tries = Tries { used: 0 };
    let mut allowed = [0_usize; 2];
    for round in 0..rounds {
        let mut dice = Dice::new(seed.wrapping_mul(1_000_003).wrapping_add(round));
        let objects = World::draw(&mut dice, &node.lab, by == By::Nftables).objects(&node.lab);
        let flows: Vec<Try> = (0..PROBES_PER_ROUND)
            .map(|_| tries.draw(&mut dice))
            .collect();
        listeners.iter().for_each(Listener::drain);
        let differing = disagreements(&mut node, &objects, &flows);
        let model: Model = objects.values().cloned().collect();
        for flow in &flows {
            allowed[usize::from(node.expected(&model, flow).0)] += 1;
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
