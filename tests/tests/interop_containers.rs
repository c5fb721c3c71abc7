//! The plugin under runtimes of containers as Debian ships them, with real containers: podman with crun, containerd with runc.

#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use cali_netlink::command::{Bind, Isolation};
use cali_netlink::testing::{TestNs, eventually};
use cali_tests::bgp::package;
use cali_tests::cni::{LIMIT, Node, told};
use cali_tests::lab::programs;
use serde_json::{Value, json};

/// Name of the network, which is the profile of its containers too.
const NETWORK: &str = "pods";
const GREETING: &str = "greetings from the container";
const REQUEST: &str = "GET /hello HTTP/1.0\r\n\r\n";
/// How long one client waits.
const WAIT: Duration = Duration::from_secs(2);
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// Mounts that the commands of a runtime share and nobody else sees, in the network namespace of the host.
struct Room {
    holder: Child,
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Room {
    fn new(host: &TestNs, binds: Vec<Bind>) -> Self {
        let isolation = Isolation {
            private_mounts: true,
            binds,
            ..Isolation::default()
        };
        let mut holder = host.netns().isolated_command("sleep", &isolation).unwrap();
        let holder = holder.arg("infinity").spawn().unwrap();
        Self { holder }
    }

    fn command(&self, program: &Path) -> Command {
        let of = |kind: &str| format!("/proc/{}/ns/{kind}", self.holder.id());
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount={}", of("mnt")))
            .arg(format!("--net={}", of("net")))
            .arg("--")
            .arg(program);
        command
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// The configuration of the network, as an operator writes it for a runtime without Kubernetes.
fn conflist() -> String {
    json!({"cniVersion": "0.4.0", "name": NETWORK, "plugins": [
        {"type": "calico", "ipam": {"type": "calico-ipam"}, "capabilities": {"portMappings": true}}]})
    .to_string()
}

/// A file system with one static program and one file.
fn root_of_container(folder: &Path) {
    write(&folder.join("www/hello"), GREETING);
    std::fs::copy("/bin/busybox", folder.join("busybox")).unwrap();
}

/// A node that lets containers of the network talk.
async fn node() -> Node {
    let mut node = Node::new().await;
    let allow = json!([{"action": "Allow"}]);
    node.put(json!({"apiVersion": "projectcalico.org/v3", "kind": "Profile", "metadata": {"name": NETWORK},
        "spec": {"ingress": allow, "egress": allow}}))
        .await;
    node.start();
    node
}

/// What somebody in a namespace is served at this address.
fn served(from: &TestNs, address: &str) -> Option<String> {
    let address: SocketAddr = address.parse().unwrap();
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&address, WAIT)?;
        stream.set_read_timeout(Some(WAIT))?;
        stream.write_all(REQUEST.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    };
    from.netns().run(ask).unwrap().ok()
}

/// A shell's words for the same, for a container. (The client for HTTP of a static busybox crashes looking for names.)
fn asking(address: &str) -> String {
    let request = REQUEST.replace('\r', "\\r").replace('\n', "\\n");
    format!("/busybox printf '{request}' | /busybox nc -w 2 {address} 80")
}

fn greets(answer: &str) -> bool {
    answer.ends_with(GREETING)
}

/// Waits until somebody in a namespace is served, or is not.
fn becomes(from: &TestNs, address: &str, wanted: bool, node: &Node) {
    eventually(LIMIT, || {
        let seen = served(from, address);
        if seen.as_deref().is_some_and(greets) == wanted {
            Ok(())
        } else {
            Err(format!("{address}: {seen:?}\n{}", node.log()))
        }
    });
}

/// Nothing of any container is left on the host or in the datastore.
fn nothing_is_left(node: &Node) {
    eventually(LIMIT, || {
        let links = node.host.ip("-br link");
        let endpoints = node.calictl(&["get", "workloadendpoints", "-A", "-o", "name"]);
        if links.contains("cali") || endpoints.contains("cni") {
            Err(format!("{links}\n{endpoints}\n{}", node.log()))
        } else {
            Ok(())
        }
    });
    node.is_consistent();
    let shown = node.calictl(&["ipam", "show", "--show-blocks"]);
    assert!(!shown.contains("could not"), "{shown}");
}

/// Denies the containers of this node everything that comes in; they are in Kubernetes' namespace `default`.
fn closed() -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
        "metadata": {"name": "closed", "namespace": "default"},
        "spec": {"selector": "projectcalico.org/orchestrator == 'cni'", "types": ["Ingress"],
            "ingress": [{"action": "Deny"}]}})
}

