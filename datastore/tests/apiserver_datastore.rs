//! The datastore over a real kube-apiserver: the behaviour suite with both groups of definitions, what only Kubernetes
//! has (views, secrets, schemas), and a server that fails.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use cali_api::schema::{Group, defined, definition};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::conformance::{self, Store, View};
use cali_datastore::kubernetes::{Kubernetes, Settings};
use cali_datastore::testing::ApiServer;
use cali_datastore::{Error, Warning, WatchEvent, sync};
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Request;
use kube::core::params::DeleteParams;
use serde_json::{Value, json};

type Behaviour = fn(Store) -> Pin<Box<dyn Future<Output = ()> + Send>>;

macro_rules! behaviours {
    ($($name:ident)+) => {
        &[$((stringify!($name), |store| Box::pin(conformance::$name(store)))),+]
    };
}

/// All but those that store what is a view here, or that count namespaces.
const BEHAVIOURS: &[(&str, Behaviour)] = behaviours! {
    create_gives_identity_and_revision
    create_twice_is_refused
    create_with_a_revision_is_refused
    update_swaps_only_the_expected_revision
    update_keeps_identity
    delete_honours_the_revision
    recreated_object_has_another_identity
    list_is_limited_to_kind_and_namespace
    pages_together_are_the_list
    invalid_objects_are_refused
    overlapping_pools_are_refused
    defaults_are_filled_in
    apply_creates_updates_and_leaves_alone
    apply_keeps_what_others_own
    watch_continues_a_list_without_a_gap
    watch_tells_only_its_kinds_in_commit_order
    foreign_revisions_are_gone
    concurrent_updates_lose_nothing
    sync_sends_everything_then_in_sync
};

fn definitions(group: Group) -> Vec<Value> {
    defined().map(|kind| definition(kind, group)).collect()
}

async fn cluster(groups: &[Group]) -> ApiServer {
    let server = ApiServer::start().await;
    for group in groups {
        server.define(&definitions(*group)).await;
    }
    for name in ["a", "a-b", "b"] {
        server.namespace(name).await;
    }
    server
}

fn store(server: &ApiServer, group: &str) -> Store {
    Arc::new(Kubernetes::new(Settings {
        group: Some(group.to_owned()),
        ..server.settings()
    }))
}

