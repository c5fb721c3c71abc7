//! The one stream of changes that datastores and Typha clients yield and that felix, bgpd and
//! the node's daemon consume.
//!
//! A consumer may rely on this: each key's updates are in order; after [`SyncStatus::InSync`] all
//! objects that existed at the start have been sent; after a reconnection and the next `InSync`
//! every deletion that was missed has been sent as `value: None`; an object that still exists is
//! never reported deleted. Only Calico kinds occur (native ones are converted before), and
//! [`crate::Kind::K8sService`] and [`crate::Kind::K8sEndpointSlice`].
//!
//! A consumer may ask for a part of the workload endpoints only (`typha::interest`). Then an endpoint that leaves what was asked
//! for is reported as a deletion, and [`SyncEvent::Complete`] says from when on everything that was asked for is there.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{AnyResource, Key, Revision};

/// One object's new state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Which object.
    pub key: Key,
    /// The object, or `None` once it is gone.
    pub value: Option<Arc<AnyResource>>,
    /// The version of the object, or of its deletion.
    pub revision: Revision,
}

/// How complete the receiver's view is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SyncStatus {
    /// No contact with the source.
    WaitForDatastore,
    /// Objects are arriving; what is missing may not have been sent yet.
    ResyncInProgress,
    /// All that exists has been sent.
    InSync,
}

/// An item of the stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SyncEvent {
    /// The view's completeness changed.
    Status(SyncStatus),
    /// Objects changed.
    Updates(Vec<Update>),
    /// Everything that the interest of this number asks for has been sent, and with it what those before it asked for.
    /// Only in a stream whose consumer says what it is interested in.
    Complete(u64),
}