struct Podman {
    room: Room,
    folder: PathBuf,
    program: PathBuf,
    libraries: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Drop for Podman {
    /// What a test leaves that fails.
    fn drop(&mut self) {
        self.run(&["rm", "-f", "--all", "--time", "0"]);
    }
}

impl Podman {
    fn new(node: &Node) -> Self {
        let folder = node.folder().join("podman");
        let peer = package::folder("podman").unwrap();
        let libraries = peer.join("usr/lib/x86_64-linux-gnu");
        let home = folder.join("home");
        let anything = json!({"default": [{"type": "insecureAcceptAnything"}]}).to_string();
        write(&home.join(".config/containers/policy.json"), &anything);
        write(&folder.join("networks/pods.conflist"), &conflist());
        // podman and conmon start the next one without most of the environment; where conmon cannot start podman to clean
        // up, whoever waits for the container's end waits 20 seconds longer.
        let [conmon, crun] = ["conmon", "crun"].map(|name| {
            let wrapper = folder.join(name);
            let words = format!(
                "#!/bin/sh\nexport LD_LIBRARY_PATH={} CALI_RUN_DIR={} CALI_STATE_DIR={}\nexec {} \"$@\"\n",
                libraries.display(),
                node.folder().join("run").display(),
                node.folder().join("lib").display(),
                peer.join("usr/bin").join(name).display()
            );
            write(&wrapper, &words);
            std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
            wrapper
        });
        write(
            &folder.join("containers.conf"),
            &format!(
                "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [{plugins:?}]\n\
                 network_config_dir = {networks:?}\ndefault_network = \"{NETWORK}\"\n\
                 [engine]\ncgroup_manager = \"cgroupfs\"\nconmon_path = [{conmon:?}]\n\
                 runtime = \"crun\"\nevents_logger = \"none\"\n\
                 [engine.runtimes]\ncrun = [{crun:?}]\n\
                 [containers]\ncgroups = \"disabled\"\n\
                 default_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n",
                plugins = programs(),
                networks = folder.join("networks"),
            ),
        );
        write(
            &folder.join("storage.conf"),
            &format!(
                "[storage]\ndriver = \"vfs\"\nrunroot = {:?}\ngraphroot = {:?}\n",
                folder.join("run"),
                folder.join("graph")
            ),
        );
        // crun wants one version of control groups; where the host has both, this room has the new one.
        let both = Path::new(UNIFIED).is_dir();
        let binds = both.then(|| Bind {
            source: UNIFIED.into(),
            target: "/sys/fs/cgroup".into(),
            read_only: false,
        });
        Self {
            room: Room::new(&node.host, binds.into_iter().collect()),
            environment: vec![
                ("HOME", home),
                ("CONTAINERS_CONF", folder.join("containers.conf")),
                ("CONTAINERS_STORAGE_CONF", folder.join("storage.conf")),
                ("CALI_RUN_DIR", node.folder().join("run")),
                ("CALI_STATE_DIR", node.folder().join("lib")),
            ],
            program: peer.join("usr/bin/podman"),
            libraries,
            folder,
        }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = self.room.command(&self.program);
        command
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("LD_LIBRARY_PATH", &self.libraries)
            .args(["--tmpdir".as_ref(), self.folder.join("tmp").as_os_str()])
            .args(args)
            .stdin(Stdio::null());
        command.output().unwrap()
    }

