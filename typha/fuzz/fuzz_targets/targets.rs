//! What is done with the octets. `tests/fuzz_seeds.rs` runs the same functions over the seeds.
//!
//! A seed is what one side said on one connection, as it was received (`seeds/client-NAME`, `seeds/server-NAME`).

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

use cali_api::update::{SyncEvent, Update};
use cali_api::{Key, Revision};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::timeout;
use typha::cache::{Cache, Limits};
use typha::client::{self, ClientError, Held, Identity, Output};
use typha::server::{self, Patience};
use typha::wire::MAX_OBJECTS;

use running::{PATIENCE, Running, View, connect_to, metric, serve};

#[path = "../../tests/running/mod.rs"]
pub(crate) mod running;

/// A server, and a client of it that behaves.
struct Company {
    runtime: Runtime,
    server: Running,
    events: mpsc::Receiver<SyncEvent>,
    view: View,
    content: BTreeMap<u32, u32>,
}

impl Company {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let content: BTreeMap<u32, u32> = (0..100).map(|number| (number, 0)).collect();
        let mut view = View::default();
        let (server, events) = runtime.block_on(async {
            let server = serve(0, &content).await;
            let mut events = connect_to(&[server.port]);
            view.until(&mut events, &content).await;
            (server, events)
        });
        Self {
            runtime,
            server,
            events,
            view,
            content,
        }
    }

    /// Lets somebody else send these octets, and nothing more.
    fn meets(&mut self, octets: &[u8]) {
        let violations = || metric(&self.server.registry, "typha_protocol_violations_total");
        let before = violations();
        self.runtime.block_on(async {
            let stream = TcpStream::connect(("127.0.0.1", self.server.port)).await;
            let mut stream = stream.expect("it listens");
            let (mut read, mut write) = stream.split();
            let speak = async {
                // It may have closed before the end.
                let _ = write.write_all(octets).await;
                let _ = write.shutdown().await;
            };
            let listen = async {
                let mut heard = [0; 4096];
                while read.read(&mut heard).await.is_ok_and(|length| length > 0) {}
            };
            let both = async { tokio::join!(speak, listen) };
            timeout(PATIENCE, both)
                .await
                .expect("the connection is closed");
            let gone = async {
                while metric(&self.server.registry, "typha_connections_active") > 1.0 {
                    tokio::task::yield_now().await;
                }
            };
            timeout(PATIENCE, gone)
                .await
                .expect("nothing of the connection stays");
            // The other one follows the changes all the while.
            let version = self.content[&7] + 1;
            self.server.put(7, version).await;
            self.content.insert(7, version);
            self.view.until(&mut self.events, &self.content).await;
        });
        assert!(!self.server.task.is_finished(), "the server is gone");
        assert_eq!(
            self.view.in_sync_events, 1,
            "the other client was disconnected"
        );
        let expected = is_violation(octets);
        assert_eq!(
            violations() - before,
            f64::from(u8::from(expected)),
            "violations counted"
        );
    }
}

/// Whether a stream that ends here is one.
fn is_violation(octets: &[u8]) -> bool {
    let now = Instant::now();
    let mut conn = server::Conn::new(now, Patience::default());
    conn.on_bytes(now, octets);
    conn.on_end();
    conn.closing()
        .is_some_and(server::CloseReason::is_violation)
}

/// Sends a stream to a real server, which must be there afterwards and have its other client still.
pub(crate) fn to_server(octets: &[u8]) {
    static COMPANY: Mutex<Option<Company>> = Mutex::new(None);
    let mut kept = COMPANY.lock().unwrap_or_else(PoisonError::into_inner);
    // It is put back if nothing was wrong with it.
    let mut company = kept.take().unwrap_or_else(Company::new);
    company.meets(octets);
    *kept = Some(company);
}

/// The client that the seeds were said to.
fn identity() -> Identity {
    Identity {
        hostname: "node1".into(),
        info: "test".into(),
        kinds: typha::source::all_kinds(),
        node: None,
    }
}

/// A consumer of a client, and the client's side of one connection after the other.
#[derive(Default)]
struct Told {
    held: Held,
    known: BTreeMap<Key, Revision>,
    /// Objects in their last version, for a server to serve.
    newest: BTreeMap<Key, Update>,
}

