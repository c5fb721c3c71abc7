//! Many simulated nodes take and give back addresses of one cluster, each in a process of its own that is killed again and again,
//! beside garbage collection. Who has which address is written down outside of them.
//!
//! A node is this test's own program, started once more ([`serve`]): it has the reserve and the journal of a real node. It is told
//! `add HANDLE` and `del HANDLE`, and answers. What it was killed over it is told again, as a container runtime does.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command as StdCommand, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cali_api::{AnyResource, Key, Kind};
use cali_controllers::check::check;
use cali_controllers::gc::{self, Collector, Rules};
use cali_datastore::Datastore;
use cali_ipam::reserve::{Ask, Keeper, Settings};
use cali_ipam::{Allocator, Owner, names};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::lab::programs;

const NODE: &str = "CALI_SOAK_NODE";
const JOURNAL: &str = "CALI_SOAK_JOURNAL";
/// Before each answer, so that the lines of the test's own output are told apart.
const MARK: &str = "@@";
/// Orders that a node works on at a time.
const WINDOW: usize = 8;
/// A node lives so long, at least and at most.
const LIFE: (u64, u64) = (300, 2500);
/// Something is wrong if a node has nothing to say for so long.
const SILENCE: Duration = Duration::from_secs(120);

/// How much is done.
#[derive(Debug, Clone)]
pub struct Size {
    /// Simulated nodes.
    pub nodes: usize,
    /// Addresses that are taken in all.
    pub allocations: usize,
    /// Addresses that a node has at most, beside its reserve.
    pub pods: usize,
    /// The pool.
    pub pool: &'static str,
}

impl Size {
    /// Some seconds; `SOAK=1` in the environment: the whole of it.
    #[must_use]
    pub fn of_env() -> Self {
        if std::env::var_os("SOAK").is_some() {
            Self {
                nodes: 20,
                allocations: 50_000,
                pods: 24,
                pool: "10.64.0.0/22",
            }
        } else {
            Self {
                nodes: 5,
                allocations: 500,
                pods: 10,
                pool: "10.64.0.0/25",
            }
        }
    }
}

/// A cluster's datastore, and how a process opens it.
pub struct Cluster {
    /// Opened here.
    pub store: Arc<dyn Datastore>,
    /// What a process needs in its environment.
    pub env: Vec<(String, String)>,
    /// For journals.
    pub folder: PathBuf,
}

/// A small generator of numbers (xorshift64*).
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit.max(1)
    }
}

/// Who was told that which address is his.
#[derive(Debug, Default)]
struct Ledger {
    owners: Mutex<HashMap<IpAddr, String>>,
    kills: AtomicUsize,
    refusals: AtomicUsize,
    added: AtomicUsize,
}

impl Ledger {
    fn owners(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, String>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, address: IpAddr, handle: &str) -> Result<()> {
        match self.owners().insert(address, handle.to_owned()) {
            Some(other) if other != handle => {
                bail!("{address} has two owners: {other} and {handle}")
            }
            _ => Ok(()),
        }
    }
}

/// The body of the test that is a node when its environment says so. False: it is none.
///
/// # Errors
/// The node cannot start.
pub async fn serve() -> Result<bool> {
    let Ok(node) = std::env::var(NODE) else {
        return Ok(false);
    };
    let store = cali_datastore::open_from_env()?;
    let allocator = Allocator::with_system_time(store, &node);
    let journal = std::env::var_os(JOURNAL).context("no journal is named")?;
    let keeper = Keeper::open(allocator, Settings::new(journal.into())).await?;
    let (sender, mut orders) = tokio::sync::mpsc::channel(WINDOW);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    while let Some(line) = orders.recv().await {
        let (keeper, node) = (keeper.clone(), node.clone());
        tokio::spawn(async move {
            let answer = obey(&keeper, &node, &line).await;
            // One write: a killed process has said a line or not.
            let text = format!("\n{MARK} {line} {answer}\n");
            let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
            let _ = std::io::Write::flush(&mut std::io::stdout());
        });
    }
    Ok(true)
}

async fn obey(keeper: &Keeper, node: &str, order: &str) -> String {
    let (what, handle) = order.split_once(' ').unwrap_or((order, ""));
    let done = match what {
        "add" => {
            let ask = Ask {
                owner: Owner::new(handle)
                    .with("node", node)
                    .with("namespace", "soak")
                    .with("pod", handle),
                v4: true,
                v6: false,
                pools_v4: Vec::new(),
                pools_v6: Vec::new(),
                namespace_labels: None,
            };
            keeper.acquire(&ask).await.map(|held| {
                held.first()
                    .map_or_else(String::new, |held| held.address.to_string())
            })
        }
        "del" => keeper.release(handle).await.map(|_| "gone".to_owned()),
        _ => keeper.settled().await.map(|()| "settled".to_owned()),
    };
    done.unwrap_or_else(|error| format!("refused: {error}"))
}

