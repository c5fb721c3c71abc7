//! The hostile host itself, and nf_tables transactions beside everything on it. Run as root.

#![allow(clippy::unwrap_used)]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use cali_netlink::{
    nft::{
        BaseHook, Chain, ChainType, Expr, Family, Hook, Nft, Policy, Rule, TableName, Transaction,
        Verdict,
        foreign::{Drops, legacy_droppers},
    },
    testing::{
        TestNs, eventually,
        hostile::{self, Churn, Fixture, Host, Ours, Remover, RemoverPlan},
    },
};

fn table() -> TableName {
    TableName::new(Family::Inet, "calico")
}

/// A table with one base chain and two rules, as a stand-in for what felix programs.
fn program() -> Transaction {
    let mut transaction = Transaction::new(table());
    transaction.add_table();
    let hook = BaseHook {
        chain_type: ChainType::Filter,
        hook: Hook::Forward,
        priority: 0,
        policy: Policy::Accept,
    };
    transaction.add_chain(&Chain::base("forward", hook));
    transaction.add_chain(&Chain::regular("workload"));
    let jump = Rule::new([Expr::Verdict(Verdict::Jump("workload".into()))]);
    transaction.append_rule(&"forward".into(), &jump);
    let accept = Rule::new([Expr::Verdict(Verdict::Accept)]);
    transaction.append_rule(&"workload".into(), &accept);
    transaction
}

#[test]
fn every_fixture_loads_and_is_seen_in_the_dump() {
    let empty = hostile::dump(&TestNs::new("hempty"), &Ours::default());
    for fixture in hostile::all() {
        let ns = TestNs::new("hone");
        fixture.apply(&ns);
        let with = hostile::dump(&ns, &Ours::default());
        assert_ne!(with, empty, "{fixture} left no trace");
        with.assert_same(&hostile::dump(&ns, &Ours::default()));
    }
}

#[test]
fn the_dump_shows_a_foreign_rule_that_was_deleted() {
    let ns = TestNs::new("hseen");
    let host = Host::apply(&ns, &[Fixture::Firewalld], Ours::default());
    ns.run(
        "nft",
        &["flush", "chain", "inet", "firewalld", "filter_FORWARD"],
    );
    let panic = catch_unwind(AssertUnwindSafe(|| host.assert_untouched(&ns))).unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    assert!(text.contains("inet firewalld:"), "{text}");
    assert!(
        text.contains("gone: chain filter_FORWARD: reject with icmpx admin-prohibited"),
        "{text}"
    );
}

#[test]
fn our_routes_are_not_in_the_dump_and_foreign_ones_with_our_protocol_are() {
    let ns = TestNs::new("hroutes");
    let host = Host::apply(&ns, &[Fixture::Routes], Ours::default());
    ns.ip("route add blackhole 192.168.1.0/26 proto 80");
    ns.ip("route add 192.168.2.0/26 via 172.30.0.9 proto bird");
    host.assert_untouched(&ns);
    ns.ip("route del blackhole 172.31.2.0/24");
    catch_unwind(AssertUnwindSafe(|| host.assert_untouched(&ns)))
        .expect_err("the loss of a foreign blackhole with protocol 80");
}

#[test]
fn a_table_comes_and_goes_beside_every_fixture() {
    for fixture in hostile::all() {
        let ns = TestNs::new("hnft");
        let host = Host::apply(&ns, &[*fixture], Ours::default());
        let nft = Nft::open(ns.netns()).unwrap();
        nft.commit(program())
            .unwrap_or_else(|error| panic!("beside {fixture}: {error}"));
        assert_eq!(nft.rules(&table(), None).unwrap().len(), 2, "{fixture}");
        host.assert_untouched(&ns);
        let mut removal = Transaction::new(table());
        removal.delete_table();
        nft.commit(removal).unwrap();
        host.assert_untouched(&ns);
    }
}

