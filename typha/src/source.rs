//! The stream of changes for a daemon: from a Typha server when the environment names one, otherwise straight from the datastore.

use std::path::PathBuf;
use std::time::Duration;

use cali_api::Kind;
use cali_api::update::SyncEvent;
use tokio::sync::mpsc;

use crate::client::discovery::Service;
use crate::client::{self, ClientConfig, Keep, Servers};
use crate::config::{self, ConfigError, Env};
use crate::interest::{self, Asker, Listener};
use crate::tls::{ClientTls, TlsError};

/// How long a server is waited for before the kept state counts: longer than one takes to be started anew.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The environment.
    #[error("the Typha client cannot be configured")]
    Config(#[from] ConfigError),
    /// Its certificates.
    #[error("the Typha client's TLS cannot be set up")]
    Tls(#[from] TlsError),
    /// The datastore.
    #[error("the datastore cannot be opened")]
    Datastore(#[from] cali_datastore::Error),
}

/// Every kind that the stream can carry: Calico's own, and the native ones that have no Calico form.
pub fn all_kinds() -> Vec<Kind> {
    Kind::ALL
        .iter()
        .copied()
        .filter(|kind| {
            !kind.is_native() || matches!(kind, Kind::K8sService | Kind::K8sEndpointSlice)
        })
        .collect()
}

/// For a program that needs the workload endpoints of its node and of others only what it asks for: how it asks, and what [`from_env`] is
/// to be given. None where all of them come in any case: straight from the datastore, or because `CALI_TYPHA_INTEREST` is `cluster`.
pub fn interest_from_env(node: &str) -> Result<Option<(Asker, Listener)>, ConfigError> {
    let env = Env::of_process();
    let server =
        !config::server_addresses(&env)?.is_empty() || config::server_service(&env).is_some();
    Ok((config::is_scoped(&env)? && server).then(|| interest::channel(node)))
}

/// Starts the source: a client of the servers in `FELIX_TYPHAADDR` or behind the service `FELIX_TYPHAK8SSERVICENAME`, or
/// `cali_datastore::sync` in this process (`DATASTORE_TYPE`). Of a server, the last state is kept in `file`, this
/// program's own. With an `interest` ([`interest_from_env`]) a server sends a part of the workload endpoints. Dropping the
/// receiver ends it. Must be called inside a Tokio runtime.
pub fn from_env(
    kinds: &[Kind],
    hostname: &str,
    file: PathBuf,
    interest: Option<Listener>,
) -> Result<mpsc::Receiver<SyncEvent>, SourceError> {
    let env = Env::of_process();
    let addresses = config::server_addresses(&env)?;
    let servers = match config::server_service(&env) {
        _ if !addresses.is_empty() => Some(Servers::Fixed(addresses)),
        Some((namespace, name)) => Some(Servers::Service(Service {
            store: cali_datastore::open_from_env()?,
            namespace,
            name,
            node: hostname.to_owned(),
        })),
        None => None,
    };
    let Some(servers) = servers else {
        tracing::info!("reading the datastore directly");
        return Ok(cali_datastore::sync::start(
            cali_datastore::open_from_env()?,
            kinds,
        ));
    };
    let tls = config::client_tls(&env)?
        .map(ClientTls::client)
        .transpose()?;
    tracing::info!(?servers, "reading from typha");
    Ok(client::start(ClientConfig {
        servers,
        hostname: hostname.to_owned(),
        info: concat!("cali ", env!("CARGO_PKG_VERSION")).to_owned(),
        kinds: kinds.to_vec(),
        tls,
        keep: Some(Keep {
            file,
            patience: PATIENCE,
        }),
        interest,
    }))
}