/// One node as its runtime sees it.
struct Driver<'a> {
    name: String,
    cluster: &'a Cluster,
    ledger: &'a Ledger,
    dice: Dice,
    goal: usize,
    pods: usize,
    issued: usize,
    /// Handles with their addresses.
    holds: BTreeMap<String, IpAddr>,
    /// Orders without an answer.
    open: Vec<String>,
    /// When an order was last done.
    heard: Instant,
}

struct Process {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Driver<'_> {
    fn start(&self, test: &str) -> Result<Process> {
        let mut command = Command::new(std::env::current_exe()?);
        let journal = self.cluster.folder.join(format!("{}.journal", self.name));
        command
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .envs(self.cluster.env.iter().cloned())
            .env(NODE, &self.name)
            .env(JOURNAL, journal)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn()?;
        let input = child.stdin.take().context("no pipe to the node")?;
        let output = child.stdout.take().context("no pipe from the node")?;
        Ok(Process {
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    async fn run(mut self, test: &str) -> Result<()> {
        loop {
            let mut process = self.start(test)?;
            for order in self.open.clone() {
                process
                    .input
                    .write_all(format!("{order}\n").as_bytes())
                    .await?;
            }
            let life = LIFE.0 + self.dice.below(LIFE.1 - LIFE.0);
            let end = Instant::now() + Duration::from_millis(life);
            if self.work(&mut process, end).await? {
                return self.finish(process).await;
            }
            ensure!(
                self.heard.elapsed() < SILENCE,
                "{} gets nothing done: {:?}",
                self.name,
                self.open
            );
            // SIGKILL, in the middle of whatever it does.
            process.child.kill().await?;
            self.ledger.kills.fetch_add(1, Ordering::Relaxed);
            while let Ok(Some(line)) = process.output.next_line().await {
                self.hear(&line)?;
            }
        }
    }

    /// True when everything is done; false when the node is to be killed.
    async fn work(&mut self, process: &mut Process, end: Instant) -> Result<bool> {
        loop {
            while self.open.len() < WINDOW {
                let Some(order) = self.next() else { break };
                let line = format!("{order}\n");
                self.open.push(order);
                process.input.write_all(line.as_bytes()).await?;
            }
            if self.open.is_empty() {
                return Ok(true);
            }
            tokio::select! {
                line = process.output.next_line() => {
                    let line = line?.context("the node has ended")?;
                    if let Some(again) = self.hear(&line)? {
                        self.ledger.refusals.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        process.input.write_all(format!("{again}\n").as_bytes()).await?;
                    }
                }
                () = tokio::time::sleep_until(end.into()) => return Ok(false),
            }
        }
    }

    /// The next order: as many addresses as allowed, then one given back for each new one.
    fn next(&mut self) -> Option<String> {
        let grows = self.holds.len() + self.open.len() < self.pods && self.dice.below(3) > 0;
        if self.issued < self.goal && (grows || self.holds.is_empty()) {
            self.issued += 1;
            return Some(format!("add {}-{}", self.name, self.issued));
        }
        let at = self.dice.below(self.holds.len() as u64) as usize;
        let handle = self.holds.keys().nth(at)?.clone();
        // Whoever asks for its release has stopped using the address.
        if let Some(address) = self.holds.remove(&handle) {
            self.ledger.owners().remove(&address);
        }
        Some(format!("del {handle}"))
    }

    /// Takes an answer; an order that was refused is to be repeated.
    fn hear(&mut self, line: &str) -> Result<Option<String>> {
        let Some(answer) = line.strip_prefix(MARK) else {
            return Ok(None);
        };
        let answer = answer.trim();
        let Some(at) = self.open.iter().position(|order| {
            answer
                .strip_prefix(order.as_str())
                .is_some_and(|rest| rest.starts_with(' '))
        }) else {
            return Ok(None);
        };
        let order = self.open[at].clone();
        let said = answer[order.len()..].trim();
        if said.starts_with("refused") {
            return Ok(Some(order));
        }
        self.open.swap_remove(at);
        self.heard = Instant::now();
        if let Some(handle) = order.strip_prefix("add ") {
            let address = said.parse().with_context(|| format!("{answer:?}"))?;
            self.ledger.add(address, handle)?;
            self.ledger.added.fetch_add(1, Ordering::Relaxed);
            self.holds.insert(handle.to_owned(), address);
        }
        Ok(None)
    }

    async fn finish(&mut self, mut process: Process) -> Result<()> {
        process.input.write_all(b"settle\n").await?;
        let settled = async {
            while let Some(line) = process.output.next_line().await? {
                if line.starts_with(MARK) && line.ends_with("settled") {
                    return Ok(());
                }
            }
            bail!("{} ended before it had told everything", self.name)
        };
        tokio::time::timeout(SILENCE, settled).await??;
        process.child.kill().await?;
        Ok(())
    }
}

/// Runs all of it; `test` is the name of the test that calls [`serve`]. What was seen comes back as a line.
///
/// # Errors
/// An address had two owners, something has leaked, or the cluster does not come to rest.
pub async fn run(cluster: Cluster, size: &Size, test: &'static str) -> Result<String> {
    let store = &cluster.store;
    prepare(store.as_ref(), size).await?;
    let ledger = Ledger::default();
    let over = AtomicBool::new(false);
    let start = Instant::now();
    let nodes = async {
        let drivers = (0..size.nodes).map(|number| {
            let driver = Driver {
                name: format!("node-{number}"),
                cluster: &cluster,
                ledger: &ledger,
                dice: Dice(0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1)),
                goal: size.allocations / size.nodes,
                pods: size.pods,
                issued: 0,
                holds: BTreeMap::new(),
                open: Vec::new(),
                heard: Instant::now(),
            };
            driver.run(test)
        });
        let result = futures::future::try_join_all(drivers).await;
        over.store(true, Ordering::Relaxed);
        result
    };
    let (done, passes) = tokio::join!(nodes, collect(store, &over));
    done?;
    let took = start.elapsed();
    let added = ledger.added.load(Ordering::Relaxed);
    ensure!(
        added == size.allocations / size.nodes * size.nodes,
        "{added} addresses were taken"
    );
    ensure!(ledger.owners().is_empty(), "not all were given back");
    rests(&cluster).await?;
    vanish(&cluster, size).await?;
    Ok(format!(
        "{added} addresses by {} nodes in {:.0} s ({:.0}/s); {} processes killed, {} orders refused and repeated, {passes} garbage collections meanwhile; \
         no address had two owners, no problem found, nothing left",
        size.nodes,
        took.as_secs_f64(),
        added as f64 / took.as_secs_f64(),
        ledger.kills.load(Ordering::Relaxed),
        ledger.refusals.load(Ordering::Relaxed),
    ))
}

async fn prepare(store: &dyn Datastore, size: &Size) -> Result<()> {
    let pool = json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "soak"},
        "spec": {"cidr": size.pool, "blockSize": 28}});
    store.apply(AnyResource::from_json(pool)?).await?;
    for number in 0..size.nodes {
        let node = json!({"apiVersion": "projectcalico.org/v3", "kind": "Node",
            "metadata": {"name": format!("node-{number}"), "annotations": {names::JOURNAL_ANNOTATION: "true"}}, "spec": {}});
        store.apply(AnyResource::from_json(node)?).await?;
    }
    Ok(())
}

