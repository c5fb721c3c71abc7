//! All neighbours of the daemon under test, as scripted peers on one thread.
//!
//! A peer dials, keeps the session up, sends prepared bytes when told to, and counts which prefixes it has been
//! announced. It selects nothing and keeps no attributes, so that it costs little beside the daemon.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bgpd::wire::{Capability, Codec, Framer, Message, Open, PeerKind, Update};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::shape::{Layout, Neighbour, Shape, codec};

const PORT: u16 = 179;
const HOLD: u16 = 180;
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Octets read at once.
const READ: usize = 256 * 1024;
/// Receive buffer of a peer that does not read, in octets.
const STALLED_BUFFER: u32 = 64 * 1024;
/// Octets written at once.
const WRITE: usize = 64 * 1024;
/// How long a connection may be silent before it is given up.
const SILENCE: Duration = Duration::from_secs(3);
/// Between two attempts to reach the daemon.
const RETRY: Duration = Duration::from_millis(20);

/// What a peer is told.
#[derive(Debug, Clone)]
enum Order {
    Send(Arc<Vec<u8>>),
}

/// What is counted over all peers. Reset between phases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Progress {
    established: usize,
    /// Prefixes that measured peers have, each counted once for each of them.
    held: u64,
    /// What `held` must become.
    goal: u64,
    first: Option<Instant>,
    updates: u64,
    lost: usize,
}

/// What a peer knows of a phase's progress.
struct Reception {
    layout: Layout,
    expects: u32,
    own: std::ops::Range<u32>,
    seen: Vec<u64>,
    progress: watch::Sender<Progress>,
}

impl Reception {
    fn new(shape: &Shape, neighbour: &Neighbour, progress: watch::Sender<Progress>) -> Self {
        let words = if neighbour.expects > 0 {
            shape.prefixes.div_ceil(64) as usize
        } else {
            0
        };
        Self {
            layout: shape.layout,
            expects: neighbour.expects,
            own: neighbour.sends.clone(),
            seen: vec![0; words],
            progress,
        }
    }

    /// Word and bit of a prefix that counts.
    fn place(&self, prefix: &bgpd::wire::Prefix) -> Option<(usize, u64)> {
        let number = self.layout.number(prefix)?;
        let word = number as usize / 64;
        (!self.own.contains(&number) && word < self.seen.len())
            .then_some((word, 1 << (number % 64)))
    }

    fn on_update(&mut self, update: &Update) {
        if self.expects == 0 {
            return;
        }
        let (mut lost, mut won) = (0, 0);
        for nlri in update.withdrawals() {
            if let Some((word, bit)) = self.place(&nlri.prefix)
                && self.seen[word] & bit != 0
            {
                self.seen[word] &= !bit;
                lost += 1;
            }
        }
        for nlri in update.announcements().flat_map(|(_, block)| block.iter()) {
            if let Some((word, bit)) = self.place(&nlri.prefix)
                && self.seen[word] & bit == 0
            {
                self.seen[word] |= bit;
                won += 1;
            }
        }
        self.progress.send_if_modified(|progress| {
            progress.updates += 1;
            progress.first.get_or_insert_with(Instant::now);
            progress.held = progress.held + won - lost;
            won + lost > 0 && progress.held == progress.goal
        });
    }
}

/// The encoded messages of one peer.
struct Prepared {
    announce: Arc<Vec<u8>>,
    withdraw: Arc<Vec<u8>>,
    /// A hundredth of it, withdrawn and announced.
    flap: [Arc<Vec<u8>>; 2],
}

/// The peers of one run.
pub struct Generator {
    orders: Vec<mpsc::Sender<Order>>,
    progress: watch::Receiver<Progress>,
    counted: watch::Sender<Progress>,
    shape: Shape,
    messages: Vec<Prepared>,
    /// Lets the peers read that have not so far.
    reading: watch::Sender<bool>,
    /// Ends a peer.
    ends: Vec<AbortHandle>,
    /// Peers whose end was wanted.
    ended: usize,
    /// Peers that keep the sessions; aborted when dropped.
    tasks: JoinSet<Result<()>>,
}

