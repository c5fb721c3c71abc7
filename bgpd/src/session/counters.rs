//! How many messages of each type went both ways, over all sessions of a neighbour. Written by the neighbour's
//! task, read by the speaker at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use cali_control::status::MessageCounts;

use crate::wire::Message;

/// One direction.
#[derive(Debug, Default)]
struct Direction {
    open: AtomicU64,
    update: AtomicU64,
    notification: AtomicU64,
    keepalive: AtomicU64,
    refresh: AtomicU64,
}

impl Direction {
    fn count(&self, message: &Message) {
        let counter = match message {
            Message::Open(_) => &self.open,
            Message::Update(_) => &self.update,
            Message::Notification(_) => &self.notification,
            Message::Keepalive => &self.keepalive,
            Message::RouteRefresh(_) => &self.refresh,
        };
        // Nothing is derived from the order of counts.
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> MessageCounts {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MessageCounts {
            open: value(&self.open),
            update: value(&self.update),
            notification: value(&self.notification),
            keepalive: value(&self.keepalive),
            refresh: value(&self.refresh),
        }
    }
}

/// Both directions. UPDATEs that are sent are counted by the speaker, which makes them.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    received: Direction,
    sent: Direction,
}

impl Counters {
    pub(super) fn on_received(&self, message: &Message) {
        self.received.count(message);
    }

    pub(super) fn on_sent(&self, message: &Message) {
        self.sent.count(message);
    }

    /// Received and sent.
    pub(crate) fn read(&self) -> (MessageCounts, MessageCounts) {
        (self.received.read(), self.sent.read())
    }
}
