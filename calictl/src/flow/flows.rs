//! `calictl flows`: what pods say to each other right now, what became of it, and why.
//!
//! While it runs, a table of its own (`inet calico-flows`, owned by its socket, so that it goes with the program whatever
//! becomes of that) reports the first packet of each flow before policy and after it. A flow that is only seen before was
//! denied. The kernel's word counts; who decided is worked out from the datastore. A node decides on what its own pods send
//! and get: what the other end's node will say of a flow that leaves is told as that.

use std::collections::{HashMap, VecDeque};
use std::io::IsTerminal;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cali_netlink::conntrack::Tuple;
use cali_netlink::nflog::{LoggedPacket, PacketLog};
use cali_netlink::nft::{
    BaseHook, Chain, ChainType, CmpOp, Ct, Expr, Family, Hook, Key, Meta, Nft, Policy, Reg, Rule,
    TableName, Transaction, ct_state,
};
use cali_netlink::{Error, NetNs};
use clap::Args;
use felix::calc::Direction;
use felix::verdict::Model;
use serde_json::json;

use super::explain::{Judgement, judgements};
use super::query::{Service, protocol_name};
use super::world::{Live, Party, World};
use crate::output::{self, Style};

/// Groups that are tried, because one reader has a group at a time.
const GROUPS: std::ops::Range<u16> = 4700..4716;
/// A packet that passes is seen again within this time.
const DECIDED: Duration = Duration::from_millis(250);
/// The same flow is not told again within this time: clients repeat what is not answered.
const QUIET: Duration = Duration::from_secs(10);
/// Flows that may wait for their verdict, and flows that are remembered as told.
const WAITING: usize = 4096;
const TOLD: usize = 16_384;
/// Packets that the kernel reports in a second.
const RATE: u64 = 2000;

/// What is shown.
#[derive(Debug, Args)]
pub(crate) struct Flows {
    /// Only flows that are denied
    #[arg(long)]
    denied: bool,
    /// Only flows from or to this namespace, pod (namespace/name) or address
    #[arg(long, value_name = "WHO")]
    of: Option<String>,
    /// One JSON object for each flow
    #[arg(long)]
    json: bool,
    /// Prefixes of the names of pods' interfaces
    #[arg(long, default_value = "cali", value_delimiter = ',')]
    interfaces: Vec<String>,
    /// End after so many flows
    #[arg(long)]
    count: Option<u64>,
}

