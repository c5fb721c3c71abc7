//! The two-phase claim of a block, as a decision on what is stored. Pure.
//!
//! ```text
//! affinity: none -> pending -> confirmed -> pendingDeletion -> none
//! block:    none ------> with our affinity ------> deleted, or without affinity if addresses are held
//! ```
//!
//! The block's own `affinity` field is the truth; the affinity object announces and publishes it. Every step is a
//! compare-and-swap, so that a claim can be taken up after a crash at any point, by anybody.

use cali_api::v3::BlockAffinityState;

/// The block, as the claiming node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// There is no block.
    Absent,
    /// It names us as its owner.
    Ours,
    /// It names another owner, or none.
    Foreign,
}

/// The next thing to do in a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Create the affinity object as pending.
    Announce,
    /// Write the affinity as pending again, so that a racing release of an old claim fails.
    Renew,
    /// Create the block with our affinity.
    CreateBlock,
    /// Rewrite the block, so that a racing deletion fails, then confirm the affinity.
    Confirm,
    /// The block is ours.
    Done,
    /// Delete our affinity: the block is somebody else's.
    Withdraw,
}

/// Decides the next step. `renewed` says that this attempt has written the affinity itself.
pub fn next(affinity: Option<BlockAffinityState>, renewed: bool, block: Seen) -> Step {
    match (affinity, block) {
        (None, Seen::Foreign) => Step::Done,
        (None, _) => Step::Announce,
        (Some(_), Seen::Foreign) => Step::Withdraw,
        (Some(BlockAffinityState::Confirmed), Seen::Ours) => Step::Done,
        (Some(BlockAffinityState::Pending), Seen::Absent) if renewed => Step::CreateBlock,
        (Some(BlockAffinityState::Pending), Seen::Ours) if renewed => Step::Confirm,
        (Some(_), _) => Step::Renew,
    }
}

#[cfg(test)]
mod tests {
    use BlockAffinityState::{Confirmed, Pending, PendingDeletion};

    use super::*;

    #[test]
    fn a_fresh_claim_announces_creates_and_confirms() {
        assert_eq!(next(None, false, Seen::Absent), Step::Announce);
        assert_eq!(next(Some(Pending), true, Seen::Absent), Step::CreateBlock);
        assert_eq!(next(Some(Pending), true, Seen::Ours), Step::Confirm);
        assert_eq!(next(Some(Confirmed), true, Seen::Ours), Step::Done);
    }

    #[test]
    fn an_old_claim_is_renewed_before_it_is_used() {
        for state in [Pending, PendingDeletion] {
            for block in [Seen::Absent, Seen::Ours] {
                assert_eq!(
                    next(Some(state), false, block),
                    Step::Renew,
                    "{state:?} {block:?}"
                );
            }
        }
        assert_eq!(next(Some(Confirmed), false, Seen::Absent), Step::Renew);
    }

    #[test]
    fn a_block_of_another_is_left_to_it() {
        for state in [Pending, Confirmed, PendingDeletion] {
            assert_eq!(next(Some(state), false, Seen::Foreign), Step::Withdraw);
        }
        assert_eq!(next(None, false, Seen::Foreign), Step::Done);
    }
}
