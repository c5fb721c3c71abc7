//! Cali on a real cluster that is laid out as k3s lays it out: installed with the commands of `docs/k3s.md`, with pods that Kubernetes'
//! own programs schedule, start and lead Services to.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cali_netlink::NetNs;
use cali_tests::cluster::{ACCOUNTS, user};
use cali_tests::k3s::{BOX, Cluster, NODES, ProxyMode, RunningPod, address};
use cali_tests::lab::repository;
use cali_tests::traffic::{self, Ping};

/// A busy machine may need long for what takes seconds on another.
const LIMIT: Duration = Duration::from_secs(120);
/// Rolling updates: what they lose depends on what a node hears of first when it starts again.
const UPDATES: usize = 3;
/// Address and ports of the Service.
const SERVICE: &str = "10.43.0.80";
const PORT: u16 = 80;
const NODE_PORT: u16 = 30080;

/// One server on each node, which says its name to whoever connects, and a client beside it.
fn workloads() -> String {
    let deployment = |name: &str, command: &str| {
        format!(
            r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: shop}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 0
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        labelSelector: {{matchLabels: {{app: {name}}}}}
      containers: [{{name: one, image: "{BOX}", imagePullPolicy: Never, command: {command}}}]
---"#
        )
    };
    let serve = r#"[/busybox, nc, -ll, -p, "80", -e, /busybox, hostname]"#;
    let wait = r#"[/busybox, sleep, "2147483647"]"#;
    format!(
        "{{apiVersion: v1, kind: Namespace, metadata: {{name: shop}}}}\n---{}{}\n\
         {{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop}}, spec: {{clusterIP: {SERVICE}, \
         type: NodePort, selector: {{app: web}}, ports: [{{port: {PORT}, nodePort: {NODE_PORT}}}]}}}}\n",
        deployment("web", serve),
        deployment("client", wait)
    )
}

/// Only friends reach the servers.
const POLICY: &str = r#"
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: shop}, spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]}}
"#;

/// The commands of the page on k3s that begin with kubectl, in their order.
fn documented() -> Vec<String> {
    let page = repository().join("docs/k3s.md");
    let page = std::fs::read_to_string(page).expect("the page on k3s");
    let commands = page.lines().filter_map(|line| {
        line.strip_prefix("$ ")
            .filter(|line| line.starts_with("kubectl "))
    });
    commands.map(str::to_owned).collect()
}

fn has_condition(object: &serde_json::Value, kind: &str, status: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|one| one["type"] == kind && one["status"] == status)
}

/// Waits until both nodes are ready, or have told that they are not.
fn nodes_are(cluster: &Cluster, status: &str) {
    cluster.until(LIMIT, &format!("nodes, Ready={status}"), || {
        let nodes = cluster.get("nodes")?;
        let all = nodes["items"].as_array().cloned().unwrap_or_default();
        let those = all
            .iter()
            .filter(|node| has_condition(node, "Ready", status));
        match those.count() == NODES.len() {
            true => Ok(()),
            false => Err(nodes.to_string()),
        }
    });
}

/// Does what the page says, command by command.
fn install(cluster: &Cluster) {
    let [apply, rollout, status, forward] = &documented()[..] else {
        panic!("docs/k3s.md has other commands: {:?}", documented());
    };
    // "If the first answer says that a kind is not there yet: apply once more."
    cluster.until(LIMIT, apply, || match cluster.types(apply, LIMIT) {
        Err(said) if !said.contains("no matches for kind") => panic!("{said}"),
        said => said,
    });
    cluster.until(LIMIT, rollout, || cluster.types(rollout, LIMIT));
    nodes_are(cluster, "True");
    let said = cluster.types(status, LIMIT);
    let said = said.unwrap_or_else(|said| panic!("{status}: {said}"));
    assert!(said.contains("Calico process is running"), "{said}");
    status_page(cluster, forward);
    cluster.until(LIMIT, "cali-controllers", || {
        let controllers = cluster.get("-n kube-system deployment cali-controllers")?;
        match controllers["status"]["readyReplicas"] == 2 {
            true => Ok(()),
            false => Err(controllers["status"].to_string()),
        }
    });
}

