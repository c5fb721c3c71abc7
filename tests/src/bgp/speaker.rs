//! What every speaker of a case is told and asked, whoever wrote it.

use crate::bgp::process::Process;
use crate::bgp::route::{Announcement, Route, listed};
use crate::bgp::segment::{Host, Segment};
use crate::bgp::{bird, cali, exabgp, frr, gobgp, openbgpd};
use anyhow::Result;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// How long sessions and routes may take. Sessions come up within two seconds; the rest is for a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);
/// Lines of each log that a failed test shows.
const SHOWN: usize = 60;
/// Hold time of all sessions, in seconds.
pub const HOLD: u16 = 9;
/// Restart time of graceful restart that all speakers announce, in seconds.
pub const RESTART: u16 = 40;

/// Restart time where routes are long-lived stale after it, in seconds.
pub const SHORT_RESTART: u16 = 2;
/// Long-lived stale time of all speakers, in seconds.
pub const LONG_LIVED: u32 = 3600;
/// Interval of BFD's packets in milliseconds, of which five may be missing.
pub const BFD_INTERVAL: u16 = 100;

/// What a speaker does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub asn: u32,
    pub neighbours: Vec<Neighbour>,
    pub announcements: Vec<Announcement>,
    /// A BMP station of ours, ADDRESS:PORT.
    pub station: Option<String>,
}

/// One session. Routes of the family of its address are exchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    pub address: IpAddr,
    pub asn: u32,
    /// TCP MD5 (RFC 2385).
    pub password: Option<String>,
    /// Restarter and helper (RFC 4724).
    pub graceful_restart: bool,
    /// Send all paths and take all (RFC 7911).
    pub add_path: bool,
    /// The neighbour is our route reflector client (RFC 4456).
    pub client: bool,
    /// Routes of both families over an IPv6 session, those of IPv4 with IPv6 next hops (RFC 8950).
    pub extended: bool,
    /// Long-lived graceful restart (RFC 9494), after a restart time of [`SHORT_RESTART`].
    pub long_lived: bool,
    /// The path is watched by BFD (RFC 5882).
    pub bfd: bool,
    /// The neighbour may be more than one hop away, also for BFD.
    pub far: bool,
    /// `bgpd` waits for the neighbour to dial.
    pub waits: bool,
}

impl Settings {
    /// A speaker with a session to each of these hosts and families.
    pub fn new(asn: u32, neighbours: impl IntoIterator<Item = Neighbour>) -> Self {
        Self {
            asn,
            neighbours: neighbours.into_iter().collect(),
            announcements: Vec::new(),
            station: None,
        }
    }

    pub fn announce(mut self, announcements: impl IntoIterator<Item = Announcement>) -> Self {
        self.announcements.extend(announcements);
        self
    }

    /// Without the announcement of this prefix.
    pub fn without(&self, prefix: &str) -> Self {
        let mut settings = self.clone();
        let before = settings.announcements.len();
        settings
            .announcements
            .retain(|announcement| announcement.prefix.to_string() != prefix);
        assert_ne!(
            before,
            settings.announcements.len(),
            "{prefix} is not announced"
        );
        settings
    }

    /// The same with a change of every session.
    pub fn each(&self, change: impl Fn(&mut Neighbour)) -> Self {
        let mut settings = self.clone();
        settings.neighbours.iter_mut().for_each(change);
        settings
    }
}

impl Neighbour {
    /// A session without options to one of a host's addresses.
    pub fn of(host: &Host, v4: bool, asn: u32) -> Self {
        Self {
            address: host.address(v4),
            asn,
            password: None,
            graceful_restart: false,
            add_path: false,
            client: false,
            extended: false,
            long_lived: false,
            bfd: false,
            far: false,
            waits: false,
        }
    }

    /// A session over link-local addresses with routes of both families.
    pub fn on_link(host: &Host, asn: u32) -> Self {
        Self {
            address: host.link_local(),
            extended: true,
            ..Self::of(host, false, asn)
        }
    }

    /// Whether the address means something on one interface only.
    pub fn is_link_local(&self) -> bool {
        matches!(self.address, IpAddr::V6(address) if address.is_unicast_link_local())
    }

    /// A session over each family.
    pub fn both(host: &Host, asn: u32) -> [Self; 2] {
        [true, false].map(|v4| Self::of(host, v4, asn))
    }
}

/// Whether a speaker begins or comes back after its process was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Fresh,
    /// As the restarting side of graceful restart.
    Again,
}

/// A daemon under test.
pub trait Speaker {
    fn seat(&self) -> &Seat;

    /// Starts the daemon and waits until it can be asked.
    fn start(&mut self, settings: &Settings, start: Start) -> Result<()>;

    /// Ends the BGP process as a crash does; kernel routes stay.
    fn crash(&mut self) -> Result<()>;

    /// Changes a running daemon: its announcements, and what else it can change without a restart.
    fn configure(&mut self, settings: &Settings) -> Result<()>;

    /// Whether the session with this neighbour is up.
    fn established(&mut self, neighbour: IpAddr) -> Result<bool>;

    /// All paths that were learned from neighbours and can be used.
    fn table(&mut self) -> Result<Vec<Route>>;

