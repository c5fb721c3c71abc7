//! The daemons that are compared: how each is configured and started, and how it is ended.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use cali_netlink::NetNs;
use cali_netlink::command::{Bind, Isolation};

use super::cost;
use super::shape::{Course, Shape};
use super::templates;

/// A daemon that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Cali,
    /// BIRD 2 and 3.
    Bird {
        /// Version 3 is told to use both processors.
        threads: bool,
    },
    /// FRRouting's `bgpd`, without zebra.
    Frr,
    /// GoBGP.
    GoBgp,
    /// OpenBGPD.
    OpenBgpd,
}

/// One competitor: its name, what it is, and its folder in the cache of `scripts/peers`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Competitor {
    /// As in the table and on the command line.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
}

/// Everybody, ours first.
pub const ALL: [Competitor; 8] = [
    competitor("cali", Kind::Cali),
    competitor("bird2", Kind::Bird { threads: false }),
    competitor("bird217", Kind::Bird { threads: false }),
    competitor("bird3", Kind::Bird { threads: true }),
    competitor("frr", Kind::Frr),
    competitor("frr10", Kind::Frr),
    competitor("openbgpd", Kind::OpenBgpd),
    competitor("gobgp3", Kind::GoBgp),
];

const fn competitor(name: &'static str, kind: Kind) -> Competitor {
    Competitor { name, kind }
}

/// Where `scripts/peers` unpacks.
fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    base.or_else(home).unwrap_or_default().join("cali/peers")
}

/// Our own program: beside this one.
fn own() -> Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("bgpd");
    ensure!(
        beside.exists(),
        "{} is not there: build bgpd first",
        beside.display()
    );
    Ok(beside)
}

/// A running daemon; ended with everything in its namespace when dropped.
pub struct Daemon {
    child: Child,
    namespace: NetNs,
    folder: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        use nix::sys::signal::{Signal, kill};
        use nix::unistd::Pid;
        for pid in cost::processes(&self.namespace).unwrap_or_default() {
            if let Ok(pid) = i32::try_from(pid) {
                // One that has just ended by itself is no fault.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let _ = self.child.wait();
    }
}

impl Competitor {
    /// Whether it can be run here.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.kind == Kind::Cali || self.root().join("run").exists()
    }

    fn root(&self) -> PathBuf {
        cache().join(self.name)
    }

    /// Whether it takes part. FRR writes into the kernel through another daemon, and GoBGP not at all; GoBGP would need minutes for
    /// the variants of the fan-in, which shows once.
    #[must_use]
    pub fn takes_part(&self, shape: &Shape) -> bool {
        match self.kind {
            Kind::Frr => shape.course != Course::Kernel,
            Kind::GoBgp => {
                let plain = matches!(shape.course, Course::Sessions | Course::Withdraw);
                plain && !shape.layout.is_v6()
            }
            Kind::Cali | Kind::Bird { .. } | Kind::OpenBgpd => true,
        }
    }

    /// Starts it in a namespace, configured for a load.
    pub fn start(&self, shape: &Shape, namespace: &NetNs) -> Result<Daemon> {
        let folder = tempfile::tempdir()?;
        let at = folder.path();
        let mut isolation = Isolation {
            parent_death_signal: Some(nix::sys::signal::Signal::SIGKILL as i32),
            ..Isolation::default()
        };
        let run = at.join("run");
        fs::create_dir(&run)?;
        isolation.binds.push(bind(&run, "/run"));
        let config = at.join("config");
        let (text, program, arguments) = match self.kind {
            Kind::Cali => {
                let arguments = format!("--config {}", config.display());
                (templates::cali(shape), own()?, arguments)
            }
            Kind::Bird { threads } => {
                let arguments = format!(
                    "usr/sbin/bird -f -c {} -s {}/s",
                    config.display(),
                    at.display()
                );
                (
                    templates::bird(shape, threads),
                    self.root().join("run"),
                    arguments,
                )
            }
            Kind::Frr => {
                isolation
                    .binds
                    .push(accounts(at, "group", "frrvty:x:9998:root\nfrr:x:9997:\n")?);
                fs::create_dir(run.join("frr"))?;
                let arguments = format!(
                    "usr/lib/frr/bgpd -Z -S -f {} -i /run/frr/bgpd.pid --vty_socket /run/frr -P 0 -u root -g root",
                    config.display()
                );
                (templates::frr(shape), self.root().join("run"), arguments)
            }
            Kind::GoBgp => {
                let arguments = format!(
                    "usr/bin/gobgpd -f {} --api-hosts 127.0.0.1:50051 --pprof-disable -l error",
                    config.display()
                );
                (templates::gobgp(shape), self.root().join("run"), arguments)
            }
            Kind::OpenBgpd => {
                // It starts itself again for its two other processes, past the loader that `run` calls: its
                // libraries must be where the system's are.
                let libraries = self.root().join("usr/lib/x86_64-linux-gnu");
                isolation
                    .binds
                    .push(bind(&libraries, "/usr/lib/x86_64-linux-gnu"));
                let user = format!("_openbgpd:x:9996:9996::{}/empty:/bin/false\n", at.display());
                fs::create_dir(at.join("empty"))?;
                fs::set_permissions(at, fs::Permissions::from_mode(0o755))?;
                isolation.binds.push(accounts(at, "passwd", &user)?);
                isolation
                    .binds
                    .push(accounts(at, "group", "_openbgpd:x:9996:\n")?);
                let text = templates::openbgpd(shape, &format!("{}/s", at.display()));
                (
                    text,
                    self.root().join("usr/sbin/bgpd"),
                    format!("-d -f {}", config.display()),
                )
            }
        };
        fs::write(&config, text)?;
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
        let mut command = namespace.isolated_command(&program, &isolation)?;
        let log = File::create(at.join("log"))?;
        let child = self
            .surround(&mut command, &run)
            .args(arguments.split(' '))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Daemon {
            child,
            namespace: namespace.clone(),
            folder,
        })
    }

    fn surround<'a>(&self, command: &'a mut Command, run: &Path) -> &'a mut Command {
        if self.kind == Kind::Cali {
            command.env("CALI_RUN_DIR", run).env("CALI_LOG", "warn");
        }
        command.env("GOMAXPROCS", "2")
    }
}

impl Daemon {
    /// The end of what it said, for a run that failed.
    #[must_use]
    pub fn last_words(&self) -> String {
        let log = fs::read(self.folder.path().join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }
}

fn bind(source: &Path, target: &str) -> Bind {
    Bind {
        source: source.to_path_buf(),
        target: target.into(),
        read_only: false,
    }
}

/// The host's accounts with more of them, in place of a file in `/etc`.
fn accounts(folder: &Path, name: &str, more: &str) -> Result<Bind> {
    let target = format!("/etc/{name}");
    let path = folder.join(name);
    fs::copy(&target, &path).with_context(|| format!("cannot copy {target}"))?;
    fs::OpenOptions::new()
        .append(true)
        .open(&path)?
        .write_all(more.as_bytes())?;
    Ok(bind(&path, &target))
}
