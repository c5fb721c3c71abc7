//! What brings policy into the kernel, behind one interface, so that the same cases hold for all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use cali_netlink::NetNs;
use cali_netlink::nft::{Family, Nft, TableName};

use crate::calc::Batch;
use crate::compile::{Compiler, Program, Touched, plan_transaction};
use crate::dataplane::{Iptables, Variant, write};
use crate::iptables::{self, Renderer};

/// Addresses by interface.
pub type Interfaces = BTreeMap<Arc<str>, BTreeSet<IpAddr>>;

/// Enforces policy in one network namespace.
pub trait Backend: Send + Sync {
    /// Its name, for reports.
    fn name(&self) -> &'static str;

    /// Brings the kernel to what a batch that starts from nothing says, from whatever state it is in.
    ///
    /// # Errors
    /// What the kernel or a check of its state said.
    fn enforce(&mut self, batch: &Batch, interfaces: &Interfaces) -> Result<(), String>;

    /// The rules as people read them, for messages of failed cases.
    fn dump(&self) -> String;
}

/// nf_tables.
#[derive(Debug)]
pub struct Nftables {
    nft: Nft,
    netns: NetNs,
    current: Program,
}

impl Nftables {
    /// For a namespace without rules.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn new(netns: NetNs) -> cali_netlink::Result<Self> {
        Ok(Self {
            nft: Nft::open(&netns)?,
            netns,
            current: Program::absent(),
        })
    }

    /// Brings the kernel to a program, and reads back that it is there.
    ///
    /// # Errors
    /// What the kernel refused, or what differs afterwards.
    pub fn enforce_program(&mut self, desired: &Program) -> Result<(), String> {
        let plan = plan_transaction(&self.current, desired);
        let touched = Touched::all(&self.current, desired);
        if !plan.is_empty() {
            let handles =
                write(&self.nft, plan.steps).map_err(|rejected| format!("{rejected:?}"))?;
            self.current
                .adopt(desired, &touched, &plan.outcome, &handles);
        }
        let listed = self.listed().map_err(|error| error.to_string())?;
        if !plan_transaction(&listed, desired).is_empty() {
            return Err("the kernel differs from what was sent".to_owned());
        }
        let handles = |program: &Program| -> Vec<Option<u64>> {
            let chains = program.chains.values();
            chains
                .flat_map(|chain| chain.rules.iter().map(|rule| rule.handle))
                .collect()
        };
        if handles(&self.current) != handles(&listed) {
            return Err("handles of rules differ from what the kernel answered".to_owned());
        }
        Ok(())
    }

    /// Takes a dump for what is in the kernel.
    pub fn assume(&mut self, listed: Program) {
        self.current = listed;
    }

    /// What is in the kernel.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn listed(&self) -> cali_netlink::Result<Program> {
        let table = TableName::new(Family::Inet, "calico");
        let mut sets = Vec::new();
        for listed in self.nft.sets(&table)? {
            let elements = self.nft.elements(&table, &listed.set)?;
            sets.push((listed.set, elements));
        }
        let chains = self.nft.chains(Some(&table))?;
        let rules = self.nft.rules(&table, None)?;
        Ok(Program::listed(table, chains, rules, sets))
    }
}

impl Backend for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn enforce(&mut self, batch: &Batch, interfaces: &Interfaces) -> Result<(), String> {
        let mut compiler = Compiler::default();
        compiler.set_interfaces(interfaces.clone());
        compiler.apply(batch);
        self.enforce_program(compiler.program())
    }

    fn dump(&self) -> String {
        let output = self.netns.command("nft").args(["list", "ruleset"]).output();
        output.map_or_else(
            |error| format!("(without the program nft: {error})"),
            |output| String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }
}

/// iptables in one of its variants.
#[derive(Debug)]
pub struct IptablesChains {
    kernel: Iptables,
    netns: NetNs,
}

impl IptablesChains {
    /// For a namespace, whatever it holds of ours.
    ///
    /// # Errors
    /// Tables or sets cannot be read.
    pub fn new(netns: NetNs, variant: Variant) -> cali_netlink::Result<Self> {
        Ok(Self {
            kernel: Iptables::adopt(&netns, variant, Instant::now())?,
            netns,
        })
    }

    /// Brings the kernel to chains and sets, and reads back that they are there.
    ///
    /// # Errors
    /// What was refused, or what differs afterwards.
    pub fn enforce_program(&mut self, desired: &iptables::Program) -> Result<(), String> {
        let kernel = &mut self.kernel;
        kernel.touch_all(desired);
        kernel.apply(desired, Instant::now());
        if !kernel.is_complete() {
            return Err(format!("{:?} {:?}", kernel.refused(), kernel.problem()));
        }
        let seen = Iptables::adopt(&self.netns, kernel.variant(), Instant::now())
            .map_err(|error| error.to_string())?;
        match seen.differing(desired).as_slice() {
            [] => Ok(()),
            differing => Err(format!(
                "the kernel differs from what was sent: {differing:?}"
            )),
        }
    }
}

impl Backend for IptablesChains {
    fn name(&self) -> &'static str {
        match self.kernel.variant() {
            Variant::Nft => "iptables-nft",
            Variant::Legacy => "iptables-legacy",
        }
    }

    fn enforce(&mut self, batch: &Batch, interfaces: &Interfaces) -> Result<(), String> {
        let mut renderer = Renderer::default();
        renderer.set_interfaces(interfaces.clone());
        renderer.apply(batch);
        self.enforce_program(renderer.program())
    }

    fn dump(&self) -> String {
        let variant = self.kernel.variant().name();
        let text = ["iptables", "ip6tables"].map(|family| {
            let program = format!("{family}-{variant}-save");
            let output = self.netns.command(&program).arg("-c").output();
            output.map_or_else(
                |error| format!("(without the program {program}: {error})"),
                |output| String::from_utf8_lossy(&output.stdout).into_owned(),
            )
        });
        text.join("\n")
    }
}
