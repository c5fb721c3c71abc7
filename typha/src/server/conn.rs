//! One client, as the server sees it: a state machine without socket, clock or task.
//!
//! ```text
//!   AwaitHello --hello--> AwaitCache --cache in sync--> Snapshot --all sent--> Deltas(done=false) --cursor at head--> Deltas(done=true)
//!                                                          ^---------- deletions forgotten --------------------------|
//! ```
//! The owner feeds bytes and time in, and takes frames out one at a time, a next one only when the former has been
//! written. Together with the cache's cursors that is the whole backpressure: what a client has not read yet exists once, in the cache.
//!
//! A client that asks for a part of the endpoints has a second cursor, for them ([`super::scoped`]); its snapshot waits until it has
//! said which part. Who owns a `Conn` calls [`Conn::leave`] at its end.
//!
//! Determinism: equal calls with equal arguments give equal results.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cali_api::Kind;

use super::scoped::{Items, Scoped, Step, follow};
use crate::cache::{Cache, KindSet};
use crate::digest::{self, LEAVES};
use crate::wire::{
    Body, ClientHello, Decoder, Goodbye, MAX_SELECTOR_BYTES, MAX_SELECTORS, PROTOCOL, Ping, SCOPE,
    ServerHello, SyncDone, SyncStart, WireError, for_logs, frame,
};

/// How patient the server is (environment `TYPHA_SERVER...`, defaults as Calico's).
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Time until the client's hello.
    pub handshake: Duration,
    /// Interval of pings.
    pub ping: Duration,
    /// A client that neither said anything nor took a byte for so long is dropped. What its machine does not acknowledge
    /// counts as not taken (TCP_USER_TIMEOUT).
    pub progress: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            ping: Duration::from_secs(10),
            progress: Duration::from_secs(60),
        }
    }
}

/// Why a connection ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The bytes were no messages.
    #[error("protocol violation: {0}")]
    Wire(#[from] WireError),
    /// A message that has no place here.
    #[error("protocol violation: unexpected {0}")]
    Unexpected(&'static str),
    /// The client went away within a frame.
    #[error("protocol violation: the stream ends {0} bytes into a frame")]
    Truncated(usize),
    /// The client speaks another version.
    #[error("protocol {theirs} is not supported, this server speaks {PROTOCOL}")]
    Version {
        /// The client's.
        theirs: u32,
    },
    /// Nothing in the subscription is known here.
    #[error("the subscription names no kind that this server knows")]
    EmptyInterest,
    /// More than a client may ask for.
    #[error(
        "protocol violation: more than {MAX_SELECTORS} selectors, or than {MAX_SELECTOR_BYTES} bytes of them"
    )]
    TooManySelectors,
    /// No hello in time.
    #[error("no hello within {0:?}")]
    Handshake(Duration),
    /// See [`Patience::progress`].
    #[error("no progress for {0:?}")]
    NoProgress(Duration),
    /// The client said goodbye.
    #[error("closed by the client: {0}")]
    Goodbye(String),
    /// Its certificate is not one that is served.
    #[error("refused: {0}")]
    Refused(String),
    /// This server stops.
    #[error("server is shutting down")]
    Shutdown,
}

