//! Automatic host endpoints: what is planned, and the real program that keeps them.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use cali_api::v3::{AutoHostEndpointConfig, Node};
use cali_api::{AnyResource, Key, Kind};
use cali_controllers::host_endpoints::{CREATED_BY, Plan, plan};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use serde_json::{Value, json};
use support::Replica;

const BOUND: Duration = Duration::from_secs(60);

fn node(name: &str, zone: &str) -> Node {
    let node = AnyResource::from_json(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "Node",
        "metadata": {"name": name, "labels": {"zone": zone}},
        "spec": {
            "bgp": {"ipv4Address": "192.0.2.1/24", "ipv6Address": "2001:db8::1/64", "ipv4IPIPTunnelAddr": "10.65.0.1"},
            "ipv4VXLANTunnelAddr": "10.65.0.2",
            "addresses": [{"address": "192.0.2.1/24"}, {"address": "198.51.100.7"}],
            "interfaces": [
                {"name": "eth0", "addresses": ["192.0.2.1", "2001:db8::1"]},
                {"name": "eth1", "addresses": ["198.51.100.7", "203.0.113.7"]},
                {"name": "storage.100", "addresses": []}
            ]
        }
    }));
    match node.unwrap() {
        AnyResource::Node(node) => *node,
        other => panic!("{other:?}"),
    }
}

