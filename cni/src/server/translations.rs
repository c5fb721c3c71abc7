//! The translations of this node's containers ([`crate::nat`]): kept on the disk, written into the kernel, and put right
//! when somebody takes them away.
//!
//! A translation is on the disk before it is in the kernel, and gone from the kernel before it is gone from the disk: what
//! a killed daemon leaves is completed or removed by its successor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cali_control::cni::Failure;
use cali_netlink::conntrack::{Conntrack, Flow};
use cali_netlink::events::{Event, EventStream};
use cali_netlink::nft::{Key, Nft, NftEvent};
use cali_netlink::{NetNs, Netlink};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::durable;
use crate::nat::{self, Translation, Transport};
use crate::spec::{code, failure_of};

const VERSION: u32 = 1;
/// Between the loss of the table and putting it back: whoever flushes everything writes more in the same moment.
const SETTLE: Duration = Duration::from_millis(100);
/// Events that are looked at together.
const BURST: usize = 10_000;
/// Between two attempts at something that fails.
const RETRY: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    version: u32,
    handle: String,
    container_id: String,
    ifname: String,
    translation: Translation,
}

impl Record {
    fn file(&self) -> String {
        format!("{}_{}.json", self.container_id, self.ifname)
    }
}

/// See the module's text.
pub(super) struct Translations {
    folder: PathBuf,
    records: Mutex<BTreeMap<String, Record>>,
    nft: Nft,
    conntrack: Conntrack,
    netns: NetNs,
    /// The first translation has come: from then on the table is watched.
    needed: Notify,
}

