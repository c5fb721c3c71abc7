//! ExaBGP, which has no table: what it was told is kept from its event stream; it takes commands over a pipe.

use crate::bgp::package;
use crate::bgp::process::{Launch, Process};
use crate::bgp::route::{Announcement, Community, Route};
use crate::bgp::speaker::{HOLD, Neighbour, RESTART, Seat, Settings, Speaker, Start};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

/// An ExaBGP in its namespace.
pub struct ExaBgp {
    seat: Seat,
    package: PathBuf,
    settings: Option<Settings>,
    process: Option<Process>,
    /// Writing end of the pipe that it reads commands from.
    commands: Option<File>,
    starts: usize,
}

impl ExaBgp {
    pub fn new(seat: Seat) -> Result<Self> {
        Ok(Self {
            seat,
            package: package::folder("exabgp")?,
            settings: None,
            process: None,
            commands: None,
            starts: 0,
        })
    }

    /// A file of this start; a process left over from an earlier one has the earlier file.
    fn file(&self, name: &str) -> PathBuf {
        self.seat.file(&format!("{}-{name}", self.starts))
    }

    fn command(&mut self, neighbour: &Neighbour, words: &str) -> Result<()> {
        let pipe = self.commands.as_mut().context("ExaBGP does not run")?;
        writeln!(pipe, "neighbor {} {words}", neighbour.address)?;
        Ok(())
    }

    /// Sends a command about a prefix to all sessions of its family.
    fn tell(&mut self, announcement: &Announcement, verb: &str) -> Result<()> {
        let settings = self.settings.clone().context("ExaBGP was not started")?;
        for neighbour in &settings.neighbours {
            if neighbour.address.is_ipv4() == announcement.prefix.is_v4() {
                let route = originate(&self.seat, announcement);
                self.command(neighbour, &format!("{verb} {route}"))?;
            }
        }
        Ok(())
    }

    fn learned(&self) -> Result<Learned> {
        let mut learned = Learned::default();
        let text = std::fs::read_to_string(self.file("events.log")).unwrap_or_default();
        // The last line may be in the middle of being written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        for line in whole.lines() {
            let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            learned.take(&event).with_context(|| line.to_owned())?;
        }
        Ok(learned)
    }
}

fn originate(seat: &Seat, announcement: &Announcement) -> String {
    let prefix = announcement.prefix;
    let mut text = format!(
        "route {prefix} next-hop {}",
        seat.host.address(prefix.is_v4())
    );
    let [standard, large, extended] = announcement.words(|community| match community {
        Community::RouteTarget(a, b) => format!("target:{a}:{b}"),
        other => other.to_string(),
    });
    for (kind, words) in [
        ("community", standard),
        ("large-community", large),
        ("extended-community", extended),
    ] {
        if !words.is_empty() {
            text.push_str(&format!(" {kind} [ {} ]", words.join(" ")));
        }
    }
    text
}

fn config(seat: &Seat, settings: &Settings, script: &std::path::Path) -> Result<String> {
    let mut text = format!(
        "process api {{\n run /bin/sh {};\n encoder json;\n}}\n",
        script.display()
    );
    for neighbour in &settings.neighbours {
        session(&mut text, seat, settings, neighbour)?;
    }
    Ok(text)
}

fn session(
    text: &mut String,
    seat: &Seat,
    settings: &Settings,
    neighbour: &Neighbour,
) -> Result<()> {
    let v4 = neighbour.address.is_ipv4();
    let restart = if neighbour.graceful_restart {
        format!("graceful-restart {RESTART}; ")
    } else {
        String::new()
    };
    let add_path = if neighbour.add_path {
        "send/receive"
    } else {
        "disable"
    };
    writeln!(
        text,
        "neighbor {} {{\n local-address {};\n local-as {};\n peer-as {};\n router-id {};\n hold-time {HOLD};\n \
         family {{ {} unicast; }}\n \
         capability {{ asn4 enable; route-refresh enable; {restart}add-path {add_path}; }}",
        neighbour.address,
        seat.host.address(v4),
        settings.asn,
        neighbour.asn,
        seat.host.router_id(),
        if v4 { "ipv4" } else { "ipv6" },
    )?;
    if let Some(password) = &neighbour.password {
        writeln!(text, " md5-password '{password}';")?;
    }
    writeln!(
        text,
        " api {{ processes [ api ]; neighbor-changes; receive {{ parsed; update; }} }}\n static {{"
    )?;
    for announcement in &settings.announcements {
        if announcement.prefix.is_v4() == v4 {
            writeln!(text, "  {};", originate(seat, announcement))?;
        }
    }
    writeln!(text, " }}\n}}")?;
    Ok(())
}

impl Speaker for ExaBgp {
    fn seat(&self) -> &Seat {
        &self.seat
    }

