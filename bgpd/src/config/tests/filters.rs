//! Every field of a BGPFilter rule, as a table: the rule, the route, the outcome.

use super::*;
use crate::wire::{AsPath, Community, LargeCommunity};

/// A route to put before a filter.
struct Route {
    prefix: &'static str,
    source: RouteSource,
    interface: Option<&'static str>,
    attributes: Attributes,
}

fn route(prefix: &'static str) -> Route {
    Route {
        prefix,
        source: RouteSource::Bgp(PeerKind::Ibgp),
        interface: None,
        attributes: Attributes {
            local_pref: Some(2_147_482_623),
            ..Attributes::default()
        },
    }
}

/// The outcome behind a filter of one rule, whose built-in successor refuses exports (nothing is in a pool).
fn outcome(direction: &str, rule: Value, route: &Route, peer_as: u32) -> Option<Attributes> {
    let v4 = !route.prefix.contains(':');
    let filter =
        json!({"kind": "BGPFilter", "metadata": {"name": "f"}, "spec": {direction: [rule]}});
    let address = if v4 { "10.9.9.9" } else { "fd99::9" };
    let tor = peer(
        "tor",
        json!({"peerIP": address, "asNumber": peer_as, "filters": ["f"]}),
    );
    let one = settings(&with(&[filter, tor]), "node1");
    let exchange = &neighbour(&one, address).exchange;
    let policy = if direction.starts_with("import") {
        &exchange.import
    } else {
        &exchange.export
    };
    let view = RouteView {
        prefix: route.prefix.parse().unwrap(),
        attributes: &route.attributes,
        source: route.source,
        interface: route.interface,
        peer: if peer_as == 64512 {
            PeerKind::Ibgp
        } else {
            PeerKind::Ebgp
        },
    };
    match policy.evaluate(&view) {
        Verdict::Accept(edits) => {
            let mut attributes = route.attributes.clone();
            policy.apply(&edits, &mut attributes);
            Some(attributes)
        }
        Verdict::Reject(_) => None,
    }
}

fn accepts(rule: Value, route: &Route) -> bool {
    outcome("exportV4", rule, route, 65009).is_some()
}

#[test]
fn cidr_operators_and_lengths() {
    let rule = |operator: &str, length: Value| {
        let mut rule =
            json!({"cidr": "10.20.0.0/16", "matchOperator": operator, "action": "Accept"});
        if !length.is_null() {
            rule["prefixLength"] = length;
        }
        rule
    };
    let cases = [
        ("Equal", Value::Null, "10.20.0.0/16", true),
        ("Equal", Value::Null, "10.20.1.0/24", false),
        ("NotEqual", Value::Null, "10.20.1.0/24", true),
        ("NotEqual", Value::Null, "10.20.0.0/16", false),
        ("In", Value::Null, "10.20.0.0/16", true),
        ("In", Value::Null, "10.20.1.1/32", true),
        ("In", Value::Null, "10.0.0.0/8", false),
        ("In", json!({"min": 24, "max": 28}), "10.20.0.0/16", false),
        ("In", json!({"min": 24, "max": 28}), "10.20.1.0/26", true),
        ("In", json!({"min": 24, "max": 28}), "10.20.1.1/32", false),
        ("In", json!({"max": 24}), "10.20.1.0/24", true),
        ("In", json!({"min": 25}), "10.20.1.0/24", false),
        ("NotIn", Value::Null, "10.20.1.0/24", false),
        ("NotIn", Value::Null, "192.0.2.0/24", true),
        ("NotIn", json!({"min": 25}), "10.20.1.0/24", true),
    ];
    for (operator, length, prefix, expected) in cases {
        let seen = accepts(rule(operator, length.clone()), &route(prefix));
        assert_eq!(seen, expected, "{operator} {length} {prefix}");
    }
}

#[test]
fn source_interface_and_kind_of_peer() {
    let local = |interface| Route {
        source: RouteSource::Local(LocalKind::Workload),
        interface,
        ..route("192.0.2.1/32")
    };
    let remote = json!({"source": "RemotePeers", "action": "Accept"});
    assert!(accepts(remote.clone(), &route("192.0.2.0/24")));
    assert!(!accepts(remote, &local(Some("cali1"))));
    let interface = |pattern: &str| json!({"interface": pattern, "action": "Accept"});
    assert!(accepts(interface("cali*"), &local(Some("cali1"))));
    assert!(accepts(interface("*.calico"), &local(Some("vxlan.calico"))));
    assert!(!accepts(interface("eth0"), &local(Some("eth01"))));
    assert!(!accepts(interface("*"), &local(None)));
    for (kind, peer_as, expected) in [
        ("eBGP", 65009, true),
        ("eBGP", 64512, false),
        ("iBGP", 64512, true),
        ("iBGP", 65009, false),
    ] {
        let rule = json!({"peerType": kind, "action": "Accept"});
        let seen = outcome("exportV4", rule, &route("192.0.2.0/24"), peer_as).is_some();
        assert_eq!(seen, expected, "{kind} {peer_as}");
    }
}

