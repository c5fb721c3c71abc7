//! The datastore: one trait over every back end, and the stream of ordered updates that the rest of Cali lives on.
//!
//! [`Datastore`] is get, list, create, update, delete and watch with revisions and compare-and-swap. Back ends: [`sqlite`],
//! embedded (one file, several processes), [`kubernetes`] with Calico's resource definitions, and [`etcd`] in Calico's
//! layout. [`sync`] turns list and watch into one ordered stream of Calico
//! resources with an in-sync marker; native Kubernetes objects are converted on the way.
//!
//! Objects are validated and their defaults filled in when they are written, so that every reader sees complete objects.
//! What this crate does not do: decide anything about a resource's meaning (`cali-api`), or cache for others (`typha`).

mod admission;
mod edit;
mod error;
mod store;
mod stored;

#[cfg(feature = "testing")]
pub mod conformance;
pub mod etcd;
pub mod kubernetes;
pub mod preflight;
pub mod sqlite;
pub mod sync;
#[cfg(feature = "testing")]
pub mod testing;
pub mod timestamp;

use std::path::PathBuf;
use std::sync::Arc;

pub use edit::edit;
pub use error::{Cause, Error};
pub use store::{
    Applied, Datastore, List, Outcome, Page, PageToken, Secret, SecretObject, Undecodable,
    Versioned, Warning, WatchEvent, WatchStream,
};

/// The file of the embedded store when `CALI_SQLITE_PATH` is not set.
pub const DEFAULT_SQLITE_PATH: &str = "/var/lib/calico/cali.db";

/// Opens the datastore that the environment names. Everything that opens a datastore does it here.
///
/// | `DATASTORE_TYPE` | its settings |
/// |---|---|
/// | `sqlite` (when unset) | `CALI_SQLITE_PATH` |
/// | `etcdv3` | `ETCD_ENDPOINTS`, `ETCD_USERNAME`, `ETCD_PASSWORD`, `ETCD_CA_CERT_FILE`, `ETCD_CERT_FILE`, `ETCD_KEY_FILE` |
///
/// | `kubernetes` | `KUBECONFIG`, or the pod's service account; `K8S_*`, `CALICO_API_GROUP` |
///
/// etcd and the API server are reached at the first call, not here. Must be called inside a Tokio runtime.
pub fn open_from_env() -> Result<Arc<dyn Datastore>, Error> {
    open_with(|name| std::env::var(name).ok())
}

/// As [`open_from_env`], of a type that is given.
pub fn open(kind: &str) -> Result<Arc<dyn Datastore>, Error> {
    open_with(|name| match name {
        "DATASTORE_TYPE" => Some(kind.to_owned()),
        _ => std::env::var(name).ok(),
    })
}

/// As [`open_from_env`], from any source of variables.
pub fn open_with(variable: impl Fn(&str) -> Option<String>) -> Result<Arc<dyn Datastore>, Error> {
    let kind = variable("DATASTORE_TYPE").unwrap_or_else(|| "sqlite".to_owned());
    match kind.as_str() {
        "sqlite" => {
            let path = variable("CALI_SQLITE_PATH")
                .map_or_else(|| PathBuf::from(DEFAULT_SQLITE_PATH), PathBuf::from);
            Ok(Arc::new(sqlite::Sqlite::open(&path)?))
        }
        "kubernetes" => Ok(Arc::new(kubernetes::Kubernetes::new(
            kubernetes::Settings::from_variables(variable)?,
        ))),
        "etcdv3" => Ok(Arc::new(etcd::Etcd::new(etcd::Settings::from_variables(
            variable,
        )?))),
        other => Err(Error::Configuration {
            variable: "DATASTORE_TYPE",
            reason: format!("{other:?} is none of sqlite, kubernetes, etcdv3"),
        }),
    }
}
