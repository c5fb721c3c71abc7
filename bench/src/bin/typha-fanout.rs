//! What fan-out costs; see `docs/benchmarks.md`, section "Fan-out".
//!
//! `typha-fanout` measures the server, `typha-fanout scoped` the same where each client asks for a part, and `typha-fanout interest` what
//! one node's agent is sent in clusters of several sizes.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use cali_bench::bgp::cost::{machine, machine_busy, own_cpu};
use cali_bench::typha::{Child, Cluster, Fleet, Process, SAMPLE, agent, real_client, serve};
use clap::{Parser, Subcommand};
use typha::client::Held;

/// What fan-out to many nodes costs
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Role>,
    /// Simulated clients
    #[arg(long, default_value_t = 1000)]
    clients: usize,
    /// Pods of the cluster
    #[arg(long, default_value_t = 100_000)]
    pods: u32,
    /// Nodes of the cluster
    #[arg(long, default_value_t = 5_000)]
    nodes: u32,
    /// Policies of the cluster
    #[arg(long, default_value_t = 5_000)]
    policies: u32,
    /// Seconds of steady changes, a thousand in each
    #[arg(long, default_value_t = 20)]
    seconds: u32,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// What one node's agent receives and holds in clusters of 100, 1,000 and 5,000 nodes
    Interest,
    /// The server where each client asks for the endpoints of its node and of its policies' selectors
    Scoped,
    /// The server's process
    #[command(hide = true)]
    Serve {
        pods: u32,
        nodes: u32,
        policies: u32,
        #[arg(long)]
        namespaced: bool,
    },
    /// The agent's process
    #[command(hide = true)]
    Agent {
        port: u16,
        node: String,
        #[arg(long)]
        scoped: bool,
    },
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.command {
        None => measure(&arguments).await,
        Some(Role::Interest) => interest(),
        Some(Role::Scoped) => scoped(&arguments).await,
        Some(Role::Serve {
            pods,
            nodes,
            policies,
            namespaced,
        }) => {
            serve(Cluster {
                pods,
                nodes,
                policies,
                namespaced,
            })
            .await
        }
        Some(Role::Agent { port, node, scoped }) => agent(port, &node, scoped).await,
    }
}

/// Changes that are made while an agent listens.
const CHANGES: u32 = 2000;

/// One agent, with a scope and without, in clusters of several sizes.
fn interest() -> Result<()> {
    println!("{}\n", machine());
    println!(
        "| nodes | pods | policies | endpoints are sent | objects held | sets | until all is there | received | resident memory | of {CHANGES} changes |"
    );
    println!("|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|");
    for nodes in [100, 1000, 5000] {
        let cluster = Cluster {
            pods: nodes * 21,
            nodes,
            policies: 0,
            namespaced: true,
        };
        let mut server = Process::start(cluster)?;
        for scoped in [false, true] {
            let mut arguments: Vec<String> = ["agent", &server.port.to_string()]
                .map(str::to_owned)
                .into();
            arguments.push(Cluster::node_name(nodes / 2));
            if scoped {
                arguments.push("--scoped".to_owned());
            }
            let mut agent = Child::start(&arguments)?;
            let line = agent.answer()?;
            let fields: Vec<&str> = line.split(' ').collect();
            let [seconds, bytes, held, endpoints, sets] = fields.as_slice() else {
                bail!("the agent said {line:?}");
            };
            ensure!(
                endpoints.parse::<u32>()? == 21,
                "{endpoints} endpoints on the node"
            );
            let (seconds, bytes): (f64, u64) = (seconds.parse()?, bytes.parse()?);
            let resident = agent.cost().resident;
            server.change(CHANGES, 1000)?;
            server.done()?;
            // The last delta is gathered for some milliseconds.
            std::thread::sleep(Duration::from_secs(1));
            agent.say("bytes")?;
            let after: u64 = agent.answer()?.parse()?;
            println!(
                "| {nodes} | {} | {} | {} | {held} | {sets} | {seconds:.2} s | {} | {} | {} |",
                cluster.pods,
                cluster.policies(),
                if scoped { "as asked for" } else { "all" },
                megabytes(bytes),
                megabytes(resident),
                megabytes(after - bytes)
            );
        }
    }
    Ok(())
}

