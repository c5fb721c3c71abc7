//! FRR: zebra and bgpd, asked over their terminal sockets.

use crate::bgp::package;
use crate::bgp::process::{Launch, Process};
use crate::bgp::route::{Announcement, Community, Route};
use crate::bgp::segment::INTERFACE;
use crate::bgp::speaker::{
    BFD_INTERVAL, HOLD, LONG_LIVED, Neighbour, RESTART, SHORT_RESTART, Seat, Settings, Speaker,
    Start,
};
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// An FRR in its namespace.
pub struct Frr {
    seat: Seat,
    package: PathBuf,
    settings: Option<Settings>,
    zebra: Option<Process>,
    bgpd: Option<Process>,
    bfdd: Option<Process>,
}

impl Frr {
    pub fn new(seat: Seat, package: &str) -> Result<Self> {
        Ok(Self {
            seat,
            package: package::folder(package)?,
            settings: None,
            zebra: None,
            bgpd: None,
            bfdd: None,
        })
    }

    /// A daemon of the suite, with its sockets in our folder.
    fn launch(&self, daemon: &str) -> Launch {
        Launch::new(self.package.join("run"))
            .arg(format!("usr/lib/frr/{daemon}"))
            .arg("-f")
            .path(self.seat.file(&format!("{daemon}.conf")))
            .arg("-i")
            .path(self.seat.file(&format!("{daemon}.pid")))
            .arg("-z")
            .path(self.seat.file("zserv.api"))
            .arg("--vty_socket")
            .path(&self.seat.folder)
            .args(["-P", "0", "-u", "root", "-g", "root", "--log", "stdout"])
    }

    /// The system's groups with the one that the package's installation would have made; daemons insist on it.
    fn groups(&self) -> Result<PathBuf> {
        let groups = std::fs::read_to_string("/etc/group")?;
        self.seat
            .write("group", &format!("{groups}frrvty:x:59999:root\n"))
    }

    fn start_zebra(&mut self) -> Result<()> {
        self.seat.write("zebra.conf", "")?;
        let launch = self
            .launch("zebra")
            .arg("-K")
            .arg(RESTART)
            .bind(self.groups()?, "/etc/group");
        let log = self.seat.file("zebra.log");
        let mut zebra = Process::start("zebra", &self.seat.host, &launch, &log)?;
        Seat::ready(&mut zebra, || self.ask("zebra", &["show version"]))?;
        self.zebra = Some(zebra);
        Ok(())
    }

    fn start_bfdd(&mut self) -> Result<()> {
        self.seat.write("bfdd.conf", "")?;
        let mut launch = self.launch("bfdd").bind(self.groups()?, "/etc/group");
        // Later releases have no such socket.
        if self.package.ends_with("frr") {
            launch = launch.arg("--bfdctl").path(self.seat.file("bfdd.sock"));
        }
        let log = self.seat.file("bfdd.log");
        let mut bfdd = Process::start("bfdd", &self.seat.host, &launch, &log)?;
        Seat::ready(&mut bfdd, || self.ask("bfdd", &["show version"]))?;
        self.bfdd = Some(bfdd);
        Ok(())
    }

    /// Runs commands one after another in one terminal session; the answer to the last.
    fn ask(&self, daemon: &str, commands: &[&str]) -> Result<String> {
        let socket = self.seat.file(&format!("{daemon}.vty"));
        let mut stream = UnixStream::connect(&socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut answer = String::new();
        for command in ["enable"].iter().chain(commands) {
            stream.write_all(command.as_bytes())?;
            stream.write_all(&[0])?;
            answer = read_answer(&mut stream, command)?;
        }
        Ok(answer)
    }

    fn show(&self, command: &str) -> Result<Value> {
        let text = self.ask("bgpd", &[command])?;
        serde_json::from_str(&text).with_context(|| format!("{command} printed {text:?}"))
    }
}

/// An answer ends with three zero octets and the command's result.
fn read_answer(stream: &mut UnixStream, command: &str) -> Result<String> {
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let length = stream.read(&mut chunk)?;
        if length == 0 {
            bail!("{command:?}: the terminal was closed");
        }
        answer.extend_from_slice(&chunk[..length]);
        if let [text @ .., 0, 0, 0, result] = answer.as_slice() {
            let text = String::from_utf8_lossy(text).into_owned();
            if *result != 0 {
                bail!("{command:?} failed ({result}): {text}");
            }
            return Ok(text);
        }
    }
}

