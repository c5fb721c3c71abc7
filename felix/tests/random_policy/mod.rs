//! A random cluster with policy: few names, labels and addresses, so that they meet often.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::{AnyResource, Key};
use serde_json::{Map, Value, json};

use crate::policy_lab::Lab;

pub(crate) const NODE: &str = "node";
pub(crate) const TCP_PORTS: [u16; 3] = [80, 81, 8080];
pub(crate) const UDP_PORTS: [u16; 2] = [53, 80];
pub(crate) const SCTP_PORTS: [u16; 2] = [80, 5000];
/// Flows start from one of these ranges of ports.
pub(crate) const SOURCE_RANGES: [(u16, u16); 2] = [(20_000, 29_999), (40_000, 49_999)];

const NAMESPACES: [&str; 2] = ["a", "b"];
const TIERS: [&str; 2] = ["first", "second"];
const SERVICES: [&str; 2] = ["web", "db"];

/// A deterministic source of choices (SplitMix64).
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub(crate) fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    pub(crate) fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// One to `most` draws.
    fn some<T>(&mut self, most: usize, mut draw: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..=self.below(most)).map(|_| draw(self)).collect()
    }
}

/// Manifests as a user would write them.
pub(crate) struct World {
    manifests: Vec<Value>,
}

impl World {
    /// `answers`: what is denied before destination NAT is answered, too.
    pub(crate) fn draw(dice: &mut Dice, lab: &Lab, answers: bool) -> Self {
        let mut world = Self {
            manifests: Vec::new(),
        };
        world.push(
            "projectcalico.org/v3",
            "FelixConfiguration",
            None,
            "default",
            &json!({}),
            json!({"nftablesFilterDenyAction": "Reject", "defaultEndpointToHostAction": "Accept"}),
        );
        for namespace in NAMESPACES {
            let labels = labels(dice, &[("env", &["prod", "test"]), ("app", &["x"])]);
            world.push("v1", "Namespace", None, namespace, &labels, Value::Null);
            let labels = labels_of_account(dice);
            world.push(
                "v1",
                "ServiceAccount",
                Some(namespace),
                "robot",
                &labels,
                Value::Null,
            );
        }
        for (number, place) in lab.pods.iter().enumerate() {
            world.pod(dice, number, place.v4.to_string(), place.v6.to_string());
        }
        for tier in TIERS {
            let mut spec = json!({"defaultAction": dice.pick(&["Pass", "Pass", "Deny"])});
            if dice.percent(80) {
                spec["order"] = json!(dice.below(3));
            }
            world.push("projectcalico.org/v3", "Tier", None, tier, &json!({}), spec);
        }
        for number in 0..dice.below(3) {
            let spec = json!({"nets": dice.some(3, net)});
            let labels = labels(dice, &[("app", &["x", "y"]), ("role", &["r"])]);
            let (kind, namespace) = if dice.percent(50) {
                ("GlobalNetworkSet", None)
            } else {
                ("NetworkSet", Some(dice.pick(&NAMESPACES)))
            };
            world.push(
                "projectcalico.org/v3",
                kind,
                namespace,
                &format!("set{number}"),
                &labels,
                spec,
            );
        }
        for number in 0..=dice.below(6) {
            world.policy(dice, number);
        }
        for service in SERVICES {
            world.service(dice, lab, service);
        }
        if dice.percent(60) {
            world.hosts(dice, answers);
        }
        world
    }

