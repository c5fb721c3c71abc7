//! Simulated clients: each a task with a socket.
//!
//! They share the machine with the server, which in a cluster each has for itself. So they unpack nothing of the snapshot, and of
//! a stream of changes only every twentieth of them does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use typha::client::{Conn, Held, Identity, Output};
use typha::wire::{Body, Decoder, FLAG_ZSTD, Pong, ScopeChange, frame};

use super::{Cluster, KINDS, changed_at};

/// Frames up to this size are unpacked.
const SMALL: usize = 32 * 1024;
/// One in so many clients unpacks a stream of changes.
pub const SAMPLE: usize = 20;
const LIMIT: Duration = Duration::from_secs(300);

/// Latencies of one change, or of many, over all clients.
#[derive(Debug, Default)]
pub struct Latency(Vec<Duration>);

impl Latency {
    /// The value below which this part of them lies.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Duration {
        let at = ((self.0.len().saturating_sub(1)) as f64 * part).round() as usize;
        self.0.get(at).copied().unwrap_or_default()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[derive(Debug, Default)]
struct Counts {
    synced: AtomicUsize,
    bytes: AtomicU64,
    /// Every client unpacks changes.
    all_unpack: AtomicBool,
}

/// Clients that are connected. Dropping it disconnects them.
#[derive(Debug)]
pub struct Fleet {
    counts: Arc<Counts>,
    seen: mpsc::UnboundedReceiver<Duration>,
    tasks: JoinSet<Result<()>>,
}

fn identity(name: String) -> Identity {
    Identity {
        hostname: name,
        info: "bench".into(),
        kinds: KINDS.to_vec(),
        node: None,
    }
}

fn hello(conn: &mut Conn) -> Result<Bytes> {
    match conn.poll_output(&mut Held::default())? {
        Some(Output::Send(hello)) => Ok(hello),
        other => bail!("{other:?} instead of a hello"),
    }
}

/// What a client with a scope says first.
fn asking(node: u32, cluster: Cluster) -> Result<Bytes> {
    let name = Cluster::node_name(node);
    let identity = Identity {
        node: Some(name.clone()),
        ..identity(name.clone())
    };
    let scope = ScopeChange {
        id: 1,
        add: cluster
            .selectors(node)
            .iter()
            .map(|selector| selector.to_string())
            .collect(),
        ..ScopeChange::default()
    };
    let mut first = BytesMut::from(&*hello(&mut Conn::new(
        Instant::now(),
        &identity,
        &Held::default(),
    ))?);
    first.extend_from_slice(&frame(Body::ScopeChange(scope), false));
    Ok(first.freeze())
}

/// One real client, until it has everything: what it holds, and how many bytes it took.
///
/// # Errors
/// The connection breaks.
pub async fn real_client(port: u16, held: &mut Held) -> Result<u64> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let mut conn = Conn::new(Instant::now(), &identity("real".into()), held);
    let mut input = BytesMut::with_capacity(256 * 1024);
    let mut bytes = 0;
    loop {
        while let Some(output) = conn.poll_output(held)? {
            if let Output::Send(frame) = output {
                stream.write_all(&frame).await?;
            }
        }
        if conn.is_complete() {
            return Ok(bytes);
        }
        let read = timeout(LIMIT, stream.read_buf(&mut input)).await??;
        if read == 0 {
            bail!("closed by the server");
        }
        bytes += read as u64;
        conn.on_bytes(Instant::now(), &input);
        input.clear();
    }
}

impl Fleet {
    /// Connects them all at once; each offers what is held.
    ///
    /// # Errors
    /// None can be made.
    pub fn connect(port: u16, count: usize, held: &Held) -> Result<Self> {
        let hello = hello(&mut Conn::new(
            Instant::now(),
            &identity("node0".into()),
            held,
        ))?;
        Ok(Self::greet(port, std::iter::repeat_n(hello, count)))
    }

    /// Connects them all at once, each from another node of the cluster, for the endpoints of it and of its [`Cluster::selectors`].
    ///
    /// # Errors
    /// None can be made.
    pub fn connect_scoped(port: u16, count: usize, cluster: Cluster) -> Result<Self> {
        let hellos = (0u32..).take(count).map(|node| asking(node, cluster));
        let hellos = hellos.collect::<Result<Vec<Bytes>>>()?;
        Ok(Self::greet(port, hellos.into_iter()))
    }

