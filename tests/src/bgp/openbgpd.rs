//! OpenBGPD.

use crate::bgp::package;
use crate::bgp::process::{Launch, Process};
use crate::bgp::route::{Announcement, Community, Route, as_path};
use crate::bgp::speaker::{HOLD, Neighbour, Seat, Settings, Speaker, Start};
use crate::lab::checked;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// An OpenBGPD in its namespace.
pub struct OpenBgpd {
    seat: Seat,
    package: PathBuf,
    process: Option<Process>,
}

impl OpenBgpd {
    pub fn new(seat: Seat) -> Result<Self> {
        Ok(Self {
            seat,
            package: package::folder("openbgpd")?,
            process: None,
        })
    }

    fn write(&self, settings: &Settings) -> Result<PathBuf> {
        let file = self
            .seat
            .write("bgpd.conf", &config(&self.seat, settings)?)?;
        // It refuses a file that others could read.
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
        Ok(file)
    }

    fn ask(&self, words: &[&str]) -> Result<String> {
        let output = Launch::new(self.package.join("run"))
            .args(["usr/sbin/bgpctl", "-s"])
            .path(self.seat.file("ctl"))
            .args(words)
            .command(&self.seat.host)?
            .output()?;
        checked(output, || format!("bgpctl {}", words.join(" ")))
    }

    fn show(&self, words: &[&str]) -> Result<Value> {
        let text = self.ask(words)?;
        serde_json::from_str(&text).with_context(|| format!("bgpctl {words:?} printed {text:?}"))
    }
}

fn config(seat: &Seat, settings: &Settings) -> Result<String> {
    let mut text = format!(
        "AS {}\nrouter-id {}\nfib-update yes\nsocket \"{}\"\nholdtime {HOLD}\nconnect-retry 1\n\
         listen on {}\nlisten on {}\n",
        settings.asn,
        seat.host.router_id(),
        seat.file("ctl").display(),
        seat.host.address(true),
        seat.host.address(false),
    );
    for announcement in &settings.announcements {
        writeln!(text, "{}", originate(announcement))?;
    }
    for neighbour in &settings.neighbours {
        text.push_str(&session(seat, neighbour));
    }
    text.push_str("allow from any\nallow to any\n");
    for neighbour in settings.neighbours.iter().filter(|n| n.add_path) {
        // Without it the next hop of another host of the segment stays as it is.
        writeln!(text, "match to {} set nexthop self", neighbour.address)?;
    }
    Ok(text)
}

fn originate(announcement: &Announcement) -> String {
    let words = announcement
        .words(|community| match community {
            Community::Standard(..) => format!("community {community}"),
            Community::Large(..) => format!("large-community {community}"),
            Community::RouteTarget(a, b) => format!("ext-community rt {a}:{b}"),
        })
        .concat();
    let set = if words.is_empty() {
        String::new()
    } else {
        format!(" set {{ {} }}", words.join(" "))
    };
    format!("network {}{set}", announcement.prefix)
}

fn session(seat: &Seat, neighbour: &Neighbour) -> String {
    let v4 = neighbour.address.is_ipv4();
    let yes = |on: bool| if on { "yes" } else { "no" };
    let mut lines = vec![
        format!("neighbor {} {{", neighbour.address),
        format!(" remote-as {}", neighbour.asn),
        format!(" local-address {}", seat.host.address(v4)),
        format!(" announce {} unicast", if v4 { "IPv4" } else { "IPv6" }),
        " announce enhanced refresh yes".to_owned(),
        format!(" announce restart {}", yes(neighbour.graceful_restart)),
    ];
    if let Some(password) = &neighbour.password {
        lines.push(format!(" tcp md5sig password {password}"));
    }
    if neighbour.client {
        lines.push(" route-reflector".to_owned());
    }
    if neighbour.add_path {
        lines.push(" announce add-path recv yes".to_owned());
        lines.push(" announce add-path send all".to_owned());
    }
    lines.push("}\n".to_owned());
    lines.join("\n")
}

impl Speaker for OpenBgpd {
    fn seat(&self) -> &Seat {
        &self.seat
    }

