use serde_json::{Value, json};

use super::{convert, interface_name};
use crate::AnyResource;
use crate::selector::Selector;

fn object(json: Value) -> AnyResource {
    AnyResource::from_json(json).unwrap()
}

/// The one object that it becomes, and no problems.
fn converted(json: Value) -> Value {
    let conversion = convert(&object(json));
    assert_eq!(conversion.problems, Vec::<String>::new());
    assert_eq!(conversion.resources.len(), 1, "{:?}", conversion.resources);
    conversion.resources[0].to_json()
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "web-0", "namespace": "shop", "uid": "u1", "resourceVersion": "7",
            "labels": {"app": "web"},
            "annotations": {"cni.projectcalico.org/containerID": "c0ffee", "cni.projectcalico.org/podIP": "10.0.0.9/32"}
        },
        "spec": {
            "nodeName": "node-1", "serviceAccountName": "runner",
            "containers": [{
                "name": "c",
                "ports": [
                    {"name": "http", "containerPort": 8080},
                    {"containerPort": 9090},
                    {"containerPort": 53, "hostPort": 5353, "protocol": "UDP"}
                ]
            }]
        },
        "status": {"podIPs": [{"ip": "10.0.0.5"}, {"ip": "fd00::5"}], "podIP": "10.0.0.5"}
    })
}

#[test]
fn a_pod_becomes_a_workload_endpoint() {
    assert_eq!(
        converted(pod()),
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
            "metadata": {
                "name": "node--1-k8s-web--0-eth0", "namespace": "shop", "uid": "u1", "resourceVersion": "7",
                "labels": {
                    "app": "web",
                    "projectcalico.org/namespace": "shop",
                    "projectcalico.org/orchestrator": "k8s",
                    "projectcalico.org/serviceaccount": "runner"
                }
            },
            "spec": {
                "orchestrator": "k8s", "node": "node-1", "containerID": "c0ffee", "pod": "web-0", "endpoint": "eth0",
                "serviceAccountName": "runner",
                "ipNetworks": ["10.0.0.5/32", "fd00::5/128"],
                "profiles": ["kns.shop", "ksa.shop.runner"],
                "interfaceName": interface_name("shop", "web-0"),
                "ports": [
                    {"name": "http", "protocol": "TCP", "port": 8080},
                    {"protocol": "UDP", "port": 53, "hostPort": 5353}
                ]
            }
        })
    );
}

#[test]
fn interface_names_are_the_first_eleven_digits_of_the_digest() {
    // printf 'default.nginx' | sha1sum
    assert_eq!(interface_name("default", "nginx"), "calic440f455693");
}

#[test]
fn the_plugins_annotation_counts_before_kubelet_reports_an_address() {
    let mut pod = pod();
    pod["status"] = json!({});
    assert_eq!(
        converted(pod.clone())["spec"]["ipNetworks"],
        json!(["10.0.0.9/32"])
    );
    pod["metadata"]["annotations"]["cni.projectcalico.org/podIPs"] =
        json!("10.0.0.7/32,fd00::7/128");
    assert_eq!(
        converted(pod)["spec"]["ipNetworks"],
        json!(["10.0.0.7/32", "fd00::7/128"])
    );
}

#[test]
fn pods_without_network_of_their_own_become_nothing() {
    let changes: [fn(&mut Value); 5] = [
        |pod| pod["spec"]["nodeName"] = json!(""),
        |pod| pod["spec"]["hostNetwork"] = json!(true),
        |pod| pod["status"]["phase"] = json!("Succeeded"),
        |pod| pod["status"]["phase"] = json!("Failed"),
        |pod| {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            pod["metadata"]["annotations"]["cni.projectcalico.org/podIP"] = json!("");
        },
    ];
    for change in changes {
        let mut pod = pod();
        change(&mut pod);
        assert_eq!(convert(&object(pod.clone())).resources, Vec::new(), "{pod}");
    }
}