    fn greet(port: u16, hellos: impl Iterator<Item = Bytes>) -> Self {
        let counts = Arc::new(Counts::default());
        let (sender, seen) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        for (number, hello) in hellos.enumerate() {
            tasks.spawn(one(
                port,
                number % SAMPLE == 0,
                hello,
                Arc::clone(&counts),
                sender.clone(),
            ));
        }
        Self {
            counts,
            seen,
            tasks,
        }
    }

    /// Clients that read one byte a second, beside the others.
    ///
    /// # Errors
    /// None can be made.
    pub fn add_crawlers(&mut self, port: u16, count: usize) -> Result<()> {
        let hello = hello(&mut Conn::new(
            Instant::now(),
            &identity("crawler".into()),
            &Held::default(),
        ))?;
        for _ in 0..count {
            self.tasks.spawn(crawl(port, hello.clone()));
        }
        Ok(())
    }

    /// Waits until so many clients have everything.
    ///
    /// # Errors
    /// One of them broke off, or it takes too long.
    pub async fn synced(&mut self, count: usize) -> Result<()> {
        let until = Instant::now() + LIMIT;
        while self.counts.synced.load(Ordering::Relaxed) < count {
            if let Some(ended) = self.tasks.try_join_next() {
                ended?.context("a client broke off")?;
            }
            if Instant::now() > until {
                bail!(
                    "{} of {count} clients have everything",
                    self.counts.synced.load(Ordering::Relaxed)
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Bytes that were received so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.counts.bytes.load(Ordering::Relaxed)
    }

    /// Whether all clients unpack changes, or one in [`SAMPLE`].
    pub fn unpack_all(&self, all: bool) {
        self.counts.all_unpack.store(all, Ordering::Relaxed);
    }

    /// Drops what was seen and not asked for.
    pub fn forget(&mut self) {
        while self.seen.try_recv().is_ok() {}
    }

    /// Waits until changes were seen so many times, by all clients together.
    ///
    /// # Errors
    /// It takes too long.
    pub async fn latency(&mut self, count: usize) -> Result<Latency> {
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            let one = timeout(LIMIT, self.seen.recv()).await;
            all.push(
                one.with_context(|| format!("{} of {count} seen", all.len()))?
                    .context("no client")?,
            );
        }
        all.sort_unstable();
        Ok(Latency(all))
    }
}

async fn one(
    port: u16,
    samples: bool,
    hello: Bytes,
    counts: Arc<Counts>,
    seen: mpsc::UnboundedSender<Duration>,
) -> Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&hello).await?;
    let mut input = BytesMut::with_capacity(64 * 1024);
    let mut skip = 0usize;
    let mut synced = false;
    loop {
        let read = stream.read_buf(&mut input).await?;
        if read == 0 {
            bail!("closed by the server");
        }
        counts.bytes.fetch_add(read as u64, Ordering::Relaxed);
        loop {
            let now = skip.min(input.len());
            let _ = input.split_to(now);
            skip -= now;
            if skip > 0 || input.len() < 5 {
                break;
            }
            let length = 4 + u32::from_be_bytes([input[0], input[1], input[2], input[3]]) as usize;
            let unpacks = synced && (samples || counts.all_unpack.load(Ordering::Relaxed));
            if length > SMALL || (input[4] & FLAG_ZSTD != 0 && !unpacks) {
                skip = length;
                continue;
            }
            if input.len() < length {
                break;
            }
            let mut decoder = Decoder::from_servers();
            decoder.push(&input.split_to(length));
            match decoder.next_message()? {
                Some(Body::SyncDone(_)) => {
                    synced = true;
                    counts.synced.fetch_add(1, Ordering::Relaxed);
                }
                Some(Body::Ping(ping)) => {
                    let pong = frame(Body::Pong(Pong { id: ping.id }), false);
                    stream.write_all(&pong).await?;
                }
                // The last of a delta is the youngest and the first the oldest: it waited longest.
                Some(Body::Updates(updates)) => {
                    let first = updates.objects.first().and_then(|o| o.json.as_deref());
                    if let Some(age) = first.and_then(changed_at) {
                        let _ = seen.send(age);
                    }
                }
                Some(Body::Goodbye(goodbye)) => bail!("closed by the server: {}", goodbye.reason),
                _ => {}
            }
        }
        input.reserve(64 * 1024);
    }
}

async fn crawl(port: u16, hello: Bytes) -> Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(([127, 0, 0, 1], port).into()).await?;
    stream.write_all(&hello).await?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
