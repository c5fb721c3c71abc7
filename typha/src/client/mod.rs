//! The client: keeps one connection to one of the servers, and yields one stream of changes that knows nothing of connections.
//!
//! While no server answers the consumer keeps what it has; nothing is emitted. See [`conn`] for how missed changes
//! are made up for.
//!
//! Where a state is [`kept`] on disk, a new consumer is told that first: it is what a server is asked to make up from, and, if none
//! answers for a while, what there is.

mod asking;
pub mod backoff;
pub mod conn;
pub mod discovery;
pub mod kept;

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use cali_api::Kind;
use cali_api::update::{SyncEvent, SyncStatus};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::Chain;
use crate::interest::{Listener, Wanted};
use crate::tls::{ClientTls, TlsError};
pub use asking::Covered;
use backoff::Backoff;
pub use conn::{ClientError, Conn, Held, Identity, Output};
pub use discovery::Servers;
pub use kept::Keep;
use kept::Keeper;

/// Events that may wait for the consumer; beyond them the socket is not read, and the server coalesces.
const QUEUE: usize = 64;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Objects of the kept state in one event.
const BATCH: usize = 1000;

/// Where to connect and what to ask for.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Where the servers are. One is picked and kept while it works.
    pub servers: Servers,
    /// Node name.
    pub hostname: String,
    /// Program and version, for the server's log.
    pub info: String,
    /// The subscription.
    pub kinds: Vec<Kind>,
    /// Certificates; plain TCP without.
    pub tls: Option<Arc<ClientTls>>,
    /// Where the last state is kept; nowhere without.
    pub keep: Option<Keep>,
    /// Which part of the workload endpoints is wanted; all of them without.
    pub interest: Option<Listener>,
}

/// What a client has of its servers.
#[derive(Debug, Default)]
struct Contact(AtomicU8);

impl Contact {
    /// A server is talking, but has not told everything.
    const TALKING: u8 = 1;
    /// A server has told everything once.
    const COMPLETE: u8 = 2;

    fn now(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self, contact: u8) {
        // What was complete once is not taken back.
        self.0.fetch_max(contact, Ordering::AcqRel);
    }

