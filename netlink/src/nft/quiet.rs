//! Large transactions that the process's own listeners are not told of.
//!
//! The kernel makes a message of several kilobytes for each element of a transaction as soon as anybody listens
//! (`nf_tables_setelem_notify`): 250,000 elements take 0.7 s without a listener, 4 s and more with one. Whoever makes the transaction knows
//! what is in it. So all streams of this process leave the group for as long as it takes. Whether somebody else has changed
//! anything meanwhile, the generation says, which each transaction raises by one: then the streams say that notifications
//! were lost, and their owners read again.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Notify;

use super::Nft;
use crate::error::Result;
use crate::socket::{join_group, leave_group};

/// Transactions of fewer octets are told of: to leave and to come back costs some microseconds, too.
pub(super) const QUIET_FROM: usize = 2048;

static LISTENERS: Mutex<Vec<Weak<Listener>>> = Mutex::new(Vec::new());

/// The socket of an event stream, seen from the writers.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    namespace: (u64, u64),
    group: u32,
    lost: AtomicBool,
    woken: Notify,
}

impl Listener {
    /// Makes the listener known to the writers of its namespace; they forget it with its last reference.
    pub(super) fn register(socket: OwnedFd, namespace: (u64, u64), group: u32) -> Arc<Self> {
        let listener = Arc::new(Self {
            socket,
            namespace,
            group,
            lost: AtomicBool::new(false),
            woken: Notify::new(),
        });
        let mut known = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|other| other.strong_count() > 0);
        known.push(Arc::downgrade(&listener));
        listener
    }

    /// Whether notifications were lost since the last call.
    pub(crate) fn take_lost(&self) -> bool {
        self.lost.swap(false, Ordering::AcqRel)
    }

    /// Waits until notifications were lost.
    pub(crate) async fn loses(&self) {
        self.woken.notified().await;
    }

    fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        self.woken.notify_one();
    }
}

/// While it lives, no listener of this process in the namespace is told of anything.
pub(super) struct Quiet {
    away: Vec<Arc<Listener>>,
}

impl Quiet {
    /// All listeners of a namespace leave.
    pub(super) fn begin(namespace: (u64, u64)) -> Self {
        let known = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
        let here = known.iter().filter_map(Weak::upgrade);
        let mut here: Vec<_> = here.filter(|one| one.namespace == namespace).collect();
        here.retain(|listener| leave_group(listener.socket.as_fd(), listener.group).is_ok());
        Self { away: here }
    }

    /// They come back. What they missed is lost to them unless the generation is the expected one.
    pub(super) fn end(self, nft: &Nft, expected: Result<u32>) {
        let away = self.away.clone();
        drop(self);
        if away.is_empty() {
            return;
        }
        let is_as_expected = expected.is_ok_and(|wanted| nft.generation() == Ok(wanted));
        if !is_as_expected {
            away.iter().for_each(|listener| listener.lose());
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        for listener in &self.away {
            if join_group(listener.socket.as_fd(), listener.group).is_err() {
                // Deaf until the next large transaction: what is known now may be old.
                listener.lose();
            }
        }
    }
}
