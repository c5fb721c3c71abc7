//! Pods of a lab: a network namespace each, wired by the CNI plugin, called exactly as a container runtime calls it
//! (CNI specification 1.1, "Execution Protocol").

use crate::plan::{Plan, PlannedNode, Process, pod_namespace};
use crate::state::Folder;
use cali_netlink::NetNs;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A pod that is to run on a node of the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub node: String,
    /// Ports that a server answers on.
    pub tcp: Vec<u16>,
    pub udp: Vec<u16>,
}

/// A pod that runs: what the plugin answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningPod {
    pub pod: Pod,
    pub container_id: String,
    pub netns: String,
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("pod {pod}: node {node:?} is not a cali/node of this lab")]
    NoSuchNode { pod: String, node: String },
    #[error("pod {pod}: cannot {operation}")]
    Io {
        pod: String,
        operation: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("pod {pod}: the CNI plugin answered code {code}: {message}")]
    Plugin {
        pod: String,
        code: u64,
        message: String,
    },
    #[error("pod {pod}: the CNI plugin printed neither a result nor an error: {output}")]
    NoResult { pod: String, output: String },
}

/// CNI error code "try again later".
const TRY_AGAIN: u64 = 11;

/// How long `ADD` is repeated while the node answers "try again later".
pub const ADD_LIMIT: Duration = Duration::from_secs(20);

/// Runs pods on the nodes of one lab.
#[derive(Debug)]
pub struct Runtime<'a> {
    pub plan: &'a Plan,
    pub folder: &'a Folder,
    /// Folder of our executables.
    pub programs: &'a Path,
}

impl Runtime<'_> {
    /// Pods that run, from the lab's folder.
    pub fn list(&self) -> io::Result<Vec<RunningPod>> {
        let entries = match std::fs::read_dir(self.pods_folder()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut pods = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                pods.push(serde_json::from_slice(&std::fs::read(path)?)?);
            }
        }
        pods.sort_by(|a: &RunningPod, b| {
            (&a.pod.namespace, &a.pod.name).cmp(&(&b.pod.namespace, &b.pod.name))
        });
        Ok(pods)
    }

    /// Makes the pod run; one that runs already is left alone.
    pub fn ensure(&self, pod: &Pod) -> Result<RunningPod, Error> {
        let error = |operation| {
            move |source| Error::Io {
                pod: full_name(pod),
                operation,
                source,
            }
        };
        let record = self.record(pod);
        let netns = pod_namespace(&self.plan.lab, &pod.namespace, &pod.name);
        if let Ok(bytes) = std::fs::read(&record)
            && let Ok(running) = serde_json::from_slice::<RunningPod>(&bytes)
            && running.pod == *pod
            && NetNs::open(&netns).is_ok()
        {
            return Ok(running);
        }
        if NetNs::open(&netns).is_err() {
            NetNs::create(&netns)
                .map_err(io::Error::other)
                .map_err(error("create its namespace"))?;
        }
        let container_id = container_id(pod);
        let result = self.add(pod, &container_id, &netns)?;
        let addresses = addresses(&result).ok_or_else(|| Error::NoResult {
            pod: full_name(pod),
            output: result.to_string(),
        })?;
        let running = RunningPod {
            pod: pod.clone(),
            container_id,
            netns,
            addresses,
        };
        std::fs::create_dir_all(self.pods_folder()).map_err(error("create the folder of pods"))?;
        let text = serde_json::to_vec_pretty(&running)
            .map_err(io::Error::from)
            .map_err(error("encode its record"))?;
        std::fs::write(&record, text).map_err(error("write its record"))?;
        self.serve(&running).map_err(error("start its server"))?;
        Ok(running)
    }

    /// Takes the pod away: `DEL`, its server, its namespace. Taking away what is not there succeeds.
    pub fn remove(&self, pod: &Pod) -> Result<(), Error> {
        let error = |operation| {
            move |source| Error::Io {
                pod: full_name(pod),
                operation,
                source,
            }
        };
        let netns = pod_namespace(&self.plan.lab, &pod.namespace, &pod.name);
        let path = format!("/run/netns/{netns}");
        self.call("DEL", pod, &container_id(pod), &path)?;
        let name = process_name(pod);
        let mut extra = self
            .folder
            .extra()
            .map_err(error("read the list of servers"))?;
        extra.retain(|process| process.name != name);
        self.folder
            .save_extra(&extra)
            .map_err(error("write the list of servers"))?;
        let _ = std::fs::remove_file(self.record(pod));
        // Gone already is what we want.
        let _ = NetNs::delete(&netns);
        Ok(())
    }

    fn add(&self, pod: &Pod, container_id: &str, netns: &str) -> Result<Value, Error> {
        let limit = Instant::now() + crate::patient(ADD_LIMIT);
        loop {
            match self.call("ADD", pod, container_id, &format!("/run/netns/{netns}")) {
                Err(Error::Plugin {
                    code: TRY_AGAIN, ..
                }) if Instant::now() < limit => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                other => return other,
            }
        }
    }

    /// One execution of the plugin: environment, configuration on standard input, result on standard output.
    fn call(
        &self,
        command: &str,
        pod: &Pod,
        container_id: &str,
        netns: &str,
    ) -> Result<Value, Error> {
        let name = full_name(pod);
        let node = self.node(pod)?;
        let error = |operation| {
            let pod = name.clone();
            move |source| Error::Io {
                pod,
                operation,
                source,
            }
        };
        let namespace = NetNs::open(&node.namespace)
            .map_err(io::Error::other)
            .map_err(error("open its node's namespace"))?;
        let config = config(node);
        let mut plugin = Command::new(self.programs.join("calico"));
        plugin
            .envs(&node.env)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container_id)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", self.programs)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={}",
                    pod.namespace, pod.name
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = namespace
            .run(move || plugin.spawn())
            .map_err(io::Error::other)
            .and_then(|spawned| spawned);
        let mut child = started.map_err(error("start the CNI plugin"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin
                .write_all(config.to_string().as_bytes())
                .map_err(error("write the plugin's configuration"))?;
        }
        let output = child
            .wait_with_output()
            .map_err(error("wait for the CNI plugin"))?;
        let printed: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        if output.status.success() {
            return Ok(printed);
        }
        match printed.get("code").and_then(Value::as_u64) {
            Some(code) => {
                let text = |key| {
                    printed
                        .get(key)
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned()
                };
                let details = text("details");
                let message = if details.is_empty() {
                    text("msg")
                } else {
                    format!("{}: {details}", text("msg"))
                };
                Err(Error::Plugin {
                    pod: name,
                    code,
                    message,
                })
            }
            None => {
                let output = [output.stdout, output.stderr].concat();
                Err(Error::NoResult {
                    pod: name,
                    output: String::from_utf8_lossy(&output).trim().to_owned(),
                })
            }
        }
    }

    /// Adds the pod's server to the programs that the supervisor keeps running.
    fn serve(&self, running: &RunningPod) -> io::Result<()> {
        let pod = &running.pod;
        let mut args = vec!["lab".to_owned(), "answer".to_owned()];
        for (flag, ports) in [("--tcp", &pod.tcp), ("--udp", &pod.udp)] {
            args.extend(
                ports
                    .iter()
                    .flat_map(|port| [flag.to_owned(), port.to_string()]),
            );
        }
        let process = Process {
            name: process_name(pod),
            namespace: running.netns.clone(),
            program: self.programs.join("calictl"),
            args,
            env: Default::default(),
            mounts: Vec::new(),
            after: None,
            log: self
                .pods_folder()
                .join(format!("{}_{}.log", pod.namespace, pod.name)),
        };
        let mut extra = self.folder.extra()?;
        extra.retain(|other| other.name != process.name);
        extra.push(process);
        self.folder.save_extra(&extra)
    }

    fn node(&self, pod: &Pod) -> Result<&PlannedNode, Error> {
        let node = self
            .plan
            .nodes
            .get(&pod.node)
            .filter(|node| node.hosts_pods);
        node.ok_or_else(|| Error::NoSuchNode {
            pod: full_name(pod),
            node: pod.node.clone(),
        })
    }

    fn pods_folder(&self) -> PathBuf {
        self.folder.path().join("pods")
    }

    fn record(&self, pod: &Pod) -> PathBuf {
        self.pods_folder()
            .join(format!("{}_{}.json", pod.namespace, pod.name))
    }
}