/// How a phase went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phase {
    /// From the first octet sent to the last peer that has everything (or nothing any more).
    pub full: Duration,
    /// To the first UPDATE that arrived.
    pub first: Duration,
    /// UPDATEs that measured peers received.
    pub updates: u64,
}

impl Generator {
    /// Prepares the messages and starts to dial, everybody at once. Must run inside a runtime in the load's namespace.
    #[must_use]
    pub fn start(shape: &Shape) -> Self {
        let (counted, progress) = watch::channel(Progress::default());
        let reading = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        let (mut orders, mut ends) = (Vec::new(), Vec::new());
        for neighbour in &shape.neighbours {
            let (sender, queue) = mpsc::channel(4);
            orders.push(sender);
            let reception = Reception::new(shape, neighbour, counted.clone());
            let ends_at = Ends {
                ours: shape.address(neighbour),
                device: shape.device(),
            };
            let may_read = neighbour.stalls.then(|| reading.subscribe());
            ends.push(tasks.spawn(peer(neighbour.clone(), ends_at, reception, queue, may_read)));
        }
        let joined = |messages: Vec<Bytes>| Arc::new(messages.concat());
        let messages = shape.neighbours.iter().map(|n| {
            let (announce, withdraw) = shape.messages(n);
            let (again, away) = shape.flap(n);
            Prepared {
                announce: joined(announce),
                withdraw: joined(withdraw),
                flap: [joined(away), joined(again)],
            }
        });
        Self {
            orders,
            progress,
            counted,
            messages: messages.collect(),
            shape: shape.clone(),
            reading,
            ends,
            ended: 0,
            tasks,
        }
    }

    /// Waits until every session stands.
    pub async fn established(&mut self, limit: Duration) -> Result<()> {
        let count = self.orders.len();
        let wait = self
            .progress
            .wait_for(|p| p.established == count || p.lost > 0);
        let ended = tokio::time::timeout(limit, wait).await.is_ok();
        let seen = *self.counted.borrow();
        ensure!(
            ended && seen.lost == 0,
            "{} of {count} sessions are established: {}",
            seen.established,
            self.first_failure().await
        );
        Ok(())
    }

    async fn first_failure(&mut self) -> String {
        match tokio::time::timeout(Duration::from_millis(100), self.tasks.join_next()).await {
            Ok(Some(Ok(Err(error)))) => format!("{error:#}"),
            _ => "no peer says why".to_owned(),
        }
    }

    /// What measured peers have when these prefixes of each sender are announced.
    fn goal(&self, announced: impl Fn(&Neighbour) -> u32) -> u64 {
        let all: u64 = self
            .shape
            .neighbours
            .iter()
            .map(|n| u64::from(announced(n)))
            .sum();
        let reads = *self.reading.borrow();
        let measured = self.shape.neighbours.iter();
        measured
            .filter(|n| n.expects > 0 && (reads || !n.stalls))
            .map(|n| all - u64::from(announced(n)))
            .sum()
    }

    /// Everybody sends; ends when every measured peer (that reads) has what it expects.
    pub async fn announce(&mut self, limit: Duration) -> Result<Phase> {
        let goal = self.goal(|n| n.sends.len() as u32);
        self.phase(goal, limit, |m| Some(Arc::clone(&m.announce)))
            .await
    }

    /// Everybody takes everything back; ends when every measured peer has nothing.
    pub async fn withdraw(&mut self, limit: Duration) -> Result<Phase> {
        self.phase(0, limit, |m| Some(Arc::clone(&m.withdraw)))
            .await
    }

