//! All neighbours of the daemon under test, as scripted peers on one thread.
//!
//! A peer dials, keeps the session up, sends prepared bytes when told to, and counts which prefixes it has been
//! announced. It selects nothing and keeps no attributes, so that it costs little beside the daemon.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bgpd::wire::{Capability, Codec, Family, Framer, Message, Open, PeerKind, Update};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::shape::{DEVICE, Layout, Neighbour, Shape, codec};

const PORT: u16 = 179;
const HOLD: u16 = 180;
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Octets read at once.
const READ: usize = 256 * 1024;
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
    /// Measured peers that have everything they expect.
    full: usize,
    /// Measured peers that have nothing.
    empty: usize,
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
    count: u32,
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
            count: 0,
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
        let before = self.count;
        for nlri in update.withdrawals() {
            if let Some((word, bit)) = self.place(&nlri.prefix)
                && self.seen[word] & bit != 0
            {
                self.seen[word] &= !bit;
                self.count -= 1;
            }
        }
        for nlri in update.announcements().flat_map(|(_, block)| block.iter()) {
            if let Some((word, bit)) = self.place(&nlri.prefix)
                && self.seen[word] & bit == 0
            {
                self.seen[word] |= bit;
                self.count += 1;
            }
        }
        let (after, expects) = (self.count, self.expects);
        self.progress.send_if_modified(|progress| {
            progress.updates += 1;
            progress.first.get_or_insert_with(Instant::now);
            let step = |counter: &mut usize, was: bool, is: bool| {
                *counter = *counter + usize::from(is) - usize::from(was);
            };
            step(&mut progress.full, before == expects, after == expects);
            step(&mut progress.empty, before == 0, after == 0);
            before != after && (after == expects || after == 0)
        });
    }
}

/// The encoded messages of one peer.
struct Prepared {
    announce: Arc<Vec<u8>>,
    withdraw: Arc<Vec<u8>>,
}

/// The peers of one run.
pub struct Generator {
    orders: Vec<mpsc::Sender<Order>>,
    progress: watch::Receiver<Progress>,
    counted: watch::Sender<Progress>,
    measured: usize,
    messages: Vec<Prepared>,
    /// Peers that keep the sessions; aborted when dropped.
    tasks: JoinSet<Result<()>>,
}

/// How a phase went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        let mut tasks = JoinSet::new();
        let mut orders = Vec::new();
        for neighbour in &shape.neighbours {
            let (sender, queue) = mpsc::channel(4);
            orders.push(sender);
            let reception = Reception::new(shape, neighbour, counted.clone());
            tasks.spawn(peer(neighbour.clone(), reception, queue));
        }
        let joined = |messages: Vec<Bytes>| Arc::new(messages.concat());
        let messages = shape.neighbours.iter().map(|n| {
            let (announce, withdraw) = shape.messages(n);
            Prepared {
                announce: joined(announce),
                withdraw: joined(withdraw),
            }
        });
        let measured = shape.neighbours.iter().filter(|n| n.expects > 0).count();
        counted.send_modify(|p| p.empty = measured);
        Self {
            orders,
            progress,
            counted,
            measured,
            messages: messages.collect(),
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

    /// Everybody sends; ends when every measured peer has what it expects.
    pub async fn announce(&mut self, limit: Duration) -> Result<Phase> {
        let messages = self
            .messages
            .iter()
            .map(|m| Arc::clone(&m.announce))
            .collect();
        self.phase(messages, limit, |p, measured| p.full == measured)
            .await
    }

    /// Everybody takes everything back; ends when every measured peer has nothing.
    pub async fn withdraw(&mut self, limit: Duration) -> Result<Phase> {
        let messages = self
            .messages
            .iter()
            .map(|m| Arc::clone(&m.withdraw))
            .collect();
        self.phase(messages, limit, |p, measured| p.empty == measured)
            .await
    }

    async fn phase(
        &mut self,
        messages: Vec<Arc<Vec<u8>>>,
        limit: Duration,
        done: impl Fn(&Progress, usize) -> bool,
    ) -> Result<Phase> {
        self.counted.send_modify(|p| {
            p.first = None;
            p.updates = 0;
        });
        let start = Instant::now();
        for (order, bytes) in self.orders.iter().zip(messages) {
            order
                .send(Order::Send(bytes))
                .await
                .context("a peer has ended")?;
        }
        let measured = self.measured;
        let wait = self.progress.wait_for(|p| p.lost > 0 || done(p, measured));
        let ended = tokio::time::timeout(limit, wait).await.is_ok();
        let full = start.elapsed();
        let seen = *self.counted.borrow();
        if !ended || seen.lost > 0 {
            let why = self.first_failure().await;
            bail!("after {full:.1?}: {seen:?} of {measured} measured peers: {why}");
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

async fn peer(
    neighbour: Neighbour,
    reception: Reception,
    orders: mpsc::Receiver<Order>,
) -> Result<()> {
    let who = neighbour.address;
    session(neighbour, reception, orders)
        .await
        .with_context(|| format!("peer {who}"))
}

async fn session(
    neighbour: Neighbour,
    mut reception: Reception,
    orders: mpsc::Receiver<Order>,
) -> Result<()> {
    let (mut read, mut write, mut buffer) = open(&neighbour).await?;
    let standing = Standing(reception.progress.clone());
    standing.0.send_modify(|p| p.established += 1);
    let writer = tokio::spawn(async move {
        let error = writing(&mut write, orders).await.err();
        error.map_or_else(|| "the run is over".to_owned(), |e| format!("{e:#}"))
    });
    let end = reading(&mut read, &mut buffer, &codec(&neighbour), &mut reception).await;
    writer.abort();
    drop(standing);
    end
}

/// Dials until a session stands. Whatever the daemon says no to is tried again: only the limit of the run counts.
async fn open(neighbour: &Neighbour) -> Result<(OwnedReadHalf, OwnedWriteHalf, BytesMut)> {
    loop {
        // A daemon whose accept queue is full leaves a connection without an answer.
        let attempt = tokio::time::timeout(SILENCE, handshake(neighbour)).await;
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

async fn handshake(neighbour: &Neighbour) -> Result<(OwnedReadHalf, OwnedWriteHalf, BytesMut)> {
    let socket = TcpSocket::new_v4()?;
    socket.set_nodelay(true)?;
    socket.bind(SocketAddr::new(IpAddr::V4(neighbour.address), 0))?;
    let stream = socket
        .connect(SocketAddr::new(IpAddr::V4(DEVICE), PORT))
        .await?;
    let (mut read, mut write) = stream.into_split();
    let open = Message::Open(Open {
        asn: neighbour.asn,
        hold_time: HOLD,
        router_id: neighbour.address,
        capabilities: vec![
            Capability::Multiprotocol(Family::IPV4_UNICAST),
            Capability::RouteRefresh,
        ],
        four_octet_as: true,
    });
    let basic = Codec::basic(PeerKind::Ibgp);
    write.write_all(&open.encode(&basic)?).await?;
    let mut buffer = BytesMut::with_capacity(4096);
    loop {
        match next(&mut read, &mut buffer, &codec(neighbour)).await? {
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
