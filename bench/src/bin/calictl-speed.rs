//! How quick the command line is; see `docs/benchmarks.md`, section "The command line".
//!
//! `calictl-speed` measures the `calictl` beside it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cali_api::{AnyResource, Key, Kind};
use cali_bench::bgp::cost::{machine, of_process};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use clap::{Parser, Subcommand};
use serde_json::json;

/// How quick the command line is
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Workload endpoints in the datastore
    #[arg(long, default_value_t = 100_000)]
    endpoints: u32,
    /// How often each command is run; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How many changes are watched
    #[arg(long, default_value_t = 100)]
    changes: usize,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Writes endpoints into a new store
    #[command(hide = true)]
    Fill { file: PathBuf, count: u32 },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match &arguments.role {
        Some(Role::Fill { file, count }) => runtime.block_on(fill(file, *count)),
        None => runtime.block_on(measure(&arguments)),
    }
}

fn object(value: serde_json::Value) -> Result<AnyResource> {
    AnyResource::from_json(value).context("the benchmark's own object")
}

async fn fill(file: &Path, count: u32) -> Result<()> {
    let store = Sqlite::open(file)?;
    for number in 0..count {
        let (node, pod) = (format!("node-{}", number % 1000), format!("pod-{number}"));
        let address = std::net::Ipv4Addr::from(0x0a00_0000 + number);
        let endpoint = json!({
            "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
            "metadata": {
                "name": format!("{}-k8s-{}-eth0", node.replace('-', "--"), pod.replace('-', "--")),
                "namespace": format!("team-{}", number % 100),
                "labels": {
                    "app": format!("app-{}", number % 500), "projectcalico.org/orchestrator": "k8s",
                    "projectcalico.org/namespace": format!("team-{}", number % 100),
                    "projectcalico.org/serviceaccount": "default",
                },
            },
            "spec": {
                "orchestrator": "k8s", "node": node, "pod": pod, "endpoint": "eth0", "containerID": format!("{number:064x}"),
                "interfaceName": format!("cali{number:011x}"), "ipNetworks": [format!("{address}/32")],
                "profiles": [format!("kns.team-{}", number % 100), format!("ksa.team-{}.default", number % 100)],
                "serviceAccountName": "default",
            },
        });
        store.create(object(endpoint)?).await?;
    }
    let pool = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
        "metadata": {"name": "watched"}, "spec": {"cidr": "10.0.0.0/8"},
    });
    store.create(object(pool)?).await?;
    Ok(())
}

/// What a command cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    time: Duration,
    /// Octets, at most.
    memory: u64,
    output: u64,
}

/// The programs, and the store that they look at.
struct Bench {
    own: PathBuf,
    calictl: PathBuf,
    store: PathBuf,
}

impl Bench {
    fn once(&self, words: &[&str]) -> Result<Cost> {
        let start = Instant::now();
        let mut child = Command::new(&self.calictl)
            .args(words)
            .env_clear()
            .env("CALI_SQLITE_PATH", &self.store)
            .stdout(Stdio::piped())
            .spawn()?;
        let (mut output, mut bytes) = (child.stdout.take().context("no output")?, 0);
        let mut buffer = vec![0; 1 << 16];
        let mut peak = 0;
        loop {
            // What a process had most of is known until it ends: asked for with every piece of its output.
            peak = of_process(child.id()).peak.max(peak);
            match output.read(&mut buffer)? {
                0 => break,
                count => bytes += count as u64,
            }
        }
        let status = child.wait()?;
        let time = start.elapsed();
        ensure!(status.success(), "calictl {words:?}: {status}");
        Ok(Cost {
            time,
            memory: peak,
            output: bytes,
        })
    }

    /// The median by time, and the highest memory of all rounds.
    fn of(&self, rounds: usize, words: &[&str]) -> Result<Cost> {
        let mut all = (0..rounds.max(1))
            .map(|_| self.once(words))
            .collect::<Result<Vec<Cost>>>()?;
        all.sort_unstable();
        let highest = all.iter().map(|cost| cost.memory).max();
        Ok(Cost {
            memory: highest.unwrap_or_default(),
            ..all[all.len() / 2]
        })
    }