fn row(what: &str, seen: impl std::fmt::Display) {
    println!("| {what} | {seen} |");
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn memory(server: &Process) {
    let cost = server.cost();
    let seen = format!("{}, {}", megabytes(cost.resident), megabytes(cost.peak));
    row("resident memory, and its peak", seen);
}

/// Processor time of the server, of this program and of everybody, within a time.
struct Load {
    since: Instant,
    server: Duration,
    own: Duration,
    machine: Duration,
}

impl Load {
    fn start(server: &Process) -> Result<Self> {
        Ok(Self {
            since: Instant::now(),
            server: server.cost().cpu,
            own: own_cpu(),
            machine: machine_busy()?,
        })
    }

    fn end(&self, server: &Process) -> Result<String> {
        let time = self.since.elapsed().as_secs_f64();
        let of = |now: Duration, then: Duration| now.saturating_sub(then).as_secs_f64();
        let (mine, clients) = (of(server.cost().cpu, self.server), of(own_cpu(), self.own));
        let others = (of(machine_busy()?, self.machine) - mine - clients).max(0.0);
        Ok(format!(
            "{time:.2} s; server {mine:.2} s of processor ({:.2} cores), clients {clients:.2} s, other processes {:.2} cores",
            mine / time,
            others / time
        ))
    }
}

impl Arguments {
    fn cluster(&self) -> Cluster {
        Cluster {
            pods: self.pods,
            nodes: self.nodes,
            policies: self.policies,
            namespaced: false,
        }
    }
}

async fn measure(arguments: &Arguments) -> Result<()> {
    let (cluster, clients) = (arguments.cluster(), arguments.clients);
    println!("{}\n\n{cluster:?}, {clients} clients\n", machine());
    println!("| what | seen |\n|---|---|");
    let start = Instant::now();
    let mut server = Process::start(cluster)?;
    row(
        "server has all objects",
        format!("{:.2} s", start.elapsed().as_secs_f64()),
    );
    row("its resident memory", megabytes(server.cost().resident));

    let mut held = Held::default();
    let snapshot = real_client(server.port, &mut held).await?;
    row(
        "snapshot of one client",
        format!("{} objects, {}", held.len(), megabytes(snapshot)),
    );
    let load = Load::start(&server)?;
    let mut fleet = Fleet::connect(server.port, clients, &Held::default())?;
    fleet.synced(clients).await?;
    row(
        &format!("snapshot to {clients} clients at once"),
        load.end(&server)?,
    );
    row("bytes of these snapshots", megabytes(fleet.bytes()));
    memory(&server);

    fleet.unpack_all(true);
    let mut medians = Vec::new();
    let mut lasts = Vec::new();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        server.change(1, 1)?;
        let latency = fleet.latency(clients).await?;
        server.done()?;
        medians.push(latency.quantile(0.5));
        lasts.push(latency.quantile(1.0));
    }
    medians.sort_unstable();
    lasts.sort_unstable();
    row(
        "one change, median of 20: at the median client, at the last",
        format!("{:.1?}, {:.1?}", medians[10], lasts[10]),
    );

    fleet.unpack_all(false);
    steady(&mut server, &mut fleet, arguments, "1,000 changes/s").await?;
    let before = server.cost().resident;
    fleet.add_crawlers(server.port, 10)?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    steady(
        &mut server,
        &mut fleet,
        arguments,
        "the same beside 10 clients that read 1 byte/s",
    )
    .await?;
    row(
        "growth of resident memory by them",
        megabytes(server.cost().resident.saturating_sub(before)),
    );

    // What the clients hold is as old as the first snapshot: everything since then has been missed.
    let catch_up = real_client(server.port, &mut held).await?;
    row(
        &format!(
            "reconnect after {} missed changes",
            20 + 2 * arguments.seconds * 1000
        ),
        megabytes(catch_up),
    );
    drop(fleet);
    server.change(20, 100)?;
    server.done()?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let load = Load::start(&server)?;
    let mut fleet = Fleet::connect(server.port, clients, &held)?;
    fleet.synced(clients).await?;
    row(
        &format!("{clients} reconnects after 20 missed changes"),
        load.end(&server)?,
    );
    let part = fleet.bytes() as f64 / (snapshot as f64 * clients as f64) * 100.0;
    row(
        "bytes of these reconnects",
        format!("{}, {part:.3} % of the snapshots", megabytes(fleet.bytes())),
    );
    memory(&server);
    Ok(())
}

/// Clients that ask for a part of the endpoints, as nodes do: what the server needs for their snapshots and for changes.
async fn scoped(arguments: &Arguments) -> Result<()> {
    let (cluster, clients) = (arguments.cluster(), arguments.clients);
    println!(
        "{}\n\n{cluster:?}, {clients} clients with a scope\n",
        machine()
    );
    println!("| what | seen |\n|---|---|");
    let mut server = Process::start(cluster)?;
    memory(&server);
    let load = Load::start(&server)?;
    let mut fleet = Fleet::connect_scoped(server.port, clients, cluster)?;
    fleet.synced(clients).await?;
    row(
        &format!("snapshot to {clients} clients at once"),
        load.end(&server)?,
    );
    row(
        &format!(
            "bytes of these snapshots, with the endpoints of {} selectors for one of them",
            cluster.selectors(0).len()
        ),
        megabytes(fleet.bytes()),
    );
    memory(&server);
    let load = Load::start(&server)?;
    server.change(arguments.seconds * 1000, 1000)?;
    server.done()?;
    row("1,000 changes/s", load.end(&server)?);
    memory(&server);
    Ok(())
}

async fn steady(
    server: &mut Process,
    fleet: &mut Fleet,
    arguments: &Arguments,
    what: &str,
) -> Result<()> {
    ensure!(arguments.seconds > 0, "at least one second of changes");
    let load = Load::start(server)?;
    server.change(arguments.seconds * 1000, 1000)?;
    // Each delta is seen once by each client that unpacks it; as many as there surely are.
    let latency = fleet
        .latency(arguments.clients.div_ceil(SAMPLE) * arguments.seconds as usize * 10)
        .await?;
    server.done()?;
    row(what, load.end(server)?);
    let part = |q| latency.quantile(q);
    row(
        "oldest change of a delta: median, 99 %, last",
        format!("{:.1?}, {:.1?}, {:.1?}", part(0.5), part(0.99), part(1.0)),
    );
    // What is still on its way belongs to nobody.
    tokio::time::sleep(Duration::from_secs(1)).await;
    fleet.forget();
    Ok(())
}