impl CloseReason {
    /// True when what the client sent was none of this protocol.
    pub fn is_violation(&self) -> bool {
        matches!(
            self,
            Self::Wire(_) | Self::Unexpected(_) | Self::Truncated(_) | Self::TooManySelectors
        )
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Conn {
    patience: Patience,
    decoder: Decoder,
    phase: Phase,
    /// Of a client that asks for a part of the endpoints.
    scoped: Option<Scoped>,
    /// Whose turn it is, so that neither stream waits for the other's end.
    endpoints_first: bool,
    control: VecDeque<Bytes>,
    hostname: String,
    handshake_deadline: Instant,
    last_progress: Instant,
    next_ping: Instant,
    pings: u64,
    closing: Option<CloseReason>,
}

#[derive(Debug)]
enum Phase {
    AwaitHello,
    AwaitCache {
        kinds: KindSet,
        token: Option<Vec<u64>>,
    },
    Snapshot {
        kinds: KindSet,
        started_at: u64,
        rest: Rest,
        /// What follows, of a client with a scope.
        endpoints: Option<Items>,
    },
    Deltas {
        kinds: KindSet,
        cursor: u64,
        done: bool,
    },
}

/// The part of a snapshot that has not been sent yet.
#[derive(Debug)]
enum Rest {
    Pages { next: usize, pages: usize },
    Leaves { leaves: Vec<u32>, next: usize },
}

impl Conn {
    /// A connection that was just accepted.
    pub fn new(now: Instant, patience: Patience) -> Self {
        Self {
            patience,
            decoder: Decoder::from_clients(),
            phase: Phase::AwaitHello,
            scoped: None,
            endpoints_first: false,
            control: VecDeque::new(),
            hostname: String::new(),
            handshake_deadline: now + patience.handshake,
            last_progress: now,
            next_ping: now + patience.ping,
            pings: 0,
            closing: None,
        }
    }

    /// Name from the client's hello; empty before.
    pub fn hostname(&self) -> &str {
        &self.hostname
    }

    /// Whether the client has been sent everything and follows the changes.
    pub fn is_streaming(&self) -> bool {
        matches!(self.phase, Phase::Deltas { done: true, .. })
    }

    /// Why the connection must be closed, once [`Self::poll_transmit`] yields nothing more.
    pub fn closing(&self) -> Option<&CloseReason> {
        self.closing.as_ref()
    }

    /// Bytes from the client.
    pub fn on_bytes(&mut self, now: Instant, bytes: &[u8]) {
        if self.closing.is_some() {
            return;
        }
        self.last_progress = now;
        self.decoder.push(bytes);
        while self.closing.is_none() {
            match self.decoder.next_message() {
                Ok(Some(body)) => self.on_message(body),
                Ok(None) => return,
                Err(error) => self.close(error.into()),
            }
        }
    }

    /// The client sends nothing more.
    pub fn on_end(&mut self) {
        let rest = self.decoder.buffered();
        if self.closing.is_none() && rest > 0 {
            self.closing = Some(CloseReason::Truncated(rest));
        }
    }

    /// The client's socket took bytes.
    pub fn on_written(&mut self, now: Instant) {
        self.last_progress = now;
    }

    /// The client is not to be served; it is told why.
    pub fn on_refused(&mut self, reason: &dyn std::error::Error) {
        self.close(CloseReason::Refused(reason.to_string()));
    }

    /// The server stops; the client is told to go elsewhere.
    pub fn on_shutdown(&mut self) {
        self.close(CloseReason::Shutdown);
    }

    /// When [`Self::on_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        match self.phase {
            Phase::AwaitHello => self.handshake_deadline,
            _ => self
                .next_ping
                .min(self.last_progress + self.patience.progress),
        }
    }

    /// Time has passed.
    pub fn on_timeout(&mut self, now: Instant) {
        if self.closing.is_some() {
            return;
        }
        if matches!(self.phase, Phase::AwaitHello) {
            if now >= self.handshake_deadline {
                self.close(CloseReason::Handshake(self.patience.handshake));
            }
            return;
        }
        if now >= self.last_progress + self.patience.progress {
            self.close(CloseReason::NoProgress(self.patience.progress));
        } else if now >= self.next_ping {
            self.next_ping = now + self.patience.ping;
            self.pings += 1;
            // A client that does not read gets one ping, not a queue of them.
            if self.control.is_empty() {
                self.control
                    .push_back(frame(Body::Ping(Ping { id: self.pings }), false));
            }
        }
    }