fn collector() -> Collector {
    Collector::new(Rules {
        grace: Some(Duration::from_millis(500)),
    })
}

/// Collects garbage while others work: what is in use must not go.
async fn collect(store: &Arc<dyn Datastore>, over: &AtomicBool) -> usize {
    let allocator = Allocator::with_system_time(Arc::clone(store), "");
    let mut collector = collector();
    let mut passes = 0;
    while !over.load(Ordering::Relaxed) {
        // The datastore may be away at the moment.
        let pass = gc::pass(store, &allocator, &mut collector, Instant::now(), false).await;
        passes += usize::from(pass.is_ok());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    passes
}

async fn pass(cluster: &Cluster, collector: &mut Collector) -> Result<String> {
    let allocator = Allocator::with_system_time(Arc::clone(&cluster.store), "");
    gc::pass(&cluster.store, &allocator, collector, Instant::now(), false).await?;
    let (inventory, facts) = gc::read(&cluster.store, &allocator).await?;
    let problems = check(&inventory, &facts).problems;
    Ok(if problems.is_empty() {
        String::new()
    } else {
        format!("{problems:?}")
    })
}

/// Waits until nothing is wrong, and asks the command line as well.
async fn rests(cluster: &Cluster) -> Result<()> {
    let mut collector = collector();
    let end = Instant::now() + SILENCE;
    loop {
        let problems = pass(cluster, &mut collector).await?;
        if problems.is_empty() {
            break;
        }
        ensure!(Instant::now() < end, "{problems}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let output = StdCommand::new(programs().join("calictl"))
        .args(["ipam", "check"])
        .envs(cluster.env.iter().cloned())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said.contains("found 0 problems"), "{said}");
    Ok(())
}

/// The nodes go; so must everything that was theirs.
async fn vanish(cluster: &Cluster, size: &Size) -> Result<()> {
    for number in 0..size.nodes {
        let key = Key::cluster(Kind::Node, format!("node-{number}"));
        cluster.store.delete(&key, None).await?;
    }
    let mut collector = collector();
    let end = Instant::now() + SILENCE;
    loop {
        pass(cluster, &mut collector).await?;
        let mut left = Vec::new();
        for kind in [Kind::IPAMBlock, Kind::BlockAffinity, Kind::IPAMHandle] {
            let list = cluster.store.list(kind, None).await?;
            left.extend(list.items.iter().map(|item| item.object.key().to_string()));
        }
        if left.is_empty() {
            return rests(cluster).await;
        }
        ensure!(Instant::now() < end, "this is left: {left:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
