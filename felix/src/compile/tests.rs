//! The compiler and the planner as a whole, without a kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_netlink::nft::{Data, Expr, Verdict};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::calc::tests::{any_step, put};
use crate::calc::{Graph, Input};

/// A graph, a compiler, and what the kernel would have.
struct Rig {
    graph: Graph,
    compiler: Compiler,
    kernel: Program,
    transactions: usize,
    /// How many changes needed a transaction before them.
    prepared: usize,
}

impl Rig {
    fn new(thresholds: Thresholds) -> Self {
        let mut graph = Graph::new("here".into());
        graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
        let mut rig = Self {
            graph,
            compiler: Compiler::with_thresholds(thresholds),
            kernel: Program::absent(),
            transactions: 0,
            prepared: 0,
        };
        rig.flush();
        rig
    }

    fn flush(&mut self) {
        if let Some(batch) = self.graph.flush() {
            self.compiler.apply(&batch);
        }
        let touched = self.compiler.take_touched();
        let desired = self.compiler.program();
        let plan = plan_touched(&self.kernel, desired, &touched);
        self.transactions += usize::from(!plan.is_empty());
        self.prepared += usize::from(!plan.steps[0].is_empty());
        self.kernel.adopt(desired, &touched, &plan.outcome, &[]);
        assert!(!plan.outcome.rebuilds);
    }
}

/// Names that something leads to or looks up, and that are not there.
fn dangling(program: &Program) -> BTreeSet<Arc<str>> {
    let mut missing = BTreeSet::new();
    let mut chain = |verdict: &Verdict| {
        if let Verdict::Jump(name) | Verdict::Goto(name) = verdict
            && !program.chains.contains_key(name)
        {
            missing.insert(name.clone());
        }
    };
    for expr in program
        .chains
        .values()
        .flat_map(|chain| &chain.rules)
        .flat_map(|rule| &rule.rule.exprs)
    {
        if let Expr::Verdict(verdict) = expr {
            chain(verdict);
        }
    }
    for elem in program.sets.values().flat_map(|set| set.elements.iter()) {
        if let Some(Data::Verdict(verdict)) = &elem.data {
            chain(verdict);
        }
    }
    for expr in program
        .chains
        .values()
        .flat_map(|chain| &chain.rules)
        .flat_map(|rule| &rule.rule.exprs)
    {
        if let Expr::Lookup { set: name, .. } | Expr::VerdictMap { map: name, .. } = expr
            && !program.sets.contains_key(name)
        {
            missing.insert(name.clone());
        }
    }
    missing
}

/// Regular chains and sets that nothing needs.
fn unused(program: &Program) -> BTreeSet<Arc<str>> {
    let mut used: BTreeSet<Arc<str>> = BTreeSet::new();
    for expr in program
        .chains
        .values()
        .flat_map(|chain| &chain.rules)
        .flat_map(|rule| &rule.rule.exprs)
    {
        match expr {
            Expr::Verdict(Verdict::Jump(name) | Verdict::Goto(name))
            | Expr::Lookup { set: name, .. }
            | Expr::VerdictMap { map: name, .. } => {
                used.insert(name.clone());
            }
            _ => {}
        }
    }
    for elem in program.sets.values().flat_map(|set| set.elements.iter()) {
        if let Some(Data::Verdict(Verdict::Jump(name) | Verdict::Goto(name))) = &elem.data {
            used.insert(name.clone());
        }
    }
    // Where a map of addresses would lead if its selectors matched anybody: stays with the map's rule, as sets do.
    let counts = |name: &str| name.starts_with("cali-ai-") || name.starts_with("cali-ao-");
    let chains = program
        .chains
        .values()
        .filter(|chain| chain.chain.base.is_none() && !counts(&chain.chain.name))
        .map(|chain| &chain.chain.name);
    // Sets of a rule that can match no packet of the family stay with their selector.
    let sets = program.sets.keys().filter(|name| name.starts_with("cali-"));
    chains
        .chain(sets)
        .filter(|name| !used.contains(*name))
        .cloned()
        .collect()
}

fn rules_of(program: &Program) -> BTreeMap<&str, Vec<Option<u64>>> {
    program
        .chains
        .iter()
        .map(|(name, chain)| (&**name, chain.tags().collect()))
        .collect()
}

