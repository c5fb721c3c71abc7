//! Established flows past the rules, as an option (`nftablesFlowTableOffload`): a flowtable in a table of its own.
//!
//! The table stands behind all base chains of policy, so a flow comes here only when policy has accepted it, and only
//! packets of established flows are handed over. From then on the kernel forwards the flow's packets before it looks at
//! rules: whoever changes a verdict takes the table away first ([`table`]), and with it every short cut.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_netlink::nft::{
    DataType, Elem, Expr, Family, Hook, Key, KeyType, Meta, Reg, Rule, Set, TableName, Transaction,
    Verdict, ct_state,
};

use super::base::{TCP, UDP, base_chain};
use super::expr;

const FLOWTABLE: &str = "calico";
const CHAIN: &str = "cali-forward-offload";
/// Interfaces whose packets must all be seen.
const SPARED: &str = "cali-no-flow-offload";
/// Behind the last base chain of policy.
const PRIORITY: i32 = 10;

/// The table of the flowtable.
pub fn table() -> TableName {
    TableName::new(Family::Inet, "calico-offload")
}

/// What the table is to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offload {
    /// Devices between which flows are offloaded, by interface index: one that came again is another one.
    pub devices: BTreeMap<u32, Arc<str>>,
    /// Interfaces of workloads with limits or marks, whose packets must all be seen.
    pub spared: BTreeSet<Arc<str>>,
    /// kube-proxy works in IPVS mode.
    ///
    /// IPVS translates replies back in the forward hook and sets none of the status bits that tell a flowtable of a translation: a
    /// reply that takes the short cut would have the wrong source. The other direction of such a flow never comes through the
    /// forward hook, so only that one hands flows over.
    pub ipvs: bool,
}

impl Offload {
    /// Makes the table; `stands`: in the place of the one that is there.
    pub fn build(&self, stands: bool) -> Transaction {
        let mut transaction = Transaction::new(table());
        if stands {
            transaction.delete_table();
        }
        transaction.add_table();
        transaction.add_flowtable(FLOWTABLE, 0, self.devices.values());
        let spared = Set::exact(SPARED, KeyType::one(DataType::IfName));
        transaction.add_set(&spared);
        let names: Vec<Elem> = self
            .spared
            .iter()
            .map(|name| Elem::new(Key::ifname(name)))
            .collect();
        if !names.is_empty() {
            transaction.add_elements(&spared, &names);
        }
        let chain = base_chain(CHAIN, (Hook::Forward, PRIORITY));
        transaction.add_chain(&chain);
        for key in [Meta::IifName, Meta::OifName] {
            let leave = vec![
                Expr::Meta { key, dreg: Reg::R1 },
                Expr::Lookup {
                    set: SPARED.into(),
                    sreg: Reg::R1,
                    dreg: None,
                    negated: false,
                },
                Expr::Verdict(Verdict::Accept),
            ];
            transaction.append_rule(&chain.name, &Rule::new(leave));
        }
        for protocol in [TCP, UDP] {
            let mut hand_over = expr::protocol(protocol, false).to_vec();
            hand_over.extend(expr::ct_state_any(ct_state::ESTABLISHED));
            if self.ipvs {
                hand_over.extend(expr::original_direction());
            }
            hand_over.push(Expr::FlowOffload(FLOWTABLE.into()));
            transaction.append_rule(&chain.name, &Rule::new(hand_over));
        }
        transaction
    }

    /// From `before` to this by more devices alone; `None` where the table has to be built anew. Devices that are gone
    /// have left it by themselves.
    pub fn extend(&self, before: &Self) -> Option<Transaction> {
        let new = self
            .devices
            .iter()
            .filter(|(index, name)| before.devices.get(index) != Some(name));
        let left = before
            .devices
            .iter()
            .any(|(index, name)| self.devices.get(index).is_some_and(|now| now != name));
        if left || self.spared != before.spared || self.ipvs != before.ipvs {
            return None;
        }
        let mut transaction = Transaction::new(table());
        transaction.add_flowtable(FLOWTABLE, 0, new.map(|(_, name)| name));
        Some(transaction)
    }
}
