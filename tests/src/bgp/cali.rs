//! Our own `bgpd`, standing alone: configured by a file, asked over its status socket.

use crate::bgp::process::{Launch, Process};
use crate::bgp::route::{Announcement, Community, Route, as_path};
use crate::bgp::segment::INTERFACE;
use crate::bgp::speaker::{
    BFD_INTERVAL, HOLD, LONG_LIVED, Neighbour, RESTART, SHORT_RESTART, Seat, Settings, Speaker,
    Start,
};
use crate::lab::programs;
use anyhow::{Context, Result, bail};
use cali_control::Hello;
use cali_control::frame::{encode, read_blocking};
use cali_control::status::{
    BGP_PROTOCOL, BgpRequest, BgpResponse, BgpStatus, PeerStatus, SessionState, VERSION,
};
use nix::sys::signal::Signal;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// A `bgpd` in its namespace.
pub struct Cali {
    seat: Seat,
    process: Option<Process>,
}

impl Cali {
    pub fn new(seat: Seat) -> Self {
        Self {
            seat,
            process: None,
        }
    }

    fn write(&self, settings: &Settings) -> Result<PathBuf> {
        let text = config(&self.seat, settings)?;
        self.seat.write("bgpd.toml", &text)
    }

    fn ask(&self, request: &BgpRequest) -> Result<BgpResponse> {
        ask(&self.seat, request)
    }
}

