//! Resources in, settings out.

mod announcements;
mod filters;
mod peering;

use std::sync::Arc;

use cali_api::update::Update;
use cali_api::{AnyResource, Revision};
use serde_json::{Value, json};

use super::*;
use crate::policy::{LocalKind, RouteView, Verdict};
use crate::rib::{NextHopMode, RouteSource};
use crate::speaker::settings::Neighbour;
use crate::wire::{Attributes, PeerKind};
use cali_control::status::PeerKind as Origin;

fn resources(objects: &[Value]) -> Resources {
    let mut resources = Resources::default();
    for object in objects {
        let mut object = object.clone();
        if object.get("apiVersion").is_none() {
            object["apiVersion"] = json!("projectcalico.org/v3");
        }
        let value = AnyResource::from_json(object).unwrap();
        let update = Update {
            key: value.key(),
            value: Some(Arc::new(value)),
            revision: Revision::from("1"),
        };
        resources.apply(&update);
    }
    resources
}

fn node(name: &str, bgp: Value) -> Value {
    json!({"kind": "Node", "metadata": {"name": name, "labels": {"name": name}}, "spec": {"bgp": bgp}})
}

fn peer(name: &str, spec: Value) -> Value {
    json!({"kind": "BGPPeer", "metadata": {"name": name}, "spec": spec})
}

fn three_nodes() -> Vec<Value> {
    vec![
        node(
            "node1",
            json!({"ipv4Address": "10.0.1.1/24", "ipv6Address": "fd00::1/64"}),
        ),
        node(
            "node2",
            json!({"ipv4Address": "10.0.1.2/24", "ipv6Address": "fd00::2/64"}),
        ),
        node(
            "node3",
            json!({"ipv4Address": "10.0.2.3/24", "asNumber": 65003}),
        ),
    ]
}

fn with(extra: &[Value]) -> Vec<Value> {
    let mut all = three_nodes();
    all.extend_from_slice(extra);
    all
}

fn local(name: &str) -> Local {
    Local {
        node: name.to_owned(),
        ..Local::default()
    }
}

fn settings(objects: &[Value], name: &str) -> Settings {
    compile(&resources(objects), &local(name)).unwrap()
}

/// The cluster's BGPConfiguration.
fn configuration(spec: Value) -> Value {
    json!({"kind": "BGPConfiguration", "metadata": {"name": "default"}, "spec": spec})
}

/// Destinations of the routes that start at a node.
fn starting(settings: &Settings) -> Vec<String> {
    settings
        .originated
        .keys()
        .map(ToString::to_string)
        .collect()
}

fn addresses(settings: &Settings) -> Vec<String> {
    settings
        .neighbours
        .keys()
        .map(ToString::to_string)
        .collect()
}

fn neighbour<'a>(settings: &'a Settings, address: &str) -> &'a Neighbour {
    &settings.neighbours[&address.parse::<IpAddr>().unwrap()]
}

#[test]
fn the_mesh_has_one_session_per_shared_family() {
    let one = settings(&three_nodes(), "node1");
    assert_eq!(addresses(&one), ["10.0.1.2", "10.0.2.3", "fd00::2"]);
    let v6 = neighbour(&one, "fd00::2");
    assert_eq!(v6.origin, Origin::Mesh);
    assert_eq!(v6.session.families, crate::wire::FamilySet::IPV6);
    assert_eq!(v6.session.source, Some("fd00::1".parse().unwrap()));
    assert_eq!(v6.session.remote_as, Some(64512));
    assert_eq!(neighbour(&one, "10.0.2.3").session.remote_as, Some(65003));
    assert_eq!(one.router_id, Ipv4Addr::new(10, 0, 1, 1));
    assert_eq!(settings(&three_nodes(), "node3").local_as, 65003);
}