/// Sets of selectors, and rules of policy that ask for the family: how many of IPv4 and of IPv6.
fn of_families(program: &Program) -> [(usize, usize); 2] {
    ["cali40", "cali60"].map(|prefix| {
        let is_selectors = |name: &&Arc<str>| {
            let digest = name.strip_prefix(prefix);
            digest.is_some_and(|digest| !digest.starts_with('-'))
        };
        let looks_up = |expr: &Expr| matches!(expr, Expr::Lookup { set, .. } if is_selectors(&set));
        let chains = program.chains.values();
        let rules = chains.flat_map(|chain| &chain.rules);
        let asking = rules.filter(|rule| rule.rule.exprs.iter().any(looks_up));
        let sets = program.sets.keys().filter(is_selectors);
        (sets.count(), asking.count())
    })
}

#[test]
fn a_family_that_no_member_has_costs_neither_sets_nor_rules() {
    let labelled = |namespace: &str, kind: &str, name: &str, labels: Value, spec: Value| {
        put(json!({"apiVersion": "projectcalico.org/v3", "kind": kind,
            "metadata": {"namespace": namespace, "name": name, "labels": labels}, "spec": spec}))
    };
    let pod = labelled(
        "a",
        "WorkloadEndpoint",
        "here-k8s-p-eth0",
        json!({"app": "x"}),
        json!({"orchestrator": "k8s", "node": "here", "pod": "p", "endpoint": "eth0", "interfaceName": "calip",
               "ipNetworks": ["10.0.0.1/32"], "profiles": []}),
    );
    let policy = labelled(
        "a",
        "NetworkPolicy",
        "default.p",
        json!({}),
        json!({"selector": "all()", "types": ["Ingress"], "ingress": [
            {"action": "Allow", "protocol": "TCP", "source": {"selector": "app == 'x'"}, "destination": {"ports": [80, 443]}},
            {"action": "Allow", "source": {"notSelector": "app == 'x'"}}]}),
    );
    let nets = |nets: Value| {
        labelled(
            "a",
            "NetworkSet",
            "n",
            json!({"app": "x"}),
            json!({"nets": nets}),
        )
    };
    let mut rig = Rig::new(Thresholds::default());
    rig.graph.on_update(policy);
    rig.graph.on_update(pod);
    rig.flush();
    let [ipv4, ipv6] = of_families(rig.compiler.program());
    assert_eq!(ipv6, (0, 0));
    assert!(ipv4.0 > 0 && ipv4.1 == 2, "{ipv4:?}");
    // Single ports need no interval set, which would cost a transaction before the change.
    assert_eq!(rig.prepared, 0);
    rig.graph.on_update(nets(json!(["fd00::1/128"])));
    rig.flush();
    let both = of_families(rig.compiler.program());
    assert_eq!(both, [ipv4, ipv4]);
    rig.graph.on_update(nets(json!(["192.0.2.1/32"])));
    rig.flush();
    assert_eq!(of_families(rig.compiler.program()), [ipv4, (0, 0)]);
    assert_eq!(dangling(rig.compiler.program()), BTreeSet::new());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, ..ProptestConfig::default() })]

    /// After any history the program is that of a fresh start, the planner has told the kernel all
    /// of it, nothing dangles and nothing is left over.
    #[test]
    fn any_history_compiles_to_the_program_of_a_fresh_start(
        steps in prop::collection::vec((any_step(), any::<bool>(), any::<Option<bool>>()), 1..50),
        eager in any::<bool>(),
    ) {
        let thresholds = if eager { Thresholds::EAGER } else { Thresholds::default() };
        let mut rig = Rig::new(thresholds);
        let mut last: Vec<Update> = Vec::new();
        for (update, flush, ipvs) in steps {
            if let Some(ipvs) = ipvs {
                rig.compiler.set_ipvs(ipvs);
            }
            let broken = matches!(update.value.as_deref(), Some(cali_api::AnyResource::NetworkPolicy(policy))
                if policy.spec.selector.starts_with("broken"));
            if broken {
                continue;
            }
            last.retain(|other| other.key != update.key);
            last.push(update.clone());
            rig.graph.on_update(update);
            if flush {
                rig.flush();
            }
        }
        rig.flush();
        let mut fresh = Rig::new(thresholds);
        fresh.compiler.set_ipvs(rig.compiler.has_ipvs());
        last.into_iter().rev().for_each(|update| fresh.graph.on_update(update));
        fresh.flush();
        let program = rig.compiler.program();
        prop_assert_eq!(rules_of(program), rules_of(fresh.compiler.program()));
        prop_assert_eq!(&program.sets, &fresh.compiler.program().sets);
        prop_assert_eq!(rules_of(&rig.kernel), rules_of(program));
        prop_assert_eq!(&rig.kernel.sets, &program.sets);
        prop_assert!(plan_transaction(&rig.kernel, program).is_empty());
        prop_assert_eq!(dangling(program), BTreeSet::new());
        prop_assert_eq!(unused(program), BTreeSet::new());
    }
}