/// One question on the status socket of the `bgpd` of this seat.
pub fn ask(seat: &Seat, request: &BgpRequest) -> Result<BgpResponse> {
    let socket = seat.file("run/bgpd.sock");
    let mut stream = UnixStream::connect(&socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let hello = Hello {
        protocol: BGP_PROTOCOL.to_owned(),
        version: VERSION,
        program: "interop test".to_owned(),
    };
    stream.write_all(&encode(BGP_PROTOCOL, &hello)?)?;
    let _: Hello = read_blocking(BGP_PROTOCOL, &mut stream)?;
    stream.write_all(&encode(BGP_PROTOCOL, request)?)?;
    match read_blocking(BGP_PROTOCOL, &mut stream)? {
        BgpResponse::Error(words) => bail!("bgpd answers {request:?} with: {words}"),
        answer => Ok(answer),
    }
}

/// The status of the `bgpd` of this seat.
pub fn status(seat: &Seat) -> Result<BgpStatus> {
    match ask(seat, &BgpRequest::Status)? {
        BgpResponse::Status(status) => Ok(status),
        other => bail!("bgpd answers a request for its status with {other:?}"),
    }
}

/// What the `bgpd` of this seat knows about a neighbour.
pub fn peer(seat: &Seat, neighbour: IpAddr) -> Result<PeerStatus> {
    status(seat)?
        .peers
        .into_iter()
        .find(|peer| peer.address == neighbour)
        .with_context(|| format!("bgpd has no peer {neighbour}"))
}

fn config(seat: &Seat, settings: &Settings) -> Result<String> {
    let mut text = format!(
        "router-id = \"{}\"\nas = {}\n",
        seat.host.router_id(),
        settings.asn
    );
    for neighbour in &settings.neighbours {
        session(&mut text, seat, neighbour)?;
    }
    for announcement in &settings.announcements {
        originate(&mut text, announcement)?;
    }
    if let Some(station) = &settings.station {
        writeln!(
            text,
            "\n[[bmp]]\nstation = \"{station}\"\nroutes = \"both\"\nstatistics = 1"
        )?;
    }
    Ok(text)
}

fn session(text: &mut String, seat: &Seat, neighbour: &Neighbour) -> Result<()> {
    let restart = match neighbour {
        Neighbour {
            long_lived: true, ..
        } => SHORT_RESTART,
        Neighbour {
            graceful_restart: true,
            ..
        } => RESTART,
        _ => 0,
    };
    writeln!(
        text,
        "\n[[neighbor]]\naddress = \"{}\"\nas = {}\nsource = \"{}\"\nhold-time = {HOLD}\nconnect-retry = 1\n\
         restart-time = {restart}\nroute-reflector-client = {}",
        neighbour.address,
        neighbour.asn,
        seat.source(neighbour),
        neighbour.client,
    )?;
    if let Some(password) = &neighbour.password {
        writeln!(text, "password = \"{password}\"")?;
    }
    if neighbour.is_link_local() {
        writeln!(text, "interface = \"{INTERFACE}\"")?;
    }
    if neighbour.waits {
        writeln!(text, "passive = true")?;
    }
    if neighbour.add_path {
        writeln!(text, "add-path = true")?;
    }
    if neighbour.extended {
        writeln!(
            text,
            "families = [\"ipv4\", \"ipv6\"]\nextended-next-hop = true"
        )?;
    }
    if neighbour.long_lived {
        writeln!(text, "long-lived-stale-time = {LONG_LIVED}")?;
    }
    if neighbour.bfd {
        writeln!(
            text,
            "bfd = {{ multihop = {}, transmit-interval = {BFD_INTERVAL}, receive-interval = {BFD_INTERVAL}, multiplier = 5 }}",
            neighbour.far
        )?;
    }
    Ok(())
}

fn originate(text: &mut String, announcement: &Announcement) -> Result<()> {
    let words = announcement
        .words(|community| format!("\"{community}\""))
        .concat();
    writeln!(
        text,
        "\n[[announce]]\nprefix = \"{}\"\ncommunities = [{}]",
        announcement.prefix,
        words.join(", ")
    )?;
    Ok(())
}

impl Speaker for Cali {
    fn seat(&self) -> &Seat {
        &self.seat
    }

    fn start(&mut self, settings: &Settings, _start: Start) -> Result<()> {
        let config = self.write(settings)?;
        let launch = Launch::new(programs().join("bgpd"))
            .arg("--config")
            .path(config)
            .env("CALI_RUN_DIR", self.seat.file("run").display())
            .env("CALI_STATE_DIR", self.seat.file("state").display())
            .env("CALI_LOG", "bgpd=debug,info")
            .env("NO_COLOR", "1");
        let log = self.seat.file("log");
        let mut process = Process::start("bgpd", &self.seat.host, &launch, &log)?;
        Seat::ready(&mut process, || status(&self.seat))?;
        self.process = Some(process);
        Ok(())
    }

    fn crash(&mut self) -> Result<()> {
        self.process.take().context("bgpd does not run")?.crash()
    }

    fn configure(&mut self, settings: &Settings) -> Result<()> {
        self.write(settings)?;
        let process = self.process.as_ref().context("bgpd does not run")?;
        process.signal(Signal::SIGHUP)
    }

    fn established(&mut self, neighbour: IpAddr) -> Result<bool> {
        Ok(peer(&self.seat, neighbour)?.state == SessionState::Established)
    }

    fn table(&mut self) -> Result<Vec<Route>> {
        let BgpResponse::Routes(routes) = self.ask(&BgpRequest::Routes { within: None })? else {
            bail!("bgpd does not answer with routes");
        };
        // Refused paths (an own AS number in them, for example) are listed as well.
        let learned = routes.into_iter().filter(|route| {
            let reason = route.reason.as_deref().unwrap_or_default();
            route.peer.is_some() && (reason.is_empty() || reason.starts_with("another path"))
        });
        learned
            .map(|route| {
                let communities = route.communities.iter().map(|text| community(text));
                Ok(Route {
                    prefix: route.prefix,
                    next_hop: route.next_hop.context("a learned route without next hop")?,
                    as_path: as_path(&route.as_path)?,
                    communities: communities.collect::<Result<_>>()?,
                })
            })
            .collect()
    }

    fn ask_for_refresh(&mut self, peer: IpAddr) -> Result<()> {
        self.ask(&BgpRequest::Refresh { peer }).map(|_| ())
    }
}

fn community(text: &str) -> Result<Community> {
    if text.starts_with("rt") {
        Community::extended(text)
    } else if text.matches(':').count() == 2 {
        Community::large(text)
    } else {
        Community::standard(text)
    }
}
