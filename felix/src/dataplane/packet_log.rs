//! Writes down the packets of rules with action Log: one line in the node's log for each, with the words of
//! `logPrefix`.
//!
//! Lines are bounded: what comes beyond [`LINES`] in a second is counted and told as one line. A group that somebody else
//! reads (`ulogd`, say) is left to them and asked for again later.

use std::time::Duration;

use cali_api::Kind;
use cali_netlink::nflog::{LoggedPacket, PacketLog};
use cali_netlink::{Error, NetNs};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::compile::log::{self, Logged};

/// Lines in a second for each direction.
const LINES: u32 = 100;
const SECOND: Duration = Duration::from_secs(1);
/// Until a group is asked for again.
const RETRY: Duration = Duration::from_secs(60);
/// What Calico writes unless told otherwise.
const PREFIX: &str = "calico-packet";

/// The readers of both groups; they end with it.
pub(super) struct PacketLogger {
    prefix: watch::Sender<String>,
    _readers: JoinSet<()>,
}

impl PacketLogger {
    /// Starts to read. Needs a running tokio runtime.
    pub(super) fn start(netns: &NetNs) -> Self {
        let (prefix, words) = watch::channel(PREFIX.to_owned());
        let mut readers = JoinSet::new();
        for group in log::GROUPS {
            readers.spawn(read(netns.clone(), group, words.clone()));
        }
        Self {
            prefix,
            _readers: readers,
        }
    }

    /// Takes `logPrefix`.
    pub(super) fn set_prefix(&self, prefix: Option<&str>) {
        let prefix = prefix.filter(|prefix| !prefix.is_empty());
        self.prefix
            .send_replace(prefix.unwrap_or(PREFIX).to_owned());
    }
}

async fn read(netns: NetNs, group: u16, prefix: watch::Receiver<String>) {
    let mut told = false;
    loop {
        let error = match PacketLog::open(&netns, group) {
            Ok(mut packets) => {
                told = false;
                follow(&mut packets, &prefix).await
            }
            Err(error) => error,
        };
        if !told {
            warn!(group, %error, "packets of rules with action Log are not written down; asked for again every minute");
            told = true;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Until the socket is broken.
async fn follow(packets: &mut PacketLog, prefix: &watch::Receiver<String>) -> Error {
    let mut budget = Budget::default();
    loop {
        let next = match budget.report_at() {
            None => packets.next().await,
            Some(at) => match tokio::time::timeout_at(at, packets.next()).await {
                Ok(next) => next,
                Err(_) => {
                    tell(&mut budget);
                    continue;
                }
            },
        };
        let packet = match next {
            Ok(packet) => packet,
            Err(error) => return error,
        };
        // Somebody else's rules may use the group as well.
        let Some(logged) = log::read(&packet.prefix) else {
            continue;
        };
        if budget.report_at().is_some_and(|at| at <= Instant::now()) {
            tell(&mut budget);
        }
        if budget.spend(Instant::now()) {
            write(&words(&prefix.borrow(), &logged), &logged, &packet);
        }
    }
}

fn tell(budget: &mut Budget) {
    let packets = budget.take_suppressed();
    info!(packets, "further packets met rules with action Log");
}

fn write(words: &str, logged: &Logged<'_>, packet: &LoggedPacket) {
    let tuple = &packet.tuple;
    info!(
        policy = logged.owner,
        direction = logged.direction,
        rule = logged.rule,
        protocol = tuple.protocol,
        source = %tuple.source,
        source_port = tuple.source_port,
        destination = %tuple.destination,
        destination_port = tuple.destination_port,
        "{words}"
    );
}

/// `logPrefix` with its specifiers filled in: `%k` the kind, `%n` the name, `%p` the name with its namespace, `%t` the tier.
/// Policies of other tiers are named `TIER.NAME`.
fn words(prefix: &str, logged: &Logged<'_>) -> String {
    if !prefix.contains('%') {
        return prefix.to_owned();
    }
    let (kind, path) = logged.owner.split_once('/').unwrap_or(("", logged.owner));
    let name = path.rsplit('/').next().unwrap_or(path);
    let kind = match kind {
        "np" => Kind::NetworkPolicy.to_string(),
        "gnp" => Kind::GlobalNetworkPolicy.to_string(),
        "pro" => Kind::Profile.to_string(),
        plural => Kind::parse(plural).map_or_else(|| plural.to_owned(), |kind| kind.to_string()),
    };
    let tier = name.split_once('.').map_or("default", |(tier, _)| tier);
    let mut text = String::new();
    let mut rest = prefix;
    while let Some((before, after)) = rest.split_once('%') {
        text.push_str(before);
        let mut specifier = after.chars();
        match specifier.next() {
            Some('k') => text.push_str(&kind),
            Some('n') => text.push_str(name),
            Some('p') => text.push_str(path),
            Some('t') => text.push_str(tier),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
        rest = specifier.as_str();
    }
    text + rest
}

/// What may still be written in this second.
#[derive(Debug, Default)]
struct Budget {
    since: Option<Instant>,
    spent: u32,
    suppressed: u64,
}

impl Budget {
    /// Whether one more line may be written now.
    fn spend(&mut self, now: Instant) -> bool {
        if self
            .since
            .is_none_or(|since| now.duration_since(since) >= SECOND)
        {
            self.since = Some(now);
            self.spent = 0;
        }
        self.spent += 1;
        if self.spent > LINES {
            self.suppressed += 1;
        }
        self.spent <= LINES
    }

    /// When to tell of what was not written.
    fn report_at(&self) -> Option<Instant> {
        (self.suppressed > 0)
            .then_some(self.since)
            .flatten()
            .map(|since| since + SECOND)
    }

    fn take_suppressed(&mut self) -> u64 {
        std::mem::take(&mut self.suppressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifiers_are_filled_in() {
        let logged = |owner| Logged {
            owner,
            direction: "ingress",
            rule: 0,
        };
        for (owner, text) in [
            (
                "gnp/security.web",
                "GlobalNetworkPolicy security.web security.web security %x",
            ),
            ("np/shop/db", "NetworkPolicy db shop/db default %x"),
            ("pro/open", "Profile open open default %x"),
        ] {
            assert_eq!(words("%k %n %p %t %x", &logged(owner)), text);
        }
        assert_eq!(words("100%", &logged("gnp/web")), "100%");
        assert_eq!(words("calico-packet", &logged("gnp/web")), "calico-packet");
    }

    #[test]
    fn lines_of_a_second_are_bounded_and_the_rest_is_counted() {
        let start = Instant::now();
        let mut budget = Budget::default();
        let written = (0..250).filter(|_| budget.spend(start)).count();
        assert_eq!(written, LINES as usize);
        assert_eq!(budget.report_at(), Some(start + SECOND));
        assert_eq!(budget.take_suppressed(), 150);
        assert_eq!(budget.report_at(), None);
        assert!(!budget.spend(start + SECOND / 2));
        assert!(budget.spend(start + SECOND));
    }
}
