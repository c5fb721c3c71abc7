//! When to try again: exponential, with full jitter, so that the clients of a dead server do not come back in step.

use std::time::Duration;

/// Doubles its ceiling at each failure. Randomness is the caller's.
#[derive(Debug)]
pub struct Backoff {
    floor: Duration,
    limit: Duration,
    failures: u32,
}

impl Backoff {
    /// First wait about `floor`, never longer than `limit`.
    pub fn new(floor: Duration, limit: Duration) -> Self {
        Self {
            floor,
            limit,
            failures: 0,
        }
    }

    /// It worked: the next failure starts from the floor.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait after one more failure. `random` is uniform.
    pub fn next_wait(&mut self, random: u64) -> Duration {
        let ceiling = self
            .floor
            .saturating_mul(1 << self.failures.min(16))
            .min(self.limit);
        self.failures = self.failures.saturating_add(1);
        let half = ceiling / 2;
        // Between half the ceiling and the ceiling.
        half + half.mul_f64(random as f64 / u64::MAX as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_and_start_over_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        assert_eq!(backoff.next_wait(0), Duration::from_millis(50));
        assert_eq!(backoff.next_wait(u64::MAX), Duration::from_millis(200));
        for _ in 0..40 {
            assert!(backoff.next_wait(u64::MAX) <= Duration::from_secs(5));
        }
        backoff.reset();
        assert_eq!(backoff.next_wait(u64::MAX), Duration::from_millis(100));
    }
}