#[test]
fn pod_annotations_set_what_they_name_and_bad_ones_are_reported() {
    let mut pod = pod();
    pod["metadata"]["annotations"] = json!({
        "cni.projectcalico.org/floatingIPs": "[\"198.51.100.7\"]",
        "cni.projectcalico.org/allowedSourcePrefixes": "[\"192.0.2.0/24\", \"192.0.2.1/24\"]",
        "qos.projectcalico.org/ingressBandwidth": "10M",
        "kubernetes.io/egress-bandwidth": "1G",
        "qos.projectcalico.org/dscp": "EF",
        "qos.projectcalico.org/egressPacketRate": "fast"
    });
    let conversion = convert(&object(pod));
    let spec = conversion.resources[0].to_json()["spec"].clone();
    assert_eq!(
        spec["ipNATs"],
        json!([{"internalIP": "10.0.0.5", "externalIP": "198.51.100.7"}])
    );
    assert_eq!(spec["allowSpoofedSourcePrefixes"], json!(["192.0.2.0/24"]));
    assert_eq!(
        spec["qosControls"],
        json!({
            "ingressBandwidth": 10_000_000, "ingressBurst": 4_294_967_296u64,
            "egressBandwidth": 1_000_000_000, "egressBurst": 4_294_967_296u64, "dscp": "EF"
        })
    );
    assert_eq!(
        conversion.problems,
        [
            "annotation cni.projectcalico.org/allowedSourcePrefixes: \"192.0.2.1/24\": 192.0.2.1/24 has bits set after its prefix; did you mean 192.0.2.0/24?",
            "annotation qos.projectcalico.org/egressPacketRate: \"fast\" is not a quantity",
        ]
    );
}

#[test]
fn a_namespace_becomes_a_profile_that_allows_and_passes_labels_on() {
    assert_eq!(
        converted(
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"env": "prod"}}})
        ),
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "Profile",
            "metadata": {"name": "kns.shop"},
            "spec": {
                "ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}],
                "labelsToApply": {"pcns.env": "prod", "pcns.projectcalico.org/name": "shop"}
            }
        })
    );
}

#[test]
fn a_service_account_becomes_a_profile_of_labels() {
    assert_eq!(
        converted(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "runner", "namespace": "shop", "labels": {"role": "x"}}, "secrets": [{"name": "s"}]
        })),
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "Profile",
            "metadata": {"name": "ksa.shop.runner"},
            "spec": {"labelsToApply": {"pcsa.role": "x", "pcsa.projectcalico.org/name": "runner"}}
        })
    );
}

#[test]
fn a_node_reads_its_annotations() {
    assert_eq!(
        converted(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": "node1", "labels": {"rack": "a"},
                "annotations": {
                    "projectcalico.org/IPv4Address": "192.0.2.1/24",
                    "projectcalico.org/ASNumber": "64999",
                    "projectcalico.org/IPv4VXLANTunnelAddr": "10.0.0.1",
                    "projectcalico.org/VXLANTunnelMACAddr": "66:00:00:00:00:01",
                    "projectcalico.org/WireguardPublicKey": "key",
                    "projectcalico.org/kube-labels": "{\"rack\": \"old\", \"zone\": \"z\"}",
                    "projectcalico.org/Interfaces": "[{\"name\": \"eth0\", \"addresses\": [\"192.0.2.1\"]}]"
                }
            },
            "spec": {"podCIDRs": ["10.1.0.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "Hostname", "address": "node1"}]}
        })),
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "Node",
            "metadata": {"name": "node1", "labels": {"rack": "a", "zone": "z"}},
            "spec": {
                "bgp": {"asNumber": 64999, "ipv4Address": "192.0.2.1/24"},
                "ipv4VXLANTunnelAddr": "10.0.0.1", "vxlanTunnelMACAddr": "66:00:00:00:00:01",
                "orchRefs": [{"nodeName": "node1", "orchestrator": "k8s"}],
                "addresses": [
                    {"address": "192.0.2.1/24", "type": "CalicoNodeIP"},
                    {"address": "192.0.2.1", "type": "InternalIP"}
                ],
                "interfaces": [{"name": "eth0", "addresses": ["192.0.2.1"]}]
            },
            "status": {"wireguardPublicKey": "key", "podCIDRs": ["10.1.0.0/24"]}
        })
    );
}

fn network_policy(spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": spec
    })
}

