//! The task of one neighbour: carries out what its state machine ([`crate::fsm`]) decides.
//!
//! It owns the neighbour's connections, timers and dial. It never waits for the speaker: what it has to say is
//! kept in a backlog, and while something is in it no more messages are taken from the connections. So a busy
//! table slows the peer down through TCP, while keepalives go on.

mod counters;
mod link;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use crate::fsm::{Action, DownCause, Event, Jitter, OpenFacts, Peer, Role, State, Timer, Wait};
use crate::speaker::settings::SessionSettings;
use crate::transport::{Connection, Target, Transport};
use crate::wire::{
    AddPathMode, Capability, Codec, Family, GracefulRestart, GracefulRestartFamily,
    LongLivedFamily, Message, Negotiated, Notification, Open, PeerKind, RouteRefresh, Update,
};
pub(crate) use counters::Counters;
use link::{Link, LinkEvent, LinkReport};

/// Portions of routes that may wait for a connection; the speaker bounds the size of each.
const ROUTE_QUEUE: usize = 4;
/// Reports of both connections that may wait. Each may hold as much as was read at once.
const REPORT_QUEUE: usize = 2;
/// RFC 9687 §3.2: at least eight minutes.
const SEND_HOLD: Duration = Duration::from_secs(480);
/// How long the last messages may take when a neighbour's task ends.
const GOODBYE: Duration = Duration::from_secs(2);
/// How much longer a peer is believed when it is us who are late with reading.
const STARVED: Duration = Duration::from_secs(1);

/// From the speaker to a neighbour's task. Dropping the sender ends the task without a word to the peer.
#[derive(Debug)]
pub(crate) enum Command {
    /// The listener took a connection of this neighbour.
    Accepted(Connection),
    /// New settings; the session, if any, begins again.
    Configure(SessionSettings),
    /// End the session with this NOTIFICATION, and begin again.
    Reset(Notification),
    /// End with this NOTIFICATION.
    Stop(Notification),
    /// The path to the peer is broken: close without a word, so that both ends keep routes as for a restart.
    PathLost,
    /// Ask the peer for its routes (RFC 2918).
    Refresh,
}

/// From a neighbour's task to the speaker.
#[derive(Debug)]
pub(crate) enum Report {
    /// The state changed.
    State { state: State, info: Option<String> },
    /// A session stands.
    Up(Box<SessionUp>),
    /// UPDATEs of the session, in order.
    Updates(Vec<Update>),
    /// A ROUTE-REFRESH of the session.
    Refresh(RouteRefresh),
    /// The session ended.
    Down(DownCause),
}

/// Which neighbour, the number of its session, what it reports.
pub(crate) type PeerReport = (IpAddr, u32, Report);

/// What the speaker learns of a new session.
#[derive(Debug)]
pub(crate) struct SessionUp {
    pub(crate) negotiated: Negotiated,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    pub(crate) capabilities: Vec<Capability>,
    /// The whole OPEN messages, ours and the peer's.
    pub(crate) opens: (Bytes, Bytes),
    /// Where encoded routes go.
    pub(crate) routes: mpsc::Sender<Vec<Bytes>>,
}

/// What surrounds a neighbour's task.
pub(crate) struct Surroundings {
    pub(crate) peer: IpAddr,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) reports: mpsc::Sender<PeerReport>,
    /// Whether the speaker is in its own restart (R bit).
    pub(crate) restarting: watch::Receiver<bool>,
    /// Seed of the jitter.
    pub(crate) seed: u64,
    /// Counts messages.
    pub(crate) counters: Arc<Counters>,
}

/// A connection whose OPEN has not been sent yet, or that is in use.
struct Slot {
    link: Link,
    local: SocketAddr,
    remote: SocketAddr,
    /// Our OPEN.
    sent: Bytes,
    opened: Option<Opened>,
}

