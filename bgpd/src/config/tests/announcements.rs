//! Which routes start at a node, and which of them leave it.

use super::*;
use crate::policy::Policy;

fn device(prefix: &str, interface: &str, kind: DeviceRouteKind, metric: u32) -> DeviceRoute {
    DeviceRoute {
        prefix: prefix.parse().unwrap(),
        interface: interface.into(),
        kind,
        metric,
    }
}

fn with_devices(objects: &[Value], devices: &[DeviceRoute]) -> Settings {
    let local = Local {
        devices: Arc::new(devices.iter().cloned().collect()),
        ..local("node1")
    };
    compile(&resources(objects), &local).unwrap()
}

/// What a peer is told of the routes that start here, each with its communities.
fn told(settings: &Settings, export: &Policy, peer: PeerKind) -> Vec<String> {
    let mut out = Vec::new();
    for route in settings.originated.values() {
        let view = RouteView {
            prefix: route.prefix,
            attributes: &route.attributes,
            source: RouteSource::Local(route.kind),
            interface: route.interface.as_deref(),
            peer,
        };
        if let Verdict::Accept(edits) = export.evaluate(&view) {
            let mut attributes = route.attributes.clone();
            export.apply(&edits, &mut attributes);
            let mut text = route.prefix.to_string();
            for community in &attributes.communities {
                text += &format!(" {community}");
            }
            for community in &attributes.large_communities {
                text += &format!(" {community}");
            }
            out.push(text);
        }
    }
    out
}

fn to_mesh(settings: &Settings) -> Vec<String> {
    let export = &neighbour(settings, "10.0.1.2").exchange.export;
    let mut all = told(settings, export, PeerKind::Ibgp);
    // The session carries IPv4 alone.
    all.retain(|prefix| prefix.contains('.'));
    all
}

fn service(name: &str, spec: Value, balancer: &[&str]) -> Value {
    let ingress: Vec<Value> = balancer.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}})
}

fn slice(service: &str, family: &str, endpoints: Value) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-1"), "namespace": "shop", "labels": {"kubernetes.io/service-name": service}},
        "addressType": family, "endpoints": endpoints})
}

#[test]
fn borrowed_addresses_leave_and_those_inside_own_blocks_do_not() {
    let written = |prefix, interface| device(prefix, interface, DeviceRouteKind::Written, 0);
    let objects = with(&[
        pool("v4", "10.10.0.0/16", true),
        pool("v6", "fd10::/48", true),
        affinity("10.10.1.0/26", "node1", "confirmed"),
        affinity("10.10.2.0/26", "node2", "confirmed"),
    ]);
    let one = with_devices(
        &objects,
        &[
            written("10.10.1.5/32", "cali1"),
            written("10.10.2.7/32", "cali2"),
            written("192.0.2.7/32", "cali3"),
            written("fd10::7/128", "cali2"),
        ],
    );
    assert_eq!(to_mesh(&one), ["10.10.1.0/26", "10.10.2.7/32"]);
    let v6 = &neighbour(&one, "fd00::2").exchange.export;
    let both = told(&one, v6, PeerKind::Ibgp);
    assert!(both.contains(&"fd10::7/128".to_owned()), "{both:?}");
}

#[test]
fn a_workload_that_moves_in_is_told_of_inside_an_own_block_with_its_own_preference() {
    let objects = with(&[
        pool("v4", "10.10.0.0/16", true),
        affinity("10.10.1.0/26", "node1", "confirmed"),
    ]);
    let moving = device("10.10.1.5/32", "cali1", DeviceRouteKind::Written, 512);
    let one = with_devices(&objects, std::slice::from_ref(&moving));
    assert_eq!(to_mesh(&one), ["10.10.1.0/26", "10.10.1.5/32"]);
    let route = &one.originated[&moving.prefix];
    assert_eq!(route.attributes.local_pref, Some(2_147_483_647 - 512));
    // Where 512 is what every route has, it is nothing special.
    let normal = configuration(json!({"ipv4NormalRoutePriority": 512}));
    let mut objects = objects;
    objects.push(normal);
    let one = with_devices(&objects, &[moving]);
    assert_eq!(to_mesh(&one), ["10.10.1.0/26"]);
    let block = one.originated.values().next().unwrap();
    assert_eq!(block.attributes.local_pref, Some(2_147_483_647 - 512));
}

#[test]
fn connected_networks_leave_if_a_pool_has_them_and_their_interface_is_not_ignored() {
    let connected = |prefix, interface| device(prefix, interface, DeviceRouteKind::Connected, 0);
    let devices = [
        connected("10.10.200.1/32", "lo"),
        connected("10.10.201.0/24", "eth5"),
        connected("10.10.202.0/24", "cali9"),
        connected("10.10.203.1/32", "kube-ipvs0"),
        connected("10.0.1.0/24", "eth0"),
    ];
    let base = with(&[pool("v4", "10.10.0.0/16", true)]);
    let all = with_devices(&base, &devices);
    assert_eq!(to_mesh(&all), ["10.10.200.1/32", "10.10.201.0/24"]);
    assert!(starting(&all).contains(&"10.0.1.0/24".to_owned()));
    let mut ignoring = base;
    ignoring.push(configuration(json!({"ignoredInterfaces": ["eth*"]})));
    assert_eq!(
        starting(&with_devices(&ignoring, &devices)),
        ["10.10.200.1/32"]
    );
}

