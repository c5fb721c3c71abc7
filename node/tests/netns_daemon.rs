//! Two nodes on one wire, each with its own daemon and one datastore, in namespaces of their own. BGP is off: tunnels carry everything.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cali_api::v3::{
    CalicoNodeStatus, CalicoNodeStatusSpec, EncapMode, IPPool, IPPoolSpec, NodePeerType,
    NodeRouteSource, NodeStatusClass,
};
use cali_api::{AnyResource, Key, Kind};
use cali_control::status::{NodeReport, OwnedRoute, REPORT_ANNOTATION, ReportQuery, RouteQuery};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_ipam::{Allocator, Owner, Request};
use cali_netlink::testing::{TestNs, eventually};

const LIMIT: Duration = Duration::from_secs(20);

struct Host {
    ns: TestNs,
    name: &'static str,
    folder: PathBuf,
    daemon: Option<Child>,
}

impl Host {
    fn new(name: &'static str, folder: &Path) -> Self {
        Self {
            ns: TestNs::new(name),
            name,
            folder: folder.to_owned(),
            daemon: None,
        }
    }

    fn start(&mut self) {
        self.start_with("vxlan");
    }

    fn start_with(&mut self, backend: &str) {
        let home = self.folder.join(self.name);
        std::fs::create_dir_all(&home).unwrap();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(home.join("log"))
            .unwrap();
        let mut command = self.ns.command(env!("CARGO_BIN_EXE_cali-node"));
        command
            .env("NODENAME", self.name)
            .env("CALI_SQLITE_PATH", self.folder.join("cali.db"))
            .env("CALI_RUN_DIR", home.join("run"))
            .env("CALI_STATE_DIR", home.join("lib"))
            .env("NO_DEFAULT_POOLS", "true")
            .env("CALICO_NETWORKING_BACKEND", backend)
            .env("NO_COLOR", "1")
            .stderr(Stdio::from(log));
        self.daemon = Some(command.spawn().unwrap());
    }

    fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join(self.name).join("log")).unwrap_or_default()
    }

    /// Waits until the log has a text so many times.
    fn logs(&self, text: &str, times: usize) {
        eventually(LIMIT, || {
            let log = self.log();
            if log.matches(text).count() >= times {
                Ok(())
            } else {
                Err(format!("{text:?} {times} times in\n{log}"))
            }
        });
    }

    /// Waits until the output of `ip ARGS` holds all these texts.
    fn shows(&self, args: &str, texts: &[&str]) {
        eventually(LIMIT, || {
            let words: Vec<&str> = args.split_whitespace().collect();
            let seen = String::from_utf8_lossy(&self.ns.output("ip", &words).stdout).into_owned();
            if texts.iter().all(|text| seen.contains(text)) {
                return Ok(());
            }
            Err(format!(
                "{}: `ip {args}` lacks {texts:?}:\n{seen}\n{}",
                self.name,
                self.log()
            ))
        });
    }

    /// Waits until the route table is as wanted: a stray route with our mark is removed only by a table that knows everything.
    fn quiet(&self) {
        self.ns
            .ip("route add 10.244.255.192/26 via 10.8.0.9 proto 80");
        eventually(LIMIT, || {
            if self.ns.ip("route").contains("10.244.255.192") {
                Err(self.log())
            } else {
                Ok(())
            }
        });
    }

    /// The recorded process of `bgpd`.
    fn bgpd(&self) -> Option<u32> {
        let record = std::fs::read(self.folder.join(self.name).join("run/bgpd.pid")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        u32::try_from(record["pid"].as_u64()?).ok()
    }

    /// What the daemon has made in the kernel.
    fn kernel(&self) -> Vec<String> {
        let commands = [
            "route show proto 80",
            "route show proto 12",
            "nexthop",
            "neigh show nud permanent",
            "-o link show type vxlan",
        ];
        let mut dump: Vec<String> = commands.iter().map(|args| self.ns.ip(args)).collect();
        // The kernel itself keeps multicast addresses of every device here.
        let fdb = self.ns.run("bridge", &["fdb", "show"]);
        let unicast = |line: &&str| !line.starts_with("33:33:") && !line.starts_with("01:00:5e:");
        dump.extend(fdb.lines().filter(unicast).map(str::to_owned));
        // Counters and handles left out, as they change by themselves.
        dump.push(
            self.ns
                .run("nft", &["--stateless", "list", "table", "inet", "calico"]),
        );
        dump
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        if let Some(pid) = self.bgpd() {
            kill(pid);
        }
    }
}

/// SIGKILL to one process.
fn kill(pid: u32) {
    // It may have ended.
    let _ = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .output();
}

