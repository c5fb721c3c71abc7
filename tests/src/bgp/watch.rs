//! Notices a kernel route that was gone, be it for a moment.
//!
//! Two witnesses: what the kernel reports (`ip monitor route`), and packets, because routes can go without a report
//! (with their next hop object or their device).

use crate::bgp::segment::Host;
use crate::traffic::Ping;
use anyhow::{Context, Result, ensure};
use cali_api::Cidr;
use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// `ip monitor route` of a namespace, written to a file.
#[derive(Debug)]
pub struct Watch {
    child: Child,
    report: PathBuf,
}

impl Watch {
    /// Starts to watch; returns when the watcher is known to hear.
    pub fn start(host: &Host, folder: &Path) -> Result<Self> {
        let report = folder.join(format!("routes-of-{}", host.ns.name()));
        let child = host
            .ns
            .command("ip")
            .args(["-o", "monitor", "route"])
            .stdin(Stdio::null())
            .stdout(File::create(&report)?)
            .spawn()
            .context("cannot start ip monitor")?;
        let watch = Self { child, report };
        // A route of documentation (RFC 5737) comes and goes until the report shows it.
        let probe: Cidr = "198.51.100.77/32".parse()?;
        crate::eventually(Duration::from_secs(5), || {
            host.ns.ip(&format!("route replace unreachable {probe}"));
            host.ns.ip(&format!("route del unreachable {probe}"));
            if watch.lost(&probe).map_err(|error| error.to_string())? {
                Ok(())
            } else {
                Err("the monitor does not hear".to_owned())
            }
        })
        .map_err(anyhow::Error::msg)?;
        Ok(watch)
    }

    /// Whether a route to this prefix was deleted since the start.
    pub fn lost(&self, prefix: &Cidr) -> Result<bool> {
        Ok(self
            .report(prefix)?
            .iter()
            .any(|line| line.starts_with("Deleted")))
    }

    /// What was reported about this prefix.
    pub fn report(&self, prefix: &Cidr) -> Result<Vec<String>> {
        // `ip` prints host routes without their length.
        let short = prefix.addr().to_string();
        let long = prefix.to_string();
        let text = std::fs::read_to_string(&self.report)?;
        let about = |line: &&str| {
            line.split_whitespace()
                .any(|word| word == long || (word == short && prefix.is_host()))
        };
        Ok(text.lines().filter(about).map(str::to_owned).collect())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A ping every 10 ms that counts.
#[derive(Debug)]
pub struct Pings {
    ping: Ping,
    what: String,
}

impl Pings {
    /// Starts; an answer to the first one is awaited, so that what is lost later was reachable.
    pub fn start(host: &Host, to: IpAddr) -> Result<Self> {
        let what = format!("{} -> {to}", host.ns.name());
        let address = to.to_string();
        crate::eventually(Duration::from_secs(5), || {
            let output = host.ns.output("ping", &["-n", "-c1", "-W1", &address]);
            if output.status.success() {
                Ok(())
            } else {
                Err(format!("{what} has no answer"))
            }
        })
        .map_err(anyhow::Error::msg)?;
        let ping = Ping::in_namespace(host.ns.name(), &address)?;
        Ok(Self { ping, what })
    }

    /// Ends, and fails if an answer is missing.
    pub fn stop(self) -> Result<u64> {
        let count = self.ping.stop()?;
        ensure!(
            count.sent > 1 && count.lost == 0,
            "{}: {} of {} packets lost",
            self.what,
            count.lost,
            count.sent
        );
        Ok(count.sent)
    }
}
