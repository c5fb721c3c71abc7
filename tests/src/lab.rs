//! A lab for one test.

use anyhow::{Context, Result, bail, ensure};
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;
use tempfile::TempDir;

/// A running lab. Dropping it takes it down.
#[derive(Debug)]
pub struct Lab {
    name: String,
    root: TempDir,
}

/// Folder of the built programs: where this test's own executable was built.
pub fn programs() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.parent()
        .and_then(Path::parent)
        .map(Path::to_owned)
        .unwrap_or_default()
}

/// The repository.
pub fn repository() -> PathBuf {
    // What runs the test says where this crate lies: in a virtual machine that is not where it was built.
    let own = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    own.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into())
        .join("..")
}

/// What a script of the repository prints: the path of what it has found, or made.
///
/// # Panics
/// If it fails.
pub fn found_by(script: &str) -> PathBuf {
    let output = Command::new(repository().join("scripts").join(script)).output();
    let output = output.expect("the script");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/{script}: {said}");
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

/// One claim about a lab.
pub type Check = fn(&Lab) -> Result<()>;

impl Lab {
    /// Brings up a copy of a topology of `deploy/containerlab`, renamed so that it meets no other lab.
    pub fn up(topology: &str) -> Result<(Self, String)> {
        let source = repository().join("deploy/containerlab");
        let stem = topology.split('.').next().unwrap_or(topology);
        // Short: interface and namespace names carry it.
        let name = format!("t{}{stem}", std::process::id() % 100_000);
        let root = tempfile::tempdir().context("cannot make a folder")?;
        let text =
            std::fs::read_to_string(source.join(topology)).context("cannot read the topology")?;
        let text = text
            .replace(&format!("name: {stem}"), &format!("name: {name}"))
            .replace(
                &format!("/var/lib/cali-lab/{stem}/"),
                &format!("{}/", root.path().join(&name).display()),
            );
        let folder = root.path().join("topology");
        std::fs::create_dir_all(&folder)?;
        copy_tree(&source.join(stem), &folder.join(stem))?;
        std::fs::write(folder.join(topology), text)?;
        let lab = Self { name, root };
        let output = lab
            .calictl(&["lab", "up", &folder.join(topology).display().to_string()])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "lab up failed\n{text}{}{}",
            String::from_utf8_lossy(&output.stderr),
            lab.logs()
        );
        Ok((lab, text))
    }

    /// `calictl` with this lab's folder and datastore.
    pub fn calictl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(programs().join("calictl"));
        command
            .args(args)
            .env("CALI_LAB_DIR", self.root.path())
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", self.folder().join("datastore/cali.db"))
            .env("NO_COLOR", "1");
        command
    }

    /// Where the lab keeps its files.
    pub fn folder(&self) -> PathBuf {
        self.root.path().join(&self.name)
    }

    /// The network namespace of a node, or of a pod as `namespace/name`.
    pub fn netns(&self, target: &str) -> String {
        format!("{}_{}", self.name, target.replace('/', "_"))
    }

    /// A command in a node or pod, not yet started.
    pub fn command(&self, target: &str, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.netns(target)])
            .args(words);
        command
    }

    /// Runs a command in a node or pod and returns what it printed.
    pub fn exec(&self, target: &str, words: &[&str]) -> Result<String> {
        let output = self
            .command(target, words)
            .output()
            .with_context(|| format!("cannot run {words:?}"))?;
        checked(output, || format!("{target}: {}", words.join(" ")))
    }

    /// Starts a command in a node or pod.
    pub fn spawn(&self, target: &str, words: &[&str]) -> Result<Child> {
        let mut command = self.command(target, words);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
            .spawn()
            .with_context(|| format!("cannot start {words:?}"))
    }

    /// Applies a manifest as a user does.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let file = self.root.path().join("apply.yaml");
        std::fs::write(&file, manifest)?;
        let output = self
            .calictl(&["apply", "-f", &file.display().to_string()])
            .output()?;
        checked(output, || format!("calictl apply\n{manifest}"))
    }

    /// First address of a pod.
    pub fn pod_address(&self, pod: &str) -> Result<String> {
        let addresses = self.pod_addresses(pod)?;
        let first = addresses.first();
        Ok(first
            .with_context(|| format!("pod {pod} has no address"))?
            .to_string())
    }

    /// The IPv6 address of a pod.
    pub fn pod_address_v6(&self, pod: &str) -> Result<Ipv6Addr> {
        let addresses = self.pod_addresses(pod)?;
        let v6 = addresses.iter().find_map(|address| match address {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        });
        v6.with_context(|| format!("pod {pod} has no IPv6 address among {addresses:?}"))
    }

    /// What the CNI plugin gave the pod.
    fn pod_addresses(&self, pod: &str) -> Result<Vec<IpAddr>> {
        let file = self
            .folder()
            .join("pods")
            .join(format!("{}.json", pod.replace('/', "_")));
        let record: serde_json::Value = serde_json::from_slice(
            &std::fs::read(&file).with_context(|| format!("no pod {pod}"))?,
        )?;
        serde_json::from_value(record["addresses"].clone())
            .with_context(|| format!("the record of pod {pod} has no addresses"))
    }

    /// Process ids of the lab's programs by name (`node1/cali-node`), as the supervisor knows them.
    pub fn pid(&self, process: &str) -> Result<i32> {
        let file = self.folder().join("running.json");
        let running: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        let pid = running["pids"][process]["pid"]
            .as_i64()
            .with_context(|| format!("{process} does not run"))?;
        Ok(i32::try_from(pid)?)
    }

    /// Process ids of all programs with this executable name in a node's namespace.
    pub fn pids_in(&self, target: &str, executable: &str) -> Result<Vec<i32>> {
        let output = Command::new("ip")
            .args(["netns", "pids", &self.netns(target)])
            .output()?;
        let pids = checked(output, || format!("ip netns pids {target}"))?;
        let named = |pid: &i32| {
            std::fs::read_link(format!("/proc/{pid}/exe"))
                .is_ok_and(|exe| exe.file_name().is_some_and(|name| name == executable))
        };
        Ok(pids
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .filter(named)
            .collect())
    }

    /// Makes all checks, one after another, and reports every one that fails, not only the first.
    pub fn check_all(&self, checks: &[(&str, Check)]) {
        let mut failures = Vec::new();
        for (name, check) in checks {
            let start = Instant::now();
            match check(self) {
                Ok(()) => println!("ok   {name} ({:.1} s)", start.elapsed().as_secs_f32()),
                Err(error) => {
                    println!("FAIL {name}: {error:#}");
                    failures.push(format!("{name}: {error:#}"));
                }
            }
        }
        assert!(
            failures.is_empty(),
            "{}\n{}",
            failures.join("\n"),
            self.logs()
        );
    }

    /// Measures all connections between pods; they must be this many in each family, all as the policies say.
    pub fn show(&self, connections: usize) -> Result<String> {
        let output = self
            .calictl(&["lab", "show", "--lab", &self.name])
            .output()?;
        let text = checked(output, || "lab show".to_owned())?;
        ensure!(
            text.contains(&format!(
                "{connections} of {connections} connections are as the policies say"
            )),
            "{text}"
        );
        Ok(text)
    }

    /// The end of every log, for a failed test.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let nodes = std::fs::read_dir(self.folder())
            .into_iter()
            .flatten()
            .flatten();
        for log in nodes.flat_map(|node| {
            std::fs::read_dir(node.path().join("log"))
                .into_iter()
                .flatten()
                .flatten()
        }) {
            let content = std::fs::read_to_string(log.path()).unwrap_or_default();
            let lines: Vec<&str> = content.lines().collect();
            text.push_str(&format!(
                "\n== {}\n{}\n",
                log.path().display(),
                lines[lines.len().saturating_sub(15)..].join("\n")
            ));
        }
        text
    }

    /// One log, whole.
    pub fn log(&self, node: &str, program: &str) -> String {
        let file = self
            .folder()
            .join(node)
            .join("log")
            .join(format!("{program}.log"));
        std::fs::read_to_string(file).unwrap_or_default()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let ended = self.calictl(&["lab", "down", &self.name]).output();
        if !ended.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("the lab {} could not be taken down: {ended:?}", self.name);
        }
    }
}

/// Standard output of a command that succeeded.
pub fn checked(output: Output, what: impl FnOnce() -> String) -> Result<String> {
    if !output.status.success() {
        bail!(
            "{}: {}\n{}{}",
            what(),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in
        std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?
    {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &to.join(entry.file_name()))?;
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