/// What came of the peer's OPEN.
#[derive(Clone)]
struct Opened {
    negotiated: Negotiated,
    capabilities: Vec<Capability>,
    message: Bytes,
}

/// The state of a neighbour's task.
pub(crate) struct Session {
    around: Surroundings,
    settings: SessionSettings,
    fsm: Peer,
    commands: mpsc::Receiver<Command>,
    slots: [Option<Slot>; 2],
    /// Connections that the transport gave us and the state machine has not answered yet.
    fresh: [Option<Connection>; 2],
    dial: Option<JoinHandle<io::Result<Connection>>>,
    /// Connections that still send their last message.
    closing: Vec<JoinHandle<()>>,
    timers: BTreeMap<Timer, Instant>,
    link_reports: (mpsc::Sender<LinkReport>, mpsc::Receiver<LinkReport>),
    backlog: VecDeque<(u32, Report)>,
    epoch: u32,
    serial: u64,
    shown: (State, Option<String>),
    last_error: Option<String>,
    jitter: Randomness,
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(dial) = &self.dial {
            dial.abort();
        }
    }
}

/// A small generator for jitter (xorshift64*); nothing depends on its quality.
struct Randomness(u64);

impl Randomness {
    /// Between 0 and 1.
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn apply(&mut self, wait: Wait) -> Duration {
        match wait.jitter {
            Jitter::None => wait.duration,
            Jitter::Quarter => wait.duration.mul_f64(0.75 + 0.25 * self.next()),
            Jitter::Full => wait.duration.mul_f64(self.next()),
        }
    }
}

impl Session {
    /// A neighbour's task, to be run.
    pub(crate) fn new(
        around: Surroundings,
        settings: SessionSettings,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let seed = around.seed | 1;
        Self {
            around,
            fsm: Peer::new(settings.fsm()),
            settings,
            commands,
            slots: [None, None],
            fresh: [None, None],
            dial: None,
            closing: Vec::new(),
            timers: BTreeMap::new(),
            link_reports: mpsc::channel(REPORT_QUEUE),
            backlog: VecDeque::new(),
            epoch: 0,
            serial: 0,
            shown: (State::Idle, None),
            last_error: None,
            jitter: Randomness(seed),
        }
    }