    /// Endpoints of a service, of one or both families.
    fn service(&mut self, dice: &mut Dice, lab: &Lab, name: &str) {
        let namespace = dice.pick(&NAMESPACES);
        for (family, v4) in [("IPv4", true), ("IPv6", false)] {
            if dice.percent(20) {
                continue;
            }
            let addresses = dice.some(2, |dice| {
                let place = dice.below(lab.pods.len());
                json!({"addresses": [lab.pods[place].address(v4)]})
            });
            let ports = dice.some(2, |dice| {
                dice.pick(&[
                    json!({"protocol": "TCP", "port": 80}),
                    json!({"protocol": "TCP", "port": 8080}),
                    json!({"protocol": "UDP", "port": 53}),
                    json!({"protocol": "SCTP", "port": 5000}),
                ])
            });
            self.manifests.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"namespace": namespace, "name": format!("{name}-{}", family.to_lowercase()),
                             "labels": {"kubernetes.io/service-name": name}},
                "addressType": family, "endpoints": addresses, "ports": ports,
            }));
        }
    }

    /// Host endpoints of this node, and policy for them. Without `doNotTrack`: it sees answers apart from questions, and a
    /// probe needs both.
    fn hosts(&mut self, dice: &mut Dice, answers: bool) {
        let places = dice.some(2, |dice| {
            dice.pick(&[
                json!({"interfaceName": "eth0"}),
                json!({"interfaceName": "eth1"}),
                json!({"interfaceName": "*"}),
                json!({"expectedIPs": ["198.51.100.1"]}),
                json!({"expectedIPs": ["2001:db8::1"]}),
            ])
        });
        for (number, mut spec) in places.into_iter().enumerate() {
            spec["node"] = NODE.into();
            let mut labels = labels(dice, &[("app", &["x", "y"]), ("zone", &["dmz"])]);
            labels["edge"] = "yes".into();
            let name = format!("host{number}");
            self.push(
                "projectcalico.org/v3",
                "HostEndpoint",
                None,
                &name,
                &labels,
                spec,
            );
        }
        for number in 0..=dice.below(3) {
            let mut spec = json!({"selector": dice.pick(&["has(edge)", "has(zone)", "edge == 'yes' && app == 'x'"])});
            let types = dice.pick(&[["Ingress"].as_slice(), &["Egress"], &["Ingress", "Egress"]]);
            let pre_dnat = answers && dice.percent(25);
            if pre_dnat {
                spec["preDNAT"] = true.into();
            }
            if pre_dnat || dice.percent(50) {
                spec["applyOnForward"] = true.into();
            }
            let types = if pre_dnat { &["Ingress"] } else { types };
            let tier = if dice.percent(50) {
                dice.pick(&TIERS)
            } else {
                "default"
            };
            spec["tier"] = tier.into();
            spec["order"] = json!(dice.below(4));
            self.rules_of(dice, &mut spec, types, tier);
            self.push(
                "projectcalico.org/v3",
                "GlobalNetworkPolicy",
                None,
                &format!("{tier}.h{number}"),
                &json!({}),
                spec,
            );
        }
    }

    fn rules_of(&self, dice: &mut Dice, spec: &mut Value, types: &[&str], tier: &str) {
        spec["types"] = json!(types);
        for (kind, field) in [("Ingress", "ingress"), ("Egress", "egress")] {
            if types.contains(&kind) {
                spec[field] = (0..dice.below(5))
                    .map(|_| rule(dice, tier != "default", kind == "Ingress"))
                    .collect();
            }
        }
    }

    fn push(
        &mut self,
        api: &str,
        kind: &str,
        namespace: Option<&str>,
        name: &str,
        labels: &Value,
        spec: Value,
    ) {
        let mut metadata = json!({"name": name, "labels": labels});
        if let Some(namespace) = namespace {
            metadata["namespace"] = namespace.into();
        }
        let mut manifest = json!({"apiVersion": api, "kind": kind, "metadata": metadata});
        if !spec.is_null() {
            manifest["spec"] = spec;
        }
        self.manifests.push(manifest);
    }

    fn pod(&mut self, dice: &mut Dice, number: usize, v4: String, v6: String) {
        let labels = labels(
            dice,
            &[
                ("app", &["x", "y", "z"]),
                ("role", &["r", "s"]),
                ("bad", &["yes"]),
            ],
        );
        let mut ports = Vec::new();
        if dice.percent(60) {
            ports.push(
                json!({"name": "web", "protocol": "TCP", "containerPort": dice.pick(&TCP_PORTS)}),
            );
        }
        if dice.percent(40) {
            ports.push(
                json!({"name": "dns", "protocol": "UDP", "containerPort": dice.pick(&UDP_PORTS)}),
            );
        }
        if dice.percent(40) {
            ports.push(
                json!({"name": "sig", "protocol": "SCTP", "containerPort": dice.pick(&SCTP_PORTS)}),
            );
        }
        let account = dice.percent(50).then_some("robot");
        self.manifests.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": dice.pick(&NAMESPACES), "name": format!("pod{number}"), "labels": labels},
            "spec": {"nodeName": NODE, "serviceAccountName": account, "containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]},
        }));
    }

    fn policy(&mut self, dice: &mut Dice, number: usize) {
        if dice.percent(30) {
            let spec = kubernetes_policy(dice);
            let namespace = dice.pick(&NAMESPACES);
            self.push(
                "networking.k8s.io/v1",
                "NetworkPolicy",
                Some(namespace),
                &format!("k{number}"),
                &json!({}),
                spec,
            );
            return;
        }
        let mut spec = json!({"selector": selector(dice)});
        let tier = if dice.percent(50) {
            dice.pick(&TIERS)
        } else {
            "default"
        };
        spec["tier"] = tier.into();
        if dice.percent(70) {
            spec["order"] = json!(dice.below(4));
        }
        let types = dice.pick(&[["Ingress"].as_slice(), &["Egress"], &["Ingress", "Egress"]]);
        self.rules_of(dice, &mut spec, types, tier);
        if dice.percent(15) {
            spec["serviceAccountSelector"] = "trust == 'high'".into();
        }
        let name = format!("{tier}.c{number}");
        if dice.percent(50) {
            let namespace = dice.pick(&NAMESPACES);
            self.push(
                "projectcalico.org/v3",
                "NetworkPolicy",
                Some(namespace),
                &name,
                &json!({}),
                spec,
            );
        } else {
            if dice.percent(30) {
                spec["namespaceSelector"] = namespace_selector(dice).into();
            }
            self.push(
                "projectcalico.org/v3",
                "GlobalNetworkPolicy",
                None,
                &name,
                &json!({}),
                spec,
            );
        }
    }

    /// The objects as the graph gets them, wired to the lab's interfaces.
    pub(crate) fn objects(&self, lab: &Lab) -> BTreeMap<Key, Arc<AnyResource>> {
        let mut all = BTreeMap::new();
        for manifest in &self.manifests {
            let object = AnyResource::from_json(manifest.clone())
                .unwrap_or_else(|error| panic!("{error}: {manifest}"));
            let converted = cali_api::kubernetes::convert(&object);
            assert_eq!(converted.problems, Vec::<String>::new(), "{manifest}");
            for mut object in converted.resources {
                if let AnyResource::WorkloadEndpoint(endpoint) = &mut object {
                    let here = lab.pods.iter().find(|place| {
                        endpoint
                            .spec
                            .ip_networks
                            .iter()
                            .any(|net| net.contains(place.v4.into()))
                    });
                    endpoint.spec.interface_name = here.expect("a place").interface.clone();
                }
                all.insert(object.key(), Arc::new(object));
            }
        }
        all
    }
}