    /// From the moment at which a change is committed to the line that a watch in another process prints of it.
    async fn watched(&self, changes: usize) -> Result<Vec<Duration>> {
        let mut watch = Command::new(&self.calictl)
            .args(["get", "ippool", "--watch", "-o", "json"])
            .env_clear()
            .env("CALI_SQLITE_PATH", &self.store)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = watch.stdout.take().context("no output")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        let next = || lines.recv_timeout(Duration::from_secs(10));
        let seen = self.change_and_look(changes, next).await;
        watch.kill()?;
        watch.wait()?;
        seen
    }

    async fn change_and_look(
        &self,
        changes: usize,
        next: impl Fn() -> Result<(Instant, String), mpsc::RecvTimeoutError>,
    ) -> Result<Vec<Duration>> {
        next().context("the watch does not begin")?;
        let store = Sqlite::open(&self.store)?;
        let key = Key::cluster(Kind::IPPool, "watched");
        let mut all = Vec::with_capacity(changes);
        for number in 0..changes {
            // Not in step with anything that looks at the file at regular times.
            tokio::time::sleep(Duration::from_micros(7_300 + 977 * (number as u64 % 13))).await;
            let mut pool = store.get(&key).await?.object.as_ref().clone();
            let mark = format!("change-{number}");
            let labels = &mut pool.metadata_mut().labels;
            labels.insert("mark".into(), mark.as_str().into());
            store.update(pool).await?;
            let committed = Instant::now();
            loop {
                let (at, line) = next().context("a change is not shown")?;
                if line.contains(&format!("\"{mark}\"")) {
                    all.push(at.saturating_duration_since(committed));
                    break;
                }
            }
        }
        all.sort_unstable();
        Ok(all)
    }
}

fn row(what: &str, seen: &str, aim: &str) {
    println!("| {what} | {seen} | {aim} |");
}

async fn measure(arguments: &Arguments) -> Result<()> {
    let own = std::env::current_exe()?;
    // In memory where that can be had: to fill a store that reaches the disk with every object takes minutes.
    let shared = Path::new("/dev/shm");
    let folder = match shared.is_dir() {
        true => tempfile::tempdir_in(shared)?,
        false => tempfile::tempdir()?,
    };
    let bench = Bench {
        calictl: own.with_file_name("calictl"),
        store: folder.path().join("cali.db"),
        own,
    };
    let filled = Command::new(&bench.own)
        .arg("fill")
        .args([bench.store.as_path()])
        .arg(arguments.endpoints.to_string())
        .status()?;
    ensure!(filled.success(), "cannot fill {}", bench.store.display());
    println!("{}\n", machine());
    println!("| `calictl` | seen | aim |\n|---|---|---|");
    let version = bench.of(arguments.rounds * 10, &["version", "--client"])?;
    let seen = format!("{:.1} ms", version.time.as_secs_f64() * 1e3);
    row("`version --client`", &seen, "10 ms");
    for (format, aim) in [
        ("ps", "2 s, 150 MB"),
        ("wide", ""),
        ("custom-columns=NAME,NODE", ""),
        ("name", ""),
        ("json", ""),
        ("yaml", ""),
    ] {
        let words = ["get", "workloadendpoints", "-A", "-o", format];
        let cost = bench.of(arguments.rounds, &words)?;
        let seen = format!(
            "{:.2} s, {:.1} MB of memory at most, {:.1} MB of output",
            cost.time.as_secs_f64(),
            cost.memory as f64 / 1e6,
            cost.output as f64 / 1e6
        );
        let what = format!(
            "`get workloadendpoints -A -o {format}`, {} of them",
            arguments.endpoints
        );
        row(&what, &seen, aim);
    }
    let changes = bench.watched(arguments.changes).await?;
    let at = |share: f64| {
        let index = (changes.len() as f64 * share) as usize;
        changes.get(index.min(changes.len().saturating_sub(1)))
    };
    let [median, last] = [0.5, 1.0].map(|share| at(share).copied().unwrap_or_default());
    let seen = format!(
        "median {:.1} ms, last {:.1} ms",
        median.as_secs_f64() * 1e3,
        last.as_secs_f64() * 1e3
    );
    row(
        "`get --watch`: a change by another process is shown",
        &seen,
        "100 ms",
    );
    Ok(())
}
