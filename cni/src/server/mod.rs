//! The server that the plugin calls: part of `cali-node`.
//!
//! A unix socket with mode 0600; the peer must be root (or the server's own user). One connection is one call. Calls of
//! one pod are served one after the other; calls of different pods at the same time.

mod addresses;
mod calls;
mod connection;
mod directory;
mod leftovers;
mod pods;
mod publish;
mod sink;
pub mod stages;
mod translations;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cali_control::cni::{Command, Request};
use cali_datastore::Datastore;
use cali_ipam::reserve::Keeper;
use cali_netlink::Netlink;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use self::calls::Calls;
pub use self::sink::{Endpoint, EndpointSink, Leaving, NotProgrammed};
use crate::tombstone;

/// Calls that are served at the same time; more wait.
const CONCURRENCY: usize = 64;
/// How often tombstones are looked for: a plugin may have met the server while it was starting.
const TOMBSTONES: Duration = Duration::from_secs(5);

/// Settings of the server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the node.
    pub node: String,
    /// The socket ([`cali_control::paths::cni_socket`]).
    pub socket: PathBuf,
    /// Where the MTU and the tombstones are ([`cali_control::paths::state_dir`]).
    pub state_dir: PathBuf,
    /// How long an `ADD` waits for a pod that is not in the datastore yet.
    pub wait_for_pod: Duration,
    /// How long an `ADD` waits for route and policy, where the configuration does not say.
    pub wait_for_policy: Duration,
}

impl Settings {
    /// The usual settings for a node, with paths from the environment.
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            node: node.into(),
            socket: cali_control::paths::cni_socket(),
            state_dir: cali_control::paths::state_dir(),
            wait_for_pod: Duration::from_secs(2),
            wait_for_policy: Duration::from_secs(10),
        }
    }
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket that the plugin calls.
    #[error("cannot {operation} the CNI socket {path}")]
    Socket {
        /// What failed.
        operation: &'static str,
        /// Where.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel's side.
    #[error("the CNI server cannot work on the interfaces of the host")]
    Kernel(#[source] cali_netlink::Error),
}

/// The running server. Dropping it ends it; calls that are being served are cut off.
pub struct Server {
    task: JoinHandle<()>,
    settings: Settings,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.settings.socket);
    }
}

impl Server {
    /// Starts serving. `host` is the namespace in which the host's sides of interfaces live.
    ///
    /// Must be called inside a Tokio runtime.
    pub fn start(
        settings: Settings,
        store: Arc<dyn Datastore>,
        keeper: Keeper,
        host: Netlink,
        sink: Arc<dyn EndpointSink>,
    ) -> Result<Self, StartError> {
        let listener = listen(&settings)?;
        let found = leftovers::find(&host).map_err(StartError::Kernel)?;
        let calls = Calls::new(settings.clone(), store, keeper, host, sink);
        let calls = Arc::new(calls.map_err(StartError::Kernel)?);
        let tombstones = tombstone::folder(&settings.state_dir);
        let task = tokio::spawn(run(listener, calls, tombstones, found));
        Ok(Self { task, settings })
    }
}

fn listen(settings: &Settings) -> Result<UnixListener, StartError> {
    let failed = |operation| {
        let path = settings.socket.display().to_string();
        move |source| StartError::Socket {
            operation,
            path,
            source,
        }
    };
    if let Some(folder) = settings.socket.parent() {
        std::fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
    }
    // Made under another name and moved into place once its mode is right: it is never open to others.
    let fresh = settings
        .socket
        .with_extension(format!("new{}", std::process::id()));
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed("make"))?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))
        .map_err(failed("protect"))?;
    std::fs::rename(&fresh, &settings.socket).map_err(failed("name"))?;
    Ok(listener)
}

async fn run(
    listener: UnixListener,
    calls: Arc<Calls>,
    tombstones: PathBuf,
    found: Vec<leftovers::Found>,
) {
    let slots = Arc::new(Semaphore::new(CONCURRENCY));
    let mut served = JoinSet::new();
    served.spawn(Arc::clone(&calls).resume(found));
    if let Some(translations) = &calls.translations {
        served.spawn(Arc::clone(translations).keep());
    }
    let replayer = Arc::clone(&calls);
    served.spawn(async move {
        loop {
            replay(&replayer, &tombstones).await;
            tokio::time::sleep(TOMBSTONES).await;
        }
    });
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let (calls, slots) = (Arc::clone(&calls), Arc::clone(&slots));
                    served.spawn(async move {
                        let Ok(_slot) = slots.acquire().await else { return };
                        connection::serve(stream, &calls).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(error = %error, "cannot accept a call of the CNI plugin");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(ended) = served.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(error = %error, "a call of the CNI plugin ended badly");
                }
            }
        }
    }
}

async fn replay(calls: &Calls, folder: &std::path::Path) {
    let found = match tombstone::all(folder) {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(error = %error, folder = %folder.display(), "cannot look for left deletions");
            return;
        }
    };
    for one in found {
        match &one.request {
            Some(request) => {
                if let Err(error) = calls.handle(&without_namespace(request), None).await {
                    tracing::warn!(
                        container = request.container_id,
                        error = error.msg,
                        details = error.details,
                        "a left deletion failed and is tried again"
                    );
                    continue;
                }
                tracing::info!(
                    container = request.container_id,
                    "carried out a deletion that was left while this server was away"
                );
            }
            None => {
                tracing::error!(file = %one.path().display(), "a left deletion is not readable and is dropped")
            }
        }
        if let Err(error) = one.remove() {
            tracing::warn!(error = %error, "cannot remove a left deletion");
        }
    }
}

/// A tombstone can only ask for a deletion.
fn without_namespace(request: &Request) -> Request {
    Request {
        command: Command::Del,
        netns: String::new(),
        ..request.clone()
    }
}
