//! All BFD sessions of a speaker, on a thread of their own.
//!
//! A [`Monitor`] is told which neighbours to watch ([`Monitor::watch`]) and reports changes on a bounded channel;
//! current states are read from it at any time. Dropping the monitor ends the thread without a word; [`Monitor::leave`] signals AdminDown.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};

use super::packet::Packet;
use super::session::{Change, Output, Session};
use super::socket::{self, Datagram};
use super::{Diagnostic, Hops, Settings, State};

/// Reports that may wait.
const REPORTS: usize = 256;
/// Changes of one session that are kept for a consumer that does not keep up.
const UNREPORTED: usize = 16;
/// Commands that may wait.
const COMMANDS: usize = 16;
/// Between two attempts to open a socket.
const REOPEN: Duration = Duration::from_secs(5);
/// Datagrams that are taken at once from one socket.
const BURST: usize = 64;

/// One neighbour to watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// How.
    pub settings: Settings,
    /// Our address towards it.
    pub source: Option<IpAddr>,
    /// The interface of a link-local neighbour.
    pub scope: u32,
}

/// What happened to a neighbour's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Whose.
    pub peer: IpAddr,
    /// What.
    pub change: Change,
}

/// What people see of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The state.
    pub state: State,
    /// Why it was last down.
    pub diagnostic: Diagnostic,
    /// The interval that we send at.
    pub transmit: Duration,
    /// How long silence may last.
    pub detection: Duration,
    /// Why there can be no session, in words for an operator.
    pub problem: Option<String>,
}

type Targets = BTreeMap<IpAddr, Target>;
type States = Arc<Mutex<BTreeMap<IpAddr, Seen>>>;

enum Command {
    Watch(Targets),
    Leave(oneshot::Sender<()>),
}

/// The sessions of one speaker.
#[derive(Debug)]
pub struct Monitor {
    commands: mpsc::Sender<Command>,
    states: States,
}

impl Monitor {
    /// Starts the thread, in the network namespace of the caller.
    pub fn start(seed: u64) -> io::Result<(Self, mpsc::Receiver<Report>)> {
        let (commands, queue) = mpsc::channel(COMMANDS);
        let (reports, received) = mpsc::channel(REPORTS);
        let states = States::default();
        let shared = Arc::clone(&states);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("bfd".to_owned())
            .spawn(move || runtime.block_on(Thread::new(shared, reports, seed).run(queue)))?;
        Ok((Self { commands, states }, received))
    }

    /// Watches exactly these neighbours. Sessions that stay are not disturbed.
    pub async fn watch(&self, targets: BTreeMap<IpAddr, Target>) {
        if self.commands.send(Command::Watch(targets)).await.is_err() {
            warn!("the thread of BFD has ended");
        }
    }

    /// Signals AdminDown to everybody, before a planned restart.
    pub async fn leave(&self) {
        let (done, finished) = oneshot::channel();
        if self.commands.send(Command::Leave(done)).await.is_ok() {
            // A thread that has ended has said nothing, which neighbours notice by themselves.
            let _ = finished.await;
        }
    }

    /// What is known of a neighbour now.
    #[must_use]
    pub fn seen(&self, peer: &IpAddr) -> Option<Seen> {
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.get(peer).cloned()
    }
}

struct Watched {
    target: Target,
    session: Session,
    discriminator: u32,
    socket: Option<std::net::UdpSocket>,
    problem: Option<String>,
    /// Changes that have not been reported yet, oldest first.
    unreported: VecDeque<Change>,
}

struct Thread {
    sessions: BTreeMap<IpAddr, Watched>,
    numbers: BTreeMap<u32, IpAddr>,
    receivers: BTreeMap<(Hops, bool), UdpSocket>,
    problems: BTreeMap<(Hops, bool), String>,
    reopen_at: Option<Instant>,
    states: States,
    reports: mpsc::Sender<Report>,
    random: u64,
}