    /// Sends ROUTE-REFRESH to this neighbour (RFC 2918).
    fn ask_for_refresh(&mut self, neighbour: IpAddr) -> Result<()>;

    /// Ends the session with this neighbour with these words (RFC 9003).
    fn shut(&mut self, neighbour: IpAddr, words: &str) -> Result<()> {
        anyhow::bail!("no command ends the session with {neighbour} with {words:?}")
    }

    /// ROUTE-REFRESH messages of this neighbour so far, requests and markers (RFC 7313).
    fn refreshes(&mut self, neighbour: IpAddr) -> Result<u64> {
        anyhow::bail!("ROUTE-REFRESH messages of {neighbour} are not counted")
    }

    /// What its BGP process prints.
    fn log(&self) -> PathBuf {
        self.seat().file("log")
    }

    /// Whether it keeps the routes of a neighbour that restarts (RFC 4724 §4.2).
    fn keeps_routes(&self) -> bool {
        true
    }

    /// Whether its best paths go to the kernel.
    fn has_kernel_routes(&self) -> bool {
        true
    }
}

/// What each speaker has: a place on the segment, and a folder for its files.
#[derive(Debug)]
pub struct Seat {
    pub host: Arc<Host>,
    pub folder: PathBuf,
}

impl Seat {
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        let file = self.file(name);
        std::fs::write(&file, content)?;
        Ok(file)
    }

    /// Our address of a session.
    pub fn source(&self, neighbour: &Neighbour) -> IpAddr {
        if neighbour.is_link_local() {
            self.host.link_local()
        } else {
            self.host.address(neighbour.address.is_ipv4())
        }
    }

    /// Waits until the daemon answers; what it said last, or how it ended, is the error.
    pub fn ready<T>(process: &mut Process, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
        let end = std::time::Instant::now() + LIMIT;
        loop {
            match probe() {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    process.check()?;
                    if std::time::Instant::now() > end {
                        return Err(error.context("the daemon does not answer"));
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Everything that can take part in a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    Cali,
    /// A release of BIRD, by the name of its package in the cache.
    Bird(&'static str),
    Frr(&'static str),
    GoBgp(&'static str),
    OpenBgpd,
    ExaBgp,
}

/// A segment and the speakers on it; everything is gone when it is dropped.
pub struct Stage {
    segment: Segment,
    folder: TempDir,
    speakers: usize,
}

impl Stage {
    pub fn new() -> Result<Self> {
        Ok(Self {
            segment: Segment::new(),
            folder: tempfile::tempdir()?,
            speakers: 0,
        })
    }

    /// The files of all speakers.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// The end of what each daemon has logged, for a failed test.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for speaker in 1..=self.speakers {
            let folder = self.folder.path().join(speaker.to_string());
            let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let logs = files.map(|file| file.path()).filter(|file| {
                file.extension()
                    .or(file.file_name())
                    .is_some_and(|name| name == "log")
            });
            for log in logs {
                let content = std::fs::read_to_string(&log).unwrap_or_default();
                let lines: Vec<&str> = content.lines().collect();
                let end = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
                text.push_str(&format!("== {}\n{end}\n", log.display()));
            }
        }
        text
    }

    /// A further speaker, not yet started.
    pub fn speaker(&mut self, product: Product) -> Result<Box<dyn Speaker>> {
        self.speakers += 1;
        let folder = self.folder.path().join(self.speakers.to_string());
        std::fs::create_dir(&folder)?;
        let seat = Seat {
            host: self.segment.host(),
            folder,
        };
        Ok(match product {
            Product::Cali => Box::new(cali::Cali::new(seat)),
            Product::Bird(package) => Box::new(bird::Bird::new(seat, package)?),
            Product::Frr(package) => Box::new(frr::Frr::new(seat, package)?),
            Product::GoBgp(package) => Box::new(gobgp::GoBgp::new(seat, package)?),
            Product::OpenBgpd => Box::new(openbgpd::OpenBgpd::new(seat)?),
            Product::ExaBgp => Box::new(exabgp::ExaBgp::new(seat)?),
        })
    }
}

/// Waits until a speaker's sessions with all its neighbours are up.
pub fn all_established(speaker: &mut dyn Speaker, settings: &Settings) -> Result<()> {
    for neighbour in &settings.neighbours {
        wait(|| {
            if speaker.established(neighbour.address)? {
                Ok(())
            } else {
                anyhow::bail!("the session with {} is not up", neighbour.address)
            }
        })?;
    }
    Ok(())
}

/// Waits until a speaker's table is exactly this.
pub fn table_is(speaker: &mut dyn Speaker, expected: &[Route]) -> Result<()> {
    let mut expected = expected.to_vec();
    expected.sort();
    wait(|| {
        let mut seen = speaker.table()?;
        seen.sort();
        anyhow::ensure!(
            seen == expected,
            "expected routes\n{}\nseen\n{}",
            listed(&expected),
            listed(&seen)
        );
        Ok(())
    })
}

/// Waits until a condition holds; the error is what it said last.
pub fn wait<T>(mut condition: impl FnMut() -> Result<T>) -> Result<T> {
    let end = std::time::Instant::now() + LIMIT;
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if std::time::Instant::now() > end => {
                return Err(error.context(format!("not within {LIMIT:?}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(25)),
        }
    }
}