#[test]
fn the_mesh_can_be_off_and_leaves_reflectors_out() {
    let off = json!({"kind": "BGPConfiguration", "metadata": {"name": "default"},
        "spec": {"nodeToNodeMeshEnabled": false, "asNumber": 65000, "listenPort": 1790}});
    let one = settings(&with(&[off]), "node1");
    assert!(one.neighbours.is_empty());
    assert_eq!(one.local_as, 65000);
    assert!(one.listen.iter().all(|l| l.port() == 1790));
    let reflector = node(
        "node3",
        json!({"ipv4Address": "10.0.2.3/24", "routeReflectorClusterID": "1.0.0.1"}),
    );
    assert_eq!(
        addresses(&settings(&with(std::slice::from_ref(&reflector)), "node1")),
        ["10.0.1.2", "fd00::2"]
    );
    assert!(settings(&with(&[reflector]), "node3").neighbours.is_empty());
}

#[test]
fn bgppeers_select_nodes_by_name_selector_or_not_at_all() {
    let objects = with(&[
        peer("all", json!({"peerIP": "10.9.9.9", "asNumber": 65009})),
        peer(
            "one",
            json!({"node": "node1", "peerIP": "10.9.9.1:1790", "asNumber": 65009, "nextHopMode": "Self"}),
        ),
        peer(
            "some",
            json!({"nodeSelector": "name == 'node2'", "peerIP": "10.9.9.2", "asNumber": 65009}),
        ),
    ]);
    let one = settings(&objects, "node1");
    assert_eq!(
        addresses(&one),
        ["10.0.1.2", "10.0.2.3", "10.9.9.1", "10.9.9.9", "fd00::2"]
    );
    assert_eq!(neighbour(&one, "10.9.9.9").origin, Origin::Global);
    let specific = neighbour(&one, "10.9.9.1");
    assert_eq!(
        (specific.origin, specific.session.port),
        (Origin::NodeSpecific, 1790)
    );
    assert_eq!(specific.exchange.next_hop, NextHopMode::SelfAddress);
    assert!(addresses(&settings(&objects, "node2")).contains(&"10.9.9.2".to_owned()));
}

#[test]
fn peer_selector_peers_from_both_sides() {
    let reflector = node(
        "node3",
        json!({"ipv4Address": "10.0.2.3/24", "routeReflectorClusterID": "1.0.0.1"}),
    );
    let select = peer(
        "rr",
        json!({"nodeSelector": "name != 'node3'", "peerSelector": "name == 'node3'"}),
    );
    let off = json!({"kind": "BGPConfiguration", "metadata": {"name": "default"}, "spec": {"nodeToNodeMeshEnabled": false}});
    let objects = with(&[reflector, select, off]);
    assert_eq!(addresses(&settings(&objects, "node1")), ["10.0.2.3"]);
    let three = settings(&objects, "node3");
    assert_eq!(addresses(&three), ["10.0.1.1", "10.0.1.2"]);
    let client = neighbour(&three, "10.0.1.1").exchange.reflector_client;
    assert_eq!(client, Some(Ipv4Addr::new(1, 0, 0, 1)));
}

#[test]
fn a_password_that_is_not_there_blocks_the_session() {
    let secured = peer(
        "tor",
        json!({"peerIP": "10.9.9.9", "asNumber": 65009,
        "password": {"secretKeyRef": {"name": "bgp", "key": "tor"}}}),
    );
    let resources = resources(&with(&[secured]));
    let mut local = local("node1");
    let settings = compile(&resources, &local).unwrap();
    let reason = neighbour(&settings, "10.9.9.9")
        .session
        .blocked
        .clone()
        .unwrap();
    assert!(reason.contains("bgp") && reason.contains("tor"), "{reason}");
    local
        .passwords
        .insert(("bgp".to_owned(), "tor".to_owned()), "secret".to_owned());
    let settings = compile(&resources, &local).unwrap();
    let session = &neighbour(&settings, "10.9.9.9").session;
    assert_eq!(
        (
            session.blocked.clone(),
            session.protection.password.as_deref()
        ),
        (None, Some("secret"))
    );
}

#[test]
fn a_bad_bgppeer_is_reported_and_the_others_stand() {
    let objects = with(&[
        peer("bad", json!({"peerSelector": "name =="})),
        peer("good", json!({"peerIP": "10.9.9.9", "asNumber": 65009})),
    ]);
    let settings = compile(&resources(&objects), &local("node1")).unwrap();
    assert_eq!(
        settings
            .host
            .notices
            .iter()
            .map(|n| n.object.as_str())
            .collect::<Vec<_>>(),
        ["BGPPeer bad"]
    );
    assert!(addresses(&settings).contains(&"10.9.9.9".to_owned()));
}