fn labels(dice: &mut Dice, choices: &[(&str, &[&str])]) -> Value {
    let mut labels = Map::new();
    for (label, values) in choices {
        if dice.percent(50) {
            labels.insert((*label).to_owned(), (dice.pick(values)).into());
        }
    }
    labels.into()
}

fn labels_of_account(dice: &mut Dice) -> Value {
    labels(dice, &[("trust", &["high", "low"])])
}

fn selector(dice: &mut Dice) -> &'static str {
    dice.pick(&[
        "all()",
        "",
        "app == 'x'",
        "app != 'x'",
        "has(bad)",
        "!has(bad)",
        "app in {'x', 'y'}",
        "app not in {'x'}",
        "app == 'y' || role == 'r'",
        "has(app) && role != 's'",
        "app starts with 'z'",
        "projectcalico.org/namespace == 'a'",
        "!(app == 'x' && has(role))",
    ])
}

fn namespace_selector(dice: &mut Dice) -> &'static str {
    dice.pick(&[
        "all()",
        "env == 'prod'",
        "env != 'prod'",
        "!has(env)",
        "app == 'x'",
        "global()",
    ])
}

fn net(dice: &mut Dice) -> &'static str {
    dice.pick(&[
        "10.65.0.1/32",
        "10.65.0.2/31",
        "10.65.0.0/30",
        "10.65.0.4/32",
        "10.65.0.0/16",
        "192.0.2.0/24",
        "192.0.2.2/32",
        "0.0.0.0/0",
        "fd65::1/128",
        "fd65::2/127",
        "fd65::/64",
        "2001:db8::/64",
        "2001:db8::2/128",
        "::/0",
    ])
}

