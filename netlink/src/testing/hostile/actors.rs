//! Programs that change the host while we work on it. Each runs on a thread of its own, for a bounded time, and ends
//! when its handle is dropped.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::TestNs;
use crate::{
    Change, NetNs, Netlink, RouteFilter,
    route::{TABLE_MAIN, protocol},
};

/// A thread that does one thing again and again.
#[derive(Debug)]
struct Actor {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Actor {
    /// Calls `step` every `period` for `life`, then `end` once.
    fn start(
        period: Duration,
        life: Duration,
        mut step: impl FnMut() + Send + 'static,
        end: impl FnOnce() + Send + 'static,
    ) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let until = Instant::now() + life;
            while Instant::now() < until {
                step();
                match stopped.recv_timeout(period) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            end();
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let failed = thread.join().is_err();
            if !std::thread::panicking() {
                assert!(!failed, "a hostile actor has panicked; see above");
            }
        }
    }
}

/// iptables-nft changes one rule of a foreign chain, 10 times a second, as Docker and kube-proxy do on a busy host.
/// Each change is a transaction that raises the generation of nf_tables. Its chain is gone when it ends.
#[derive(Debug)]
pub struct Churn {
    changes: Arc<AtomicU32>,
    _actor: Actor,
}

impl Churn {
    /// Changes a second.
    pub const RATE: u32 = 10;
    const CHAIN: &'static str = "CHURN";

    /// Starts it, for `life` at most.
    pub fn start(ns: &TestNs, life: Duration) -> Self {
        let netns = ns.netns().clone();
        iptables(&netns, &["-N", Self::CHAIN]);
        let changes = Arc::new(AtomicU32::new(0));
        let (counter, last) = (Arc::clone(&changes), netns.clone());
        let step = move || {
            let number = counter.fetch_add(1, Ordering::Relaxed);
            let source = format!("198.51.100.{}", (number / 2) % 250);
            let verb = if number.is_multiple_of(2) { "-A" } else { "-D" };
            iptables(&netns, &[verb, Self::CHAIN, "-s", &source, "-j", "RETURN"]);
        };
        let end = move || {
            iptables(&last, &["-F", Self::CHAIN]);
            iptables(&last, &["-X", Self::CHAIN]);
        };
        let period = Duration::from_secs(1) / Self::RATE;
        Self {
            changes,
            _actor: Actor::start(period, life, step, end),
        }
    }

    /// Changes made so far.
    pub fn changes(&self) -> u32 {
        self.changes.load(Ordering::Relaxed)
    }
}

