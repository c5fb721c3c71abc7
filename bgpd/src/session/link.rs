//! One connection: a task that reads and decodes, and a task that writes.
//!
//! Reading never waits for writing. The writer has two queues: control messages (OPEN, KEEPALIVE,
//! NOTIFICATION), few and never delayed by routes, and routes, bounded, filled as the peer reads.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::fsm::Role;
use crate::transport::{Connection, Stream};
use crate::wire::{Codec, Framer, Message, Negotiated, Notification, Open, PeerKind, Update};

/// Control messages that may wait for the socket. A healthy session has at most a few.
const CONTROL_QUEUE: usize = 16;
/// How long the last NOTIFICATION may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// Bytes read at once.
const READ_SIZE: usize = 64 * 1024;

/// Messages written at once.
const SLICES: usize = 512;

/// What a link reports.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// OPEN, with what it and ours agree on.
    Open(Open, Box<Negotiated>),
    /// A message other than OPEN and UPDATE.
    Message(Message),
    /// UPDATEs that arrived together; at least one.
    Updates(Vec<Update>),
    /// The decoder refused the stream.
    Malformed(Notification),
    /// The stream ended or failed.
    Closed,
    /// The peer did not take anything for the send hold time.
    Stalled,
}

/// Which connection, its serial number, what happened.
pub(super) type LinkReport = (Role, u64, LinkEvent);

enum Control {
    Message(Bytes),
    /// From now on routes are written, too.
    Routes(mpsc::Receiver<Vec<Bytes>>),
}

/// A connection in use. Dropping it closes the connection, after what was sent as control message.
pub(super) struct Link {
    control: mpsc::Sender<Control>,
    reader: JoinHandle<()>,
    writer: Option<JoinHandle<()>>,
    /// Counts connections, so that a late report of a closed one is recognised.
    pub(super) serial: u64,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Link {
    /// Starts both tasks. `ours` is the OPEN that will be sent.
    pub(super) fn start(
        connection: Connection,
        role: Role,
        serial: u64,
        ours: Open,
        send_hold: Duration,
        reports: mpsc::Sender<LinkReport>,
    ) -> Self {
        let (read, write) = tokio::io::split(connection.stream);
        let (control, controls) = mpsc::channel(CONTROL_QUEUE);
        let stalled = reports.clone();
        let reader = tokio::spawn(async move {
            let report = |event| reports.send((role, serial, event));
            let last = read_messages(read, &ours, &report).await;
            // The owner may be gone already; then nobody is interested.
            let _ = report(last).await;
        });
        let writer = tokio::spawn(async move {
            if write_messages(write, controls, send_hold).await.is_err() {
                let _ = stalled.send((role, serial, LinkEvent::Stalled)).await;
            }
        });
        Self {
            control,
            reader,
            writer: Some(writer),
            serial,
        }
    }

    /// Closes the connection. The task that is returned ends once the last control message is out.
    pub(super) fn close(mut self) -> Option<JoinHandle<()>> {
        self.writer.take()
    }

    /// Sends a control message. A full queue means a peer that does not read; the send hold timer deals with it.
    pub(super) fn send(&self, message: Bytes) {
        let _ = self.control.try_send(Control::Message(message));
    }

    /// Lets routes through.
    pub(super) fn routes(&self, queue: mpsc::Receiver<Vec<Bytes>>) {
        let _ = self.control.try_send(Control::Routes(queue));
    }
}

async fn read_messages<F, R>(
    mut read: ReadHalf<Box<dyn Stream>>,
    ours: &Open,
    report: F,
) -> LinkEvent
where
    F: Fn(LinkEvent) -> R,
    R: Future<Output = Result<(), mpsc::error::SendError<LinkReport>>>,
{
    let mut framer = Framer::new();
    let mut codec = Codec::basic(PeerKind::Ibgp);
    let mut buffer = BytesMut::new();
    // Handing over costs more than decoding, so that what was read at once is handed over at once.
    let mut updates = Vec::new();
    loop {
        loop {
            let decoded = match framer.next(&mut buffer) {
                Ok(Some(frame)) => Message::decode(&frame, &codec).map(Some),
                Ok(None) => Ok(None),
                Err(fault) => Err(fault),
            };
            if let Ok(Some(Message::Update(update))) = decoded {
                updates.push(*update);
                continue;
            }
            // What came before counts, whatever follows.
            if !updates.is_empty()
                && report(LinkEvent::Updates(std::mem::take(&mut updates)))
                    .await
                    .is_err()
            {
                return LinkEvent::Closed;
            }
            let message = match decoded {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(fault) => return LinkEvent::Malformed(fault),
            };
            let event = if let Message::Open(theirs) = message {
                let negotiated = Negotiated::between(ours, &theirs);
                codec = negotiated.codec;
                framer.set_extended(codec.extended_message);
                LinkEvent::Open(theirs, Box::new(negotiated))
            } else {
                LinkEvent::Message(message)
            };
            if report(event).await.is_err() {
                return LinkEvent::Closed;
            }
        }
        buffer.reserve(READ_SIZE);
        match read.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return LinkEvent::Closed,
            Ok(_) => {}
        }
    }
}

