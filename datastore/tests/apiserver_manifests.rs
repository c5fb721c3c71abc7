//! The manifests of `deploy/kubernetes` on a real API server: every overlay is accepted, field by field, and the accounts may do
//! what their part does and no more; a node writes its own objects and no other's.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cali_datastore::testing::ApiServer;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use serde_json::{Value, json};

/// Objects of kinds that the same manifest defines are accepted once the API server serves these.
const DEFINED: Duration = Duration::from_secs(60);

fn overlays() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/overlays");
    let mut all: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder of overlays")
        .map(|entry| entry.expect("an overlay").path())
        .collect();
    all.sort();
    all
}

/// What a user types; typed again where it says that a kind is not there yet.
fn apply(server: &ApiServer, overlay: &Path) -> String {
    let folder = overlay.display().to_string();
    let words = ["apply", "--server-side", "--validate=strict", "-k", &folder];
    let end = Instant::now() + DEFINED;
    loop {
        let said = match server.kubectl_says(&words, "") {
            Ok(said) => return said,
            Err(said) => said,
        };
        let waits = said.contains("no matches for kind")
            || said.contains("could not find the requested resource");
        assert!(waits && Instant::now() < end, "{folder}:\n{said}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn may(server: &ApiServer, account: &str, words: &[&str]) -> bool {
    let who = format!("--as=system:serviceaccount:kube-system:{account}");
    let mut all = vec!["auth", "can-i", &who];
    all.extend(words);
    // Warnings (a kind without namespaces) go to the other stream.
    let output = server.kubectl(&all).output().expect("kubectl");
    match String::from_utf8_lossy(&output.stdout).trim() {
        "yes" => true,
        "no" => false,
        _ => panic!("{words:?}: {output:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_overlay_is_accepted_and_accounts_may_what_they_need() {
    let server = ApiServer::start().await;
    let overlays = overlays();
    assert!(overlays.len() >= 7, "{overlays:?}");
    for overlay in &overlays {
        let said = apply(&server, overlay);
        for part in [
            "daemonset.apps/cali-node",
            "deployment.apps/cali-typha",
            "deployment.apps/cali-controllers",
        ] {
            assert!(said.contains(part), "{}: {said}", overlay.display());
        }
    }
    for (account, words, allowed) in [
        (
            "cali-node",
            &["create", "ippools.projectcalico.org"][..],
            true,
        ),
        (
            "cali-node",
            &["update", "ipamblocks.projectcalico.org"],
            true,
        ),
        (
            "cali-node",
            &["patch", "nodes", "--subresource=status"],
            true,
        ),
        ("cali-node", &["watch", "pods", "-A"], true),
        ("cali-node", &["get", "secrets", "-n", "kube-system"], true),
        ("cali-node", &["get", "secrets", "-n", "default"], false),
        ("cali-node", &["delete", "nodes"], false),
        ("cali-node", &["patch", "nodes"], false),
        ("cali-node", &["create", "pods"], false),
        (
            "cali-node",
            &["update", "globalnetworkpolicies.projectcalico.org"],
            false,
        ),
        (
            "cali-typha",
            &["watch", "globalnetworkpolicies.projectcalico.org"],
            true,
        ),
        (
            "cali-typha",
            &["watch", "endpointslices.discovery.k8s.io", "-A"],
            true,
        ),
        (
            "cali-typha",
            &["get", "secrets", "-n", "kube-system"],
            false,
        ),
        (
            "cali-typha",
            &["update", "ippools.projectcalico.org"],
            false,
        ),
        (
            "cali-controllers",
            &["update", "kubecontrollersconfigurations.projectcalico.org"],
            true,
        ),
        (
            "cali-controllers",
            &["delete", "ipamhandles.projectcalico.org"],
            true,
        ),
        (
            "cali-controllers",
            &["update", "services", "--subresource=status", "-A"],
            false,
        ),
        (
            "cali-controllers",
            &["update", "leases.coordination.k8s.io", "-n", "kube-system"],
            false,
        ),
        ("cali-controllers", &["get", "secrets", "-A"], false),
        (
            "cali-controllers",
            &["patch", "secrets/node-certs", "-n", "kube-system"],
            true,
        ),
        (
            "cali-controllers",
            &["get", "secrets/other", "-n", "kube-system"],
            false,
        ),
        (
            "cali-controllers",
            &["create", "secrets", "-n", "kube-system"],
            false,
        ),
        (
            "cali-controllers",
            &[
                "patch",
                "secrets/cali-ca-private",
                "-n",
                "cali-certificates",
            ],
            true,
        ),
        (
            "cali-node",
            &["get", "secrets/cali-ca-private", "-n", "cali-certificates"],
            false,
        ),
    ] {
        assert_eq!(may(&server, account, words), allowed, "{account} {words:?}");
    }
}

#[test]
fn the_image_of_the_manifests_is_of_this_version_so_that_no_registry_is_asked_for_one_that_was_imported()
 {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/base");
    let text = std::fs::read_to_string(base.join("kustomization.yaml")).expect("the base");
    let tag = format!("newTag: {}\n", env!("CARGO_PKG_VERSION"));
    assert!(text.contains(&tag), "no '{tag}' in {text}");
}

const TWO_NODES: &str = r#"
{apiVersion: v1, kind: Node, metadata: {name: n1}}
---
{apiVersion: v1, kind: Node, metadata: {name: n2}}
---
{apiVersion: v1, kind: Pod, metadata: {name: agent, namespace: kube-system}, spec: {nodeName: n1, serviceAccountName: cali-node, containers: [{name: a, image: a}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: elsewhere, namespace: kube-system}, spec: {nodeName: n2, containers: [{name: a, image: a}]}}
---
{apiVersion: projectcalico.org/v3, kind: BlockAffinity, metadata: {name: n2-10-0-0-0-26}, spec: {node: n2, cidr: 10.0.0.0/26, state: confirmed, type: host}}
---
{apiVersion: projectcalico.org/v3, kind: IPAMBlock, metadata: {name: 10-0-0-0-26}, spec: {cidr: 10.0.0.0/26, affinity: "host:n2", allocations: [0, null], unallocated: [1], attributes: [{handle_id: h}], strictAffinity: false, deleted: false}}
---
{apiVersion: projectcalico.org/v3, kind: IPAMBlock, metadata: {name: 10-0-2-0-26}, spec: {cidr: 10.0.2.0/26, affinity: "host:n2", allocations: [null, null], unallocated: [0, 1], attributes: [], strictAffinity: false, deleted: false}}
---
{apiVersion: projectcalico.org/v3, kind: CalicoNodeStatus, metadata: {name: of-n1}, spec: {node: n1, classes: [Agent], updatePeriodSeconds: 10}}
---
{apiVersion: projectcalico.org/v3, kind: CalicoNodeStatus, metadata: {name: of-n2}, spec: {node: n2, classes: [Agent], updatePeriodSeconds: 10}}
"#;

/// Somebody's requests, and whether the admission policy let them pass.
struct Requests(kube::Client);

impl Requests {
    async fn of(server: &ApiServer, kubeconfig: PathBuf) -> Self {
        Self(server.client_of(kubeconfig).await)
    }

    /// `None` if it is done, the policy's words if that refused. Anything else is a fault of the test.
    async fn refusal(&self, request: http::Request<Vec<u8>>) -> Option<String> {
        let what = format!("{} {}", request.method(), request.uri());
        match self.0.request::<Value>(request).await {
            Ok(_) => None,
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("ValidatingAdmissionPolicy"), "{what}: {said}");
                Some(said)
            }
        }
    }

    /// A change beside the status, where Calico writes of Nodes and Pods.
    async fn patch(&self, path: &str, name: &str, change: &Value) -> bool {
        let (parameters, change) = (PatchParams::default(), Patch::Merge(change));
        let request = Request::new(path).patch_subresource("status", name, &parameters, &change);
        self.refusal(request.expect("a request")).await.is_none()
    }

    async fn create(&self, path: &str, object: &Value) -> bool {
        let body = object.to_string().into_bytes();
        let request = Request::new(path).create(&Default::default(), body);
        self.refusal(request.expect("a request")).await.is_none()
    }

    async fn delete(&self, path: &str, name: &str) -> bool {
        let request = Request::new(path).delete(name, &Default::default());
        self.refusal(request.expect("a request")).await.is_none()
    }

    /// A change of a resource that the account may only replace, not patch.
    async fn replace(&self, path: &str, name: &str, change: impl FnOnce(&mut Value)) -> bool {
        let get = Request::new(path).get(name, &Default::default());
        let mut object: Value = self.0.request(get.expect("a request")).await.expect(name);
        change(&mut object);
        let body = object.to_string().into_bytes();
        let request = Request::new(path).replace(name, &Default::default(), body);
        self.refusal(request.expect("a request")).await.is_none()
    }
}

const NODES: &str = "/api/v1/nodes";
const PODS: &str = "/api/v1/namespaces/kube-system/pods";
const AFFINITIES: &str = "/apis/projectcalico.org/v3/blockaffinities";
const BLOCKS: &str = "/apis/projectcalico.org/v3/ipamblocks";
const REPORTS: &str = "/apis/projectcalico.org/v3/caliconodestatuses";

fn affinity(node: &str) -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": "BlockAffinity", "metadata": {"name": format!("{node}-10-0-1-0-26")},
        "spec": {"node": node, "cidr": "10.0.1.0/26", "state": "pending", "type": "host"}})
}

