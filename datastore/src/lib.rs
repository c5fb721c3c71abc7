//! The datastore: one trait over every back end, and the stream of ordered updates that the rest of Cali lives on.
//!
//! [`Datastore`] is get, list, create, update, delete and watch with revisions and compare-and-swap; [`sqlite`] is the
//! embedded back end (one file, several processes). [`sync`] turns list and watch into one ordered stream of Calico
//! resources with an in-sync marker; native Kubernetes objects are converted on the way.
//!
//! Objects are validated and their defaults filled in when they are written, so that every reader sees complete objects.
//! What this crate does not do: decide anything about a resource's meaning (`cali-api`), or cache for others (`typha`).

mod admission;
mod error;
mod store;
mod stored;

#[cfg(feature = "testing")]
pub mod conformance;
pub mod preflight;
pub mod sqlite;
pub mod sync;
pub mod timestamp;

use std::path::PathBuf;
use std::sync::Arc;

pub use error::{Cause, Error};
pub use store::{
    Applied, Datastore, List, Outcome, Undecodable, Versioned, WatchEvent, WatchStream,
};

/// The file of the embedded store when `CALI_SQLITE_PATH` is not set.
pub const DEFAULT_SQLITE_PATH: &str = "/var/lib/calico/cali.db";

/// Opens the datastore that the environment names: `DATASTORE_TYPE` (`sqlite` when unset) and, for it, `CALI_SQLITE_PATH`.
///
/// Must be called inside a Tokio runtime.
pub fn open_from_env() -> Result<Arc<dyn Datastore>, Error> {
    let kind = std::env::var("DATASTORE_TYPE").unwrap_or_else(|_| "sqlite".to_owned());
    match kind.as_str() {
        "sqlite" => {
            let path = std::env::var_os("CALI_SQLITE_PATH")
                .map_or_else(|| PathBuf::from(DEFAULT_SQLITE_PATH), PathBuf::from);
            Ok(Arc::new(sqlite::Sqlite::open(&path)?))
        }
        other => Err(Error::Configuration {
            variable: "DATASTORE_TYPE",
            reason: format!("{other:?} is not a datastore of this build; it has: sqlite"),
        }),
    }
}
