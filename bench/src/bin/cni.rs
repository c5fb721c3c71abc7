//! How long a pod waits for its network; see `docs/benchmarks.md`, section "Pods that come and go".
//!
//! `cni` measures the plugin `calico` beside it, or the one that `--plugin` names, on a node of its own. Root, because pods
//! are network namespaces.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cali_api::AnyResource;
use cali_bench::bgp::cost::machine;
use cali_bench::cni::node::{self, Node};
use cali_bench::cni::plugin::{Called, Pod, Runtime};
use cali_bench::cni::{NAMESPACE, NODE, stages};
use cali_bench::namespace::{Namespace, percentiles};
use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;
use clap::{Parser, Subcommand};
use serde_json::json;

/// How often a runtime asks again while the node starts.
const START: Duration = Duration::from_secs(30);
/// Applications of the pods, each with a policy of its own.
const APPS: usize = 10;

/// How long a pod waits for its network
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Pods one after another
    #[arg(long, default_value_t = 200)]
    pods: usize,
    /// Pods at once
    #[arg(long, default_value_t = 250)]
    together: usize,
    /// Pods of other nodes that policy selects
    #[arg(long, default_value_t = 1000)]
    elsewhere: usize,
    /// The plugin; the `calico` beside this program if not named
    #[arg(long)]
    plugin: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// The node
    #[command(hide = true)]
    Node,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.role {
        Some(Role::Node) => node::serve(),
        None => measure(&arguments),
    }
}

fn object(value: serde_json::Value) -> Result<AnyResource> {
    AnyResource::from_json(value).context("the benchmark's own object")
}