    /// Everybody takes a hundredth back and announces it again, so many times; each time everything must arrive.
    pub async fn churn(&mut self, times: u32, limit: Duration) -> Result<Phase> {
        let away = self.goal(|n| n.sends.len() as u32 - n.sends.len() as u32 / 100);
        let all = self.goal(|n| n.sends.len() as u32);
        let mut sum = Phase::default();
        for _ in 0..times {
            for (goal, what) in [(away, 0), (all, 1)] {
                let phase = self
                    .phase(goal, limit, |m| Some(Arc::clone(&m.flap[what])))
                    .await?;
                sum.full += phase.full;
                sum.updates += phase.updates;
            }
        }
        Ok(sum)
    }

    /// The first peer's connection ends; ends when every measured peer has lost its prefixes.
    pub async fn lose_first(&mut self, limit: Duration) -> Result<Phase> {
        let gone = self.shape.neighbours[0].id;
        let goal = self.goal(|n| {
            if n.id == gone {
                0
            } else {
                n.sends.len() as u32
            }
        });
        self.ended += 1;
        self.ends[0].abort();
        // Its writer ends with its orders.
        self.orders[0] = mpsc::channel(1).0;
        self.phase(goal, limit, |_| None).await
    }

    /// Peers that have not read so far do; ends when they have what they expect.
    pub async fn let_read(&mut self, limit: Duration) -> Result<Phase> {
        self.reading.send_replace(true);
        let goal = self.goal(|n| n.sends.len() as u32);
        self.phase(goal, limit, |_| None).await
    }

    async fn phase(
        &mut self,
        goal: u64,
        limit: Duration,
        messages: impl Fn(&Prepared) -> Option<Arc<Vec<u8>>>,
    ) -> Result<Phase> {
        self.counted.send_modify(|p| {
            p.first = None;
            p.updates = 0;
            p.goal = goal;
        });
        let start = Instant::now();
        for (order, prepared) in self.orders.iter().zip(&self.messages) {
            let Some(bytes) = messages(prepared).filter(|b| !b.is_empty()) else {
                continue;
            };
            order
                .send(Order::Send(bytes))
                .await
                .context("a peer has ended")?;
        }
        let wanted = self.ended;
        let wait = self
            .progress
            .wait_for(|p| p.lost > wanted || p.held == goal);
        let ended = tokio::time::timeout(limit, wait).await.is_ok();
        let full = start.elapsed();
        let seen = *self.counted.borrow();
        if !ended || seen.lost > wanted {
            let why = self.first_failure().await;
            bail!("after {full:.1?}: {seen:?}: {why}");
        }
        Ok(Phase {
            full,
            first: seen.first.map_or(full, |at| at.duration_since(start)),
            updates: seen.updates,
        })
    }
}

/// Counts a session for as long as it stands.
struct Standing(watch::Sender<Progress>);

impl Drop for Standing {
    fn drop(&mut self) {
        self.0.send_modify(|p| p.lost += 1);
    }
}

/// Both ends of a connection.
#[derive(Debug, Clone, Copy)]
struct Ends {
    ours: IpAddr,
    device: IpAddr,
}

async fn peer(
    neighbour: Neighbour,
    ends: Ends,
    reception: Reception,
    orders: mpsc::Receiver<Order>,
    may_read: Option<watch::Receiver<bool>>,
) -> Result<()> {
    session(neighbour, ends, reception, orders, may_read)
        .await
        .with_context(|| format!("peer {}", ends.ours))
}

async fn session(
    neighbour: Neighbour,
    ends: Ends,
    mut reception: Reception,
    orders: mpsc::Receiver<Order>,
    may_read: Option<watch::Receiver<bool>>,
) -> Result<()> {
    let codec = codec(&neighbour, reception.layout);
    let (mut read, mut write, mut buffer) = open(&neighbour, ends, &codec).await?;
    let standing = Standing(reception.progress.clone());
    standing.0.send_modify(|p| p.established += 1);
    let writer = tokio::spawn(async move {
        let error = writing(&mut write, orders).await.err();
        error.map_or_else(|| "the run is over".to_owned(), |e| format!("{e:#}"))
    });
    if let Some(mut may_read) = may_read {
        may_read.wait_for(|may| *may).await?;
    }
    let end = reading(&mut read, &mut buffer, &codec, &mut reception).await;
    writer.abort();
    drop(standing);
    end
}

