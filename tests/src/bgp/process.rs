//! Daemons as children of the test: started in a namespace, logged to a file, gone with the test.

use crate::bgp::segment::Host;
use anyhow::{Context, Result, bail};
use cali_netlink::command::{Bind, Isolation};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long a daemon may take to end when it is asked to.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Lines of a log that are shown when a daemon has ended.
const SHOWN: usize = 20;

/// How a daemon is started.
#[derive(Debug, Default)]
pub struct Launch {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    binds: Vec<Bind>,
}

impl Launch {
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            ..Self::default()
        }
    }

    pub fn arg(mut self, argument: impl ToString) -> Self {
        self.arguments.push(argument.to_string());
        self
    }

    pub fn args<T: ToString>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments
            .extend(arguments.into_iter().map(|argument| argument.to_string()));
        self
    }

    /// A path as an argument.
    pub fn path(self, path: impl AsRef<Path>) -> Self {
        self.arg(path.as_ref().display())
    }

    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.environment.push((name.to_owned(), value.to_string()));
        self
    }

    /// The daemon sees `source` where the system has `target`.
    pub fn bind(mut self, source: impl Into<PathBuf>, target: &str) -> Self {
        self.binds.push(Bind {
            source: source.into(),
            target: target.into(),
            read_only: true,
        });
        self
    }

    /// As a command in a namespace that ends with the thread that starts it.
    pub fn command(&self, host: &Host) -> Result<Command> {
        let isolation = Isolation {
            binds: self.binds.clone(),
            parent_death_signal: Some(Signal::SIGKILL as i32),
            ..Isolation::default()
        };
        let mut command = host
            .ns
            .netns()
            .isolated_command(&self.program, &isolation)?;
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        Ok(command)
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a daemon; what it prints is appended to `log`.
    pub fn start(name: &str, host: &Host, launch: &Launch, log: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let child = launch
            .command(host)?
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    /// An error with the end of the log if it does not run any more.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has ended ({status})\n{}", self.name, self.log_end());
        }
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Ends it in the middle of whatever it does, as a crash would.
    pub fn crash(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end and waits for that.
    pub fn terminate(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        crate::eventually(END_LIMIT, || match self.child.try_wait() {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(format!("{} still runs", self.name)),
            Err(error) => Err(error.to_string()),
        })
        .map_err(anyhow::Error::msg)?;
        Ok(())
    }

    fn log_end(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(SHOWN)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