fn config(seat: &Seat, settings: &Settings) -> Result<String> {
    let mut text = "hostname frr\ndebug bgp neighbor-events\n".to_owned();
    for (index, announcement) in settings.announcements.iter().enumerate() {
        text.push_str(&route_map(index, announcement).join("\n"));
        text.push_str("\n!\n");
    }
    writeln!(
        text,
        "router bgp {}\n bgp router-id {}\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n \
         no bgp network import-check\n timers bgp 3 {HOLD}",
        settings.asn,
        seat.host.router_id()
    )?;
    if settings.neighbours.iter().any(|n| n.long_lived) {
        writeln!(
            text,
            " bgp graceful-restart\n bgp graceful-restart preserve-fw-state\n bgp graceful-restart restart-time \
             {SHORT_RESTART}\n bgp long-lived-graceful-restart stale-time {LONG_LIVED}"
        )?;
    } else if settings.neighbours.iter().any(|n| n.graceful_restart) {
        writeln!(
            text,
            " bgp graceful-restart\n bgp graceful-restart preserve-fw-state\n bgp graceful-restart restart-time {RESTART}"
        )?;
    }
    // Otherwise it stays a helper, its default: without End-of-RIB, release 8 would answer no refresh.
    for neighbour in &settings.neighbours {
        text.push_str(&session(seat, neighbour));
    }
    for v4 in [true, false] {
        text.push_str(&family(settings, v4));
    }
    Ok(text)
}

/// The communities of an announcement, as the lines of a route map of its own.
fn route_map(index: usize, announcement: &Announcement) -> Vec<String> {
    let [standard, large, extended] = announcement.words(|community| match community {
        Community::RouteTarget(a, b) => format!("{a}:{b}"),
        other => other.to_string(),
    });
    let mut lines = vec![format!("route-map announce{index} permit 10")];
    for (kind, words) in [
        ("community", standard),
        ("large-community", large),
        ("extcommunity rt", extended),
    ] {
        if !words.is_empty() {
            lines.push(format!(" set {kind} {}", words.join(" ")));
        }
    }
    lines
}