    /// Runs until the speaker drops its side or says stop.
    pub(crate) async fn run(mut self) {
        let reports = self.around.reports.clone();
        self.start();
        loop {
            self.show();
            let next_timer = self.timers.values().min().copied();
            let far = Instant::now() + Duration::from_secs(86_400);
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    None => return,
                    Some(Command::Stop(notify)) => {
                        self.event(Event::Stop(Some(notify)));
                        return self.say_goodbye().await;
                    }
                    Some(command) => self.on_command(command),
                },
                permit = reports.reserve(), if !self.backlog.is_empty() => {
                    let Ok(permit) = permit else { return };
                    if let Some((epoch, report)) = self.backlog.pop_front() {
                        permit.send((self.around.peer, epoch, report));
                    }
                }
                () = sleep_until(next_timer.unwrap_or(far)), if next_timer.is_some() => self.on_timers(),
                dialed = dial_result(&mut self.dial), if self.dial.is_some() => self.on_dialed(dialed),
                Some((role, serial, event)) = self.link_reports.1.recv(), if self.backlog.is_empty() => {
                    self.on_link(role, serial, event);
                }
            }
        }
    }

    /// Waits until the last messages are out, or too long.
    async fn say_goodbye(mut self) {
        let closing = std::mem::take(&mut self.closing);
        let _ = tokio::time::timeout(GOODBYE, futures::future::join_all(closing)).await;
    }

    fn start(&mut self) {
        if self.settings.blocked.is_none() {
            self.event(Event::Start);
        }
    }

    /// Tells the speaker when the state that people see has changed.
    fn show(&mut self) {
        let info = self
            .settings
            .blocked
            .clone()
            .or_else(|| self.last_error.clone());
        let now = (self.fsm.state(), info);
        if now != self.shown {
            self.shown = now.clone();
            self.report(Report::State {
                state: now.0,
                info: now.1,
            });
        }
    }

    fn report(&mut self, report: Report) {
        self.backlog.push_back((self.epoch, report));
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Accepted(connection) => {
                self.fresh[Role::Accepted as usize] = Some(connection);
                self.event(Event::Accepted);
                self.fresh[Role::Accepted as usize] = None;
            }
            Command::Configure(settings) => {
                let notify = Notification::new(
                    crate::wire::ErrorCode::Cease,
                    crate::wire::cease::OTHER_CONFIG_CHANGE,
                );
                self.event(Event::Stop(Some(notify)));
                self.fsm.set_settings(settings.fsm());
                self.settings = settings;
                self.last_error = None;
                self.start();
            }
            Command::Reset(notify) => self.event(Event::Reset(notify)),
            Command::Stop(notify) => self.event(Event::Stop(Some(notify))),
            Command::PathLost => self.event(Event::PathLost),
            Command::Refresh => self.request_refresh(),
        }
    }

    fn request_refresh(&mut self) {
        let Some(slot) = self
            .fsm
            .established()
            .and_then(|r| self.slots[r as usize].as_ref())
        else {
            return;
        };
        let Some(Opened { negotiated, .. }) = &slot.opened else {
            return;
        };
        if !negotiated.route_refresh {
            return;
        }
        for family in negotiated.codec.families.iter() {
            let refresh = RouteRefresh {
                family,
                kind: crate::wire::RefreshKind::Request,
            };
            let message = Message::RouteRefresh(refresh);
            self.around.counters.on_sent(&message);
            send(&slot.link, &message, &negotiated.codec);
        }
    }

    fn on_timers(&mut self) {
        let now = Instant::now();
        let due: Vec<Timer> = self
            .timers
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(timer, _)| *timer)
            .collect();
        for timer in due {
            let behind = !self.backlog.is_empty() || !self.link_reports.1.is_empty();
            if matches!(timer, Timer::Hold(_)) && behind {
                self.timers.insert(timer, now + STARVED);
                continue;
            }
            // An earlier timer of this round may have cancelled it.
            if self.timers.remove(&timer).is_some() {
                self.event(Event::Timer(timer));
            }
        }
    }

    fn on_dialed(&mut self, result: io::Result<Connection>) {
        self.dial = None;
        match result {
            Ok(connection) => {
                self.fresh[Role::Dialed as usize] = Some(connection);
                self.event(Event::DialSucceeded);
                self.fresh[Role::Dialed as usize] = None;
            }
            Err(error) => {
                debug!(peer = %self.around.peer, %error, "dial failed");
                self.last_error = Some(error.to_string());
                self.event(Event::DialFailed);
            }
        }
    }

    fn on_link(&mut self, role: Role, serial: u64, event: LinkEvent) {
        let Some(slot) = &mut self.slots[role as usize] else {
            return;
        };
        if slot.link.serial != serial {
            return;
        }
        let message = match event {
            LinkEvent::Open(open, negotiated) => {
                slot.opened.get_or_insert_with(|| Opened {
                    negotiated: *negotiated,
                    capabilities: open.capabilities.clone(),
                    message: whole(&Message::Open(open.clone())),
                });
                Message::Open(open)
            }
            LinkEvent::Message(message) => message,
            LinkEvent::Updates(updates) => return self.on_updates(role, updates),
            LinkEvent::Malformed(notify) => return self.event(Event::Malformed(role, notify)),
            LinkEvent::Closed => return self.event(Event::Closed(role)),
            LinkEvent::Stalled => return self.event(Event::SendStalled(role)),
        };
        self.around.counters.on_received(&message);
        let carries = self.fsm.established() == Some(role);
        match message {
            Message::Open(open) => {
                let graceful_restart = open
                    .graceful_restart()
                    .is_some_and(|gr| !gr.families.is_empty());
                let facts = OpenFacts {
                    asn: open.asn,
                    id: open.router_id,
                    hold_time: open.hold_time,
                    graceful_restart,
                };
                self.event(Event::Open(role, facts));
            }
            Message::Keepalive => self.event(Event::Keepalive(role)),
            Message::Notification(notify) => {
                self.last_error = Some(format!("received {notify}"));
                self.event(Event::Notification(role, notify));
            }
            Message::Update(update) => self.on_updates(role, vec![*update]),
            Message::RouteRefresh(refresh) => {
                self.event(Event::Refresh(role));
                if carries {
                    self.report(Report::Refresh(refresh));
                }
            }
        }
    }

    /// For the state machine, UPDATEs that came together are one.
    fn on_updates(&mut self, role: Role, updates: Vec<Update>) {
        let carries = self.fsm.established() == Some(role);
        self.event(Event::Update(role));
        if carries {
            self.report(Report::Updates(updates));
        }
    }

    fn event(&mut self, event: Event) {
        let actions = self.fsm.handle(event);
        for action in actions {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Dial => self.dial(),
            Action::CancelDial => {
                if let Some(dial) = self.dial.take() {
                    dial.abort();
                }
            }
            // The connection is started by the SendOpen that follows.
            Action::Take => {}
            Action::Refuse(notify) => self.refuse(notify),
            Action::SendOpen(role) => self.open(role),
            Action::SendKeepalive(role) => self.send(role, &Message::Keepalive),
            Action::SendNotification(role, notify) => {
                warn!(peer = %self.around.peer, reason = %notify, "ending the connection");
                self.last_error = Some(format!("sent {notify}"));
                self.send(role, &Message::Notification(notify));
            }
            Action::Close(role) => {
                self.closing.retain(|task| !task.is_finished());
                self.closing.extend(
                    self.slots[role as usize]
                        .take()
                        .and_then(|slot| slot.link.close()),
                );
            }
            Action::Set(timer, wait) => {
                let at = Instant::now() + self.jitter.apply(wait);
                self.timers.insert(timer, at);
            }
            Action::Cancel(timer) => {
                self.timers.remove(&timer);
            }
            Action::Up(role) => self.up(role),
            Action::Down(cause) => {
                info!(peer = %self.around.peer, reason = %cause.describe(), "session down");
                if self.last_error.is_none() {
                    self.last_error = Some(cause.describe());
                }
                self.report(Report::Down(cause));
            }
        }
    }

    fn dial(&mut self) {
        let target = Target {
            remote: SocketAddr::new(self.around.peer, self.settings.port),
            source: self.settings.source,
            interface: self.settings.interface.clone(),
            protection: self.settings.protection.clone(),
        };
        let transport = Arc::clone(&self.around.transport);
        self.dial = Some(tokio::spawn(async move { transport.dial(&target).await }));
    }

    /// Tells a connection that is not wanted why, without keeping it.
    fn refuse(&mut self, notify: Notification) {
        let Some(mut connection) = self.fresh[Role::Accepted as usize].take() else {
            return;
        };
        let Ok(message) = Message::Notification(notify).encode(&Codec::basic(PeerKind::Ibgp))
        else {
            return;
        };
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            let write = async {
                connection.stream.write_all(&message).await?;
                connection.stream.shutdown().await
            };
            // Whether the peer learns the reason does not matter to us.
            let _ = tokio::time::timeout(Duration::from_secs(1), write).await;
        });
    }

    fn open(&mut self, role: Role) {
        let Some(connection) = self.fresh[role as usize].take() else {
            return;
        };
        self.serial += 1;
        let ours = self.our_open();
        let (local, remote) = (connection.local, connection.remote);
        let reports = self.link_reports.0.clone();
        let message = Message::Open(ours.clone());
        let link = Link::start(connection, role, self.serial, ours, SEND_HOLD, reports);
        self.around.counters.on_sent(&message);
        let sent = whole(&message);
        link.send(sent.clone());
        self.slots[role as usize] = Some(Slot {
            link,
            local,
            remote,
            sent,
            opened: None,
        });
    }

    fn our_open(&self) -> Open {
        let settings = &self.settings;
        let mut capabilities: Vec<Capability> = settings
            .families
            .iter()
            .map(Capability::Multiprotocol)
            .collect();
        capabilities.extend([
            Capability::RouteRefresh,
            Capability::EnhancedRouteRefresh,
            Capability::ExtendedMessage,
        ]);
        if settings.add_path != AddPathMode::OFF {
            let mode = |family| (family, settings.add_path);
            capabilities.push(Capability::AddPath(
                settings.families.iter().map(mode).collect(),
            ));
        }
        if settings.extended_next_hop && settings.families.contains(Family::IPV4_UNICAST) {
            let over_v6 = (Family::IPV4_UNICAST, Family::IPV6_UNICAST.afi);
            capabilities.push(Capability::ExtendedNextHop(vec![over_v6]));
        }
        if settings.restart_time > 0 {
            let preserved = |family: Family| GracefulRestartFamily {
                family,
                forwarding_preserved: true,
            };
            capabilities.push(Capability::GracefulRestart(GracefulRestart {
                restarting: *self.around.restarting.borrow(),
                notification: false,
                restart_time: settings.restart_time.min(4095),
                families: settings.families.iter().map(preserved).collect(),
            }));
            if let Some(stale_time) = settings.long_lived {
                let kept = |family| LongLivedFamily {
                    family,
                    forwarding_preserved: true,
                    stale_time,
                };
                capabilities.push(Capability::LongLivedGracefulRestart(
                    settings.families.iter().map(kept).collect(),
                ));
            }
        }
        Open {
            asn: settings.local_as,
            hold_time: settings.hold_time,
            router_id: settings.router_id,
            capabilities,
            four_octet_as: true,
        }
    }

    fn send(&self, role: Role, message: &Message) {
        let Some(slot) = &self.slots[role as usize] else {
            return;
        };
        let codec = slot
            .opened
            .as_ref()
            .map_or(Codec::basic(PeerKind::Ibgp), |opened| {
                opened.negotiated.codec
            });
        self.around.counters.on_sent(message);
        send(&slot.link, message, &codec);
    }

    fn up(&mut self, role: Role) {
        let Some(slot) = &mut self.slots[role as usize] else {
            return;
        };
        let Some(opened) = slot.opened.clone() else {
            return;
        };
        let negotiated = opened.negotiated;
        let (routes, queue) = mpsc::channel(ROUTE_QUEUE);
        slot.link.routes(queue);
        self.epoch += 1;
        self.last_error = None;
        info!(peer = %self.around.peer, families = ?negotiated.codec.families, hold = negotiated.hold_time, "session up");
        let up = SessionUp {
            negotiated,
            local: slot.local,
            remote: slot.remote,
            capabilities: opened.capabilities,
            opens: (slot.sent.clone(), opened.message),
            routes,
        };
        self.report(Report::Up(Box::new(up)));
    }
}

/// An OPEN as octets.
fn whole(open: &Message) -> Bytes {
    open.encode(&Codec::basic(PeerKind::Ibgp))
        .unwrap_or_else(|error| {
            warn!(%error, "an OPEN could not be encoded");
            Bytes::new()
        })
}

fn send(link: &Link, message: &Message, codec: &Codec) {
    match message.encode(codec) {
        Ok(bytes) => link.send(bytes),
        Err(error) => warn!(%error, "a message could not be encoded"),
    }
}

async fn dial_result(
    dial: &mut Option<JoinHandle<io::Result<Connection>>>,
) -> io::Result<Connection> {
    let Some(task) = dial else {
        return std::future::pending().await;
    };
    task.await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}