#[test]
fn communities_as_path_and_priority() {
    let mut marked = route("192.0.2.0/24");
    marked.attributes.add_community(Community(64512 << 16 | 7));
    marked.attributes.add_large_community(LargeCommunity {
        global: 64512,
        local1: 1,
        local2: 2,
    });
    marked.attributes.as_path = AsPath::empty().prepend(&[65001, 65002]);
    marked.attributes.local_pref = Some(2_147_483_647 - 500);
    for (field, value, expected) in [
        ("communities", json!({"values": ["64512:7"]}), true),
        ("communities", json!({"values": ["64512:8"]}), false),
        ("communities", json!({"values": ["64512:1:2"]}), true),
        ("communities", json!({"values": ["64512:1:3"]}), false),
        ("asPathPrefix", json!([65001]), true),
        ("asPathPrefix", json!([65001, 65002]), true),
        ("asPathPrefix", json!([65002]), false),
        ("priority", json!(500), true),
        ("priority", json!(501), false),
    ] {
        let rule = json!({field: value, "action": "Accept"});
        assert_eq!(accepts(rule, &marked), expected, "{field} {value}");
    }
}

#[test]
fn all_conditions_of_a_rule_must_hold() {
    let rule = json!({"cidr": "192.0.2.0/24", "matchOperator": "In", "source": "RemotePeers", "peerType": "iBGP", "action": "Accept"});
    assert!(
        !accepts(rule.clone(), &route("192.0.2.0/24")),
        "the peer is external"
    );
    assert!(outcome("exportV4", rule, &route("192.0.2.0/24"), 64512).is_some());
}

#[test]
fn operations_edit_what_is_accepted() {
    let rule = json!({"action": "Accept", "operations": [
        {"addCommunity": {"value": "64512:7"}}, {"addCommunity": {"value": "64512:1:2"}},
        {"prependASPath": {"prefix": [65010, 65011]}}, {"setPriority": {"value": 512}}]});
    for direction in ["importV4", "exportV4"] {
        let seen = outcome(direction, rule.clone(), &route("192.0.2.0/24"), 65009).unwrap();
        assert_eq!(
            seen.communities.to_vec(),
            [Community(64512 << 16 | 7)],
            "{direction}"
        );
        assert_eq!(seen.large_communities.len(), 1, "{direction}");
        assert!(seen.as_path.starts_with(&[65010, 65011]), "{direction}");
        assert_eq!(seen.local_pref, Some(2_147_483_647 - 512), "{direction}");
    }
}

#[test]
fn what_no_rule_decides_falls_to_the_built_in_filter() {
    let rule = json!({"cidr": "10.20.0.0/16", "matchOperator": "In", "action": "Reject"});
    let other = route("192.0.2.0/24");
    assert!(outcome("importV4", rule.clone(), &other, 65009).is_some());
    assert!(outcome("exportV4", rule.clone(), &other, 65009).is_none());
    assert!(outcome("importV4", rule, &route("10.20.1.0/24"), 65009).is_none());
}

#[test]
fn each_family_has_its_own_lists() {
    let reject = json!({"action": "Reject"});
    assert!(outcome("importV4", reject.clone(), &route("192.0.2.0/24"), 65009).is_none());
    assert!(outcome("importV6", reject.clone(), &route("192.0.2.0/24"), 65009).is_some());
    assert!(outcome("importV6", reject.clone(), &route("2001:db8::/32"), 65009).is_none());
    assert!(outcome("importV4", reject, &route("2001:db8::/32"), 65009).is_some());
    let inside = json!({"cidr": "2001:db8::/32", "matchOperator": "In", "prefixLength": {"max": 48}, "action": "Accept"});
    assert!(outcome("exportV6", inside.clone(), &route("2001:db8:1::/48"), 65009).is_some());
    assert!(outcome("exportV6", inside, &route("2001:db8:1::/64"), 65009).is_none());
}

#[test]
fn an_import_of_a_moving_workload_is_preferred_over_local_routes() {
    let one = settings(&three_nodes(), "node1");
    let import = &neighbour(&one, "10.0.1.2").exchange.import;
    let preferred = |local_pref: u32| {
        let attributes = Attributes {
            local_pref: Some(local_pref),
            ..Attributes::default()
        };
        let view = RouteView {
            prefix: "10.10.1.5/32".parse().unwrap(),
            attributes: &attributes,
            source: RouteSource::Bgp(PeerKind::Ibgp),
            interface: None,
            peer: PeerKind::Ibgp,
        };
        let Verdict::Accept(edits) = import.evaluate(&view) else {
            return None;
        };
        Some(import.apply(&edits, &mut attributes.clone()))
    };
    assert_eq!(preferred(2_147_483_647 - 512), Some(true));
    assert_eq!(preferred(2_147_483_647 - 1024), Some(false));
    assert_eq!(preferred(100), Some(false));
}

#[test]
fn a_filter_that_does_not_exist_is_reported_once() {
    let tor = |n: u8| {
        let name = format!("tor{n}");
        peer(
            &name,
            json!({"peerIP": format!("10.9.9.{n}"), "asNumber": 65009, "filters": ["missing"]}),
        )
    };
    let one = settings(&with(&[tor(1), tor(2)]), "node1");
    let objects: Vec<&str> = one.host.notices.iter().map(|n| n.object.as_str()).collect();
    assert_eq!(objects, ["BGPFilter missing"]);
}
