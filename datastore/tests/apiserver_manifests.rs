//! The manifests of `deploy/kubernetes` on a real API server: every overlay is accepted, field by field, and the accounts may do
//! what their part does and no more.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use cali_datastore::testing::ApiServer;

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

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn kubectl(server: &ApiServer, words: &[&str]) -> Output {
    server.kubectl(words).output().expect("kubectl")
}

/// What a user types; typed again where it says that a kind is not there yet.
fn apply(server: &ApiServer, overlay: &Path) -> String {
    let folder = overlay.display().to_string();
    let words = ["apply", "--server-side", "--validate=strict", "-k", &folder];
    let end = Instant::now() + DEFINED;
    loop {
        let output = kubectl(server, &words);
        let said = text(&output);
        if output.status.success() {
            return said;
        }
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
    let output = kubectl(server, &all);
    match String::from_utf8_lossy(&output.stdout).trim() {
        "yes" => true,
        "no" => false,
        _ => panic!("{words:?}: {}", text(&output)),
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
            &["update", "leases.coordination.k8s.io", "-n", "kube-system"],
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
            true,
        ),
        (
            "cali-controllers",
            &["update", "leases.coordination.k8s.io", "-n", "default"],
            false,
        ),
        ("cali-controllers", &["get", "secrets", "-A"], false),
    ] {
        assert_eq!(may(&server, account, words), allowed, "{account} {words:?}");
    }
}
