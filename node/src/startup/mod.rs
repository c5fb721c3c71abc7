//! Start-up of a node: who it is, which address it has, and the objects that must exist before anything runs.
//!
//! [`settings`], [`detect`], [`node_resource`], [`pools`] and [`defaults`] decide and are pure; this file, [`host`] and [`follow`] read
//! and write.
//! Everything here can be repeated at any time: a second start finds its own results and changes nothing.

pub mod defaults;
pub mod detect;
pub mod follow;
pub mod host;
pub mod node_resource;
pub mod pools;
pub mod settings;

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cali_api::v3::Node;
use cali_api::{AnyResource, Cidr, Key, Kind};
use cali_datastore::{Datastore, Error as DatastoreError};
use cali_netlink::Netlink;

use self::node_resource::{Host, NodeError, check_duplicates, plan_node};
use self::settings::Settings;

/// Compare-and-swap conflicts after which a write is given up.
const ATTEMPTS: usize = 20;
/// Wait between two attempts to reach the datastore.
const RETRY: Duration = Duration::from_secs(1);

/// Why the node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The kernel did not answer.
    #[error("cannot read the host's interfaces")]
    Kernel(#[source] cali_netlink::Error),
    /// The datastore.
    #[error("cannot {operation}")]
    Datastore {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: DatastoreError,
    },
    /// The node cannot be described.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A file.
    #[error("cannot {operation} {path}")]
    File {
        /// `write`, `create`.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn store(operation: &'static str) -> impl FnOnce(DatastoreError) -> StartError {
    move |source| StartError::Datastore { operation, source }
}

/// Writes the Node resource, the default pools, the default objects and the node name file. Waits for a datastore that does not
/// answer, or is busy, as long as it takes.
pub async fn prepare(
    settings: &Settings,
    datastore: &Arc<dyn Datastore>,
    netlink: &Netlink,
) -> Result<Node, StartError> {
    loop {
        wait_for(datastore.as_ref()).await;
        match register(settings, datastore, netlink).await {
            // Busy, or away again: every step can be taken once more.
            Err(StartError::Datastore { operation, source }) if source.is_transient() => {
                tracing::warn!(operation, error = %source, "the datastore failed while the node registers; once more");
                tokio::time::sleep(RETRY).await;
            }
            other => return other,
        }
    }
}

async fn register(
    settings: &Settings,
    datastore: &Arc<dyn Datastore>,
    netlink: &Netlink,
) -> Result<Node, StartError> {
    let host = read_host(settings, datastore.as_ref(), netlink).await?;
    let node = write_node(settings, datastore.as_ref(), &host).await?;
    write_pools(settings, datastore.as_ref(), &host).await?;
    write_defaults(settings, datastore.as_ref()).await?;
    write_file(&settings.node_name_file, settings.node_name.as_bytes())?;
    let show =
        |address: Option<ipnetwork::IpNetwork>| address.map(|a| a.to_string()).unwrap_or_default();
    tracing::info!(
        node = settings.node_name,
        ipv4 = show(node.spec.ipv4()),
        ipv6 = show(node.spec.ipv6()),
        "node is registered"
    );
    Ok(node)
}

/// Returns once the datastore answers. A node that starts before its datastore waits for it.
async fn wait_for(datastore: &dyn Datastore) {
    while let Err(error @ DatastoreError::Unavailable { .. }) =
        datastore.list(Kind::ClusterInformation, None).await
    {
        tracing::warn!(%error, cause = crate::cause(&error), "waiting for the datastore");
        tokio::time::sleep(RETRY).await;
    }
}

async fn read_host(
    settings: &Settings,
    datastore: &dyn Datastore,
    netlink: &Netlink,
) -> Result<Host, StartError> {
    let internal = kubernetes_internal(&settings.node_name, datastore).await;
    let (ipv4, ipv6) = (settings.ipv4.clone(), settings.ipv6.clone());
    let hints = tokio::task::spawn_blocking(move || {
        (
            host::hints(&ipv4, true, &internal),
            host::hints(&ipv6, false, &internal),
        )
    });
    // Only a panic or the runtime's end makes this fail; then there are no hints.
    let (hints_v4, hints_v6) = hints.await.unwrap_or_default();
    Ok(Host {
        interfaces: host::interfaces(netlink)?,
        hints_v4,
        hints_v6,
    })
}

/// InternalIP addresses of the Kubernetes node of our name, if there is one.
async fn kubernetes_internal(node: &str, datastore: &dyn Datastore) -> Vec<IpAddr> {
    let stored = datastore.get(&Key::cluster(Kind::K8sNode, node)).await;
    let Ok(stored) = stored else {
        return Vec::new();
    };
    let AnyResource::K8sNode(node) = &*stored.object else {
        return Vec::new();
    };
    let addresses = node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten());
    addresses
        .filter(|a| a.type_ == "InternalIP")
        .filter_map(|a| a.address.parse().ok())
        .collect()
}