impl Thread {
    fn new(states: States, reports: mpsc::Sender<Report>, seed: u64) -> Self {
        Self {
            sessions: BTreeMap::new(),
            numbers: BTreeMap::new(),
            receivers: BTreeMap::new(),
            problems: BTreeMap::new(),
            reopen_at: None,
            states,
            reports,
            random: seed | 1,
        }
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let timer = self.next_timer();
            let far = Instant::now() + Duration::from_secs(3600);
            tokio::select! {
                biased;
                (key, datagrams) = readable(&self.receivers) => self.on_datagrams(key, datagrams),
                () = tokio::time::sleep_until(timer.unwrap_or(far).into()), if timer.is_some() => {
                    self.on_timers();
                }
                command = commands.recv() => match command {
                    None => return,
                    Some(Command::Watch(targets)) => self.watch(targets),
                    Some(Command::Leave(done)) => {
                        self.leave();
                        // Whoever asked may have stopped waiting.
                        let _ = done.send(());
                    }
                },
            }
        }
    }

    fn next_timer(&self) -> Option<Instant> {
        let sessions = self
            .sessions
            .values()
            .filter_map(|w| w.session.next_timer());
        sessions.chain(self.reopen_at).min()
    }

    /// xorshift64*; only jitter and numbers of sessions depend on it.
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn chance(&mut self) -> f64 {
        (self.random() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn number(&mut self) -> u32 {
        loop {
            let number = (self.random() >> 32) as u32;
            if number != 0 && !self.numbers.contains_key(&number) {
                return number;
            }
        }
    }

    fn watch(&mut self, targets: Targets) {
        let now = Instant::now();
        let gone: Vec<IpAddr> = self
            .sessions
            .iter()
            .filter(|(peer, watched)| {
                targets.get(peer).is_none_or(|t| {
                    (t.settings.hops, t.source, t.scope)
                        != (
                            watched.target.settings.hops,
                            watched.target.source,
                            watched.target.scope,
                        )
                })
            })
            .map(|(peer, _)| *peer)
            .collect();
        for peer in gone {
            self.drive(peer, |session, chance| session.shut_down(now, chance));
            if let Some(watched) = self.sessions.remove(&peer) {
                self.numbers.remove(&watched.discriminator);
            }
        }
        for (peer, target) in targets {
            if let Some(watched) = self.sessions.get_mut(&peer) {
                watched.target = target;
                watched.session.configure(target.settings);
                continue;
            }
            let discriminator = self.number();
            self.numbers.insert(discriminator, peer);
            let watched = Watched {
                target,
                session: Session::new(target.settings, discriminator, now),
                discriminator,
                socket: None,
                problem: None,
                unreported: VecDeque::new(),
            };
            self.sessions.insert(peer, watched);
        }
        self.open_receivers();
        self.publish();
    }

    fn leave(&mut self) {
        let now = Instant::now();
        for peer in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.drive(peer, |session, chance| session.shut_down(now, chance));
        }
        self.publish();
    }

    fn open_receivers(&mut self) {
        let wanted: std::collections::BTreeSet<(Hops, bool)> = self
            .sessions
            .iter()
            .map(|(peer, w)| (w.target.settings.hops, peer.is_ipv4()))
            .collect();
        self.receivers.retain(|key, _| wanted.contains(key));
        self.problems.retain(|key, _| wanted.contains(key));
        for key in wanted {
            if self.receivers.contains_key(&key) {
                continue;
            }
            match socket::receiver(key.0, key.1).and_then(UdpSocket::from_std) {
                Ok(socket) => {
                    self.problems.remove(&key);
                    self.receivers.insert(key, socket);
                }
                Err(error) => {
                    let text = format!("cannot open UDP port {}: {error}", key.0.port());
                    if self.problems.insert(key, text.clone()).as_ref() != Some(&text) {
                        warn!(problem = text, "BFD");
                    }
                }
            }
        }
        self.reopen_at = (!self.problems.is_empty()).then(|| Instant::now() + REOPEN);
    }

    fn on_datagrams(&mut self, key: (Hops, bool), datagrams: io::Result<Vec<Datagram>>) {
        match datagrams {
            Ok(datagrams) => {
                for datagram in &datagrams {
                    self.on_datagram(key.0, datagram);
                }
            }
            Err(error) => {
                warn!(%error, "a socket of BFD failed");
                self.receivers.remove(&key);
                self.reopen_at = Some(Instant::now() + REOPEN);
            }
        }
        self.publish();
    }

    fn on_datagram(&mut self, hops: Hops, datagram: &Datagram) {
        // RFC 5881 §5: without authentication, only a packet that no router has forwarded is believed.
        if hops == Hops::Single && datagram.ttl != Some(255) {
            return debug!(from = %datagram.from, ttl = ?datagram.ttl, "a BFD packet came through a router");
        }
        let packet = match Packet::decode(&datagram.bytes[..datagram.len]) {
            Ok(packet) => packet,
            Err(error) => {
                return debug!(from = %datagram.from, %error, "a BFD packet was not taken");
            }
        };
        // §6.8.6: by our number, or, as long as the neighbour does not know it, by who sends.
        let peer = match packet.yours {
            0 => Some(datagram.from),
            number => self.numbers.get(&number).copied(),
        };
        let known = |peer: &IpAddr| {
            *peer == datagram.from
                && self
                    .sessions
                    .get(peer)
                    .is_some_and(|w| w.target.settings.hops == hops)
        };
        let Some(peer) = peer.filter(known) else {
            return debug!(from = %datagram.from, "a BFD packet of nobody that is watched");
        };
        let now = Instant::now();
        self.drive(peer, |session, chance| {
            session.on_packet(&packet, now, chance)
        });
    }

    fn on_timers(&mut self) {
        let now = Instant::now();
        if self.reopen_at.is_some_and(|at| at <= now) {
            self.open_receivers();
        }
        let due = |w: &Watched| w.session.next_timer().is_some_and(|at| at <= now);
        let peers: Vec<IpAddr> = self
            .sessions
            .iter()
            .filter(|(_, w)| due(w))
            .map(|(peer, _)| *peer)
            .collect();
        for peer in peers {
            self.drive(peer, |session, chance| session.on_timer(now, chance));
        }
        self.publish();
    }

    /// Lets something happen to a session and carries out what follows.
    fn drive(&mut self, peer: IpAddr, act: impl FnOnce(&mut Session, f64) -> Vec<Output>) {
        let (chance, start) = (self.chance(), self.random() as u16);
        let Some(watched) = self.sessions.get_mut(&peer) else {
            return;
        };
        for output in act(&mut watched.session, chance) {
            match output {
                Output::Send(packet) => watched.send(peer, &packet, start),
                Output::Changed(change) => {
                    info!(%peer, from = ?change.from, to = ?change.to, reason = change.diagnostic.as_str(), "BFD");
                    if watched.unreported.len() == UNREPORTED {
                        watched.unreported.pop_front();
                    }
                    watched.unreported.push_back(change);
                }
            }
        }
    }

    /// Tells what has changed: reports, and the states that are read from outside.
    fn publish(&mut self) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.retain(|peer, _| self.sessions.contains_key(peer));
        for (peer, watched) in &mut self.sessions {
            while let Some(change) = watched.unreported.front().copied()
                && self
                    .reports
                    .try_send(Report {
                        peer: *peer,
                        change,
                    })
                    .is_ok()
            {
                watched.unreported.pop_front();
            }
            let key = (watched.target.settings.hops, peer.is_ipv4());
            let problem = self.problems.get(&key).or(watched.problem.as_ref());
            let seen = Seen {
                state: watched.session.state(),
                diagnostic: watched.session.diagnostic(),
                transmit: watched.session.transmit_interval(),
                detection: watched.session.detection_time(),
                problem: problem.cloned(),
            };
            if states.get(peer) != Some(&seen) {
                states.insert(*peer, seen);
            }
        }
    }
}

