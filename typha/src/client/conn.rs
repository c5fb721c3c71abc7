//! One connection to a server, and what outlives connections: state machines without socket, clock or task.
//!
//! [`Held`] remembers key and revision of everything that the consumer was told. A new connection offers digests of
//! it; the server sends the ranges of the key space that differ; whatever was held in such a range and is not among what was sent is
//! really gone, and only then a deletion is emitted (mark and sweep, at `SyncDone`). An object that comes
//! again at the revision that is held is not emitted.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind, Revision};

use super::asking::{Asked, Coverage};
use crate::digest;
use crate::interest::Wanted;
use crate::wire::{
    self, Body, ClientHello, Decoder, Interest, Object, PROTOCOL, Pong, ResumeToken, SCOPE,
    SyncStart, WireError,
};

/// Objects that are reported as undecodable on one connection.
const MAX_REPORTS: usize = 100;

/// What the consumer has been told. Lives as long as the consumer.
#[derive(Debug, Default)]
pub struct Held {
    objects: HashMap<Key, Mark, foldhash::fast::RandomState>,
    snapshot: u64,
    pub(super) coverage: Coverage,
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    digest: u64,
    /// Number of the last snapshot in which the object was seen.
    snapshot: u64,
}

impl Held {
    /// Number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// True when nothing is held.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// The consumer was told this by somebody else.
    pub(super) fn remember(&mut self, update: &Update) {
        let mark = Mark {
            digest: digest::of_update(update),
            snapshot: self.snapshot,
        };
        self.objects.insert(update.key.clone(), mark);
    }

    fn token(&self) -> Option<ResumeToken> {
        if self.objects.is_empty() {
            return None;
        }
        let mut digests = vec![0; digest::buckets_for(self.objects.len())];
        for (key, mark) in &self.objects {
            let bucket = digest::bucket(digest::position(key), digests.len());
            digests[bucket] ^= mark.digest;
        }
        Some(ResumeToken {
            digest_version: digest::VERSION,
            digests,
        })
    }

    fn sweep(&mut self, scope: &Scope) -> Vec<Update> {
        let gone: Vec<Key> = self
            .objects
            .iter()
            .filter(|(key, mark)| mark.snapshot != self.snapshot && scope.covers(key))
            .map(|(key, _)| key.clone())
            .collect();
        for key in &gone {
            self.objects.remove(key);
        }
        gone.into_iter()
            .map(|key| Update {
                key,
                value: None,
                revision: Revision::from(""),
            })
            .collect()
    }
}

/// The part of the key space that a snapshot covers.
#[derive(Debug)]
enum Scope {
    All,
    Endpoints,
    Buckets {
        buckets: usize,
        stale: HashSet<usize>,
    },
}

impl Scope {
    fn covers(&self, key: &Key) -> bool {
        match self {
            Self::All => true,
            Self::Endpoints => key.kind == Kind::WorkloadEndpoint,
            Self::Buckets { buckets, stale } => {
                stale.contains(&digest::bucket(digest::position(key), *buckets))
            }
        }
    }
}

/// Why a connection is given up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The bytes were no messages.
    #[error("protocol violation")]
    Wire(#[from] WireError),
    /// A message that has no place here.
    #[error("protocol violation: unexpected {0}")]
    Unexpected(&'static str),
    /// `SyncStart` with an impossible bucket count, or buckets beyond it.
    #[error("protocol violation: a snapshot of {0} buckets, or of one beyond them")]
    Buckets(u32),
    /// The server went away within a frame.
    #[error("protocol violation: the stream ends {0} bytes into a frame")]
    Truncated(usize),
    /// The server speaks another version.
    #[error("server speaks protocol {0}, this client {PROTOCOL}")]
    Version(u32),
    /// Nothing came for three ping intervals.
    #[error("server was silent for {0:?}")]
    Silent(Duration),
    /// The server closed deliberately.
    #[error("closed by the server: {reason}")]
    Goodbye {
        /// What it said.
        reason: String,
        /// Another server should be tried.
        elsewhere: bool,
    },
}

/// What the owner has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Write to the socket.
    Send(Bytes),
    /// Pass on to the consumer.
    Event(SyncEvent),
    /// An object that this version cannot read: to be reported. Its last good version stays in force.
    Undecodable {
        /// Which one.
        object: String,
        /// Why.
        reason: String,
    },
}

/// Who connects and for what.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Node name.
    pub hostname: String,
    /// Program and version, for the server's log.
    pub info: String,
    /// The subscription.
    pub kinds: Vec<Kind>,
    /// Of the endpoints, those of this node and what is [asked for](Conn::on_wanted); all of them without.
    pub node: Option<String>,
}