#[test]
fn problems_name_what_is_missing() {
    let none = compile(&Resources::default(), &local("node1")).unwrap_err();
    assert_eq!(none, Problem::NoNode("node1".to_owned()));
    let v6_only = [node("node1", json!({"ipv6Address": "fd00::1/64"}))];
    assert_eq!(
        compile(&resources(&v6_only), &local("node1")).unwrap_err(),
        Problem::NoRouterId("node1".to_owned())
    );
    let hashed = Local {
        router_id: RouterId::Hash,
        ..local("node1")
    };
    assert!(compile(&resources(&v6_only), &hashed).is_ok());
}

fn affinity(cidr: &str, node: &str, state: &str) -> Value {
    let name = format!("{node}-{}", cidr.replace(['.', '/'], "-"));
    json!({"kind": "BlockAffinity", "metadata": {"name": name},
        "spec": {"cidr": cidr, "node": node, "state": state, "deleted": "false"}})
}

fn pool(name: &str, cidr: &str, exported: bool) -> Value {
    json!({"kind": "IPPool", "metadata": {"name": name}, "spec": {"cidr": cidr, "disableBGPExport": !exported}})
}

#[test]
fn confirmed_blocks_of_this_node_are_originated() {
    let objects = with(&[
        affinity("10.10.1.0/26", "node1", "confirmed"),
        affinity("10.10.1.64/26", "node1", "pending"),
        affinity("10.10.2.0/26", "node2", "confirmed"),
    ]);
    let one = settings(&objects, "node1");
    let routes: Vec<String> = one
        .originated
        .keys()
        .map(|p| format!("{}/{}", p.addr(), p.len()))
        .collect();
    assert_eq!(routes, ["10.10.1.0/26"]);
    let route = one.originated.values().next().unwrap();
    assert_eq!(route.attributes.local_pref, Some(2_147_482_623));
}

#[test]
fn export_follows_blocks_pools_and_filters() {
    let filter = json!({"kind": "BGPFilter", "metadata": {"name": "f"}, "spec": {"exportV4": [
        {"cidr": "10.10.9.0/24", "matchOperator": "In", "action": "Reject"},
        {"cidr": "203.0.113.0/24", "matchOperator": "Equal", "action": "Accept"}]}});
    let objects = with(&[
        pool("open", "10.10.0.0/16", true),
        pool("closed", "10.20.0.0/16", false),
        affinity("10.10.1.0/26", "node1", "confirmed"),
        affinity("10.20.1.0/26", "node1", "confirmed"),
        filter,
        peer(
            "tor",
            json!({"peerIP": "10.9.9.9", "asNumber": 65009, "filters": ["f"]}),
        ),
    ]);
    let one = settings(&objects, "node1");
    let export = &neighbour(&one, "10.9.9.9").exchange.export;
    let accepts = |text: &str, source| {
        let attributes = Attributes {
            local_pref: Some(2_147_482_623),
            ..Attributes::default()
        };
        let view = RouteView {
            prefix: text.parse().unwrap(),
            attributes: &attributes,
            source,
            interface: None,
            peer: PeerKind::Ebgp,
        };
        matches!(export.evaluate(&view), Verdict::Accept(_))
    };
    let (own, bgp) = (
        RouteSource::Local(LocalKind::Block),
        RouteSource::Bgp(PeerKind::Ibgp),
    );
    let cases = [
        ("10.10.1.0/26", own, true),
        ("10.20.1.0/26", own, false),
        ("10.10.1.5/32", bgp, false),
        ("10.10.2.0/26", bgp, true),
        ("10.10.9.0/26", bgp, false),
        ("203.0.113.0/24", bgp, true),
        ("192.0.2.0/24", bgp, false),
    ];
    for (prefix, source, expected) in cases {
        assert_eq!(accepts(prefix, source), expected, "{prefix}");
    }
}

#[test]
fn an_unrelated_change_leaves_the_settings_equal() {
    let objects = with(&[affinity("10.10.2.0/26", "node2", "confirmed")]);
    assert_eq!(
        settings(&three_nodes(), "node1"),
        settings(&objects, "node1")
    );
}
