//! A node: a host of its own (network, mounts, processes, host name, control groups), and on it what k3s starts: containerd with k3s'
//! folders and settings, the kubelet and kube-proxy.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use cali_datastore::testing::{Process, told};
use cali_netlink::NetNs;
use cali_netlink::testing::{TestNs, eventually};
use serde_json::json;

use super::archive::BOX;
use super::control_plane::{ControlPlane, command};
use crate::bgp::package;
use crate::lab::repository;

/// A busy machine may need long to start something, or to end it.
const LIMIT: Duration = Duration::from_secs(60);
/// Where k3s keeps an agent's files.
const AGENT: &str = "/var/lib/rancher/k3s/agent";
const CONTAINERD: &str = "/run/k3s/containerd/containerd.sock";
/// Control groups.
const GROUPS: &str = "/sys/fs/cgroup";

/// Puts itself into the node's control group and becomes the program.
const ENTER: &str = "if [ -e /sys/fs/cgroup/init ]; then echo $$ >/sys/fs/cgroup/init/cgroup.procs; \
    else for group in /sys/fs/cgroup/*/cgroup.procs; do echo $$ >\"$group\"; done; fi; exec \"$@\"";

/// How kube-proxy makes Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyMode {
    Iptables,
    Nftables,
}

impl ProxyMode {
    fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

/// The node. Everything of it ends with this.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its network.
    pub host: TestNs,
    init: Child,
    first: u32,
    group: String,
    folder: PathBuf,
    path: String,
    processes: Vec<(&'static str, Process)>,
}

impl Drop for Node {
    fn drop(&mut self) {
        // The kernel kills the children with the first process of their namespace.
        let _ = self.init.kill();
        let _ = self.init.wait();
        let end = std::time::Instant::now() + LIMIT;
        while groups(&self.group).iter().any(|group| !remove(group)) {
            if std::time::Instant::now() > end {
                eprintln!("control groups {} cannot be removed", self.group);
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Where control groups of this name are.
fn groups(name: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(GROUPS).into_iter().flatten().flatten();
    let hierarchies = entries.map(|entry| entry.path());
    hierarchies
        .chain([PathBuf::from(GROUPS)])
        .map(|hierarchy| hierarchy.join(name))
        .filter(|group| group.is_dir())
        .collect()
}

/// Removes a group and those in it; whether that was possible.
fn remove(group: &Path) -> bool {
    let entries = std::fs::read_dir(group).into_iter().flatten().flatten();
    for below in entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
    {
        remove(&below);
    }
    std::fs::remove_dir(group).is_ok()
}

impl Node {
    /// Makes the host, with nothing running on it. Its network has to be set up already.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(name: &str, host: TestNs, folder: &Path) -> Self {
        let folder = folder.join(name);
        std::fs::create_dir(&folder).expect("a folder");
        let group = host.name().to_owned();
        let script = repository().join("tests/src/k3s/init");
        let log = std::fs::File::create(folder.join("init.log")).expect("a log");
        let mut init = command(host.netns(), &script);
        init.arg(&folder)
            .args([name, &group])
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log);
        let init = init.spawn().expect("start the first process of a node");
        let peer = package::folder("containerd")
            .expect("containerd")
            .join("usr");
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{0}/bin:{0}/sbin:{path}:/usr/sbin:/sbin", peer.display());
        let mut node = Self {
            name: name.to_owned(),
            host,
            init,
            first: 0,
            group,
            folder,
            path,
            processes: Vec::new(),
        };
        let pid = node.init.id();
        eventually(LIMIT, || {
            let said = || std::fs::read_to_string(node.folder.join("init.log"));
            match node.folder.join("ready").exists() {
                true => Ok(()),
                false => Err(format!("{name}: {}", said().unwrap_or_default())),
            }
        });
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.expect("the children of a process");
        node.first = children.trim().parse().expect("one child");
        node
    }

    /// A program on the host.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut enter = command(self.host.netns(), Path::new("nsenter"));
        enter
            .arg(format!("--target={}", self.first))
            .args(["--mount", "--uts", "--pid", "--cgroup", "--"])
            .args(["sh", "-c", ENTER, "sh"])
            .arg(program)
            .env("PATH", &self.path);
        enter
    }

    /// What a program on the host says; it must succeed.
    ///
    /// # Panics
    /// If it does not.
    pub fn run(&self, words: &[&str]) -> String {
        let said = told(self.command(words[0]).args(&words[1..]), "");
        said.unwrap_or_else(|said| panic!("{words:?} on {}: {said}", self.name))
    }

    fn start(&mut self, name: &'static str, command: &mut Command) {
        let process = Process::start(command, &self.folder.join(format!("{name}.log")));
        self.processes.retain(|(other, _)| *other != name);
        self.processes.push((name, process));
    }

    fn write(&self, path: &str, text: &str) {
        let words = [
            "sh",
            "-c",
            "mkdir -p \"$(dirname \"$1\")\" && cat >\"$1\"",
            "sh",
            path,
        ];
        let said = told(self.command(words[0]).args(&words[1..]), text);
        said.unwrap_or_else(|said| panic!("{path} on {}: {said}", self.name));
    }

    /// Starts containerd as k3s does without flannel, and brings these images into it.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_containerd(&mut self, images: &[PathBuf]) {
        let file = format!("{AGENT}/etc/containerd/config.toml");
        self.write(&file, &containerd_configuration());
        let mut containerd = self.command("containerd");
        self.start("containerd", containerd.args(["--config", &file]));
        let ctr = |words: &[&str]| {
            let mut ctr = self.command("ctr");
            ctr.args(["--address", CONTAINERD, "--namespace", "k8s.io"]);
            told(ctr.args(words), "")
        };
        eventually(LIMIT, || ctr(&["version"]));
        for image in images {
            let said = ctr(&["images", "import", &image.display().to_string()]);
            said.unwrap_or_else(|said| panic!("{}: {said}", image.display()));
        }
    }