/// Builds `bgpd` beside `cali-node`: it belongs to another package, and these tests may be run alone.
fn build_bgpd() {
    let built = std::process::Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "bgpd", "--bin", "bgpd"])
        .status();
    assert!(built.unwrap().success());
}

fn two_hosts(folder: &Path) -> (Host, Host) {
    let (a, b) = (Host::new("na", folder), Host::new("nb", folder));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (left, right) = a.ns.veth("eth0", &b.ns, "eth0").await;
        a.ns.address(left, "10.8.0.1/24").await;
        b.ns.address(right, "10.8.0.2/24").await;
    });
    (a, b)
}

/// A datastore with one pool.
async fn pool(folder: &Path, vxlan: EncapMode) -> Arc<dyn Datastore> {
    let datastore: Arc<dyn Datastore> = Arc::new(Sqlite::open(&folder.join("cali.db")).unwrap());
    let cidr = "10.244.0.0/16".parse().unwrap();
    let pool = IPPool::named(
        "overlay",
        IPPoolSpec {
            vxlan_mode: Some(vxlan),
            ..IPPoolSpec::new(cidr)
        },
    );
    datastore.create(pool.into()).await.unwrap();
    datastore
}

/// Gives the node an address, and so a block; returns the block.
async fn assigned(datastore: &Arc<dyn Datastore>, node: &str) -> String {
    let allocator = Allocator::with_system_time(datastore.clone(), node);
    let request = Request::workload(Owner::new(node), 1, 0);
    allocator.assign(&request).await.unwrap()[0]
        .block
        .to_string()
}