/// What the cluster holds: a pool, a namespace, pods here and elsewhere, a policy for each application.
async fn fill(file: &Path, here: usize, elsewhere: usize) -> Result<()> {
    let store = Sqlite::open(file)?;
    let mut objects = vec![
        json!({"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "pods"},
            "spec": {"cidr": "10.65.0.0/16"}}),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
    ];
    for app in 0..APPS {
        let others = format!("app == 'a{}'", (app + 1) % APPS);
        objects.push(
            json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
            "metadata": {"name": format!("a{app}"), "namespace": NAMESPACE},
            "spec": {"selector": format!("app == 'a{app}'"), "types": ["Ingress", "Egress"],
                "ingress": [{"action": "Allow", "protocol": "TCP", "source": {"selector": others},
                    "destination": {"ports": [80, 443]}}],
                "egress": [{"action": "Allow", "destination": {"selector": others}}]}}),
        );
    }
    let pod = |name: String, number: usize, node: &str, status: serde_json::Value| {
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": format!("a{}", number % APPS)}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}, "status": status})
    };
    for number in 0..elsewhere {
        let address = std::net::Ipv4Addr::from(0x0a42_0000 + number as u32).to_string();
        let status = json!({"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]});
        objects.push(pod(format!("far{number}"), number, "other", status));
    }
    for number in 0..here {
        objects.push(pod(format!("p{number}"), number, NODE, json!({})));
    }
    for value in objects {
        store.create(object(value)?).await?;
    }
    Ok(())
}

/// A node with its store, and pods to be.
struct Scene {
    host: Namespace,
    _outside: Namespace,
    pods: Vec<(String, Namespace)>,
    folder: tempfile::TempDir,
    runtime: Arc<Runtime>,
}

impl Scene {
    fn new(arguments: &Arguments, program: PathBuf) -> Result<Self> {
        let count = arguments.pods.max(arguments.together);
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("cali.db");
        let filling = fill(&file, count, arguments.elsewhere);
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(filling)?;
        let (host, outside) = (Namespace::new("host")?, Namespace::new("outside")?);
        host.ip("link set lo up")?;
        host.ip(&format!(
            "link add eth0 type veth peer name far netns {}",
            outside.name
        ))?;
        host.ip("link set eth0 up")?;
        host.ip("address add 192.0.2.1/24 dev eth0")?;
        outside.ip("link set far up")?;
        let pods = (0..count)
            .map(|number| Ok((format!("p{number}"), Namespace::new(&format!("p{number}"))?)))
            .collect::<Result<_>>()?;
        let runtime = Arc::new(Runtime {
            program,
            folder: folder.path().to_owned(),
        });
        Ok(Self {
            host,
            _outside: outside,
            pods,
            folder,
            runtime,
        })
    }

    fn pod(&self, number: usize) -> Pod<'_> {
        let (name, namespace) = &self.pods[number];
        Pod {
            name,
            netns: &namespace.name,
        }
    }

    /// Starts the node and makes one pod, so that everything has been there once.
    fn start(&self, reserve: Option<usize>) -> Result<Node> {
        let node = Node::start(&self.host.netns, self.folder.path(), reserve)?;
        let end = Instant::now() + START;
        while let Err(error) = self.runtime.call("ADD", self.pod(0), false) {
            if Instant::now() > end {
                let log = std::fs::read_to_string(self.folder.path().join("log"))?;
                return Err(error.context(log));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        self.runtime.call("DEL", self.pod(0), false)?;
        Ok(node)
    }

    /// The log of the node from this octet on, and how long it is.
    fn log(&self, from: usize) -> Result<(String, usize)> {
        let log = std::fs::read_to_string(self.folder.path().join("log"))?;
        Ok((log.get(from..).unwrap_or_default().to_owned(), log.len()))
    }

    /// One call for each of these pods, one after another.
    fn each(&self, verb: &str, count: usize, watched: bool) -> Result<Vec<Called>> {
        (0..count)
            .map(|number| self.runtime.call(verb, self.pod(number), watched))
            .collect()
    }

    /// One call for each of these pods, all at once; the time from the first start to the last end.
    fn all(&self, verb: &'static str, count: usize) -> Result<Duration> {
        let start = Barrier::new(count + 1);
        std::thread::scope(|scope| {
            let calls: Vec<_> = (0..count)
                .map(|number| {
                    let (start, pod) = (&start, self.pod(number));
                    scope.spawn(move || {
                        start.wait();
                        self.runtime.call(verb, pod, false)
                    })
                })
                .collect();
            start.wait();
            let begun = Instant::now();
            for call in calls {
                call.join()
                    .map_err(|_| anyhow::anyhow!("a caller has ended"))??;
            }
            Ok(begun.elapsed())
        })
    }

    /// That what was measured is there: route, interface and rules of so many pods.
    fn stands(&self, count: usize) -> Result<()> {
        let routes = self.host.ip("-4 route show proto 80")?;
        let found = routes
            .lines()
            .filter(|line| line.contains(" dev cali"))
            .count();
        ensure!(found == count, "{found} routes of {count} pods:\n{routes}");
        let links = self.host.ip("-br link")?;
        let interfaces: Vec<&str> = links
            .lines()
            .filter_map(|line| line.split(['@', ' ']).next())
            .filter(|name| name.starts_with("cali"))
            .collect();
        ensure!(
            interfaces.len() == count,
            "{} interfaces of {count} pods",
            interfaces.len()
        );
        let mut nft = self.host.netns.command("nft");
        let rules = nft
            .args(["list", "table", "inet", "calico"])
            .output()?
            .stdout;
        let rules = String::from_utf8_lossy(&rules);
        let without: Vec<_> = interfaces
            .iter()
            .filter(|name| !rules.contains(**name))
            .collect();
        ensure!(without.is_empty(), "no policy for {without:?}");
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn spread(calls: &[Called]) -> [f64; 2] {
    percentiles(calls.iter().map(|call| milliseconds(call.took)).collect())
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// One line of the table. `aims`: figure and limit, all of which have to hold.
fn row(what: &str, seen: &str, aim: &str, aims: &[(f64, f64)]) {
    let missed = aims.iter().any(|(seen, limit)| seen >= limit);
    let aim = if missed {
        format!("**{aim}: missed**")
    } else {
        aim.to_owned()
    };
    println!("| {what} | {seen} | {aim} |");
}

fn difference(
    before: &BTreeMap<String, u64>,
    after: &BTreeMap<String, u64>,
) -> BTreeMap<String, u64> {
    let grown = after.iter().map(|(what, count)| {
        let before = before.get(what).copied().unwrap_or_default();
        (what.clone(), count - before)
    });
    grown.filter(|(_, count)| *count > 0).collect()
}

fn measure(arguments: &Arguments) -> Result<()> {
    let beside = std::env::current_exe()?.with_file_name("calico");
    let program = arguments.plugin.clone().unwrap_or(beside);
    ensure!(program.is_file(), "there is no {}", program.display());
    let scene = Scene::new(arguments, program)?;
    println!(
        "{}; {} pods of other nodes, {APPS} policies; load average at the start {}\n",
        machine(),
        arguments.elsewhere,
        load()
    );
    println!("| pods | seen | aim |\n|---|---|---|");
    alone(&scene)?;
    {
        let mut node = scene.start(None)?;
        one_after_another(&scene, &mut node, arguments.pods)?;
        together(&scene, arguments.together, "8 addresses ready")?;
    }
    let reserve = arguments.pods.max(arguments.together) + 1;
    let mut node = scene.start(Some(reserve))?;
    node.settled()?;
    together(
        &scene,
        arguments.together,
        &format!("{reserve} addresses ready"),
    )?;
    node.settled()?;
    held(&scene, &mut node, arguments.pods)?;
    println!("\nload average at the end {}", load());
    Ok(())
}

/// The process of the plugin by itself.
fn alone(scene: &Scene) -> Result<()> {
    let calls = (0..100)
        .map(|_| scene.runtime.call("VERSION", scene.pod(0), false))
        .collect::<Result<Vec<Called>>>()?;
    let [median, worst] = spread(&calls);
    row(
        "the plugin's process alone (`VERSION`), 100 times",
        &format!("median {median:.2} ms, 99th percentile {worst:.2} ms"),
        "3 ms",
        &[(median, 3.0)],
    );
    Ok(())
}

/// Where the server's part of the time went.
fn stage_row(verb: &str, log: &str) {
    let parts: Vec<String> = stages::medians(log, verb)
        .iter()
        .map(|(stage, median)| format!("{stage} {median:.1} ms"))
        .collect();
    let what = format!("of that in the server, stage by stage, medians (`{verb}`)");
    row(&what, &parts.join(", "), "", &[]);
}

fn one_after_another(scene: &Scene, node: &mut Node, count: usize) -> Result<()> {
    let before = node.settled()?;
    let (_, begun) = scene.log(0)?;
    let adds = scene.each("ADD", count, false)?;
    let after = node.settled()?;
    scene.stands(count)?;
    let [median, worst] = spread(&adds);
    row(
        &format!("`ADD`, {count} one after another"),
        &format!("median {median:.1} ms, 99th percentile {worst:.1} ms"),
        "15 ms, 40 ms",
        &[(median, 15.0), (worst, 40.0)],
    );
    stage_row("ADD", &scene.log(begun)?.0);
    let requests = difference(&before, &after);
    let dels = scene.each("DEL", count, false)?;
    scene.stands(0)?;
    let (log, _) = scene.log(begun)?;
    let [median, worst] = spread(&dels);
    row(
        &format!("`DEL`, {count} one after another"),
        &format!("median {median:.1} ms, 99th percentile {worst:.1} ms"),
        "",
        &[],
    );
    stage_row("DEL", &log);
    let watched = count.min(50);
    let adds = scene.each("ADD", watched, true)?;
    scene.each("DEL", watched, false)?;
    let peak = adds.iter().map(|call| call.peak).max().unwrap_or_default();
    let megabytes = peak as f64 / 1e6;
    row(
        &format!("resident memory of the plugin's process, highest of {watched} `ADD`"),
        &format!("{megabytes:.1} MB"),
        "5 MB",
        &[(megabytes, 5.0)],
    );
    let all: u64 = requests.values().sum();
    let each: Vec<String> = requests
        .iter()
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    row(
        &format!("requests to the datastore behind the answers, for all of the {count} `ADD`"),
        &format!("{all} ({})", each.join(", ")),
        "",
        &[],
    );
    Ok(())
}

fn together(scene: &Scene, count: usize, ready: &str) -> Result<()> {
    let took = scene.all("ADD", count)?.as_secs_f64();
    scene.stands(count)?;
    row(
        &format!("`ADD`, {count} at once, {ready}"),
        &format!("{took:.2} s"),
        "4 s",
        &[(took, 4.0)],
    );
    let took = scene.all("DEL", count)?.as_secs_f64();
    scene.stands(0)?;
    row(
        &format!("`DEL`, {count} at once"),
        &format!("{took:.2} s"),
        "",
        &[],
    );
    Ok(())
}

/// While the datastore answers nothing: what succeeds has asked it nothing.
fn held(scene: &Scene, node: &mut Node, count: usize) -> Result<()> {
    let before = node.hold(true)?;
    let adds = scene.each("ADD", count, false)?;
    scene.stands(count)?;
    let dels = scene.each("DEL", count, false)?;
    scene.stands(0)?;
    // What has been answered, before any of what waits is let go.
    let answered: u64 = difference(&before, &node.hold(true)?).values().sum();
    node.hold(false)?;
    for (verb, calls) in [("ADD", &adds), ("DEL", &dels)] {
        let [median, worst] = spread(calls);
        row(
            &format!(
                "`{verb}`, {count} one after another, while every request to the datastore waits"
            ),
            &format!("median {median:.1} ms, 99th percentile {worst:.1} ms"),
            "",
            &[],
        );
    }
    row(
        &format!("answers of the datastore during these {} calls", 2 * count),
        &answered.to_string(),
        "0",
        &[(answered as f64, 1.0)],
    );
    Ok(())
}
