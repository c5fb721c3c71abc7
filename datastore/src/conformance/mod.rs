//! The behaviour of a datastore, as tests that every back end must pass.
//!
//! A back end's tests call [`crate::behaviour_suite!`] with a way to make an empty store.

mod pages;
mod streams;
mod survival;
mod watches;
mod writes;

use std::sync::Arc;
use std::time::Duration;

use cali_api::{AnyResource, Key, Kind};
use serde_json::{Value, json};

pub use self::pages::*;
pub use self::streams::*;
pub use self::survival::stream_survives;
pub use self::watches::*;
pub use self::writes::*;
use crate::Datastore;

/// A store under test.
pub type Store = Arc<dyn Datastore>;

/// Nothing here takes that long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Makes one test of each behaviour: `behaviour_suite!(fresh)`, where `fresh()` gives a guard that is kept until the
/// end of the test, and an empty store.
#[macro_export]
macro_rules! behaviour_suite {
    ($fresh:expr) => {
        $crate::behaviour_suite!(@each $fresh;
            create_gives_identity_and_revision
            create_twice_is_refused
            create_with_a_revision_is_refused
            update_swaps_only_the_expected_revision
            update_keeps_identity
            delete_honours_the_revision
            recreated_object_has_another_identity
            native_and_calico_kinds_of_one_name_are_apart
            list_is_limited_to_kind_and_namespace
            pages_together_are_the_list
            invalid_objects_are_refused
            overlapping_pools_are_refused
            defaults_are_filled_in
            apply_creates_updates_and_leaves_alone
            apply_keeps_what_others_own
            watch_continues_a_list_without_a_gap
            watch_tells_only_its_kinds_in_commit_order
            foreign_revisions_are_gone
            concurrent_updates_lose_nothing
            sync_sends_everything_then_in_sync
            sync_converts_native_objects_and_their_deletion
            sync_shows_the_stored_object_over_the_converted_one
        );
    };
    (@each $fresh:expr; $($name:ident)+) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let (_guard, store) = $fresh();
                let test = $crate::conformance::$name(store);
                tokio::time::timeout($crate::conformance::PATIENCE, test).await.expect("the test hangs");
            }
        )+
    };
}

/// An object from its JSON.
pub fn object(value: Value) -> AnyResource {
    AnyResource::from_json(value).expect("the test's object is well formed")
}

/// A pool.
pub fn pool(name: &str, cidr: &str) -> AnyResource {
    object(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
        "metadata": {"name": name}, "spec": {"cidr": cidr}
    }))
}

/// A network set with one label, for tests that only need some namespaced object.
pub fn network_set(namespace: &str, name: &str, net: &str) -> AnyResource {
    object(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "NetworkSet",
        "metadata": {"name": name, "namespace": namespace, "labels": {"role": "test"}}, "spec": {"nets": [net]}
    }))
}

/// A Kubernetes namespace.
pub fn namespace(name: &str, label: &str) -> AnyResource {
    object(json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"team": label}}
    }))
}

fn set_key(name: &str) -> Key {
    Key::namespaced(Kind::NetworkSet, "a", name)
}
