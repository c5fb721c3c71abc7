//! The programs `iptables-save` and `iptables-restore`, in the variant that this host uses.

use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cali_netlink::NetNs;
use cali_netlink::nft::{Family, Nft};

use crate::calc::IpVersion;
use crate::iptables::{OWN_CHAIN, Observed, Table};

const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];

/// A program that takes longer is ended. The lock of the legacy tables is waited for within this time.
const LIMIT: Duration = Duration::from_secs(30);
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// Which kernel interface the rules go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Variant {
    /// `ip_tables`, the interface of old.
    Legacy,
    /// nf_tables, by the programs that translate.
    Nft,
}

impl Variant {
    /// Its name in program names.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iptables-{}", self.name())
    }
}

/// Why a program did not do what it was to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// The line of input that it objects to, from 1, where it says so.
    pub(super) line: Option<usize>,
    /// Its words.
    pub(super) reason: String,
}

/// The programs of one variant in one network namespace.
#[derive(Debug, Clone)]
pub struct Tools {
    netns: NetNs,
    variant: Variant,
    /// How long the lock of the legacy tables is waited for, and the pause between tries (zero: the program's own).
    lock: (Duration, Duration),
}

impl Tools {
    /// The programs of `variant`.
    #[must_use]
    pub fn new(netns: NetNs, variant: Variant) -> Self {
        Self {
            netns,
            variant,
            lock: (LOCK_TIMEOUT, Duration::ZERO),
        }
    }

    /// The variant that this host's other programs use: where the kubelet or kube-proxy has left its hint, else where
    /// more rules are, else nf_tables. A variant whose programs are not installed is not chosen.
    #[must_use]
    pub fn detect(netns: &NetNs) -> Variant {
        let look = |variant| -> Option<(bool, usize)> {
            let tools = Self::new(netns.clone(), variant);
            let mut found = (false, 0);
            for version in VERSIONS {
                let seen = tools.save(version).ok()?;
                found = (found.0 || seen.kubernetes, found.1 + seen.rules);
            }
            Some(found)
        };
        match (look(Variant::Legacy), look(Variant::Nft)) {
            (Some(_), None) => Variant::Legacy,
            (None, _) => Variant::Nft,
            (Some((legacy_hint, legacy)), Some((nft_hint, nft))) => {
                if nft_hint || !legacy_hint && nft >= legacy {
                    Variant::Nft
                } else {
                    Variant::Legacy
                }
            }
        }
    }

    /// `iptablesLockTimeout` and `iptablesLockProbeInterval`; zero stands for the default.
    pub(super) fn set_lock(&mut self, timeout: Duration, probe: Duration) {
        let timeout = if timeout.is_zero() {
            LOCK_TIMEOUT
        } else {
            timeout
        };
        self.lock = (timeout.min(LIMIT), probe);
    }

    /// The variant.
    #[must_use]
    pub const fn variant(&self) -> Variant {
        self.variant
    }

    /// Whether a run of this program has left chains here. Others that name theirs alike, such as Calico itself, are not
    /// meant. Starts a program only where it may be so.
    #[must_use]
    pub(in crate::dataplane) fn holds_ours(&self, nft: &Nft) -> bool {
        match self.variant {
            Variant::Nft => nft.chains(None).is_ok_and(|chains| {
                chains.iter().any(|listed| {
                    matches!(listed.table.family, Family::Ip | Family::Ip6)
                        && *listed.table.name == *Table::Filter.name()
                        && *listed.chain.name == *OWN_CHAIN
                })
            }),
            Variant::Legacy => VERSIONS.into_iter().any(|version| {
                self.legacy_in_use(version) && self.save(version).is_ok_and(|seen| seen.is_cali())
            }),
        }
    }

