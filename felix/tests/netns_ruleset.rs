//! What the kernel refuses is set aside; everything else is written.

#![allow(
    clippy::unwrap_used,
    reason = "a failed step of a test's set-up is to end the test"
)]

use std::time::{Duration, Instant};

use cali_netlink::nft::{Chain, Expr, Nft, Rule, Verdict};
use cali_netlink::testing::TestNs;
use felix::compile::{ChainProgram, Program};
use felix::dataplane::Ruleset;

fn chain(name: &str, verdict: Verdict) -> ChainProgram {
    ChainProgram::new(Chain::regular(name), [Rule::new([Expr::Verdict(verdict)])])
}

fn program(chains: impl IntoIterator<Item = ChainProgram>) -> Program {
    let chains = chains
        .into_iter()
        .map(|chain| (chain.chain.name.clone(), chain))
        .collect();
    Program {
        exists: true,
        chains,
        ..Program::absent()
    }
}

fn listed(ns: &TestNs, chain: &str) -> String {
    ns.run("nft", &["list", "chain", "inet", "calico", chain])
}

#[test]
fn a_refused_chain_is_closed_or_keeps_its_former_content_and_holds_up_nothing() {
    let ns = TestNs::new("refuse");
    let mut ruleset = Ruleset::adopt(Nft::open(ns.netns()).unwrap()).unwrap();
    let now = Instant::now();
    let nowhere = || Verdict::Jump("cali-nowhere".into());

    let wish = program([
        chain("cali-a", Verdict::Accept),
        chain("cali-new", nowhere()),
    ]);
    ruleset.touch_all(&wish);
    ruleset.apply(&wish, now);
    assert!(listed(&ns, "cali-a").contains("accept"));
    assert!(
        listed(&ns, "cali-new").contains("drop"),
        "a new chain that is refused is closed"
    );
    assert!(ruleset.is_settled() && ruleset.has_chain("cali-a") && !ruleset.has_chain("cali-new"));
    let refused = ruleset.refused();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0].object, "chain cali-new");

    let wish = program([
        chain("cali-a", nowhere()),
        chain("cali-b", Verdict::Return),
        chain("cali-new", nowhere()),
    ]);
    ruleset.touch_all(&wish);
    ruleset.apply(&wish, now);
    assert!(
        listed(&ns, "cali-a").contains("accept"),
        "the former content stays"
    );
    assert!(
        listed(&ns, "cali-b").contains("return"),
        "others are written"
    );

    let wish = program([
        chain("cali-a", Verdict::Drop),
        chain("cali-new", Verdict::Accept),
    ]);
    ruleset.touch_all(&wish);
    ruleset.apply(&wish, now + Duration::from_secs(61));
    assert_eq!(ruleset.refused(), []);
    assert!(listed(&ns, "cali-a").contains("drop") && listed(&ns, "cali-new").contains("accept"));
    assert!(ruleset.has_chain("cali-new") && !ruleset.has_chain("cali-b"));
}
