//! `calictl node takeover` and `calictl node cleanup` on hosts that others use as well: nothing of the predecessor's, or of
//! ours, remains, and everything else is as it was.

#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cali_api::AnyResource;
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use cali_netlink::testing::hostile::{Fixture, Foreign, Host, Ours, crowded, dump};
use cali_netlink::testing::{TestNs, eventually};
use cali_tests::lab::programs;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const NODE: &str = "node1";
const NOTHING_CHANGED: &str = "Nothing was changed. Do it with --yes.";

/// What flanneld's iptables manager writes (1.1 and later), and a rule in the form of the versions before.
const FLANNEL_RULES: &str = r#"*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"#;

/// A host with a file system and a datastore of its own.
struct Machine {
    ns: TestNs,
    root: tempfile::TempDir,
    store: Sqlite,
}

impl Machine {
    fn new(label: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Sqlite::open(&root.path().join("cluster.db")).unwrap();
        Self {
            ns: TestNs::new(label),
            root,
            store,
        }
    }

    async fn put(&self, value: Value) {
        let object = AnyResource::from_json(value).unwrap();
        self.store.apply(object).await.unwrap();
    }

    async fn pod(&self, name: &str) {
        self.put(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "test"},
            "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "i"}]}
        }))
        .await;
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn has(&self, path: &str) -> bool {
        // A link counts, wherever it leads.
        self.root.path().join(path).symlink_metadata().is_ok()
    }

    fn restore(&self, program: &str, rules: &str) {
        let mut child = self
            .ns
            .command(program)
            .args(["--noflush", "--wait"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(rules.as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success(), "{program}");
    }

    /// `calictl node ARGS`, and whether it was content.
    fn node(&self, args: &str) -> (String, bool) {
        let output = self
            .ns
            .netns()
            .command(programs().join("calictl"))
            .arg("node")
            .args(args.split(' '))
            .arg("--root")
            .arg(self.root.path())
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", self.root.path().join("cluster.db"))
            .env("NODENAME", NODE)
            .env("NO_COLOR", "1")
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            String::from_utf8_lossy(&text).into_owned(),
            output.status.success(),
        )
    }

    fn done(&self, args: &str) -> String {
        let (said, content) = self.node(args);
        assert!(content, "{args}: {said}");
        said
    }

    /// Everything that the kernel holds, whoever's it is.
    fn everything(&self) -> Foreign {
        let nobody = Ours {
            tables: Vec::new(),
            devices: Vec::new(),
            protocols: Vec::new(),
            pools: Vec::new(),
            nexthops: u32::MAX..=u32::MAX,
            iptables: false,
        };
        dump(&self.ns, &nobody)
    }

    /// The host's end of a pod's interface, whose other end is in `pod`.
    fn pod_link(&self, name: &str, pod: &TestNs) {
        let peer = format!(
            "link add {name} type veth peer name eth0 netns {}",
            pod.name()
        );
        self.ns.ip(&peer);
        self.ns.ip(&format!("link set {name} up"));
    }

    fn has_link(&self, name: &str) -> bool {
        self.ns
            .output("ip", &["link", "show", name])
            .status
            .success()
    }
}