    fn lost(&self) {
        let _ = self
            .0
            .compare_exchange(Self::TALKING, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}

#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("no TLS connection")]
    Tls(#[source] TlsError),
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    #[error("connection failed")]
    Io(#[source] std::io::Error),
    #[error("connection closed by the server")]
    Closed,
    #[error(transparent)]
    Protocol(#[from] ClientError),
    #[error("the consumer is gone")]
    ConsumerGone,
}

/// Starts the client. Dropping the receiver ends it.
pub fn start(config: ClientConfig) -> mpsc::Receiver<SyncEvent> {
    let (events, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let consumer = events.clone();
        tokio::select! {
            () = keep_connected(config, events) => {}
            () = consumer.closed() => {}
        }
    });
    receiver
}

async fn keep_connected(config: ClientConfig, events: mpsc::Sender<SyncEvent>) {
    let identity = Identity {
        hostname: config.hostname,
        info: config.info,
        kinds: config.kinds,
        node: config.interest.as_ref().map(|it| it.node().to_owned()),
    };
    let mut interest = config.interest;
    let mut held = Held::default();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    // Seeded from the system's randomness; spreads clients over servers.
    let random = RandomState::new();
    let mut servers = Vec::new();
    let mut attempt = 0_usize;
    let mut failures = 0_u64;
    let waiting = SyncEvent::Status(SyncStatus::WaitForDatastore);
    if events.send(waiting).await.is_err() {
        return;
    }
    let contact = Arc::new(Contact::default());
    let mut keeper = None;
    if let Some(keep) = config.keep {
        let begun = begin_from(keep, &identity, &mut held, &events, &contact).await;
        let Ok(begun) = begun else { return };
        keeper = begun;
    }
    let consumer = Consumer {
        events,
        keeper,
        contact,
    };
    loop {
        config.servers.refresh(&mut servers, &random).await;
        failures += 1;
        let Some(address) = servers.get(attempt % servers.len().max(1)) else {
            let wait = backoff.next_wait(random.hash_one(failures));
            tracing::warn!(servers = ?config.servers, retry_in = ?wait, "no server is known; the last state stays");
            if consumer
                .pause(wait, &mut interest, &mut held)
                .await
                .is_err()
            {
                return;
            }
            continue;
        };
        let mut complete = false;
        let lost = async {
            let connecting = connect(address);
            let stream = consumer
                .listen(connecting, &mut interest, &mut held)
                .await??;
            tracing::info!(server = %address, tls = config.tls.is_some(), "connected");
            let asked = (&identity, &mut interest);
            Err::<Infallible, _>(match &config.tls {
                Some(tls) => {
                    let stream = encrypt(tls, stream).await?;
                    converse(stream, asked, &mut held, &consumer, &mut complete).await
                }
                None => converse(stream, asked, &mut held, &consumer, &mut complete).await,
            })
        };
        let Err(lost) = lost.await;
        consumer.contact.lost();
        if matches!(lost, Lost::ConsumerGone) {
            return;
        }
        if complete {
            backoff.reset();
        }
        let sent_away = matches!(
            lost,
            Lost::Protocol(ClientError::Goodbye {
                elsewhere: true,
                ..
            })
        );
        // After a good connection the first choice is tried again, unless it was left on request.
        attempt = if complete && !sent_away {
            0
        } else {
            attempt.wrapping_add(1)
        };
        let wait = backoff.next_wait(random.hash_one(failures));
        tracing::warn!(server = %address, reason = %Chain(&lost), retry_in = ?wait, objects = held.len(), "no server; the last state stays");
        if consumer
            .pause(wait, &mut interest, &mut held)
            .await
            .is_err()
        {
            return;
        }
    }
}

/// Whoever is told, with the disk that is told the same.
struct Consumer {
    events: mpsc::Sender<SyncEvent>,
    keeper: Option<Keeper>,
    contact: Arc<Contact>,
}

impl Consumer {
    /// While something else goes on, the consumer may ask for what is held already.
    async fn listen<T>(
        &self,
        meanwhile: impl Future<Output = T>,
        interest: &mut Option<Listener>,
        held: &mut Held,
    ) -> Result<T, Lost> {
        tokio::pin!(meanwhile);
        loop {
            tokio::select! {
                done = &mut meanwhile => return Ok(done),
                wanted = next_wanted(interest) => {
                    held.coverage.want(wanted);
                    if let Some(number) = held.coverage.answer() {
                        self.tell(SyncEvent::Complete(number)).await?;
                    }
                }
            }
        }
    }

    async fn pause(
        &self,
        wait: Duration,
        interest: &mut Option<Listener>,
        held: &mut Held,
    ) -> Result<(), Lost> {
        self.listen(tokio::time::sleep(wait), interest, held).await
    }

    async fn tell(&self, event: SyncEvent) -> Result<(), Lost> {
        if let Some(keeper) = &self.keeper {
            keeper.note(&event);
        }
        if event == SyncEvent::Status(SyncStatus::InSync) {
            self.contact.set(Contact::COMPLETE);
        }
        self.events
            .send(event)
            .await
            .map_err(|_| Lost::ConsumerGone)
    }
}

/// What is asked for next; never, of a consumer that asks for nothing.
async fn next_wanted(interest: &mut Option<Listener>) -> Wanted {
    match interest {
        Some(interest) => {
            interest.changed().await;
            interest.newest()
        }
        None => std::future::pending().await,
    }
}

/// Tells the kept state, and, if no server answers for a while, that it is all there is.
async fn begin_from(
    keep: Keep,
    identity: &Identity,
    held: &mut Held,
    events: &mpsc::Sender<SyncEvent>,
    contact: &Arc<Contact>,
) -> Result<Option<Keeper>, mpsc::error::SendError<SyncEvent>> {
    let (file, subscription) = (
        keep.file,
        kept::text_of(&identity.kinds, identity.node.as_deref()),
    );
    let opened = tokio::task::spawn_blocking(move || kept::open(&file, &subscription)).await;
    let (found, keeper) = opened.unwrap_or_default();
    let Some(mut found) = found else {
        return Ok(keeper);
    };
    tracing::info!(objects = found.objects.len(), age = ?found.age, "the state of the last run is known");
    let resync = SyncEvent::Status(SyncStatus::ResyncInProgress);
    events.send(resync).await?;
    held.coverage.set(found.covered);
    while !found.objects.is_empty() {
        let batch = found
            .objects
            .split_off(found.objects.len().saturating_sub(BATCH));
        for update in &batch {
            held.remember(update);
        }
        events.send(SyncEvent::Updates(batch)).await?;
    }
    let (events, contact) = (events.clone(), Arc::clone(contact));
    tokio::spawn(async move {
        let since = Instant::now();
        tokio::select! {
            () = wait_for_contact(&contact, keep.patience) => {}
            () = events.closed() => return,
        }
        if contact.now() != Contact::COMPLETE {
            tracing::warn!(waited = ?since.elapsed(), age = ?found.age, "no server answers; the state of the last run counts");
            // A consumer that is gone need not be told.
            let _ = events.send(SyncEvent::Status(SyncStatus::InSync)).await;
        }
    });
    Ok(keeper)
}

/// Until a server has told everything, or for so long; one that is talking is heard out (its silence is noticed elsewhere).
async fn wait_for_contact(contact: &Contact, patience: Duration) {
    const LOOK: Duration = Duration::from_millis(200);
    let limit = Instant::now() + patience;
    while contact.now() != Contact::COMPLETE
        && (Instant::now() < limit || contact.now() == Contact::TALKING)
    {
        let rest = limit.saturating_duration_since(Instant::now());
        tokio::time::sleep(rest.clamp(Duration::from_millis(10), LOOK)).await;
    }
}

/// Plain TCP; TLS is put over it by the caller.
async fn connect(address: &str) -> Result<TcpStream, Lost> {
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(|_| Lost::Connect(std::io::ErrorKind::TimedOut.into()))?
        .map_err(Lost::Connect)?;
    stream.set_nodelay(true).map_err(Lost::Connect)?;
    Ok(stream)
}

async fn encrypt(
    tls: &ClientTls,
    stream: TcpStream,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, Lost> {
    timeout(CONNECT_TIMEOUT, tls.connect(stream))
        .await
        .map_err(|_| Lost::Connect(std::io::ErrorKind::TimedOut.into()))?
        .map_err(Lost::Tls)
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite,
    (identity, interest): (&Identity, &mut Option<Listener>),
    held: &mut Held,
    consumer: &Consumer,
    complete: &mut bool,
) -> Lost {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut conn = Conn::new(Instant::now(), identity, held);
    let mut input = BytesMut::with_capacity(64 * 1024);
    loop {
        loop {
            let output = conn.poll_output(held);
            *complete = conn.is_complete();
            if let (Some(covered), Some(keeper)) = (held.coverage.take_changed(), &consumer.keeper)
            {
                keeper.cover(covered);
            }
            match output {
                Ok(Some(output)) => {
                    if let Err(lost) = perform(output, &mut writer, consumer).await {
                        return lost;
                    }
                }
                Ok(None) => break,
                Err(error) => return error.into(),
            }
        }
        conn.on_resumed_reading(Instant::now());
        tokio::select! {
            read = reader.read_buf(&mut input) => match read {
                Ok(0) => return conn.on_end().map_or_else(Lost::Protocol, |()| Lost::Closed),
                Ok(_) => {
                    conn.on_bytes(Instant::now(), &input);
                    consumer.contact.set(Contact::TALKING);
                    input.clear();
                }
                Err(error) => return Lost::Io(error),
            },
            wanted = next_wanted(interest) => conn.on_wanted(wanted, held),
            () = tokio::time::sleep_until(conn.poll_timeout().into()) => {
                if let Err(error) = conn.on_timeout(Instant::now()) {
                    return error.into();
                }
            }
        }
    }
}

async fn perform(
    output: Output,
    writer: &mut (impl AsyncWrite + Unpin),
    consumer: &Consumer,
) -> Result<(), Lost> {
    match output {
        Output::Send(frame) => {
            let write = async {
                writer.write_all(&frame).await?;
                // TLS may hold back what the socket did not take at once.
                writer.flush().await
            };
            timeout(WRITE_TIMEOUT, write)
                .await
                .map_err(|_| Lost::Io(std::io::ErrorKind::TimedOut.into()))?
                .map_err(Lost::Io)
        }
        Output::Event(event) => consumer.tell(event).await,
        Output::Undecodable { object, reason } => {
            tracing::error!(
                object,
                reason,
                "object cannot be read by this version, its last good version stays"
            );
            Ok(())
        }
    }
}