#[test]
fn tunnel_addresses_stay_out_of_internal_sessions() {
    let written = |prefix, interface| device(prefix, interface, DeviceRouteKind::Written, 0);
    let devices = [
        written("10.10.9.1/32", "vxlan.calico"),
        written("10.10.9.2/32", "wireguard.cali"),
        written("10.10.9.3/32", "tunl0"),
        written("10.10.9.4/32", "bpfout.cali"),
        written("10.10.9.5/32", "cali5"),
    ];
    let tor = peer("tor", json!({"peerIP": "10.9.9.9", "asNumber": 65009}));
    let objects = with(&[pool("v4", "10.10.0.0/16", true), tor]);
    let one = with_devices(&objects, &devices);
    assert_eq!(to_mesh(&one), ["10.10.9.5/32"]);
    let export = &neighbour(&one, "10.9.9.9").exchange.export;
    assert_eq!(
        told(&one, export, PeerKind::Ebgp),
        [
            "10.10.9.1/32",
            "10.10.9.2/32",
            "10.10.9.3/32",
            "10.10.9.5/32"
        ]
    );
    // tunl0's routes are BGP's own business where BGP programs IPIP.
    let mut by_bgp = objects;
    by_bgp.push(configuration(json!({"programClusterRoutes": "Enabled"})));
    let one = with_devices(&by_bgp, &devices);
    assert_eq!(to_mesh(&one), ["10.10.9.3/32", "10.10.9.5/32"]);
}

#[test]
fn a_pool_with_disabled_export_keeps_blocks_and_borrowed_addresses_in() {
    let objects = with(&[
        pool("closed", "10.20.0.0/16", false),
        affinity("10.20.1.0/26", "node1", "confirmed"),
    ]);
    let borrowed = device("10.20.2.1/32", "cali1", DeviceRouteKind::Written, 0);
    assert_eq!(
        to_mesh(&with_devices(&objects, &[borrowed])),
        [] as [&str; 0]
    );
}

#[test]
fn communities_follow_the_prefix_and_a_node_may_have_its_own() {
    let objects = |extra: Vec<Value>| {
        let mut all = with(&[
            pool("v4", "10.10.0.0/16", true),
            affinity("10.10.1.0/26", "node1", "confirmed"),
            configuration(
                json!({"communities": [{"name": "internal", "value": "64512:7"}],
                "prefixAdvertisements": [{"cidr": "10.10.0.0/16", "communities": ["internal", "64512:1:2"]}]}),
            ),
        ]);
        all.extend(extra);
        all
    };
    let one = with_devices(&objects(vec![]), &[]);
    assert_eq!(to_mesh(&one), ["10.10.1.0/26 64512:7 64512:1:2"]);
    let own = json!({"kind": "BGPConfiguration", "metadata": {"name": "node.node1"},
        "spec": {"prefixAdvertisements": [{"cidr": "10.10.1.0/26", "communities": ["64512:9"]}]}});
    let one = with_devices(&objects(vec![own]), &[]);
    assert_eq!(to_mesh(&one), ["10.10.1.0/26 64512:9"]);
}

const RANGES: &str = r#"{"serviceClusterIPs": [{"cidr": "10.96.0.0/12"}, {"cidr": "fd96::/112"}],
    "serviceExternalIPs": [{"cidr": "203.0.113.0/24"}, {"cidr": "198.51.100.9/32"}],
    "serviceLoadBalancerIPs": [{"cidr": "192.0.2.0/24"}, {"cidr": "198.51.100.5/32"}]}"#;

fn ranges() -> Value {
    configuration(serde_json::from_str(RANGES).unwrap())
}

#[test]
fn service_ranges_start_at_every_node_single_addresses_of_them_do_not() {
    for node in ["node1", "node2"] {
        let one = settings(&with(&[ranges()]), node);
        assert_eq!(
            starting(&one),
            [
                "10.96.0.0/12",
                "192.0.2.0/24",
                "203.0.113.0/24",
                "fd96::/112"
            ],
            "{node}"
        );
    }
    let one = settings(&with(&[ranges()]), "node1");
    assert_eq!(to_mesh(&one).len(), 3, "whatever the pools are");
}