/// The page that `kubectl port-forward` leads to.
fn status_page(cluster: &Cluster, forward: &str) {
    let mut child = cluster
        .shell(forward, LIMIT)
        .spawn()
        .expect("start kubectl");
    let from = cluster.outside().netns();
    let page = cluster.until(LIMIT, "status page", || {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", 9099))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut page = String::new();
            stream.read_to_string(&mut page)?;
            Ok(page)
        };
        from.run(ask)
            .expect("the namespace")
            .map_err(|error| error.to_string())
    });
    // `timeout` passes it on to what it runs.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("end kubectl");
    child.wait().expect("the end of kubectl");
    assert!(page.contains("<html") && page.contains("BGP"), "{page}");
}

/// Servers and clients, one of each on each node.
struct Pods {
    web: Vec<RunningPod>,
    clients: Vec<(RunningPod, NetNs)>,
}

impl Pods {
    fn new(cluster: &Cluster) -> Self {
        cluster.apply(&workloads());
        let get = |label: &str| cluster.until(LIMIT, label, || cluster.pods(label, NODES.len()));
        let (web, clients) = (get("app=web"), get("app=client"));
        for pods in [&web, &clients] {
            let nodes: Vec<usize> = pods.iter().map(|pod| pod.node).collect();
            assert_eq!(nodes, [0, 1], "one on each node");
            for pod in pods {
                assert!(pod.address.to_string().starts_with("10.42."), "{pod:?}");
            }
        }
        let with_network = |pod: RunningPod| {
            let network = cluster.network(&pod);
            (pod, network)
        };
        Self {
            web,
            clients: clients.into_iter().map(with_network).collect(),
        }
    }

    fn at(&self, node: usize) -> SocketAddr {
        SocketAddr::new(self.web[node].address, PORT)
    }

    /// Every client reaches every server, or none does.
    fn reach(&self, cluster: &Cluster, clients: &[usize], wanted: bool) {
        for client in clients {
            for web in &self.web {
                let (from, network) = &self.clients[*client];
                let what = format!("{} -> {}, {wanted}", from.name, web.name);
                cluster.until(LIMIT, &what, || {
                    let said = traffic::asked(network, SocketAddr::new(web.address, PORT));
                    match said.as_deref().map(str::trim) == Some(&web.name) {
                        reached if reached == wanted => Ok(()),
                        _ => Err(format!("{said:?}")),
                    }
                });
            }
        }
    }
}

fn between_nodes(cluster: &Cluster, pods: &Pods) {
    pods.reach(cluster, &[0, 1], true);
    // The subnets differ, so packets between nodes are encapsulated, and each address is the pod's own at the other end.
    for node in cluster.nodes() {
        let routes = node.host.ip("route");
        let tunnelled = routes
            .lines()
            .any(|line| line.contains("dev vxlan.calico") && line.starts_with("10.42."));
        assert!(tunnelled, "{routes}");
    }
    // The API server reaches the kubelets.
    let said = cluster.kubectl(&format!(
        "-n shop exec {} -- /busybox hostname",
        pods.web[1].name
    ));
    assert_eq!(said.trim(), pods.web[1].name);
}

