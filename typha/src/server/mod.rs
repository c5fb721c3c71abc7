//! The server: one cache, fed by the datastore, and one task for each connection around a [`Conn`].
//!
//! This module only moves bytes. What is sent to whom is decided in [`conn`] and [`crate::cache`].

mod balance;
mod clients;
pub mod conn;
mod metrics;
mod scoped;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use cali_api::update::{SyncEvent, SyncStatus, Update};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};

use cali_telemetry::{Expectation, Health, Registry};
use clients::{Clients, HangUp};
use metrics::{CacheMetrics, Counted, Metrics};

use balance::Balance;
pub use balance::Rebalancing;
pub use clients::Leave;
pub use conn::{CloseReason, Conn, Patience};

use crate::Chain;
use crate::cache::{Cache, Limits};
use crate::tls::{ServerTls, TlsError, TlsSettings};

/// Calico's port.
pub const DEFAULT_PORT: u16 = 5473;
/// Changes that are gathered into one delta, at most.
const MAX_BATCH: usize = 1000;
/// Time between two deltas: a change after a quiet time goes out at once, a stream of them costs every client at most so many frames.
const GATHER: Duration = Duration::from_millis(25);
/// Time for a goodbye to reach a client that is being closed.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often the server says that it lives, and how soon it is taken for dead.
const BEAT: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(20));

/// How the server is run.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Timeouts.
    pub patience: Patience,
    /// Bounds of what is kept for clients that are behind.
    pub limits: Limits,
    /// More connections are refused.
    pub max_connections: usize,
    /// Certificates; plain TCP without.
    pub tls: Option<TlsSettings>,
    /// How clients are left when the server stops.
    pub leave: Leave,
    /// Clients beyond this replica's share are sent to others; without, only [`Self::max_connections`] counts.
    pub rebalancing: Option<Rebalancing>,
    /// Time between two clients that are sent to others.
    pub drop_interval: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
            patience: Patience::default(),
            limits: Limits::default(),
            max_connections: 10_000,
            tls: None,
            leave: Leave::default(),
            rebalancing: None,
            drop_interval: Duration::from_secs(1),
        }
    }
}

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The certificates cannot be used.
    #[error("TLS cannot be set up")]
    Tls(#[from] TlsError),
    /// The stream from the datastore ended.
    #[error("the datastore's stream of changes ended")]
    SourceEnded,
}

/// A server that listens and is not yet running.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    /// Until it runs.
    listener: Option<TcpListener>,
    tls: Option<Arc<ServerTls>>,
    shared: Arc<Shared>,
    registry: Registry,
    health: Health,
}

#[derive(Debug)]
struct Shared {
    cache: Mutex<Cache>,
    /// Counts changes of the cache, to wake the connections.
    changed: watch::Sender<u64>,
    metrics: Metrics,
}

impl Shared {
    /// Nothing that panics runs under the lock; should it ever, the cache is still whole between updates.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Reads the certificates and binds the port.
    pub fn bind(config: ServerConfig) -> Result<Self, ServerError> {
        let tls = config.tls.clone().map(ServerTls::server).transpose()?;
        let listen = || {
            let socket = if config.listen.is_ipv4() {
                TcpSocket::new_v4()?
            } else {
                TcpSocket::new_v6()?
            };
            // A restarted server takes its port over from connections in TIME_WAIT.
            socket.set_reuseaddr(true)?;
            socket.bind(config.listen)?;
            socket.listen(1024)
        };
        let listener = listen().map_err(|source| ServerError::Listen {
            address: config.listen,
            source,
        })?;
        let shared = Arc::new(Shared {
            cache: Mutex::new(Cache::new(config.limits)),
            changed: watch::Sender::new(0),
            metrics: Metrics::default(),
        });
        let registry = Registry::new();
        shared.metrics.register(&registry);
        let of_cache = CacheMetrics::new(Arc::downgrade(&shared));
        metrics::register(&registry, Box::new(of_cache));
        Ok(Self {
            config,
            listener: Some(listener),
            tls,
            shared,
            registry,
            health: Health::default(),
        })
    }

    /// What it counts.
    pub fn registry(&self) -> Registry {
        self.registry.clone()
    }

