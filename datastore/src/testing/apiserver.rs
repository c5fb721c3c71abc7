//! A real kube-apiserver over a real etcd, built by `scripts/kubernetes` (or of `KUBEBUILDER_ASSETS`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kube::Client;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Request;
use kube::core::params::GetParams;
use serde_json::{Value, json};

use super::audit::{self, Asked};
use super::etcd::Etcd;
use super::process::{Process, START, free_port, script, told};
use crate::kubernetes::Settings;

/// Who may do everything.
const ADMIN_TOKEN: &str = "admin-token";

/// An API server with RBAC on loopback, and the controllers without which namespaces do not go.
///
/// The admission of service accounts is off, so that pods can be made in a namespace at once. Call it from a
/// multi-threaded Tokio runtime.
#[derive(Debug)]
pub struct ApiServer {
    // In the order in which they are to end.
    controllers: Process,
    server: Process,
    etcd: Etcd,
    folder: tempfile::TempDir,
    programs: PathBuf,
    port: u16,
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("a file of the fixture");
    path
}

/// Writes an authority, a certificate of the server with these names that it signed, and the keys of tokens of service accounts:
/// `ca.crt`, `server.crt`, `server.key`, `accounts.key`, `accounts.pub`.
///
/// # Panics
/// If they cannot be made or written.
pub fn certificates(folder: &Path, names: &[&str]) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let key = || KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, key()).expect("an authority");
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let server_key = key();
    let server = CertificateParams::new(names)
        .expect("names")
        .signed_by(&server_key, &authority)
        .expect("a certificate");
    write(folder, "ca.crt", &authority.pem());
    write(folder, "server.crt", &server.pem());
    write(folder, "server.key", &server_key.serialize_pem());
    let accounts = key();
    write(folder, "accounts.key", &accounts.serialize_pem());
    write(folder, "accounts.pub", &accounts.public_key_pem());
}

