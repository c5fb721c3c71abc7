//! The server's one picture of the datastore, kept in encoded form.
//!
//! Each object is encoded once, when it arrives. What clients need is then made by concatenation and shared between
//! all clients with the same subscription:
//!
//! - a *delta* (everything that arrived in one go) is put together and compressed once;
//! - the *snapshot* consists of pages, ranges of the key space (see [`crate::digest`]). A page is compressed once and stays
//!   valid until an object in it changes, so that a thousand clients that start together cost one compression, and one
//!   change costs one page.
//!
//! Every change has a sequence number of this process; it never leaves the process. A client is a *cursor* into the changes, and nothing is
//! queued for it: it takes the shared deltas while they are kept, and a client that fell further behind gets the newest version of everything
//! changed since its cursor ([`Cache::next`]). So a slow client costs no memory, sees each key at most once, and never sees a key
//! go back in time. Deletions are remembered up to a bound; behind it, the client is sent the snapshot again.

mod scoped;
mod slots;

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;
use cali_api::selector::index::Interner;
use cali_api::update::Update;
use cali_api::{Key, Kind};

use crate::digest::{self, LEAVES, Leaves};
use crate::scope::{Interest, Scopes};
use crate::wire::{self, MAX_OBJECT, Object};
use scoped::Frames;
use slots::{Slot, Slots};

/// Raw size near which batches made for one client, and pages, are cut.
pub const CHUNK: usize = 256 * 1024;

/// A set of kinds: the subscription of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct KindSet(u64);

impl KindSet {
    /// True when the kind is in the set.
    pub fn contains(self, kind: Kind) -> bool {
        self.0 & Self::bit(kind) != 0
    }

    fn bit(kind: Kind) -> u64 {
        const { assert!(Kind::ALL.len() <= 64) };
        1 << (kind as u32)
    }
}

impl FromIterator<Kind> for KindSet {
    fn from_iter<I: IntoIterator<Item = Kind>>(kinds: I) -> Self {
        Self(kinds.into_iter().fold(0, |set, kind| set | Self::bit(kind)))
    }
}

/// What is made once for all clients with the same subscription, for the subscriptions that were used last. Those that exist are as many as
/// there are programs; a client that makes up one after the other costs the work, not the memory.
#[derive(Debug)]
struct PerSubscription<V>(VecDeque<(KindSet, V)>);

impl<V> Default for PerSubscription<V> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<V: Default> PerSubscription<V> {
    const MAX: usize = 16;

    fn of(&mut self, kinds: KindSet) -> &mut V {
        let found = self.0.iter().position(|(other, _)| *other == kinds);
        let entry = match found.and_then(|at| self.0.remove(at)) {
            Some(entry) => entry,
            None => {
                self.0.truncate(Self::MAX - 1);
                (kinds, V::default())
            }
        };
        self.0.push_front(entry);
        &mut self.0[0].1
    }
}

/// Why an object is not sent on.
#[derive(Debug, thiserror::Error)]
pub enum Unsendable {
    /// It has no JSON form.
    #[error("it cannot be encoded")]
    Encoding(#[from] serde_json::Error),
    /// No client would take it.
    #[error("it has {0} bytes, more than {MAX_OBJECT}: it has to be split or made smaller")]
    TooLarge(usize),
}

/// Bounds of what is kept for clients that are behind.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of shared deltas.
    pub backlog_bytes: usize,
    /// Number of remembered deletions.
    pub tombstones: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            backlog_bytes: 8 * 1024 * 1024,
            tombstones: 65_536,
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Cache {
    limits: Limits,
    in_sync: bool,
    head: u64,
    slots: Slots,
    namespaces: Interner,
    live: usize,
    object_bytes: usize,
    /// The last change of each object, deletions too.
    changes: BTreeMap<u64, u32>,
    /// Those of them that are deletions.
    gone: BTreeMap<u64, u32>,
    /// Deletions up to here have been forgotten.
    horizon: u64,
    leaves: HashMap<Kind, Leaves>,
    leaf_changed: Box<[u64]>,
    backlog: VecDeque<Batch>,
    backlog_bytes: usize,
    pages: PerSubscription<HashMap<usize, Page>>,
    page_count: usize,
    counts: Counts,
    scopes: Scopes,
    frames: Frames,
}

/// What a cache has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Changes that came from the datastore.
    pub updates: u64,
    /// Those of them that changed nothing.
    pub skipped: u64,
    /// Pages that were made.
    pub pages_built: u64,
    /// Pages that were there already.
    pub pages_shared: u64,
}

