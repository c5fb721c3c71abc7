//! Conditions and edits of filters, as Calico's `BGPFilter` has them.

use bgpd::policy::{
    Action, CidrMatch, CidrOperator, Condition, Edit, InterfacePattern, LocalKind, Policy,
    PolicyBuilder, PrefixSet, PriorityRange, RouteView, SourceMatch, Verdict,
    local_pref_of_priority,
};
use bgpd::rib::RouteSource;
use bgpd::wire::{AsPath, Attributes, Community, LargeCommunity, PeerKind, Prefix};

fn p(text: &str) -> Prefix {
    text.parse().expect("a prefix")
}

fn view<'a>(prefix: &str, attributes: &'a Attributes) -> RouteView<'a> {
    RouteView {
        prefix: p(prefix),
        attributes,
        source: RouteSource::Bgp(PeerKind::Ibgp),
        interface: None,
        peer: PeerKind::Ebgp,
    }
}

fn accepts(condition: Condition, view: &RouteView<'_>) -> bool {
    let policy = PolicyBuilder::default()
        .rule("r", vec![condition], vec![], Action::Accept)
        .build(false);
    matches!(policy.evaluate(view), Verdict::Accept(_))
}

#[test]
fn cidr_operators_and_lengths() {
    use CidrOperator::{Equal, In, NotEqual, NotIn};
    let a = Attributes::default();
    let cases = [
        (Equal, "10.0.0.0/16", true),
        (Equal, "10.0.1.0/24", false),
        (NotEqual, "10.0.0.0/16", false),
        (NotEqual, "10.0.1.0/24", true),
        (In, "10.0.0.0/16", true),
        (In, "10.0.1.0/24", true),
        (In, "10.0.0.0/8", false),
        (In, "10.1.0.0/24", false),
        (In, "2001:db8::/32", false),
        (NotIn, "10.0.1.0/24", false),
        (NotIn, "10.1.0.0/24", true),
    ];
    for (operator, prefix, expected) in cases {
        let condition = Condition::Cidr(CidrMatch::new(p("10.0.0.0/16"), operator));
        assert_eq!(
            accepts(condition, &view(prefix, &a)),
            expected,
            "{operator:?} {prefix}"
        );
    }
    let ranged = CidrMatch::new(p("10.0.0.0/16"), In).with_length(Some(24), Some(26));
    for (prefix, expected) in [
        ("10.0.0.0/16", false),
        ("10.0.1.0/24", true),
        ("10.0.1.0/27", false),
    ] {
        assert_eq!(
            accepts(Condition::Cidr(ranged), &view(prefix, &a)),
            expected,
            "{prefix}"
        );
    }
}

#[test]
fn a_prefix_set_covers_what_lies_inside_its_members() {
    let set: PrefixSet = ["10.0.0.0/16", "10.9.0.0/26", "fd00::/48"]
        .map(p)
        .into_iter()
        .collect();
    for (prefix, covered) in [
        ("10.0.0.0/16", true),
        ("10.0.3.64/26", true),
        ("10.0.0.0/8", false),
        ("10.9.0.63/32", true),
        ("10.9.0.64/32", false),
        ("fd00::1/128", true),
        ("fd00:0:1::/64", false),
    ] {
        assert_eq!(set.covers(&p(prefix)), covered, "{prefix}");
    }
}