/// The peer does not read.
struct Stalled;

async fn write_messages(
    mut write: WriteHalf<Box<dyn Stream>>,
    mut controls: mpsc::Receiver<Control>,
    send_hold: Duration,
) -> Result<(), Stalled> {
    let mut routes: Option<mpsc::Receiver<Vec<Bytes>>> = None;
    let mut open = true;
    while open {
        let mut messages = tokio::select! {
            biased;
            control = controls.recv() => match control {
                Some(Control::Message(message)) => vec![message],
                Some(Control::Routes(queue)) => {
                    routes = Some(queue);
                    continue;
                }
                None => break,
            },
            Some(messages) = next_routes(&mut routes) => messages,
        };
        // Whole messages only, so that order between both queues does not matter here.
        while let Some(Ok(more)) = routes.as_mut().map(mpsc::Receiver::try_recv) {
            messages.extend(more);
        }
        match write_all(&mut write, messages.into(), send_hold).await {
            Ok(()) => {}
            // The reader reports the end of the stream.
            Err(WriteError::Failed) => open = false,
            Err(WriteError::Stalled) => return Err(Stalled),
        }
    }
    // What the peer does with the end of our stream is its own affair.
    let _ = timeout(GOODBYE, write.shutdown()).await;
    Ok(())
}

enum WriteError {
    Failed,
    Stalled,
}

/// Writes all messages, many with one system call: a route reflector's messages are short.
async fn write_all(
    write: &mut WriteHalf<Box<dyn Stream>>,
    mut messages: VecDeque<Bytes>,
    send_hold: Duration,
) -> Result<(), WriteError> {
    while !messages.is_empty() {
        let first = messages.iter().take(SLICES);
        let slices: Vec<IoSlice<'_>> = first.map(|m| IoSlice::new(m)).collect();
        let written = timeout(send_hold, write.write_vectored(&slices)).await;
        drop(slices);
        let mut written = match written {
            Ok(Ok(0) | Err(_)) => return Err(WriteError::Failed),
            Ok(Ok(written)) => written,
            Err(_) => return Err(WriteError::Stalled),
        };
        while let Some(first) = messages.front_mut() {
            if written < first.len() {
                first.advance(written);
                break;
            }
            written -= first.len();
            messages.pop_front();
        }
    }
    Ok(())
}

/// The next messages with routes; never ready when there is no queue, or once it has ended.
async fn next_routes(routes: &mut Option<mpsc::Receiver<Vec<Bytes>>>) -> Option<Vec<Bytes>> {
    let Some(queue) = routes else {
        return std::future::pending().await;
    };
    let next = queue.recv().await;
    if next.is_none() {
        *routes = None;
    }
    next
}
