//! Fields of BGPPeer and BGPConfiguration that shape sessions.

use super::*;

#[test]
fn every_field_of_a_bgppeer_reaches_its_session() {
    let tor = peer(
        "tor",
        json!({"peerIP": "10.9.9.9:1179", "asNumber": "1.1", "localASNumber": 65077, "sourceAddress": "None",
            "maxRestartTime": "30s", "keepaliveTime": "20s", "numAllowedLocalASNumbers": 2, "ttlSecurity": 3,
            "nextHopMode": "Keep"}),
    );
    let one = settings(&with(&[tor]), "node1");
    let tor = neighbour(&one, "10.9.9.9");
    let session = &tor.session;
    assert_eq!(
        (session.port, session.remote_as, session.local_as),
        (1179, Some(65537), 65077)
    );
    assert_eq!((session.source, session.restart_time), (None, 30));
    assert_eq!(
        (session.keepalive, session.protection.ttl_hops),
        (Some(20), Some(3))
    );
    assert_eq!(
        (tor.exchange.allow_own_as, tor.exchange.next_hop),
        (2, NextHopMode::Keep)
    );
}

#[test]
fn keep_original_next_hop_counts_towards_external_peers_only() {
    let with_as = |asn: u32| {
        let keep = peer(
            "k",
            json!({"peerIP": "10.9.9.9", "asNumber": asn, "keepOriginalNextHop": true}),
        );
        let one = settings(&with(&[keep]), "node1");
        neighbour(&one, "10.9.9.9").exchange.next_hop
    };
    assert_eq!(with_as(65009), NextHopMode::Keep);
    assert_eq!(with_as(64512), NextHopMode::Auto);
}

#[test]
fn the_mesh_has_its_password_restart_time_and_each_nodes_port() {
    let mesh = configuration(json!({"nodeMeshMaxRestartTime": "42s",
        "nodeMeshPassword": {"secretKeyRef": {"name": "mesh", "key": "pw"}}}));
    let port = json!({"kind": "BGPConfiguration", "metadata": {"name": "node.node2"},
        "spec": {"listenPort": 1790, "asNumber": 65099, "nodeToNodeMeshEnabled": false}});
    let resources = resources(&with(&[mesh, port]));
    let mut local = local("node1");
    local.passwords = BTreeMap::from([(("mesh".to_owned(), "pw".to_owned()), "s3cret".to_owned())]);
    let one = compile(&resources, &local).unwrap();
    let two = &neighbour(&one, "10.0.1.2").session;
    assert_eq!((two.port, two.restart_time), (1790, 42));
    assert_eq!(two.protection.password.as_deref(), Some("s3cret"));
    // Only some fields of a node's own configuration count.
    assert_eq!(two.remote_as, Some(64512));
    assert_eq!(addresses(&one), ["10.0.1.2", "10.0.2.3", "fd00::2"]);
    local.node = "node2".to_owned();
    let listen = compile(&resources, &local).unwrap().listen;
    assert!(listen.iter().all(|l| l.port() == 1790), "{listen:?}");
}

#[test]
fn bind_mode_node_ip_listens_on_the_nodes_addresses_only() {
    let bound = settings(
        &with(&[configuration(json!({"bindMode": "NodeIP"}))]),
        "node1",
    );
    let text: Vec<String> = bound.listen.iter().map(ToString::to_string).collect();
    assert_eq!(text, ["10.0.1.1:179", "[fd00::1]:179"]);
    let free = settings(&three_nodes(), "node3");
    let text: Vec<String> = free.listen.iter().map(ToString::to_string).collect();
    assert_eq!(text, ["0.0.0.0:179"], "node3 has no IPv6 address");
}

#[test]
fn reachable_by_is_a_route_to_the_peer_and_not_one_to_tell_others() {
    let far = peer(
        "far",
        json!({"peerIP": "10.9.9.9", "asNumber": 65009, "reachableBy": "10.0.1.254"}),
    );
    let one = settings(&with(&[far]), "node1");
    let routes: Vec<String> = one
        .host
        .static_routes
        .iter()
        .map(|(to, by)| format!("{to} {by}"))
        .collect();
    assert_eq!(routes, ["10.9.9.9/32 10.0.1.254"]);
    assert_eq!(starting(&one), [] as [&str; 0]);
}

#[test]
fn a_peer_ip_that_is_a_node_is_peered_from_both_sides_unless_manual_or_another_port() {
    let off = configuration(json!({"nodeToNodeMeshEnabled": false}));
    let seen = |spec: Value| {
        let objects = with(&[off.clone(), peer("p", spec)]);
        addresses(&settings(&objects, "node2"))
    };
    let spec = json!({"node": "node1", "peerIP": "10.0.1.2", "asNumber": 64512});
    assert_eq!(seen(spec.clone()), ["10.0.1.1"]);
    let variant = |field: &str, value: Value| {
        let mut spec = spec.clone();
        spec[field] = value;
        seen(spec)
    };
    assert_eq!(variant("reversePeering", json!("Manual")), [] as [&str; 0]);
    assert_eq!(variant("peerIP", json!("10.0.1.2:1790")), [] as [&str; 0]);
    assert_eq!(variant("asNumber", json!(65009)), [] as [&str; 0]);
}

