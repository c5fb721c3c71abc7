//! Best paths to `cali-node` over the routes socket ([`cali_control::routes`]).
//!
//! The task keeps the whole table, so that after a reconnection everything is sent again and closed with
//! end-of-sync; `cali-node` keeps the kernel as it is meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cali_api::Cidr;
use cali_control::routes::{
    BestPath, Family as ControlFamily, NextHop, PROTOCOL, ToBgpd, ToNode, VERSION,
};
use cali_control::{Error, FrameReader, FrameWriter};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use super::{Path, Sink};
use crate::wire::{Family, Prefix};

/// Prefixes in one frame.
const BATCH: usize = 4096;
/// Wait before the next try to reach `cali-node`.
const RETRY: Duration = Duration::from_millis(500);
/// How long an unanswered update may take; `cali-node` answers once the kernel has it.
const PROGRAM: &str = concat!("bgpd ", env!("CARGO_PKG_VERSION"));

#[derive(Default)]
struct Table {
    paths: BTreeMap<Prefix, Path>,
    changed: BTreeSet<Prefix>,
    synced: BTreeSet<Family>,
    newly_synced: BTreeSet<Family>,
}

/// The sink of a node's `bgpd`.
pub struct Node {
    table: Arc<Mutex<Table>>,
    wake: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Node {
    /// Starts the task that keeps `cali-node` informed over this socket.
    #[must_use]
    pub fn start(socket: PathBuf) -> Self {
        let table = Arc::new(Mutex::new(Table::default()));
        let wake = Arc::new(Notify::new());
        let task = tokio::spawn(keep_informed(socket, Arc::clone(&table), Arc::clone(&wake)));
        Self { table, wake, task }
    }
}

fn with<T>(table: &Mutex<Table>, act: impl FnOnce(&mut Table) -> T) -> T {
    act(&mut table.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Sink for Node {
    fn set(&mut self, prefix: Prefix, path: Option<Path>) {
        with(&self.table, |t| {
            let known = match path {
                Some(path) => {
                    t.paths.insert(prefix, path);
                    true
                }
                None => t.paths.remove(&prefix).is_some(),
            };
            // A prefix that only ever had a route of our own is none of the table's business.
            if known {
                t.changed.insert(prefix);
            }
        });
    }

    fn flush(&mut self) {
        self.wake.notify_one();
    }

    fn end_of_sync(&mut self, family: Family) {
        with(&self.table, |t| {
            if t.synced.insert(family) {
                t.newly_synced.insert(family);
            }
        });
        self.wake.notify_one();
    }
}

async fn keep_informed(socket: PathBuf, table: Arc<Mutex<Table>>, wake: Arc<Notify>) {
    let mut reported = false;
    loop {
        match UnixStream::connect(&socket).await {
            Ok(stream) => {
                reported = false;
                info!(socket = %socket.display(), "connected to the node's route table");
                if let Err(error) = serve(stream, &table, &wake).await {
                    warn!(%error, "the connection to the node's route table ended; the kernel's routes stay");
                }
            }
            Err(error) if !reported => {
                reported = true;
                warn!(socket = %socket.display(), %error, "the node's route table cannot be reached yet");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn serve(stream: UnixStream, table: &Mutex<Table>, wake: &Notify) -> Result<(), Error> {
    let (read, write) = stream.into_split();
    let mut reader = FrameReader::new(PROTOCOL, read);
    let mut writer = FrameWriter::new(PROTOCOL, write);
    writer.hello(VERSION, PROGRAM).await?;
    reader.hello().await?;
    with(table, |t| {
        t.changed = t.paths.keys().copied().collect();
        t.newly_synced = t.synced.clone();
    });
    let listen = async {
        loop {
            let ToBgpd::Applied { sequence, failed } = reader.expect().await?;
            for one in failed {
                warn!(sequence, prefix = %one.prefix, reason = %one.reason, "a route could not be programmed");
            }
        }
    };
    let speak = async {
        let mut sequence = 0;
        loop {
            while let Some(update) = next_update(table, sequence + 1) {
                if matches!(update, ToNode::Update { .. }) {
                    sequence += 1;
                }
                debug!(sequence, "to the route table");
                writer.send(&update).await?;
            }
            wake.notified().await;
        }
    };
    tokio::select! {
        end = listen => end,
        end = speak => end,
    }
}

/// The next frame to send, if anything has changed. End-of-sync comes after all changes.
fn next_update(table: &Mutex<Table>, sequence: u64) -> Option<ToNode> {
    with(table, |t| {
        if t.changed.is_empty() {
            return t.newly_synced.pop_first().map(|family| {
                ToNode::EndOfSync(match family {
                    Family::IPV4_UNICAST => ControlFamily::Ipv4,
                    _ => ControlFamily::Ipv6,
                })
            });
        }
        let (mut announced, mut withdrawn) = (Vec::new(), Vec::new());
        while announced.len() + withdrawn.len() < BATCH {
            let Some(prefix) = t.changed.pop_first() else {
                break;
            };
            let Ok(cidr) = Cidr::new(prefix.addr(), prefix.len()) else {
                continue;
            };
            match t.paths.get(&prefix).and_then(|path| best_path(cidr, path)) {
                Some(best) => announced.push(best),
                None => withdrawn.push(cidr),
            }
        }
        Some(ToNode::Update {
            sequence,
            announced,
            withdrawn,
        })
    })
}

fn best_path(prefix: Cidr, path: &Path) -> Option<BestPath> {
    let first = path.gateways.first()?;
    let hop = |gateway: &crate::rib::Gateway| NextHop {
        address: gateway.addr,
        interface: interface_name(gateway.scope),
    };
    Some(BestPath {
        prefix,
        next_hops: path.gateways.iter().map(hop).collect(),
        learned_from: path.learned_from.unwrap_or(first.addr),
        local_pref: Some(path.local_pref),
    })
}

/// The interface of a link-local gateway.
fn interface_name(scope: u32) -> Option<String> {
    if scope == 0 {
        return None;
    }
    let netlink = cali_netlink::Netlink::current().ok()?;
    netlink
        .link_by_index(scope)
        .ok()
        .flatten()
        .map(|link| link.name)
}
