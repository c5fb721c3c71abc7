//! Containers of our image as a kubelet and a container runtime start them, with Debian's `runc`: [`image`] is what `scripts/image` makes,
//! [`specification`] (pure) turns a pod of the manifests into what `runc` is told, [`seccomp`] is the runtime's default profile.
//!
//! A pod here has the host's network, which is a namespace of the test, and no sandbox: all pods of the manifests are such. Paths of
//! the host lie in a folder of the test, but for `/proc` and `/run/netns`, which are the kernel's.

pub mod image;
pub mod seccomp;
pub mod specification;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use cali_netlink::NetNs;
use cali_netlink::testing::TestNs;
use serde_json::Value;

use crate::bgp::package;
use crate::lab::checked;
use image::Image;
use specification::{Pod, World};

/// How long a probe waits for its answer.
const TO_ANSWER: Duration = Duration::from_secs(5);

/// A node's container runtime.
#[derive(Debug)]
pub struct Runtime {
    image: Image,
    runc: PathBuf,
    seccomp: Value,
    folder: tempfile::TempDir,
}

/// A container that runs, and ends with this.
#[derive(Debug)]
pub struct Container {
    id: String,
    runc: PathBuf,
    state: PathBuf,
    child: Child,
    log: PathBuf,
    host: NetNs,
    readiness: Option<(u16, String)>,
}

impl Runtime {
    /// With the image of the built programs, or a variant of it.
    ///
    /// # Panics
    /// If the image cannot be made, or `runc` not be unpacked.
    #[must_use]
    pub fn new(variant: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let image = Image::make(folder.path(), variant);
        let package = package::folder("runc").expect("runc");
        let profile = package.join("usr/share/containers/seccomp.json");
        let profile = std::fs::read(profile).expect("the default profile of containers");
        Self {
            image,
            runc: package.join("usr/sbin/runc"),
            seccomp: serde_json::from_slice(&profile).expect("JSON"),
            folder,
        }
    }

    /// Where the host's files are.
    #[must_use]
    pub fn host_root(&self) -> PathBuf {
        self.folder.path().join("host")
    }

    /// Starts the only container of a pod, under a name that no other has had.
    ///
    /// # Panics
    /// If the pod says something that this does not know, or `runc` cannot be started.
    #[must_use]
    pub fn start(&self, id: &str, host: &TestNs, pod: &Pod<'_>) -> Container {
        let world = World {
            image: &self.image,
            host_root: &self.host_root(),
            network: &Path::new("/run/netns").join(host.name()),
            seccomp: &self.seccomp,
        };
        let specification = specification::specification(pod, &world);
        let specification = specification.unwrap_or_else(|error| panic!("{id}: {error}"));
        for needed in &specification.host_paths {
            needed
                .make()
                .unwrap_or_else(|error| panic!("{id}: {error}"));
        }
        let bundle = self.folder.path().join(id);
        std::fs::create_dir(&bundle).expect("a folder for the container");
        let config = specification.config.to_string();
        std::fs::write(bundle.join("config.json"), config).expect("a file");
        let (log, state) = (bundle.join("log"), self.folder.path().join("runc"));
        let output = File::create(&log).expect("a log");
        let child = Command::new(&self.runc)
            .arg("--root")
            .arg(&state)
            .args(["run", "--bundle"])
            .args([bundle.as_os_str(), id.as_ref()])
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a log"))
            .stderr(output)
            .spawn()
            .expect("start runc");
        Container {
            id: id.to_owned(),
            runc: self.runc.clone(),
            state,
            child,
            log,
            host: host.netns().clone(),
            readiness: specification.readiness,
        }
    }
}

impl Container {
    fn runc(&self, words: &[&str]) -> std::io::Result<std::process::Output> {
        let mut command = Command::new(&self.runc);
        command.arg("--root").arg(&self.state).args(words).output()
    }

    /// What it has said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How it has ended, if it has.
    ///
    /// # Panics
    /// If that cannot be asked.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("the state of a child")
    }

    /// What its readiness probe answers: whether it is ready, and why not.
    ///
    /// # Errors
    /// The answer, if it is not 200.
    ///
    /// # Panics
    /// If the manifest has no such probe.
    pub fn ready(&self) -> Result<(), String> {
        let (port, path) = self.readiness.clone().expect("a readiness probe");
        let asked = self.host.run(move || {
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let mut stream = TcpStream::connect_timeout(&to, TO_ANSWER)?;
            stream.set_read_timeout(Some(TO_ANSWER))?;
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok::<_, std::io::Error>(text)
        });
        match asked {
            Ok(Ok(text)) if text.split(' ').nth(1) == Some("200") => Ok(()),
            Ok(Ok(text)) => Err(text),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What the kernel says of its first process: `/proc/PID/status`, by name.
    ///
    /// # Panics
    /// If it does not run.
    #[must_use]
    pub fn status(&self) -> BTreeMap<String, String> {
        let state = self.runc(&["state", &self.id]).expect("start runc");
        let state = checked(state, || "runc state".to_owned()).expect("the state of a container");
        let state: Value = serde_json::from_str(&state).expect("JSON");
        let text = std::fs::read_to_string(format!("/proc/{}/status", state["pid"]));
        let text = text.expect("the status of a process");
        let line = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), value.trim().to_owned()))
        };
        text.lines().filter_map(line).collect()
    }

    /// What a program of the image says, started in the container as `kubectl exec` does.
    ///
    /// # Errors
    /// What it said, if it failed.
    pub fn exec(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = self.runc(&[&["exec", &self.id], words].concat())?;
        checked(output, || format!("{words:?}"))
    }

    /// Ends it with `SIGKILL`.
    pub fn kill(&mut self) {
        // Where it has ended by itself there is nothing to delete.
        let _ = self.runc(&["delete", "--force", &self.id]);
        let _ = self.child.wait();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.kill();
    }
}
