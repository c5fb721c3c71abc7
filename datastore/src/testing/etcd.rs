//! A real etcd: `KUBEBUILDER_ASSETS`, or Debian's, unpacked by `scripts/peers`.

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use super::process::{Process, cache, free_port, script};

/// PEM files for a server that asks its clients for certificates.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The server's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// One member on loopback with its data in a temporary folder.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    folder: tempfile::TempDir,
    port: u16,
    peer_port: u16,
    tls: Option<Tls>,
}

impl Etcd {
    /// Starts an empty etcd and waits until it takes connections.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// As [`Etcd::start`], serving TLS.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_with(tls: Option<Tls>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (port, peer_port) = (free_port(), free_port());
        let process = launch(folder.path(), port, peer_port, tls.as_ref());
        Self {
            process,
            folder,
            port,
            peer_port,
            tls,
        }
    }

    /// Its address, as `ETCD_ENDPOINTS` takes it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Kills it and starts it again with the same data.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = launch(
            self.folder.path(),
            self.port,
            self.peer_port,
            self.tls.as_ref(),
        );
    }

    /// Forgets all changes before now: who has not seen them must list again.
    ///
    /// # Panics
    /// If it does not answer.
    pub async fn compact(&self) {
        let endpoints = [self.endpoint()];
        let mut client = etcd_client::Client::connect(endpoints, None)
            .await
            .expect("etcd answers");
        let answer = client.get("/", None).await.expect("etcd answers");
        let revision = answer
            .header()
            .map_or(0, etcd_client::ResponseHeader::revision);
        client.compact(revision, None).await.expect("etcd compacts");
    }

    /// Kills it, until [`Etcd::restart`].
    pub fn stop(&mut self) {
        self.process.kill();
    }
}

fn program() -> Command {
    let assets =
        std::env::var_os("KUBEBUILDER_ASSETS").map(|folder| PathBuf::from(folder).join("etcd"));
    if let Some(etcd) = assets.filter(|etcd| etcd.exists()) {
        return Command::new(etcd);
    }
    let folder = cache().join("peers/etcd");
    if !folder.join("run").exists() {
        script(&["peers", "etcd"]);
    }
    let mut command = Command::new(folder.join("run"));
    command.arg("usr/bin/etcd");
    command
}

fn launch(folder: &std::path::Path, port: u16, peer_port: u16, tls: Option<&Tls>) -> Process {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let client = format!("{scheme}://127.0.0.1:{port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let mut command = program();
    command
        .arg("--data-dir")
        .arg(folder.join("data"))
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(["--log-level", "warn", "--unsafe-no-fsync"])
        .args(["--experimental-watch-progress-notify-interval", "1s"]);
    if let Some(tls) = tls {
        command
            .arg("--client-cert-auth")
            .arg("--trusted-ca-file")
            .arg(&tls.ca)
            .arg("--cert-file")
            .arg(&tls.certificate)
            .arg("--key-file")
            .arg(&tls.key);
    }
    let mut process = Process::start(&mut command, &folder.join("etcd.log"));
    process.wait(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
    process
}
