//! Traffic that notices: a ping that counts losses, a TCP transfer that must not break, and a greeting for whoever gets through.

use crate::lab::Lab;
use anyhow::{Context, Result, ensure};
use cali_netlink::NetNs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// ICMP errors that a ping keeps.
const ERRORS_KEPT: usize = 20;

/// A running `ping -i 0.01`, whose answers are noted by sequence number.
#[derive(Debug)]
pub struct Ping {
    child: Child,
    what: String,
    answered: Arc<Mutex<BTreeSet<u64>>>,
    errors: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<String>>,
}

/// What a ping counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    pub sent: u64,
    /// Sequence numbers without an answer. The very last one may still be on its way when ping is ended and is not counted.
    pub lost: u64,
}

impl Ping {
    /// Starts a ping every 10 ms from a pod to an address; it ends by itself after two minutes.
    pub fn start(lab: &Lab, from: &str, to: &str) -> Result<Self> {
        Self::in_namespace(&lab.netns(from), to)
    }

    /// The same from a network namespace.
    pub fn in_namespace(namespace: &str, to: &str) -> Result<Self> {
        Self::every(
            namespace,
            to,
            Duration::from_millis(10),
            Duration::from_secs(120),
        )
    }

    /// A ping in this rhythm, which ends by itself after `limit`.
    pub fn every(namespace: &str, to: &str, interval: Duration, limit: Duration) -> Result<Self> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace, "ping"]);
        Self::run(command, format!("{namespace} -> {to}"), to, interval, limit)
    }

    /// A ping every 10 ms from a namespace without a name, which ends by itself after `limit`.
    pub fn within(namespace: &NetNs, to: &str, limit: Duration) -> Result<Self> {
        let interval = Duration::from_millis(10);
        let what = format!("{namespace} -> {to}");
        Self::run(namespace.command("ping"), what, to, interval, limit)
    }

    fn run(
        mut command: Command,
        what: String,
        to: &str,
        interval: Duration,
        limit: Duration,
    ) -> Result<Self> {
        // Not `-w`: with it, ping ends at the first ICMP error.
        let count = (limit.as_secs_f32() / interval.as_secs_f32())
            .ceil()
            .to_string();
        let interval = interval.as_secs_f32().to_string();
        let mut child = command
            .args(["-n", "-i", &interval, "-c", &count, to])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start ping")?;
        let stdout = child.stdout.take().context("ping has no output")?;
        let answered = Arc::new(Mutex::new(BTreeSet::new()));
        let noted = Arc::clone(&answered);
        let errors = Arc::new(Mutex::new(Vec::new()));
        let failed = Arc::clone(&errors);
        let reader = std::thread::spawn(move || {
            let mut last = String::new();
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                match sequence(&line) {
                    Some(number) => {
                        noted
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .insert(number);
                    }
                    None if line.contains("packets transmitted") => last = line,
                    None if line.starts_with("From ") => {
                        let mut errors = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        if errors.len() < ERRORS_KEPT {
                            errors.push(line);
                        }
                    }
                    None => {}
                }
            }
            last
        });
        let ping = Self {
            child,
            what,
            answered,
            errors,
            reader: Some(reader),
        };
        ping.flow(1)?;
        Ok(ping)
    }

    /// Waits until so many more have been answered: traffic flows now.
    pub fn flow(&self, more: usize) -> Result<()> {
        let answered = || {
            self.answered
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .len()
        };
        let enough = answered() + more;
        crate::eventually(crate::patient(Duration::from_secs(20)), || {
            let now = answered();
            if now >= enough {
                Ok(())
            } else {
                Err(format!(
                    "{}: {now} pings answered, waiting for {enough}",
                    self.what
                ))
            }
        })
        .map(drop)
        .map_err(anyhow::Error::msg)
    }

    /// Sequence numbers without an answer before the last one that was answered: lost, or answered later out of order.
    #[must_use]
    pub fn missing(&self) -> BTreeSet<u64> {
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let last = answered.last().copied().unwrap_or_default();
        (1..last)
            .filter(|number| !answered.contains(number))
            .collect()
    }

    /// What routers and the node itself said of packets that they could not send on, since the last call.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        std::mem::take(&mut self.errors.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the ping and reads its summary.
    pub fn stop(mut self) -> Result<Count> {
        // `ip netns exec` replaces itself by the command, so the child is ping itself.
        kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            Signal::SIGINT,
        )
        .context("ping has ended early")?;
        self.child.wait()?;
        let reader = self.reader.take().context("ping was stopped before")?;
        let summary = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the reader of ping panicked"))?;
        let sent =
            sent(&summary).with_context(|| format!("{}: no summary in {summary:?}", self.what))?;
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Count {
            sent,
            lost: lost(sent, &answered),
        })
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `64 bytes from 10.0.0.1: icmp_seq=7 ttl=62 time=0.05 ms`; errors name a sequence number, too, but no time.
fn sequence(line: &str) -> Option<u64> {
    let rest = line.split_once("icmp_seq=")?.1;
    let answered = line.contains(" time=");
    answered
        .then(|| rest.split(' ').next()?.parse().ok())
        .flatten()
}