    fn on_message(&mut self, body: Body) {
        match (body, &self.phase) {
            (Body::ClientHello(hello), Phase::AwaitHello) => self.on_hello(hello),
            (Body::Goodbye(goodbye), _) => {
                self.closing = Some(CloseReason::Goodbye(for_logs(&goodbye.reason)))
            }
            (body, Phase::AwaitHello) => self.close(CloseReason::Unexpected(body.name())),
            (Body::ScopeChange(change), _) if self.scoped.is_some() => {
                let taken = self.scoped.as_mut().map(|scoped| scoped.on_change(change));
                if let Some(Err(reason)) = taken {
                    self.close(reason);
                }
            }
            (Body::Pong(_), _) => {}
            (body, _) => self.close(CloseReason::Unexpected(body.name())),
        }
    }

    fn on_hello(&mut self, hello: ClientHello) {
        self.hostname = for_logs(&hello.hostname);
        if hello.protocol != PROTOCOL {
            return self.close(CloseReason::Version {
                theirs: hello.protocol,
            });
        }
        let interest = hello.interest.unwrap_or_default();
        let (known, unknown): (Vec<_>, Vec<_>) = interest
            .kinds
            .into_iter()
            .map(|name| name.parse::<Kind>().map_err(|_| name))
            .partition(Result::is_ok);
        let kinds: KindSet = known.into_iter().flatten().collect();
        if kinds == KindSet::default() {
            return self.close(CloseReason::EmptyInterest);
        }
        let scope = interest
            .scope
            .filter(|scope| scope.version >= SCOPE && kinds.contains(Kind::WorkloadEndpoint));
        self.scoped = scope.as_ref().map(Scoped::new);
        let token = hello
            .resume
            .filter(|token| {
                token.digest_version == digest::VERSION
                    && digest::valid_bucket_count(token.digests.len())
            })
            .map(|token| token.digests);
        self.control.push_back(frame(
            Body::ServerHello(ServerHello {
                protocol: PROTOCOL,
                info: concat!("typha ", env!("CARGO_PKG_VERSION")).to_owned(),
                unknown_kinds: unknown.into_iter().filter_map(Result::err).collect(),
                ping_interval_secs: u32::try_from(self.patience.ping.as_secs().max(1))
                    .unwrap_or(u32::MAX),
                scope: if self.scoped.is_some() { SCOPE } else { 0 },
            }),
            false,
        ));
        self.phase = Phase::AwaitCache { kinds, token };
    }

    fn close(&mut self, reason: CloseReason) {
        if self.closing.is_none() {
            let elsewhere = matches!(reason, CloseReason::Shutdown);
            let goodbye = Goodbye {
                reason: reason.to_string(),
                elsewhere,
            };
            self.control.push_back(frame(Body::Goodbye(goodbye), false));
            self.closing = Some(reason);
        }
    }

    /// Gives back what the cache keeps for the client.
    pub fn leave(&mut self, cache: &mut Cache) {
        if let Some(scoped) = self.scoped.take() {
            scoped.end(cache);
        }
    }