/// The lines of the four programs, and the sets.
fn filters(ns: &TestNs) -> String {
    let programs = [
        "iptables-nft-save",
        "ip6tables-nft-save",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
    ];
    let mut all = ns.run("ipset", &["list", "-n"]);
    for program in programs {
        all += &String::from_utf8_lossy(&ns.output(program, &[]).stdout);
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_stopped_calico_remains_and_nothing_else_is_touched() {
    let machine = Machine::new("takeover");
    let ns = &machine.ns;
    let mut theirs = Ours::with_iptables();
    theirs.tables = vec!["ip calico".into(), "ip6 calico".into()];
    let host = Host::apply(ns, crowded(), theirs);
    // Calico was switched from one variant to the other.
    machine.restore(
        "iptables-legacy-restore",
        include_str!("../../netlink/src/testing/hostile/calico.rules"),
    );
    ns.ip("link add vxlan.calico type vxlan id 4096 dstport 4789");
    ns.ip("link set vxlan.calico up");
    ns.ip("link add wireguard.cali type bridge");
    for route in [
        "192.168.1.0/26 via 172.30.0.2 proto bird",
        "blackhole 192.168.2.0/26 proto bird",
        "192.168.3.0/26 dev vxlan.calico proto 80",
        "192.168.2.5/32 dev vxlan.calico proto 80 table 1",
    ] {
        ns.ip(&format!("route add {route}"));
    }
    ns.ip("rule add not fwmark 0x100000/0x100000 lookup 1 pref 99");
    let [runs, gone] = ["runs", "gone"].map(TestNs::new);
    machine.pod("a").await;
    let interface = cali_api::kubernetes::interface_name("test", "a");
    machine.pod_link(&interface, &runs);
    machine.pod_link("cali00000000000", &gone);
    for file in [
        "etc/cni/net.d/10-calico.conflist",
        "etc/cni/net.d/calico-kubeconfig",
        "etc/cni/net.d/05-other.conflist",
        "opt/cni/bin/calico",
        "opt/cni/bin/loopback",
        "var/lib/calico/nodename",
        "var/run/calico/bird.ctl",
        "var/log/calico/cni/cni.log",
    ] {
        machine.file(file, "x");
    }

    let before = machine.everything();
    let said = machine.done("takeover calico");
    assert!(said.contains("would remove  device vxlan.calico"), "{said}");
    assert!(said.contains(NOTHING_CHANGED), "{said}");
    before.assert_same(&machine.everything());

    let said = machine.done("takeover calico --yes");
    assert!(
        said.contains(&format!("stays  device {interface}: its pod runs")),
        "{said}"
    );
    assert!(
        said.contains("stays  device wireguard.cali: it is bridge"),
        "{said}"
    );
    assert!(said.contains("stays  route 172.31.0.0/24"), "{said}");
    host.assert_untouched(ns);
    let filters = filters(ns);
    assert!(!filters.contains("cali"), "{filters}");
    let tables = ns.run("nft", &["list", "tables"]);
    assert!(!tables.contains("calico"), "{tables}");
    let routes = ns.ip("route show table all");
    assert!(
        !routes.contains("192.168.1.0") && !routes.contains("192.168.2."),
        "{routes}"
    );
    assert!(!ns.ip("rule").contains("99:"), "{}", ns.ip("rule"));
    for (link, stays) in [
        ("vxlan.calico", false),
        ("cali00000000000", false),
        ("wireguard.cali", true),
        (&interface, true),
    ] {
        assert_eq!(machine.has_link(link), stays, "{link}");
    }
    for (file, stays) in [
        ("etc/cni/net.d/10-calico.conflist", false),
        ("etc/cni/net.d/calico-kubeconfig", false),
        ("etc/cni/net.d/05-other.conflist", true),
        ("opt/cni/bin/calico", false),
        ("opt/cni/bin/loopback", true),
        ("var/lib/calico", false),
        ("var/run/calico", false),
        ("var/log/calico", false),
    ] {
        assert_eq!(machine.has(file), stays, "{file}");
    }

    let said = machine.done("takeover calico --yes");
    assert!(
        said.contains("Nothing of Calico is left to remove."),
        "{said}"
    );
    machine.done("takeover calico --yes --pods");
    assert!(!machine.has_link(&interface));
    host.assert_untouched(ns);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_stopped_flannel_remains_and_nothing_else_is_touched() {
    let machine = Machine::new("flannel");
    let ns = &machine.ns;
    for fixture in [
        Fixture::Routes,
        Fixture::Docker,
        Fixture::KubeProxyIptables,
        Fixture::Firewalld,
    ] {
        fixture.apply(ns);
    }
    ns.ip("route add 10.99.0.0/24 via 172.30.0.2");
    let before = machine.everything();

    machine.restore("iptables-nft-restore", FLANNEL_RULES);
    ns.run("nft", &["add table ip flannel-ipv4; add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority srcnat; }"]);
    ns.ip("link add flannel.1 type vxlan id 1 dstport 8472");
    ns.ip("link set flannel.1 up");
    ns.ip("route add 10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink");
    ns.ip("route add 10.244.2.0/24 via 172.30.0.2");
    ns.ip("link add cni0 type bridge");
    ns.ip("address add 10.244.1.1/24 dev cni0");
    ns.ip("link set cni0 up");
    let pod = TestNs::new("flpod");
    machine.pod_link("veth0", &pod);
    ns.ip("link set veth0 master cni0");
    for (file, text) in [
        (
            "run/flannel/subnet.env",
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n",
        ),
        ("etc/cni/net.d/10-flannel.conflist", "{}"),
        ("var/lib/cni/networks/cbr0/10.244.1.2", "x"),
        ("var/lib/cni/networks/other/10.9.0.2", "x"),
    ] {
        machine.file(file, text);
    }

    let said = machine.done("takeover flannel --dry-run");
    assert!(said.contains(NOTHING_CHANGED), "{said}");
    let said = machine.done("takeover flannel --yes");
    assert!(
        said.contains("stays  device cni0: 1 pods are connected to it"),
        "{said}"
    );
    assert!(machine.has_link("veth0") && !machine.has_link("flannel.1"));
    assert!(machine.has("var/lib/cni/networks/cbr0/10.244.1.2"));
    let said = machine.done("takeover flannel --yes --pods");
    assert!(said.contains("removed  device cni0"), "{said}");
    before.assert_same(&machine.everything());
    assert!(!machine.has("run/flannel") && !machine.has("var/lib/cni/networks/cbr0"));
    assert!(!machine.has("etc/cni/net.d/10-flannel.conflist"));
    assert!(machine.has("var/lib/cni/networks/other/10.9.0.2"));
    let said = machine.done("takeover flannel --yes");
    assert!(
        said.contains("Nothing of flannel is left to remove."),
        "{said}"
    );
}

/// A daemon that ends with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    fn daemon(&self) -> Daemon {
        let log = std::fs::File::create(self.root.path().join("log")).unwrap();
        let mut command = self.ns.netns().command(programs().join("cali-node"));
        command
            .env("NODENAME", NODE)
            .env("CALI_SQLITE_PATH", self.root.path().join("cluster.db"))
            .env("CALI_RUN_DIR", self.root.path().join("var/run/calico"))
            .env("CALI_STATE_DIR", self.root.path().join("var/lib/calico"))
            .env("CALI_HOST_ROOT", self.root.path())
            .env("CALI_CNI_INSTALL", "true")
            .env("NO_DEFAULT_POOLS", "true")
            .env("CALICO_NETWORKING_BACKEND", "vxlan")
            .env("FELIX_HEALTHENABLED", "false")
            .env("NO_COLOR", "1")
            .stderr(Stdio::from(log));
        Daemon(command.spawn().unwrap())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.root.path().join("log")).unwrap_or_default()
    }

    /// What a runtime does: the plugin that is installed, until it succeeds.
    fn add(&self, name: &str, pod: &TestNs) -> String {
        let config = json!({"cniVersion": "1.1.0", "name": "k8s-pod-network", "type": "calico",
            "ipam": {"type": "calico-ipam"},
            "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}});
        eventually(LIMIT, || {
            let mut child = Command::new(programs().join("calico"))
                .env_clear()
                .env("CALI_RUN_DIR", self.root.path().join("var/run/calico"))
                .env("CALI_STATE_DIR", self.root.path().join("var/lib/calico"))
                .env("CNI_COMMAND", "ADD")
                .env("CNI_CONTAINERID", format!("sandbox-{name}"))
                .env("CNI_NETNS", Path::new("/run/netns").join(pod.name()))
                .env("CNI_IFNAME", "eth0")
                .env("CNI_PATH", programs())
                .env(
                    "CNI_ARGS",
                    format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=test;K8S_POD_NAME={name}"),
                )
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdin = child.stdin.take().unwrap();
            stdin.write_all(config.to_string().as_bytes()).unwrap();
            drop(stdin);
            let output = child.wait_with_output().unwrap();
            let result: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let address = result["ips"][0]["address"].as_str();
            let address = address.and_then(|text| text.split('/').next());
            address
                .map(str::to_owned)
                .ok_or_else(|| format!("{result}\n{}", self.log()))
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cleaned_host_is_as_it_was_before_cali_came() {
    let machine = Machine::new("cleanup");
    let (ns, outside) = (&machine.ns, TestNs::new("cleanout"));
    ns.veth("eth0", &outside, "far").await;
    ns.ip("address add 192.0.2.1/24 dev eth0");
    for fixture in [Fixture::Routes, Fixture::Docker, Fixture::KubeProxyNftables] {
        fixture.apply(ns);
    }
    let before = machine.everything();
    for object in [
        json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "pods"},
            "spec": {"cidr": "10.65.0.0/16", "vxlanMode": "Always", "ipipMode": "Never", "natOutgoing": true}}),
        json!({"apiVersion": "projectcalico.org/v3", "kind": "Node", "metadata": {"name": "node2"},
            "spec": {"bgp": {"ipv4Address": "192.0.2.2/24"}, "ipv4VXLANTunnelAddr": "10.65.7.0",
                "vxlanTunnelMACAddr": "66:11:22:33:44:55"}}),
        json!({"apiVersion": "projectcalico.org/v3", "kind": "BlockAffinity", "metadata": {"name": "node2-10-65-7-0-26"},
            "spec": {"node": "node2", "cidr": "10.65.7.0/26", "state": "confirmed"}}),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "test"}}),
    ] {
        machine.put(object).await;
    }
    machine.pod("a").await;
    let daemon = machine.daemon();
    let pod = TestNs::new("cleanpod");
    let address = machine.add("a", &pod);
    eventually(LIMIT, || {
        let routes = ns.ip("route");
        let stands =
            routes.contains("10.65.7.0/26") && machine.has("etc/cni/net.d/10-calico.conflist");
        if stands {
            Ok(())
        } else {
            Err(format!("{routes}\n{}", machine.log()))
        }
    });

    assert!(machine.has("opt/cni/bin/loopback"));

    let (said, content) = machine.node("cleanup --yes");
    assert!(
        !content && said.contains("cali-node still runs here"),
        "{said}"
    );
    drop(daemon);
    let said = machine.done("cleanup");
    assert!(
        said.contains("would remove  nf_tables table inet calico\n"),
        "{said}"
    );
    assert!(said.contains(NOTHING_CHANGED), "{said}");

    let said = machine.done("cleanup --yes");
    assert!(said.contains("its pod runs; --pods cuts it off"), "{said}");
    let pinged = ns.output("ping", &["-c1", "-W5", &address]);
    assert!(
        pinged.status.success(),
        "the pod that runs was cut off:\n{said}"
    );
    machine.done("cleanup --yes --pods");
    before.assert_same(&machine.everything());
    for file in [
        "etc/cni/net.d/10-calico.conflist",
        "opt/cni/bin/calico",
        "opt/cni/bin/calico-ipam",
        "opt/cni/bin/loopback",
        "var/run/calico",
        "var/lib/calico",
    ] {
        assert!(!machine.has(file), "{file}");
    }
    let said = machine.done("cleanup --yes --pods");
    assert!(
        said.contains("Nothing of Cali is left to remove."),
        "{said}"
    );
}
