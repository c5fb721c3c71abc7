//! The pod-to-pod matrix: every pod tries every other one on its first TCP port, at its address of one family.

use crate::output::Style;
use anyhow::{Context, Result};
use cali_datastore::Datastore;
use cali_lab::pods::RunningPod;
use cali_lab::probe::{Attempt, Outcome, Protocol, try_all};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// How long an attempt may take before it counts as denied. A SYN that is lost is sent again after 1 s.
const LIMIT: Duration = Duration::from_millis(1500);

/// How often a connection that ought to be possible is tried.
const ROUNDS: usize = 4;
const BETWEEN_ROUNDS: Duration = Duration::from_millis(250);

/// One cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell {
    expected: bool,
    seen: Outcome,
}

/// Sources in rows, destinations in columns.
#[derive(Debug)]
pub(super) struct Matrix {
    names: Vec<String>,
    /// `None`: a pod towards itself.
    cells: Vec<Vec<Option<Cell>>>,
}

/// Which of the pods' addresses are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }

    /// The pod's address of this family.
    fn address(self, pod: &RunningPod) -> Option<IpAddr> {
        let wanted = |address: &&IpAddr| address.is_ipv6() == (self == Self::Ipv6);
        pod.addresses.iter().find(wanted).copied()
    }
}

/// Measures all pairs side by side, of pods that have an address of the family.
pub(super) async fn measure(
    store: &Arc<dyn Datastore>,
    pods: &[RunningPod],
    family: Family,
) -> Result<Matrix> {
    let oracle = super::super::expect::Oracle::read(store).await?;
    let mut attempts = Vec::new();
    let mut places = Vec::new();
    for (row, from) in pods.iter().enumerate() {
        for (column, to) in pods.iter().enumerate().filter(|(column, _)| *column != row) {
            let (Some(source), Some(address), Some(port)) =
                (family.address(from), family.address(to), to.pod.tcp.first())
            else {
                continue;
            };
            let attempt = Attempt {
                namespace: from.netns.clone(),
                protocol: Protocol::Tcp,
                to: SocketAddr::new(address, *port),
            };
            places.push((row, column, oracle.allows(source, address, *port)?));
            attempts.push(attempt);
        }
    }
    let allowed: Vec<bool> = places.iter().map(|(_, _, allowed)| *allowed).collect();
    let outcomes = tokio::task::spawn_blocking(move || probe(&attempts, &allowed))
        .await
        .context("cannot probe")?
        .context("cannot probe")?;
    let mut cells = vec![vec![None; pods.len()]; pods.len()];
    for ((row, column, expected), seen) in places.into_iter().zip(outcomes) {
        cells[row][column] = Some(Cell { expected, seen });
    }
    Ok(Matrix {
        names: pods.iter().map(|pod| pod.pod.name.clone()).collect(),
        cells,
    })
}

/// Tries all; what ought to connect and does not is tried again, since a network that has just come up may still be on
/// its way. What connects and ought not to is never tried again: one packet too many is a leak.
fn probe(attempts: &[Attempt], allowed: &[bool]) -> std::io::Result<Vec<Outcome>> {
    let mut outcomes = try_all(attempts, LIMIT)?;
    for _ in 1..ROUNDS {
        let missing: Vec<usize> = (0..attempts.len())
            .filter(|index| allowed[*index] && !outcomes[*index].is_connected())
            .collect();
        if missing.is_empty() {
            break;
        }
        std::thread::sleep(BETWEEN_ROUNDS);
        let again: Vec<Attempt> = missing
            .iter()
            .map(|index| attempts[*index].clone())
            .collect();
        for (index, outcome) in missing.into_iter().zip(try_all(&again, LIMIT)?) {
            outcomes[index] = outcome;
        }
    }
    Ok(outcomes)
}

impl Matrix {
    /// Whether every connection is as the policies say.
    pub(super) fn agrees(&self) -> bool {
        self.cells
            .iter()
            .flatten()
            .flatten()
            .all(|cell| cell.expected == cell.seen.is_connected())
    }

    pub(super) fn render(&self) -> String {
        let first = self
            .names
            .iter()
            .map(String::len)
            .max()
            .unwrap_or(0)
            .max("from \\ to".len());
        let mut text = format!("{:<first$}", "from \\ to");
        for name in &self.names {
            text.push_str(&format!("  {name:>8}"));
        }
        text.push('\n');
        for (name, row) in self.names.iter().zip(&self.cells) {
            text.push_str(&format!("{name:<first$}"));
            for (cell, column) in row.iter().zip(&self.names) {
                let width = column.len().max(8);
                text.push_str(&format!("  {}", paint(*cell, width)));
            }
            text.push('\n');
        }
        let all = self.cells.iter().flatten().flatten();
        let (agree, total) = all.fold((0, 0), |(agree, total), cell| {
            (
                agree + usize::from(cell.expected == cell.seen.is_connected()),
                total + 1,
            )
        });
        text.push_str(&format!(
            "\n{agree} of {total} connections are as the policies say"
        ));
        if agree < total {
            text.push_str(" (a cell with ! differs: seen ! expected)");
        }
        text.push('\n');
        text
    }
}

fn paint(cell: Option<Cell>, width: usize) -> String {
    let word = |connected| if connected { "allow" } else { "deny" };
    let Some(cell) = cell else {
        return format!("{:>width$}", "·");
    };
    let seen = cell.seen.is_connected();
    if seen != cell.expected {
        return Style::ERROR.paint(format_args!(
            "{:>width$}",
            format!("{}!{}", word(seen), word(cell.expected))
        ));
    }
    let style = if seen { Style::GOOD } else { Style::DIM };
    style.paint(format_args!("{:>width$}", word(seen)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_stands_out_and_is_counted() {
        let allow = Some(Cell {
            expected: true,
            seen: Outcome::Connected,
        });
        let leak = Some(Cell {
            expected: false,
            seen: Outcome::Connected,
        });
        let matrix = Matrix {
            names: vec!["web-1".into(), "db-1".into()],
            cells: vec![vec![None, allow], vec![leak, None]],
        };
        assert!(!matrix.agrees());
        let expected = "\
from \\ to     web-1      db-1
web-1             ·     allow
db-1       allow!deny         ·

1 of 2 connections are as the policies say (a cell with ! differs: seen ! expected)
";
        assert_eq!(matrix.render(), expected);
    }
}
