use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn parse(text: &str) -> Selector {
    Selector::parse(text).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

#[test]
fn expressions_select_as_calico_defines() {
    let web = labels(&[
        ("app", "web"),
        ("tier/x.y_z-1", "front-end"),
        ("in", "side"),
    ]);
    for (expression, selected) in [
        ("", true),
        (" \t", true),
        ("all()", true),
        ("global()", true),
        ("app == 'web'", true),
        ("app==\"web\"", true),
        ("app == 'we'", false),
        ("app != 'web'", false),
        ("absent != 'web'", true),
        ("absent == ''", false),
        ("app in {'db', 'web'}", true),
        ("app in {}", false),
        ("app not in {}", true),
        ("app not in {'web'}", false),
        ("app notin {'web'}", false),
        ("absent not in {'web'}", true),
        ("absent in {'web'}", false),
        ("app contains 'e'", true),
        ("absent contains ''", false),
        ("tier/x.y_z-1 starts with 'front'", true),
        ("tier/x.y_z-1 starts  with 'end'", false),
        ("tier/x.y_z-1 ends\twith 'end'", true),
        ("has(app)", true),
        ("has( app )", true),
        ("!has(app)", false),
        ("!!has(app)", true),
        ("! has(app) || app == 'web'", true),
        ("has(absent) || has(app) && !has(absent)", true),
        ("(has(absent) || has(app)) && has(absent)", false),
        ("in == 'side'", true),
        ("in in {'side'}", true),
        ("has(in)", true),
    ] {
        assert_eq!(parse(expression).matches(&web), selected, "{expression}");
    }
}

#[test]
fn global_means_outside_of_namespaces() {
    let inside = labels(&[("projectcalico.org/namespace", "ns")]);
    assert!(!parse("global()").matches(&inside));
    assert!(parse("global()").matches(&labels(&[])));
}

#[test]
fn errors_tell_position_expectation_and_finding() {
    for (expression, message) in [
        (
            "app = 'web'",
            "at character 5: expected \"==\", \"!=\", \"in\", \"not in\", \"contains\", \"starts with\" or \"ends with\" after the label, found \"=\"",
        ),
        (
            "app == web",
            "at character 8: expected a text in quotes, found \"web\"",
        ),
        (
            "app == 'web",
            "at character 8: expected a text in quotes, found a text whose quote is never closed",
        ),
        (
            "app == 'web' extra",
            "at character 14: expected \"&&\", \"||\" or the end, found \"extra\"",
        ),
        (
            "app == 'web' &&",
            "at character 16: expected a label, \"has(label)\", \"all()\", \"global()\", \"!\" or \"(\", found the end",
        ),
        (
            "(has(app)",
            "at character 10: expected \"&&\", \"||\" or \")\", found the end",
        ),
        (
            "has(app))",
            "at character 9: expected \"&&\", \"||\" or the end, found \")\"",
        ),
        (
            "all (",
            "at character 5: expected \"==\", \"!=\", \"in\", \"not in\", \"contains\", \"starts with\" or \"ends with\" after the label, found \"(\"",
        ),
        (
            "has()",
            "at character 4: expected \"==\", \"!=\", \"in\", \"not in\", \"contains\", \"starts with\" or \"ends with\" after the label, found \"(\"",
        ),
        (
            "app in 'web'",
            "at character 8: expected \"{\", found \"'web'\"",
        ),
        (
            "app in {'a' 'b'}",
            "at character 13: expected \",\" or \"}\", found \"'b'\"",
        ),
        (
            "app in {'a',}",
            "at character 13: expected a text in quotes, found \"}\"",
        ),
        (
            "app\n== 'web'",
            "at character 4: expected \"==\", \"!=\", \"in\", \"not in\", \"contains\", \"starts with\" or \"ends with\" after the label, found \"\\n\"",
        ),
        (
            "ä == 'x'",
            "at character 1: expected a label, \"has(label)\", \"all()\", \"global()\", \"!\" or \"(\", found \"ä\"",
        ),
        (
            "a == 'ä' b",
            "at character 10: expected \"&&\", \"||\" or the end, found \"b\"",
        ),
    ] {
        assert_eq!(
            Selector::parse(expression).unwrap_err().to_string(),
            message,
            "{expression}"
        );
    }
}

#[test]
fn a_label_may_not_exceed_512_characters() {
    let longest = "a".repeat(512);
    parse(&format!("has({longest})"));
    parse(&format!("{longest} == 'x'"));
    for expression in [format!("has({longest}a)"), format!("{longest}a == 'x'")] {
        let error = Selector::parse(&expression).unwrap_err();
        assert_eq!(
            (error.position, error.expected.as_str()),
            (1, "a label of at most 512 characters")
        );
    }
}

#[test]
fn nesting_is_bounded() {
    let nested = |depth| format!("{}has(a){}", "(".repeat(depth), ")".repeat(depth));
    assert_eq!(parse(&nested(100)), Selector::has("a"));
    assert_eq!(Selector::parse(&nested(101)).unwrap_err().position, 101);
    assert_eq!(
        parse(&format!("{}has(a)", "!".repeat(1001))),
        Selector::has("a").negated()
    );
}

#[test]
fn the_canonical_text_does_not_depend_on_the_spelling() {
    for (spellings, canonical) in [
        (&["", " ", "all()", "(all())"][..], "all()"),
        (&["a=='b'", "( a == \"b\" )", "!(!(a=='b'))"], "a == \"b\""),
        (
            &["a in {'y','x','y'}", "a in {\"x\", \"y\"}"],
            "a in {\"x\", \"y\"}",
        ),
        (&["a notin {}", "a not   in {}"], "a not in {}"),
        (
            &["(has(a)&&has(b))&&has(c)", "has(a) && (has(b) && has(c))"],
            "has(a) && has(b) && has(c)",
        ),
        (
            &["has(a) && (has(b) || has(c))"],
            "has(a) && (has(b) || has(c))",
        ),
        (
            &["has(a) && has(b) || has(c)"],
            "has(a) && has(b) || has(c)",
        ),
        (&["!(has(a) && has(b))"], "!(has(a) && has(b))"),
        (&["a == '\"'"], "a == '\"'"),
    ] {
        for spelling in spellings {
            assert_eq!(parse(spelling).to_string(), canonical, "{spelling}");
            assert_eq!(parse(spelling).uid(), parse(canonical).uid());
        }
    }
}

#[test]
fn identities_are_stable_across_versions() {
    // SHA-224 and base64 computed with coreutils over "s:all()".
    assert_eq!(
        parse("all()").uid(),
        "s:5y5I3VdRZfDU01O--xXAPx2yxCQQqMf0M6IWug"
    );
}

#[test]
fn conjunctions_and_prefixes_are_built_without_text() {
    let own = Selector::equals("projectcalico.org/namespace", "a");
    assert_eq!(Selector::all().and(own.clone()), own);
    assert_eq!(
        parse("has(x) || has(y)").and(own).to_string(),
        "(has(x) || has(y)) && projectcalico.org/namespace == \"a\""
    );
    assert_eq!(
        parse("env in {'p'} && !has(x)").of_namespaces().to_string(),
        "pcns.env in {\"p\"} && !has(pcns.x)"
    );
    assert_eq!(
        parse("all()").of_namespaces().to_string(),
        "has(projectcalico.org/namespace)"
    );
    assert_eq!(
        parse("global()").of_namespaces().to_string(),
        "!has(projectcalico.org/namespace)"
    );
    assert!(parse("has(a) || !global()").uses_global());
}

#[test]
fn inherited_labels_count_where_an_endpoint_has_none() {
    let own = labels(&[("app", "web")]);
    let profiles = [
        labels(&[("app", "db"), ("pcns.env", "prod")]),
        labels(&[("pcns.env", "test")]),
    ];
    let layered = Layered {
        own: &own,
        inherited: &profiles,
    };
    assert!(parse("app == 'web' && pcns.env == 'prod'").matches(&layered));
}

#[test]
fn restrictions_name_what_an_index_may_rely_on() {
    let one_of = |values: &[&str]| Restriction::OneOf(values.iter().map(|v| (*v).into()).collect());
    for (expression, expected) in [
        ("all()", vec![]),
        ("a == 'x'", vec![("a", one_of(&["x"]))]),
        (
            "a contains 'x' && b == 'y'",
            vec![("a", Restriction::Present), ("b", one_of(&["y"]))],
        ),
        (
            "has(a) && a in {'x', 'y'}",
            vec![("a", one_of(&["x", "y"]))],
        ),
        (
            "a in {'x', 'y'} && a in {'y', 'z'}",
            vec![("a", one_of(&["y"]))],
        ),
        ("a == 'x' || a == 'y'", vec![("a", one_of(&["x", "y"]))]),
        ("a == 'x' || b == 'y'", vec![]),
        (
            "a == 'x' && b == 'y' || a == 'z' && has(b)",
            vec![("a", one_of(&["x", "z"])), ("b", Restriction::Present)],
        ),
        ("!(a != 'x')", vec![("a", one_of(&["x"]))]),
        ("!has(a)", vec![]),
        ("a not in {'x'}", vec![]),
    ] {
        let expected: BTreeMap<Box<str>, _> =
            expected.into_iter().map(|(l, r)| (l.into(), r)).collect();
        assert_eq!(parse(expression).restrictions(), expected, "{expression}");
    }
}

fn any_label() -> impl Strategy<Value = Box<str>> {
    prop_oneof![
        Just("a".into()),
        Just("b".into()),
        Just("in".into()),
        Just("not".into()),
        "[a-zA-Z0-9_./-]{1,8}".prop_map(Into::into),
    ]
}

fn any_value() -> impl Strategy<Value = Box<str>> {
    prop_oneof![
        Just("x".into()),
        Just("xy".into()),
        "[^\"]{0,6}".prop_map(Into::into),
        "[^']{0,6}".prop_map(Into::into)
    ]
}

fn any_node() -> impl Strategy<Value = Node> {
    let set = || proptest::collection::btree_set(any_value(), 0..4);
    let leaf = prop_oneof![
        Just(Node::All),
        Just(Node::Global),
        any_label().prop_map(Node::Has),
        (any_label(), any_value()).prop_map(|(l, v)| Node::Equal(l, v)),
        (any_label(), any_value()).prop_map(|(l, v)| Node::NotEqual(l, v)),
        (any_label(), any_value()).prop_map(|(l, v)| Node::Contains(l, v)),
        (any_label(), any_value()).prop_map(|(l, v)| Node::StartsWith(l, v)),
        (any_label(), any_value()).prop_map(|(l, v)| Node::EndsWith(l, v)),
        (any_label(), set()).prop_map(|(l, v)| Node::In(l, v)),
        (any_label(), set()).prop_map(|(l, v)| Node::NotIn(l, v)),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(Node::negate),
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Node::and),
            proptest::collection::vec(inner, 1..4).prop_map(Node::or),
        ]
    })
}

