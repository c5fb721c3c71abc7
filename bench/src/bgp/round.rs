//! One measurement: one daemon under one load.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::cost::{self, Cost};
use super::daemon::{Competitor, Daemon, Kind};
use super::generator::{Generator, Phase};
use super::kernel;
use super::scene::Scene;
use super::shape::{Course, FLAPS, Shape};

/// Limits and waits of a round.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For all sessions to stand.
    pub establish: Duration,
    /// Between the last session and the first UPDATE.
    pub settle: Duration,
    /// The same for FRR, which holds a new update group back.
    pub settle_frr: Duration,
    /// For a phase.
    pub phase: Duration,
    /// How long an idle daemon is watched; zero skips it.
    pub idle: Duration,
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// From the first dial (or the daemon's first accept, if that was later) to the last session.
    pub established: Duration,
    /// With all sessions up and no routes.
    pub idle: Cost,
    /// Processor time per second while nothing happens, as a fraction of one processor.
    pub idle_load: f64,
    /// Announcements; absent for a load without routes.
    pub announce: Option<Phase>,
    /// Processor time of the daemon for them.
    pub cpu: Duration,
    /// Highest resident memory, in octets.
    pub peak: u64,
    /// What [`Course::second`] names.
    pub second: Option<Duration>,
    /// Processor time of the daemon for it.
    pub second_cpu: Duration,
    /// What else ran on the machine during the announcements, as a fraction of one processor.
    pub foreign: f64,
}

/// Measures one daemon.
pub fn run(competitor: &Competitor, shape: &Shape, limits: &Limits) -> Result<Outcome> {
    let scene = Scene::new(shape.neighbours.iter().map(|n| n.id))?;
    let daemon = competitor.start(shape, &scene.device)?;
    let measured = scene.load.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let settle = match competitor.kind {
            Kind::Frr => limits.settle_frr,
            _ => limits.settle,
        };
        runtime.block_on(measure(shape, &scene, limits, settle))
    });
    measured?.with_context(|| explain(competitor, shape, &daemon))
}

fn explain(competitor: &Competitor, shape: &Shape, daemon: &Daemon) -> String {
    format!(
        "{} under {}; its last words:\n{}\n",
        competitor.name,
        shape.title,
        daemon.last_words()
    )
}

async fn measure(
    shape: &Shape,
    scene: &Scene,
    limits: &Limits,
    settle: Duration,
) -> Result<Outcome> {
    listening(shape, limits.establish).await?;
    let start = Instant::now();
    let mut generator = Generator::start(shape);
    generator.established(limits.establish).await?;
    let established = start.elapsed();
    tokio::time::sleep(settle).await;
    let (before, from) = (cost::look(&scene.device)?, Instant::now());
    tokio::time::sleep(limits.idle).await;
    let idle = cost::look(&scene.device)?;
    let idle_load = if limits.idle.is_zero() {
        0.0
    } else {
        (idle.cpu - before.cpu).as_secs_f64() / from.elapsed().as_secs_f64()
    };
    let mut outcome = Outcome {
        established,
        idle,
        idle_load,
        announce: None,
        cpu: Duration::ZERO,
        peak: idle.peak,
        second: None,
        second_cpu: Duration::ZERO,
        foreign: 0.0,
    };
    if shape.prefixes == 0 {
        return Ok(outcome);
    }
    let (machine, own) = (cost::machine_busy()?, cost::own_cpu());
    let installed = (shape.course == Course::Kernel)
        .then(|| kernel::watch(&scene.device, shape.prefixes, limits.phase));
    let announce = generator
        .announce(limits.phase)
        .await
        .context("announcing")?;
    let mut after = cost::look(&scene.device)?;
    outcome.cpu = after.cpu.saturating_sub(idle.cpu);
    let ours = outcome.cpu + cost::own_cpu().saturating_sub(own);
    let foreign = cost::machine_busy()?
        .saturating_sub(machine)
        .saturating_sub(ours);
    outcome.foreign = foreign.as_secs_f64() / announce.full.as_secs_f64();
    outcome.announce = Some(announce);
    outcome.peak = after.peak;
    let limit = limits.phase;
    let second = match shape.course {
        Course::Sessions => return Ok(outcome),
        Course::Withdraw => generator.withdraw(limit).await.context("withdrawing")?.full,
        Course::PeerDown => {
            generator
                .lose_first(limit)
                .await
                .context("after the loss of a peer")?
                .full
        }
        Course::Churn => {
            generator
                .churn(FLAPS, limit)
                .await
                .context("churning")?
                .full
        }
        Course::Stalled => generator.let_read(limit).await.context("catching up")?.full,
        Course::Kernel => {
            let watch = installed.context("nobody watches the kernel")?;
            let wait = tokio::task::spawn_blocking(move || watch.join());
            let seen = wait
                .await?
                .map_err(|_| anyhow::anyhow!("the watch failed"))?;
            after.cpu = idle.cpu;
            seen?
        }
    };
    outcome.second = Some(second);
    outcome.second_cpu = cost::look(&scene.device)?.cpu.saturating_sub(after.cpu);
    Ok(outcome)
}

/// What a bare writer needs for the same routes in the kernel: the yardstick of [`Course::Kernel`].
pub fn bare_writer(shape: &Shape, limits: &Limits) -> Result<Duration> {
    let scene = Scene::new(shape.neighbours.iter().map(|n| n.id))?;
    kernel::write(&scene.device, shape, limits.phase)
}

/// Waits until the daemon takes connections, so that its start is not part of the sessions' setup.
async fn listening(shape: &Shape, limit: Duration) -> Result<()> {
    let address = (shape.device(), 179);
    let tries = async {
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(limit, tries)
        .await
        .context("the daemon does not listen")
}
