//! etcd passes the behaviour suite, in Calico's layout.

use std::sync::Arc;

use cali_datastore::Datastore;
use cali_datastore::etcd::{Etcd, Settings};
use cali_datastore::testing;

fn fresh() -> (testing::Etcd, Arc<dyn Datastore>) {
    let server = testing::Etcd::start();
    let store = Etcd::new(Settings {
        endpoints: vec![server.endpoint()],
        ..Settings::default()
    });
    (server, Arc::new(store))
}

cali_datastore::behaviour_suite!(fresh);