    fn legacy_in_use(&self, version: IpVersion) -> bool {
        let names = match version {
            IpVersion::V4 => "ip_tables_names",
            IpVersion::V6 => "ip6_tables_names",
        };
        let path = format!("/proc/thread-self/net/{names}");
        let read = self.netns.run(|| std::fs::read_to_string(path));
        read.is_ok_and(|read| read.is_ok_and(|names| !names.trim().is_empty()))
    }

    fn program(&self, version: IpVersion, what: &str) -> String {
        let six = match version {
            IpVersion::V4 => "",
            IpVersion::V6 => "6",
        };
        format!("ip{six}tables-{}-{what}", self.variant.name())
    }

    /// Reads one family's tables. Those that are not in use are not brought into use.
    pub(super) fn save(&self, version: IpVersion) -> Result<Observed, Failure> {
        let program = self.program(version, "save");
        let mut command = self.netns.command(&program);
        let (output, _) = run(&program, &mut command, "")?;
        Ok(Observed::parse(&output))
    }

    /// Feeds one family's changes; returns the process id of the program, which notifications name.
    pub(super) fn restore(&self, version: IpVersion, input: &str) -> Result<u32, Failure> {
        let program = self.program(version, "restore");
        let mut command = self.netns.command(&program);
        let (timeout, probe) = self.lock;
        let seconds = timeout.as_secs().max(1).to_string();
        command.args(["--noflush", "--wait", &seconds]);
        if self.variant == Variant::Legacy && !probe.is_zero() {
            let micros = probe.as_micros().to_string();
            command.args(["--wait-interval", &micros]);
        }
        run(&program, &mut command, input).map(|(_, pid)| pid)
    }
}

/// Runs a program with some input; its output and process id, or what it complains about.
fn run(program: &str, command: &mut Command, input: &str) -> Result<(String, u32), Failure> {
    let fail = |reason: String| Failure { line: None, reason };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fail(format!("{program} cannot be started: {error}")))?;
    let pid = child.id();
    let stdin = child.stdin.take();
    let (output, errors) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let input = input.to_owned();
    // A program that ends early closes the pipe: its own words say why.
    let feeder = std::thread::spawn(move || stdin.map(|mut pipe| pipe.write_all(input.as_bytes())));
    let status = wait(&mut child);
    let _ = feeder.join();
    let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    let (output, errors) = (text(output), text(errors));
    match status {
        Ok(status) if status.success() => Ok((output, pid)),
        Ok(status) => Err(Failure {
            line: line_number(&errors),
            reason: format!("{program}: {status}: {}", said(&errors)),
        }),
        Err(error) => Err(fail(format!("{program}: {error}"))),
    }
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus, String> {
    let end = Instant::now() + LIMIT;
    let mut pause = Duration::from_micros(200);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() > end => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("not done within {LIMIT:?}, ended"));
            }
            Ok(None) => std::thread::sleep(pause),
            Err(error) => return Err(error.to_string()),
        }
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

/// The first lines of a complaint, in one.
fn said(errors: &str) -> String {
    let lines: Vec<&str> = errors
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("Try `") && !line.starts_with('#'))
        .take(3)
        .collect();
    lines.join("; ")
}

/// `line 7`, `line: 7` or `line 7:` of a complaint.
fn line_number(errors: &str) -> Option<usize> {
    errors.match_indices("line").find_map(|(at, word)| {
        let rest = errors[at + word.len()..].trim_start_matches([':', ' ']);
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_name_their_line() {
        for (text, line) in [
            (
                "iptables-restore v1.8.9 (legacy): Couldn't load target `x':No such file\n\nError occurred at line: 3\n",
                Some(3),
            ),
            ("iptables-restore: line 12 failed\n", Some(12)),
            (
                "iptables-nft-restore v1.8.9 (nf_tables): \nline 5: RULE_APPEND failed (Invalid argument): rule in chain a\n",
                Some(5),
            ),
            ("Another app is currently holding the xtables lock\n", None),
        ] {
            assert_eq!(line_number(text), line, "{text}");
        }
    }
}
