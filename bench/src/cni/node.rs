//! The node: this program, started again in the namespace of the host, with the daemon over a [`Counted`] store.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cali_netlink::{NetNs, Netlink};
use cali_node::startup::settings::{HostNames, Settings};
use tokio::sync::mpsc;
use typha::config::Env;

use super::NODE;
use super::counted::Counted;

/// The node's process. Dropping it ends it.
#[derive(Debug)]
pub struct Node {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Node {
    /// Starts it in this namespace, with its folders and its store in `folder`. `reserve`: addresses that it keeps ready, as
    /// many as usual where it does not say.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(host: &NetNs, folder: &Path, reserve: Option<usize>) -> Result<Self> {
        let mut command = host.command(std::env::current_exe()?);
        command
            .arg("node")
            .env("CALI_RUN_DIR", folder.join("run"))
            .env("CALI_STATE_DIR", folder.join("lib"))
            .env("CALI_SQLITE_PATH", folder.join("cali.db"))
            .env("NODENAME", NODE)
            .env("CALI_CNI_INSTALL", "false")
            .env("NO_DEFAULT_POOLS", "true")
            .env("CALICO_NETWORKING_BACKEND", "none")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(folder.join("log"))?);
        if let Some(reserve) = reserve {
            command.env("CALI_ADDRESS_RESERVE", reserve.to_string());
        }
        let mut child = command.spawn()?;
        let input = child.stdin.take().context("no stdin")?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    fn ask(&mut self, word: &str) -> Result<BTreeMap<String, u64>> {
        writeln!(self.input, "{word}")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the node's process has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Makes every request of the datastore wait, or lets them go. Returns the answers so far.
    ///
    /// # Errors
    /// The process has ended.
    pub fn hold(&mut self, held: bool) -> Result<BTreeMap<String, u64>> {
        self.ask(if held { "hold" } else { "go" })
    }

    /// Answers of the datastore so far, once there have been no more for a second.
    ///
    /// # Errors
    /// The process has ended.
    pub fn settled(&mut self) -> Result<BTreeMap<String, u64>> {
        loop {
            let before = self.ask("count")?;
            std::thread::sleep(Duration::from_secs(1));
            let after = self.ask("count")?;
            if before == after {
                return Ok(after);
            }
        }
    }
}

/// The node's process. It ends with its standard input.
///
/// # Errors
/// The daemon's.
pub fn serve() -> Result<()> {
    let filter = format!("info,{}=debug", cali_cni::server::stages::TARGET);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let names = HostNames {
            remembered: None,
            hostname: NODE.to_owned(),
        };
        let state = cali_control::paths::state_dir();
        let settings = Settings::read(&Env::of_process(), &names, &state)?;
        let counted = Counted::new(cali_datastore::open_from_env()?);
        let (ended, mut end) = mpsc::channel::<()>(1);
        let store = counted.clone();
        std::thread::spawn(move || {
            for word in std::io::stdin().lines().map_while(Result::ok) {
                match word.as_str() {
                    "hold" => store.hold(true),
                    "go" => store.hold(false),
                    _ => {}
                }
                match serde_json::to_string(&store.answered()) {
                    Ok(line) => println!("{line}"),
                    Err(_) => break,
                }
            }
            drop(ended);
        });
        let stop = async move {
            end.recv().await;
        };
        cali_node::daemon::run(settings, counted, Netlink::current()?, stop).await?;
        Ok(())
    })
}