    fn start(&mut self, settings: &Settings, _start: Start) -> Result<()> {
        self.starts += 1;
        let (events, pipe) = (self.file("events.log"), self.file("commands"));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU)?;
        let script = format!(
            // A background process would read from nowhere otherwise.
            "exec 3<&0\ncat <&3 > {} &\nexec cat {}\n",
            events.display(),
            pipe.display()
        );
        let script = self.seat.write("api", &script)?;
        let config = self
            .seat
            .write("exabgp.conf", &config(&self.seat, settings, &script)?)?;
        // Opened for both directions, so that it is never at its end and opening does not wait.
        self.commands = Some(OpenOptions::new().read(true).write(true).open(&pipe)?);
        let packages = self.package.join("usr/lib/python3/dist-packages");
        let launch = Launch::new(self.package.join("run"))
            .args(["usr/bin/python3.11", "-m", "exabgp"])
            .path(config)
            .env("PYTHONHOME", self.package.join("usr").display())
            .env("PYTHONPATH", packages.display())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("exabgp_daemon_user", "root")
            .env("exabgp_api_ack", "false")
            .env("exabgp_api_cli", "false");
        let log = self.seat.file("log");
        let mut process = Process::start("exabgp", &self.seat.host, &launch, &log)?;
        // The file is made by the process that it starts when it has read its configuration.
        Seat::ready(&mut process, || {
            ensure!(events.exists(), "the event process has not started");
            Ok(())
        })?;
        self.process = Some(process);
        self.settings = Some(settings.clone());
        Ok(())
    }

    fn crash(&mut self) -> Result<()> {
        self.commands = None;
        self.process.take().context("ExaBGP does not run")?.crash()
    }

    fn configure(&mut self, settings: &Settings) -> Result<()> {
        let before = self.settings.replace(settings.clone());
        let before = before.context("ExaBGP was not started")?;
        for announcement in &before.announcements {
            if !settings.announcements.contains(announcement) {
                self.tell(announcement, "withdraw")?;
            }
        }
        for announcement in &settings.announcements {
            if !before.announcements.contains(announcement) {
                self.tell(announcement, "announce")?;
            }
        }
        Ok(())
    }

    fn established(&mut self, neighbour: IpAddr) -> Result<bool> {
        Ok(self.learned()?.up.contains(&neighbour))
    }

    fn table(&mut self) -> Result<Vec<Route>> {
        Ok(self.learned()?.routes.into_values().collect())
    }

    fn ask_for_refresh(&mut self, neighbour: IpAddr) -> Result<()> {
        let family = if neighbour.is_ipv4() { "ipv4" } else { "ipv6" };
        let pipe = self.commands.as_mut().context("ExaBGP does not run")?;
        writeln!(
            pipe,
            "neighbor {neighbour} announce route-refresh {family} unicast"
        )?;
        Ok(())
    }

    fn keeps_routes(&self) -> bool {
        false
    }

    fn has_kernel_routes(&self) -> bool {
        false
    }
}

/// What the events say so far. A path is known by neighbour, prefix and path identifier (RFC 7911).
#[derive(Debug, Default)]
struct Learned {
    up: BTreeSet<IpAddr>,
    routes: BTreeMap<(IpAddr, String, String), Route>,
}

impl Learned {
    fn take(&mut self, event: &Value) -> Result<()> {
        let neighbour = &event["neighbor"];
        let peer = &neighbour["address"]["peer"];
        let peer = || -> Result<IpAddr> { Ok(peer.as_str().context("no peer")?.parse()?) };
        match event["type"].as_str() {
            Some("state") => {
                let peer = peer()?;
                match neighbour["state"].as_str() {
                    Some("up") => {
                        self.up.insert(peer);
                    }
                    Some("down") => {
                        self.up.remove(&peer);
                        self.routes.retain(|key, _| key.0 != peer);
                    }
                    _ => {}
                }
            }
            Some("update") => self.update(peer()?, &neighbour["message"]["update"])?,
            _ => {}
        }
        Ok(())
    }

    fn update(&mut self, peer: IpAddr, update: &Value) -> Result<()> {
        for entries in update["withdraw"]
            .as_object()
            .into_iter()
            .flat_map(|families| families.values())
        {
            for entry in entries.as_array().into_iter().flatten() {
                let (prefix, id) = nlri(entry)?;
                self.routes.remove(&(peer, prefix, id));
            }
        }
        let families = update["announce"].as_object().into_iter().flatten();
        for (_, hops) in families {
            for (hop, entries) in hops.as_object().into_iter().flatten() {
                for entry in entries.as_array().into_iter().flatten() {
                    let (prefix, id) = nlri(entry)?;
                    let route = route(&prefix, hop, &update["attribute"])?;
                    self.routes.insert((peer, prefix, id), route);
                }
            }
        }
        Ok(())
    }
}

/// Prefix and path identifier.
fn nlri(entry: &Value) -> Result<(String, String)> {
    let prefix = entry["nlri"].as_str().context("no prefix")?.to_owned();
    let id = entry["path-information"].as_str().unwrap_or_default();
    Ok((prefix, id.to_owned()))
}

fn route(prefix: &str, hop: &str, attributes: &Value) -> Result<Route> {
    let number = |value: &Value| -> Result<u32> {
        Ok(u32::try_from(value.as_u64().context("not a number")?)?)
    };
    let list = |key: &str| attributes[key].as_array().into_iter().flatten();
    let numbers = |value: &Value| -> Result<Vec<u32>> {
        value
            .as_array()
            .context("no list")?
            .iter()
            .map(number)
            .collect()
    };
    let mut communities = BTreeSet::new();
    for entry in list("community") {
        if let [a, b] = numbers(entry)?.as_slice() {
            communities.insert(Community::Standard((*a).try_into()?, (*b).try_into()?));
        }
    }
    for entry in list("large-community") {
        if let [a, b, c] = numbers(entry)?.as_slice() {
            communities.insert(Community::Large(*a, *b, *c));
        }
    }
    for entry in list("extended-community") {
        let text = entry["string"].as_str().context("no text")?;
        communities.insert(Community::extended(text)?);
    }
    Ok(Route {
        prefix: prefix.parse()?,
        next_hop: hop.parse()?,
        as_path: list("as-path").map(number).collect::<Result<_>>()?,
        communities,
    })
}