fn port(dice: &mut Dice) -> Value {
    dice.pick(&[
        json!(80),
        json!(81),
        json!(8080),
        json!(53),
        json!("80:81"),
        json!("54:8079"),
        json!(5000),
        json!("web"),
        json!("dns"),
        json!("sig"),
    ])
}

fn source_port(dice: &mut Dice) -> Value {
    dice.pick(&[
        json!("20000:29999"),
        json!("40000:49999"),
        json!("1:65535"),
        json!("30000:30001"),
        json!(7),
    ])
}

fn rule(dice: &mut Dice, may_pass: bool, ingress: bool) -> Value {
    let actions: &[&str] = if may_pass {
        &["Allow", "Allow", "Deny", "Pass", "Log"]
    } else {
        &["Allow", "Allow", "Deny", "Log"]
    };
    let mut rule = json!({"action": dice.pick(actions)});
    let mut with_ports = false;
    match dice.below(10) {
        0..=4 => {
            rule["protocol"] = (dice.pick(&["TCP", "TCP", "UDP", "SCTP"])).into();
            with_ports = true;
        }
        5 => {
            let (protocol, version) = dice.pick(&[("ICMP", 4), ("ICMPv6", 6)]);
            rule["protocol"] = protocol.into();
            rule["ipVersion"] = version.into();
            let echo = if version == 4 { 8 } else { 128 };
            let icmp = dice.pick(&[
                json!({"type": echo}),
                json!({"type": echo, "code": 0}),
                json!({"type": 3}),
                json!({"type": echo, "code": 1}),
            ]);
            rule[dice.pick(&["icmp", "notICMP"])] = icmp;
        }
        6 => rule["notProtocol"] = (dice.pick(&["TCP", "UDP", "ICMP", "SCTP"])).into(),
        7 => rule["ipVersion"] = (dice.pick(&[4, 6])).into(),
        _ => {}
    }
    let far = if ingress { "source" } else { "destination" };
    // Beside a service nothing else may be said of that side.
    let service = dice.percent(12);
    for side in ["source", "destination"] {
        if service && side == far {
            let mut services =
                json!({"name": dice.pick(&SERVICES), "namespace": dice.pick(&NAMESPACES)});
            if dice.percent(20) {
                services["name"] = "nobody".into();
            }
            rule[side] = json!({"services": services});
        } else if dice.percent(60) {
            rule[side] = entity(dice, with_ports, side == "source");
        }
    }
    rule
}

