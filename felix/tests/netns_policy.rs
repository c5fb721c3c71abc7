//! Policy conformance: the cases of `tests/conformance`, each with real packets and through the model, on each backend.

mod policy_lab;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cali_netlink::NetNs;
use felix::compile::{Compiler, plan_transaction};
use felix::conformance::{self, Backend, File, IptablesChains, Nftables};
use felix::dataplane::Variant;
use policy_lab::{By, Lab};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance")
}

fn backend(by: By, netns: NetNs) -> Result<Box<dyn Backend>, String> {
    let backend: cali_netlink::Result<Box<dyn Backend>> = match by {
        By::Nftables => Nftables::new(netns).map(|rules| Box::new(rules) as _),
        By::Iptables(variant) => {
            IptablesChains::new(netns, variant).map(|chains| Box::new(chains) as _)
        }
    };
    backend.map_err(|error| error.to_string())
}

fn run_file(name: &str, by: By) {
    let make = |netns| backend(by, netns);
    let report = conformance::run_file(&folder().join(name), make).expect("a file of cases");
    eprintln!(
        "{name} by {by:?}: {} cases, {} probes",
        report.cases, report.probes
    );
    assert!(
        report.cases > 0 && report.probes >= report.cases,
        "{report:?}"
    );
    let failures: Vec<String> = report
        .failures
        .iter()
        .map(|(case, failures)| format!("{case}:\n  {}", failures.join("\n  ")))
        .collect();
    assert!(
        failures.is_empty(),
        "{} cases disagree:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

macro_rules! conformance {
    ($($test:ident: $file:literal),+ $(,)?) => {
        conformance!(@backend nftables By::Nftables; $($test: $file),+);
        conformance!(@backend iptables_nft By::Iptables(Variant::Nft); $($test: $file),+);
        conformance!(@backend iptables_legacy By::Iptables(Variant::Legacy); $($test: $file),+);

        #[test]
        fn every_file_of_cases_is_run() {
            let found = conformance::files(&folder()).expect("the cases");
            let found: BTreeSet<String> =
                found.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect();
            assert_eq!(found, BTreeSet::from([$($file.to_owned()),+]));
        }
    };
    (@backend $module:ident $by:expr; $($test:ident: $file:literal),+) => {
        mod $module {
            use super::*;

            $(
                #[test]
                fn $test() {
                    run_file($file, $by);
                }
            )+
        }
    };
}

conformance! {
    profiles_decide_without_policy: "basics.yaml",
    calico_policies_are_enforced: "calico.yaml",
    cluster_policies_are_enforced: "cluster.yaml",
    host_endpoints_are_protected: "hosts.yaml",
    every_condition_of_a_rule_holds: "rules.yaml",
    every_form_of_selector_holds: "selectors.yaml",
    services_are_peers: "services.yaml",
    staged_policies_are_only_shown: "staged.yaml",
    kubernetes_policies_are_enforced: "kubernetes.yaml",
    tiers_are_enforced: "tiers.yaml",
}

#[test]
fn what_a_stranger_changes_is_put_right_and_the_rest_is_left_alone() {
    let mut lab = Lab::new(2);
    let text = std::fs::read_to_string(folder().join("calico.yaml")).expect("the cases");
    let file: File = serde_saphyr::from_str(&text).expect("cases");
    let mut case = file.cases.into_iter().next().expect("a case");
    case.pods.truncate(2);
    let objects = case.objects(&lab).expect("objects");
    let mut compiler = Compiler::default();
    compiler.apply(&conformance::compile_batch(&objects).expect("a batch"));
    let desired = compiler.program().clone();
    lab.enforce(&desired);
    assert!(plan_transaction(&lab.listed(), &desired).is_empty());
    let chain = "cali-forward-to-wl";
    let handle = lab.listed().chains[chain].rules[1]
        .handle
        .expect("a handle")
        .to_string();
    for change in [
        vec!["delete", "rule", "inet", "calico", chain, "handle", &handle],
        vec!["insert", "rule", "inet", "calico", chain, "accept"],
        vec!["flush", "map", "inet", "calico", "cali-to-wl"],
        vec!["add", "chain", "inet", "calico", "stranger"],
    ] {
        lab.node.run("nft", &change);
        let listed = lab.listed();
        let plan = plan_transaction(&listed, &desired);
        assert_eq!(plan.messages(), 1, "one message for {change:?}");
        lab.assume(listed);
        lab.enforce(&desired);
    }
}