#[test]
fn a_kubernetes_policy_becomes_one_rule_for_each_protocol_and_peer() {
    let policy = network_policy(json!({
        "podSelector": {"matchLabels": {"app": "web"}, "matchExpressions": [
            {"key": "tier", "operator": "In", "values": ["b", "a"]}, {"key": "old", "operator": "DoesNotExist"}
        ]},
        "policyTypes": ["Ingress"],
        "ingress": [{
            "from": [
                {"podSelector": {"matchLabels": {"role": "lb"}}},
                {"namespaceSelector": {}},
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}
            ],
            "ports": [{"port": 80}, {"port": 82, "endPort": 90}, {"port": 81, "protocol": "TCP"}, {"port": "dns", "protocol": "UDP"}]
        }]
    }));
    let tcp = json!([json!("80:90")]);
    let udp = json!(["dns"]);
    let sources = [
        json!({"selector": "projectcalico.org/orchestrator == \"k8s\" && role == \"lb\""}),
        json!({"selector": "projectcalico.org/orchestrator == \"k8s\"", "namespaceSelector": "all()"}),
        json!({"nets": ["10.0.0.0/8"], "notNets": ["10.1.0.0/16"]}),
    ];
    let expected: Vec<Value> = [("TCP", &tcp), ("UDP", &udp)]
        .into_iter()
        .flat_map(|(protocol, ports)| {
            sources.iter().map(move |source| {
                json!({"action": "Allow", "protocol": protocol, "source": source, "destination": {"ports": ports}})
            })
        })
        .collect();
    assert_eq!(
        converted(policy),
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
            "metadata": {"name": "knp.default.p", "namespace": "shop"},
            "spec": {
                "tier": "default", "order": 1000,
                "selector": "projectcalico.org/orchestrator == \"k8s\" && app == \"web\" && tier in {\"a\", \"b\"} && !has(old)",
                "types": ["Ingress"],
                "ingress": expected
            }
        })
    );
}

#[test]
fn empty_lists_of_peers_and_ports_match_everything() {
    for (rule, expected) in [
        (json!({}), json!({"action": "Allow"})),
        (json!({"ports": [{}]}), json!({"action": "Allow"})),
        (
            json!({"ports": [{"protocol": "UDP"}, {"port": 53, "protocol": "UDP"}]}),
            json!({"action": "Allow", "protocol": "UDP"}),
        ),
    ] {
        let policy = converted(network_policy(json!({"podSelector": {}, "egress": [rule]})));
        assert_eq!(policy["spec"]["egress"], json!([expected]), "{rule}");
        assert_eq!(policy["spec"]["types"], json!(["Ingress", "Egress"]));
    }
}

#[test]
fn unusable_parts_of_a_policy_grant_nothing_and_are_reported() {
    let conversion = convert(&object(network_policy(json!({
        "podSelector": {}, "policyTypes": ["Ingress"],
        "ingress": [{
            "from": [
                {"ipBlock": {"cidr": "10.0.0.0/33"}},
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["nonsense"]}},
                {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}},
                {}
            ],
            "ports": [{"port": 80}]
        }, {"ports": [{"port": 90, "endPort": 80}]}],
        "egress": [{}]
    }))));
    let spec = conversion.resources[0].to_json()["spec"].clone();
    assert_eq!(spec.get("ingress"), None);
    assert_eq!(spec.get("egress"), None);
    assert_eq!(
        conversion.problems,
        [
            "spec.ingress[0].from[0]: \"10.0.0.0/33\" is not a CIDR: the prefix length must be between 0 and 32",
            "spec.ingress[0].from[1]: \"nonsense\" is not a CIDR: the prefix length is missing",
            "spec.ingress[0].from[2]: \"Near\" is not an operator of label selectors",
            "spec.ingress[0].from[3]: a peer needs ipBlock, podSelector or namespaceSelector",
            "spec.ingress[1].ports[0]: port range 90:80 ends before it starts",
            "Egress rules without policy type Egress have no effect",
        ]
    );
    let unclear = convert(&object(network_policy(
        json!({"podSelector": {"matchLabels": {"a b": "c"}}}),
    )));
    assert_eq!(unclear.resources, Vec::new());
    assert_eq!(
        unclear.problems,
        ["spec.podSelector: \"a b\" is not a label name"]
    );
}

#[test]
fn converted_selectors_parse() {
    let policy = converted(network_policy(
        json!({"podSelector": {"matchLabels": {"in": "x", "not": "in"}}}),
    ));
    let text = policy["spec"]["selector"].as_str().unwrap();
    assert_eq!(Selector::parse(text).unwrap().to_string(), text);
}

#[test]
fn services_stay_as_they_are() {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "n"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}
    });
    assert_eq!(converted(service.clone()), service);
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "s-1", "namespace": "n"},
        "addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}], "ports": [{"port": 80}]
    });
    assert_eq!(converted(slice.clone()), slice);
}