async fn clean(store: &Store) {
    for kind in [Kind::NetworkSet, Kind::IPPool, Kind::Tier] {
        for item in store.list(kind, None).await.expect("list").items {
            store
                .delete(&item.object.key(), None)
                .await
                .expect("delete");
        }
    }
    // Namespaces end when their controller says so, several at a time.
    let namespaces = store
        .list(Kind::K8sNamespace, None)
        .await
        .expect("list")
        .items;
    let of_tests: Vec<Key> = namespaces
        .iter()
        .map(|item| item.object.key())
        .filter(|key| key.name.starts_with('n'))
        .collect();
    for key in &of_tests {
        store.delete(key, None).await.expect("delete");
    }
    for key in &of_tests {
        while store.get(key).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
}

async fn raw(server: &ApiServer, path: &str, body: Value) -> Value {
    let request = Request::new(path)
        .create(&PostParams::default(), body.to_string().into_bytes())
        .expect("a request");
    let client = server.kubeconfig();
    let kubeconfig = kube::config::Kubeconfig::read_from(client).expect("a kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
        .await
        .expect("a configuration");
    let client = kube::Client::try_from(config).expect("a client");
    client
        .request(request)
        .await
        .expect("the object is accepted")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_behaviour_suite_passes_with_both_groups() {
    let server = cluster(&Group::ALL).await;
    for group in ["projectcalico.org/v3", "crd.projectcalico.org/v1"] {
        for (name, behaviour) in BEHAVIOURS {
            // Pods are the API server's own, whatever the group; and without a kubelet a deleted one does not go.
            if group != "projectcalico.org/v3" && *name == "apply_keeps_what_others_own" {
                continue;
            }
            let store = store(&server, group);
            clean(&store).await;
            println!("{group}: {name}");
            let done = tokio::time::timeout(conformance::PATIENCE * 2, behaviour(store)).await;
            assert!(done.is_ok(), "{group}: {name} hangs");
        }
        clean(&store(&server, group)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn views_secrets_and_schemas() {
    let server = cluster(&[Group::V3]).await;
    let store: Store = Arc::new(Kubernetes::new(server.settings()));
    nodes_are_annotations(&server, &store).await;
    namespaces_are_profiles(&store).await;
    secrets_are_read(&server, &store).await;
    pods_of_a_node_are_told_apart(&server, &store).await;
    pods_are_the_same_in_either_encoding(&server, &store).await;
    warnings_are_events_of_the_object(&server, &store).await;
    bad_manifests_are_refused(&server);
    good_manifests_are_read(&server, &store).await;
    unreadable_objects_keep_their_last_version(&server, &store).await;
    ipam_objects_are_swapped(&store).await;
}

async fn nodes_are_annotations(server: &ApiServer, store: &Store) {
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "n1", "labels": {"zone": "z"}, "annotations": {"other/x": "1"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}]}
    });
    raw(server, "/api/v1/nodes", node).await;
    let key = Key::cluster(Kind::Node, "n1");
    let list = store.list(Kind::Node, None).await.expect("list");
    let mut watch = store
        .watch(&[Kind::Node], &list.revision)
        .await
        .expect("watch");
    let read = store.get(&key).await.expect("get");
    let AnyResource::Node(node) = read.object.as_ref() else {
        panic!("{read:?}")
    };
    let mut edited = node.as_ref().clone();
    edited.spec.bgp.get_or_insert_default().ipv4_address = "192.0.2.7/24".parse().ok();
    let written = store.update(edited.clone().into()).await.expect("update");
    let AnyResource::Node(now) = written.object.as_ref() else {
        panic!("{written:?}")
    };
    assert_eq!(now.spec.bgp, edited.spec.bgp);
    assert_eq!(now.metadata.labels["zone"], "z");
    let stale = store.update(edited.into()).await;
    assert!(matches!(stale, Err(Error::Conflict { .. })), "{stale:?}");
    let native = store
        .get(&Key::cluster(Kind::K8sNode, "n1"))
        .await
        .expect("get");
    let annotations = &native.object.metadata().annotations;
    assert_eq!(annotations["projectcalico.org/IPv4Address"], "192.0.2.7/24");
    assert_eq!(annotations["other/x"], "1");
    let told = watch.next().await.expect("an event").expect("no error");
    assert!(
        matches!(&told, WatchEvent::Put(v) if v.object.key() == key),
        "{told:?}"
    );
    // The condition of the network stands beside those of others, and is written when it changes only.
    let condition = || {
        let output = server
            .kubectl(&["get", "node", "n1", "-o", "json"])
            .output();
        let node: Value = serde_json::from_slice(&output.expect("kubectl").stdout).expect("JSON");
        let conditions = node["status"]["conditions"].as_array().cloned();
        let mut ours = conditions.unwrap_or_default();
        ours.retain(|c| c["type"] == "NetworkUnavailable");
        assert_eq!(ours.len(), 1, "{node}");
        let revision = node["metadata"]["resourceVersion"].clone();
        (ours.remove(0)["status"].clone(), revision)
    };
    store.tell_network("n1", true).await.expect("tell");
    let (status, revision) = condition();
    assert_eq!(status, "False");
    store.tell_network("n1", true).await.expect("tell");
    assert_eq!(condition().1, revision);
    store.tell_network("n1", false).await.expect("tell");
    assert_eq!(condition().0, "True");
}

async fn namespaces_are_profiles(store: &Store) {
    let mut stream = sync::start(Arc::clone(store), &[Kind::Profile]);
    let mut view = View::default();
    view.until(&mut stream, View::in_sync).await;
    let names = ["kns.a", "kns.default", "projectcalico-default-allow"];
    for name in names {
        assert!(
            view.objects
                .contains_key(&Key::cluster(Kind::Profile, name)),
            "{name}"
        );
    }
    let key = Key::cluster(Kind::Profile, "kns.shop");
    store
        .create(conformance::namespace("shop", "one"))
        .await
        .expect("create");
    view.until(&mut stream, |v| v.objects.contains_key(&key))
        .await;
    store.get(&key).await.expect("the view can be read");
    store
        .delete(&Key::cluster(Kind::K8sNamespace, "shop"), None)
        .await
        .expect("delete");
    view.until(&mut stream, |v| !v.objects.contains_key(&key))
        .await;
    assert!(view.spurious_deletions.is_empty());
}

async fn pods_of_a_node_are_told_apart(server: &ApiServer, store: &Store) {
    let pod = |name: &str, node: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "a"},
            "spec": {"nodeName": node, "automountServiceAccountToken": false,
                "containers": [{"name": "c", "image": "i"}]}})
    };
    let pods = "/api/v1/namespaces/a/pods";
    raw(server, pods, pod("here", "n1")).await;
    raw(server, pods, pod("there", "n2")).await;
    let list = store.list_pods("n1").await.expect("list");
    let names: Vec<_> = list.items.iter().map(|i| i.object.key().name).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(&*names[0], "here");
    let mut watch = store.watch_pods("n1", &list.revision).await.expect("watch");
    raw(server, pods, pod("there-too", "n2")).await;
    raw(server, pods, pod("here-too", "n1")).await;
    let next = async {
        loop {
            match watch.next().await.expect("an event").expect("no error") {
                WatchEvent::Put(put) => break put.object.key().name.to_string(),
                WatchEvent::Bookmark(_) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let next = tokio::time::timeout(std::time::Duration::from_secs(30), next).await;
    assert_eq!(next.expect("in time"), "here-too");
}

/// Lists of Pods come in protobuf, single ones in JSON: both say the same of every field that is read.
async fn pods_are_the_same_in_either_encoding(server: &ApiServer, store: &Store) {
    let pods = "/api/v1/namespaces/a/pods";
    let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "u", "controller": true, "blockOwnerDeletion": false});
    let full = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "full-", "name": "full", "namespace": "a", "labels": {"app": "web", "empty": ""},
            "annotations": {"cni.projectcalico.org/podIP": "10.0.0.1/32", "long": "text ".repeat(100),
                "kubectl.kubernetes.io/last-applied-configuration": "{}"},
            "finalizers": ["example.org/stays"], "ownerReferences": [owner]},
        "spec": {"nodeName": "n3", "automountServiceAccountToken": false, "serviceAccountName": "default", "hostNetwork": true,
            "terminationGracePeriodSeconds": 7, "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [
                {"name": "c", "image": "i", "env": [{"name": "A", "value": "b"}], "ports": [
                    {"name": "http", "containerPort": 80, "hostPort": 80, "hostIP": "10.1.2.3"},
                    {"containerPort": 53, "protocol": "UDP", "hostPort": 53}]},
                {"name": "d", "image": "i"}]}});
    raw(server, pods, full).await;
    raw(server, pods, json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "plain", "namespace": "a"},
        "spec": {"automountServiceAccountToken": false, "containers": [{"name": "c", "image": "i"}]}})).await;
    let status = json!({"status": {"phase": "Running", "hostIP": "192.0.2.1", "podIP": "10.0.0.1",
        "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "conditions": [{"type": "Ready", "status": "True"}]}});
    let request = Request::new(pods)
        .patch_subresource(
            "status",
            "full",
            &PatchParams::default(),
            &Patch::Merge(&status),
        )
        .expect("a request");
    let client = server.client().await;
    let _: Value = client.request(request).await.expect("a status");
    // Its finalizer keeps it: with the moment of its deletion, and the time that it has.
    let request = Request::new(pods).delete("full", &DeleteParams::default());
    let _: Value = client
        .request(request.expect("a request"))
        .await
        .expect("a deletion");
    let list = store.list(Kind::K8sPod, Some("a")).await.expect("list");
    let mut names = Vec::new();
    for listed in &list.items {
        let key = listed.object.key();
        let read = store.get(&key).await.expect("read");
        assert_eq!(listed.object, read.object);
        assert_eq!(listed.revision, read.revision);
        names.push(key.name.to_string());
    }
    assert!(
        names.contains(&"full".to_owned()) && names.contains(&"plain".to_owned()),
        "{names:?}"
    );
    let Some(AnyResource::K8sPod(full)) = list
        .items
        .iter()
        .map(|item| item.object.as_ref())
        .find(|pod| &*pod.key().name == "full")
    else {
        panic!("{names:?}");
    };
    assert!(full.metadata.deletion_timestamp.is_some(), "{full:?}");
    assert_eq!(full.metadata.owner_references.len(), 1);
    assert_eq!(
        full.spec.containers[0].ports.as_ref().map(Vec::len),
        Some(2)
    );
}

async fn secrets_are_read(server: &ApiServer, store: &Store) {
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bgp", "namespace": "kube-system"},
        "stringData": {"rr": "very secret"}
    });
    raw(server, "/api/v1/namespaces/kube-system/secrets", secret).await;
    let read = store
        .secret("kube-system", "bgp")
        .await
        .expect("read")
        .expect("a secret");
    assert_eq!(read["rr"], b"very secret");
    assert_eq!(
        store.secret("kube-system", "none").await.expect("read"),
        None
    );
}

