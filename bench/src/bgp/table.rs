//! The table of a run, as Markdown.

use std::fmt::Write;
use std::time::Duration;

use super::daemon::Competitor;
use super::round::Outcome;
use super::shape::Shape;

/// Rounds of one daemon; a failed one is the reason.
pub struct Row {
    /// Whose.
    pub competitor: Competitor,
    /// Every round.
    pub rounds: Vec<Result<Outcome, String>>,
}

/// The round with the median time (the upper one of two).
pub(super) fn median(rounds: &[Result<Outcome, String>]) -> Option<&Outcome> {
    let mut good: Vec<&Outcome> = rounds.iter().flatten().collect();
    good.sort_by_key(|o| (o.announce.map(|a| a.full), o.established));
    good.get(good.len() / 2).copied()
}

const fn megabytes(octets: u64) -> f64 {
    octets as f64 / 1e6
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}

/// One table. `bare` is what a bare writer of kernel routes needed in each round, where that is the yardstick.
#[must_use]
pub fn render(shape: &Shape, rows: &[Row], bare: &[Duration]) -> String {
    let mut out = format!("### {}\n\n", shape.title);
    match shape.course.second() {
        Some(second) => {
            let _ = writeln!(
                out,
                "| daemon | all routes at every measured peer, s | daemon CPU, s | peak memory, MB | octets per path | \
                 UPDATEs sent | {second}, s | daemon CPU, s | sessions up, s | other load | rounds |\n\
                 |---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
            );
        }
        None => out.push_str(
            "| daemon | sessions up, s | memory, MB | idle CPU, % of one core | rounds |\n|---|---:|---:|---:|---:|\n",
        ),
    }
    for row in rows {
        let Some(outcome) = median(&row.rounds) else {
            let reason = row.rounds.iter().find_map(|r| r.as_ref().err());
            let reason = reason
                .and_then(|r| r.lines().next())
                .unwrap_or("not measured");
            let _ = writeln!(out, "| {} | failed: {reason} |", row.competitor.name);
            continue;
        };
        let up = seconds(outcome.established);
        let (Some(announce), Some(second)) = (outcome.announce, outcome.second) else {
            let _ = writeln!(
                out,
                "| {} | {up} | {:.1} | {:.2} | {} |",
                row.competitor.name,
                megabytes(outcome.idle.resident),
                outcome.idle_load * 100.0,
                row.rounds.len()
            );
            continue;
        };
        let grown = outcome.peak.saturating_sub(outcome.idle.resident);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} | {:.0} | {} | {} | {} | {up} | {:.0} % | {} |",
            row.competitor.name,
            seconds(announce.full),
            seconds(outcome.cpu),
            megabytes(outcome.peak),
            grown as f64 / f64::from(shape.prefixes),
            announce.updates,
            seconds(second),
            seconds(outcome.second_cpu),
            outcome.foreign * 100.0,
            row.rounds.len()
        );
    }
    let mut bare = bare.to_vec();
    bare.sort_unstable();
    if let Some(median) = bare.get(bare.len() / 2) {
        let _ = writeln!(
            out,
            "\nA program that does nothing but send the same routes to the kernel, 256 in each message block, needed {} s.",
            seconds(*median)
        );
    }
    out.push('\n');
    out
}