    /// The next frame to write; to be called again when it has been written, and when the cache changed.
    pub fn poll_transmit(&mut self, cache: &mut Cache) -> Option<Bytes> {
        if let Some(frame) = self.control.pop_front() {
            return Some(frame);
        }
        if self.closing.is_some() {
            return None;
        }
        loop {
            // Each turn that yields no frame moves the phase forward, so this ends.
            match &mut self.phase {
                Phase::AwaitHello => return None,
                Phase::AwaitCache { .. } if !cache.is_in_sync() => return None,
                Phase::AwaitCache { .. } if self.scoped.as_ref().is_some_and(|s| !s.is_told()) => {
                    return None;
                }
                Phase::AwaitCache { kinds, token } => {
                    let (kinds, token) = (*kinds, token.take());
                    return Some(self.start_snapshot(cache, kinds, token.as_deref()));
                }
                Phase::Snapshot {
                    kinds,
                    started_at,
                    rest,
                    endpoints,
                } => {
                    let pages = match &self.scoped {
                        Some(scoped) if !scoped.is_everything() => kinds.without_endpoints(),
                        _ => *kinds,
                    };
                    if let Some(piece) = rest.take(cache, pages) {
                        if piece.is_some() {
                            return piece;
                        }
                    } else if let (Some(items), Some(scoped)) = (&mut *endpoints, &self.scoped) {
                        match items.take(cache, scoped.interest()) {
                            Some(Some(frame)) => return Some(frame),
                            Some(None) => {}
                            None => *endpoints = None,
                        }
                    } else {
                        self.phase = Phase::Deltas {
                            kinds: *kinds,
                            cursor: *started_at,
                            done: false,
                        }
                    }
                }
                Phase::Deltas {
                    kinds,
                    cursor,
                    done,
                } => {
                    if *done
                        && let Some(scoped) = &mut self.scoped
                        && let Some(frame) = scoped.take_up(cache)
                    {
                        return Some(frame);
                    }
                    let others = match &self.scoped {
                        Some(_) => kinds.without_endpoints(),
                        None => *kinds,
                    };
                    self.endpoints_first = !self.endpoints_first;
                    for endpoints in [self.endpoints_first, !self.endpoints_first] {
                        let step = match &mut self.scoped {
                            Some(scoped) if endpoints => scoped.step(cache),
                            None if endpoints => Step::UpToDate,
                            _ => follow(cache, others, cursor, *done),
                        };
                        match step {
                            Step::Frame(frame) => return Some(frame),
                            Step::UpToDate => {}
                            Step::Forgotten => {
                                let kinds = *kinds;
                                return Some(self.start_snapshot(cache, kinds, None));
                            }
                        }
                    }
                    if *done {
                        return None;
                    }
                    *done = true;
                    let scope = self.scoped.as_ref().map_or(0, Scoped::taken);
                    return Some(frame(Body::SyncDone(SyncDone { scope }), false));
                }
            }
        }
    }

    fn start_snapshot(
        &mut self,
        cache: &mut Cache,
        kinds: KindSet,
        token: Option<&[u64]>,
    ) -> Bytes {
        if let Some(scoped) = &mut self.scoped {
            scoped.begin(cache);
        }
        let part = self
            .scoped
            .as_ref()
            .filter(|scoped| !scoped.is_everything());
        let in_pages = match part {
            Some(_) => kinds.without_endpoints(),
            None => kinds,
        };
        let stale = token.map(|digests| {
            let interest = part.map(Scoped::interest);
            (
                cache.stale_buckets(in_pages, interest, digests),
                digests.len(),
            )
        });
        let (start, rest) = match stale {
            // With most of it stale, the shared pages are cheaper than a selection of our own.
            Some((stale, buckets)) if stale.len() * 2 <= buckets => {
                let per = u32::try_from(LEAVES / buckets).unwrap_or(1);
                let leaves = stale
                    .iter()
                    .flat_map(|bucket| bucket * per..(bucket + 1) * per)
                    .collect();
                let buckets = u32::try_from(buckets).unwrap_or(1);
                (
                    SyncStart {
                        buckets,
                        stale,
                        full: false,
                    },
                    Rest::Leaves { leaves, next: 0 },
                )
            }
            _ => (
                SyncStart {
                    buckets: 1,
                    stale: Vec::new(),
                    full: true,
                },
                Rest::Pages {
                    next: 0,
                    pages: cache.page_count(),
                },
            ),
        };
        let of_buckets = (!start.full).then_some((start.stale.as_slice(), start.buckets as usize));
        let endpoints = part.and_then(|scoped| scoped.snapshot(cache, of_buckets));
        self.phase = Phase::Snapshot {
            kinds,
            started_at: cache.head(),
            rest,
            endpoints,
        };
        frame(Body::SyncStart(start), false)
    }
}

impl Rest {
    /// The next piece; `None` at the end, `Some(None)` for a piece without objects.
    fn take(&mut self, cache: &mut Cache, kinds: KindSet) -> Option<Option<Bytes>> {
        match self {
            Self::Pages { next, pages } if *next < *pages => {
                *next += 1;
                Some(cache.page(kinds, *next - 1, *pages))
            }
            Self::Leaves { leaves, next } if *next < leaves.len() => {
                let (frame, taken) = cache.leaves(kinds, &leaves[*next..]);
                *next += taken;
                Some(frame)
            }
            _ => None,
        }
    }
}
