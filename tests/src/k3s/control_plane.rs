//! etcd, the API server, the controllers and the scheduler, on a host of their own; and kubectl.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cali_datastore::testing::{Etcd, Process, audit, certificates, script, told};
use cali_netlink::NetNs;
use cali_netlink::command::Isolation;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::cluster::{ACCOUNTS, user};

/// Where the API server is.
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PORT: u16 = 6443;
/// The Service of the API server: the first of the range that k3s has for Services.
const SERVICE: &str = "10.43.0.1";

/// Who may talk to the API server by a token that is the name, and of which group he is.
const USERS: [(&str, &str, &str); 4] = [
    ("admin", "admin", "system:masters"),
    ("controllers", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("proxy", "system:kube-proxy", ""),
];

/// The control plane. Ends with this.
#[derive(Debug)]
pub struct ControlPlane {
    // In the order in which they are to end.
    processes: Vec<(&'static str, Process)>,
    etcd: Etcd,
    host: NetNs,
    folder: PathBuf,
    programs: PathBuf,
}

/// A program that ends with the thread that starts it.
pub(super) fn command(host: &NetNs, program: &Path) -> Command {
    let isolation = Isolation {
        parent_death_signal: Some(Signal::SIGKILL as i32),
        ..Isolation::default()
    };
    let command = host.isolated_command(program, &isolation);
    command.expect("a command in a namespace")
}

impl ControlPlane {
    /// Starts everything for nodes of these names, and waits until the API server is ready. It has to have its address already.
    ///
    /// # Panics
    /// If something cannot be started.
    pub fn start(host: &NetNs, folder: &Path, nodes: &[&str]) -> Self {
        let programs = PathBuf::from(script(&["kubernetes"]));
        let address = ADDRESS.to_string();
        certificates(folder, &[&address, SERVICE, "kubernetes.default.svc"]);
        let users = ACCOUNTS.map(user);
        audit::begin(folder, &users.each_ref().map(String::as_str));
        let mut tokens = String::new();
        for (token, name, group) in USERS {
            tokens += &format!("{token},{name},{name},\"{group}\"\n");
        }
        for node in nodes {
            tokens += &format!("{node},system:node:{node},{node},\"system:nodes\"\n");
        }
        std::fs::write(folder.join("tokens.csv"), tokens).expect("a file");
        for token in USERS.iter().map(|(token, ..)| token).chain(nodes) {
            kubeconfig(folder, token);
        }
        let etcd = host.run(Etcd::start).expect("the namespace");
        let mut started = Self {
            processes: Vec::new(),
            host: host.clone(),
            folder: folder.to_owned(),
            programs,
            etcd,
        };
        started.api_server();
        started.controllers();
        started.run("kube-scheduler", |command, folder| {
            command
                .arg(format!("--kubeconfig={folder}/scheduler.kubeconfig"))
                .args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
        });
        started
    }

    fn run(&mut self, name: &'static str, arguments: impl FnOnce(&mut Command, &str)) {
        let mut command = command(&self.host, &self.programs.join(name));
        let folder = self.folder.display().to_string();
        arguments(&mut command, &folder);
        command.arg(format!("--cert-dir={folder}"));
        let process = Process::start(&mut command, &self.folder.join(format!("{name}.log")));
        self.processes.push((name, process));
    }

    fn api_server(&mut self) {
        let endpoint = self.etcd.endpoint();
        let folder = self.folder.clone();
        self.run("kube-apiserver", |command, at| {
            command
                .arg(format!("--etcd-servers={endpoint}"))
                .args([
                    format!("--bind-address={ADDRESS}"),
                    format!("--advertise-address={ADDRESS}"),
                    format!("--secure-port={PORT}"),
                ])
                .args([
                    format!("--tls-cert-file={at}/server.crt"),
                    format!("--tls-private-key-file={at}/server.key"),
                    format!("--token-auth-file={at}/tokens.csv"),
                    format!("--service-account-key-file={at}/accounts.pub"),
                    format!("--service-account-signing-key-file={at}/accounts.key"),
                ])
                .args([
                    "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
                    "--service-cluster-ip-range=10.43.0.0/16",
                    "--authorization-mode=Node,RBAC",
                    "--enable-admission-plugins=NodeRestriction",
                    "--kubelet-preferred-address-types=InternalIP",
                    "--allow-privileged=true",
                ]);
            audit::arguments(&folder, command);
        });
        let [.., (_, server)] = &mut self.processes[..] else {
            unreachable!("it was just started");
        };
        let ask = || kubectl(&self.host, &self.programs, &self.folder);
        server.wait(|| told(ask().args(["get", "--raw", "/readyz"]), "").is_ok());
    }

    fn controllers(&mut self) {
        self.run("kube-controller-manager", |command, at| {
            command
                .args([
                    format!("--kubeconfig={at}/controllers.kubeconfig"),
                    format!("--service-account-private-key-file={at}/accounts.key"),
                    format!("--root-ca-file={at}/ca.crt"),
                ])
                .args([
                    "--use-service-account-credentials",
                    "--allocate-node-cidrs",
                    "--cluster-cidr=10.42.0.0/16",
                    "--service-cluster-ip-range=10.43.0.0/16",
                    "--leader-elect=false",
                    "--bind-address=127.0.0.1",
                ]);
        });
    }

    /// Where Kubernetes' programs are.
    #[must_use]
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// The kubeconfig of a node or of another user of the control plane.
    #[must_use]
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    /// kubectl, of a user who may do everything.
    #[must_use]
    pub fn kubectl(&self) -> Command {
        kubectl(&self.host, &self.programs, &self.folder)
    }

    /// What a person types, in the repository's folder, with kubectl and a kubeconfig; ended after this time.
    #[must_use]
    pub fn shell(&self, words: &str, limit: Duration) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut shell = command(&self.host, Path::new("timeout"));
        shell
            .arg(limit.as_secs().to_string())
            .args(["sh", "-c", words])
            .current_dir(crate::lab::repository())
            .env("PATH", format!("{}:{path}", self.programs.display()))
            .env("KUBECONFIG", self.kubeconfig("admin"));
        shell
    }

    /// What the manifests' accounts have asked for.
    #[must_use]
    pub fn asked(&self) -> Vec<cali_datastore::testing::Asked> {
        audit::take(&self.folder)
    }

    /// The ends of the logs.
    #[must_use]
    pub fn logs(&self) -> String {
        let log = |(name, process): &(&str, Process)| format!("== {name}\n{}\n", process.log_end());
        self.processes.iter().map(log).collect()
    }
}

fn kubectl(host: &NetNs, programs: &Path, folder: &Path) -> Command {
    let mut command = command(host, &programs.join("kubectl"));
    command
        .arg("--kubeconfig")
        .arg(folder.join("admin.kubeconfig"))
        .arg("--request-timeout=30s");
    command
}

fn kubeconfig(folder: &Path, token: &str) {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "k3s",
        "clusters": [{"name": "k3s", "cluster": {
            "server": format!("https://{ADDRESS}:{PORT}"), "certificate-authority": folder.join("ca.crt")}}],
        "users": [{"name": token, "user": {"token": token}}],
        "contexts": [{"name": "k3s", "context": {"cluster": "k3s", "user": token}}],
    });
    let file = folder.join(format!("{token}.kubeconfig"));
    std::fs::write(file, config.to_string()).expect("a file");
}
