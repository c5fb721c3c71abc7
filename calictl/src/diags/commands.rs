//! The programs whose output belongs into the archive of a node, and how one of them is run.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::PIECE_LIMIT;

/// For one program. A ruleset of 10,000 policies takes `nft` some seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// File in the archive, and the command line.
pub(super) const OF_A_NODE: [(&str, &str); 27] = [
    ("host/date.txt", "date --iso-8601=seconds"),
    ("host/hostname.txt", "hostname"),
    ("host/uname.txt", "uname -a"),
    ("host/uptime.txt", "uptime"),
    ("network/links.txt", "ip -d -s link show"),
    ("network/addresses.txt", "ip address show"),
    ("network/routes-v4.txt", "ip -4 route show table all"),
    ("network/routes-v6.txt", "ip -6 route show table all"),
    ("network/rules-v4.txt", "ip -4 rule show"),
    ("network/rules-v6.txt", "ip -6 rule show"),
    ("network/nexthops.txt", "ip nexthop show"),
    ("network/neighbours.txt", "ip -s neigh show"),
    ("network/fdb.txt", "bridge fdb show"),
    ("network/tunnels.txt", "ip -d tunnel show"),
    ("network/xfrm.txt", "ip xfrm state count"),
    ("network/wireguard.txt", "wg show all"),
    ("network/sockets.txt", "ss -tunap"),
    ("network/counters.txt", "nstat -asz"),
    ("rules/nft.txt", "nft -n -a list ruleset"),
    ("rules/iptables.txt", "iptables-save -c"),
    ("rules/ip6tables.txt", "ip6tables-save -c"),
    ("rules/ipset.txt", "ipset list"),
    ("rules/conntrack.txt", "conntrack -S"),
    (
        "host/sysctl-net.txt",
        "sysctl net.ipv4 net.ipv6 net.netfilter",
    ),
    ("host/modules.txt", "lsmod"),
    ("host/memory.txt", "free -m"),
    (
        "host/processes.txt",
        "ps -eo pid,ppid,etime,rss,time,args --sort=pid",
    ),
];

/// What a command prints on standard output, followed by what it complains about.
///
/// # Errors
/// It is not installed, takes too long, or fails without having printed anything.
pub(super) async fn run(line: &str) -> Result<String> {
    let words: Vec<&str> = line.split(' ').collect();
    argv(&words).await.map(|octets| {
        let mut text = String::from_utf8_lossy(&octets).into_owned();
        if !text.ends_with('\n') {
            text.push('\n');
        }
        format!("$ {line}\n{text}")
    })
}

/// The octets that a command prints, at most [`PIECE_LIMIT`] of them.
pub(super) async fn argv(words: &[&str]) -> Result<Vec<u8>> {
    let (program, arguments) = words.split_first().context("no program is named")?;
    let conversation = async {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => anyhow::anyhow!("{program} is not installed"),
                _ => anyhow::Error::from(error).context(format!("cannot start {program}")),
            })?;
        let (output, complaints) =
            tokio::join!(bounded(child.stdout.take()), bounded(child.stderr.take()));
        let (output, complaints) = (output?, complaints?);
        let status = child.wait().await.context("it cannot be waited for")?;
        if !status.success() && output.is_empty() {
            let complaints = String::from_utf8_lossy(&complaints);
            bail!("{program} ended with {status}: {}", complaints.trim());
        }
        Ok(output)
    };
    tokio::time::timeout(cali_lab::patient(LIMIT), conversation)
        .await
        .unwrap_or_else(|_| bail!("{program} took longer than {LIMIT:?}"))
}

/// Reads to the end and keeps the first part: a program must not wait for its reader.
async fn bounded(from: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>> {
    let mut kept = Vec::new();
    let Some(mut from) = from else {
        return Ok(kept);
    };
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut buffer).await.context("cannot read")?;
        if count == 0 {
            return Ok(kept);
        }
        let room = PIECE_LIMIT.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..count.min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_fails_or_is_missing_says_so() {
        assert_eq!(run("echo a b").await.expect("echo"), "$ echo a b\na b\n");
        let missing = run("no-such-program-here x").await.expect_err("missing");
        assert_eq!(missing.to_string(), "no-such-program-here is not installed");
        let failed = run("cat /no/such/file").await.expect_err("fails");
        assert!(failed.to_string().contains("No such file"), "{failed}");
    }

    #[tokio::test]
    async fn more_than_the_limit_is_read_and_dropped() {
        let octets = argv(&["head", "-c", "20000000", "/dev/zero"]).await;
        assert_eq!(octets.expect("zeros").len(), PIECE_LIMIT);
    }
}
