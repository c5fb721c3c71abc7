use serde_json::{Value, json};

use super::validate;
use crate::AnyResource;

/// What is found in an object of this kind, as one text for each finding.
fn findings(kind: &str, name: &str, spec: Value) -> Vec<String> {
    let mut metadata = json!({"name": name});
    if matches!(
        kind,
        "NetworkPolicy" | "StagedNetworkPolicy" | "WorkloadEndpoint" | "NetworkSet"
    ) {
        metadata["namespace"] = json!("ns");
    }
    let object = json!({"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata, "spec": spec});
    let object = AnyResource::from_json(object).unwrap();
    validate(&object)
        .err()
        .unwrap_or_default()
        .iter()
        .map(ToString::to_string)
        .collect()
}

fn rule(rule: Value) -> Vec<String> {
    findings("GlobalNetworkPolicy", "p", json!({"ingress": [rule]}))
}

#[test]
fn bad_selectors_are_named_with_their_place() {
    assert_eq!(
        findings("NetworkPolicy", "p", json!({"selector": "app = 'x'"})),
        [
            "spec.selector: not a selector: at character 5: expected \"==\", \"!=\", \"in\", \"not in\", \"contains\", \"starts with\" or \"ends with\" after the label, found \"=\""
        ]
    );
    assert_eq!(
        rule(
            json!({"action": "Allow", "source": {"selector": "global()", "namespaceSelector": "global()"}})
        ),
        [
            "spec.ingress[0].source.selector: global() is only allowed in the namespaceSelector of a rule"
        ]
    );
}

#[test]
fn rules_that_contradict_themselves_are_refused() {
    for (json, message) in [
        (
            json!({"action": "Allow", "destination": {"ports": [80]}}),
            "spec.ingress[0].protocol: must be TCP, UDP or SCTP, for destination has ports",
        ),
        (
            json!({"action": "Allow", "source": {"nets": ["10.0.0.0/8", "fd00::/8"]}}),
            "spec.ingress[0]: mixes IPv4 and IPv6 networks",
        ),
        (
            json!({"action": "Allow", "ipVersion": 6, "source": {"nets": ["10.0.0.0/8"]}}),
            "spec.ingress[0].ipVersion: contradicts the networks of the rule",
        ),
        (
            json!({"action": "Allow", "ipVersion": 5}),
            "spec.ingress[0].ipVersion: must be 4 or 6",
        ),
        (
            json!({"action": "Allow", "source": {"notNets": ["0.0.0.0/0"]}}),
            "spec.ingress[0].source.notNets: excludes every address",
        ),
        (
            json!({"action": "Allow", "icmp": {"type": 8}}),
            "spec.ingress[0].icmp: needs protocol ICMP or ICMPv6",
        ),
        (
            json!({"action": "Allow", "protocol": "ICMP", "icmp": {"code": 0}}),
            "spec.ingress[0].icmp: code needs type",
        ),
        (
            json!({"action": "Deny", "http": {"methods": ["GET"]}}),
            "spec.ingress[0].http: is only allowed with action Allow",
        ),
        (
            json!({"action": "Allow", "destination": {"services": {"name": "a", "namespace": "b"}}}),
            "spec.ingress[0].destination.services: is only allowed in the source of Ingress rules",
        ),
        (
            json!({"action": "Allow", "source": {"services": {"name": "a"}}}),
            "spec.ingress[0].source.services.namespace: is required in a policy without a namespace",
        ),
        (
            json!({"action": "Allow", "source": {"services": {"name": "a", "namespace": "b"}, "selector": "all()"}}),
            "spec.ingress[0].source.services: excludes networks, selectors and service accounts",
        ),
        (
            json!({"action": "Allow", "protocol": "TCP", "destination": {"ports": [0]}}),
            "spec.ingress[0].destination.ports: port 0 cannot be matched",
        ),
    ] {
        assert_eq!(rule(json.clone()), [message], "{json}");
    }
}

#[test]
fn policies_before_tracking_and_translation_have_their_conditions() {
    assert_eq!(
        findings(
            "GlobalNetworkPolicy",
            "p",
            json!({"doNotTrack": true, "preDNAT": true, "egress": [{"action": "Deny"}]})
        ),
        [
            "spec.preDNAT: excludes doNotTrack",
            "spec.doNotTrack: needs applyOnForward",
            "spec.preDNAT: needs applyOnForward",
            "spec.egress: must be empty with preDNAT",
        ]
    );
}

#[test]
fn pools_keep_within_their_family() {
    for (spec, message) in [
        (
            json!({"cidr": "169.254.1.0/24"}),
            "spec.cidr: lies in the link-local range",
        ),
        (
            json!({"cidr": "10.0.0.0/16", "blockSize": 19}),
            "spec.blockSize: must be between 20 and 32",
        ),
        (
            json!({"cidr": "10.0.0.0/28"}),
            "spec.cidr: is smaller than a block (/26)",
        ),
        (
            json!({"cidr": "fd00::/64", "ipipMode": "Always"}),
            "spec.ipipMode: IPIP is only for IPv4",
        ),
        (
            json!({"cidr": "10.0.0.0/16", "ipipMode": "Always", "vxlanMode": "Always"}),
            "spec.vxlanMode: excludes ipipMode",
        ),
        (
            json!({"cidr": "10.0.0.0/16", "allowedUses": ["LoadBalancer", "Workload"]}),
            "spec.allowedUses: LoadBalancer excludes other uses",
        ),
        (
            json!({"cidr": "10.0.0.0/16", "allowedUses": ["Tunnel"], "namespaceSelector": "has(a)"}),
            "spec.namespaceSelector: excludes the use Tunnel",
        ),
    ] {
        assert_eq!(findings("IPPool", "p", spec.clone()), [message], "{spec}");
    }
}

#[test]
fn peers_are_named_in_exactly_one_way() {
    for (spec, message) in [
        (
            json!({"asNumber": 1}),
            "spec: needs exactly one of peerIP, peerSelector and localWorkloadSelector",
        ),
        (
            json!({"peerSelector": "all()", "asNumber": 1}),
            "spec.asNumber: must be empty with peerSelector: nodes have their own",
        ),
        (
            json!({"peerIP": "192.0.2.1", "node": "a", "nodeSelector": "all()"}),
            "spec.nodeSelector: excludes node",
        ),
        (
            json!({"localWorkloadSelector": "all()"}),
            "spec.asNumber: is required with localWorkloadSelector",
        ),
        (
            json!({"peerIP": "192.0.2.1", "reachableBy": "fd00::1"}),
            "spec.reachableBy: is of another family than peerIP",
        ),
    ] {
        assert_eq!(findings("BGPPeer", "p", spec.clone()), [message], "{spec}");
    }
}

#[test]
fn names_have_the_form_of_their_kind() {
    let label = "metadata.name: must be a DNS label: lower-case letters, digits and \"-\", 63 characters at most";
    let policy = "metadata.name: must be \"name\" or \"tier.name\" of DNS labels";
    let name = "metadata.name: must be a DNS name: lower-case letters, digits, \"-\" and \".\", 253 characters at most";
    for (kind, text, spec, expected) in [
        ("Tier", "a.b", json!({}), Some(label)),
        ("NetworkPolicy", "knp.default.a.b", json!({}), None),
        ("NetworkPolicy", "tier.a", json!({}), None),
        ("NetworkPolicy", "a.b.c", json!({}), Some(policy)),
        ("GlobalNetworkSet", "A", json!({}), Some(name)),
    ] {
        assert_eq!(
            findings(kind, text, spec),
            expected.into_iter().collect::<Vec<_>>(),
            "{kind} {text}"
        );
    }
}

#[test]
fn the_system_tiers_are_fixed() {
    assert_eq!(
        findings(
            "Tier",
            "default",
            json!({"order": 5, "defaultAction": "Pass"})
        ),
        [
            "spec.order: is fixed at 1000000 for tier \"default\"",
            "spec.defaultAction: is fixed at Deny for tier \"default\"",
        ]
    );
    assert_eq!(
        findings(
            "Tier",
            "kube-admin",
            json!({"order": 1000, "defaultAction": "Pass"})
        ),
        Vec::<String>::new()
    );
}

#[test]
fn settings_that_would_disturb_the_kernel_are_refused() {
    assert_eq!(
        findings(
            "FelixConfiguration",
            "default",
            json!({
                "routeTableRanges": [{"min": 250, "max": 260}], "mtuIfacePattern": "eth[", "iptablesMarkMask": 15
            })
        ),
        [
            "spec.mtuIfacePattern: not a regular expression: unclosed character class",
            "spec.routeTableRanges[0]: contains the kernel's tables 253 to 255",
            "spec.iptablesMarkMask: needs at least 8 bits",
        ]
    );
}