#[derive(Debug)]
struct Batch {
    first: u64,
    last: u64,
    objects: Vec<(Kind, Bytes)>,
    bytes: usize,
    /// Made when the first client takes it; none without an object that concerns it.
    frames: PerSubscription<Option<Option<Bytes>>>,
}

#[derive(Debug)]
struct Page {
    built: u64,
    frame: Option<Bytes>,
}

/// What a client at some cursor is to be sent next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// The client has everything.
    UpToDate,
    /// A frame (none when nothing in it concerns the client), and the cursor after it.
    Frame {
        /// Ready to be written.
        frame: Option<Bytes>,
        /// Cursor once it has been sent.
        cursor: u64,
    },
    /// Deletions since the cursor have been forgotten: a snapshot is needed.
    Forgotten,
}

impl Cache {
    /// An empty cache that is not in sync.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            in_sync: false,
            head: 0,
            slots: Slots::default(),
            namespaces: Interner::default(),
            live: 0,
            object_bytes: 0,
            changes: BTreeMap::new(),
            gone: BTreeMap::new(),
            horizon: 0,
            leaves: HashMap::new(),
            leaf_changed: vec![0; LEAVES].into_boxed_slice(),
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            pages: PerSubscription::default(),
            page_count: 1,
            counts: Counts::default(),
            scopes: Scopes::default(),
            frames: Frames::default(),
        }
    }

    /// The datastore's content is complete. It stays so: an outage of the datastore leaves the last state standing,
    /// and what was missed comes as changes.
    pub fn set_in_sync(&mut self) {
        self.in_sync = true;
    }

    /// True once a snapshot may be sent. Before that, a client would take what has not arrived yet for deleted.
    pub fn is_in_sync(&self) -> bool {
        self.in_sync
    }

    /// Number of the newest change.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.live
    }

    /// True without objects.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Bytes of shared deltas that are kept, for metrics.
    pub fn backlog_bytes(&self) -> usize {
        self.backlog_bytes
    }

    /// Encoded size of all objects.
    pub fn object_bytes(&self) -> usize {
        self.object_bytes
    }

    /// What has been done so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes changes from the datastore, in order, as one delta (or several, of about [`CHUNK`] bytes). What does not change
    /// anything is dropped. Returns the keys of objects that cannot be sent (their former version stays).
    pub fn apply(&mut self, updates: Vec<Update>) -> Vec<(Key, Unsendable)> {
        let mut failed = Vec::new();
        let mut batch = Batch::after(self.head);
        // Of several changes of one key the last one counts.
        let last: HashMap<Key, usize> = updates
            .iter()
            .enumerate()
            .map(|(at, u)| (u.key.clone(), at))
            .collect();
        for (at, update) in updates.into_iter().enumerate() {
            if last.get(&update.key) != Some(&at) {
                continue;
            }
            let kind = update.key.kind;
            self.counts.updates += 1;
            match self.apply_one(update) {
                Ok(Some(encoded)) => {
                    batch.bytes += encoded.len();
                    batch.objects.push((kind, encoded));
                    if batch.bytes >= CHUNK {
                        self.keep(std::mem::replace(&mut batch, Batch::after(self.head)));
                    }
                }
                Ok(None) => self.counts.skipped += 1,
                Err(failure) => failed.push(failure),
            }
        }
        self.keep(batch);
        while self.backlog_bytes > self.limits.backlog_bytes
            && let Some(oldest) = self.backlog.pop_front()
        {
            self.backlog_bytes -= oldest.bytes;
        }
        while self.gone.len() > self.limits.tombstones {
            self.forget_oldest_deletion();
        }
        failed
    }

    fn keep(&mut self, mut batch: Batch) {
        if !batch.objects.is_empty() {
            batch.last = self.head;
            self.backlog_bytes += batch.bytes;
            self.backlog.push_back(batch);
        }
    }

    fn apply_one(&mut self, update: Update) -> Result<Option<Bytes>, (Key, Unsendable)> {
        let Update {
            key,
            value,
            revision,
            ..
        } = &update;
        let position = digest::position(key);
        let known = self.slots.find(position, key);
        let former = known
            .and_then(|number| self.slots.get(number))
            .filter(|slot| slot.live);
        let json = match value {
            Some(value) => {
                let digest = digest::object(key, revision);
                if former.is_some_and(|former| former.digest == digest) {
                    return Ok(None);
                }
                match serde_json::to_vec(&**value) {
                    Ok(json) if json.len() > MAX_OBJECT => {
                        return Err((key.clone(), Unsendable::TooLarge(json.len())));
                    }
                    Ok(json) => Some((Bytes::from(json), digest)),
                    Err(error) => return Err((key.clone(), error.into())),
                }
            }
            None if former.is_none() => return Ok(None),
            None => None,
        };
        self.head += 1;
        self.leaf_changed[digest::bucket(position, LEAVES)] = self.head;
        let leaves = self.leaves.entry(key.kind).or_default();
        if let Some(former) = former {
            leaves.toggle(position, former.digest);
            self.object_bytes -= former.encoded.len();
            self.live -= 1;
        }
        let digest = json.as_ref().map(|(_, digest)| *digest);
        let encoded = wire::encode_object(&Object {
            kind: key.kind.to_string(),
            namespace: key.namespace.as_deref().unwrap_or_default().to_owned(),
            name: key.name.to_string(),
            revision: revision.as_str().to_owned(),
            json: json.map(|(json, _)| json),
        });
        if let Some(digest) = digest {
            leaves.toggle(position, digest);
            self.object_bytes += encoded.len();
            self.live += 1;
        }
        let number = self.store(&update.key, known, position, encoded.clone(), digest);
        self.follow(&update, number);
        Ok(Some(encoded))
    }

    /// Puts the newest version, or a deletion when there is no digest, into the object's slot.
    fn store(
        &mut self,
        key: &Key,
        known: Option<u32>,
        position: u64,
        encoded: Bytes,
        digest: Option<u64>,
    ) -> u32 {
        let key = match known.and_then(|number| self.slots.get(number)) {
            Some(slot) => slot.key.clone(),
            None => Key {
                namespace: key.namespace.as_deref().map(|it| self.namespaces.get(it)),
                ..key.clone()
            },
        };
        let new = Slot {
            key,
            position,
            encoded,
            sequence: self.head,
            digest: digest.unwrap_or_default(),
            live: digest.is_some(),
        };
        let number = match known {
            Some(number) => {
                if let Some(slot) = self.slots.get_mut(number) {
                    self.changes.remove(&slot.sequence);
                    self.gone.remove(&slot.sequence);
                    *slot = new;
                }
                number
            }
            None => self.slots.insert(new),
        };
        self.changes.insert(self.head, number);
        if digest.is_none() {
            self.gone.insert(self.head, number);
        }
        number
    }

    fn forget_oldest_deletion(&mut self) {
        let Some((sequence, number)) = self.gone.pop_first() else {
            return;
        };
        self.changes.remove(&sequence);
        self.scopes.forget(number);
        self.slots.remove(number);
        self.horizon = sequence;
    }

    /// What follows `cursor` for a client that holds exactly what was there at the cursor: a shared delta while it is kept,
    /// otherwise [`Self::newest_since`].
    pub fn next(&mut self, kinds: KindSet, cursor: u64) -> Next {
        let index = self.backlog.partition_point(|batch| batch.first <= cursor);
        match self.backlog.get_mut(index) {
            Some(batch) if batch.first == cursor + 1 => Next::Frame {
                cursor: batch.last,
                frame: batch.frame(kinds),
            },
            _ => self.newest_since(kinds, cursor),
        }
    }

    /// The newest version of what changed since `cursor`, oldest change first, up to about [`CHUNK`] bytes. Also right
    /// for a client that holds newer versions of some objects (after a snapshot): a shared delta could take it back in time.
    pub fn newest_since(&self, kinds: KindSet, cursor: u64) -> Next {
        if cursor >= self.head {
            return Next::UpToDate;
        }
        if cursor < self.horizon {
            return Next::Forgotten;
        }
        let mut chunk = Vec::new();
        let mut size = 0;
        let mut reached = self.head;
        for (sequence, number) in self.changes.range(cursor + 1..) {
            let Some(slot) = self.slots.get(*number) else {
                continue;
            };
            if kinds.contains(slot.key.kind) {
                size += slot.encoded.len();
                chunk.push(&slot.encoded);
                if size >= CHUNK {
                    reached = *sequence;
                    break;
                }
            }
        }
        let frame = (!chunk.is_empty()).then(|| wire::frame_updates(chunk.iter().copied()));
        Next::Frame {
            frame,
            cursor: reached,
        }
    }

    /// How many pages a snapshot that starts now should have.
    pub fn page_count(&self) -> usize {
        (self.object_bytes / (CHUNK / 2))
            .next_power_of_two()
            .clamp(1, LEAVES)
    }

    /// Page number `page` of `pages`: the objects that are in it now. None when there are none.
    pub fn page(&mut self, kinds: KindSet, page: usize, pages: usize) -> Option<Bytes> {
        if pages != self.page_count {
            self.pages = PerSubscription::default();
            self.page_count = pages;
        }
        let per = LEAVES / pages;
        let changed = self.leaf_changed[page * per..(page + 1) * per]
            .iter()
            .max()
            .copied()
            .unwrap_or(0);
        if let Some(built) = self.pages.of(kinds).get(&page)
            && built.built >= changed
        {
            self.counts.pages_shared += 1;
            return built.frame.clone();
        }
        self.counts.pages_built += 1;
        let mut chunk = Vec::new();
        self.collect(kinds, page, pages, &mut chunk);
        let frame = (!chunk.is_empty()).then(|| wire::frame_updates(chunk.iter()));
        self.pages.of(kinds).insert(
            page,
            Page {
                built: self.head,
                frame: frame.clone(),
            },
        );
        frame
    }

    /// The objects of the given buckets (of [`LEAVES`]), starting at `from`, up to about [`CHUNK`] bytes; and
    /// how many buckets that were.
    pub fn leaves(&self, kinds: KindSet, buckets: &[u32]) -> (Option<Bytes>, usize) {
        let mut chunk = Vec::new();
        let mut taken = 0;
        for leaf in buckets {
            self.collect(kinds, *leaf as usize, LEAVES, &mut chunk);
            taken += 1;
            if chunk.iter().map(Bytes::len).sum::<usize>() >= CHUNK {
                break;
            }
        }
        (
            (!chunk.is_empty()).then(|| wire::frame_updates(chunk.iter())),
            taken,
        )
    }

    fn collect(&self, kinds: KindSet, bucket: usize, buckets: usize, into: &mut Vec<Bytes>) {
        let all = self.slots.live_in(digest::range(bucket, buckets));
        into.extend(
            all.filter(|slot| kinds.contains(slot.key.kind))
                .map(|slot| slot.encoded.clone()),
        );
    }

    /// The buckets in which a client that reported these digests differs; it has a part of the endpoints where it has an
    /// interest beside the kinds.
    pub fn stale_buckets(
        &self,
        kinds: KindSet,
        interest: Option<&Interest>,
        digests: &[u64],
    ) -> Vec<u32> {
        let mut own = vec![0; digests.len()];
        for (kind, leaves) in &self.leaves {
            if kinds.contains(*kind) {
                leaves.fold_into(&mut own);
            }
        }
        if let Some(interest) = interest {
            self.scope_digests(interest, &mut own);
        }
        (0u32..)
            .zip(own.iter().zip(digests))
            .filter(|(_, (own, theirs))| own != theirs)
            .map(|(bucket, _)| bucket)
            .collect()
    }
}

impl Batch {
    fn after(head: u64) -> Self {
        Self {
            first: head + 1,
            last: 0,
            objects: Vec::new(),
            bytes: 0,
            frames: PerSubscription::default(),
        }
    }

    fn frame(&mut self, kinds: KindSet) -> Option<Bytes> {
        let objects = &self.objects;
        self.frames
            .of(kinds)
            .get_or_insert_with(|| {
                let wanted = objects
                    .iter()
                    .filter(|(kind, _)| kinds.contains(*kind))
                    .map(|(_, encoded)| encoded);
                wanted.clone().next()?;
                Some(wire::frame_updates(wanted))
            })
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscriptions_that_are_made_up_do_not_add_up_and_the_used_ones_stay() {
        let set = |number: u64| KindSet(number);
        let mut made = PerSubscription::<Option<u64>>::default();
        for number in 0..1000 {
            *made.of(set(number)) = Some(number);
            // One that is asked for all the while.
            assert_eq!(*made.of(set(0)), Some(0));
            assert!(made.0.len() <= PerSubscription::<Option<u64>>::MAX);
        }
        assert_eq!((*made.of(set(999)), *made.of(set(500))), (Some(999), None));
    }
}
