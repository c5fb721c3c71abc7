//! GoBGP, which keeps a table but writes no kernel routes.

use crate::bgp::package;
use crate::bgp::process::{Launch, Process};
use crate::bgp::route::{Announcement, Community, Route};
use crate::bgp::speaker::{
    HOLD, LONG_LIVED, Neighbour, RESTART, SHORT_RESTART, Seat, Settings, Speaker, Start,
};
use crate::lab::checked;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;
use std::path::PathBuf;

/// Refuses connections in both directions.
const NO_SESSIONS: &str = "add table inet hold; \
    add chain inet hold input { type filter hook input priority 0; }; \
    add rule inet hold input tcp dport 179 reject with tcp reset; \
    add chain inet hold output { type filter hook output priority 0; }; \
    add rule inet hold output tcp dport 179 reject with tcp reset";

/// A GoBGP in its namespace.
pub struct GoBgp {
    seat: Seat,
    package: PathBuf,
    settings: Option<Settings>,
    process: Option<Process>,
}

impl GoBgp {
    pub fn new(seat: Seat, package: &str) -> Result<Self> {
        Ok(Self {
            seat,
            package: package::folder(package)?,
            settings: None,
            process: None,
        })
    }

    fn ask(&self, words: &[&str]) -> Result<String> {
        let output = Launch::new(self.package.join("run"))
            .arg("usr/bin/gobgp")
            .args(words)
            .command(&self.seat.host)?
            .output()?;
        checked(output, || format!("gobgp {}", words.join(" ")))
    }

    fn originate(&self, announcement: &Announcement) -> Result<()> {
        let prefix = announcement.prefix;
        let text = prefix.to_string();
        let next_hop = self.seat.host.address(prefix.is_v4()).to_string();
        let [standard, large, extended] = announcement.words(|community| match community {
            Community::RouteTarget(a, b) => format!("{a}:{b}"),
            other => other.to_string(),
        });
        let lists = [
            ("community", standard.join(",")),
            ("large-community", large.join(",")),
            ("rt", extended.join(" ")),
        ];
        let mut words = vec!["global", "rib", "-a", family(prefix.is_v4())];
        words.extend(["add", &text, "origin", "igp", "nexthop", &next_hop]);
        for (kind, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
            words.push(kind);
            words.extend(list.split(' '));
        }
        self.ask(&words).map(|_| ())
    }
}

fn family(v4: bool) -> &'static str {
    if v4 { "ipv4" } else { "ipv6" }
}

fn config(seat: &Seat, settings: &Settings) -> Result<String> {
    let mut text = format!(
        "[global.config]\nas = {}\nrouter-id = \"{}\"\n",
        settings.asn,
        seat.host.router_id()
    );
    for neighbour in &settings.neighbours {
        session(&mut text, seat, neighbour)?;
    }
    Ok(text)
}

fn session(text: &mut String, seat: &Seat, neighbour: &Neighbour) -> Result<()> {
    let v4 = neighbour.address.is_ipv4();
    writeln!(
        text,
        "[[neighbors]]\n[neighbors.config]\nneighbor-address = \"{}\"\npeer-as = {}",
        neighbour.address, neighbour.asn
    )?;
    if let Some(password) = &neighbour.password {
        writeln!(text, "auth-password = \"{password}\"")?;
    }
    writeln!(
        text,
        "[neighbors.transport.config]\nlocal-address = \"{}\"\n[neighbors.timers.config]\nconnect-retry = 1\n\
         hold-time = {HOLD}\nkeepalive-interval = 3\nidle-hold-time-after-reset = 1",
        seat.host.address(v4)
    )?;
    if neighbour.long_lived {
        writeln!(
            text,
            "[neighbors.graceful-restart.config]\nenabled = true\nrestart-time = {SHORT_RESTART}\n\
             deferral-time = {RESTART}\nlong-lived-enabled = true"
        )?;
    } else if neighbour.graceful_restart {
        writeln!(
            text,
            "[neighbors.graceful-restart.config]\nenabled = true\nrestart-time = {RESTART}\ndeferral-time = {RESTART}"
        )?;
    }
    if neighbour.client {
        writeln!(
            text,
            "[neighbors.route-reflector.config]\nroute-reflector-client = true\nroute-reflector-cluster-id = \"{}\"",
            seat.host.router_id()
        )?;
    }
    writeln!(
        text,
        "[[neighbors.afi-safis]]\n[neighbors.afi-safis.config]\nafi-safi-name = \"{}-unicast\"",
        family(v4)
    )?;
    if neighbour.graceful_restart || neighbour.long_lived {
        writeln!(
            text,
            "[neighbors.afi-safis.mp-graceful-restart.config]\nenabled = true"
        )?;
    }
    if neighbour.long_lived {
        writeln!(
            text,
            "[neighbors.afi-safis.long-lived-graceful-restart.config]\nenabled = true\nrestart-time = {LONG_LIVED}"
        )?;
    }
    if neighbour.add_path {
        writeln!(
            text,
            "[neighbors.afi-safis.add-paths.config]\nreceive = true\nsend-max = 8"
        )?;
    }
    Ok(())
}

impl Speaker for GoBgp {
    fn seat(&self) -> &Seat {
        &self.seat
    }