/// One connection. See the module's text.
#[derive(Debug)]
pub struct Conn {
    decoder: Decoder,
    greeted: bool,
    scope: Option<Scope>,
    /// The endpoints are being told anew.
    endpoints_anew: bool,
    asked: Asked,
    kinds: HashSet<Kind>,
    outputs: VecDeque<Output>,
    silence: Duration,
    last_heard: Instant,
    complete: bool,
    undecodable: usize,
    failed: Option<ClientError>,
}

impl Conn {
    /// A connection that was just established. The hello is the first output.
    pub fn new(now: Instant, identity: &Identity, held: &Held) -> Self {
        let hello = ClientHello {
            protocol: PROTOCOL,
            hostname: identity.hostname.clone(),
            info: identity.info.clone(),
            interest: Some(Interest {
                kinds: identity.kinds.iter().map(Kind::to_string).collect(),
                scope: identity.node.as_ref().map(|node| wire::Scope {
                    version: SCOPE,
                    node: node.clone(),
                }),
            }),
            resume: held.token(),
        };
        Self {
            decoder: Decoder::from_servers(),
            greeted: false,
            scope: None,
            endpoints_anew: false,
            asked: Asked::default(),
            kinds: identity.kinds.iter().copied().collect(),
            outputs: VecDeque::from([Output::Send(wire::frame(Body::ClientHello(hello), false))]),
            silence: Duration::from_secs(30),
            last_heard: now,
            complete: false,
            undecodable: 0,
            failed: None,
        }
    }

    /// The consumer asks for other endpoints. To be called when [`Self::poll_output`] has nothing more.
    pub fn on_wanted(&mut self, wanted: Wanted, held: &mut Held) {
        held.coverage.want(wanted);
        self.tell(held);
        self.answer(held);
    }

    fn tell(&mut self, held: &mut Held) {
        let frames = self.asked.tell(&mut held.coverage);
        self.outputs.extend(frames.into_iter().map(Output::Send));
    }

    fn answer(&mut self, held: &mut Held) {
        if let Some(number) = held.coverage.answer() {
            self.outputs
                .push_back(Output::Event(SyncEvent::Complete(number)));
        }
    }

    /// True once this connection brought the consumer up to date.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// The next thing to do; none when more bytes are needed. A frame is decoded when what the former one asked for has been taken: what
    /// is `held` is then always what was told, also where the connection breaks in between, and however small a frame is that
    /// unpacks to a large one, there is one of them at a time.
    ///
    /// # Errors
    /// What came is none of the protocol, or the server closes. So it stays.
    pub fn poll_output(&mut self, held: &mut Held) -> Result<Option<Output>, ClientError> {
        while self.outputs.is_empty() && self.failed.is_none() {
            let done = match self.decoder.next_message() {
                Ok(Some(body)) => self.on_message(body, held),
                Ok(None) => break,
                Err(error) => Err(error.into()),
            };
            self.failed = done.err();
        }
        match (self.outputs.pop_front(), &self.failed) {
            (None, Some(error)) => Err(error.clone()),
            (output, _) => Ok(output),
        }
    }

    /// When [`Self::on_timeout`] wants to be called. The owner lets no time pass while its consumer is
    /// not taking what was read.
    pub fn poll_timeout(&self) -> Instant {
        self.last_heard + self.silence
    }

    /// Reading begins again after the consumer kept the owner waiting.
    pub fn on_resumed_reading(&mut self, now: Instant) {
        self.last_heard = now;
    }

    /// Time has passed.
    pub fn on_timeout(&self, now: Instant) -> Result<(), ClientError> {
        if now >= self.poll_timeout() {
            Err(ClientError::Silent(self.silence))
        } else {
            Ok(())
        }
    }

    /// Bytes from the server, to be called when [`Self::poll_output`] has nothing more.
    pub fn on_bytes(&mut self, now: Instant, bytes: &[u8]) {
        self.last_heard = now;
        self.decoder.push(bytes);
    }

    /// The server sends nothing more.
    pub fn on_end(&self) -> Result<(), ClientError> {
        match self.decoder.buffered() {
            0 => Ok(()),
            rest => Err(ClientError::Truncated(rest)),
        }
    }

