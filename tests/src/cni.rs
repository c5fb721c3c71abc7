//! The CNI plugin, called as a container runtime calls it, beside a daemon that has its folders in one of the test's.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use cali_netlink::testing::{TestNs, eventually};
use serde_json::{Value, json};

use crate::lab::programs;

mod node;

pub use self::node::{NAMESPACE, NODE, Node};

/// How long a runtime goes on with an `ADD`.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A runtime whose daemon has `run` and `lib` of a folder as run and state folders.
#[derive(Debug)]
pub struct Runtime {
    folder: PathBuf,
    namespace: String,
    /// The plugin.
    program: PathBuf,
    /// `CNI_PATH`.
    plugins: Vec<PathBuf>,
}

impl Runtime {
    /// Of pods in one namespace of Kubernetes.
    pub fn new(folder: &Path, namespace: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            namespace: namespace.to_owned(),
            program: programs().join("calico"),
            plugins: vec![programs()],
        }
    }

    /// Calls this plugin instead of the built one.
    pub fn call_program(&mut self, program: PathBuf) {
        self.program = program;
    }

    /// Names one more folder with plugins.
    pub fn look_for_plugins_in(&mut self, folder: PathBuf) {
        self.plugins.push(folder);
    }

    /// Gives a program the folders of the daemon.
    pub fn folders<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("CALI_RUN_DIR", self.folder.join("run"))
            .env("CALI_STATE_DIR", self.folder.join("lib"))
    }

    /// Starts the plugin. `more` is put into the configuration.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn call(&self, command: &str, name: &str, pod: &TestNs, more: &Value) -> Child {
        let mut config = json!({"cniVersion": "1.1.0", "name": "k8s-pod-network", "type": "calico",
            "ipam": {"type": "calico-ipam"}});
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let mut plugin = Command::new(&self.program);
        let mut child = self
            .folders(plugin.env_clear())
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", format!("sandbox-{name}"))
            .env("CNI_NETNS", Path::new("/run/netns").join(pod.name()))
            .env("CNI_IFNAME", "eth0")
            .env(
                "CNI_PATH",
                std::env::join_paths(&self.plugins).expect("folders without a colon"),
            )
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={name}",
                    self.namespace
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the plugin");
        let mut stdin = child.stdin.take().expect("its input");
        stdin
            .write_all(config.to_string().as_bytes())
            .expect("give the plugin its configuration");
        child
    }

    /// Repeats an `ADD` as a runtime does, until it succeeds. `log` is what the daemon has to say if it does not.
    ///
    /// # Panics
    /// If it does not succeed in time.
    pub fn add(&self, name: &str, pod: &TestNs, more: &Value, log: impl Fn() -> String) -> IpAddr {
        eventually(LIMIT, || {
            let output = self.call("ADD", name, pod, more).wait_with_output();
            let output = output.map_err(|error| error.to_string())?;
            given(&output).ok_or_else(|| format!("{}\n{}", told(&output), log()))
        })
    }

    /// A `DEL`, which always succeeds.
    ///
    /// # Panics
    /// If it does not.
    pub fn del(&self, name: &str, pod: &TestNs) {
        self.del_with(name, pod, &json!({}));
    }

    /// A `DEL` with `more` in its configuration, which always succeeds.
    ///
    /// # Panics
    /// If it does not.
    pub fn del_with(&self, name: &str, pod: &TestNs, more: &Value) {
        let output = self.call("DEL", name, pod, more).wait_with_output();
        let output = output.expect("the end of the plugin");
        assert!(output.status.success(), "{}", told(&output));
    }
}

/// What a program printed on both streams.
pub fn told(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// The address of a successful `ADD`.
pub fn given(output: &Output) -> Option<IpAddr> {
    let result: Value = serde_json::from_slice(&output.stdout).ok()?;
    let text = result["ips"][0]["address"].as_str()?;
    text.split('/').next()?.parse().ok()
}
