//! The Helm chart beside the overlays of kustomize: with the values of an overlay it gives the same objects, field by field; a real API
//! server accepts them; and values that mean nothing are refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cali_datastore::testing::ApiServer;
use cali_tests::lab::{found_by, repository};
use serde_json::Value;

/// Kinds that the chart itself defines are accepted once the API server serves them.
const DEFINED: Duration = Duration::from_secs(60);

fn helm() -> &'static Path {
    static HELM: OnceLock<PathBuf> = OnceLock::new();
    HELM.get_or_init(|| found_by("helm"))
}

fn chart() -> PathBuf {
    repository().join("deploy/helm/cali")
}

/// The chart's objects as text, or why there are none.
fn template(chart: &Path, words: &[&str]) -> Result<String, String> {
    // A helm that is built from source does not know for which release of Kubernetes.
    let output = Command::new(helm())
        .args(["template", "cali"])
        .arg(chart)
        .args(["--kube-version", "1.34", "--include-crds"])
        .args(words)
        .output()
        .expect("helm");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

fn of_overlay(name: &str) -> String {
    let values = repository().join(format!("deploy/helm/values/{name}.yaml"));
    let values = values.display().to_string();
    let said = template(&chart(), &["-n", "kube-system", "-f", &values]);
    said.unwrap_or_else(|said| panic!("{name}: {said}"))
}

/// The name of the settings ends with a digest of them, which each of the two tools takes in its own way.
fn without_digest(text: &str) -> String {
    let mut parts = text.split("cali-config-");
    let mut all = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digest = part.chars().take_while(char::is_ascii_alphanumeric).count();
        assert_eq!(digest, 10, "a digest of ten letters: {part:.20}");
        all.push_str("cali-config");
        all.push_str(&part[digest..]);
    }
    all
}

/// Objects by kind, namespace and name.
fn objects(text: &str) -> BTreeMap<String, Value> {
    let all: Vec<Value> =
        serde_saphyr::from_multiple(&without_digest(text)).expect("documents in YAML");
    let mut found = BTreeMap::new();
    for mut object in all {
        // Helm takes definitions as they are, without the label that all other objects get.
        if object["kind"] == "CustomResourceDefinition"
            && let Some(metadata) = object["metadata"].as_object_mut()
        {
            metadata.remove("labels");
        }
        let part = |pointer: &str| {
            let text = object.pointer(pointer).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        let parts = ["/kind", "/metadata/namespace", "/metadata/name"].map(part);
        let former = found.insert(parts.join(" "), object);
        assert!(former.is_none(), "{parts:?} is there twice");
    }
    found
}

fn overlays() -> Vec<String> {
    let folder = repository().join("deploy/kubernetes/overlays");
    let entries = std::fs::read_dir(folder).expect("the folder of overlays");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.expect("an overlay").file_name();
        name.into_string().expect("a name")
    };
    let mut all: Vec<String> = entries.map(name).collect();
    all.sort();
    all
}