fn on(config: Value) -> AutoHostEndpointConfig {
    serde_json::from_value(config).unwrap()
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn each_node_gets_one_for_all_its_interfaces_that_changes_nothing_by_itself() {
    let config = on(json!({"autoCreate": "Enabled"}));
    let plan = plan(&config, [&node("n1", "a")], &[]);
    let [endpoint] = plan.put.as_slice() else {
        panic!("{plan:?}")
    };
    assert_eq!(&*endpoint.metadata.name, "n1-auto-hep");
    assert_eq!(endpoint.spec.interface_name, "*");
    assert_eq!(endpoint.spec.node, "n1");
    assert_eq!(endpoint.spec.profiles, ["projectcalico-default-allow"]);
    assert_eq!(endpoint.metadata.labels["zone"], "a");
    assert_eq!(endpoint.metadata.labels[CREATED_BY.0], CREATED_BY.1);
    assert_eq!(
        endpoint.spec.expected_ips,
        ips(&[
            "192.0.2.1",
            "2001:db8::1",
            "10.65.0.1",
            "10.65.0.2",
            "198.51.100.7",
            "203.0.113.7"
        ])
    );
}

#[test]
fn what_stands_as_it_should_is_not_written_and_what_nobody_wants_goes() {
    let config = on(json!({"autoCreate": "Enabled"}));
    let stand = plan(&config, [&node("n1", "a"), &node("n2", "a")], &[]).put;
    assert_eq!(
        plan(&config, [&node("n1", "a"), &node("n2", "a")], &stand),
        Plan::default()
    );
    // A label of a node has changed, the other node is gone.
    let next = plan(&config, [&node("n1", "b")], &stand);
    assert_eq!(next.put.len(), 1);
    assert_eq!(next.put[0].metadata.labels["zone"], "b");
    assert_eq!(next.delete.len(), 1);
    assert_eq!(&*next.delete[0].metadata.name, "n2-auto-hep");
    let off = plan(
        &AutoHostEndpointConfig::default(),
        [&node("n1", "a")],
        &stand,
    );
    assert_eq!((off.put.len(), off.delete.len()), (0, 2));
}

#[test]
fn one_of_somebody_else_is_left_alone() {
    let config = on(json!({"autoCreate": "Enabled"}));
    let mut theirs = plan(&config, [&node("n1", "a")], &[]).put;
    theirs[0].metadata.labels.clear();
    let next = plan(&config, [&node("n1", "a")], &theirs);
    assert!(next.put.is_empty() && next.delete.is_empty());
    assert!(next.problems[0].contains("n1-auto-hep"), "{next:?}");
    let off = plan(&AutoHostEndpointConfig::default(), [], &theirs);
    assert!(off.delete.is_empty());
}

#[test]
fn templates_choose_nodes_and_addresses() {
    let config = on(json!({
        "autoCreate": "Enabled", "createDefaultHostEndpoint": "Disabled",
        "templates": [
            {"generateName": "out", "interfaceCIDRs": ["198.51.100.0/24"], "labels": {"side": "out", "zone": "x"}},
            {"generateName": "none", "interfaceCIDRs": ["100.64.0.0/10"]},
            {"generateName": "b", "interfaceCIDRs": ["0.0.0.0/0"], "nodeSelector": "zone == 'b'"}
        ]
    }));
    let plan = plan(&config, [&node("n1", "a")], &[]);
    let [endpoint] = plan.put.as_slice() else {
        panic!("{plan:?}")
    };
    assert_eq!(&*endpoint.metadata.name, "n1-out-auto-hep");
    assert_eq!(endpoint.spec.expected_ips, ips(&["198.51.100.7"]));
    assert_eq!(endpoint.metadata.labels["side"], "out");
    assert_eq!(endpoint.metadata.labels["zone"], "x", "the template's wins");
    assert_eq!(endpoint.metadata.labels[CREATED_BY.0], CREATED_BY.1);
}

#[test]
fn a_pattern_makes_one_for_each_interface_that_matches() {
    let config = |pattern: &str, generated: &str| {
        on(json!({
            "autoCreate": "Enabled", "createDefaultHostEndpoint": "Disabled",
            "templates": [{"generateName": generated, "interfacePattern": pattern, "interfaceCIDRs": ["10.65.0.2/32"]}]
        }))
    };
    let made = |config: &AutoHostEndpointConfig| -> Vec<(String, String, Vec<IpAddr>)> {
        let plan = plan(config, [&node("n1", "a")], &[]);
        assert_eq!(plan.problems, Vec::<String>::new());
        let of = |endpoint: cali_api::v3::HostEndpoint| {
            let name = endpoint.metadata.name.to_string();
            (
                name,
                endpoint.spec.interface_name,
                endpoint.spec.expected_ips,
            )
        };
        plan.put.into_iter().map(of).collect()
    };
    let eth1 = ["10.65.0.2", "198.51.100.7", "203.0.113.7"];
    assert_eq!(
        made(&config("^eth1$|^storage", "nic")),
        [
            ("n1-nic-eth1-auto-hep".into(), "eth1".into(), ips(&eth1)),
            (
                "n1-nic-storage.100-auto-hep".into(),
                "storage.100".into(),
                ips(&["10.65.0.2"])
            ),
        ]
    );
    assert_eq!(made(&config("wlan", "nic")), []);
    // An object's name is bounded.
    let long = made(&config("eth0", &"x".repeat(250)));
    let [(name, _, _)] = long.as_slice() else {
        panic!("{long:?}")
    };
    assert!(name.len() <= 253 && name.ends_with("-auto-hep"), "{name}");

    for (template, said) in [
        (
            json!({"generateName": "bad", "interfacePattern": "("}),
            "interfacePattern: ",
        ),
        (json!({"generateName": "bad"}), "or interfacePattern"),
    ] {
        let config = on(json!({"autoCreate": "Enabled", "templates": [template]}));
        let plan = plan(&config, [&node("n1", "a")], &[]);
        assert!(plan.problems[0].contains(said), "{:?}", plan.problems);
        // The one for all interfaces does not depend on it.
        assert_eq!(plan.put.len(), 1);
    }
}

/// Waits until the datastore holds these host endpoints, each with the label `zone`.
async fn until(store: &Sqlite, wanted: &[(&str, &str)]) {
    let end = Instant::now() + BOUND;
    loop {
        let list = store.list(Kind::HostEndpoint, None).await.unwrap();
        let seen: Vec<(String, String)> = list
            .items
            .iter()
            .map(|item| {
                let zone = item.object.labels().get("zone").cloned();
                (item.object.key().name.to_string(), zone.unwrap_or_default())
            })
            .collect();
        if seen
            .iter()
            .map(|(n, z)| (n.as_str(), z.as_str()))
            .eq(wanted.iter().copied())
        {
            return;
        }
        assert!(Instant::now() < end, "{seen:?} instead of {wanted:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_program_follows_nodes_and_the_setting_and_hands_over_to_another_replica() {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("cali.db");
    let store = Sqlite::open(&database).unwrap();
    let setting = |on: &str| -> Value {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "KubeControllersConfiguration",
            "metadata": {"name": "default"},
            "spec": {"controllers": {"node": {"hostEndpoint": {"autoCreate": on}}}}})
    };
    let put = async |value: Value| {
        store
            .apply(AnyResource::from_json(value).unwrap())
            .await
            .unwrap();
    };
    store.apply(node("n1", "a").into()).await.unwrap();
    put(setting("Enabled")).await;
    let first = Replica::start(&database, "first");
    until(&store, &[("n1-auto-hep", "a")]).await;
    store.apply(node("n2", "b").into()).await.unwrap();
    until(&store, &[("n1-auto-hep", "a"), ("n2-auto-hep", "b")]).await;
    drop(first);
    let _second = Replica::start(&database, "second");
    store.apply(node("n1", "c").into()).await.unwrap();
    store
        .delete(&Key::cluster(Kind::Node, "n2"), None)
        .await
        .unwrap();
    until(&store, &[("n1-auto-hep", "c")]).await;
    put(setting("Disabled")).await;
    until(&store, &[]).await;
}