    fn succeeds(&self, node: &Node, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(
            output.status.success(),
            "{args:?}: {}\n{}",
            told(&output),
            node.log()
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Goes on until the node is ready, as a person would.
    fn started(&self, node: &Node, args: &[&str]) {
        eventually(LIMIT, || {
            let output = self.run(args);
            if output.status.success() {
                return Ok(());
            }
            self.run(&["rm", "-f", "--all", "--time", "0"]);
            Err(format!("{args:?}: {}\n{}", told(&output), node.log()))
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_of_podman_talk_obey_policy_and_leave_nothing() {
    let mut node = node().await;
    let podman = Podman::new(&node);
    let image = podman.folder.join("image");
    root_of_container(&image);
    let archive = podman.folder.join("image.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&archive).arg("-C").arg(&image).arg(".");
    assert!(tar.status().unwrap().success());
    podman.succeeds(&node, &["import", archive.to_str().unwrap(), "box"]);

    let httpd = ["box", "/busybox", "httpd", "-f", "-p", "80", "-h", "/www"];
    let web = ["run", "-d", "--name", "web", "-p", "8080:80"];
    podman.started(&node, &[&web[..], &httpd[..]].concat());
    let format = format!("{{{{(index .NetworkSettings.Networks \"{NETWORK}\").IPAddress}}}}");
    let address = podman.succeeds(&node, &["inspect", "web", "--format", &format]);
    assert!(address.starts_with("10.65.0."), "{address:?}");
    let at_port = format!("{address}:80");
    becomes(&node.host, &at_port, true, &node);
    becomes(&node.outside, "192.0.2.1:8080", true, &node);

    let words = asking(&address);
    let ask = ["run", "--rm", "box", "/busybox", "sh", "-c", &words];
    let answer = podman.succeeds(&node, &ask);
    assert!(greets(&answer), "{answer}");
    node.put(closed()).await;
    becomes(&node.outside, "192.0.2.1:8080", false, &node);
    let asked = told(&podman.run(&ask));
    assert!(!asked.contains(GREETING), "{asked}");
    let deleted = node.calictl(&["delete", "networkpolicy", "closed", "-n", "default"]);
    assert!(deleted.contains("Successfully deleted 1"), "{deleted}");
    becomes(&node.outside, "192.0.2.1:8080", true, &node);

    // Without the daemon there are no new containers, and what runs runs on.
    node.kill();
    let refused = podman.run(&ask);
    assert!(
        !refused.status.success() && told(&refused).contains("cali-node"),
        "{}",
        told(&refused)
    );
    becomes(&node.host, &at_port, true, &node);
    node.start();
    eventually(LIMIT, || {
        let output = podman.run(&ask);
        let said = told(&output);
        if greets(said.trim_end()) {
            Ok(())
        } else {
            Err(format!("{said}\n{}", node.log()))
        }
    });
    podman.succeeds(&node, &["rm", "-f", "--all", "--time", "0"]);
    nothing_is_left(&node);
}

struct Containerd {
    room: Room,
    folder: PathBuf,
    programs: PathBuf,
    path: String,
    daemon: Child,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

impl Containerd {
    /// The client looks for networks and plugins in the usual places, which this room has to itself.
    fn new(node: &Node) -> Self {
        let folder = node.folder().join("containerd");
        let peer = package::folder("containerd").unwrap();
        write(&folder.join("etc/cni/net.d/10-pods.conflist"), &conflist());
        let plugins = folder.join("opt/cni/bin");
        std::fs::create_dir_all(&plugins).unwrap();
        std::fs::copy(programs().join("calico"), plugins.join("calico")).unwrap();
        let config = folder.join("config.toml");
        write(
            &config,
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
        );
        let bind = |name: &str| Bind {
            source: folder.join(name),
            target: Path::new("/").join(name),
            read_only: true,
        };
        let room = Room::new(&node.host, vec![bind("etc"), bind("opt")]);
        let programs = peer.join("usr/bin");
        let path = format!(
            "{}:{}:/usr/bin:/bin:/usr/sbin:/sbin",
            programs.display(),
            peer.join("usr/sbin").display()
        );
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let mut command = room.command(&programs.join("containerd"));
        command
            .env("PATH", &path)
            .arg("--config")
            .arg(config)
            .arg("--root")
            .arg(folder.join("root"))
            .arg("--state")
            .arg(folder.join("state"))
            .arg("--address")
            .arg(folder.join("socket"))
            .stdout(Stdio::from(log.try_clone().unwrap()))
            .stderr(Stdio::from(log));
        let daemon = command.spawn().unwrap();
        let containerd = Self {
            room,
            folder,
            programs,
            path,
            daemon,
        };
        eventually(LIMIT, || {
            let output = containerd.ctr(node).arg("version").output().unwrap();
            if output.status.success() {
                Ok(())
            } else {
                Err(format!("{}\n{}", told(&output), containerd.log()))
            }
        });
        containerd
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    fn ctr(&self, node: &Node) -> Command {
        let mut command = self.room.command(&self.programs.join("ctr"));
        node.runtime.folders(&mut command);
        command
            .env("PATH", &self.path)
            .arg("--address")
            .arg(self.folder.join("socket"));
        command
    }

    /// A container that runs until it is killed; the client stays with it and takes its network away at the end.
    fn start(&self, node: &Node, root: &Path, name: &str) -> Child {
        let mut ctr = self.ctr(node);
        ctr.args(["run", "--rm", "--cni", "--rootfs"])
            .arg(root)
            .args([name, "/busybox", "httpd", "-f", "-p", "80", "-h", "/www"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        ctr.spawn().unwrap()
    }

    fn kill(&self, node: &Node, name: &str) {
        let killed = self
            .ctr(node)
            .args(["task", "kill", "-s", "SIGKILL", name])
            .output()
            .unwrap();
        assert!(killed.status.success(), "{}\n{}", told(&killed), self.log());
    }

    /// What the client says who runs a program in the container.
    fn inside(&self, node: &Node, name: &str, args: &[&str]) -> Output {
        let exec = ["task", "exec", "--exec-id", "one", name, "/busybox"];
        self.ctr(node)
            .args(exec)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

/// The addresses of the containers of this node, as the datastore shows them.
fn shown_addresses(node: &Node) -> Vec<String> {
    let listed = node.calictl(&["get", "workloadendpoints", "-A", "-o", "json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap_or_default();
    let items = listed["items"].as_array().cloned().unwrap_or_default();
    let of = |item: &Value| item["spec"]["ipNetworks"][0].as_str().map(str::to_owned);
    let addresses = items.iter().filter_map(of);
    addresses
        .map(|address| address.trim_end_matches("/32").to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_of_containerd_talk_obey_policy_and_leave_nothing() {
    let node = node().await;
    let containerd = Containerd::new(&node);
    let root = containerd.folder.join("container");
    root_of_container(&root);
    for folder in ["proc", "sys", "dev", "run"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    // Until the daemon is ready, the client says so and gives up.
    let started = eventually(LIMIT, || {
        let mut child = containerd.start(&node, &root, "web");
        loop {
            if child.try_wait().unwrap().is_some() {
                let output = child.wait_with_output().unwrap();
                return Err(format!(
                    "{}\n{}\n{}",
                    told(&output),
                    containerd.log(),
                    node.log()
                ));
            }
            if shown_addresses(&node).len() == 1 {
                return Ok(child);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let address = shown_addresses(&node).remove(0);
    assert!(address.starts_with("10.65.0."), "{address:?}");
    let at_port = format!("{address}:80");
    becomes(&node.host, &at_port, true, &node);
    let inside = containerd.inside(&node, "web", &["ip", "-4", "-o", "addr", "show", "eth0"]);
    assert!(
        told(&inside).contains(&format!("{address}/32")),
        "{}",
        told(&inside)
    );

    // Another container asks the first.
    let second = containerd.start(&node, &root, "client");
    eventually(LIMIT, || match shown_addresses(&node).len() {
        2 => Ok(()),
        count => Err(format!(
            "{count} containers\n{}\n{}",
            containerd.log(),
            node.log()
        )),
    });
    let words = asking(&address);
    let ask = || told(&containerd.inside(&node, "client", &["sh", "-c", &words]));
    let answer = ask();
    assert!(greets(&answer), "{answer}");
    node.put(closed()).await;
    eventually(LIMIT, || {
        let said = ask();
        if said.contains(GREETING) {
            Err(said)
        } else {
            Ok(())
        }
    });

    for (name, child) in [("web", started), ("client", second)] {
        containerd.kill(&node, name);
        let output = child.wait_with_output().unwrap();
        assert!(!told(&output).contains("cni"), "{}", told(&output));
    }
    nothing_is_left(&node);
}
