//! The cache for clients that ask for a part of the workload endpoints (see [`crate::scope`]).
//!
//! Frames that hold the same endpoints at the same versions are made once for all of them, as long as they are asked for one soon after
//! the other.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use cali_api::update::Update;
use cali_api::v3::{Profile, WorkloadEndpoint};
use cali_api::{AnyResource, Key, Kind, ObjectMeta, Resource, Spec, StringMap};
use prost::Message as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{CHUNK, Cache, KindSet, Next};
use crate::digest;
use crate::scope::{self, Interest, Scopes, Verdict};
use crate::wire::{self, Object, Updates};

/// Frames that are kept, and how large they may be.
const KEPT_FRAMES: usize = 64;
const MAX_KEPT_FRAME: usize = 32 * 1024;

/// The last frames, by what is in them: sequence numbers, and whether it is a removal.
#[derive(Debug, Default)]
pub(super) struct Frames(VecDeque<(Vec<(u64, bool)>, Bytes)>);

impl Frames {
    fn of(&mut self, content: Vec<(u64, bool)>, objects: &[Bytes]) -> Option<Bytes> {
        if objects.is_empty() {
            return None;
        }
        if let Some((_, frame)) = self.0.iter().find(|(known, _)| *known == content) {
            return Some(frame.clone());
        }
        let frame = wire::frame_updates(objects.iter());
        if frame.len() <= MAX_KEPT_FRAME {
            self.0.truncate(KEPT_FRAMES - 1);
            self.0.push_front((content, frame.clone()));
        }
        Some(frame)
    }
}

/// That an endpoint is gone, as far as a client is concerned.
fn removal(key: &Key) -> Bytes {
    wire::encode_object(&Object {
        kind: key.kind.to_string(),
        namespace: key.namespace.as_deref().unwrap_or_default().to_owned(),
        name: key.name.to_string(),
        revision: String::new(),
        json: None,
    })
}

/// An object of ours, read back from how it is sent.
fn read_back<S: Spec + DeserializeOwned>(encoded: &Bytes) -> Option<Resource<S>> {
    #[derive(Deserialize)]
    struct Parts<S> {
        metadata: ObjectMeta,
        spec: S,
    }
    let objects = Updates::decode(encoded.clone()).ok()?.objects;
    let json = objects.into_iter().next()?.json?;
    let parts: Parts<S> = serde_json::from_slice(&json).ok()?;
    Some(Resource::new(parts.metadata, parts.spec))
}

impl KindSet {
    /// The kinds of a client that asks for a part of the endpoints, without them.
    pub fn without_endpoints(self) -> Self {
        Self(self.0 & !Self::bit(Kind::WorkloadEndpoint))
    }

    /// The endpoints alone.
    pub fn endpoints() -> Self {
        Self(Self::bit(Kind::WorkloadEndpoint))
    }
}

impl Cache {
    /// A client is there that asks for a part; it has been told nothing of the endpoints yet. Given back with [`Self::end_interest`].
    ///
    /// The first of them makes the cache look at all endpoints that it has.
    pub fn begin_interest(&mut self, interest: &mut Interest) {
        if !self.scopes.begin(interest) {
            return;
        }
        for (_, slot) in self.slots.live() {
            if slot.key.kind == Kind::Profile {
                let Some(profile): Option<Profile> = read_back(&slot.encoded) else {
                    continue;
                };
                let labels = &profile.spec.labels_to_apply;
                self.scopes
                    .set_profile(&mut self.head, &slot.key.name, labels);
            }
        }
        for (number, slot) in self.slots.live() {
            if slot.key.kind == Kind::WorkloadEndpoint {
                let Some(endpoint): Option<WorkloadEndpoint> = read_back(&slot.encoded) else {
                    continue;
                };
                let namespace = slot.key.namespace.as_deref();
                self.scopes.put(0, number, namespace, &endpoint);
            }
        }
    }

    /// See [`Scopes::change`].
    pub fn change_interest(
        &mut self,
        interest: &mut Interest,
        wanted: &BTreeSet<Arc<str>>,
        cursor: u64,
    ) -> scope::Change {
        self.begin_interest(interest);
        let slots = &self.slots;
        let key = |number| slots.get(number).map(|slot| slot.key.clone());
        self.scopes.change(interest, wanted, cursor, key)
    }

    /// See [`Scopes::end`].
    pub fn end_interest(&mut self, interest: Interest) {
        self.scopes.end(interest);
    }

