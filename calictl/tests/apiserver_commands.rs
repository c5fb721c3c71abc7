//! What a person does with a real Kubernetes cluster as the datastore.

mod terminal;

use std::rc::Rc;
use std::sync::Arc;

use cali_api::schema::{Group, defined, definition};
use cali_datastore::testing::{ApiServer, Etcd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use terminal::{Terminal, kinds, suite};

/// What `kubectl` is told is done, or this fails with its words.
fn kubectl(server: &ApiServer, manifest: &str) {
    server
        .kubectl_says(&["apply", "-f", "-"], manifest)
        .expect("what is applied");
}

/// A cluster with a namespace and a node, and a terminal that has it as its datastore.
async fn cluster(group: Group) -> (ApiServer, Terminal) {
    let server = ApiServer::start().await;
    let definitions: Vec<_> = defined().map(|kind| definition(kind, group)).collect();
    server.define(&definitions).await;
    server.namespace("shop").await;
    kubectl(
        &server,
        "{apiVersion: v1, kind: Node, metadata: {name: node1}}",
    );
    let mut terminal = Terminal::new();
    into_cluster(&mut terminal, &server);
    (server, terminal)
}

fn into_cluster(terminal: &mut Terminal, server: &ApiServer) {
    let kubeconfig = server.kubeconfig().display().to_string();
    terminal.uses(&[
        ("DATASTORE_TYPE", "kubernetes"),
        ("KUBECONFIG", &kubeconfig),
    ]);
}

/// The parts of an export without the kinds of which Kubernetes only has views.
fn without_views(export: &str) -> String {
    let views = ["NodeList", "ProfileList", "WorkloadEndpointList"];
    let is_view = |document: &&str| {
        views
            .iter()
            .any(|kind| document.contains(&format!("kind: {kind}\n")))
    };
    let documents: Vec<&str> = export
        .split("---\n")
        .filter(|document| !is_view(document))
        .collect();
    documents.join("---\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_moves_into_kubernetes_and_out_again() {
    let (server, mut terminal) = cluster(Group::V1).await;
    tokio::task::block_in_place(|| moves(&server, &mut terminal));
}

fn moves(server: &ApiServer, terminal: &mut Terminal) {
    let path = terminal.path("cali.db").display().to_string();
    terminal.uses(&[("DATASTORE_TYPE", "sqlite"), ("CALI_SQLITE_PATH", &path)]);
    terminal.fills("node1", "web");
    terminal.prints("datastore lock");
    let before = terminal.prints("datastore export > before.txt");
    into_cluster(terminal, server);
    let said = terminal.prints("datastore import -f before.txt");
    assert!(
        said.contains("1 profiles are the Kubernetes cluster's own"),
        "{said}"
    );
    let between = terminal.prints("datastore export > between.txt");
    assert_eq!(without_views(&between), without_views(&before));
    // A node's settings have become annotations of Kubernetes' node, and are read from there.
    let node = terminal.prints("get node node1 -o jsonpath={.spec.bgp.ipv4Address}");
    assert_eq!(node.trim(), "192.0.2.1/24");
    let etcd = Etcd::start();
    terminal.uses(&[
        ("DATASTORE_TYPE", "etcdv3"),
        ("ETCD_ENDPOINTS", &etcd.endpoint()),
    ]);
    terminal.prints("datastore import -f between.txt");
    assert_eq!(terminal.prints("datastore export"), between);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_field_of_every_kind_comes_back_from_the_api_server() {
    for group in [Group::V1, Group::V3] {
        let (_server, terminal) = cluster(group).await;
        // What Kubernetes has only as views of its own objects is written there, not here.
        tokio::task::block_in_place(|| {
            kinds::come_back(&terminal, &["Node", "Profile", "WorkloadEndpoint"]);
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_the_same_on_a_cluster() {
    let (_server, mut terminal) = cluster(Group::V1).await;
    tokio::task::block_in_place(|| terminal::session(&mut terminal));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_prints_on_a_cluster_what_it_always_prints() {
    let (server, _) = cluster(Group::V1).await;
    let server = Rc::new(server);
    tokio::task::block_in_place(|| {
        for (name, case) in suite::ALL {
            println!("{name}");
            let mut terminal = Terminal::new();
            into_cluster(&mut terminal, &server);
            let own = Rc::clone(&server);
            terminal.with_kubectl(move |manifest| kubectl(&own, manifest));
            terminal.clears();
            for natives in ["pods --namespace=shop --force --grace-period=0", "nodes"] {
                let words = format!("delete --all {natives}");
                let words: Vec<&str> = words.split(' ').collect();
                let status = server.kubectl(&words).status();
                assert!(status.expect("start kubectl").success());
            }
            case(&mut terminal);
        }
    });
}

/// A kubelet that knows nothing but logs, each of which says what was asked for; its port.
async fn kubelet() -> u16 {
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(own.signing_key.serialize_der().into());
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(octet) => head.push(octet),
                    Err(_) => break,
                }
            }
            let head = String::from_utf8_lossy(&head);
            let asked = head.split(' ').nth(1).unwrap_or_default();
            let text = format!("asked for {asked}\n");
            let answer = format!(
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            );
            // Whoever asks no more has gone.
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    port
}

const AGENT: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: cali-node-a
  namespace: shop
  labels: {app.kubernetes.io/part-of: cali, app.kubernetes.io/name: cali-node}
spec:
  nodeName: node1
  containers: [{name: node, image: i, env: [{name: ETCD_PASSWORD, value: hunter2}]}]
---
apiVersion: v1
kind: Event
metadata: {name: cali-node-a.1, namespace: shop}
involvedObject: {apiVersion: v1, kind: Pod, name: cali-node-a, namespace: shop}
reason: BackOff
message: restarting the failed container
type: Warning
count: 3
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_archive_of_a_cluster_has_logs_and_descriptions_of_its_pods() {
    let (server, terminal) = cluster(Group::V1).await;
    let port = kubelet().await;
    tokio::task::block_in_place(|| {
        kubectl(&server, AGENT);
        let node = format!(
            "{{\"status\":{{\"addresses\":[{{\"type\":\"InternalIP\",\"address\":\"127.0.0.1\"}}],\
             \"daemonEndpoints\":{{\"kubeletEndpoint\":{{\"Port\":{port}}}}}}}}}"
        );
        let pod = r#"{"status":{"containerStatuses":[{"name":"node","image":"i","imageID":"i","ready":true,"restartCount":2}]}}"#;
        for (object, status) in [("node/node1", node.as_str()), ("pod/cali-node-a", pod)] {
            let words = [
                "patch",
                object,
                "-n",
                "shop",
                "--subresource=status",
                "-p",
                status,
            ];
            let done = server.kubectl(&words).status().expect("start kubectl");
            assert!(done.success());
        }
        let said =
            terminal.prints("PATH=/nowhere cluster diags --since 2h --output cluster.tar.gz");
        let found = terminal.unpacks("cluster.tar.gz");
        // Without kubectl there is no way into a pod; everything else is there.
        assert!(
            said.contains("\n1 pieces could not be collected"),
            "{said}\n{}",
            found["contents.txt"]
        );
        let missing = "nodes/node1.tar.gz: NOT COLLECTED: kubectl is not installed";
        assert!(
            found["contents.txt"].contains(missing),
            "{}",
            found["contents.txt"]
        );
        let folder = "pods/cali-node/cali-node-a";
        let description = &found[&format!("{folder}/description.txt")];
        for part in [
            "restartCount: 2",
            "BackOff",
            "restarting the failed container",
        ] {
            assert!(description.contains(part), "{description}");
        }
        assert!(!description.contains("hunter2"), "{description}");
        let log = &found[&format!("{folder}/node.log")];
        assert!(
            log.starts_with("asked for /containerLogs/shop/cali-node-a/node?"),
            "{log}"
        );
        assert!(
            log.contains("sinceSeconds=7200") && !log.contains("previous"),
            "{log}"
        );
        assert!(found[&format!("{folder}/node.previous.log")].contains("previous=true"));
        assert!(found["kubernetes/nodes.txt"].starts_with("NAME"));
        assert!(found["kubernetes/pods.txt"].contains("shop        cali-node-a"));
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contexts_and_the_name_of_a_plugin_choose_the_cluster() {
    let (server, mut terminal) = cluster(Group::V1).await;
    tokio::task::block_in_place(|| {
        let kubeconfig = server.kubeconfig().display().to_string();
        terminal.uses(&[]);
        let wanted = "nodes/node1\n";
        let line = format!("get nodes -o name --kubeconfig {kubeconfig}");
        assert_eq!(terminal.prints(&line), wanted);
        assert_eq!(terminal.prints(&format!("{line} --context test")), wanted);
        let refused = terminal.output(&format!("{line} --context other"));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && said.contains("other"),
            "{said}"
        );
        // As `kubectl calico`: kubectl runs the program of this name.
        let plugins = terminal.path("plugins");
        std::fs::create_dir(&plugins).expect("a folder");
        std::os::unix::fs::symlink(
            env!("CARGO_BIN_EXE_calictl"),
            plugins.join("kubectl-calico"),
        )
        .expect("a link");
        let output = std::process::Command::new(server.kubectl(&[]).get_program())
            .args(["calico", "get", "nodes", "-o", "name"])
            .env_clear()
            .env("KUBECONFIG", &kubeconfig)
            .env("PATH", &plugins)
            .output()
            .expect("run kubectl");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(String::from_utf8_lossy(&output.stdout), wanted, "{said}");
    });
}