/// Runs until it is interrupted, or has shown as many as asked for.
pub(crate) async fn flows(arguments: &Flows) -> Result<ExitCode> {
    let netns = NetNs::current()?;
    let (group, mut packets) = bind(&netns)?;
    // The table goes with this handle.
    let _table = report(&netns, group, &arguments.interfaces)?;
    let mut live = Live::start().await?;
    let mut model = live.world.model();
    let mut pending = Pending::default();
    let mut told = Told::default();
    let mut shown = 0;
    if !arguments.json && std::io::stdout().is_terminal() {
        output::line(Style::DIM.paint("new flows of this node's pods; end with Ctrl-C"));
    }
    let mut tick = tokio::time::interval(DECIDED / 4);
    loop {
        tokio::select! {
            packet = packets.next() => pending.on_packet(packet?, Instant::now()),
            changed = live.next() => {
                if changed? {
                    model = live.world.model();
                }
            }
            _ = tick.tick() => {}
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
        }
        for (tuple, fate) in pending.decided(Instant::now()) {
            if !told.is_new(&tuple, fate.passed, Instant::now()) {
                continue;
            }
            let flow = Flow::explained(&live.world, &model, &tuple, fate);
            if arguments.wants(&flow) {
                output::line(if arguments.json {
                    flow.json()
                } else {
                    flow.line()
                });
                shown += 1;
            }
            if arguments.count.is_some_and(|count| shown >= count) {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
}

impl Flows {
    fn wants(&self, flow: &Flow) -> bool {
        let is = |party: &Party, who: &str| {
            party.name == who
                || party.address.to_string() == who
                || party
                    .name
                    .split_once('/')
                    .is_some_and(|(namespace, _)| namespace == who)
        };
        let of = self
            .of
            .as_deref()
            .is_none_or(|who| is(&flow.source, who) || is(&flow.destination, who));
        of && !(self.denied && flow.fate.passed)
    }
}

fn bind(netns: &NetNs) -> Result<(u16, PacketLog)> {
    let mut last: Option<Error> = None;
    for group in GROUPS {
        match PacketLog::open(netns, group) {
            Ok(log) => return Ok((group, log)),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => {
            Err(error).context("cannot read logged packets; calictl flows runs as root on the node")
        }
        None => bail!("no group to read logged packets from"),
    }
}

/// Puts the reporting chains up.
fn report(netns: &NetNs, group: u16, interfaces: &[String]) -> Result<Nft> {
    let nft = Nft::open(netns)?;
    // Several may run at a time.
    let table = TableName::new(Family::Inet, format!("calico-flows-{group}"));
    let mut transaction = Transaction::new(table);
    transaction.add_owned_table();
    // Policy stands at 0 and 1 of forward and input; raw and mangle before, other tables' filters at 0 as well.
    let places = [
        ("seen-forward", Hook::Forward, -10, [SENT, RECEIVED]),
        ("passed-forward", Hook::Forward, 10, [PASSED, PASSED]),
        ("seen-input", Hook::Input, -10, [SENT, RECEIVED]),
        ("passed-input", Hook::Input, 10, [PASSED, PASSED]),
    ];
    for (name, hook, priority, prefixes) in places {
        let chain = Chain::base(
            name,
            BaseHook {
                chain_type: ChainType::Filter,
                hook,
                priority,
                policy: Policy::Accept,
            },
        );
        transaction.add_chain(&chain);
        let ends: &[Meta] = if hook == Hook::Forward {
            &[Meta::IifName, Meta::OifName]
        } else {
            &[Meta::IifName]
        };
        for (end, prefix) in ends.iter().zip(prefixes) {
            for interface in interfaces {
                transaction.append_rule(&chain.name, &logging(*end, interface, group, prefix));
            }
        }
    }
    nft.commit(transaction)
        .context("cannot put the reporting rules up")?;
    Ok(nft)
}

/// Before policy, of a pod of this node.
const SENT: &str = "sent";
/// Before policy, to a pod of this node.
const RECEIVED: &str = "received";
/// After policy.
const PASSED: &str = "passed";

/// `iifname "cali*" ct state new limit rate ... log prefix ... group ...`
fn logging(end: Meta, interface: &str, group: u16, prefix: &str) -> Rule {
    let name = &interface.as_bytes()[..interface.len().min(15)];
    let equals = |op, value| Expr::Cmp {
        op,
        sreg: Reg::R1,
        value,
    };
    Rule::new([
        Expr::Meta {
            key: end,
            dreg: Reg::R1,
        },
        equals(CmpOp::Eq, Key::bytes(name)),
        Expr::Ct {
            key: Ct::State,
            original: None,
            dreg: Reg::R1,
        },
        Expr::Bitwise {
            sreg: Reg::R1,
            dreg: Reg::R1,
            mask: Key::host32(ct_state::NEW),
            xor: Key::host32(0),
        },
        equals(CmpOp::Neq, Key::host32(0)),
        Expr::Limit {
            rate: RATE,
            per: Duration::from_secs(1),
            burst: 500,
            bytes: false,
            over: false,
        },
        Expr::NfLog {
            group,
            prefix: prefix.to_owned(),
            snaplen: 128,
        },
    ])
}

/// What became of a flow on this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fate {
    /// A pod of this node sends it: egress is decided here.
    sent: bool,
    /// A pod of this node gets it: ingress is decided here.
    received: bool,
    passed: bool,
}

impl Fate {
    fn note(&mut self, prefix: &str) {
        match prefix.trim_end_matches('\0') {
            SENT => self.sent = true,
            RECEIVED => self.received = true,
            PASSED => self.passed = true,
            _ => {}
        }
    }

    fn decides(self, direction: Direction) -> bool {
        match direction {
            Direction::Egress => self.sent,
            Direction::Ingress => self.received,
        }
    }
}

/// Flows that were seen and not decided yet.
#[derive(Debug, Default)]
struct Pending {
    seen: HashMap<Tuple, (Instant, Fate)>,
    order: VecDeque<Tuple>,
}

impl Pending {
    fn on_packet(&mut self, packet: LoggedPacket, now: Instant) {
        if !self.seen.contains_key(&packet.tuple) {
            if self.order.len() >= WAITING {
                return;
            }
            self.order.push_back(packet.tuple);
        }
        let (_, fate) = self
            .seen
            .entry(packet.tuple)
            .or_insert((now, Fate::default()));
        fate.note(&packet.prefix);
    }

    /// Flows whose time is up, with what became of them.
    fn decided(&mut self, now: Instant) -> Vec<(Tuple, Fate)> {
        let mut decided = Vec::new();
        while let Some(tuple) = self.order.front() {
            let Some((at, fate)) = self.seen.get(tuple).copied() else {
                self.order.pop_front();
                continue;
            };
            if now.saturating_duration_since(at) < DECIDED {
                break;
            }
            self.seen.remove(tuple);
            decided.extend(self.order.pop_front().map(|tuple| (tuple, fate)));
        }
        decided
    }
}

/// What was told lately.
#[derive(Debug, Default)]
struct Told {
    known: HashMap<(Tuple, bool), Instant>,
}

impl Told {
    fn is_new(&mut self, tuple: &Tuple, passed: bool, now: Instant) -> bool {
        if self.known.len() >= TOLD {
            self.known
                .retain(|_, at| now.saturating_duration_since(*at) < QUIET);
        }
        if self.known.len() >= TOLD {
            return true;
        }
        let last = self.known.insert((*tuple, passed), now);
        last.is_none_or(|at| now.saturating_duration_since(at) >= QUIET)
    }
}

/// One flow, explained.
#[derive(Debug)]
struct Flow {
    source: Party,
    destination: Party,
    service: Service,
    fate: Fate,
    judgements: Vec<Judgement>,
}

impl Flow {
    fn explained(world: &World, model: &Model, tuple: &Tuple, fate: Fate) -> Self {
        let (source, destination) = (world.at(tuple.source), world.at(tuple.destination));
        let is_icmp = matches!(tuple.protocol, 1 | 58);
        let service = Service {
            protocol: tuple.protocol,
            port: if is_icmp { 0 } else { tuple.destination_port },
        };
        let [kind, code] = tuple.destination_port.to_be_bytes();
        let packet = felix::verdict::Packet {
            source: tuple.source,
            destination: tuple.destination,
            protocol: tuple.protocol,
            source_port: if is_icmp { 0 } else { tuple.source_port },
            destination_port: service.port,
            icmp: is_icmp.then_some((kind, code)),
        };
        let judgements = judgements(world, model, &source, &destination, &packet);
        Self {
            source,
            destination,
            service,
            fate,
            judgements,
        }
    }

    /// Why, in words; the kernel's verdict stands already.
    fn why(&self) -> String {
        let (here, elsewhere): (Vec<_>, Vec<_>) = self
            .judgements
            .iter()
            .partition(|judgement| self.fate.decides(judgement.direction));
        let by =
            |judgement: &Judgement| format!("{} by {}", judgement.direction, judgement.because);
        let denial = here.iter().find(|judgement| !judgement.allowed);
        let mut parts = Vec::new();
        match (self.fate.passed, denial) {
            (false, Some(judgement)) => parts.push(by(judgement)),
            (false, None) => parts.push(
                "policy allows it: something else dropped it (calictl node status names foreign rules)"
                    .to_owned(),
            ),
            (true, Some(judgement)) => parts.push(format!(
                "although {} says no by {}: the policy is not in the kernel yet",
                judgement.direction, judgement.because
            )),
            (true, None) => parts.extend(here.iter().map(|judgement| by(judgement))),
        }
        // Only what passes here comes there.
        for judgement in elsewhere.iter().filter(|_| self.fate.passed) {
            let party = match judgement.direction {
                Direction::Egress => &self.source,
                Direction::Ingress => &self.destination,
            };
            let node = party.node.as_deref().unwrap_or("another node");
            let word = if judgement.allowed {
                "allows"
            } else {
                "DENIES"
            };
            parts.push(format!("{node} {word} {}", by(judgement)));
        }
        let logs = here.iter().flat_map(|judgement| &judgement.logged);
        parts.extend(logs.map(|rule| format!("logged by {rule}")));
        parts.join("; ")
    }

    fn line(&self) -> String {
        let verdict = if self.fate.passed {
            Style::GOOD.paint("allowed")
        } else {
            Style::BAD.paint("denied ")
        };
        let protocol = protocol_name(self.service.protocol);
        let port = match self.service.port {
            0 => String::new(),
            port => format!(" {port}"),
        };
        format!(
            "{verdict}  {} -> {}  {protocol}{port}  {}",
            self.source.name,
            self.destination.name,
            Style::DIM.paint(self.why())
        )
    }

    fn json(&self) -> String {
        let end = |party: &Party| {
            let address: IpAddr = party.address;
            json!({"address": address, "name": party.endpoint.as_ref().map(|_| &party.name)})
        };
        json!({
            "verdict": if self.fate.passed { "allowed" } else { "denied" },
            "source": end(&self.source), "destination": end(&self.destination),
            "protocol": protocol_name(self.service.protocol), "port": self.service.port, "why": self.why(),
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SHOP, world_of};
    use super::*;

    fn tuple(source: &str, destination: &str, port: u16) -> Tuple {
        Tuple {
            source: source.parse().expect("an address"),
            destination: destination.parse().expect("an address"),
            protocol: 6,
            source_port: 40_000,
            destination_port: port,
        }
    }

    fn fate(sent: bool, received: bool, passed: bool) -> Fate {
        Fate {
            sent,
            received,
            passed,
        }
    }

    fn logged(tuple: Tuple, prefix: &str) -> LoggedPacket {
        LoggedPacket {
            prefix: prefix.to_owned(),
            input: None,
            output: None,
            tuple,
        }
    }

    #[test]
    fn a_flow_that_is_seen_only_before_policy_was_denied() {
        let start = Instant::now();
        let (a, b) = (
            tuple("10.65.1.1", "10.65.2.1", 1),
            tuple("10.65.1.2", "10.65.2.1", 2),
        );
        let mut pending = Pending::default();
        pending.on_packet(logged(a, SENT), start);
        pending.on_packet(logged(b, SENT), start);
        pending.on_packet(logged(b, RECEIVED), start);
        pending.on_packet(logged(b, PASSED), start);
        assert_eq!(pending.decided(start), []);
        let fates = [(a, fate(true, false, false)), (b, fate(true, true, true))];
        assert_eq!(pending.decided(start + DECIDED), fates);
        assert_eq!(pending.decided(start + DECIDED), []);
    }

    #[test]
    fn a_repeated_flow_is_told_once() {
        let start = Instant::now();
        let mut told = Told::default();
        let flow = tuple("10.65.1.1", "10.65.2.1", 1);
        assert!(told.is_new(&flow, false, start));
        assert!(!told.is_new(&flow, false, start + QUIET / 2));
        assert!(told.is_new(&flow, true, start + QUIET / 2));
        assert!(told.is_new(&flow, false, start + QUIET * 2));
    }

    #[test]
    fn lines_name_pods_and_what_decided() {
        let world = world_of(SHOP);
        let model = world.model();
        let lines: Vec<String> = [
            ("10.65.1.1", "10.65.2.1", 5432, fate(true, true, false)),
            ("10.65.1.2", "10.65.2.1", 5432, fate(true, true, true)),
            ("10.65.1.2", "10.65.2.1", 5432, fate(true, true, false)),
            ("10.65.1.1", "192.0.2.1", 443, fate(true, false, true)),
            // Only one end is on this node.
            ("10.65.1.1", "10.65.2.1", 5432, fate(true, false, true)),
            ("10.65.1.2", "10.65.2.1", 5432, fate(true, false, true)),
            ("10.65.1.1", "10.65.2.1", 5432, fate(false, true, false)),
            ("10.65.1.2", "10.65.2.1", 5432, fate(false, true, true)),
        ]
        .into_iter()
        .map(|(source, destination, port, fate)| {
            Flow::explained(&world, &model, &tuple(source, destination, port), fate).line()
        })
        .collect();
        insta::assert_snapshot!(lines.join("\n"));
    }
}