impl ApiServer {
    /// Starts etcd, the API server and the controllers, and waits until it is ready.
    ///
    /// # Panics
    /// If it cannot be started.
    pub async fn start() -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary folder")).await
    }

    /// As [`ApiServer::start`], and what these users ask for is written down ([`ApiServer::asked`]).
    ///
    /// # Panics
    /// If it cannot be started.
    pub async fn start_audited(users: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        audit::begin(folder.path(), users);
        Self::start_in(folder).await
    }

    async fn start_in(folder: tempfile::TempDir) -> Self {
        let programs = PathBuf::from(script(&["kubernetes"]));
        certificates(folder.path(), &["127.0.0.1", "localhost"]);
        write(
            folder.path(),
            "tokens.csv",
            &format!("{ADMIN_TOKEN},admin,admin,\"system:masters\"\n"),
        );
        write(folder.path(), "token", ADMIN_TOKEN);
        let port = free_port();
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{port}"),
                "certificate-authority": folder.path().join("ca.crt"),
            }}],
            "users": [{"name": "admin", "user": {"tokenFile": folder.path().join("token")}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        });
        write(folder.path(), "kubeconfig", &kubeconfig.to_string());
        let etcd = Etcd::start();
        let server = launch(&programs, folder.path(), port, &etcd.endpoint());
        let mut command = Command::new(programs.join("kube-controller-manager"));
        command
            .arg("--kubeconfig")
            .arg(folder.path().join("kubeconfig"))
            .args(["--controllers=namespace-controller", "--leader-elect=false"])
            .args([
                "--bind-address=127.0.0.1",
                &format!("--secure-port={}", free_port()),
            ])
            .arg("--cert-dir")
            .arg(folder.path());
        let started = Self {
            controllers: Process::start(&mut Command::new("true"), &folder.path().join("none.log")),
            server,
            etcd,
            folder,
            programs,
            port,
        };
        let mut started = started;
        started.ready().await;
        started.controllers =
            Process::start(&mut command, &started.folder.path().join("controllers.log"));
        started
    }

    async fn ready(&mut self) {
        let limit = Instant::now() + START;
        loop {
            self.server.check();
            let client = self.client().await;
            let request = Request::new("")
                .get("readyz", &GetParams::default())
                .expect("a request");
            let answer =
                tokio::time::timeout(Duration::from_secs(5), client.request_text(request)).await;
            if matches!(&answer, Ok(Ok(text)) if text == "ok") {
                return;
            }
            assert!(
                Instant::now() < limit,
                "the API server is not ready: {answer:?}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Kills the API server.
    pub fn stop(&mut self) {
        self.server.kill();
    }

    /// Kills the API server if it runs, starts it again, and waits until it is ready.
    pub async fn restart(&mut self) {
        self.server.kill();
        self.server = launch(
            &self.programs,
            self.folder.path(),
            self.port,
            &self.etcd.endpoint(),
        );
        self.ready().await;
    }

    /// The etcd below.
    pub fn etcd(&mut self) -> &mut Etcd {
        &mut self.etcd
    }

    /// The port of loopback that it serves.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What the audited users have asked for since the start, or since this was called last.
    pub fn asked(&mut self) -> Vec<Asked> {
        audit::take(self.folder.path())
    }

    /// A kubeconfig of a user who may do everything.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// Settings of a datastore.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            kubeconfig: Some(self.kubeconfig()),
            ..Settings::default()
        }
    }

    /// `kubectl` of the same version, for this server.
    #[must_use]
    pub fn kubectl(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(words);
        command
    }

    /// What `kubectl` says when it is given this input, on both streams; as an error if it failed.
    ///
    /// # Errors
    /// What `kubectl` said.
    ///
    /// # Panics
    /// If it cannot be run.
    pub fn kubectl_says(&self, words: &[&str], input: &str) -> Result<String, String> {
        told(&mut self.kubectl(words), input)
    }

    /// A kubeconfig of a service account of `kube-system`, written into this folder, with a token as a kubelet hands it to this
    /// pod; bound to none without one.
    ///
    /// # Panics
    /// If the API server gives no token.
    pub fn account(&self, account: &str, pod: Option<&str>, folder: &Path) -> PathBuf {
        let mut words = vec!["-n", "kube-system", "create", "token", account];
        if let Some(pod) = pod {
            words.extend(["--bound-object-kind", "Pod", "--bound-object-name", pod]);
        }
        let token = self.kubectl_says(&words, "").expect("a token");
        let admin = std::fs::read(self.kubeconfig()).expect("the kubeconfig");
        let mut config: Value = serde_json::from_slice(&admin).expect("JSON");
        config["users"][0]["user"] = json!({ "token": token.trim() });
        let name = format!("{account}-{}", pod.unwrap_or("unbound"));
        write(folder, &name, &config.to_string())
    }

    /// A client of its own.
    ///
    /// # Panics
    /// If the kubeconfig cannot be used.
    pub async fn client(&self) -> Client {
        self.settings().connect().await.expect("a client")
    }

    /// A client of another user.
    ///
    /// # Panics
    /// If the kubeconfig cannot be used.
    pub async fn client_of(&self, kubeconfig: PathBuf) -> Client {
        let settings = Settings {
            kubeconfig: Some(kubeconfig),
            ..Settings::default()
        };
        settings.connect().await.expect("a client")
    }

    /// Applies manifests (a file with several documents of any kind) server-side, as JSON values.
    ///
    /// # Panics
    /// With the server's words, if one is refused.
    pub async fn define(&self, definitions: &[Value]) {
        let client = self.client().await;
        let at = || Request::new("/apis/apiextensions.k8s.io/v1/customresourcedefinitions");
        for definition in definitions {
            let name = definition["metadata"]["name"].as_str().expect("a name");
            let parameters = PatchParams::apply("cali-test").force();
            let request = at()
                .patch(name, &parameters, &Patch::Apply(definition))
                .expect("a request");
            if let Err(error) = client.request::<Value>(request).await {
                panic!("{name}: {error}");
            }
        }
        let limit = Instant::now() + START;
        for definition in definitions {
            let name = definition["metadata"]["name"].as_str().expect("a name");
            let established = |object: &Value| {
                object["status"]["conditions"]
                    .as_array()
                    .is_some_and(|all| {
                        all.iter()
                            .any(|one| one["type"] == "Established" && one["status"] == "True")
                    })
            };
            loop {
                let request = at().get(name, &GetParams::default()).expect("a request");
                let object: Value = client.request(request).await.expect("the definition");
                if established(&object) {
                    break;
                }
                assert!(
                    Instant::now() < limit,
                    "{name} is not served: {}",
                    object["status"]
                );
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Creates a namespace.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn namespace(&self, name: &str) {
        let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let request = Request::new("/api/v1/namespaces")
            .create(&PostParams::default(), body.to_string().into_bytes())
            .expect("a request");
        self.client()
            .await
            .request::<Value>(request)
            .await
            .expect("a namespace");
    }
}

fn launch(programs: &Path, folder: &Path, port: u16, etcd: &str) -> Process {
    let file = |name: &str| folder.join(name).display().to_string();
    let mut command = Command::new(programs.join("kube-apiserver"));
    command
        .arg(format!("--etcd-servers={etcd}"))
        .arg(format!("--secure-port={port}"))
        .args(["--bind-address=127.0.0.1", "--advertise-address=192.0.2.1"])
        .arg(format!("--tls-cert-file={}", file("server.crt")))
        .arg(format!("--tls-private-key-file={}", file("server.key")))
        .arg(format!("--cert-dir={}", folder.display()))
        .arg(format!("--token-auth-file={}", file("tokens.csv")))
        .arg(format!(
            "--service-account-key-file={}",
            file("accounts.pub")
        ))
        .arg(format!(
            "--service-account-signing-key-file={}",
            file("accounts.key")
        ))
        .args([
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/16",
        ])
        .args([
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",
            // As every distribution has it: node agents are privileged.
            "--allow-privileged=true",
        ])
        .arg("-v=0");
    audit::arguments(folder, &mut command);
    Process::start(&mut command, &folder.join("apiserver.log"))
}
