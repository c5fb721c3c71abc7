//! The conformance lab with the nftables backend, as tests use it that look into the kernel themselves.

// Each test file uses its part of the lab.
#![allow(dead_code, unused_imports)]

use std::net::IpAddr;
use std::ops::Deref;

use cali_netlink::NetNs;
use felix::compile::Program;
use felix::conformance::{Backend, Nftables};
pub(crate) use felix::conformance::{Lab as Places, Listener, Place, Probe, listen};
use felix::verdict::{Model, Packet};

/// A node, its pods and the world, and its rules.
pub(crate) struct Lab {
    places: Places,
    rules: Nftables,
}

impl Deref for Lab {
    type Target = Places;

    fn deref(&self) -> &Places {
        &self.places
    }
}

impl Lab {
    pub(crate) fn new(pods: u8) -> Self {
        let places = Places::new(pods);
        let rules = Nftables::new(places.node.netns().clone()).expect("open nf_tables");
        Self { places, rules }
    }

    /// Brings the kernel to a program with one transaction, and reads back that it is there.
    pub(crate) fn enforce(&mut self, desired: &Program) {
        if let Err(problem) = self.rules.enforce_program(desired) {
            panic!("{problem}:\n{}", self.ruleset());
        }
    }

    /// Takes a dump for what is in the kernel.
    pub(crate) fn assume(&mut self, listed: Program) {
        self.rules.assume(listed);
    }

    pub(crate) fn listed(&self) -> Program {
        self.rules.listed().expect("list the table")
    }

    /// What `nft` itself makes of the rules: for messages of failed tests.
    pub(crate) fn ruleset(&self) -> String {
        self.rules.dump()
    }
}

/// What the model says, on the whole way of a packet between two places.
pub(crate) fn expected(
    lab: &Lab,
    model: &Model,
    packet: &Packet,
    from: &Place,
    to: &Place,
) -> (bool, String) {
    let ends = [from, to].map(|place| Some(place.interface.as_str()));
    let said = felix::conformance::expected(model, packet, ends, &lab.interfaces());
    (said.allowed, said.reasons.join(", "))
}

/// Whether the other end answers; an error when neither an answer nor a refusal comes.
pub(crate) fn probe(ns: &NetNs, to: IpAddr, what: Probe, source_port: u16) -> Result<bool, String> {
    felix::conformance::probe(ns, to, what, source_port, false).verdict(false)
}