    fn on_message(&mut self, body: Body, held: &mut Held) -> Result<(), ClientError> {
        match body {
            Body::Goodbye(goodbye) => {
                return Err(ClientError::Goodbye {
                    reason: wire::for_logs(&goodbye.reason),
                    elsewhere: goodbye.elsewhere,
                });
            }
            Body::ServerHello(hello) if !self.greeted => {
                if hello.protocol != PROTOCOL {
                    return Err(ClientError::Version(hello.protocol));
                }
                self.silence =
                    Duration::from_secs(u64::from(hello.ping_interval_secs.clamp(1, 3600)) * 3);
                self.greeted = true;
                self.asked.scoped = hello.scope >= SCOPE;
                self.tell(held);
            }
            body if !self.greeted => return Err(ClientError::Unexpected(body.name())),
            Body::SyncStart(start) => self.on_sync_start(start, held)?,
            Body::Updates(updates) => {
                let updates: Vec<_> = updates
                    .objects
                    .into_iter()
                    .filter_map(|o| self.on_object(o, held))
                    .collect();
                self.emit(updates);
            }
            Body::ScopeStart(_) if self.asked.scoped && self.scope.is_none() => {
                held.snapshot += 1;
                self.endpoints_anew = true;
            }
            Body::ScopeDone(done) if self.asked.scoped && self.scope.is_none() => {
                if std::mem::take(&mut self.endpoints_anew) {
                    let gone = held.sweep(&Scope::Endpoints);
                    self.emit(gone);
                }
                self.asked.on_done(done.id, &mut held.coverage);
                self.answer(held);
            }
            Body::SyncDone(done) => {
                let scope = self
                    .scope
                    .take()
                    .ok_or(ClientError::Unexpected("SyncDone"))?;
                let gone = held.sweep(&scope);
                self.emit(gone);
                self.complete = true;
                self.asked.on_done(done.scope, &mut held.coverage);
                self.answer(held);
                self.outputs
                    .push_back(Output::Event(SyncEvent::Status(SyncStatus::InSync)));
            }
            Body::Ping(ping) => {
                self.outputs.push_back(Output::Send(wire::frame(
                    Body::Pong(Pong { id: ping.id }),
                    false,
                )));
            }
            body => return Err(ClientError::Unexpected(body.name())),
        }
        Ok(())
    }

    fn on_sync_start(&mut self, start: SyncStart, held: &mut Held) -> Result<(), ClientError> {
        let buckets = start.buckets as usize;
        if !start.full
            && (!digest::valid_bucket_count(buckets)
                || start.stale.iter().any(|bucket| *bucket >= start.buckets))
        {
            return Err(ClientError::Buckets(start.buckets));
        }
        held.snapshot += 1;
        self.endpoints_anew = false;
        self.scope = Some(if start.full {
            Scope::All
        } else {
            Scope::Buckets {
                buckets,
                stale: start
                    .stale
                    .into_iter()
                    .map(|bucket| bucket as usize)
                    .collect(),
            }
        });
        if held.is_empty() {
            self.outputs.push_back(Output::Event(SyncEvent::Status(
                SyncStatus::ResyncInProgress,
            )));
        }
        Ok(())
    }

    fn on_object(&mut self, object: Object, held: &mut Held) -> Option<Update> {
        let Ok(kind) = object.kind.parse::<Kind>() else {
            self.undecodable(
                format!("{}({}/{})", object.kind, object.namespace, object.name),
                "unknown kind".into(),
            );
            return None;
        };
        if !self.kinds.contains(&kind) {
            return None;
        }
        let key = Key {
            kind,
            namespace: (!object.namespace.is_empty()).then(|| object.namespace.into()),
            name: object.name.into(),
        };
        let revision = Revision::from(object.revision);
        let Some(json) = object.json else {
            return held.objects.remove(&key).map(|_| Update {
                key,
                value: None,
                revision,
            });
        };
        let digest = digest::object(&key, &revision);
        if let Some(mark) = held.objects.get_mut(&key) {
            mark.snapshot = held.snapshot;
            if mark.digest == digest {
                return None;
            }
        }
        match AnyResource::from_slice(&json) {
            Ok(value) if value.key().kind != kind => {
                let reason = format!("it says that it is a {}", value.key().kind);
                self.undecodable(key.to_string(), reason);
                None
            }
            Ok(value) => {
                held.objects.insert(
                    key.clone(),
                    Mark {
                        digest,
                        snapshot: held.snapshot,
                    },
                );
                Some(Update {
                    key,
                    value: Some(Arc::new(value)),
                    revision,
                })
            }
            Err(error) => {
                self.undecodable(key.to_string(), error.to_string());
                None
            }
        }
    }

    fn undecodable(&mut self, object: String, reason: String) {
        self.undecodable += 1;
        let (object, reason) = match self.undecodable.cmp(&MAX_REPORTS) {
            Ordering::Less => (object, reason),
            Ordering::Equal => (
                "more".to_owned(),
                "not reported on this connection".to_owned(),
            ),
            Ordering::Greater => return,
        };
        self.outputs.push_back(Output::Undecodable {
            object: wire::for_logs(&object),
            reason: wire::for_logs(&reason),
        });
    }

    fn emit(&mut self, updates: Vec<Update>) {
        if !updates.is_empty() {
            self.outputs
                .push_back(Output::Event(SyncEvent::Updates(updates)));
        }
    }
}
