//! The node under test: graph, compiler and a kernel table in a namespace of its own.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_netlink::NetNs;
use cali_netlink::events::{Event, EventStream};
use cali_netlink::nft::Nft;
use felix::calc::{Graph, Input};
use felix::compile::{Compiler, Program, plan_touched};
use felix::dataplane::Ruleset;

use super::NODE;
use crate::bgp::cost::own_cpu;

/// What one change cost.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    /// Processor time until the kernel has it, the kernel's own work among it.
    pub cpu: Duration,
    /// The same as a clock saw it.
    pub elapsed: Duration,
    /// Octets of the transaction.
    pub bytes: usize,
    /// Its messages.
    pub messages: usize,
}

/// See the module's head.
pub struct Node {
    graph: Graph,
    compiler: Compiler,
    ruleset: Ruleset,
    /// What the kernel has, to plan the size of a transaction.
    kernel: Program,
    measure_size: bool,
    /// A node listens to what others do to its table, and so the kernel tells it of everything.
    events: EventStream,
    _runtime: tokio::runtime::Runtime,
}

impl Node {
    /// A node that knows nothing.
    pub fn new(netns: &NetNs, measure_size: bool) -> Result<Self> {
        let nft = Nft::open(netns).context("cannot open nf_tables")?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let events = {
            let _entered = runtime.enter();
            Nft::events(netns)?
        };
        Ok(Self {
            graph: Graph::new(NODE.into()),
            compiler: Compiler::default(),
            ruleset: Ruleset::adopt(nft)?,
            kernel: Program::absent(),
            measure_size,
            events,
            _runtime: runtime,
        })
    }

    /// Takes updates in without a step.
    pub fn hear(&mut self, updates: Vec<Update>) {
        self.graph.handle(Input::Sync(SyncEvent::Updates(updates)));
    }

    /// The datastore has said everything.
    pub fn in_sync(&mut self) {
        self.graph
            .handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
    }

    /// Brings the kernel to what was heard.
    pub fn step(&mut self, updates: Vec<Update>) -> Result<Change> {
        let (cpu, start) = (own_cpu(), Instant::now());
        self.graph.handle(Input::Sync(SyncEvent::Updates(updates)));
        if let Some(batch) = self.graph.flush() {
            self.compiler.apply(&batch);
            self.compiler.take_suspects();
        }
        let touched = self.compiler.take_touched();
        let sizes = self.measure_size.then(|| touched.clone());
        self.ruleset.touch(touched);
        self.ruleset.apply(self.compiler.program(), Instant::now());
        let heard = self.events.burst_so_far()?;
        let told = heard.into_iter().filter_map(|event| match event {
            Event::Nft(event) => Some(event),
            _ => None,
        });
        if self.ruleset.on_events(told) {
            bail!("somebody else changes the table");
        }
        let mut change = Change {
            cpu: own_cpu().saturating_sub(cpu),
            elapsed: start.elapsed(),
            bytes: 0,
            messages: 0,
        };
        if !self.ruleset.is_settled() {
            bail!("the kernel refuses: {:?}", self.ruleset.problem());
        }
        if let Some(touched) = sizes {
            let program = self.compiler.program();
            let plan = plan_touched(&self.kernel, program, &touched);
            change.bytes = plan.bytes();
            change.messages = plan.messages();
            self.kernel.adopt(program, &touched, &plan.outcome, &[]);
        }
        Ok(change)
    }

    /// Chains, rules, sets and elements of the program.
    #[must_use]
    pub fn size(&self) -> [usize; 4] {
        let program = self.compiler.program();
        [
            program.chains.len(),
            program.chains.values().map(|chain| chain.rules.len()).sum(),
            program.sets.len(),
            program.sets.values().map(|set| set.elements.len()).sum(),
        ]
    }
}
