//! BGP daemons side by side under one load; see [`cali_bench::bgp`]. Needs root, for its namespaces.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use cali_bench::bgp::cost;
use cali_bench::bgp::daemon::{ALL, Competitor};
use cali_bench::bgp::round::{self, Limits};
use cali_bench::bgp::shape::{Course, Shape};
use cali_bench::bgp::table::{self, Row};
use clap::Parser;

/// Measures BGP daemons under one load, side by side, and prints the tables as Markdown.
#[derive(Debug, Parser)]
struct Arguments {
    /// Which loads: fan-in, v6, server, reflector, kernel, peer-down, churn, stalled, sessions, idle
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "fan-in,v6,server,reflector,kernel,peer-down,churn,stalled,sessions,idle"
    )]
    shapes: Vec<String>,
    /// Which daemons; all that are there without it
    #[arg(long, value_delimiter = ',')]
    daemons: Vec<String>,
    /// Rounds of each; the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
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
        "peer-down" => Shape::fan_in(10, each(100_000)).then(
            "peer-down",
            Course::PeerDown,
            ", then one peer is lost",
        ),
        "churn" => Shape::fan_in(10, each(100_000)).then(
            "churn",
            Course::Churn,
            ", then 1 % changes again and again",
        ),
        "stalled" => Shape::fan_in(10, each(100_000))
            .with_stalled_monitor()
            .then("stalled", Course::Stalled, ", and one that stops reading"),
        "reflector" => Shape::reflector(500, each(26)),
        "server" => Shape::server(20, each(5_000)),
        "sessions" => Shape::sessions("sessions", 200),
        "idle" => Shape::sessions("idle", 1000),
        other => bail!("there is no load {other:?}"),
    };
    let count = shape.neighbours.len() as u64;
    let limits = Limits {
        establish: Duration::from_secs(90),
        // FRR holds a new update group back for min(10 s, 1 s + 50 ms x peers).
        settle: Duration::from_secs(if shape.prefixes > 0 {
            (3 + count / 20).min(12)
        } else {
            2
        }),
        phase: Duration::from_secs(120),
        idle: Duration::from_secs(if name == "idle" { 20 } else { 0 }),
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
    let wanted = |c: &Competitor| names.is_empty() || names.iter().any(|n| n == c.name);
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
    println!(
        "{}; {} round(s) each, median\n",
        cost::machine(),
        arguments.rounds
    );
    for name in &arguments.shapes {
        let (shape, limits) = load(name, arguments.scale)?;
        let competitors: Vec<_> = competitors
            .iter()
            .filter(|c| c.takes_part(&shape))
            .collect();
        let mut bare = Vec::new();
        let mut rows: Vec<Row> = competitors
            .iter()
            .map(|c| Row {
                name: c.name,
                rounds: Vec::new(),
            })
            .collect();
        // Round by round over all of them, so that a busy minute of the machine does not fall on one alone.
        for _ in 0..arguments.rounds {
            if shape.course == Course::Kernel {
                bare.push(round::bare_writer(&shape)?);
            }
            for (competitor, row) in competitors.iter().zip(&mut rows) {
                eprintln!("{} under {}", competitor.name, shape.title);
                let outcome = round::run(competitor, &shape, &limits);
                row.rounds.push(outcome.map_err(|error| {
                    eprintln!("{error:?}");
                    error.root_cause().to_string()
                }));
            }
        }
        println!("{}", table::render(&shape, &rows, &bare));
    }
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