fn session(seat: &Seat, neighbour: &Neighbour) -> String {
    let address = neighbour.address;
    let mut lines = vec![
        format!(" neighbor {address} remote-as {}", neighbour.asn),
        format!(" neighbor {address} timers connect 1"),
    ];
    if neighbour.is_link_local() {
        lines.push(format!(" neighbor {address} interface {INTERFACE}"));
    } else {
        let source = seat.source(neighbour);
        lines.push(format!(" neighbor {address} update-source {source}"));
    }
    if neighbour.far {
        lines.push(format!(" neighbor {address} ebgp-multihop"));
    }
    if let Some(password) = &neighbour.password {
        lines.push(format!(" neighbor {address} password {password}"));
    }
    if neighbour.extended {
        lines.push(format!(" neighbor {address} capability extended-nexthop"));
    }
    if neighbour.bfd {
        lines.push(format!(
            " neighbor {address} bfd 5 {BFD_INTERVAL} {BFD_INTERVAL}"
        ));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn family(settings: &Settings, v4: bool) -> String {
    let mut lines = vec![format!(" address-family {} unicast", name(v4))];
    for neighbour in &settings.neighbours {
        if neighbour.address.is_ipv4() != v4 && !neighbour.extended {
            continue;
        }
        let address = neighbour.address;
        lines.push(format!("  neighbor {address} activate"));
        if neighbour.client {
            lines.push(format!("  neighbor {address} route-reflector-client"));
        }
        if neighbour.add_path {
            lines.push(format!("  neighbor {address} addpath-tx-all-paths"));
            // Without it the next hop of another host of the segment stays as it is.
            lines.push(format!("  neighbor {address} next-hop-self"));
        }
    }
    for (index, announcement) in settings.announcements.iter().enumerate() {
        if announcement.prefix.is_v4() == v4 {
            let prefix = announcement.prefix;
            lines.push(format!("  network {prefix} route-map announce{index}"));
        }
    }
    lines.push(" exit-address-family\n".to_owned());
    lines.join("\n")
}

fn name(v4: bool) -> &'static str {
    if v4 { "ipv4" } else { "ipv6" }
}

impl Speaker for Frr {
    fn seat(&self) -> &Seat {
        &self.seat
    }

    fn start(&mut self, settings: &Settings, start: Start) -> Result<()> {
        if start == Start::Fresh {
            self.start_zebra()?;
            if settings.neighbours.iter().any(|n| n.bfd) {
                self.start_bfdd()?;
            }
        }
        self.seat
            .write("bgpd.conf", &config(&self.seat, settings)?)?;
        let launch = self.launch("bgpd").arg("-S");
        let log = self.log();
        let mut bgpd = Process::start("FRR's bgpd", &self.seat.host, &launch, &log)?;
        Seat::ready(&mut bgpd, || self.ask("bgpd", &["show version"]))?;
        self.bgpd = Some(bgpd);
        self.settings = Some(settings.clone());
        Ok(())
    }

    fn crash(&mut self) -> Result<()> {
        self.bgpd.take().context("bgpd does not run")?.crash()
    }

    fn configure(&mut self, settings: &Settings) -> Result<()> {
        let before = self.settings.replace(settings.clone());
        let before = before.context("FRR was not started")?;
        let router = format!("router bgp {}", settings.asn);
        for announcement in &before.announcements {
            if !settings.announcements.contains(announcement) {
                let prefix = announcement.prefix;
                let family = format!("address-family {} unicast", name(prefix.is_v4()));
                let remove = format!("no network {prefix}");
                self.ask("bgpd", &["configure terminal", &router, &family, &remove])?;
            }
        }
        for announcement in &settings.announcements {
            if !before.announcements.contains(announcement) {
                let prefix = announcement.prefix;
                let family = format!("address-family {} unicast", name(prefix.is_v4()));
                let add = format!("network {prefix}");
                if !announcement.communities.is_empty() {
                    bail!("communities of a running FRR are not changed here");
                }
                self.ask("bgpd", &["configure terminal", &router, &family, &add])?;
            }
        }
        Ok(())
    }

    fn established(&mut self, neighbour: IpAddr) -> Result<bool> {
        let answer = self.show(&format!("show bgp neighbors {neighbour} json"))?;
        Ok(answer[neighbour.to_string()]["bgpState"] == "Established")
    }

    fn table(&mut self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in ["ipv4", "ipv6"] {
            // All details of all routes in one answer are new in later releases.
            let answer = self.show(&format!("show bgp {family} unicast json"))?;
            for prefix in answer["routes"].as_object().into_iter().flat_map(Map::keys) {
                let answer = self.show(&format!("show bgp {family} unicast {prefix} json"))?;
                let paths = answer["paths"].as_array().into_iter().flatten();
                for path in paths.filter(|path| path["sourced"] != true) {
                    routes.push(route(prefix, path).with_context(|| path.to_string())?);
                }
            }
        }
        Ok(routes)
    }

    fn ask_for_refresh(&mut self, neighbour: IpAddr) -> Result<()> {
        let family = name(neighbour.is_ipv4());
        let command = format!("clear bgp {family} unicast {neighbour} soft in");
        self.ask("bgpd", &[&command]).map(|_| ())
    }

    fn shut(&mut self, neighbour: IpAddr, words: &str) -> Result<()> {
        let settings = self.settings.as_ref().context("FRR was not started")?;
        let router = format!("router bgp {}", settings.asn);
        let shut = format!("neighbor {neighbour} shutdown message {words}");
        self.ask("bgpd", &["configure terminal", &router, &shut])
            .map(|_| ())
    }

    fn refreshes(&mut self, neighbour: IpAddr) -> Result<u64> {
        let answer = self.show(&format!("show bgp neighbors {neighbour} json"))?;
        let count = &answer[neighbour.to_string()]["messageStats"]["routeRefreshRecv"];
        count
            .as_u64()
            .with_context(|| format!("no count in {answer}"))
    }

    fn log(&self) -> PathBuf {
        self.seat.file("bgpd.log")
    }
}

fn route(prefix: &str, path: &Value) -> Result<Route> {
    let segments = path["aspath"]["segments"].as_array().context("no path")?;
    let numbers = segments
        .iter()
        .flat_map(|segment| segment["list"].as_array().into_iter().flatten());
    let as_path = numbers
        .map(|number| Ok(u32::try_from(number.as_u64().context("no AS number")?)?))
        .collect::<Result<_>>()?;
    let next_hops = path["nexthops"].as_array().context("no next hops")?;
    // The link-local address of an IPv6 next hop may be listed beside the global one.
    let next_hop = next_hops
        .iter()
        .find(|hop| hop["scope"] != "link-local")
        .and_then(|hop| hop["ip"].as_str())
        .context("no next hop")?;
    let words = |key: &str| path[key]["string"].as_str().unwrap_or_default().to_owned();
    let mut communities = std::collections::BTreeSet::new();
    for word in words("community").split_whitespace() {
        communities.insert(match word {
            "llgr-stale" => Community::Standard(65535, 6),
            word => Community::standard(word)?,
        });
    }
    for word in words("largeCommunity").split_whitespace() {
        communities.insert(Community::large(word)?);
    }
    for word in words("extendedCommunity").split_whitespace() {
        communities.insert(Community::extended(word)?);
    }
    Ok(Route {
        prefix: prefix.parse()?,
        next_hop: next_hop.parse()?,
        as_path,
        communities,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_the_detailed_table_is_read() {
        let path = serde_json::json!({
            "aspath": {"string": "4200000001", "segments": [{"type": "as-sequence", "list": [4_200_000_001_u32]}]},
            "community": {"string": "64512:1", "list": ["64512:1"]},
            "extendedCommunity": {"string": "RT:64512:77"},
            "largeCommunity": {"string": "64512:2:3", "list": ["64512:2:3"]},
            "nexthops": [{"ip": "fd00::1", "scope": "global"}, {"ip": "fe80::1", "scope": "link-local", "used": true}]
        });
        assert_eq!(
            route("fd00:1::/64", &path).unwrap().to_string(),
            "fd00:1::/64 via fd00::1 path [4200000001] 64512:1 64512:2:3 rt:64512:77"
        );
    }
}