async fn write_node(
    settings: &Settings,
    datastore: &dyn Datastore,
    host: &Host,
) -> Result<Node, StartError> {
    let key = Key::cluster(Kind::Node, settings.node_name.as_str());
    for attempt in 1.. {
        let others = list::<Node>(datastore, Kind::Node).await?;
        let stored = others
            .iter()
            .find(|node| node.metadata.name == settings.node_name);
        let node = plan_node(stored, settings, host)?;
        if !settings.skip_duplicate_check {
            check_duplicates(&node, &others)?;
        }
        let written = match stored {
            Some(stored) if *stored == node => return Ok(node),
            Some(_) => datastore.update(node.clone().into()).await,
            None => datastore.create(node.clone().into()).await,
        };
        match written {
            Ok(_) => return Ok(node),
            Err(
                DatastoreError::Conflict { .. }
                | DatastoreError::AlreadyExists { .. }
                | DatastoreError::NotFound { .. },
            ) if attempt < ATTEMPTS => {
                tracing::debug!(%key, attempt, "somebody else wrote the node at the same time");
            }
            Err(error) => return Err(store("write the Node resource")(error)),
        }
    }
    unreachable!("the loop ends by returning")
}

async fn list<T>(datastore: &dyn Datastore, kind: Kind) -> Result<Vec<T>, StartError>
where
    T: Clone,
    for<'a> &'a T: TryFrom<&'a AnyResource>,
{
    let listed = datastore
        .list(kind, None)
        .await
        .map_err(store("list objects"))?;
    Ok(listed
        .items
        .iter()
        .filter_map(|item| <&T>::try_from(&*item.object).ok().cloned())
        .collect())
}

async fn write_pools(
    settings: &Settings,
    datastore: &dyn Datastore,
    host: &Host,
) -> Result<(), StartError> {
    let existing = list::<cali_api::v3::IPPool>(datastore, Kind::IPPool).await?;
    let existing: Vec<Cidr> = existing.iter().map(|pool| pool.spec.cidr).collect();
    let addresses: Vec<_> = host
        .interfaces
        .iter()
        .flat_map(|i| i.addresses.iter().copied())
        .collect();
    let random = host::random().map_err(random_failed)?;
    for pool in pools::plan_default_pools(settings, &existing, &addresses, random) {
        let (name, cidr) = (pool.metadata.name.clone(), pool.spec.cidr);
        match datastore.create(pool.into()).await {
            Ok(_) => tracing::info!(pool = name, %cidr, "created the default pool"),
            // Another node was faster.
            Err(DatastoreError::AlreadyExists { .. }) => {}
            Err(error) => return Err(store("create the default pool")(error)),
        }
    }
    Ok(())
}

fn random_failed(source: io::Error) -> StartError {
    StartError::File {
        operation: "read",
        path: "/dev/urandom".into(),
        source,
    }
}

async fn write_defaults(settings: &Settings, datastore: &dyn Datastore) -> Result<(), StartError> {
    let random: [u8; 16] = host::random().map_err(random_failed)?;
    let guid = random.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    });
    for object in defaults::default_objects(settings, guid) {
        let key = object.key();
        match datastore.get(&key).await {
            Ok(_) => continue,
            Err(DatastoreError::NotFound { .. }) => {}
            // It is there, only newer than this program.
            Err(DatastoreError::Undecodable { .. }) => continue,
            Err(error) => return Err(store("read a default object")(error)),
        }
        match datastore.create(object).await {
            Ok(_) => tracing::info!(object = %key, "created"),
            Err(DatastoreError::AlreadyExists { .. }) => {}
            Err(error) => return Err(store("create a default object")(error)),
        }
    }
    Ok(())
}

/// Replaces the file as a whole, so that a reader never sees half of it. An equal file is left alone.
pub fn write_file(path: &Path, content: &[u8]) -> Result<(), StartError> {
    let failed = |operation| {
        move |source| StartError::File {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    if std::fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed("create the folder of"))?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let fresh = path.with_file_name(name);
    std::fs::write(&fresh, content).map_err(failed("write"))?;
    std::fs::rename(&fresh, path).map_err(failed("replace"))
}
