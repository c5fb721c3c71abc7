//! Network namespaces of the benchmarks, and the percentiles of what was measured in them.

use anyhow::{Context, Result, ensure};
use cali_netlink::NetNs;

/// A namespace that goes with the value.
#[derive(Debug)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its handle.
    pub netns: NetNs,
}

impl Namespace {
    /// A new one; its name says that it is a benchmark's, and whose.
    ///
    /// # Errors
    /// The process is not root's.
    pub fn new(label: &str) -> Result<Self> {
        let name = format!("calibench-{label}-{}", std::process::id());
        let netns = NetNs::create(&name).context("cannot make a namespace: run as root")?;
        Ok(Self { name, netns })
    }

    /// Runs `ip` in it.
    ///
    /// # Errors
    /// It says no.
    pub fn ip(&self, args: &str) -> Result<String> {
        let output = self
            .netns
            .command("ip")
            .args(args.split_whitespace())
            .output()?;
        ensure!(
            output.status.success(),
            "ip {args}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The name shows where it came from if it stays.
        let _ = NetNs::delete(&self.name);
    }
}

/// The median and the 99th percentile.
#[must_use]
pub fn percentiles(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    let at = |part: usize| values.get(values.len() * part / 100).copied();
    [
        at(50).unwrap_or_default(),
        at(99).or(values.last().copied()).unwrap_or_default(),
    ]
}