/// What a node answers by way of the datastore, once it is as wanted.
async fn reported(
    datastore: &Arc<dyn Datastore>,
    node: &str,
    wanted: impl Fn(&CalicoNodeStatus) -> bool,
) -> CalicoNodeStatus {
    let spec = CalicoNodeStatusSpec {
        node: node.into(),
        classes: NodeStatusClass::ALL.to_vec(),
        update_period_seconds: Some(1),
    };
    let mut asked = CalicoNodeStatus::named("asked", spec);
    let annotations = &mut asked.metadata.annotations;
    annotations.insert(REPORT_ANNOTATION.into(), String::new());
    datastore.create(asked.into()).await.unwrap();
    let key = Key::cluster(Kind::CalicoNodeStatus, "asked");
    let started = std::time::Instant::now();
    loop {
        let stored = datastore.get(&key).await.unwrap().object;
        let AnyResource::CalicoNodeStatus(found) = &*stored else {
            panic!("{stored:?}");
        };
        if wanted(found) {
            return (**found).clone();
        }
        assert!(started.elapsed() < LIMIT, "{found:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The routes that a node tells by way of the datastore when it is asked for those that BGP brought.
async fn told_routes(datastore: &Arc<dyn Datastore>, node: &str) -> Vec<OwnedRoute> {
    let spec = CalicoNodeStatusSpec {
        node: node.into(),
        classes: vec![NodeStatusClass::Agent],
        update_period_seconds: Some(86_400),
    };
    let mut asked = CalicoNodeStatus::named("routes", spec);
    let query = ReportQuery {
        routes: Some(RouteQuery {
            owner: Some("bgp".into()),
            ..RouteQuery::default()
        }),
    };
    let query = serde_json::to_string(&query).unwrap();
    let annotations = &mut asked.metadata.annotations;
    annotations.insert(REPORT_ANNOTATION.into(), query);
    datastore.create(asked.into()).await.unwrap();
    let key = Key::cluster(Kind::CalicoNodeStatus, "routes");
    let started = std::time::Instant::now();
    loop {
        let stored = datastore.get(&key).await.unwrap().object;
        let said = &stored.metadata().annotations[REPORT_ANNOTATION];
        if let Ok(report) = serde_json::from_str::<NodeReport>(said) {
            let packed = report.routes.unwrap();
            assert_eq!(packed.left_out, 0);
            return packed.unpack().unwrap();
        }
        assert!(started.elapsed() < LIMIT, "{said}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlay_works_and_survives_a_kill_of_the_daemon_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let datastore = pool(folder.path(), EncapMode::Always).await;
    let (mut a, mut b) =
        std::thread::scope(|s| s.spawn(|| two_hosts(folder.path())).join().unwrap());
    a.start();
    b.start();
    for host in [&a, &b] {
        host.shows("-o -4 addr show dev vxlan.calico", &["10.244."]);
    }
    let (on_a, on_b) = (
        assigned(&datastore, "na").await,
        assigned(&datastore, "nb").await,
    );
    for (host, own, other) in [(&a, &on_a, &on_b), (&b, &on_b, &on_a)] {
        let (drop, via) = (format!("blackhole {own} proto 80"), format!("{other} nhid"));
        host.shows("route", &[&drop, &via, "dev vxlan.calico proto 80 onlink"]);
    }
    // The other end of the tunnel answers.
    let vtep = a.ns.ip("-o -4 addr show dev vxlan.calico");
    let vtep = vtep
        .split_whitespace()
        .find_map(|word| word.strip_suffix("/32"))
        .unwrap()
        .to_owned();
    eventually(LIMIT, || {
        let ping = b.ns.output("ping", &["-c1", "-W1", &vtep]);
        if ping.status.success() {
            Ok(())
        } else {
            Err(format!("no answer from {vtep}\n{}", b.log()))
        }
    });

    let before = a.kernel();
    a.kill();
    assert_eq!(a.kernel(), before, "a dead daemon takes nothing with it");
    a.start();
    a.logs("adopted the routes", 2);
    a.quiet();
    assert_eq!(a.kernel(), before, "{}", a.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bgp_carries_the_blocks_and_no_kill_is_seen_by_the_peer_or_the_kernel() {
    build_bgpd();
    let folder = tempfile::tempdir().unwrap();
    let datastore = pool(folder.path(), EncapMode::Never).await;
    let (mut a, mut b) =
        std::thread::scope(|s| s.spawn(|| two_hosts(folder.path())).join().unwrap());
    a.start_with("bird");
    b.start_with("bird");
    let (on_a, on_b) = (
        assigned(&datastore, "na").await,
        assigned(&datastore, "nb").await,
    );
    let own_and_other = |host: &Host, own: &str, other: &str| {
        let (drop, via) = (format!("blackhole {own} proto 80"), format!("{other} nhid"));
        host.shows("route", &[&drop, &via, "dev eth0 proto bird"]);
    };
    own_and_other(&a, &on_a, &on_b);
    own_and_other(&b, &on_b, &on_a);
    // Who cannot reach the node's sockets asks by way of the datastore.
    let asked = reported(&datastore, "na", |asked| {
        let status = asked.status.as_ref();
        status.is_some_and(|status| status.bgp.number_established_v4 == 1)
    })
    .await;
    let status = asked.status.unwrap();
    let peer = &status.bgp.peers_v4[0];
    assert_eq!(
        (peer.peer_ip.as_str(), peer.type_),
        ("10.8.0.2", Some(NodePeerType::NodeMesh))
    );
    assert!(
        status.routes.routes_v4.iter().any(|route| {
            route.destination == on_b
                && route.gateway == "10.8.0.2"
                && route.learned_from.source_type == Some(NodeRouteSource::NodeMesh)
        }),
        "{:?}",
        status.routes
    );
    let report: NodeReport =
        serde_json::from_str(&asked.metadata.annotations[REPORT_ANNOTATION]).unwrap();
    assert_eq!(report.node.node, "na");
    assert_eq!(report.bgp.unwrap().peers.len(), 1);
    let told = told_routes(&datastore, "na").await;
    let told: Vec<(String, &str, bool)> = told
        .iter()
        .map(|route| {
            let prefix = route.prefix.to_string();
            (prefix, route.because.as_str(), route.programmed)
        })
        .collect();
    assert_eq!(told, [(on_b.clone(), "BGP peer 10.8.0.2", true)]);
    let (before_a, before_b) = (a.kernel(), b.kernel());
    let speaker = a.bgpd().unwrap();

    // The daemon: its speaker goes on and is adopted.
    a.kill();
    a.start_with("bird");
    a.logs("adopted the running program", 1);
    a.logs("bgpd has connected", 2);
    a.quiet();
    assert_eq!(
        (a.bgpd(), a.kernel()),
        (Some(speaker), before_a.clone()),
        "{}",
        a.log()
    );

    // The speaker: started again at once; neither side loses a route meanwhile.
    kill(speaker);
    eventually(LIMIT, || {
        if a.bgpd() == Some(speaker) {
            Err(a.log())
        } else {
            Ok(())
        }
    });
    assert_eq!(
        (a.kernel(), b.kernel()),
        (before_a.clone(), before_b.clone())
    );
    a.logs("bgpd has connected", 3);
    a.logs("session up", 2);
    a.quiet();
    assert_eq!(
        (a.kernel(), b.kernel()),
        (before_a, before_b),
        "{}",
        a.log()
    );
}

#[test]
fn host_without_privileges_is_told_what_is_missing() {
    let output = std::process::Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--clear-groups",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ])
        .arg(env!("CARGO_BIN_EXE_cali-node"))
        .env("NODENAME", "n")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("root privileges"), "{text}");
}