impl Watched {
    fn send(&mut self, peer: IpAddr, packet: &Packet, start: u16) {
        let sent = self
            .socket(peer, start)
            .and_then(|s| s.send(&packet.encode()));
        match sent {
            Ok(_) => self.problem = None,
            Err(error) => {
                // The path is not there, or not any more: a new socket finds a new source address.
                self.socket = None;
                self.problem = Some(format!("cannot send: {error}"));
            }
        }
    }

    fn socket(&mut self, peer: IpAddr, start: u16) -> io::Result<&std::net::UdpSocket> {
        if self.socket.is_none() {
            let port = self.target.settings.hops.port();
            let to = match peer {
                IpAddr::V6(ip) => {
                    std::net::SocketAddrV6::new(ip, port, 0, self.target.scope).into()
                }
                IpAddr::V4(_) => SocketAddr::new(peer, port),
            };
            self.socket = Some(socket::sender(to, self.target.source, start)?);
        }
        self.socket
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

/// Waits until something has arrived, and takes it.
async fn readable(
    receivers: &BTreeMap<(Hops, bool), UdpSocket>,
) -> ((Hops, bool), io::Result<Vec<Datagram>>) {
    if receivers.is_empty() {
        return std::future::pending().await;
    }
    let waits = receivers.iter().map(|(key, socket)| {
        Box::pin(async move {
            let take = || socket::receive(socket);
            if let Err(error) = socket.readable().await {
                return (*key, Err(error));
            }
            let mut taken = Vec::new();
            while taken.len() < BURST {
                match socket.try_io(Interest::READABLE, take) {
                    Ok(datagram) => taken.push(datagram),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return (*key, Err(error)),
                }
            }
            (*key, Ok(taken))
        })
    });
    futures::future::select_all(waits).await.0
}