/// `120 packets transmitted, 118 received, ...`
fn sent(summary: &str) -> Option<u64> {
    summary.split(' ').next()?.parse().ok()
}

fn lost(sent: u64, answered: &BTreeSet<u64>) -> u64 {
    let settled = if answered.contains(&sent) {
        sent
    } else {
        sent.saturating_sub(1)
    };
    (1..=settled)
        .filter(|number| !answered.contains(number))
        .count() as u64
}

/// A TCP transfer that sends numbered blocks and checks that they arrive, over `socat` in two pods.
#[derive(Debug)]
pub struct Transfer {
    server: Child,
    client: Child,
}

impl Transfer {
    /// Starts a stream that lasts until [`Transfer::check`].
    pub fn start(lab: &Lab, from: &str, to: &str, address: &str, port: u16) -> Result<Self> {
        let server = lab.spawn(to, &["nc", "-l", "-p", &port.to_string()])?;
        crate::eventually(Duration::from_secs(5), || {
            let listening = lab
                .exec(to, &["ss", "-Hltn", &format!("sport = :{port}")])
                .map_err(|error| error.to_string())?;
            if listening.is_empty() {
                Err("nobody listens".to_owned())
            } else {
                Ok(())
            }
        })
        .map_err(anyhow::Error::msg)?;
        // One numbered line every 10 ms.
        let script =
            format!("i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done | nc {address} {port}");
        let client = lab.spawn(from, &["sh", "-c", &script])?;
        Ok(Self { server, client })
    }

    /// Ends the stream; every line must have arrived, in order. Returns how many.
    pub fn check(mut self) -> Result<u64> {
        ensure!(
            self.client.try_wait()?.is_none(),
            "the sending side of the transfer has ended"
        );
        ensure!(
            self.server.try_wait()?.is_none(),
            "the receiving side of the transfer has ended"
        );
        kill(
            Pid::from_raw(i32::try_from(self.server.id())?),
            Signal::SIGTERM,
        )?;
        let mut text = String::new();
        if let Some(mut stdout) = self.server.stdout.take() {
            std::io::Read::read_to_string(&mut stdout, &mut text)?;
        }
        // The last line may be cut.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut next = 1;
        for line in whole.lines() {
            ensure!(
                line.parse() == Ok(next),
                "line {next} of the transfer reads {line:?}"
            );
            next += 1;
        }
        ensure!(next > 1, "nothing arrived");
        Ok(next - 1)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        for child in [&mut self.client, &mut self.server] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Tells everybody who connects to this port in the namespace from which address he comes, as long as the test runs.
///
/// # Panics
/// If the port is taken.
pub fn greet(namespace: &NetNs, port: u16) {
    let listener = namespace.run(move || TcpListener::bind(("0.0.0.0", port)));
    let listener = listener.expect("the namespace").expect("a free port");
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            // Who has gone needs no answer.
            let _ = stream.write_all(from.ip().to_string().as_bytes());
        }
    });
}

/// What somebody in the namespace who connects is told within a second; nothing if nobody listens or lets it.
pub fn asked(from: &NetNs, to: SocketAddr) -> Option<String> {
    const LIMIT: Duration = Duration::from_secs(1);
    let ask = move || {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT).ok()?;
        let mut text = String::new();
        stream.set_read_timeout(Some(60 * LIMIT)).ok()?;
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    };
    from.run(ask).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_counted_by_sequence_number() {
        assert_eq!(
            sequence("64 bytes from 10.0.0.1: icmp_seq=7 ttl=62 time=0.05 ms"),
            Some(7)
        );
        assert_eq!(
            sequence("From 10.0.1.254 icmp_seq=2 Time to live exceeded"),
            None
        );
        assert_eq!(
            sent("120 packets transmitted, 118 received, 1.66667% packet loss, time 1208ms"),
            Some(120)
        );
        assert_eq!(
            lost(4, &BTreeSet::from([1, 2, 3])),
            0,
            "the last one is on its way"
        );
        assert_eq!(lost(5, &BTreeSet::from([1, 3])), 2);
        assert_eq!(lost(3, &BTreeSet::from([1, 3])), 1);
    }
}
