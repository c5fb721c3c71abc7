//! Digests by which two sides find out what differs without naming a generation.
//!
//! The key space is ordered by a hash of the key; a *bucket* is a range of it, given by the top bits of the
//! hash, so that `n` buckets (a power of two) are unions of neighbouring finer ones. The digest of a bucket is the XOR
//! of one hash of (key, revision) for each object in it: it does not depend on order, is changed in O(1), and digests of
//! neighbouring buckets combine by XOR. Two sides whose digests of a bucket agree hold the same objects at the
//! same revisions there (up to 2⁻⁶⁴).
//!
//! The hash is the first eight bytes of SHA-256, because it must be the same in every build and on every machine.

use cali_api::update::Update;
use cali_api::{Key, Revision};
use sha2::{Digest, Sha256};

/// Changes when the hash, or what an object of an unchanged revision looks like on the wire, changes.
pub const VERSION: u32 = 1;
/// Number of the finest buckets.
pub const LEAVES: usize = 2048;

/// Position of a key in the key space.
pub fn position(key: &Key) -> u64 {
    hash(&[
        &key.kind.to_string(),
        key.namespace.as_deref().unwrap_or_default(),
        &key.name,
    ])
}

/// Hash of an object's key and revision.
pub fn object(key: &Key, revision: &Revision) -> u64 {
    hash(&[
        &key.kind.to_string(),
        key.namespace.as_deref().unwrap_or_default(),
        &key.name,
        revision.as_str(),
    ])
}

/// [`object`] of the object that an update carries.
pub fn of_update(update: &Update) -> u64 {
    object(&update.key, &update.revision)
}

fn hash(parts: &[&str]) -> u64 {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part.as_bytes());
        // No part can contain NUL, so ("a","bc") and ("ab","c") differ.
        hasher.update([0]);
    }
    let digest = hasher.finalize();
    let mut head = [0; 8];
    head.copy_from_slice(&digest[..8]);
    u64::from_be_bytes(head)
}

/// The bucket of a position when there are `buckets` of them.
pub fn bucket(position: u64, buckets: usize) -> usize {
    debug_assert!(buckets.is_power_of_two());
    if buckets == 1 {
        return 0;
    }
    // Fits: the result is below `buckets`.
    (position >> (64 - buckets.trailing_zeros())) as usize
}

/// First and last position of a bucket.
pub fn range(bucket: usize, buckets: usize) -> std::ops::RangeInclusive<u64> {
    debug_assert!(buckets.is_power_of_two() && bucket < buckets);
    if buckets == 1 {
        return 0..=u64::MAX;
    }
    let shift = 64 - buckets.trailing_zeros();
    let first = (bucket as u64) << shift;
    first..=first | ((1 << shift) - 1)
}

/// How many buckets a holder of `objects` objects should report: about 64 objects in each.
pub fn buckets_for(objects: usize) -> usize {
    (objects / 64).next_power_of_two().clamp(16, LEAVES)
}

/// True for a bucket count that a server can answer.
pub fn valid_bucket_count(buckets: usize) -> bool {
    buckets.is_power_of_two() && buckets <= LEAVES
}

/// The digests of the finest buckets.
#[derive(Debug, Clone)]
pub struct Leaves(Box<[u64]>);

impl Default for Leaves {
    fn default() -> Self {
        Self(vec![0; LEAVES].into_boxed_slice())
    }
}

impl Leaves {
    /// Adds or removes (the same operation) an object.
    pub fn toggle(&mut self, position: u64, digest: u64) {
        self.0[bucket(position, LEAVES)] ^= digest;
    }

    /// XORs these leaves, folded, into `into` (whose length is the number of buckets).
    pub fn fold_into(&self, into: &mut [u64]) {
        let per = LEAVES / into.len();
        for (leaf, digest) in self.0.iter().enumerate() {
            into[leaf / per] ^= digest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cut_the_key_space_without_gap_or_overlap() {
        for buckets in [1, 2, 16, LEAVES] {
            let mut next = Some(0);
            for b in 0..buckets {
                let r = range(b, buckets);
                assert_eq!(Some(*r.start()), next, "bucket {b} of {buckets}");
                assert_eq!(bucket(*r.start(), buckets), b);
                assert_eq!(bucket(*r.end(), buckets), b);
                next = r.end().checked_add(1);
            }
            assert_eq!(next, None, "{buckets} buckets end at the last position");
        }
    }

    #[test]
    fn folded_leaves_equal_digests_computed_coarse() {
        let positions: Vec<u64> = (0..500u64)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        let mut leaves = Leaves::default();
        let mut coarse = vec![0; 32];
        for p in &positions {
            leaves.toggle(*p, !p);
            coarse[bucket(*p, 32)] ^= !p;
        }
        let mut folded = vec![0; 32];
        leaves.fold_into(&mut folded);
        assert_eq!(folded, coarse);
    }
}