fn block(node: &str) -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": "IPAMBlock", "metadata": {"name": "10-0-1-0-26"},
        "spec": {"cidr": "10.0.1.0/26", "affinity": format!("host:{node}"), "allocations": [null, null], "unallocated": [0, 1],
            "attributes": [], "strictAffinity": false, "deleted": false}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_writes_its_own_objects_and_no_others() {
    let server = ApiServer::start().await;
    let overlay = overlays().into_iter().find(|path| path.ends_with("k3s"));
    apply(&server, &overlay.expect("the overlay for k3s"));
    let folder = tempfile::tempdir().expect("a folder");
    server
        .kubectl_says(&["apply", "--server-side", "-f", "-"], TWO_NODES)
        .expect("two nodes");

    let token_of = |pod| server.account("cali-node", pod, folder.path());
    let n1 = Requests::of(&server, token_of(Some("agent"))).await;
    let address =
        json!({"metadata": {"annotations": {"projectcalico.org/IPv4Address": "192.0.2.1/24"}}});
    let condition = json!({"status": {"conditions": [
        {"type": "NetworkUnavailable", "status": "False", "reason": "CalicoIsUp", "message": ""}]}});
    // A policy counts some moments after it is there.
    let limit = Instant::now() + DEFINED;
    while n1.patch(NODES, "n2", &address).await {
        assert!(Instant::now() < limit, "another node's address was written");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(n1.patch(NODES, "n1", &address).await);
    assert!(n1.patch(NODES, "n1", &condition).await);
    assert!(!n1.patch(NODES, "n2", &condition).await);
    let pod = json!({"metadata": {"annotations": {"cni.projectcalico.org/podIP": "10.0.0.3/32"}}});
    assert!(n1.patch(PODS, "agent", &pod).await);
    assert!(!n1.patch(PODS, "elsewhere", &pod).await);
    let report = |object: &mut Value| object["status"] = json!({"lastUpdated": null});
    assert!(n1.replace(REPORTS, "of-n1", report).await);
    assert!(!n1.replace(REPORTS, "of-n2", report).await);

    assert!(n1.create(AFFINITIES, &affinity("n1")).await);
    assert!(!n1.create(AFFINITIES, &affinity("n2")).await);
    assert!(!n1.create(BLOCKS, &block("n2")).await);
    assert!(n1.create(BLOCKS, &block("n1")).await);
    let owner = |owner: &'static str| move |o: &mut Value| o["spec"]["affinity"] = json!(owner);
    assert!(!n1.replace(BLOCKS, "10-0-0-0-26", owner("host:n1")).await);
    assert!(!n1.replace(BLOCKS, "10-0-1-0-26", owner("host:n2")).await);
    let borrow = |object: &mut Value| {
        object["spec"]["allocations"] = json!([0, 0]);
        object["spec"]["unallocated"] = json!([]);
    };
    assert!(n1.replace(BLOCKS, "10-0-0-0-26", borrow).await);

    // A block with addresses stays; an empty one can be taken over, announced first.
    assert!(!n1.delete(BLOCKS, "10-0-0-0-26").await);
    assert!(n1.delete(BLOCKS, "10-0-2-0-26").await);
    assert!(!n1.delete(AFFINITIES, "n2-10-0-0-0-26").await);
    let to_n1 = |object: &mut Value| object["spec"]["node"] = json!("n1");
    assert!(!n1.replace(AFFINITIES, "n2-10-0-0-0-26", to_n1).await);
    let ending = |object: &mut Value| object["spec"]["state"] = json!("pendingDeletion");
    assert!(n1.replace(AFFINITIES, "n2-10-0-0-0-26", ending).await);
    assert!(n1.delete(AFFINITIES, "n2-10-0-0-0-26").await);
    assert!(n1.delete(BLOCKS, "10-0-1-0-26").await);
    assert!(n1.delete(AFFINITIES, "n1-10-0-1-0-26").await);

    // Without a pod the token is of no node, and nothing is its own.
    let unbound = Requests::of(&server, token_of(None)).await;
    assert!(!unbound.patch(NODES, "n1", &address).await);
}
