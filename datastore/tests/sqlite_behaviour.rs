//! The embedded store passes the behaviour suite.

use std::sync::Arc;

use cali_datastore::Datastore;
use cali_datastore::sqlite::Sqlite;

fn fresh() -> (tempfile::TempDir, Arc<dyn Datastore>) {
    let folder = tempfile::tempdir().expect("temporary folder");
    let store = Sqlite::open(&folder.path().join("cali.db")).expect("open");
    (folder, Arc::new(store))
}

cali_datastore::behaviour_suite!(fresh);
