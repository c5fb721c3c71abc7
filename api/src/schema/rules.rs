//! What types alone do not say: limits, and conditions between fields in CEL. The same rules as `crate::validate`, as far as
//! CEL can express them within the API server's cost limits.

use serde_json::{Value, json};

use crate::Kind;

/// Names under which a field is also read, but which are not to be written.
pub(super) fn is_alias(field: &str) -> bool {
    field == "alternateOwnerAttrs"
}

/// A rule in CEL, and what a user is told who breaks it.
type Rule = (&'static str, &'static str);

const PORTS_NEED_PROTOCOL: Rule = (
    "!((has(self.source) && (has(self.source.ports) || has(self.source.notPorts))) || (has(self.destination) && (has(self.destination.ports) || has(self.destination.notPorts)))) || (has(self.protocol) && (self.protocol == 'TCP' || self.protocol == 'UDP' || self.protocol == 'SCTP' || self.protocol == 6 || self.protocol == 17 || self.protocol == 132))",
    "ports need protocol TCP, UDP or SCTP",
);
const ICMP_NEEDS_PROTOCOL: Rule = (
    "!(has(self.icmp) || has(self.notICMP)) || (has(self.protocol) && (self.protocol == 'ICMP' || self.protocol == 'ICMPv6' || self.protocol == 1 || self.protocol == 58))",
    "icmp and notICMP need protocol ICMP or ICMPv6",
);
const HTTP_NEEDS_ALLOW: Rule = (
    "!has(self.http) || self.action == 'Allow'",
    "http is only for rules with action Allow",
);
const TYPES_ONCE: Rule = (
    "self.all(one, self.exists_one(other, other == one))",
    "lists a direction twice",
);
const ADDRESS_OR_CIDR: Rule = ("isCIDR(self) || isIP(self)", "must be an address or a CIDR");

/// A number up to 65535, a range `a:b`, or a name, which is not made of digits alone.
const PORT: &str = concat!(
    "^(",
    "0*([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])",
    "(:0*([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?",
    "|[a-zA-Z_.][a-zA-Z0-9_.-]{0,127}",
    "|[0-9-][0-9.-]*[a-zA-Z_][a-zA-Z0-9_.-]*",
    ")$"
);

const GLOBAL_POLICY: [Rule; 3] = [
    (
        "!(has(self.doNotTrack) && self.doNotTrack && has(self.preDNAT) && self.preDNAT)",
        "doNotTrack and preDNAT exclude each other",
    ),
    (
        "!((has(self.doNotTrack) && self.doNotTrack) || (has(self.preDNAT) && self.preDNAT)) || (has(self.applyOnForward) && self.applyOnForward)",
        "doNotTrack and preDNAT need applyOnForward",
    ),
    (
        "!(has(self.preDNAT) && self.preDNAT) || ((!has(self.egress) || size(self.egress) == 0) && (!has(self.types) || !('Egress' in self.types)))",
        "a policy with preDNAT has no egress rules",
    ),
];

const POOL: [Rule; 4] = [
    (
        "!has(self.ipipMode) || !has(self.vxlanMode) || self.ipipMode == 'Never' || self.vxlanMode == 'Never'",
        "ipipMode and vxlanMode exclude each other",
    ),
    (
        "!has(self.ipipMode) || self.ipipMode == 'Never' || !isCIDR(self.cidr) || cidr(self.cidr).ip().family() == 4",
        "IPIP is only for IPv4",
    ),
    (
        "!has(self.blockSize) || !isCIDR(self.cidr) || (cidr(self.cidr).ip().family() == 4 ? self.blockSize >= 20 && self.blockSize <= 32 : self.blockSize >= 116 && self.blockSize <= 128)",
        "blockSize must be between 20 and 32 for IPv4, between 116 and 128 for IPv6",
    ),
    (
        "!has(oldSelf.blockSize) || (has(self.blockSize) && self.blockSize == oldSelf.blockSize)",
        "blockSize cannot be changed; create another pool and move to it",
    ),
];

const POOL_CIDR: [Rule; 2] = [
    ("isCIDR(self)", "must be a CIDR such as 10.0.0.0/16"),
    (
        "self == oldSelf",
        "cannot be changed; create another pool and move to it",
    ),
];

const HOST_ENDPOINT: [Rule; 2] = [
    ("has(self.node) && size(self.node) > 0", "node is needed"),
    (
        "(has(self.interfaceName) && size(self.interfaceName) > 0) || (has(self.expectedIPs) && size(self.expectedIPs) > 0)",
        "interfaceName or expectedIPs is needed",
    ),
];

