//! The server's process: it takes commands by line and makes the changes that they ask for.

use std::io::Write;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cali_api::update::{SyncEvent, SyncStatus};
use tokio::sync::mpsc;
use typha::server::{Server, ServerConfig};

use super::Cluster;
use crate::bgp::cost::{Cost, of_process};

/// This program again, in another role. Dropping it ends it.
#[derive(Debug)]
pub struct Child {
    child: std::process::Child,
    input: ChildStdin,
    output: std::io::BufReader<ChildStdout>,
}

impl Child {
    /// Starts it.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(arguments: &[String]) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("no stdin")?;
        let output = child.stdout.take().context("no stdout")?;
        Ok(Self {
            child,
            input,
            output: std::io::BufReader::new(output),
        })
    }

    /// The next line that it says.
    ///
    /// # Errors
    /// It has ended.
    pub fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut self.output, &mut line)?;
        ensure!(!line.is_empty(), "the process has ended");
        Ok(line.trim().to_owned())
    }

    /// Says a line to it.
    ///
    /// # Errors
    /// It has ended.
    pub fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}")?;
        Ok(self.input.flush()?)
    }

    /// What it costs so far.
    #[must_use]
    pub fn cost(&self) -> Cost {
        of_process(self.child.id())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // An error means that it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server in a process of its own.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Where it listens.
    pub port: u16,
}

impl Process {
    /// Starts this program again as a server of the cluster, and waits until it has all objects.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(cluster: Cluster) -> Result<Self> {
        let numbers = [cluster.pods, cluster.nodes, cluster.policies].map(|n| n.to_string());
        let mut arguments = vec!["serve".to_owned()];
        arguments.extend(numbers);
        if cluster.namespaced {
            arguments.push("--namespaced".to_owned());
        }
        let mut child = Child::start(&arguments)?;
        let port = child.answer()?.parse()?;
        Ok(Self { child, port })
    }

    /// Changes one pod after the other, this many in a second, and does not wait for it.
    ///
    /// # Errors
    /// The process has ended.
    pub fn change(&mut self, count: u32, per_second: u32) -> Result<()> {
        self.child.say(&format!("{count} {per_second}"))
    }

    /// Waits until the changes that were asked for last have been made.
    ///
    /// # Errors
    /// The process has ended.
    pub fn done(&mut self) -> Result<()> {
        self.child.answer().map(drop)
    }

    /// What it costs so far.
    #[must_use]
    pub fn cost(&self) -> Cost {
        self.child.cost()
    }
}

/// The process' main function.
///
/// # Errors
/// It cannot listen.
pub async fn serve(cluster: Cluster) -> Result<()> {
    let server = Server::bind(ServerConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        ..ServerConfig::default()
    })?;
    let port = server.local_addr()?.port();
    let (source, events) = mpsc::channel(64);
    let running = tokio::spawn(server.run(events, std::future::pending()));
    let mut piece = Vec::new();
    for object in cluster.objects() {
        piece.push(object);
        if piece.len() == 1000 {
            let full = std::mem::take(&mut piece);
            source.send(SyncEvent::Updates(full)).await?;
        }
    }
    source.send(SyncEvent::Updates(piece)).await?;
    source.send(SyncEvent::Status(SyncStatus::InSync)).await?;
    println!("{port}");
    let (lines, mut commands) = mpsc::channel(4);
    tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let mut changes = 0u32;
    while let Some(command) = commands.recv().await {
        let (count, rate) = command.split_once(' ').context("two numbers")?;
        let (count, rate): (u32, u32) = (count.parse()?, rate.parse()?);
        let mut tick = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
        for _ in 0..count {
            tick.tick().await;
            changes += 1;
            // Steps through the pods so that neighbours do not follow each other.
            let pod = changes.wrapping_mul(7919) % cluster.pods;
            let change = cluster.pod(pod, u64::from(changes) + 1);
            source.send(SyncEvent::Updates(vec![change])).await?;
        }
        println!("done");
    }
    running.abort();
    Ok(())
}
