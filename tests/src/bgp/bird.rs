//! BIRD, releases 2 and 3.

use crate::bgp::package;
use crate::bgp::process::{Launch, Process};
use crate::bgp::route::{Announcement, Community, Route, as_path};
use crate::bgp::segment::INTERFACE;
use crate::bgp::speaker::{
    BFD_INTERVAL, HOLD, LONG_LIVED, Neighbour, RESTART, SHORT_RESTART, Seat, Settings, Speaker,
    Start,
};
use crate::lab::checked;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;
use std::path::PathBuf;

/// A BIRD in its namespace.
pub struct Bird {
    seat: Seat,
    package: PathBuf,
    settings: Option<Settings>,
    process: Option<Process>,
}

impl Bird {
    pub fn new(seat: Seat, package: &str) -> Result<Self> {
        Ok(Self {
            seat,
            package: package::folder(package)?,
            settings: None,
            process: None,
        })
    }

    fn write(&mut self, settings: &Settings) -> Result<PathBuf> {
        self.settings = Some(settings.clone());
        let text = config(&self.seat, settings)?;
        self.seat.write("bird.conf", &text)
    }

    fn ask(&self, question: &str) -> Result<String> {
        let output = Launch::new(self.package.join("run"))
            .arg("usr/sbin/birdc")
            .arg("-s")
            .path(self.seat.file("ctl"))
            .args(question.split(' '))
            .command(&self.seat.host)?
            .output()?;
        checked(output, || format!("birdc {question}"))
    }

    fn protocol(&self, neighbour: IpAddr) -> Result<String> {
        let settings = self.settings.as_ref().context("BIRD was not started")?;
        let index = settings
            .neighbours
            .iter()
            .position(|n| n.address == neighbour)
            .with_context(|| format!("no neighbour {neighbour}"))?;
        Ok(format!("peer{index}"))
    }
}

fn config(seat: &Seat, settings: &Settings) -> Result<String> {
    let mut text = format!(
        "log stderr all;\nrouter id {};\ngraceful restart wait {RESTART};\n\
         debug protocols {{ states, events }};\nprotocol device {{}}\nprotocol direct {{ ipv4; ipv6; }}\n",
        seat.host.router_id()
    );
    for family in ["ipv4", "ipv6"] {
        let v4 = family == "ipv4";
        writeln!(
            text,
            "protocol kernel k{family} {{ {family} {{ export where source = RTS_BGP; }}; persist; graceful restart on; }}"
        )?;
        writeln!(text, "protocol static s{family} {{\n {family};")?;
        for announcement in &settings.announcements {
            if announcement.prefix.is_v4() == v4 {
                writeln!(text, "{}", originate(announcement))?;
            }
        }
        writeln!(text, "}}")?;
    }
    if settings.neighbours.iter().any(|n| n.bfd) {
        let timing = format!("interval {BFD_INTERVAL} ms; multiplier 5;");
        writeln!(
            text,
            "protocol bfd {{ interface \"*\" {{ {timing} }}; multihop {{ {timing} }}; }}"
        )?;
    }
    for (index, neighbour) in settings.neighbours.iter().enumerate() {
        writeln!(text, "{}", session(seat, settings, index, neighbour))?;
    }
    Ok(text)
}

fn originate(announcement: &Announcement) -> String {
    let [standard, large, extended] = announcement.words(|community| match *community {
        Community::Standard(a, b) => format!("bgp_community.add(({a},{b}));"),
        Community::Large(a, b, c) => format!("bgp_large_community.add(({a},{b},{c}));"),
        Community::RouteTarget(a, b) => format!("bgp_ext_community.add((rt,{a},{b}));"),
    });
    let all = [standard, large, extended].concat().join(" ");
    let block = if all.is_empty() {
        String::new()
    } else {
        format!(" {{ {all} }}")
    };
    format!(" route {} blackhole{block};", announcement.prefix)
}

