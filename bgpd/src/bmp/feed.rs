//! The queue to a station, bounded by octets: messages are of very different length.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};

/// Octets that may wait for a station.
pub const LIMIT: u32 = 64 * 1024 * 1024;
/// Octets that messages from the table leave to those that cannot wait.
const RESERVE: u32 = LIMIT - 4 * 1024 * 1024;

/// The speaker's end.
#[derive(Debug, Clone)]
pub struct Feed {
    messages: mpsc::UnboundedSender<Bytes>,
    room: Arc<Semaphore>,
}

/// The station's end. When it is dropped, the speaker forgets the station.
#[derive(Debug)]
pub struct Queue {
    messages: mpsc::UnboundedReceiver<Bytes>,
    room: Arc<Semaphore>,
}

/// Why a message is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// More than [`LIMIT`] octets would wait.
    Full,
    /// The connection has ended.
    Gone,
}

fn octets(message: &Bytes) -> u32 {
    u32::try_from(message.len()).unwrap_or(u32::MAX)
}

impl Feed {
    /// A queue with both ends.
    #[must_use]
    pub fn new() -> (Self, Queue) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(LIMIT as usize));
        let feed = Self {
            messages: sender,
            room: Arc::clone(&room),
        };
        let queue = Queue {
            messages: receiver,
            room,
        };
        (feed, queue)
    }

    /// Takes a message, or says why not. Never waits.
    pub fn send(&self, message: Bytes) -> Result<(), Refused> {
        match self.room.try_acquire_many(octets(&message)) {
            Ok(taken) => taken.forget(),
            Err(_) if self.messages.is_closed() => return Err(Refused::Gone),
            Err(_) => return Err(Refused::Full),
        }
        self.messages.send(message).map_err(|_| Refused::Gone)
    }

    /// Whether messages from the table may be sent now. A closed queue has room, so that its end is noticed.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.messages.is_closed() || self.room.available_permits() >= RESERVE as usize
    }

    /// Resolves when [`Feed::has_room`] holds.
    pub async fn wait_for_room(&self) {
        // What is acquired is given back at once: only the room counts. The error is the end of the queue.
        let _ = self.room.acquire_many(RESERVE).await;
    }
}

impl Queue {
    /// The next message; `None` once the speaker has left the station or has ended.
    pub async fn next(&mut self) -> Option<Bytes> {
        let message = self.messages.recv().await?;
        self.room.add_permits(octets(&message) as usize);
        Some(message)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.messages.close();
        self.room.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_station_that_takes_nothing_is_not_waited_for() {
        let (feed, mut queue) = Feed::new();
        let piece = Bytes::from(vec![0; 1024 * 1024]);
        let mut sent = 0;
        let refused = loop {
            assert!(sent <= LIMIT as usize, "no bound");
            match feed.send(piece.clone()) {
                Ok(()) => sent += piece.len(),
                Err(refused) => break refused,
            }
        };
        assert_eq!((refused, sent), (Refused::Full, LIMIT as usize));
        assert!(!feed.has_room());
        while !feed.has_room() {
            assert!(queue.next().await.is_some());
        }
        assert_eq!(feed.send(piece.clone()), Ok(()));
        drop(queue);
        assert_eq!(feed.send(piece), Err(Refused::Gone));
        assert!(feed.has_room());
        feed.wait_for_room().await;
    }
}
