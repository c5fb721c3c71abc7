//! The server: one cache, fed by the datastore, and one task for each connection around a [`Conn`].
//!
//! This module only moves bytes. What is sent to whom is decided in [`conn`] and [`crate::cache`].

pub mod conn;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use cali_api::update::{SyncEvent, SyncStatus, Update};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub use conn::{CloseReason, Conn, Patience};

use crate::Chain;
use crate::cache::{Cache, Limits};
use crate::tls::{ServerTls, TlsError, TlsSettings};

/// Calico's port.
pub const DEFAULT_PORT: u16 = 5473;
/// Changes that are taken from the datastore in one go, at most.
const MAX_BATCH: usize = 1000;
/// Time for a goodbye to reach a client that is being closed.
const FAREWELL: Duration = Duration::from_secs(1);

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
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
            patience: Patience::default(),
            limits: Limits::default(),
            max_connections: 10_000,
            tls: None,
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
    listener: TcpListener,
    tls: Option<Arc<ServerTls>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cache: Mutex<Cache>,
    /// Counts changes of the cache, to wake the connections.
    changed: watch::Sender<u64>,
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
        let shared = Shared {
            cache: Mutex::new(Cache::new(config.limits)),
            changed: watch::Sender::new(0),
        };
        Ok(Self {
            config,
            listener,
            tls,
            shared: Arc::new(shared),
        })
    }

    /// The bound address (for port 0).
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` is done (then every client is told to go elsewhere), or the source ends.
    pub async fn run(
        self,
        mut source: mpsc::Receiver<SyncEvent>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServerError> {
        let mut connections = JoinSet::new();
        let stopping = watch::Sender::new(false);
        tokio::pin!(shutdown);
        let ended = loop {
            tokio::select! {
                event = source.recv() => match event {
                    Some(event) => self.on_source(event, &mut source),
                    None => break Err(ServerError::SourceEnded),
                },
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, peer)) => self.on_accept(stream, peer, &mut connections, &stopping),
                    Err(error) => {
                        // Typically no file descriptors left: others may close, so try again in a moment.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
                () = &mut shutdown => break Ok(()),
            }
        };
        stopping.send_replace(true);
        // Every connection ends within FAREWELL.
        while connections.join_next().await.is_some() {}
        ended
    }

    /// Takes an event and whatever else is waiting, so that a burst becomes few deltas.
    fn on_source(&self, event: SyncEvent, source: &mut mpsc::Receiver<SyncEvent>) {
        let mut batch = Vec::new();
        let mut next = Some(event);
        while let Some(event) = next {
            match event {
                SyncEvent::Updates(updates) => batch.extend(updates),
                SyncEvent::Status(status) => {
                    self.apply(std::mem::take(&mut batch));
                    tracing::info!(
                        ?status,
                        objects = self.shared.cache().len(),
                        "datastore status"
                    );
                    if status == SyncStatus::InSync {
                        self.shared.cache().set_in_sync();
                    }
                }
            }
            next = if batch.len() < MAX_BATCH {
                source.try_recv().ok()
            } else {
                None
            };
        }
        self.apply(batch);
        self.shared.changed.send_modify(|version| *version += 1);
    }

    fn apply(&self, updates: Vec<Update>) {
        for (key, error) in self.shared.cache().apply(updates) {
            tracing::error!(%key, %error, "object cannot be encoded, its last version stays");
        }
    }

    fn on_accept(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        connections: &mut JoinSet<()>,
        stopping: &watch::Sender<bool>,
    ) {
        if connections.len() >= self.config.max_connections {
            tracing::warn!(%peer, limit = self.config.max_connections, "too many connections, refusing");
            return;
        }
        // Small deltas must not wait for acknowledgements.
        let _ = stream.set_nodelay(true);
        let patience = self.config.patience;
        let shared = Arc::clone(&self.shared);
        let mut stopping = stopping.subscribe();
        let Some(tls) = self.tls.clone() else {
            let conn = Conn::new(Instant::now(), patience);
            connections.spawn(async move { attend(stream, peer, conn, &shared, stopping).await });
            return;
        };
        connections.spawn(async move {
            let accepted = tokio::select! {
                accepted = tokio::time::timeout(patience.handshake, tls.accept(stream)) => accepted,
                _ = stopping.wait_for(|stop| *stop) => return,
            };
            let (stream, verdict) = match accepted {
                Ok(Ok(accepted)) => accepted,
                Ok(Err(error)) => {
                    tracing::warn!(%peer, reason = %Chain(&error), "client refused");
                    return;
                }
                Err(_) => {
                    tracing::warn!(%peer, reason = "no TLS handshake in time", "client refused");
                    return;
                }
            };
            let mut conn = Conn::new(Instant::now(), patience);
            if let Err(error) = verdict {
                tracing::warn!(%peer, reason = %error, "client refused");
                conn.on_refused(&error);
            }
            attend(stream, peer, conn, &shared, stopping).await;
        });
    }
}

/// Serves one client and says how it ended.
async fn attend(
    stream: impl AsyncRead + AsyncWrite,
    peer: SocketAddr,
    conn: Conn,
    shared: &Shared,
    stopping: watch::Receiver<bool>,
) {
    let (conn, outcome) = serve(stream, conn, shared, stopping).await;
    let client = conn.hostname();
    match (outcome, conn.closing()) {
        (Err(error), _) => tracing::info!(%peer, client, %error, "connection lost"),
        (Ok(()), Some(reason)) => {
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
    mut stopping: watch::Receiver<bool>,
) -> (Conn, std::io::Result<()>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut changed = shared.changed.subscribe();
    let mut input = BytesMut::with_capacity(4096);
    let mut output = Bytes::new();
    let mut farewell: Option<Instant> = None;
    // TLS takes more than the socket does; what it holds back leaves it by a flush.
    let mut flushed = true;
    loop {
        if output.is_empty() {
            // Marked before the cache is read, so that no change falls between.
            changed.mark_unchanged();
            if let Some(frame) = conn.poll_transmit(&mut shared.cache()) {
                output = frame;
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
                Ok(0) => return (conn, Ok(())),
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
                    conn.on_written(Instant::now());
                }
                Err(error) => return (conn, Err(error)),
            },
            // The sender lives in `shared`, so this never fails.
            _ = changed.changed(), if output.is_empty() => {}
            Ok(_) = stopping.wait_for(|stop| *stop), if farewell.is_none() => conn.on_shutdown(),
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