fn session(seat: &Seat, settings: &Settings, index: usize, neighbour: &Neighbour) -> String {
    let v4 = neighbour.address.is_ipv4();
    let mut options = String::new();
    if let Some(password) = &neighbour.password {
        options.push_str(&format!(" password \"{password}\";"));
    }
    if neighbour.long_lived {
        options.push_str(&format!(
            " graceful restart on; graceful restart time {SHORT_RESTART}; long lived graceful restart on; \
             long lived stale time {LONG_LIVED};"
        ));
    } else if neighbour.graceful_restart {
        options.push_str(&format!(
            " graceful restart on; graceful restart time {RESTART};"
        ));
    } else {
        options.push_str(" graceful restart off;");
    }
    if neighbour.client {
        options.push_str(" rr client;");
    }
    if neighbour.bfd {
        options.push_str(" bfd on;");
    }
    if neighbour.far {
        options.push_str(" multihop;");
    }
    // Without it the next hop of another host of the segment stays as it is.
    let add_path = if neighbour.add_path {
        " add paths on; next hop self;"
    } else {
        ""
    };
    let channel = |family: &str, extended: &str| {
        format!(
            "{family} {{ import all; export where source = RTS_STATIC || source = RTS_BGP;{add_path}{extended} }};"
        )
    };
    let channels = match (neighbour.extended, v4) {
        (true, _) => channel("ipv4", " extended next hop on;") + " " + &channel("ipv6", ""),
        (false, true) => channel("ipv4", ""),
        (false, false) => channel("ipv6", ""),
    };
    let interface = if neighbour.is_link_local() {
        format!("%{INTERFACE}")
    } else {
        String::new()
    };
    format!(
        "protocol bgp peer{index} {{\n debug {{ states, events, packets }};\n local {} as {};\n neighbor {}{interface} as {};\n hold time {HOLD}; connect delay time 1; \
         connect retry time 1; error wait time 1,1;{options}\n {channels}\n}}",
        seat.source(neighbour),
        settings.asn,
        neighbour.address,
        neighbour.asn,
    )
}

impl Speaker for Bird {
    fn seat(&self) -> &Seat {
        &self.seat
    }

    fn start(&mut self, settings: &Settings, start: Start) -> Result<()> {
        let config = self.write(settings)?;
        let mut launch = Launch::new(self.package.join("run"))
            .args(["usr/sbin/bird", "-f", "-c"])
            .path(config)
            .arg("-s")
            .path(self.seat.file("ctl"))
            .arg("-P")
            .path(self.seat.file("pid"));
        if start == Start::Again {
            launch = launch.arg("-R");
        }
        let log = self.seat.file("log");
        let mut process = Process::start("bird", &self.seat.host, &launch, &log)?;
        Seat::ready(&mut process, || self.ask("show status"))?;
        self.process = Some(process);
        Ok(())
    }

    fn crash(&mut self) -> Result<()> {
        self.process.take().context("BIRD does not run")?.crash()
    }

    fn configure(&mut self, settings: &Settings) -> Result<()> {
        self.write(settings)?;
        let answer = self.ask("configure")?;
        ensure!(
            answer.contains("Reconfigured") || answer.contains("Reconfiguration in progress"),
            "birdc configure: {answer}"
        );
        Ok(())
    }

    fn established(&mut self, neighbour: IpAddr) -> Result<bool> {
        let protocol = self.protocol(neighbour)?;
        Ok(self
            .ask(&format!("show protocols {protocol}"))?
            .contains("Established"))
    }

    fn table(&mut self) -> Result<Vec<Route>> {
        routes(&self.ask("show route all where source = RTS_BGP")?)
    }

    fn shut(&mut self, neighbour: IpAddr, words: &str) -> Result<()> {
        let protocol = self.protocol(neighbour)?;
        let output = Launch::new(self.package.join("run"))
            .arg("usr/sbin/birdc")
            .arg("-s")
            .path(self.seat.file("ctl"))
            .args(["disable".to_owned(), protocol, format!("\"{words}\"")])
            .command(&self.seat.host)?
            .output()?;
        checked(output, || "birdc disable".to_owned()).map(|_| ())
    }

    fn ask_for_refresh(&mut self, neighbour: IpAddr) -> Result<()> {
        let protocol = self.protocol(neighbour)?;
        // Release 3 has a command of its own for it.
        let command = if self.package.ends_with("bird3") {
            "reload bgp in"
        } else {
            "reload in"
        };
        self.ask(&format!("{command} {protocol}")).map(|_| ())
    }