    /// Takes an update that was put into the cache as number `self.head` into account.
    pub(super) fn follow(&mut self, update: &Update, number: u32) {
        if !self.scopes.is_asked() {
            return;
        }
        match (update.key.kind, update.value.as_deref()) {
            (Kind::WorkloadEndpoint, Some(AnyResource::WorkloadEndpoint(endpoint))) => {
                self.scopes
                    .put(self.head, number, update.key.namespace.as_deref(), endpoint);
            }
            (Kind::WorkloadEndpoint, _) => self.scopes.remove(self.head, number),
            (Kind::Profile, Some(AnyResource::Profile(profile))) => self.scopes.set_profile(
                &mut self.head,
                &update.key.name,
                &profile.spec.labels_to_apply,
            ),
            (Kind::Profile, _) => {
                self.scopes
                    .set_profile(&mut self.head, &update.key.name, &StringMap::new());
            }
            _ => {}
        }
    }

    /// [`Cache::newest_since`] of the endpoints that are asked for.
    pub fn newest_in_scope(&mut self, interest: &Interest, cursor: u64) -> Next {
        if cursor >= self.head {
            return Next::UpToDate;
        }
        if cursor < self.horizon {
            return Next::Forgotten;
        }
        let (mut content, mut objects) = (Vec::new(), Vec::new());
        let mut size = 0;
        let mut reached = self.head;
        for (sequence, number) in self.scopes.since(cursor) {
            let verdict = self.scopes.verdict(interest, number, cursor);
            let found = match verdict {
                Verdict::Skip => None,
                Verdict::Send => self.encoded(number),
                Verdict::Remove => self.slots.get(number).map(|slot| {
                    if slot.live {
                        removal(&slot.key)
                    } else {
                        slot.encoded.clone()
                    }
                }),
            };
            let Some(encoded) = found else {
                continue;
            };
            size += encoded.len();
            content.push((sequence, verdict == Verdict::Remove));
            objects.push(encoded);
            if size >= CHUNK {
                reached = sequence;
                break;
            }
        }
        Next::Frame {
            frame: self.frames.of(content, &objects),
            cursor: reached,
        }
    }

    fn encoded(&self, number: u32) -> Option<Bytes> {
        let slot = self.slots.get(number).filter(|slot| slot.live)?;
        Some(slot.encoded.clone())
    }

    /// Those of these endpoints that are still asked for, up to about [`CHUNK`] bytes; and how many numbers that took.
    pub fn endpoints(&self, interest: &Interest, numbers: &[u32]) -> (Option<Bytes>, usize) {
        let (mut objects, mut size, mut taken) = (Vec::new(), 0, 0);
        for number in numbers {
            taken += 1;
            if self.scopes.has(interest, *number)
                && let Some(encoded) = self.encoded(*number)
            {
                size += encoded.len();
                objects.push(encoded);
            }
            if size >= CHUNK {
                break;
            }
        }
        let frame = (!objects.is_empty()).then(|| wire::frame_updates(objects.iter()));
        (frame, taken)
    }

    /// That those of these endpoints that are not asked for again are gone; and how many keys that took.
    pub fn removals(&self, interest: &Interest, keys: &[Key]) -> (Option<Bytes>, usize) {
        const MAX: usize = 1000;
        let keys = &keys[..keys.len().min(MAX)];
        let gone = keys.iter().filter(|key| {
            let number = self.slots.find(digest::position(key), key);
            !number.is_some_and(|number| self.scopes.has(interest, number))
        });
        let objects: Vec<Bytes> = gone.map(removal).collect();
        let frame = (!objects.is_empty()).then(|| wire::frame_updates(objects.iter()));
        (frame, keys.len())
    }

    /// All endpoints that are asked for, those of the given buckets only where they are given.
    pub fn all_in_scope(&self, interest: &Interest, stale: Option<(&[u32], usize)>) -> Vec<u32> {
        let mut all = self.scopes.all_of(interest);
        if let Some((stale, buckets)) = stale {
            all.retain(|number| {
                let slot = self.slots.get(*number);
                let bucket = slot.map(|slot| digest::bucket(slot.position, buckets));
                bucket
                    .and_then(|bucket| u32::try_from(bucket).ok())
                    .is_some_and(|bucket| stale.binary_search(&bucket).is_ok())
            });
        }
        all
    }

    /// The digests of the endpoints that are asked for.
    pub(super) fn scope_digests(&self, interest: &Interest, into: &mut [u64]) {
        for number in self.scopes.all_of(interest) {
            if let Some(slot) = self.slots.get(number).filter(|slot| slot.live) {
                into[digest::bucket(slot.position, into.len())] ^= slot.digest;
            }
        }
    }

    /// What clients ask for.
    pub fn scopes(&self) -> &Scopes {
        &self.scopes
    }
}