    fn start(&mut self, settings: &Settings, _start: Start) -> Result<()> {
        let config = self.write(settings)?;
        // It runs its parts under a user of its own, in that user's home, and starts them as `/usr/sbin/bgpd` with
        // the system's libraries; so those of its release take the system's place.
        let home = self.seat.file("home");
        std::fs::create_dir_all(&home)?;
        let users = std::fs::read_to_string("/etc/passwd")?;
        let groups = std::fs::read_to_string("/etc/group")?;
        let user = format!(
            "{users}_openbgpd:x:59998:59998::{}:/usr/sbin/nologin\n",
            home.display()
        );
        let users = self.seat.write("passwd", &user)?;
        let groups = self
            .seat
            .write("group", &format!("{groups}_openbgpd:x:59998:\n"))?;
        let launch = Launch::new("/usr/sbin/bgpd")
            .args(["-d", "-v", "-f"])
            .path(config)
            .bind(users, "/etc/passwd")
            .bind(groups, "/etc/group")
            .bind(self.package.join("usr"), "/usr");
        let log = self.seat.file("log");
        let mut process = Process::start("OpenBGPD", &self.seat.host, &launch, &log)?;
        Seat::ready(&mut process, || self.ask(&["show"]))?;
        self.process = Some(process);
        Ok(())
    }

    fn crash(&mut self) -> Result<()> {
        self.process.take().context("bgpd does not run")?.crash()
    }

    fn configure(&mut self, settings: &Settings) -> Result<()> {
        self.write(settings)?;
        self.ask(&["reload"]).map(|_| ())
    }

    fn established(&mut self, neighbour: IpAddr) -> Result<bool> {
        let answer = self.show(&["-j", "show", "neighbor", &neighbour.to_string()])?;
        Ok(answer["neighbors"][0]["state"] == "Established")
    }

    fn table(&mut self) -> Result<Vec<Route>> {
        let answer = self.show(&["-j", "show", "rib", "detail"])?;
        let paths = answer["rib"].as_array().into_iter().flatten();
        paths
            .filter(|path| path["neighbor"]["description"] != "LOCAL")
            .map(|path| route(path).with_context(|| path.to_string()))
            .collect()
    }

    fn ask_for_refresh(&mut self, neighbour: IpAddr) -> Result<()> {
        self.ask(&["neighbor", &neighbour.to_string(), "refresh"])
            .map(|_| ())
    }

    fn shut(&mut self, neighbour: IpAddr, words: &str) -> Result<()> {
        self.ask(&["neighbor", &neighbour.to_string(), "down", words])
            .map(|_| ())
    }

    fn refreshes(&mut self, neighbour: IpAddr) -> Result<u64> {
        let answer = self.show(&["-j", "show", "neighbor", &neighbour.to_string()])?;
        let neighbour = &answer["neighbors"][0];
        let count = &neighbour["stats"]["message"]["received"]["route_refresh"];
        count
            .as_u64()
            .with_context(|| format!("no count in {neighbour}"))
    }
}

fn route(path: &Value) -> Result<Route> {
    let word = |key: &str| path[key].as_str().with_context(|| format!("no {key}"));
    let words = |key: &str| {
        let list = path[key].as_array().into_iter().flatten();
        list.filter_map(Value::as_str)
    };
    let mut communities = BTreeSet::new();
    for text in words("communities") {
        communities.insert(Community::standard(text)?);
    }
    for text in words("large_communities") {
        communities.insert(Community::large(text)?);
    }
    for text in words("extended_communities") {
        communities.insert(Community::extended(text)?);
    }
    Ok(Route {
        prefix: word("prefix")?.parse()?,
        next_hop: word("exit_nexthop")?.parse()?,
        as_path: as_path(word("aspath")?)?,
        communities,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_the_detailed_table_is_read() {
        let path = serde_json::json!({
            "prefix": "10.1.0.0/24", "aspath": "4200000001 7", "exit_nexthop": "10.0.0.1", "true_nexthop": "10.0.0.1",
            "communities": ["64512:1"], "extended_communities": ["rt 64512:77"], "large_communities": ["64512:2:3"]
        });
        assert_eq!(
            route(&path).unwrap().to_string(),
            "10.1.0.0/24 via 10.0.0.1 path [4200000001, 7] 64512:1 64512:2:3 rt:64512:77"
        );
    }
}