const PEER: [Rule; 2] = [
    (
        "!(has(self.node) && size(self.node) > 0 && has(self.nodeSelector) && size(self.nodeSelector) > 0)",
        "node and nodeSelector exclude each other",
    ),
    (
        "!(has(self.peerIP) && size(self.peerIP) > 0 && has(self.peerSelector) && size(self.peerSelector) > 0)",
        "peerIP and peerSelector exclude each other",
    ),
];

const TIER: [Rule; 4] = [
    (
        "!self.metadata.name.contains('.')",
        "the name of a tier has no dots",
    ),
    (
        "self.metadata.name != 'default' || (has(self.spec) && has(self.spec.order) && self.spec.order == 1000000.0 && (!has(self.spec.defaultAction) || self.spec.defaultAction == 'Deny'))",
        "tier default has order 1000000 and defaultAction Deny",
    ),
    (
        "self.metadata.name != 'kube-admin' || (has(self.spec) && has(self.spec.order) && self.spec.order == 1000.0 && has(self.spec.defaultAction) && self.spec.defaultAction == 'Pass')",
        "tier kube-admin has order 1000 and defaultAction Pass",
    ),
    (
        "self.metadata.name != 'kube-baseline' || (has(self.spec) && has(self.spec.order) && self.spec.order == 10000000.0 && has(self.spec.defaultAction) && self.spec.defaultAction == 'Pass')",
        "tier kube-baseline has order 10000000 and defaultAction Pass",
    ),
];

fn is_policy(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::NetworkPolicy
            | Kind::GlobalNetworkPolicy
            | Kind::StagedNetworkPolicy
            | Kind::StagedGlobalNetworkPolicy
    )
}

/// Adds what is known of the field `name` (such as `spec.ingress[].source.nets`; empty for the whole object).
pub(super) fn add(kind: Kind, name: &str, schema: &mut Value) {
    let rules: &[Rule] = match (kind, name) {
        (Kind::GlobalNetworkPolicy | Kind::StagedGlobalNetworkPolicy, "spec") => &GLOBAL_POLICY,
        (Kind::IPPool, "spec") => &POOL,
        (Kind::IPPool, "spec.cidr") => {
            schema["maxLength"] = json!(48);
            &POOL_CIDR
        }
        (Kind::HostEndpoint, "spec") => &HOST_ENDPOINT,
        (Kind::BGPPeer, "spec") => &PEER,
        (Kind::Tier, "") => &TIER,
        _ if is_policy(kind) => policy(name, schema),
        _ => &[],
    };
    if !rules.is_empty() {
        let rules: Vec<Value> = rules
            .iter()
            .map(|(rule, message)| json!({"rule": rule, "message": message}))
            .collect();
        schema["x-kubernetes-validations"] = json!(rules);
    }
}

fn policy(name: &str, schema: &mut Value) -> &'static [Rule] {
    let Some(rest) = name
        .strip_prefix("spec.ingress")
        .or_else(|| name.strip_prefix("spec.egress"))
    else {
        if name == "spec.types" {
            schema["maxItems"] = json!(2);
            return &[TYPES_ONCE];
        }
        return &[];
    };
    match rest {
        "" => schema["maxItems"] = json!(1024),
        "[]" => return &[PORTS_NEED_PROTOCOL, ICMP_NEEDS_PROTOCOL, HTTP_NEEDS_ALLOW],
        "[].ipVersion" => schema["enum"] = json!([4, 6]),
        // One of two fields, which serde reads as an enumeration with a value.
        "[].http.paths[]" => {
            *schema = json!({
                "type": "object", "minProperties": 1, "maxProperties": 1,
                "properties": {"exact": {"type": "string"}, "prefix": {"type": "string"}},
            });
        }
        _ => {}
    }
    match rest.rsplit('.').next() {
        Some("nets" | "notNets") => schema["maxItems"] = json!(256),
        Some("nets[]" | "notNets[]") => {
            // The longest CIDR; two more characters, and the API server finds the rule too costly.
            schema["maxLength"] = json!(43);
            return &[ADDRESS_OR_CIDR];
        }
        Some("ports" | "notPorts") => schema["maxItems"] = json!(50),
        // A number, or a text that may be one, too (`crate::v3::Port`).
        Some("ports[]" | "notPorts[]") => {
            schema["minimum"] = json!(0);
            schema["maximum"] = json!(u16::MAX);
            schema["pattern"] = json!(PORT);
        }
        _ => {}
    }
    &[]
}
