//! Certificates from the controllers' hands to both ends of the fan-out, with nothing between them but what a kubelet does: the built
//! `cali-controllers`, `typha` and `cali-node` on a real API server, under the manifests' accounts. An authority is followed by another
//! while changes stream, and no session ends by it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cali_api::schema::Group;
use cali_datastore::kubernetes::Kubernetes;
use cali_datastore::{Datastore, Secret};
use cali_netlink::testing::eventually;
use cali_tests::cluster::{Cluster, NODE};
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_secs(90);
/// Lives of seconds: an authority is followed after some ten of them.
const LIVES: [(&str, &str); 4] = [
    ("CALI_CERTIFICATE_SECONDS", "4"),
    ("CALI_AUTHORITY_SECONDS", "16"),
    ("CALI_CERTIFICATE_SETTLE_SECONDS", "1"),
    ("CALI_CONTROLLERS_LEASE_SECONDS", "2"),
];

/// Keeps the files of a Secret as a kubelet does: a folder for each version, and a link that is renamed over the former one.
struct Mount {
    folder: PathBuf,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Mount {
    fn start(cluster: &Cluster, secret: &'static str, folder: PathBuf) -> Self {
        let store = Kubernetes::new(cluster.server.settings());
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, place) = (Arc::clone(&stop), folder.clone());
        let task = tokio::spawn(async move {
            let (mut mounted, mut version) = (Secret::new(), 0);
            while !stopped.load(Ordering::Relaxed) {
                // The server's word is awaited, not relied on.
                if let Ok(Some(values)) = store.secret("kube-system", secret).await
                    && values.contains_key("tls.key")
                    && values != mounted
                {
                    version += 1;
                    swap(&place, version, &values);
                    mounted = values;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        Self { folder, stop, task }
    }

    fn file(&self, name: &str) -> String {
        self.folder.join("data").join(name).display().to_string()
    }

    fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.file(name)).ok()
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the task of a mount");
    }
}

fn swap(folder: &Path, version: usize, values: &Secret) {
    let data = folder.join(version.to_string());
    std::fs::create_dir_all(&data).expect("a folder");
    for (name, value) in values {
        std::fs::write(data.join(name), value).expect("a file");
    }
    let link = folder.join("data.new");
    std::os::unix::fs::symlink(&data, &link).expect("a link");
    std::fs::rename(&link, folder.join("data")).expect("a link");
}

/// What Typha counts.
fn counts(cluster: &Cluster, port: u16) -> BTreeMap<String, f64> {
    let asked = cluster.host.netns().run(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok::<_, std::io::Error>(text)
    });
    let Ok(Ok(text)) = asked else {
        return BTreeMap::new();
    };
    let line = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

struct Fan {
    cluster: Cluster,
    typha: Mount,
    node: Mount,
    _folder: tempfile::TempDir,
}

impl Fan {
    async fn new() -> Self {
        let mut cluster = Cluster::new(Group::V3).await;
        let folder = tempfile::tempdir().expect("a folder");
        let mount = |name: &'static str| {
            let place = folder.path().join(name);
            std::fs::create_dir(&place).expect("a folder");
            Mount::start(&cluster, name, place)
        };
        let (typha, node) = (mount("typha-certs"), mount("node-certs"));
        cluster.start("cali-controllers", "cali-controllers", &LIVES);
        let fan = Self {
            cluster,
            typha,
            node,
            _folder: folder,
        };
        fan.until(|| {
            let both = [&fan.typha, &fan.node].map(|one| one.read("tls.crt"));
            both.iter().all(Option::is_some)
        });
        fan
    }

    fn until(&self, wanted: impl Fn() -> bool) {
        eventually(LIMIT, || {
            if wanted() {
                return Ok(());
            }
            let logs = ["cali-controllers", "typha", "cali-node"].map(|one| self.cluster.log(one));
            Err(logs.join("\n---\n"))
        });
    }

    fn start_typha(&mut self, port: &str, metrics: &str, client: &str) {
        let files = ["ca.crt", "tls.crt", "tls.key"].map(|name| self.typha.file(name));
        let environment = [
            ("TYPHA_CAFILE", files[0].as_str()),
            ("TYPHA_SERVERCERTFILE", &files[1]),
            ("TYPHA_SERVERKEYFILE", &files[2]),
            ("TYPHA_CLIENTCN", client),
            ("TYPHA_SERVERPORT", port),
            ("TYPHA_PROMETHEUSMETRICSENABLED", "true"),
            ("TYPHA_PROMETHEUSMETRICSPORT", metrics),
        ];
        self.cluster.start("typha", "cali-typha", &environment);
    }

    fn start_node(&mut self, port: &str) {
        let files = ["ca.crt", "tls.crt", "tls.key"].map(|name| self.node.file(name));
        let address = format!("127.0.0.1:{port}");
        let environment = [
            ("NODENAME", NODE),
            ("CALI_CNI_INSTALL", "false"),
            ("FELIX_TYPHAADDR", &address),
            ("FELIX_TYPHACAFILE", &files[0]),
            ("FELIX_TYPHACERTFILE", &files[1]),
            ("FELIX_TYPHAKEYFILE", &files[2]),
            ("FELIX_TYPHACN", "typha-server"),
        ];
        self.cluster.start("cali-node", "cali-node", &environment);
    }

    /// Writes a pool, and waits until the node's kernel has it.
    fn change(&self, number: u8) {
        // Neighbours would be joined in the list.
        let net = format!("10.{}.0.0/24", 20 + number);
        self.cluster.apply(&format!(
            "{{apiVersion: API, kind: IPPool, metadata: {{name: pool{number}}}, spec: {{cidr: {net}, natOutgoing: true, ipipMode: Never, vxlanMode: Never}}}}"
        ));
        self.until(|| {
            let mut list = self.cluster.host.netns().command("nft");
            let said = list.args(["list", "table", "inet", "calico"]).output();
            let said = said.expect("nft");
            String::from_utf8_lossy(&said.stdout).contains(&net)
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_is_followed_by_another_while_changes_stream_and_no_session_ends() {
    let mut fan = Fan::new().await;
    let signs = |fan: &Fan| {
        let secret = fan
            .cluster
            .get("-n cali-certificates secret cali-ca-private");
        secret["data"]["tls.crt"].as_str().map(str::to_owned)
    };
    let (first, presented) = (signs(&fan), fan.typha.read("tls.crt"));
    fan.start_typha("5473", "9093", "typha-client");
    fan.start_node("5473");
    fan.change(0);
    // The dataplane, its status and `bgpd`, as many as there are.
    let accepted = |fan: &Fan| {
        let counted = counts(&fan.cluster, 9093);
        let of = |name: &str| counted.get(name).copied().unwrap_or(-1.0);
        (
            of("typha_connections_accepted"),
            of("typha_connections_active"),
        )
    };
    fan.until(|| accepted(&fan).1 >= 2.0);
    let before = accepted(&fan);
    let mut number = 1;
    // Until all is signed by another authority and the first is trusted no longer: by then certificates have been renewed, too.
    let trusts_one = |fan: &Fan| {
        let text = fan.typha.read("ca.crt").unwrap_or_default();
        text.matches("BEGIN CERTIFICATE").count() == 1
    };
    let (mut overlapped, mut rotated) = (false, false);
    while !rotated {
        assert!(
            number < 200,
            "no other authority\n{}",
            fan.cluster.log("cali-controllers")
        );
        fan.change(number);
        number += 1;
        overlapped |= !trusts_one(&fan);
        rotated = overlapped && signs(&fan) != first && trusts_one(&fan);
    }
    assert_ne!(fan.typha.read("tls.crt"), presented);
    assert_eq!(
        accepted(&fan),
        before,
        "after {number} changes:\n{}",
        fan.cluster.log("typha")
    );

    // Both read again what has changed meanwhile: a node that comes anew is let in, and the running server shows its new certificate.
    fan.cluster.kill("cali-node");
    fan.start_node("5473");
    fan.change(number);
    assert!(accepted(&fan).0 > before.0, "{:?}", accepted(&fan));
    let log = fan.cluster.log("typha");
    assert!(log.contains("certificates read again"), "{log}");

    // With another name nobody is let in.
    fan.cluster.kill("cali-node");
    fan.cluster.kill("typha");
    fan.start_typha("5474", "9094", "somebody-else");
    fan.start_node("5474");
    fan.until(|| {
        let log = fan.cluster.log("typha");
        log.contains("client refused")
            && log.contains("somebody-else")
            && log.contains("typha-client")
    });
    let counted = counts(&fan.cluster, 9094);
    assert_eq!(
        counted.get("typha_connections_streaming"),
        Some(&0.0),
        "{counted:?}"
    );

    let Fan { typha, node, .. } = fan;
    typha.end().await;
    node.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_a_user_brought_stays_and_the_controllers_say_so() {
    let mut cluster = Cluster::new(Group::V3).await;
    let bring = r#"{apiVersion: v1, kind: Secret, metadata: {name: typha-certs, namespace: kube-system}, stringData: {tls.crt: mine, tls.key: mine, ca.crt: mine}}"#;
    cluster.apply(bring);
    cluster.start("cali-controllers", "cali-controllers", &LIVES);
    eventually(LIMIT, || {
        let log = cluster.log("cali-controllers");
        let told = log.contains("Secret typha-certs") && log.contains("left as it is");
        told.then_some(()).ok_or(log)
    });
    // Once it is empty again, it is filled.
    let before = cluster.get("-n kube-system secret typha-certs");
    assert_eq!(before["data"]["tls.crt"], "bWluZQ==");
    let empty = [
        "-n",
        "kube-system",
        "patch",
        "secret",
        "typha-certs",
        "--type=merge",
        "-p",
        r#"{"data":null}"#,
    ];
    cluster.kubectl(&empty, "");
    eventually(LIMIT, || {
        let node = cluster.get("-n kube-system secret node-certs");
        let typha = cluster.get("-n kube-system secret typha-certs");
        let filled = [&node, &typha].map(|one| one["data"]["ca.crt"].is_string());
        (filled == [true, true])
            .then_some(())
            .ok_or_else(|| cluster.log("cali-controllers"))
    });
}