fn iptables(netns: &NetNs, args: &[&str]) {
    let output = netns
        .command("iptables-nft")
        .arg("--wait")
        .args(args)
        .output()
        .expect("start iptables-nft");
    assert!(
        output.status.success(),
        "iptables-nft {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What a [`Remover`] does.
#[derive(Debug, Clone)]
pub struct RemoverPlan {
    /// Route protocols that it leaves alone.
    pub spare: Vec<u8>,
    /// If not empty, it removes only these protocols.
    pub only: Vec<u8>,
    /// Also rules (`ManageForeignRoutingPolicyRules`).
    pub rules: bool,
    /// Also nexthop objects (`ManageForeignNextHops`).
    pub nexthops: bool,
    /// Between two sweeps. networkd sweeps when a link is configured anew.
    pub every: Duration,
    /// Ends after this time.
    pub life: Duration,
}

impl Default for RemoverPlan {
    /// networkd's defaults (`ManageForeignRoutes=yes`): it spares what the kernel made, and here what `ip` and the
    /// administrator made, which stand for its own configuration.
    fn default() -> Self {
        Self {
            spare: vec![protocol::KERNEL, protocol::BOOT, protocol::STATIC],
            only: Vec::new(),
            rules: true,
            nexthops: true,
            every: Duration::from_millis(200),
            life: Duration::from_secs(30),
        }
    }
}

impl RemoverPlan {
    fn removes(&self, protocol: u8) -> bool {
        !self.spare.contains(&protocol) && (self.only.is_empty() || self.only.contains(&protocol))
    }
}

/// What a [`Remover`] has removed so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Removed {
    /// Routes of the main table.
    pub routes: u32,
    /// Nexthop objects.
    pub nexthops: u32,
    /// Rules.
    pub rules: u32,
}

#[derive(Debug, Default)]
struct Counts {
    routes: AtomicU32,
    nexthops: AtomicU32,
    rules: AtomicU32,
}

/// Deletes routes, rules and nexthop objects that it did not make, as systemd-networkd does with
/// `ManageForeignRoutes=yes`.
#[derive(Debug)]
pub struct Remover {
    counts: Arc<Counts>,
    _actor: Actor,
}

impl Remover {
    /// Starts it in the namespace. Its first sweep is at once.
    pub fn start(ns: &TestNs, plan: RemoverPlan) -> Self {
        let netns = ns.netns().clone();
        // A socket of its own: to the kernel this is another program.
        let netlink = Netlink::open(&netns).expect("open netlink for the remover");
        let counts = Arc::new(Counts::default());
        let counted = Arc::clone(&counts);
        let (every, life) = (plan.every, plan.life);
        let step = move || sweep(&plan, &netns, &netlink, &counted);
        Self {
            counts,
            _actor: Actor::start(every, life, step, || {}),
        }
    }

    /// What it has removed so far.
    pub fn removed(&self) -> Removed {
        Removed {
            routes: self.counts.routes.load(Ordering::Relaxed),
            nexthops: self.counts.nexthops.load(Ordering::Relaxed),
            rules: self.counts.rules.load(Ordering::Relaxed),
        }
    }
}

fn sweep(plan: &RemoverPlan, netns: &NetNs, netlink: &Netlink, counts: &Counts) {
    let filter = RouteFilter {
        table: Some(TABLE_MAIN),
        ..RouteFilter::default()
    };
    // A dump that the kernel interrupts, and a route that somebody else deletes first, are no failures.
    let routes: Vec<_> = netlink
        .dump_routes(&filter)
        .unwrap_or_default()
        .into_iter()
        .filter(|route| plan.removes(route.protocol))
        .map(Change::Delete)
        .collect();
    count(&counts.routes, &netlink.apply_routes(&routes));
    if plan.nexthops {
        let nexthops: Vec<_> = netlink
            .dump_nexthops()
            .unwrap_or_default()
            .into_iter()
            .filter(|nexthop| plan.removes(nexthop.protocol))
            .map(Change::Delete)
            .collect();
        count(&counts.nexthops, &netlink.apply_nexthops(&nexthops));
    }
    if plan.rules {
        for family in ["-4", "-6"] {
            remove_rules(plan, netns, family, counts);
        }
    }
}

fn count(counter: &AtomicU32, results: &[crate::Result<()>]) {
    let removed = results.iter().filter(|result| result.is_ok()).count();
    counter.fetch_add(removed.try_into().unwrap_or(u32::MAX), Ordering::Relaxed);
}

fn remove_rules(plan: &RemoverPlan, netns: &NetNs, family: &str, counts: &Counts) {
    let ip = |args: &[&str]| {
        netns
            .command("ip")
            .arg(family)
            .args(args)
            .output()
            .expect("start ip")
    };
    // Numbers, not names: `31000: from 172.30.0.0/24 lookup 1000 proto 4`; no protocol is shown for 0.
    let listed = ip(&["-N", "-d", "rule"]);
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let priority = words.first().map(|word| word.trim_end_matches(':'));
        let protocol = words.iter().position(|word| *word == "proto");
        let protocol = protocol.and_then(|at| words.get(at + 1)?.parse().ok());
        let (Some(priority), true) = (priority, plan.removes(protocol.unwrap_or(0))) else {
            continue;
        };
        if ip(&["rule", "del", "pref", priority]).status.success() {
            counts.rules.fetch_add(1, Ordering::Relaxed);
        }
    }
}
