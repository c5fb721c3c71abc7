//! The renderer and the planner as a whole, without a kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use proptest::prelude::*;

use super::*;
use crate::calc::tests::any_step;
use crate::calc::{Graph, Input, IpVersion};

const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];

struct Rig {
    graph: Graph,
    renderer: Renderer,
    kernel: [Observed; 2],
    /// Sets as a writer has them that only looks at those it is told of.
    sets: BTreeMap<Arc<str>, SetProgram>,
}

impl Rig {
    fn new() -> Self {
        let mut graph = Graph::new("here".into());
        graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
        let mut rig = Self {
            graph,
            renderer: Renderer::default(),
            kernel: Default::default(),
            sets: BTreeMap::new(),
        };
        rig.flush();
        rig
    }

    fn flush(&mut self) {
        if let Some(batch) = self.graph.flush() {
            self.renderer.apply(&batch);
        }
        let program = self.renderer.program();
        for version in VERSIONS {
            let (kernel, family) = (&mut self.kernel[version as usize], program.family(version));
            kernel.adopt(family);
            kernel.forget_unwanted(family);
        }
        for name in self.renderer.take_touched_sets() {
            match self.renderer.program().sets.get(&name) {
                Some(set) => self.sets.insert(name, set.clone()),
                None => self.sets.remove(&name),
            };
        }
    }
}

/// Chains that something leads to and that are not there, and those that nothing leads to.
fn loose_ends(family: &Family) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut missing = BTreeSet::new();
    let mut used = BTreeSet::new();
    let hooks = family.hooks.iter().flat_map(|((table, _), rules)| {
        let all = rules.head.iter().chain(&rules.tail);
        all.map(move |rule| (*table, rule))
    });
    let chains = family.chains.iter();
    let inner =
        chains.flat_map(|((table, _), chain)| chain.rules.iter().map(move |rule| (*table, rule)));
    for (table, rule) in hooks.chain(inner) {
        let mut words = rule.text.split(' ').rev();
        let target = words.next().unwrap_or_default();
        if target.starts_with("cali-") && matches!(words.next(), Some("-j" | "-g")) {
            let key = (table, Arc::from(target));
            if !family.chains.contains_key(&key) {
                missing.insert(format!("{table} {target}"));
            }
            used.insert(key);
        }
    }
    let unused = family.chains.keys().filter(|key| !used.contains(*key));
    let unused = unused.filter(|(_, name)| ![OWN_CHAIN, "cali-pass"].contains(&&**name));
    (
        missing,
        unused
            .map(|(table, name)| format!("{table} {name}"))
            .collect(),
    )
}