/// The plugin's configuration, as the installation of a node writes it: pods have IPv6 addresses where the node has one
/// (`IP6` is set and not `none`).
fn config(node: &PlannedNode) -> Value {
    let has_ipv6 = node
        .env
        .get("IP6")
        .is_some_and(|address| !address.is_empty() && address != "none");
    json!({
        "cniVersion": "1.1.0", "name": "k8s-pod-network", "type": "calico",
        "ipam": {"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": has_ipv6.to_string()},
        "policy": {"type": "k8s"}, "log_level": "info",
    })
}

fn full_name(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

fn process_name(pod: &Pod) -> String {
    format!("pod/{}", full_name(pod))
}

/// A container id as runtimes make them, but the same for the same pod, so that a lab can be repeated.
fn container_id(pod: &Pod) -> String {
    let mut id = String::from("lab-");
    id.extend(full_name(pod).chars().map(|character| {
        if character.is_ascii_alphanumeric() {
            character
        } else {
            '-'
        }
    }));
    id
}

/// `ips[].address` of a CNI result, without the prefix lengths.
fn addresses(result: &Value) -> Option<Vec<IpAddr>> {
    let ips = result.get("ips")?.as_array()?;
    ips.iter()
        .map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_from_a_cni_result() {
        let result = json!({"cniVersion": "1.1.0", "ips": [{"address": "10.0.0.5/32"}, {"address": "fd00::5/128"}]});
        assert_eq!(
            addresses(&result).unwrap(),
            [
                "10.0.0.5".parse::<IpAddr>().unwrap(),
                "fd00::5".parse().unwrap()
            ]
        );
        assert_eq!(addresses(&json!({"ips": [{"address": 5}]})), None);
        assert_eq!(addresses(&Value::Null), None);
    }

    #[test]
    fn container_ids_hold_only_what_cni_allows() {
        let pod = Pod {
            namespace: "a.b".into(),
            name: "c_d".into(),
            node: "n".into(),
            tcp: vec![],
            udp: vec![],
        };
        assert_eq!(container_id(&pod), "lab-a-b-c-d");
    }
}
