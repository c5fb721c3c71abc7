//! Traffic that notices: a ping that counts losses, a TCP transfer that must not break.

use crate::lab::Lab;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::Child;

/// A running `ping -i 0.01`.
#[derive(Debug)]
pub struct Ping {
    child: Child,
    what: String,
}

/// What a ping counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    pub sent: u64,
    pub received: u64,
}

impl Count {
    pub fn lost(self) -> u64 {
        self.sent - self.received
    }
}

impl Ping {
    /// Starts a ping every 10 ms from a pod to an address; it ends by itself after two minutes.
    pub fn start(lab: &Lab, from: &str, to: &str) -> Result<Self> {
        let child = lab.spawn(from, &["ping", "-n", "-q", "-i", "0.01", "-w", "120", to])?;
        Ok(Self {
            child,
            what: format!("{from} -> {to}"),
        })
    }

    /// Ends the ping and reads its summary.
    pub fn stop(mut self) -> Result<Count> {
        // `ip netns exec` replaces itself by the command, so the child is ping itself.
        kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            Signal::SIGINT,
        )
        .context("ping has ended early")?;
        let mut text = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            std::io::Read::read_to_string(&mut stdout, &mut text)?;
        }
        self.child.wait()?;
        count(&text).with_context(|| format!("{}: no summary in {text:?}", self.what))
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `120 packets transmitted, 118 received, ...`; the last one may still be on its way when ping is ended.
pub(crate) fn count(summary: &str) -> Option<Count> {
    let line = summary
        .lines()
        .find(|line| line.contains("packets transmitted"))?;
    let mut numbers = line
        .split(|character: char| !character.is_ascii_digit())
        .filter(|word| !word.is_empty());
    let sent = numbers.next()?.parse().ok()?;
    let received: u64 = numbers.next()?.parse().ok()?;
    Some(Count {
        sent,
        received: received.min(sent),
    })
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
        crate::eventually(std::time::Duration::from_secs(5), || {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_ping_is_read() {
        let text = "PING 10.0.0.1\n\n--- 10.0.0.1 ping statistics ---\n120 packets transmitted, 118 received, 1.66667% packet loss, time 1208ms\n";
        assert_eq!(
            count(text),
            Some(Count {
                sent: 120,
                received: 118
            })
        );
        assert_eq!(count("nothing"), None);
    }
}
