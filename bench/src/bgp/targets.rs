//! The aims of `bgpd`, each beside what was measured.

use std::fmt::Write;
use std::time::Duration;

use super::daemon::Kind;
use super::round::Outcome;
use super::run::Load;
use super::table::median;

/// Resident octets of a process that keeps one session.
const PROCESS: f64 = 10e6;
/// Resident octets, and processor time per second, of one with 1,000 sessions that does nothing.
const MANY: (f64, f64) = (100e6, 0.02);
/// For 200 sessions to stand.
const UP: Duration = Duration::from_millis(200);
/// Octets for a path more.
const PATH: f64 = 100.0;

/// The aims that what was measured can tell about, as Markdown.
#[must_use]
pub fn render(loads: &[Load]) -> String {
    let mut out = "### Aims\n\n| aim | `bgpd` | limit | |\n|---|---:|---:|---|\n".to_owned();
    let find = |name: &str| {
        let load = loads.iter().find(|l| l.shape.name == name)?;
        Measured::of(load)
    };
    let mut aim = |what: &str, ours: f64, limit: f64, unit: &str| {
        let verdict = if ours <= limit { "met" } else { "missed" };
        let digits = if unit == "s" { 3 } else { 1 };
        let _ = writeln!(
            out,
            "| {what} | {ours:.digits$} {unit} | {limit:.digits$} {unit} | {verdict} |"
        );
    };
    if let Some(m) = find("fan-in") {
        aim(
            "fan-in: time of the fastest",
            time(&m.ours),
            m.least(time),
            "s",
        );
        aim(
            "fan-in: BIRD's memory x 1.5",
            peak(&m.ours),
            m.bird(peak) * 1.5,
            "MB",
        );
        let path = m.ours.peak.saturating_sub(m.ours.idle.resident) as f64 / m.paths;
        aim("fan-in: octets of one more path", path, PATH, "");
    }
    if let Some(m) = find("reflector") {
        aim(
            "reflector: time of the fastest",
            time(&m.ours),
            m.least(time),
            "s",
        );
        aim(
            "reflector: least processor time",
            cpu(&m.ours),
            m.least(cpu),
            "s",
        );
    }
    if let Some((m, bare)) = loads
        .iter()
        .find(|l| l.shape.name == "kernel")
        .and_then(|l| Some((Measured::of(l)?, middle(&l.bare)?)))
    {
        let ours = m.ours.second.map_or(f64::INFINITY, |t| t.as_secs_f64());
        aim(
            "kernel: 80 % of the bare writer's rate",
            ours,
            bare.as_secs_f64() / 0.8,
            "s",
        );
    }
    if let Some(m) = find("server") {
        aim(
            "route server: time of the fastest",
            time(&m.ours),
            m.least(time),
            "s",
        );
        aim(
            "route server: BIRD's memory x 1.5",
            peak(&m.ours),
            m.bird(peak) * 1.5,
            "MB",
        );
    }
    if let Some(m) = find("sessions") {
        aim(
            "200 sessions up",
            m.ours.established.as_secs_f64(),
            UP.as_secs_f64(),
            "s",
        );
    }
    if let Some(m) = find("process") {
        aim(
            "memory with one session",
            resident(&m.ours),
            PROCESS / 1e6,
            "MB",
        );
    }
    if let Some(m) = find("idle") {
        aim(
            "memory with 1,000 sessions",
            resident(&m.ours),
            MANY.0 / 1e6,
            "MB",
        );
        aim(
            "idle with 1,000 sessions",
            m.ours.idle_load * 100.0,
            MANY.1 * 100.0,
            "% of a core",
        );
    }
    out.push('\n');
    out
}

/// What was measured under one load: `bgpd`, and the others that came to an end.
struct Measured {
    ours: Outcome,
    others: Vec<(Kind, Outcome)>,
    paths: f64,
}

impl Measured {
    fn of(load: &Load) -> Option<Self> {
        let outcomes = load.rows.iter();
        let outcomes =
            outcomes.filter_map(|row| Some((row.competitor.kind, *median(&row.rounds)?)));
        let (ours, others): (Vec<_>, Vec<_>) = outcomes.partition(|(kind, _)| *kind == Kind::Cali);
        Some(Self {
            ours: ours.first()?.1,
            others,
            paths: f64::from(load.shape.prefixes.max(1)),
        })
    }

    /// The least of the others.
    fn least(&self, of: fn(&Outcome) -> f64) -> f64 {
        let others = self.others.iter().map(|(_, outcome)| of(outcome));
        others.fold(f64::INFINITY, f64::min)
    }

    /// The least of all versions of BIRD.
    fn bird(&self, of: fn(&Outcome) -> f64) -> f64 {
        let birds = self.others.iter();
        let birds = birds.filter(|(kind, _)| matches!(kind, Kind::Bird { .. }));
        birds
            .map(|(_, outcome)| of(outcome))
            .fold(f64::INFINITY, f64::min)
    }
}

fn middle(times: &[Duration]) -> Option<Duration> {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}

fn time(outcome: &Outcome) -> f64 {
    outcome
        .announce
        .map_or(f64::INFINITY, |a| a.full.as_secs_f64())
}

fn cpu(outcome: &Outcome) -> f64 {
    outcome.cpu.as_secs_f64()
}

fn peak(outcome: &Outcome) -> f64 {
    outcome.peak as f64 / 1e6
}

fn resident(outcome: &Outcome) -> f64 {
    outcome.idle.resident as f64 / 1e6
}