impl Translations {
    /// Reads what an earlier run has left. Nothing is written before [`Self::keep`] or the first change.
    pub(super) fn open(state_dir: &Path, host: &Netlink) -> cali_netlink::Result<Self> {
        let folder = state_dir.join("cni-translations");
        let records = read(&folder);
        Ok(Self {
            folder,
            records: Mutex::new(records),
            nft: Nft::open(host.netns())?,
            conntrack: Conntrack::open(host.netns())?,
            netns: host.netns().clone(),
            needed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handles of all containers that have translations.
    pub(super) fn handles(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Sets a container's translations; none removes what it had. They are in the kernel when this returns.
    pub(super) fn put(
        &self,
        handle: &str,
        container_id: &str,
        ifname: &str,
        mut translation: Translation,
    ) -> Result<(), Failure> {
        let mut records = self.lock();
        let next = records.values().map(|r| r.translation.sequence).max();
        translation.sequence = match records.get(handle) {
            // A repeated ADD does not overtake anybody.
            Some(record) => record.translation.sequence,
            None => next.map_or(1, |last| last.saturating_add(1)),
        };
        if translation.is_empty() {
            return drop_record(&self.folder, &mut records, handle)
                .and_then(|had| if had { self.write(&records) } else { Ok(()) });
        }
        let record = Record {
            version: VERSION,
            handle: handle.to_owned(),
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
            translation,
        };
        let text = serde_json::to_vec(&record).map_err(|e| {
            failure_of(code::IO, "cannot write down the container's host ports", &e)
        })?;
        durable::replace(&self.folder, &record.file(), &text).map_err(|e| {
            let msg = format!("cannot write {}", self.folder.join(record.file()).display());
            failure_of(code::IO, msg, &e)
        })?;
        records.insert(handle.to_owned(), record.clone());
        self.write(&records)?;
        drop(records);
        self.needed.notify_one();
        self.forget_former_flows(&record.translation);
        Ok(())
    }

    /// Ends a container's translations. New flows are no longer led to it when this returns; who ends its flows is
    /// whoever takes its address away.
    pub(super) fn take(&self, handle: &str) -> Result<(), Failure> {
        let mut records = self.lock();
        let Some(record) = records.remove(handle) else {
            return Ok(());
        };
        if let Err(failure) = self.write(&records) {
            records.insert(handle.to_owned(), record);
            return Err(failure);
        }
        remove_file(&self.folder.join(record.file()))
    }

    fn write(&self, records: &BTreeMap<String, Record>) -> Result<(), Failure> {
        let translations = records.values().map(|r| &r.translation);
        self.nft
            .commit(nat::transaction(translations))
            .map(|_| ())
            .map_err(|e| {
                failure_of(
                    code::KERNEL,
                    "cannot program host ports (the kernel needs nf_tables with nat, masquerade and fib)",
                    &e,
                )
            })
    }

    /// A flow that began before the mapping stays untranslated as long as its entry lives, and a client that sends UDP
    /// keeps it alive.
    fn forget_former_flows(&self, translation: &Translation) {
        let former = |flow: &Flow| {
            let to = &flow.original;
            let port = translation.ports.iter().any(|mapping| {
                mapping.transport != Transport::Tcp
                    && mapping.transport.number() == to.protocol
                    && mapping.host_port == to.destination_port
                    && mapping
                        .host_ip
                        .is_none_or(|ip| ip.is_unspecified() || ip == to.destination)
            });
            let floating = || {
                translation
                    .floating
                    .iter()
                    .any(|(ip, _)| *ip == to.destination)
            };
            !translation.addresses.contains(&flow.reply.source)
                && !translation.addresses.contains(&to.destination)
                && (port || floating())
        };
        let only_tcp = translation
            .ports
            .iter()
            .all(|mapping| mapping.transport == Transport::Tcp);
        if only_tcp && translation.floating.is_empty() {
            return;
        }
        if let Err(error) = self.conntrack.delete_matching(former) {
            tracing::warn!(%error, "flows that began before a host port was mapped may stay untranslated");
        }
    }

    /// What of a container's translations is missing in the kernel.
    pub(super) fn defects(&self, handle: &str) -> cali_netlink::Result<Vec<String>> {
        let records = self.lock();
        if !records.contains_key(handle) {
            return Ok(Vec::new());
        }
        let missing = self.missing(&records)?;
        Ok(missing
            .into_iter()
            .map(|set| format!("elements of {} {set} are missing or changed", nat::table()))
            .collect())
    }

    /// The sets that are not in the kernel as they should be.
    fn missing(&self, records: &BTreeMap<String, Record>) -> cali_netlink::Result<Vec<String>> {
        let sets = self.nft.sets(&nat::table())?;
        let mut missing = Vec::new();
        for ((kind, v4), wanted) in nat::elements(records.values().map(|r| &r.translation)) {
            let set = nat::set(kind, v4);
            let stands = if sets.iter().any(|listed| listed.set.name == set.name) {
                let found = self.nft.elements(&nat::table(), &set)?;
                let found: BTreeMap<&Key, Option<&Key>> = found
                    .iter()
                    .map(|elem| {
                        let value = match &elem.data {
                            Some(cali_netlink::nft::Data::Value(value)) => Some(value),
                            _ => None,
                        };
                        (&elem.key, value)
                    })
                    .collect();
                wanted
                    .iter()
                    .all(|(key, value)| found.get(key) == Some(&value.as_ref()))
            } else {
                false
            };
            if !stands {
                missing.push(set.name.to_string());
            }
        }
        Ok(missing)
    }

    /// Writes what an earlier run has left, then puts the table back whenever somebody else changes it. Never ends.
    pub(super) async fn keep(self: Arc<Self>) {
        loop {
            if self.lock().is_empty() {
                // What an earlier run did not remove; without a table this changes nothing.
                self.put_back("left by an earlier run", true);
                self.needed.notified().await;
            }
            let error = match Nft::events(&self.netns) {
                Ok(events) => {
                    self.put_back("start", false);
                    self.watch(events).await
                }
                Err(error) => error,
            };
            tracing::warn!(%error, "host ports are not watched for a moment");
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn watch(&self, mut events: EventStream) -> cali_netlink::Error {
        loop {
            let burst = match events.next_burst(SETTLE, BURST).await {
                Ok(burst) => burst,
                Err(error) => return error,
            };
            let foreign = burst.iter().any(|event| match event {
                Event::Nft(NftEvent::Change { table, port, .. }) => {
                    *table == nat::table() && *port != self.nft.port()
                }
                Event::Overflow => true,
                _ => false,
            });
            if foreign {
                self.put_back("changed by somebody else", false);
            }
        }
    }

    fn put_back(&self, why: &str, only_removal: bool) {
        let records = self.lock();
        if only_removal {
            match self.nft.tables() {
                Ok(tables) if tables.iter().all(|t| t.name != nat::table()) => return,
                _ => {}
            }
        }
        tracing::info!(why, containers = records.len(), "host ports are written");
        if let Err(failure) = self.write(&records) {
            tracing::error!(
                error = failure.msg,
                details = failure.details,
                "host ports are not as they should be"
            );
        }
    }
}

fn remove_file(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failure_of(
            code::IO,
            format!("cannot remove {}", path.display()),
            &e,
        )),
        _ => Ok(()),
    }
}

fn drop_record(
    folder: &Path,
    records: &mut BTreeMap<String, Record>,
    handle: &str,
) -> Result<bool, Failure> {
    match records.remove(handle) {
        Some(record) => remove_file(&folder.join(record.file())).map(|()| true),
        None => Ok(false),
    }
}

fn read(folder: &Path) -> BTreeMap<String, Record> {
    let files = durable::files(folder).unwrap_or_else(|error| {
        tracing::error!(%error, folder = %folder.display(), "host ports of an earlier run cannot be read");
        Vec::new()
    });
    let mut records = BTreeMap::new();
    for path in files {
        let record = std::fs::read(&path)
            .ok()
            .and_then(|text| serde_json::from_slice::<Record>(&text).ok())
            .filter(|record| record.version == VERSION);
        match record {
            Some(record) => {
                records.insert(record.handle.clone(), record);
            }
            None => {
                tracing::error!(file = %path.display(), "host ports of a container cannot be read; its next ADD writes them anew");
            }
        }
    }
    records
}