/// Dials until a session stands. Whatever the daemon says no to is tried again: only the limit of the run counts.
async fn open(
    neighbour: &Neighbour,
    ends: Ends,
    codec: &Codec,
) -> Result<(OwnedReadHalf, OwnedWriteHalf, BytesMut)> {
    loop {
        // A daemon whose accept queue is full leaves a connection without an answer.
        let attempt = tokio::time::timeout(SILENCE, handshake(neighbour, ends, codec)).await;
        let silent = || Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
        match attempt.unwrap_or_else(|_| silent()) {
            Ok(opened) => return Ok(opened),
            Err(error) if error.downcast_ref::<std::io::Error>().is_some() => {
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn handshake(
    neighbour: &Neighbour,
    ends: Ends,
    codec: &Codec,
) -> Result<(OwnedReadHalf, OwnedWriteHalf, BytesMut)> {
    let socket = if ends.ours.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_nodelay(true)?;
    if neighbour.stalls {
        // A window that is full at once; the daemon's end takes up to `tcp_wmem` (4 MiB).
        socket.set_recv_buffer_size(STALLED_BUFFER)?;
    }
    socket.bind(SocketAddr::new(ends.ours, 0))?;
    let stream = socket.connect(SocketAddr::new(ends.device, PORT)).await?;
    let (mut read, mut write) = stream.into_split();
    let families = codec.families.iter();
    let open = Message::Open(Open {
        asn: neighbour.asn,
        hold_time: HOLD,
        router_id: neighbour.id,
        capabilities: families
            .map(Capability::Multiprotocol)
            .chain([Capability::RouteRefresh])
            .collect(),
        four_octet_as: true,
    });
    let basic = Codec::basic(PeerKind::Ibgp);
    write.write_all(&open.encode(&basic)?).await?;
    let mut buffer = BytesMut::with_capacity(4096);
    loop {
        match next(&mut read, &mut buffer, codec).await? {
            Message::Open(_) => write.write_all(&Message::Keepalive.encode(&basic)?).await?,
            Message::Keepalive => return Ok((read, write, buffer)),
            // As if the connection had been refused.
            Message::Notification(_) => {
                return Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused).into());
            }
            other => bail!("{other:?} before the session stands"),
        }
    }
}

async fn next(read: &mut OwnedReadHalf, buffer: &mut BytesMut, codec: &Codec) -> Result<Message> {
    loop {
        if let Some(frame) = Framer::new().next(buffer).map_err(|n| refused(&n))? {
            return Message::decode(&frame, codec).map_err(|n| refused(&n));
        }
        buffer.reserve(READ);
        if read.read_buf(buffer).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
}

fn refused(notify: &bgpd::wire::Notification) -> anyhow::Error {
    anyhow::anyhow!("the daemon sent something malformed: {notify}")
}

async fn reading(
    read: &mut OwnedReadHalf,
    buffer: &mut BytesMut,
    codec: &Codec,
    reception: &mut Reception,
) -> Result<()> {
    loop {
        match next(read, buffer, codec).await? {
            Message::Update(update) => reception.on_update(&update),
            Message::Notification(notify) => bail!("the daemon ended the session: {notify}"),
            Message::Open(_) => bail!("a second OPEN"),
            Message::Keepalive | Message::RouteRefresh(_) => {}
        }
    }
}

async fn writing(write: &mut OwnedWriteHalf, mut orders: mpsc::Receiver<Order>) -> Result<()> {
    let keepalive = Message::Keepalive.encode(&Codec::basic(PeerKind::Ibgp))?;
    let mut tick = tokio::time::interval(KEEPALIVE);
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                None => return Ok(()),
                Some(Order::Send(bytes)) => {
                    for chunk in bytes.chunks(WRITE) {
                        write.write_all(chunk).await?;
                    }
                }
            },
            _ = tick.tick() => write.write_all(&keepalive).await?,
        }
    }
}
