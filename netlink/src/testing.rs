//! Support for kernel tests: namespaces that clean up after themselves, veth pairs between them, bounded waiting.
//!
//! Behind feature `testing`; meant for `tests/netns_*.rs` of this workspace, which run as root. [`hostile`] holds what
//! others do to a host that we share with them.

pub mod hostile;

use std::{
    fmt::Display,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Address, IfIndex, IpNetwork, Link, LinkKind, NetNs, Netlink, NewLink, NewLinkKind, VethPeer,
};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A device that is up, with an MTU of 1500, for tests that need no kernel.
#[must_use]
pub fn link(index: IfIndex, name: &str, kind: LinkKind) -> Link {
    Link {
        index,
        name: name.to_owned(),
        kind,
        mac: None,
        mtu: 1500,
        up: true,
        carrier: true,
        noarp: false,
        master: None,
        parent: None,
        link_netns: None,
        alias: None,
        group: 0,
    }
}

/// A namespace for one test, with `lo` up. Its name goes when the value is dropped, also after a panic.
#[derive(Debug)]
pub struct TestNs {
    name: String,
    netns: NetNs,
    netlink: Netlink,
}

impl TestNs {
    /// Makes a namespace named `calitest-<label>-<pid>-<n>`.
    pub fn new(label: &str) -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("calitest-{label}-{}-{number}", std::process::id());
        let netns = NetNs::create(&name).expect("make a namespace (kernel tests run as root)");
        let netlink = Netlink::open(&netns).expect("open netlink in the namespace");
        let ns = Self {
            name,
            netns,
            netlink,
        };
        ns.ip("link set lo up");
        ns
    }

    /// Its name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The handle to the namespace.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// A netlink handle in it.
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// Runs `ip ARGS` in it and returns what it printed; panics with its error if it fails.
    pub fn ip(&self, args: &str) -> String {
        self.run("ip", &args.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs a program in it and returns what it printed; panics with its error if it fails.
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.output(program, args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{program} {} in {}: {}\n{text}{}",
            args.join(" "),
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// Runs a program in it, whatever comes of it.
    pub fn output(&self, program: &str, args: &[&str]) -> Output {
        self.command(program)
            .args(args)
            .output()
            .unwrap_or_else(|error| panic!("start {program}: {error}"))
    }

    /// A command that will run in it.
    pub fn command(&self, program: &str) -> Command {
        self.netns.command(program)
    }

    /// The processes that are in it.
    pub fn pids(&self) -> Vec<i32> {
        let output = Command::new("ip")
            .args(["netns", "pids", &self.name])
            .output();
        let text = output.map(|output| output.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .collect()
    }

    /// Makes a veth pair with one end here and one in `other`, both up; returns both indices.
    pub async fn veth(&self, name: &str, other: &Self, peer: &str) -> (IfIndex, IfIndex) {
        let kind = NewLinkKind::Veth(VethPeer {
            name: peer.to_owned(),
            mac: None,
            mtu: None,
            netns: Some(other.netns.fd()),
            up: true,
        });
        let here = self
            .netlink
            .add_link(&NewLink::new(name, kind))
            .await
            .expect("make a veth pair");
        let there = other
            .netlink
            .link_by_name(peer)
            .expect("look for the other end")
            .expect("the other end")
            .index;
        (here, there)
    }

    /// Adds an address to a device.
    pub async fn address(&self, ifindex: IfIndex, address: &str) {
        let address: IpNetwork = address.parse().expect("an address with its prefix length");
        self.netlink
            .add_address(&Address::new(ifindex, address))
            .await
            .expect("add an address");
    }
}

impl Drop for TestNs {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the name shows where it came from.
        let _ = NetNs::delete(&self.name);
    }
}

/// Runs a test on a runtime of its own. The log of a failed one says what the code under test found.
pub fn run<F: Future<Output = ()>>(test: F) {
    let level = tracing_subscriber::filter::LevelFilter::INFO;
    // Another test of the same program may have set it up.
    let _ = tracing_subscriber::fmt()
        .with_test_writer()
        .with_max_level(level)
        .try_init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("start a runtime");
    runtime.block_on(test);
}

/// A limit on a slow machine, such as an emulated one: `CALI_LAB_PATIENCE` times as long.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    let factor = std::env::var("CALI_LAB_PATIENCE")
        .ok()
        .and_then(|text| text.parse().ok());
    limit * factor.unwrap_or(1)
}

/// Waits until `condition` yields a value; panics with what it last said after `limit`, or longer on a slow machine
/// ([`patient`]).
pub fn eventually<T, E: Display>(
    limit: Duration,
    mut condition: impl FnMut() -> Result<T, E>,
) -> T {
    let limit = patient(limit);
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        match condition() {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < end, "not within {limit:?}: {error}"),
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
