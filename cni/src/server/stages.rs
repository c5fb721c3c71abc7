//! Where the time of a call goes: one line at debug level, which `make bench-cni` adds up.

use std::fmt::Write as _;
use std::time::Instant;

/// The target of the lines, for filters of the log.
pub const TARGET: &str = "cali_cni::stages";

/// The stages of one call, one after another.
#[derive(Debug)]
pub(super) struct Stages {
    since: Instant,
    /// `name=microseconds`, separated by spaces.
    spent: String,
}

impl Stages {
    pub(super) fn start() -> Self {
        Self {
            since: Instant::now(),
            spent: String::new(),
        }
    }

    /// What has passed since the start or the last end was this stage.
    pub(super) fn end(&mut self, stage: &'static str) {
        let now = Instant::now();
        let took = now.duration_since(self.since).as_micros();
        self.since = now;
        let space = if self.spent.is_empty() { "" } else { " " };
        // Writing to a string does not fail.
        let _ = write!(self.spent, "{space}{stage}={took}");
    }

    pub(super) fn tell(&self, command: &'static str) {
        tracing::debug!(target: TARGET, command, stages = %self.spent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_named_in_their_order_with_whole_microseconds() {
        let mut stages = Stages::start();
        stages.end("address");
        stages.end("interface");
        let parts: Vec<(&str, u64)> = stages
            .spent
            .split(' ')
            .filter_map(|part| part.split_once('='))
            .map(|(name, took)| (name, took.parse().unwrap()))
            .collect();
        let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["address", "interface"]);
    }
}