/// Both servers are reached through the Service, from pods, from nodes and from outside.
fn services(cluster: &mut Cluster, pods: &Pods, mode: ProxyMode) {
    cluster.set_proxy_mode(mode);
    let (own, others) = match mode {
        ProxyMode::Iptables => ("KUBE-SVC-", "table ip kube-proxy"),
        ProxyMode::Nftables => ("table ip kube-proxy", "KUBE-SVC-"),
    };
    for node in cluster.nodes() {
        cluster.until(LIMIT, &format!("{mode:?} on {}", node.name), || {
            let rules = node.host.run("nft", &["list", "ruleset"]);
            match rules.contains(own) && !rules.contains(others) {
                true => Ok(()),
                false => Err(rules),
            }
        });
    }
    let service: SocketAddr = format!("{SERVICE}:{PORT}").parse().expect("an address");
    let mut ways: Vec<(String, NetNs, SocketAddr)> = Vec::new();
    for (pod, network) in &pods.clients {
        ways.push((pod.name.clone(), network.clone(), service));
    }
    for (number, node) in cluster.nodes().iter().enumerate() {
        ways.push((node.name.clone(), node.host.netns().clone(), service));
        let at: IpAddr = address(number).parse().expect("an address");
        let outside = cluster.outside().netns().clone();
        ways.push((
            "outside".to_owned(),
            outside,
            SocketAddr::new(at, NODE_PORT),
        ));
    }
    for (name, from, to) in ways {
        let mut seen = BTreeSet::new();
        cluster.until(LIMIT, &format!("{mode:?}: {name} -> {to}"), || {
            seen.extend(traffic::asked(&from, to).map(|said| said.trim().to_owned()));
            match pods.web.iter().all(|web| seen.contains(&web.name)) {
                true => Ok(()),
                false => Err(format!("{seen:?}")),
            }
        });
    }
}

fn policy(cluster: &Cluster, pods: &Pods) {
    cluster.apply(POLICY);
    pods.reach(cluster, &[0, 1], false);
    let friend = &pods.clients[0].0.name;
    cluster.kubectl(&format!("-n shop label pod {friend} role=friend"));
    pods.reach(cluster, &[0], true);
    pods.reach(cluster, &[1], false);
    cluster.kubectl("-n shop delete networkpolicies.networking.k8s.io web");
    pods.reach(cluster, &[0, 1], true);
}