#[test]
fn a_local_as_number_is_what_the_other_side_expects() {
    let off = configuration(json!({"nodeToNodeMeshEnabled": false}));
    let spec = json!({"node": "node1", "peerSelector": "name == 'node2'", "localASNumber": 65077});
    let objects = with(&[off.clone(), peer("p", spec)]);
    let session = |node: &str, address: &str| {
        let settings = settings(&objects, node);
        let session = &neighbour(&settings, address).session;
        (session.local_as, session.remote_as)
    };
    assert_eq!(session("node1", "10.0.1.2"), (65077, Some(64512)));
    assert_eq!(session("node2", "10.0.1.1"), (64512, Some(65077)));
    // Where both are selected, both present it.
    let spec = json!({"nodeSelector": "name != 'node3'", "peerSelector": "name != 'node3'", "localASNumber": 65077});
    let objects = with(&[off, peer("p", spec)]);
    for (node, other) in [("node1", "10.0.1.2"), ("node2", "10.0.1.1")] {
        let settings = settings(&objects, node);
        let session = &neighbour(&settings, other).session;
        assert_eq!((session.local_as, session.remote_as), (65077, Some(65077)));
    }
}

fn workload(name: &str, node: &str, labels: Value, networks: &[&str]) -> Value {
    json!({"kind": "WorkloadEndpoint", "metadata": {"name": format!("{node}-k8s-{name}-eth0"), "namespace": "shop", "labels": labels},
        "spec": {"node": node, "orchestrator": "k8s", "pod": name, "endpoint": "eth0", "ipNetworks": networks}})
}

#[test]
fn selected_workloads_of_this_node_are_passive_peers() {
    let routers = peer(
        "routers",
        json!({"localWorkloadSelector": "app == 'router' && projectcalico.org/namespace == 'shop'", "asNumber": 65200}),
    );
    let workloads = [
        workload(
            "a",
            "node1",
            json!({"app": "router"}),
            &["10.10.1.5/32", "fd10::5/128"],
        ),
        workload("b", "node1", json!({"app": "web"}), &["10.10.1.6/32"]),
        workload("c", "node2", json!({"app": "router"}), &["10.10.2.5/32"]),
    ];
    let mut objects = with(&workloads);
    objects.push(configuration(json!({"nodeToNodeMeshEnabled": false,
        "localWorkloadPeeringIPV4": "169.254.200.1", "localWorkloadPeeringIPV6": "fd00:fefe::1"})));
    objects.push(routers.clone());
    let one = settings(&objects, "node1");
    assert_eq!(addresses(&one), ["10.10.1.5", "fd10::5"]);
    assert_eq!(one.host.notices, []);
    let pod = neighbour(&one, "10.10.1.5");
    assert_eq!(
        (pod.origin, pod.name.as_deref()),
        (Origin::LocalWorkload, Some("shop/node1-k8s-a-eth0"))
    );
    assert_eq!(
        (
            pod.session.passive,
            pod.session.source,
            pod.session.remote_as
        ),
        (true, None, Some(65200))
    );
    // Without a peering address the operator is told; a node that is not selected has none of it.
    objects.retain(|o| o["kind"] != "BGPConfiguration");
    let notices = settings(&objects, "node1").host.notices;
    assert!(
        notices
            .iter()
            .any(|n| n.reason.contains("localWorkloadPeeringIPV4")),
        "{notices:?}"
    );
    objects.pop();
    let mut elsewhere = routers;
    elsewhere["spec"]["node"] = json!("node2");
    objects.push(elsewhere);
    assert!(!addresses(&settings(&objects, "node1")).contains(&"10.10.1.5".to_owned()));
}

#[test]
fn a_thousand_mesh_peers_share_their_policies() {
    let mut objects: Vec<Value> = (1..=1000)
        .map(|n| {
            let address = format!("10.{}.{}.1/24", n / 250, n % 250);
            node(&format!("n{n}"), json!({"ipv4Address": address}))
        })
        .collect();
    objects.push(pool("v4", "10.10.0.0/16", true));
    let one = settings(&objects, "n1");
    assert_eq!(one.neighbours.len(), 999);
    let first = one.neighbours.values().next().unwrap();
    assert!(one.neighbours.values().all(|n| {
        Arc::ptr_eq(&n.exchange.export, &first.exchange.export)
            && Arc::ptr_eq(&n.exchange.import, &first.exchange.import)
    }));
}