    /// Starts the kubelet.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_kubelet(&mut self, server: &ControlPlane, address: &str) {
        let file = format!("{AGENT}/etc/kubelet.json");
        self.write(&file, &kubelet_configuration().to_string());
        let mut kubelet = self.command(server.programs().join("kubelet"));
        kubelet
            .args([
                format!("--config={file}"),
                format!("--cert-dir={AGENT}/kubelet"),
                format!("--hostname-override={}", self.name),
                format!("--node-ip={address}"),
            ])
            .arg("--kubeconfig")
            .arg(server.kubeconfig(&self.name));
        self.start("kubelet", &mut kubelet);
    }

    /// Starts kube-proxy, in the place of one that runs.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_proxy(&mut self, server: &ControlPlane, mode: ProxyMode) {
        if self.processes.iter().any(|(name, _)| *name == "kube-proxy") {
            // There are no other processes in this namespace than the node's.
            self.run(&["pkill", "-x", "kube-proxy"]);
        }
        let mut proxy = self.command(server.programs().join("kube-proxy"));
        proxy
            .args([
                format!("--proxy-mode={}", mode.name()),
                format!("--hostname-override={}", self.name),
            ])
            .args([
                "--cluster-cidr=10.42.0.0/16",
                "--healthz-bind-address=127.0.0.1",
                "--conntrack-max-per-core=0",
                "--conntrack-tcp-timeout-established=0s",
                "--conntrack-tcp-timeout-close-wait=0s",
            ])
            .arg("--kubeconfig")
            .arg(server.kubeconfig("proxy"));
        self.start("kube-proxy", &mut proxy);
    }

    /// The network of the pod that has this address.
    ///
    /// # Panics
    /// If no pod of the node has it.
    #[must_use]
    pub fn pod(&self, address: &str) -> NetNs {
        let folder = format!("/proc/{}/root/run/netns", self.first);
        let entries = std::fs::read_dir(&folder).expect("namespaces of pods");
        for entry in entries.flatten() {
            let Ok(netns) = NetNs::open_path(&entry.path()) else {
                continue;
            };
            let shown = netns.command("ip").args(["-4", "-o", "address"]).output();
            let shown = shown.expect("start ip").stdout;
            if String::from_utf8_lossy(&shown).contains(&format!(" {address}/32 ")) {
                return netns;
            }
        }
        panic!("no pod of {} has {address}", self.name)
    }

    /// The ends of the logs.
    #[must_use]
    pub fn logs(&self) -> String {
        let log = |(name, process): &(&str, Process)| {
            format!("== {name} of {}\n{}\n", self.name, process.log_end())
        };
        self.processes.iter().map(log).collect()
    }
}

/// As k3s writes it where flannel is off: without a table `cni`, so that containerd looks where it does by default.
fn containerd_configuration() -> String {
    let runtime = "plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        r#"version = 2
root = "{AGENT}/containerd"
state = "/run/k3s/containerd"
[grpc]
  address = "{CONTAINERD}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{AGENT}/containerd"
[{runtime}]
  stream_server_address = "127.0.0.1"
  stream_server_port = "10010"
  enable_selinux = false
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  # Whoever runs this test may lack CAP_SYS_RESOURCE.
  restrict_oom_score_adj = true
  sandbox_image = "{BOX}"
[{runtime}.containerd]
  snapshotter = "overlayfs"
  disable_snapshot_annotations = true
[{runtime}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{runtime}.containerd.runtimes.runc.options]
  SystemdCgroup = false
"#
    )
}

fn kubelet_configuration() -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        // Nobody but the API server reaches it.
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD}"),
        "cgroupDriver": "cgroupfs", "cgroupsPerQOS": false, "enforceNodeAllocatable": [], "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDomain": "cluster.local", "clusterDNS": ["10.43.0.10"],
        // As k3s has them.
        "evictionHard": {"imagefs.available": "5%", "nodefs.available": "5%"},
        "imageGCHighThresholdPercent": 100,
    })
}