/// New connections, one after another, until it is dropped.
struct Connections {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU32>,
    failed: Arc<AtomicU32>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Connections {
    fn start(from: NetNs, to: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (made, failed) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (ends, all, none) = (Arc::clone(&stop), Arc::clone(&made), Arc::clone(&failed));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let said = traffic::asked(&from, to);
                all.fetch_add(1, Ordering::Relaxed);
                none.fetch_add(u32::from(said.is_none()), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self {
            stop,
            made,
            failed,
            thread: Some(thread),
        }
    }

    /// How many were made, and how many of them failed.
    fn count(mut self) -> (u32, u32) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a thread that only connects");
        }
        (
            self.made.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The DaemonSet's pods are replaced one after another, as for a new version or by another manifest, while pods talk between the
/// nodes under a policy.
fn rolling_update(cluster: &Cluster, pods: &Pods, change: impl FnOnce()) {
    cluster.apply(POLICY);
    pods.reach(cluster, &[0], true);
    pods.reach(cluster, &[1], false);
    let before = agents(cluster);
    let (_, client) = &pods.clients[0];
    let far = pods.at(1);
    let ping = Ping::within(client, &far.ip().to_string(), 3 * LIMIT).expect("a ping");
    let connections = Connections::start(client.clone(), far);
    let refused = Connections::start(pods.clients[1].1.clone(), pods.at(0));
    change();
    cluster.until(LIMIT, "rolling update", || {
        let after = agents(cluster);
        let status = cluster.get("-n kube-system daemonset cali-node")?["status"].clone();
        let done = status["numberReady"] == 2 && status["updatedNumberScheduled"] == 2;
        match done && after.len() == 2 && before.is_disjoint(&after) {
            true => Ok(()),
            false => Err(status.to_string()),
        }
    });
    ping.flow(100).expect("a ping that is answered");
    let count = ping.stop().expect("a count");
    let ((made, failed), (tried, denied)) = (connections.count(), refused.count());
    eprintln!("{count:?}, {made} connections, {failed} failed; {tried} forbidden, {denied} failed");
    assert!(count.sent > 200 && made > 20, "{count:?}, {made}");
    assert_eq!(count.lost, 0, "{count:?}");
    assert_eq!(failed, 0, "of {made} connections");
    assert_eq!(tried, denied, "connections that the policy forbids");
}

/// The pods of the DaemonSet.
fn agents(cluster: &Cluster) -> BTreeSet<String> {
    let pods = cluster.kubectl(
        "-n kube-system get pods -l app.kubernetes.io/name=cali-node -o jsonpath={.items[*].metadata.uid}",
    );
    pods.split_whitespace().map(str::to_owned).collect()
}

/// Both replicas serve, and each node is a client of one of them, by names in certificates that the controllers have made.
fn nodes_ask_typha(cluster: &Cluster) {
    cluster.until(LIMIT, "cali-typha", || {
        let typha = cluster.get("-n kube-system deployment cali-typha")?;
        match typha["status"]["readyReplicas"] == 2 {
            true => Ok(()),
            false => Err(typha["status"].to_string()),
        }
    });
    for node in cluster.nodes() {
        cluster.until(LIMIT, &format!("{} asks Typha", node.name), || {
            let sessions = node.host.run("ss", &["-Htn", "state", "established"]);
            match sessions
                .lines()
                .any(|line| line.trim_end().ends_with(":5473"))
            {
                true => Ok(()),
                false => Err(sessions),
            }
        });
    }
}

/// The other backend has taken over, beside kube-proxy's rules.
fn policy_is_in_iptables(cluster: &Cluster) {
    for node in cluster.nodes() {
        cluster.until(LIMIT, &format!("iptables on {}", node.name), || {
            let own = node.host.run("nft", &["list", "tables"]);
            let rules = ["iptables-legacy-save", "iptables-nft-save"]
                .map(|program| node.host.run(program, &[]))
                .concat();
            match rules.contains(":cali-FORWARD ") && !own.contains("inet calico") {
                true => Ok(()),
                false => Err(format!("{own}{rules}")),
            }
        });
    }
}

/// What the accounts of the manifests asked for, they may do.
fn nothing_was_denied(cluster: &Cluster) {
    let asked = cluster.asked();
    for account in ACCOUNTS {
        let count = asked.iter().filter(|one| one.user == user(account)).count();
        assert!(count > 10, "{account} asked {count} times");
    }
    let denied: Vec<_> = asked.iter().filter(|one| one.is_denied()).collect();
    assert!(denied.is_empty(), "{denied:#?}");
}

/// When a deployment goes, so do the interfaces and the routes of its pods.
fn pods_leave_nothing(cluster: &Cluster, pods: &Pods) {
    cluster.kubectl("delete namespace shop --timeout=90s");
    for node in cluster.nodes() {
        cluster.until(LIMIT, &format!("nothing is left on {}", node.name), || {
            let (links, routes) = (node.host.ip("-br link"), node.host.ip("route"));
            let left = pods.web.iter().any(|pod| {
                let address = format!("{} ", pod.address);
                routes.lines().any(|route| route.starts_with(&address))
            });
            match left || links.lines().any(|link| link.starts_with("cali")) {
                false => Ok(()),
                true => Err(format!("{links}{routes}")),
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_as_k3s_lays_it_out_from_its_start_to_an_update_under_traffic() {
    let start = Instant::now();
    let mut cluster = Cluster::new().await;
    nodes_are(&cluster, "False");
    install(&cluster);
    let pods = Pods::new(&cluster);
    between_nodes(&cluster, &pods);
    for mode in [ProxyMode::Iptables, ProxyMode::Nftables] {
        services(&mut cluster, &pods, mode);
    }
    policy(&cluster, &pods);
    for _ in 0..UPDATES {
        rolling_update(&cluster, &pods, || {
            cluster.kubectl("-n kube-system rollout restart daemonset/cali-node");
        });
    }
    rolling_update(&cluster, &pods, || cluster.install("k3s", &["typha"]));
    nodes_ask_typha(&cluster);
    cluster.set_proxy_mode(ProxyMode::Iptables);
    rolling_update(&cluster, &pods, || {
        cluster.install("k3s", &["typha", "iptables"]);
    });
    policy_is_in_iptables(&cluster);
    pods_leave_nothing(&cluster, &pods);
    nothing_was_denied(&cluster);
    eprintln!("all of it: {:.0?}", start.elapsed());
}
