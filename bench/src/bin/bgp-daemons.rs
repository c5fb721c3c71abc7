//! BGP daemons side by side under one load; see [`cali_bench::bgp`]. Needs root, for its namespaces.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use cali_bench::bgp::cost;
use cali_bench::bgp::daemon::{ALL, Competitor};
use cali_bench::bgp::round::Limits;
use cali_bench::bgp::run::Load;
use cali_bench::bgp::shape::{Course, Shape};
use cali_bench::bgp::{table, targets};
use clap::Parser;

/// Measures BGP daemons under one load, side by side, and prints the tables as Markdown.
#[derive(Debug, Parser)]
struct Arguments {
    /// Which loads: fan-in, v6, server, reflector, kernel, peer-down, churn, stalled, sessions, process, idle
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "fan-in,server,reflector,kernel,sessions,process,idle,v6,peer-down,churn,stalled"
    )]
    shapes: Vec<String>,
    /// Which daemons: cali, bird2, bird217, bird3, frr, frr10, openbgpd, gobgp3
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "cali,bird217,bird3,frr10,openbgpd,gobgp3"
    )]
    daemons: Vec<String>,
    /// Most rounds of each; the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// After so many minutes nothing is measured a second time
    #[arg(long, default_value_t = 11)]
    minutes: u64,
    /// Divides the number of prefixes, for a quick look
    #[arg(long, default_value_t = 1)]
    scale: u32,
}

/// A load with its limits.
fn load(name: &str, scale: u32) -> Result<(Shape, Limits)> {
    let each = |n: u32| (n / scale).max(1);
    let shape = match name {
        "fan-in" => Shape::fan_in(10, each(100_000)),
        "v6" => Shape::fan_in(10, each(100_000)).over_v6("v6"),
        "kernel" => Shape::fan_in(10, each(10_000)).then(
            "kernel",
            Course::Kernel,
            ", written into the kernel",
        ),
        "peer-down" => Shape::fan_in(10, each(50_000)).then(
            "peer-down",
            Course::PeerDown,
            ", then one peer is lost",
        ),
        "churn" => Shape::fan_in(10, each(50_000)).then(
            "churn",
            Course::Churn,
            ", then 1 % changes again and again",
        ),
        "stalled" => Shape::fan_in(10, each(50_000)).with_stalled_monitor().then(
            "stalled",
            Course::Stalled,
            ", and one that stops reading",
        ),
        "reflector" => Shape::reflector(500, each(26)),
        "server" => Shape::server(20, each(5_000)),
        "sessions" => Shape::sessions("sessions", 200),
        "process" => Shape::sessions("process", 1),
        "idle" => Shape::sessions("idle", 1000),
        other => bail!("there is no load {other:?}"),
    };
    let count = shape.neighbours.len() as u64;
    let limits = Limits {
        establish: Duration::from_secs(30),
        settle: Duration::from_secs(2),
        // FRR holds a new update group back for min(10 s, 1 s + 50 ms x peers).
        settle_frr: Duration::from_secs(if shape.prefixes > 0 {
            (3 + count / 20).min(12)
        } else {
            2
        }),
        phase: Duration::from_secs(90),
        idle: Duration::from_secs(if name == "idle" { 10 } else { 0 }),
    };
    Ok((shape, limits))
}

fn chosen(names: &[String]) -> Result<Vec<Competitor>> {
    for name in names {
        ensure!(
            ALL.iter().any(|c| c.name == name),
            "there is no daemon {name:?}"
        );
    }
    let wanted = |c: &Competitor| names.iter().any(|n| n == c.name);
    let (here, missing): (Vec<_>, Vec<_>) = ALL
        .into_iter()
        .filter(wanted)
        .partition(Competitor::is_there);
    for competitor in missing {
        eprintln!("{} is not there; scripts/peers unpacks it", competitor.name);
    }
    Ok(here)
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let competitors = chosen(&arguments.daemons)?;
    let mut loads = Vec::new();
    for name in &arguments.shapes {
        let (shape, limits) = load(name, arguments.scale)?;
        loads.push(Load::new(shape, limits, &competitors));
    }
    let limit = Duration::from_secs(60 * arguments.minutes);
    cali_bench::bgp::run::run(&mut loads, arguments.rounds, limit)?;
    println!("{}\n", cost::machine());
    for load in &loads {
        println!("{}", table::render(&load.shape, &load.rows, &load.bare));
    }
    print!("{}", targets::render(&loads));
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bgp-daemons: {error:#}");
            ExitCode::FAILURE
        }
    }
}