fn succeeds(what: &str, output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_values_of_an_overlay_the_chart_gives_its_objects_and_the_api_server_takes_them() {
    let server = ApiServer::start().await;
    let overlays = overlays();
    assert!(overlays.len() >= 8, "{overlays:?}");
    for overlay in &overlays {
        let folder = repository()
            .join("deploy/kubernetes/overlays")
            .join(overlay);
        let words = ["kustomize", &folder.display().to_string()];
        let kustomized = server.kubectl_says(&words, "");
        let kustomized = objects(&kustomized.unwrap_or_else(|said| panic!("{overlay}: {said}")));
        let text = of_overlay(overlay);
        let templated = objects(&text);
        let names = |all: &BTreeMap<String, Value>| all.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&templated), names(&kustomized), "{overlay}");
        for (name, object) in &kustomized {
            let own = &templated[name];
            assert!(
                own == object,
                "{overlay}: {name}: helm {own:#}\nkustomize {object:#}"
            );
        }
        let end = Instant::now() + DEFINED;
        let words = ["apply", "--server-side", "--validate=strict", "-f", "-"];
        while let Err(said) = server.kubectl_says(&words, &text) {
            let waits = said.contains("no matches for kind")
                || said.contains("could not find the requested resource");
            assert!(waits && Instant::now() < end, "{overlay}: {said}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

/// `helm` against a server, as the documents have it: whatever else is said, whether it was content counts.
fn helm_does(server: &ApiServer, words: &[&str]) {
    let mut command = Command::new(helm());
    command.env("KUBECONFIG", server.kubeconfig());
    let output = command.args(["-n", "kube-system"]).args(words).output();
    succeeds(&format!("helm {words:?}"), &output.expect("helm"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_is_installed_upgraded_rolled_back_and_taken_away() {
    let server = ApiServer::start().await;
    let chart = chart().display().to_string();
    let values = |overlay: &str| {
        let file = repository().join(format!("deploy/helm/values/{overlay}.yaml"));
        file.display().to_string()
    };
    // Which of an overlay's objects are there, but for what the chart leaves behind: helm never deletes definitions.
    let there = |overlay: &str| -> Vec<String> {
        let text = of_overlay(overlay);
        let own = text.split("\n---\n");
        let own = own.filter(|object| !object.contains("kind: CustomResourceDefinition"));
        let own = own.collect::<Vec<_>>().join("\n---\n");
        let words = ["get", "--ignore-not-found", "-o", "name", "-f", "-"];
        let said = server.kubectl_says(&words, &own);
        let said = said.unwrap_or_else(|said| panic!("{overlay}: {said}"));
        said.lines().map(str::to_owned).collect()
    };
    let typhas = || -> String {
        let words = [
            "-n",
            "kube-system",
            "get",
            "deployment",
            "cali-typha",
            "-o",
            "jsonpath={.spec.replicas}",
        ];
        server
            .kubectl_says(&words, "")
            .unwrap_or_else(|said| panic!("{said}"))
    };

    helm_does(&server, &["install", "cali", &chart, "-f", &values("k3s")]);
    let installed = there("k3s");
    let wanted = objects(&of_overlay("k3s"));
    let definitions = wanted
        .keys()
        .filter(|name| name.starts_with("CustomResourceDefinition"));
    assert_eq!(
        installed.len(),
        wanted.len() - definitions.count(),
        "{installed:?}"
    );
    assert_eq!(typhas(), "0");

    helm_does(
        &server,
        &["upgrade", "cali", &chart, "-f", &values("typha")],
    );
    assert_ne!(typhas(), "0");
    helm_does(&server, &["rollback", "cali", "1"]);
    assert_eq!(typhas(), "0");
    assert_eq!(there("k3s"), installed);

    helm_does(&server, &["uninstall", "cali"]);
    // A namespace ends with what is in it, which a controller sees to that does not run here.
    assert_eq!(there("k3s"), ["namespace/cali-certificates"]);
    let words = [
        "get",
        "namespace",
        "cali-certificates",
        "-o",
        "jsonpath={.status.phase}",
    ];
    assert_eq!(
        server.kubectl_says(&words, ""),
        Ok("Terminating".to_owned())
    );
}

#[test]
fn values_that_mean_nothing_are_refused_by_their_name() {
    for (words, reason) in [
        (&["--set", "typha.replica=3"][..], "replica"),
        (&["--set", "typha.replicas=0"], "/typha/replicas"),
        (&["--set", "config.felix-x=1"], "felix-x"),
        (&["--set", "images=cali"], "images"),
        (&["--set", "image.repository="], "/image/repository"),
    ] {
        let words = [&["-n", "kube-system"], words].concat();
        let said = template(&chart(), &words).expect_err("refused");
        assert!(said.contains(reason), "{words:?}: {said}");
    }
    let said = template(&chart(), &["-n", "other"]).expect_err("refused");
    assert!(said.contains("--namespace kube-system"), "{said}");
}

#[test]
fn a_packed_chart_is_whole_and_its_version_is_that_of_the_programs() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = Command::new(helm())
        .arg("package")
        .arg(chart())
        .arg("--destination")
        .arg(folder.path())
        .output();
    succeeds("helm package", &output.expect("helm"));
    let packed = folder
        .path()
        .join(format!("cali-{}.tgz", env!("CARGO_PKG_VERSION")));
    let words = [
        "-n",
        "kube-system",
        "--set",
        "config.CLUSTER_TYPE=null",
        "--set",
        "image.repository=registry.example/cali",
    ];
    let text = template(&packed, &words).expect("the packed chart");
    let image = format!(
        "image: registry.example/cali:{}\n",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(text.matches(&image).count(), 3, "{text}");
    assert!(!text.contains("CLUSTER_TYPE"), "null leaves a setting out");
    assert!(text.contains("kind: CustomResourceDefinition"));
}