    /// Whether it lives, and is ready: once it has all of the datastore, until it stops.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// The bound address (for port 0).
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        match &self.listener {
            Some(listener) => listener.local_addr(),
            None => Err(std::io::ErrorKind::NotConnected.into()),
        }
    }

    /// Serves until `shutdown` is done or the source ends. After `shutdown` no connection is accepted, and the clients are told one
    /// by one to go elsewhere; those that are still there follow the changes meanwhile.
    pub async fn run(
        mut self,
        mut source: mpsc::Receiver<SyncEvent>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServerError> {
        let mut clients = Clients::default();
        let mut listener = self.listener.take();
        let started = Instant::now();
        let alive = Expectation {
            report_within: Some(BEAT.1),
            decides_readiness: true,
        };
        let part = self.health.part("server", alive, started);
        let mut beat = tokio::time::interval(BEAT.0);
        let mut leave = tokio::time::interval(self.config.leave.interval);
        let mut deadline = None;
        let mut gathered = Vec::new();
        let mut next_delta = started;
        let mut balance = self.config.rebalancing.clone().map(Balance::new);
        let mut drop_tick = tokio::time::interval(self.config.drop_interval);
        tokio::pin!(shutdown);
        loop {
            let stopping = deadline.is_some();
            tokio::select! {
                event = source.recv() => match event {
                    Some(event) => {
                        self.on_source(event, &mut source, &mut gathered, balance.as_mut());
                        if gathered.len() >= MAX_BATCH {
                            self.apply(&mut gathered);
                            next_delta = Instant::now() + GATHER;
                        }
                        if !stopping && self.shared.cache().is_in_sync() {
                            part.ready(Instant::now(), "in sync with the datastore");
                        }
                    }
                    None => {
                        clients.end().await;
                        return Err(ServerError::SourceEnded);
                    }
                },
                () = tokio::time::sleep_until(next_delta.into()), if !gathered.is_empty() => {
                    self.apply(&mut gathered);
                    next_delta = Instant::now() + GATHER;
                }
                accepted = accept(listener.as_ref()), if !stopping => match accepted {
                    Ok((stream, peer)) => self.on_accept(stream, peer, &mut clients),
                    Err(error) => {
                        // Typically no file descriptors left: others may close, so try again in a moment.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(()) = clients.next_ended() => {}
                _ = beat.tick() => part.alive(Instant::now()),
                () = &mut shutdown, if !stopping => {
                    listener = None;
                    part.not_ready(Instant::now(), "shutting down");
                    let pace = self.config.leave.pace(clients.len());
                    tracing::info!(clients = clients.len(), ?pace, "shutting down, clients are told to go elsewhere");
                    leave = tokio::time::interval(pace.max(Duration::from_millis(1)));
                    deadline = Some(Instant::now() + self.config.leave.limit);
                }
                _ = drop_tick.tick(), if !stopping && balance.is_some() => {
                    let limit = balance.as_ref().map_or(usize::MAX, |b| b.limit(self.config.max_connections));
                    if clients.len() > limit {
                        tracing::info!(clients = clients.len(), limit, "more clients than this replica's share, one is sent to another");
                        clients.shed_one();
                    }
                }
                _ = leave.tick(), if stopping => clients.shed_one(),
            }
            if deadline.is_some_and(|at| clients.len() == 0 || Instant::now() >= at) {
                clients.end().await;
                return Ok(());
            }
        }
    }

    /// Adds an event, and whatever else is waiting, to what is gathered.
    fn on_source(
        &self,
        event: SyncEvent,
        source: &mut mpsc::Receiver<SyncEvent>,
        gathered: &mut Vec<Update>,
        mut balance: Option<&mut Balance>,
    ) {
        let mut next = Some(event);
        while let Some(event) = next {
            match event {
                SyncEvent::Updates(updates) => {
                    if let Some(balance) = &mut balance {
                        updates.iter().for_each(|update| balance.on_update(update));
                    }
                    gathered.extend(updates);
                }
                // A datastore is asked for nothing.
                SyncEvent::Complete(_) => {}
                SyncEvent::Status(status) => {
                    self.apply(gathered);
                    tracing::info!(
                        ?status,
                        objects = self.shared.cache().len(),
                        "datastore status"
                    );
                    if status == SyncStatus::InSync {
                        self.shared.cache().set_in_sync();
                        self.wake_clients();
                    }
                }
            }
            next = if gathered.len() < MAX_BATCH {
                source.try_recv().ok()
            } else {
                None
            };
        }
    }

    /// Makes what is gathered one delta.
    fn apply(&self, gathered: &mut Vec<Update>) {
        if gathered.is_empty() {
            return;
        }
        for (key, error) in self.shared.cache().apply(std::mem::take(gathered)) {
            tracing::error!(%key, error = %Chain(&error), "object is not sent to clients, its last version stays");
        }
        self.wake_clients();
    }

    fn wake_clients(&self) {
        self.shared.changed.send_modify(|version| *version += 1);
    }

    fn on_accept(&self, stream: TcpStream, peer: SocketAddr, clients: &mut Clients) {
        let shared = Arc::clone(&self.shared);
        shared.metrics.accepted.inc();
        if clients.len() >= self.config.max_connections {
            shared.metrics.refused.inc();
            tracing::warn!(%peer, limit = self.config.max_connections, "too many connections, refusing");
            return;
        }
        // Small deltas must not wait for acknowledgements.
        let _ = stream.set_nodelay(true);
        let patience = self.config.patience;
        // What a socket takes has not arrived yet: pings to a client that the network lost would fit into its buffer for hours.
        let unacknowledged = SockRef::from(&stream).set_tcp_user_timeout(Some(patience.progress));
        if let Err(error) = unacknowledged {
            tracing::warn!(%peer, %error, "cannot limit the time without acknowledgements, a lost client is noticed late");
        }
        let Some(tls) = self.tls.clone() else {
            let conn = Conn::new(Instant::now(), patience);
            clients.spawn(|hang_up| async move {
                attend(stream, peer, conn, &shared, hang_up).await;
            });
            return;
        };
        clients.spawn(|mut hang_up| async move {
            let accepted = tokio::select! {
                accepted = tokio::time::timeout(patience.handshake, tls.accept(stream)) => accepted,
                _ = &mut hang_up => return,
            };
            let refuse = |reason: &dyn std::fmt::Display| {
                shared.metrics.refused.inc();
                tracing::warn!(%peer, %reason, "client refused");
            };
            let (stream, verdict) = match accepted {
                Ok(Ok(accepted)) => accepted,
                Ok(Err(error)) => return refuse(&Chain(&error)),
                Err(_) => return refuse(&"no TLS handshake in time"),
            };
            let mut conn = Conn::new(Instant::now(), patience);
            if let Err(error) = verdict {
                refuse(&error);
                conn.on_refused(&error);
            }
            attend(stream, peer, conn, &shared, hang_up).await;
        });
    }
}

/// The next connection; never, without a listener.
async fn accept(listener: Option<&TcpListener>) -> std::io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}

/// Serves one client and says how it ended.
async fn attend(
    stream: impl AsyncRead + AsyncWrite,
    peer: SocketAddr,
    conn: Conn,
    shared: &Shared,
    hang_up: HangUp,
) {
    let _active = Counted::new(&shared.metrics.active);
    let (mut conn, outcome) = serve(stream, conn, shared, hang_up).await;
    conn.leave(&mut shared.cache());
    let client = conn.hostname();
    match (outcome, conn.closing()) {
        (Err(error), _) => tracing::info!(%peer, client, %error, "connection lost"),
        (Ok(()), Some(reason)) => {
            shared.metrics.dropped.inc();
            if reason.is_violation() {
                shared.metrics.violations.inc();
            }
            tracing::info!(%peer, client, %reason, "connection closed")
        }
        (Ok(()), None) => tracing::info!(%peer, client, "connection closed by the client"),
    }
}

/// Moves bytes between one connection and its state machine until either side closes.
async fn serve(
    stream: impl AsyncRead + AsyncWrite,
    mut conn: Conn,
    shared: &Shared,
    mut hang_up: HangUp,
) -> (Conn, std::io::Result<()>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut changed = shared.changed.subscribe();
    let mut input = BytesMut::with_capacity(4096);
    let mut output = Bytes::new();
    let mut farewell: Option<Instant> = None;
    // TLS takes more than the socket does; what it holds back leaves it by a flush.
    let mut flushed = true;
    let started = Instant::now();
    let mut streaming: Option<Counted> = None;
    let mut frame_since = started;
    loop {
        if output.is_empty() {
            // Marked before the cache is read, so that no change falls between.
            changed.mark_unchanged();
            if let Some(frame) = conn.poll_transmit(&mut shared.cache()) {
                output = frame;
                frame_since = Instant::now();
            }
        }
        if conn.closing().is_some() {
            let until = *farewell.get_or_insert_with(|| Instant::now() + FAREWELL);
            if output.is_empty() || Instant::now() >= until {
                // Best effort: the peer may be gone.
                let _ = tokio::time::timeout_at(until.into(), writer.shutdown()).await;
                return (conn, Ok(()));
            }
        }
        let deadline = farewell.unwrap_or_else(|| conn.poll_timeout());
        tokio::select! {
            read = reader.read_buf(&mut input) => match read {
                Ok(0) => {
                    conn.on_end();
                    return (conn, Ok(()));
                }
                Ok(_) => {
                    conn.on_bytes(Instant::now(), &input);
                    input.clear();
                }
                Err(error) => return (conn, Err(error)),
            },
            written = move_on(&mut writer, &output), if !output.is_empty() || !flushed => match written {
                Ok(n) => {
                    flushed = output.is_empty();
                    output.advance(n);
                    shared.metrics.sent.inc_by(n as u64);
                    if n > 0 && output.is_empty() {
                        shared.metrics.write.observe(frame_since.elapsed().as_secs_f64());
                    }
                    if streaming.is_none() && output.is_empty() && conn.is_streaming() {
                        shared.metrics.snapshot.observe(started.elapsed().as_secs_f64());
                        streaming = Some(Counted::new(&shared.metrics.streaming));
                    }
                    conn.on_written(Instant::now());
                }
                Err(error) => return (conn, Err(error)),
            },
            // The sender lives in `shared`, so this never fails.
            _ = changed.changed(), if output.is_empty() => {}
            _ = &mut hang_up, if farewell.is_none() => conn.on_shutdown(),
            () = tokio::time::sleep_until(deadline.into()) => conn.on_timeout(Instant::now()),
        }
    }
}

/// Writes some of these bytes, or flushes when there are none; says how many were taken.
async fn move_on(writer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<usize> {
    if bytes.is_empty() {
        return writer.flush().await.map(|()| 0);
    }
    match writer.write(bytes).await? {
        0 => Err(std::io::ErrorKind::WriteZero.into()),
        taken => Ok(taken),
    }
}