impl Told {
    fn on_updates(&mut self, updates: Vec<Update>) {
        assert!(updates.len() <= MAX_OBJECTS);
        for update in updates {
            let Some(object) = &update.value else {
                self.newest.remove(&update.key);
                let was = self.known.remove(&update.key);
                assert!(was.is_some(), "{} deleted though never told", update.key);
                continue;
            };
            assert_eq!(object.key().kind, update.key.kind);
            self.known
                .insert(update.key.clone(), update.revision.clone());
            self.newest.insert(update.key.clone(), update);
        }
    }

    /// Takes all that a connection has to say. What is held must be what was told whenever something is to be written: that may fail.
    fn drain(
        &mut self,
        conn: &mut client::Conn,
        mut sent: impl FnMut(&[u8]),
    ) -> Result<(), ClientError> {
        while let Some(output) = conn.poll_output(&mut self.held)? {
            match output {
                Output::Send(frame) => {
                    assert_eq!(self.held.len(), self.known.len());
                    sent(&frame);
                }
                Output::Event(SyncEvent::Updates(updates)) => {
                    self.on_updates(updates);
                }
                Output::Event(SyncEvent::Status(_) | SyncEvent::Complete(_)) => {}
                Output::Undecodable { object, reason } => {
                    assert!(object.len() + reason.len() < 2000 && !object.contains('\n'));
                }
            }
        }
        Ok(())
    }

    /// Hears a stream to its end, or until it is given up; says whether it was.
    fn hear(&mut self, octets: &[u8]) -> Result<(), ClientError> {
        let now = Instant::now();
        let mut conn = client::Conn::new(now, &identity(), &self.held);
        // As much as is read at a time.
        for piece in octets.chunks(64 * 1024) {
            conn.on_bytes(now, piece);
            self.drain(&mut conn, |_| {})?;
        }
        conn.on_end()
    }

    /// Connects to a server that serves these objects, and hears it out.
    fn meet(&mut self, cache: &mut Cache) {
        let now = Instant::now();
        let mut theirs = server::Conn::new(now, Patience::default());
        let mut ours = client::Conn::new(now, &identity(), &self.held);
        while !ours.is_complete() {
            let mut said = Vec::new();
            let end = self.drain(&mut ours, |frame| said.extend_from_slice(frame));
            assert_eq!(end, Ok(()), "a server's good word");
            theirs.on_bytes(now, &said);
            while let Some(frame) = theirs.poll_transmit(cache) {
                ours.on_bytes(now, &frame);
                assert_eq!(
                    self.drain(&mut ours, |_| {}),
                    Ok(()),
                    "a server's good word"
                );
            }
        }
    }
}

/// The server that a client comes to after the one that is tested.
struct Next {
    cache: Cache,
    expected: BTreeMap<Key, Revision>,
}

impl Next {
    /// It has what the server of the seeds had at first.
    fn new() -> Self {
        let mut told = Told::default();
        let heard = told.hear(include_bytes!("../seeds/server-snapshot"));
        assert_eq!(heard, Ok(()));
        assert!(told.known.len() > 400, "{}", told.known.len());
        let mut cache = Cache::new(Limits::default());
        let failed = cache.apply(told.newest.into_values().collect());
        assert!(failed.is_empty());
        cache.set_in_sync();
        Self {
            cache,
            expected: told.known,
        }
    }
}

/// Says a stream to a client that knows something or nothing: it tells its consumer of no deletion of what that does not have,
/// and the next server puts right what this one said.
pub(crate) fn to_client(octets: &[u8]) {
    static NEXT: LazyLock<Mutex<Next>> = LazyLock::new(|| Mutex::new(Next::new()));
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    let Next { cache, expected } = &mut *next;
    for knows in [false, true] {
        let mut told = Told::default();
        if knows {
            told.meet(cache);
        }
        if let Err(reason) = told.hear(octets) {
            assert!((1..2000).contains(&reason.to_string().len()));
        }
        assert_eq!(told.held.len(), told.known.len());
        told.meet(cache);
        assert!(told.known == *expected, "the next server puts it right");
    }
}
