//! A whole run: every load with every daemon once, then again what is quick, as long as there is time.
//!
//! A round goes over all loads and daemons in turn, so that a busy minute of the machine does not fall on one daemon alone.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::daemon::Competitor;
use super::round::{self, Limits};
use super::shape::{Course, Shape};
use super::table::Row;

/// A measurement that took longer than this is not made again.
const SLOW: Duration = Duration::from_secs(15);

/// A load with what was measured under it.
pub struct Load {
    /// What happens.
    pub shape: Shape,
    /// Limits of a round of the load.
    pub limits: Limits,
    /// One for each daemon that takes part.
    pub rows: Vec<Row>,
    /// What a bare writer of kernel routes needed in each round, where that is the yardstick.
    pub bare: Vec<Duration>,
    /// How long the last measurement took, by row.
    took: Vec<Duration>,
}

impl Load {
    /// A load with nothing measured yet.
    #[must_use]
    pub fn new(shape: Shape, limits: Limits, competitors: &[Competitor]) -> Self {
        let rows: Vec<Row> = competitors
            .iter()
            .filter(|c| c.takes_part(&shape))
            .map(|c| Row {
                competitor: *c,
                rounds: Vec::new(),
            })
            .collect();
        Self {
            took: vec![Duration::ZERO; rows.len()],
            shape,
            limits,
            rows,
            bare: Vec::new(),
        }
    }

    fn round(&mut self, ends: Option<Instant>) -> Result<()> {
        if self.shape.course == Course::Kernel {
            self.bare
                .push(round::bare_writer(&self.shape, &self.limits)?);
        }
        for (row, took) in self.rows.iter_mut().zip(&mut self.took) {
            let start = Instant::now();
            // What took long, or would end too late, has to do with what was measured before.
            if ends.is_some_and(|ends| *took > SLOW || start + *took > ends) {
                continue;
            }
            eprintln!("{} under {}", row.competitor.name, self.shape.title);
            let outcome = round::run(&row.competitor, &self.shape, &self.limits);
            row.rounds.push(outcome.map_err(|error| {
                eprintln!("{error:?}");
                error.root_cause().to_string()
            }));
            *took = start.elapsed();
        }
        Ok(())
    }
}

/// Measures all loads: once in any case, and up to `rounds` times as long as it does not take longer than `limit` in all.
pub fn run(loads: &mut [Load], rounds: usize, limit: Duration) -> Result<()> {
    let ends = Instant::now() + limit;
    for round in 0..rounds {
        for load in &mut *loads {
            load.round((round > 0).then_some(ends))?;
        }
    }
    Ok(())
}