fn any_labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    proptest::collection::btree_map(
        prop_oneof![
            Just("a".to_owned()),
            Just("b".to_owned()),
            Just("in".to_owned())
        ],
        prop_oneof![
            Just("x".to_owned()),
            Just("xy".to_owned()),
            Just(String::new())
        ],
        0..3,
    )
}

proptest! {
    #[test]
    fn the_canonical_text_parses_to_the_same_selector(node in any_node()) {
        let selector = Selector(node);
        let text = selector.to_string();
        let again = Selector::parse(&text).map_err(|error| TestCaseError::fail(format!("{text}: {error}")))?;
        prop_assert_eq!(&again, &selector, "{}", text);
    }

    #[test]
    fn any_text_is_parsed_or_refused_without_panic(text in "\\PC{0,60}") {
        let _ = Selector::parse(&text);
    }

    #[test]
    fn any_sequence_of_words_is_parsed_or_refused_without_panic(
        words in proptest::collection::vec(
            prop_oneof![
                Just("a"), Just("=="), Just("!="), Just("in"), Just("not"), Just("{"), Just("}"), Just(","), Just("'x'"),
                Just("has("), Just(")"), Just("("), Just("&&"), Just("||"), Just("!"), Just("all()"), Just("starts with"), Just("'"),
            ],
            0..20,
        ),
    ) {
        if let Ok(selector) = Selector::parse(&words.join(" ")) {
            prop_assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector);
        }
    }

    #[test]
    fn whatever_is_selected_satisfies_the_restrictions(node in any_node(), labels in any_labels()) {
        let selector = Selector(node);
        if selector.matches(&labels) {
            for (label, restriction) in selector.restrictions() {
                let value = labels.get(&*label);
                prop_assert!(value.is_some(), "{selector} selects without {label}");
                if let Restriction::OneOf(values) = restriction {
                    prop_assert!(values.contains(value.unwrap().as_str()), "{selector}: {label}");
                }
            }
        }
    }

    #[test]
    fn negation_turns_every_verdict_around(node in any_node(), labels in any_labels()) {
        let selector = Selector(node);
        prop_assert_eq!(selector.matches(&labels), !selector.clone().negated().matches(&labels));
    }
}