#[test]
fn a_local_service_starts_where_it_has_a_ready_endpoint() {
    let local_service = |spec: Value| {
        let mut spec = spec;
        spec["externalTrafficPolicy"] = json!("Local");
        service("web", spec, &["192.0.2.80", "10.99.99.99"])
    };
    let web = local_service(json!({"type": "LoadBalancer", "clusterIP": "10.96.1.1",
        "clusterIPs": ["10.96.1.1", "fd96::1"], "externalIPs": ["203.0.113.80", "8.8.8.8"]}));
    let endpoints = slice(
        "web",
        "IPv4",
        json!([{"addresses": ["10.10.1.5"], "nodeName": "node1", "conditions": {"ready": true}},
               {"addresses": ["10.10.2.5"], "nodeName": "node2", "conditions": {"ready": false}},
               {"addresses": ["10.10.3.5"], "nodeName": "node3"}]),
    );
    let objects = with(&[ranges(), web, endpoints]);
    let hosts = |node: &str| {
        let all = starting(&settings(&objects, node));
        all.into_iter()
            .filter(|p| p.ends_with("/32") || p.ends_with("/128"))
            .collect::<Vec<_>>()
    };
    let here = ["10.96.1.1/32", "192.0.2.80/32", "203.0.113.80/32"];
    assert_eq!(hosts("node1"), here);
    assert_eq!(hosts("node2"), [] as [&str; 0], "its endpoint is not ready");
    assert_eq!(hosts("node3"), here, "not to know counts as ready");
}

#[test]
fn other_services_start_everywhere_only_where_their_range_is_one_address_or_not_aggregated() {
    let web = service(
        "web",
        json!({"type": "LoadBalancer", "clusterIP": "10.96.1.1", "externalIPs": ["203.0.113.80", "198.51.100.9"]}),
        &["192.0.2.80", "198.51.100.5"],
    );
    let endpoints = slice(
        "web",
        "IPv4",
        json!([{"addresses": ["10.10.2.5"], "nodeName": "node2"}]),
    );
    let hosts = |objects: &[Value]| {
        let all = starting(&settings(objects, "node1"));
        all.into_iter()
            .filter(|p| p.ends_with("/32"))
            .collect::<Vec<_>>()
    };
    let objects = with(&[ranges(), web.clone(), endpoints.clone()]);
    assert_eq!(hosts(&objects), ["198.51.100.5/32", "198.51.100.9/32"]);
    let mut apart: Value = serde_json::from_str(RANGES).unwrap();
    apart["serviceLoadBalancerAggregation"] = json!("Disabled");
    let apart = configuration(apart);
    let objects = with(&[apart.clone(), web.clone(), endpoints]);
    assert_eq!(
        hosts(&objects),
        ["192.0.2.80/32", "198.51.100.5/32", "198.51.100.9/32"]
    );
    assert!(!starting(&settings(&objects, "node1")).contains(&"192.0.2.0/24".to_owned()));
    // Without any ready endpoint nobody announces it.
    assert!(!hosts(&with(&[apart, web])).contains(&"192.0.2.80/32".to_owned()));
}

#[test]
fn headless_and_alias_services_have_nothing_to_announce() {
    let objects = with(&[
        ranges(),
        service(
            "headless",
            json!({"clusterIP": "None", "externalIPs": ["198.51.100.9"]}),
            &[],
        ),
        service(
            "alias",
            json!({"type": "ExternalName", "externalName": "a.example", "externalIPs": ["198.51.100.9"]}),
            &[],
        ),
    ]);
    let all = starting(&settings(&objects, "node1"));
    assert!(!all.contains(&"198.51.100.9/32".to_owned()), "{all:?}");
}

#[test]
fn an_excluded_node_announces_no_service_and_still_keeps_their_ranges_out_of_its_kernel() {
    let mut objects = with(&[ranges()]);
    objects[0]["metadata"]["labels"]["node.kubernetes.io/exclude-from-external-load-balancers"] =
        json!("true");
    let one = settings(&objects, "node1");
    assert_eq!(starting(&one), [] as [&str; 0]);
    assert!(
        one.host
            .not_programmed
            .covers(&"10.96.0.0/12".parse().unwrap())
    );
    assert!(
        one.host
            .not_programmed
            .covers(&"192.0.2.80/32".parse().unwrap())
    );
    assert!(
        !one.host
            .not_programmed
            .covers(&"10.10.1.0/26".parse().unwrap())
    );
}

#[test]
fn a_pod_elsewhere_and_a_slice_without_service_change_nothing() {
    let mut resources = Resources::of_node("node1");
    let mut apply = |object: Value| {
        let value = AnyResource::from_json(object).unwrap();
        resources.apply(&Update {
            key: value.key(),
            value: Some(Arc::new(value)),
            revision: Revision::from("1"),
        })
    };
    let endpoint = |node: &str| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
            "metadata": {"name": format!("{node}-k8s-a-eth0"), "namespace": "shop"},
            "spec": {"node": node, "orchestrator": "k8s", "pod": "a", "endpoint": "eth0", "ipNetworks": ["10.10.1.5/32"]}})
    };
    assert!(!apply(endpoint("node2")));
    assert!(apply(endpoint("node1")));
    assert!(!apply(endpoint("node1")), "the same again");
    let mut nobodys = slice("web", "IPv4", json!([]));
    nobodys["metadata"]["labels"] = json!({});
    assert!(!apply(nobodys));
}