#[test]
fn transactions_go_through_while_iptables_changes_chains() {
    let ns = TestNs::new("hchurn");
    let host = Host::apply(&ns, hostile::crowded(), Ours::default());
    let nft = Nft::open(ns.netns()).unwrap();
    nft.commit(program()).unwrap();
    let first = nft.generation().unwrap();
    {
        let churn = Churn::start(&ns, Duration::from_secs(30));
        let mut commits = 0;
        eventually(Duration::from_secs(30), || {
            let mut transaction = Transaction::new(table());
            let rule = Rule::new([Expr::Verdict(Verdict::Continue)]);
            transaction.append_rule(&"workload".into(), &rule);
            nft.commit(transaction).unwrap();
            commits += 1;
            if churn.changes() >= 20 {
                Ok(())
            } else {
                Err(format!("{} changes", churn.changes()))
            }
        });
        let rules = nft.rules(&table(), Some("workload")).unwrap();
        assert_eq!(rules.len(), commits + 1);
    }
    assert!(nft.generation().unwrap() > first + 20);
    host.assert_untouched(&ns);
}

#[test]
fn the_remover_spares_what_it_was_told_to() {
    let ns = TestNs::new("hremove");
    Fixture::Routes.apply(&ns);
    ns.ip("rule add pref 31002 from 192.0.2.0/24 lookup 1000 proto bird");
    // The IPv6 rule of the fixture has no protocol (what `ip rule add` does), so it goes as well.
    let remover = Remover::start(&ns, RemoverPlan::default());
    eventually(Duration::from_secs(10), || {
        let removed = remover.removed();
        let (routes, nexthops) = (ns.ip("route"), ns.ip("nexthop"));
        let gone = ["proto bird", "proto 80", "proto zebra"]
            .iter()
            .all(|protocol| !routes.contains(protocol) && !nexthops.contains(protocol));
        if gone && removed.routes == 4 && removed.nexthops == 1 && removed.rules == 2 {
            Ok(())
        } else {
            Err(format!("{removed:?}\n{routes}{nexthops}"))
        }
    });
    drop(remover);
    assert!(
        ns.ip("route").contains("192.168.200.0/24"),
        "{}",
        ns.ip("route")
    );
    assert!(ns.ip("rule").contains("31000:"), "{}", ns.ip("rule"));
    assert!(ns.ip("nexthop").contains("id 77"), "{}", ns.ip("nexthop"));
}

#[test]
fn whoever_drops_the_rest_is_named() {
    let expected: [(Fixture, &[&str]); 4] = [
        (
            Fixture::Firewalld,
            &[
                "inet firewalld filter_FORWARD (priority filter+10, drops the rest by a rule, of firewalld) can drop what Cali allows",
                "inet firewalld filter_INPUT (priority filter+10, drops the rest by a rule, of firewalld) can drop what Cali needs to receive on this host",
            ],
        ),
        (
            Fixture::Ufw,
            &[
                "ip filter FORWARD (priority filter, drops by policy, of ufw) can drop what Cali allows",
                "ip filter INPUT (priority filter, drops by policy, of ufw) can drop what Cali needs to receive on this host",
                "ip6 filter FORWARD (priority filter, drops by policy, of ufw) can drop what Cali allows",
                "ip6 filter INPUT (priority filter, drops by policy, of ufw) can drop what Cali needs to receive on this host",
            ],
        ),
        (
            Fixture::Docker,
            &[
                "ip filter FORWARD (priority filter, drops by policy, of Docker) can drop what Cali allows",
            ],
        ),
        (Fixture::KubeProxyNftables, &[]),
    ];
    for (fixture, expected) in expected {
        let ns = TestNs::new("hdrop");
        fixture.apply(&ns);
        let nft = Nft::open(ns.netns()).unwrap();
        let all = nft.droppers(&[table()]).unwrap();
        let mut seen: Vec<_> = all
            .iter()
            .filter(|dropper| dropper.drops > Drops::Some)
            .map(ToString::to_string)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, expected, "{fixture}: {all:#?}");
    }
}

#[test]
fn the_legacy_tables_are_read_from_what_their_tool_prints() {
    let ns = TestNs::new("hdropleg");
    Fixture::KubeProxyLegacy.apply(&ns);
    let saved = ns.run("iptables-legacy-save", &[]);
    let seen = legacy_droppers(Family::Ip, &saved);
    assert!(
        seen.iter()
            .any(|seen| seen.hook == Hook::Forward && seen.programs.contains("kube-proxy")),
        "{seen:#?}"
    );
    let nft = Nft::open(ns.netns()).unwrap();
    assert_eq!(
        nft.droppers(&[table()]).unwrap(),
        [],
        "nf_tables does not show them"
    );
}