#[test]
fn source_interface_peer_and_attributes_are_conditions() {
    let attributes = Attributes {
        as_path: AsPath::from_sequence(&[65001, 65002]),
        local_pref: Some(local_pref_of_priority(1024)),
        communities: [Community(65000 << 16 | 5)].into(),
        large_communities: [LargeCommunity {
            global: 1,
            local1: 2,
            local2: 3,
        }]
        .into(),
        ..Attributes::default()
    };
    let remote = view("10.0.0.0/24", &attributes);
    let local = RouteView {
        source: RouteSource::Local(LocalKind::Workload),
        interface: Some("cali0123456789a"),
        ..remote
    };
    let pattern = |text| Condition::Interface(InterfacePattern::new(text));
    let cases = [
        (Condition::Source(SourceMatch::RemotePeers), true, false),
        (Condition::Source(SourceMatch::AnyLocal), false, true),
        (
            Condition::Source(SourceMatch::Local(LocalKind::Block)),
            false,
            false,
        ),
        (pattern("cali*"), false, true),
        (pattern("*.cali"), false, false),
        (pattern("c*0*9a"), false, true),
        (pattern("cali"), false, false),
        (Condition::PeerType(PeerKind::Ebgp), true, true),
        (Condition::PeerType(PeerKind::Ibgp), false, false),
        (Condition::Community(Community(65000 << 16 | 5)), true, true),
        (
            Condition::Community(Community(65000 << 16 | 6)),
            false,
            false,
        ),
        (
            Condition::LargeCommunity(LargeCommunity {
                global: 1,
                local1: 2,
                local2: 3,
            }),
            true,
            true,
        ),
        (Condition::AsPathPrefix([65001].into()), true, true),
        (Condition::AsPathPrefix([65002].into()), false, false),
        (
            Condition::AsPathPrefix([65001, 65002, 1].into()),
            false,
            false,
        ),
        (
            Condition::Priority(PriorityRange {
                min: 1024,
                max: 1024,
            }),
            true,
            true,
        ),
        (
            Condition::Priority(PriorityRange { min: 1, max: 1023 }),
            false,
            false,
        ),
        (
            Condition::Not(Box::new(Condition::AsPathPrefix([65001].into()))),
            false,
            false,
        ),
    ];
    for (condition, of_remote, of_local) in cases {
        let seen = (
            accepts(condition.clone(), &remote),
            accepts(condition.clone(), &local),
        );
        assert_eq!(seen, (of_remote, of_local), "{condition:?}");
    }
}

#[test]
fn the_first_final_rule_decides_and_edits_add_up() {
    let policy = PolicyBuilder::default()
        .rule(
            "mark",
            vec![],
            vec![Edit::AddCommunity(Community(1))],
            Action::Next,
        )
        .rule(
            "no host routes",
            vec![Condition::Length { min: 32, max: 32 }],
            vec![],
            Action::Reject,
        )
        .rule(
            "take",
            vec![],
            vec![
                Edit::PrependAsPath([7, 8].into()),
                Edit::SetLocalPref(local_pref_of_priority(512)),
            ],
            Action::Accept,
        )
        .rule(
            "never reached",
            vec![],
            vec![Edit::SetMed(1)],
            Action::Accept,
        )
        .build(false);
    let mut attributes = Attributes {
        as_path: AsPath::from_sequence(&[9]),
        ..Attributes::default()
    };
    let verdict = policy.evaluate(&view("10.0.0.0/24", &attributes));
    let Verdict::Accept(edits) = verdict else {
        panic!("refused: {verdict:?}");
    };
    assert!(!policy.apply(&edits, &mut attributes));
    assert_eq!(attributes.as_path.to_string(), "7 8 9");
    assert_eq!(attributes.communities[..], [Community(1)]);
    assert_eq!(attributes.local_pref, Some(2_147_483_647 - 512));
    assert_eq!(attributes.med, None);
    let refused = policy.evaluate(&view("10.0.0.1/32", &attributes));
    assert_eq!(refused, Verdict::Reject(Some(1)));
    assert_eq!(policy.rule_origin(1), Some("no host routes"));
}

#[test]
fn what_no_rule_decides_falls_to_the_default() {
    let a = Attributes::default();
    assert!(matches!(
        Policy::accept_all().evaluate(&view("10.0.0.0/8", &a)),
        Verdict::Accept(_)
    ));
    assert_eq!(
        Policy::reject_all().evaluate(&view("10.0.0.0/8", &a)),
        Verdict::Reject(None)
    );
}