/// As `kubectl` shows them; the second time the same Event is counted up.
async fn warnings_are_events_of_the_object(server: &ApiServer, store: &Store) {
    let warning = |about: Key| Warning {
        about,
        node: "node1".to_owned(),
        reason: "NotUsable",
        note: "spec.selector: unexpected end".to_owned(),
    };
    let web = warning(Key::namespaced(Kind::NetworkPolicy, "a", "knp.default.web"));
    let all = warning(Key::cluster(Kind::GlobalNetworkPolicy, "all"));
    for one in [&web, &web, &all] {
        store.warn(one).await.expect("an event");
    }
    let shown = |namespace: &str| {
        let words = [
            "get",
            "events",
            "-n",
            namespace,
            "-o",
            "jsonpath={range .items[*]}{.involvedObject.apiVersion} {.involvedObject.kind}/{.involvedObject.name} {.reason} \
             {.source.component} {.source.host} {.count}: {.message}{'\\n'}{end}",
        ];
        let output = server.kubectl(&words).output().expect("kubectl");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(
        shown("a"),
        "networking.k8s.io/v1 NetworkPolicy/web NotUsable cali-node node1 2: spec.selector: unexpected end\n"
    );
    assert_eq!(
        shown("default"),
        "projectcalico.org/v3 GlobalNetworkPolicy/all NotUsable cali-node node1 1: spec.selector: unexpected end\n"
    );
}

fn apply(server: &ApiServer, manifest: &Value) -> Result<String, String> {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("manifest.json");
    std::fs::write(&file, manifest.to_string()).expect("a file");
    let output = server
        .kubectl(&["apply", "--server-side", "-f", &file.display().to_string()])
        .output()
        .expect("kubectl runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

fn calico(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

fn bad_manifests_are_refused(server: &ApiServer) {
    let rule = |rule: Value| json!({"selector": "all()", "ingress": [rule]});
    for (manifest, complaint) in [
        (
            calico(
                "IPPool",
                "p",
                json!({"cidr": "10.0.0.0/16", "blockSize": 12}),
            ),
            "blockSize must be between 20 and 32",
        ),
        (
            calico("IPPool", "p", json!({"cidr": "ten"})),
            "must be a CIDR",
        ),
        (calico("IPPool", "p", json!({})), "cidr"),
        (
            calico(
                "IPPool",
                "p",
                json!({"cidr": "fd00::/64", "ipipMode": "Always"}),
            ),
            "IPIP is only for IPv4",
        ),
        (
            calico(
                "IPPool",
                "p",
                json!({"cidr": "10.0.0.0/16", "ipipMode": "Sometimes"}),
            ),
            "Unsupported value",
        ),
        (
            calico(
                "IPPool",
                "p",
                json!({"cidr": "10.0.0.0/16", "natOutgoin": true}),
            ),
            "natOutgoin",
        ),
        (
            calico(
                "GlobalNetworkPolicy",
                "g",
                rule(json!({"action": "Allow", "destination": {"ports": [80]}})),
            ),
            "ports need protocol",
        ),
        (
            calico(
                "GlobalNetworkPolicy",
                "g",
                rule(json!({"action": "Allow", "source": {"nets": ["10.0.0.0/99"]}})),
            ),
            "must be an address or a CIDR",
        ),
        (
            calico("GlobalNetworkPolicy", "g", rule(json!({"action": "Alow"}))),
            "Allow",
        ),
        (
            calico("GlobalNetworkPolicy", "g", json!({"doNotTrack": true})),
            "need applyOnForward",
        ),
        (
            calico("HostEndpoint", "h", json!({"node": "n1"})),
            "interfaceName or expectedIPs",
        ),
        (calico("Tier", "a.b", json!({})), "no dots"),
    ] {
        let refused = apply(server, &manifest).expect_err(&manifest.to_string());
        assert!(refused.contains(complaint), "{manifest}: {refused}");
    }
}

async fn good_manifests_are_read(server: &ApiServer, store: &Store) {
    for manifest in [
        calico(
            "IPPool",
            "pool",
            json!({"cidr": "10.0.0.0/16", "natOutgoing": true}),
        ),
        calico(
            "GlobalNetworkPolicy",
            "good",
            json!({"selector": "role == 'db'", "types": ["Ingress"], "ingress": [
                {"action": "Allow", "protocol": "TCP", "source": {"nets": ["10.0.0.0/8", "fd00::1"]},
                 "destination": {"ports": [80, "8000:8010", "web"]}},
                {"action": "Deny", "protocol": 47}
            ]}),
        ),
    ] {
        apply(server, &manifest).expect("the manifest is accepted");
    }
    let pool = store
        .get(&Key::cluster(Kind::IPPool, "pool"))
        .await
        .expect("get");
    assert_eq!(pool.object.to_json()["spec"]["natOutgoing"], true);
    let policy = store
        .get(&Key::cluster(Kind::GlobalNetworkPolicy, "good"))
        .await
        .expect("get");
    assert_eq!(
        policy.object.to_json()["spec"]["ingress"][0]["destination"]["ports"],
        json!([80, "8000:8010", "web"])
    );
    let moved = calico("IPPool", "pool", json!({"cidr": "10.1.0.0/16"}));
    let refused = apply(server, &moved).expect_err("immutable");
    assert!(refused.contains("cannot be changed"), "{refused}");
}

async fn unreadable_objects_keep_their_last_version(server: &ApiServer, store: &Store) {
    store
        .create(conformance::network_set("a", "good", "10.0.0.0/8"))
        .await
        .expect("create");
    let mut stream = sync::start(Arc::clone(store), &[Kind::NetworkSet]);
    let mut view = View::default();
    view.until(&mut stream, View::in_sync).await;
    let patch = json!({"spec": {"nets": ["nonsense"]}});
    let request = Request::new("/apis/projectcalico.org/v3/namespaces/a/networksets")
        .patch("good", &PatchParams::default(), &Patch::Merge(&patch))
        .expect("a request");
    let config = kube::Config::from_custom_kubeconfig(
        kube::config::Kubeconfig::read_from(server.kubeconfig()).expect("a kubeconfig"),
        &Default::default(),
    )
    .await
    .expect("a configuration");
    kube::Client::try_from(config)
        .expect("a client")
        .request::<Value>(request)
        .await
        .expect("patched");
    store
        .create(conformance::network_set("a", "fence", "10.0.0.0/8"))
        .await
        .expect("create");
    let fence = Key::namespaced(Kind::NetworkSet, "a", "fence");
    view.until(&mut stream, |v| v.objects.contains_key(&fence))
        .await;
    let good = Key::namespaced(Kind::NetworkSet, "a", "good");
    assert_eq!(
        view.objects[&good].to_json()["spec"]["nets"],
        json!(["10.0.0.0/8"])
    );
    let list = store.list(Kind::NetworkSet, None).await.expect("list");
    assert_eq!(
        list.undecodable
            .iter()
            .map(|bad| &bad.key)
            .collect::<Vec<_>>(),
        [&good]
    );
    let read = store
        .get(&good)
        .await
        .expect_err("it cannot be read")
        .to_string();
    assert!(
        read.contains("NetworkSet(a/good)") && read.contains("nets"),
        "{read}"
    );
}

/// A block is claimed by one of many.
async fn ipam_objects_are_swapped(store: &Store) {
    let block = conformance::object(calico(
        "IPAMBlock",
        "10-9-0-0-26",
        json!({"cidr": "10.9.0.0/26", "affinity": "host:n1", "allocations": [null, 0], "unallocated": [0],
               "attributes": [{"handle_id": "h", "secondary": {"node": "n1"}}]}),
    ));
    let first = store.create(block).await.expect("create");
    assert_eq!(
        first.object.to_json()["spec"]["allocations"],
        json!([null, 0])
    );
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (store, object) = (Arc::clone(store), first.object.as_ref().clone());
        writers.spawn(async move {
            let mut value = object.to_json();
            value["spec"]["sequenceNumber"] = json!(7);
            value["spec"]["allocations"] = json!([0, 0]);
            store.update(conformance::object(value)).await.is_ok()
        });
    }
    let won = writers
        .join_all()
        .await
        .into_iter()
        .filter(|won| *won)
        .count();
    assert_eq!(won, 1, "writers under one revision");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stream_survives_restarts_and_compaction() {
    let mut server = cluster(&[Group::V3]).await;
    let store: Store = Arc::new(Kubernetes::new(server.settings()));
    conformance::stream_survives(store, 3, async |round| {
        if round == 1 {
            server.stop();
            server.etcd().compact().await;
        }
        server.restart().await;
    })
    .await;
}