    fn refreshes(&mut self, neighbour: IpAddr) -> Result<u64> {
        let log = std::fs::read_to_string(self.log())?;
        Ok(refreshes(&log, &self.protocol(neighbour)?).try_into()?)
    }
}

/// What BIRD logs of a ROUTE-REFRESH message of one protocol.
fn refreshes(log: &str, protocol: &str) -> usize {
    let about = log
        .lines()
        .filter(|line| line.contains(&format!("{protocol}:")));
    let kinds = ["Got ROUTE-REFRESH", "Got BEGIN-OF-RR", "Got END-OF-RR"];
    about
        .filter(|line| kinds.iter().any(|kind| line.contains(kind)))
        .count()
}

/// Reads `show route all`: a line for each path, its attributes indented below. The prefix of a further path of one
/// destination is left blank.
fn routes(text: &str) -> Result<Vec<Route>> {
    let mut routes: Vec<Route> = Vec::new();
    let mut prefix = None;
    for line in text.lines() {
        if let Some(at) = line.find(" [").filter(|_| line.contains("unicast [")) {
            let mut words = line[..at].split_whitespace();
            if !line.starts_with(char::is_whitespace) {
                prefix = words.next().map(str::parse).transpose()?;
            }
            routes.push(Route {
                prefix: prefix.with_context(|| format!("a path without a prefix: {line}"))?,
                next_hop: IpAddr::from([0, 0, 0, 0]),
                as_path: Vec::new(),
                communities: BTreeSet::new(),
            });
            continue;
        }
        let Some((name, value)) = line.trim().split_once(':') else {
            continue;
        };
        let Some(route) = routes.last_mut() else {
            continue;
        };
        attribute(route, name, value.trim()).with_context(|| format!("in {line:?}"))?;
    }
    Ok(routes)
}

/// Release 2 writes `BGP.as_path`, release 3 `bgp_path`.
fn attribute(route: &mut Route, name: &str, value: &str) -> Result<()> {
    let list = || value.split_inclusive(')').map(str::trim);
    match name {
        "BGP.as_path" | "bgp_path" => route.as_path = as_path(value)?,
        // An IPv6 next hop may be followed by its link-local address.
        "BGP.next_hop" | "bgp_next_hop" => {
            route.next_hop = value.split_whitespace().next().unwrap_or(value).parse()?;
        }
        "BGP.community" | "bgp_community" => {
            for word in list() {
                route.communities.insert(Community::standard(word)?);
            }
        }
        "BGP.large_community" | "bgp_large_community" => {
            for word in list() {
                route.communities.insert(Community::large(word)?);
            }
        }
        "BGP.ext_community" | "bgp_ext_community" => {
            for word in list() {
                route.communities.insert(Community::extended(word)?);
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_paths_of_a_prefix_are_read_with_their_attributes() {
        let text = "BIRD 2.0.12 ready.\nTable master4:\n\
            10.2.0.0/24          unicast [peer0 15:51:23.441] * (100) [AS4200000002?]\n\tvia 10.0.0.2 on eth0\n\
            \tType: BGP univ\n\tBGP.origin: IGP\n\tBGP.as_path: 4200000002 7\n\tBGP.next_hop: 10.0.0.2\n\
            \tBGP.community: (64513,1) (64513,2)\n\tBGP.large_community: (64513, 2, 3)\n\
            \tBGP.ext_community: (rt, 64513, 77)\n\
            \x20                    unicast [peer1 15:51:23.502] (100) [i]\n\tvia 10.0.0.3 on eth0\n\
            \tBGP.as_path: \n\tBGP.next_hop: 10.0.0.3\n";
        let routes = routes(text).unwrap();
        assert_eq!(routes.len(), 2);
        assert_eq!(
            routes[0].to_string(),
            "10.2.0.0/24 via 10.0.0.2 path [4200000002, 7] 64513:1 64513:2 64513:2:3 rt:64513:77"
        );
        assert_eq!(routes[1].to_string(), "10.2.0.0/24 via 10.0.0.3 path []");
    }
}