    fn start(&mut self, settings: &Settings, start: Start) -> Result<()> {
        let config = self
            .seat
            .write("gobgpd.toml", &config(&self.seat, settings)?)?;
        let mut launch = Launch::new(self.package.join("run"))
            .args(["usr/bin/gobgpd", "-l", "debug", "-f"])
            .path(config);
        if start == Start::Again {
            launch = launch.arg("-r");
        }
        let log = self.seat.file("log");
        // Its own routes come in by command. A session before that would tell End-of-RIB too early.
        let ns = &self.seat.host.ns;
        ns.run("nft", &[NO_SESSIONS]);
        let mut process = Process::start("gobgpd", &self.seat.host, &launch, &log)?;
        Seat::ready(&mut process, || self.ask(&["global"]))?;
        for announcement in &settings.announcements {
            self.originate(announcement)?;
        }
        ns.run("nft", &["delete table inet hold"]);
        self.process = Some(process);
        self.settings = Some(settings.clone());
        Ok(())
    }

    fn crash(&mut self) -> Result<()> {
        self.process.take().context("gobgpd does not run")?.crash()
    }

    fn configure(&mut self, settings: &Settings) -> Result<()> {
        let before = self.settings.replace(settings.clone());
        let before = before.context("gobgpd was not started")?;
        for announcement in &before.announcements {
            if !settings.announcements.contains(announcement) {
                let prefix = announcement.prefix;
                let text = prefix.to_string();
                self.ask(&["global", "rib", "-a", family(prefix.is_v4()), "del", &text])?;
            }
        }
        for announcement in &settings.announcements {
            if !before.announcements.contains(announcement) {
                self.originate(announcement)?;
            }
        }
        Ok(())
    }

    fn established(&mut self, neighbour: IpAddr) -> Result<bool> {
        let text = self.ask(&["neighbor", &neighbour.to_string(), "-j"])?;
        let answer: Value = serde_json::from_str(&text)?;
        // `SessionState::ESTABLISHED` of its API.
        Ok(answer["state"]["session_state"] == 6)
    }

    fn table(&mut self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in ["ipv4", "ipv6"] {
            let text = self.ask(&["global", "rib", "-a", family, "-j"])?;
            let answer: Value = serde_json::from_str(&text)?;
            for (prefix, paths) in answer.as_object().into_iter().flatten() {
                // A path of its own has no neighbour.
                let paths = paths.as_array().into_iter().flatten();
                for path in paths.filter(|path| path["neighbor-ip"].is_string()) {
                    routes.push(route(prefix, path).with_context(|| path.to_string())?);
                }
            }
        }
        Ok(routes)
    }

    fn ask_for_refresh(&mut self, neighbour: IpAddr) -> Result<()> {
        // Its `softresetin` only applies its own policy again.
        bail!("GoBGP has no command that asks {neighbour} for its routes")
    }

    fn shut(&mut self, neighbour: IpAddr, words: &str) -> Result<()> {
        let address = neighbour.to_string();
        self.ask(&["neighbor", &address, "shutdown", "--reason", words])
            .map(|_| ())
    }

    fn has_kernel_routes(&self) -> bool {
        false
    }
}

/// Attributes are numbered as on the wire (RFC 4271, RFC 4760 and the registry of path attributes).
fn route(prefix: &str, path: &Value) -> Result<Route> {
    let attributes = path["attrs"].as_array().context("no attributes")?;
    let mut as_path = Vec::new();
    let mut next_hop = None;
    let mut communities = BTreeSet::new();
    let number = |value: &Value| -> Result<u32> {
        Ok(u32::try_from(value.as_u64().context("not a number")?)?)
    };
    for attribute in attributes {
        let list = |key: &str| attribute[key].as_array().into_iter().flatten();
        match attribute["type"].as_u64() {
            Some(2) => {
                for segment in list("as_paths") {
                    for asn in segment["asns"].as_array().into_iter().flatten() {
                        as_path.push(number(asn)?);
                    }
                }
            }
            Some(3 | 14) => next_hop = attribute["nexthop"].as_str(),
            Some(8) => {
                for bits in list("communities") {
                    communities.insert(Community::from_bits(number(bits)?));
                }
            }
            Some(16) => {
                for extended in list("value") {
                    let target = extended["value"].as_str().unwrap_or_default();
                    anyhow::ensure!(
                        extended["type"] == 0 && extended["subtype"] == 2,
                        "no route target: {extended}"
                    );
                    communities.insert(Community::extended(&format!("rt:{target}"))?);
                }
            }
            Some(32) => {
                for large in list("value") {
                    communities.insert(Community::Large(
                        number(&large["ASN"])?,
                        number(&large["LocalData1"])?,
                        number(&large["LocalData2"])?,
                    ));
                }
            }
            _ => {}
        }
    }
    Ok(Route {
        prefix: prefix.parse()?,
        next_hop: next_hop.context("no next hop")?.parse()?,
        as_path,
        communities,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_the_wire_are_read() {
        let path = serde_json::json!({"nlri": {"prefix": "10.1.0.0/24"}, "best": true, "attrs": [
            {"type": 1, "value": 0},
            {"type": 2, "as_paths": [{"segment_type": 2, "num": 1, "asns": [4_200_000_001_u32]}]},
            {"type": 3, "nexthop": "10.0.0.1"},
            {"type": 8, "communities": [4_227_858_433_u32]},
            {"type": 16, "value": [{"type": 0, "subtype": 2, "value": "64512:77"}]},
            {"type": 32, "value": [{"ASN": 64512, "LocalData1": 2, "LocalData2": 3}]}
        ], "neighbor-ip": "10.0.0.1"});
        assert_eq!(
            route("10.1.0.0/24", &path).unwrap().to_string(),
            "10.1.0.0/24 via 10.0.0.1 path [4200000001] 64512:1 64512:2:3 rt:64512:77"
        );
    }
}