/// What `iptables-save` would print of it, among rules of others.
fn saved(family: &Family) -> String {
    let mut text = String::new();
    for table in Table::ALL {
        let _ = writeln!(
            text,
            "*{table}\n:FORWARD ACCEPT [1:2]\n:KUBE-FORWARD - [0:0]"
        );
        for (_, name) in family.chains.keys().filter(|(of, _)| *of == table) {
            let _ = writeln!(text, ":{name} - [0:0]");
        }
        for ((_, chain), rules) in family.hooks.iter().filter(|((of, _), _)| *of == table) {
            for rule in &rules.head {
                let _ = writeln!(text, "-A {chain} {}", rule.line());
            }
            let _ = writeln!(text, "-A {chain} -j KUBE-FORWARD");
            for rule in &rules.tail {
                let _ = writeln!(text, "-A {chain} {}", rule.line());
            }
        }
        for ((_, name), chain) in family.chains.iter().filter(|((of, _), _)| *of == table) {
            for rule in &chain.rules {
                let _ = writeln!(text, "-A {name} {}", rule.line());
            }
        }
        text.push_str("COMMIT\n");
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// After any history the program is that of a fresh start, the sets that were told of are all that changed, nothing
    /// dangles and nothing is left over; and what was written reads back as nothing to do.
    #[test]
    fn any_history_renders_to_the_program_of_a_fresh_start(
        steps in prop::collection::vec((any_step(), any::<bool>()), 1..40),
    ) {
        let mut rig = Rig::new();
        let mut last: Vec<Update> = Vec::new();
        for (update, flush) in steps {
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
        let mut fresh = Rig::new();
        last.into_iter().rev().for_each(|update| fresh.graph.on_update(update));
        fresh.flush();
        let program = rig.renderer.program();
        prop_assert_eq!(program, fresh.renderer.program());
        prop_assert_eq!(&rig.sets, &program.sets);
        let mut late = Renderer::default();
        late.apply(&rig.graph.whole());
        prop_assert_eq!(program, late.program(), "a consumer that starts late");
        let wanted: BTreeSet<&str> = VERSIONS
            .iter()
            .flat_map(|version| program.family(*version).chains.values().flat_map(Chain::sets))
            .collect();
        for name in &wanted {
            prop_assert!(program.sets.contains_key(*name), "set {} is missing", name);
        }
        for version in VERSIONS {
            let family = program.family(version);
            let (missing, unused) = loose_ends(family);
            prop_assert_eq!(missing, BTreeSet::new());
            prop_assert_eq!(unused, BTreeSet::new());
            prop_assert!(plan_restore(&rig.kernel[version as usize], family).is_empty());
            let seen = Observed::parse(&saved(family));
            prop_assert!(plan_restore(&seen, family).is_empty());
            let away = plan_restore(&seen, &Family::default());
            let removed = away.remove.iter().filter(|line| line.text.starts_with("-X ")).count();
            prop_assert_eq!(removed, family.chains.len());
        }
    }
}

fn chain(rules: &[&str]) -> Chain {
    Chain::new(
        "cali-a",
        rules.iter().map(|rule| (*rule).to_owned()).collect(),
    )
}

fn family(rules: &[&str]) -> Family {
    let mut family = Family::default();
    family
        .chains
        .insert((Table::Filter, "cali-a".into()), chain(rules));
    let head = vec!["-j cali-a".to_owned()];
    let tail = vec!["-m mark --mark 0x10000/0x10000 -j ACCEPT".to_owned()];
    family.hooks.insert(
        (Table::Filter, "FORWARD"),
        HookRules::new("FORWARD", head, tail),
    );
    family
}

fn texts(lines: &[Line]) -> Vec<&str> {
    lines.iter().map(|line| line.text.as_str()).collect()
}

#[test]
fn only_what_differs_is_written() {
    let before = family(&["-j ACCEPT"]);
    let seen = Observed::parse(&saved(&before));
    let plan = plan_restore(&seen, &family(&["-j DROP"]));
    let hash = &chain(&["-j DROP"]).rules[0].hash;
    let rule = format!("-A cali-a -m comment --comment \"cali:{hash}\" -j DROP");
    let expected = ["*filter", ":cali-a - [0:0]", &rule, "COMMIT"];
    assert_eq!(texts(&plan.write), expected);
    assert_eq!(texts(&plan.remove), [""; 0]);
    assert_eq!(
        culprit(&plan.write, 3),
        Some(&(Table::Filter, "cali-a".into()))
    );
    assert_eq!(culprit(&plan.write, 4), None);
}

#[test]
fn ours_go_back_to_their_places_and_those_of_others_stay() {
    let wanted = family(&["-j ACCEPT"]);
    let saved = saved(&wanted);
    for (what, text) in [
        (
            "somebody stands before",
            saved.replace("*filter\n", "*filter\n-A FORWARD -j DOCKER\n"),
        ),
        (
            "ours are there twice",
            format!("{saved}*filter\n-A FORWARD -j cali-a\nCOMMIT\n"),
        ),
        ("ours are gone", saved.replace("-A FORWARD -m comment", "#")),
    ] {
        let mut seen = Observed::parse(&text);
        let plan = plan_restore(&seen, &wanted);
        let lines = texts(&plan.write);
        assert!(
            lines
                .iter()
                .all(|line| !line.contains("KUBE") && !line.contains("DOCKER")),
            "{what}: {lines:?}"
        );
        assert!(
            lines.iter().any(|line| line.starts_with("-I FORWARD ")),
            "{what}: {lines:?}"
        );
        assert!(
            lines.iter().any(|line| line.starts_with("-A FORWARD ")),
            "{what}: {lines:?}"
        );
        seen.adopt(&wanted);
        assert!(plan_restore(&seen, &wanted).is_empty(), "{what}");
    }
}

#[test]
fn what_others_have_is_not_ours() {
    let theirs = "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:calico - [0:0]\n\
        -A INPUT -m comment --comment \"cali: short\" -j KUBE-X\n-A KUBE-X -j RETURN\nCOMMIT\n";
    let seen = Observed::parse(theirs);
    assert!(!seen.has_ours() && seen.kubernetes);
    assert_eq!(seen.rules, 2);
    assert!(plan_restore(&seen, &Family::default()).is_empty());
    let calico = "*filter\n:cali-FORWARD - [0:0]\n-A FORWARD -m comment --comment \"cali:0123456789abcdef\" -j cali-FORWARD\nCOMMIT\n";
    let seen = Observed::parse(calico);
    assert!(seen.has_ours() && !seen.is_cali());
}