fn entity(dice: &mut Dice, with_ports: bool, is_source: bool) -> Value {
    let mut entity = json!({});
    if dice.percent(40) {
        entity["selector"] = selector(dice).into();
    }
    if dice.percent(15) {
        entity["notSelector"] = selector(dice).into();
    }
    if dice.percent(20) {
        entity["namespaceSelector"] = namespace_selector(dice).into();
    }
    if dice.percent(10) {
        entity["serviceAccounts"] = dice.pick(&[
            json!({"names": ["robot"]}),
            json!({"selector": "trust == 'high'"}),
            json!({"names": ["robot"], "selector": "has(trust)"}),
        ]);
    }
    if dice.percent(25) {
        entity["nets"] = json!(dice.some(3, net));
    }
    if dice.percent(10) {
        entity["notNets"] = json!(dice.some(2, net));
    }
    if with_ports {
        let draw = if is_source { source_port } else { port };
        let chance = if is_source { 15 } else { 60 };
        if dice.percent(chance) {
            entity["ports"] = json!(dice.some(3, draw));
        }
        if dice.percent(chance / 4) {
            entity["notPorts"] = json!(dice.some(2, draw));
        }
    }
    entity
}

fn label_selector(dice: &mut Dice, pods: bool) -> Value {
    let choices = if pods {
        [
            json!({}),
            json!({"matchLabels": {"app": "x"}}),
            json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["x", "y"]}]}),
            json!({"matchExpressions": [{"key": "bad", "operator": "DoesNotExist"}]}),
            json!({"matchLabels": {"role": "r"}, "matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["z"]}]}),
        ]
    } else {
        [
            json!({}),
            json!({"matchLabels": {"env": "prod"}}),
            json!({"matchLabels": {"kubernetes.io/metadata.name": "a"}}),
            json!({"matchExpressions": [{"key": "env", "operator": "Exists"}]}),
            json!({"matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["prod"]}]}),
        ]
    };
    dice.pick(&choices)
}

fn kubernetes_policy(dice: &mut Dice) -> Value {
    let types = dice.pick(&[["Ingress"].as_slice(), &["Egress"], &["Ingress", "Egress"]]);
    let mut spec = json!({"podSelector": label_selector(dice, true), "policyTypes": types});
    for (kind, field, peers) in [("Ingress", "ingress", "from"), ("Egress", "egress", "to")] {
        if types.contains(&kind) {
            let rules = (0..dice.below(3)).map(|_| {
                let mut rule = json!({});
                if dice.percent(80) {
                    rule[peers] = json!(dice.some(2, kubernetes_peer));
                }
                if dice.percent(60) {
                    rule["ports"] = json!(dice.some(2, kubernetes_port));
                }
                rule
            });
            spec[field] = rules.collect();
        }
    }
    spec
}

fn kubernetes_peer(dice: &mut Dice) -> Value {
    match dice.below(4) {
        0 => json!({"podSelector": label_selector(dice, true)}),
        1 => json!({"namespaceSelector": label_selector(dice, false)}),
        2 => {
            json!({"namespaceSelector": label_selector(dice, false), "podSelector": label_selector(dice, true)})
        }
        _ => dice.pick(&[
            json!({"ipBlock": {"cidr": "10.65.0.0/16", "except": ["10.65.0.2/31"]}}),
            json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["192.0.2.0/24", "10.65.0.1/32"]}}),
            json!({"ipBlock": {"cidr": "fd65::/64", "except": ["fd65::1/128"]}}),
            json!({"ipBlock": {"cidr": "::/0"}}),
        ]),
    }
}

fn kubernetes_port(dice: &mut Dice) -> Value {
    dice.pick(&[
        json!({"port": 80}),
        json!({"protocol": "TCP", "port": 80, "endPort": 81}),
        json!({"protocol": "UDP", "port": 53}),
        json!({"protocol": "UDP"}),
        json!({"protocol": "TCP", "port": "web"}),
        json!({"protocol": "UDP", "port": "dns"}),
        json!({"protocol": "SCTP", "port": 5000}),
        json!({"protocol": "SCTP", "port": "sig"}),
    ])
}
