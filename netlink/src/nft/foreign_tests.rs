//! What is said of other programs' rules, from dumps as values and from recorded rule sets as text.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::nft::{BaseHook, Chain, ChainType, CmpOp, Key, Reg, Reject, Rule};

const UFW: &str = include_str!("../testing/hostile/ufw.rules");
const UFW6: &str = include_str!("../testing/hostile/ufw.rules6");
const DOCKER: &str = include_str!("../testing/hostile/docker.rules");
const KUBE_PROXY: &str = include_str!("../testing/hostile/kube-proxy.rules");
const CALICO: &str = include_str!("../testing/hostile/calico.rules");

/// The file is what a program feeds to `iptables-restore --noflush`; a save has the built-in chains as well.
fn saved(rules: &str) -> String {
    let builtin = ":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n";
    rules.replace("*filter\n", &format!("*filter\n{builtin}"))
}

fn lines(droppers: &[Dropper]) -> Vec<String> {
    droppers.iter().map(Dropper::to_string).collect()
}

#[test]
fn ufw_drops_by_policy() {
    let seen = legacy_droppers(Family::Ip, UFW);
    assert_eq!(
        lines(&seen),
        [
            "legacy ip filter INPUT (priority filter, drops by policy, of ufw) can drop what Cali needs to receive on this host",
            "legacy ip filter FORWARD (priority filter, drops by policy, of ufw) can drop what Cali allows",
        ]
    );
    let seen = legacy_droppers(Family::Ip6, UFW6);
    let hooks: Vec<_> = seen.iter().map(|seen| (seen.hook, seen.drops)).collect();
    assert_eq!(
        hooks,
        [
            (Hook::Input, Drops::Policy),
            (Hook::Forward, Drops::Policy),
            // Routing header 0.
            (Hook::Output, Drops::Some),
        ]
    );
}

#[test]
fn docker_drops_by_policy() {
    let seen = legacy_droppers(Family::Ip, DOCKER);
    assert_eq!(
        lines(&seen),
        [
            "legacy ip filter FORWARD (priority filter, drops by policy, of Docker) can drop what Cali allows"
        ]
    );
}

#[test]
fn kube_proxy_drops_only_some() {
    let seen = legacy_droppers(Family::Ip, &saved(KUBE_PROXY));
    assert_eq!(seen.len(), 3, "{:?}", lines(&seen));
    for dropper in &seen {
        assert_eq!(dropper.drops, Drops::Some, "{dropper}");
        assert!(dropper.programs.contains("kube-proxy"), "{dropper}");
    }
}

#[test]
fn a_left_over_calico_is_named() {
    let seen = legacy_droppers(Family::Ip, &saved(CALICO));
    let forward = seen.iter().find(|seen| seen.hook == Hook::Forward).unwrap();
    assert_eq!(
        (forward.drops, forward.programs.iter().copied().collect()),
        (Drops::Some, vec!["a Calico that ran here"])
    );
}

#[test]
fn quoted_words_are_one_word() {
    assert_eq!(
        words(r#"X -m comment --comment "a \"b\" -j DROP" -j Y"#),
        [
            "X",
            "-m",
            "comment",
            "--comment",
            r#"a "b" -j DROP"#,
            "-j",
            "Y"
        ]
    );
    assert_eq!(words(r#"X --comment "" -j Y"#)[2], "");
}

fn table(name: &str) -> TableName {
    TableName::new(Family::Inet, name)
}

fn base(name: &str, priority: i32, policy: Policy) -> ListedChain {
    let base = BaseHook {
        chain_type: ChainType::Filter,
        hook: Hook::Forward,
        priority,
        policy,
    };
    listed(Chain::base(name, base))
}

fn listed(chain: Chain) -> ListedChain {
    ListedChain {
        table: table("firewalld"),
        chain,
        uses: 0,
        handle: 0,
    }
}

fn rule(chain: &str, exprs: impl Into<Vec<Expr>>) -> ListedRule {
    ListedRule {
        table: table("firewalld"),
        chain: chain.into(),
        handle: 0,
        rule: Rule::new(exprs),
    }
}

fn condition() -> Expr {
    Expr::Cmp {
        op: CmpOp::Eq,
        sreg: Reg::R1,
        value: Key::byte(1),
    }
}

#[test]
fn a_rest_that_is_rejected_two_chains_down_is_found() {
    let chains = [
        base("filter_FORWARD", 10, Policy::Accept),
        listed(Chain::regular("zones")),
        listed(Chain::regular("public")),
    ];
    let rules = [
        rule(
            "filter_FORWARD",
            [condition(), Expr::Verdict(Verdict::Accept)],
        ),
        rule(
            "filter_FORWARD",
            [Expr::Verdict(Verdict::Jump("zones".into()))],
        ),
        rule("zones", [Expr::Verdict(Verdict::Goto("public".into()))]),
        rule("public", [Expr::Reject(Reject::Icmpx(3))]),
    ];
    let seen = droppers(&chains, &rules, &[table("calico")]);
    assert_eq!(
        lines(&seen),
        [
            "inet firewalld filter_FORWARD (priority filter+10, drops the rest by a rule, of firewalld) can drop what Cali allows"
        ]
    );
    // Returning before the end of the zone saves it.
    let mut rules = rules.to_vec();
    rules.insert(2, rule("zones", [Expr::Verdict(Verdict::Return)]));
    assert_eq!(droppers(&chains, &rules, &[]), []);
}

#[test]
fn our_own_tables_are_left_out() {
    let chains = [base("forward", 0, Policy::Drop)];
    assert_eq!(droppers(&chains, &[], &[table("firewalld")]), []);
    assert_eq!(
        droppers(&chains, &[], &[table("calico")])[0].drops,
        Drops::Policy
    );
}

#[test]
fn a_chain_that_accepts_the_rest_does_not_drop_by_policy() {
    let chains = [base("forward", 0, Policy::Drop)];
    let rules = [rule("forward", [Expr::Verdict(Verdict::Accept)])];
    assert_eq!(droppers(&chains, &rules, &[]), []);
}

#[test]
fn priorities_are_named_as_nft_names_them() {
    let text = |value, hook| Priority(value, hook).to_string();
    assert_eq!(text(10, Hook::Forward), "filter+10");
    assert_eq!(text(-290, Hook::Output), "raw+10");
    assert_eq!(text(100, Hook::Postrouting), "srcnat");
    assert_eq!(text(100, Hook::Forward), "100");
    assert_eq!(text(-90, Hook::Prerouting), "dstnat+10");
    assert_eq!(text(-155, Hook::Prerouting), "mangle-5");
}

proptest! {
    #[test]
    fn any_text_is_read_without_a_panic(text in "(\\*[a-z]{0,3}\n|:[A-C] (ACCEPT|DROP|-) \\[0:0\\]\n|-A [A-C] (-m x |-i \"[a ]\" )?-(j|g) ([A-C]|DROP|RETURN|ACCEPT)\n|COMMIT\n|\\PC{0,9}\n){0,30}") {
        legacy_droppers(Family::Ip, &text);
    }
}
