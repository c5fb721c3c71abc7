//! The trait that every back end implements, and the values that pass through it.

use std::sync::Arc;

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind, Revision};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::Error;
use crate::stored;

/// An object as stored, with the revision of its last write. `metadata.resourceVersion` holds the same revision.
#[derive(Debug, Clone)]
pub struct Versioned {
    /// The object; shared, because watches hand the same one to many readers.
    pub object: Arc<AnyResource>,
    /// Revision of the last write of this object.
    pub revision: Revision,
}

/// A stored object that this version cannot read. Readers keep the last good version they have.
#[derive(Debug, Clone)]
pub struct Undecodable {
    /// The object.
    pub key: Key,
    /// Revision of the version that cannot be read.
    pub revision: Revision,
    /// Why not.
    pub reason: String,
}

/// A consistent list of one kind.
#[derive(Debug, Clone)]
pub struct List {
    /// Ordered by namespace and name.
    pub items: Vec<Versioned>,
    /// Objects that exist but cannot be read; they are not deleted.
    pub undecodable: Vec<Undecodable>,
    /// A watch from this revision continues this list without a gap.
    pub revision: Revision,
}

/// Where a list that is read in pages goes on. Only of use to the store that gave it, for the same kind and namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageToken(pub(crate) String);

/// A part of a list.
#[derive(Debug, Clone)]
pub struct Page {
    /// In the store's own order.
    pub items: Vec<Versioned>,
    /// Objects of this part that exist but cannot be read.
    pub undecodable: Vec<Undecodable>,
    /// A watch from the revision of the first page misses nothing that the pages do not show.
    pub revision: Revision,
    /// `None` after the last page.
    pub next: Option<PageToken>,
}

/// One change, in the order of commits.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// Created or updated.
    Put(Versioned),
    /// Deleted by the write with this revision.
    Deleted {
        /// The object that is gone.
        key: Key,
        /// The revision of the deletion.
        revision: Revision,
    },
    /// Written in a form that this version cannot read.
    Undecodable(Undecodable),
    /// Nothing of interest happened up to this revision: resume from here.
    Bookmark(Revision),
}

impl WatchEvent {
    /// The revision to resume from after this event.
    pub fn revision(&self) -> &Revision {
        match self {
            Self::Put(v) => &v.revision,
            Self::Deleted { revision, .. } | Self::Bookmark(revision) => revision,
            Self::Undecodable(u) => &u.revision,
        }
    }
}

/// A running watch. Ends with an error, or when dropped (its task ends with it).
#[derive(Debug)]
pub struct WatchStream {
    events: mpsc::Receiver<Result<WatchEvent, Error>>,
    task: JoinHandle<()>,
}

impl WatchStream {
    pub(crate) fn new(
        events: mpsc::Receiver<Result<WatchEvent, Error>>,
        task: JoinHandle<()>,
    ) -> Self {
        Self { events, task }
    }

    /// The next event. `Err(RevisionGone)` means: list again. `None`: the back end is closed. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<WatchEvent, Error>> {
        self.events.recv().await
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What [`Datastore::apply`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The object was new.
    Created,
    /// The object existed and was changed.
    Updated,
    /// The object stood there just so; nothing was written.
    Unchanged,
}

/// Result of [`Datastore::apply`].
#[derive(Debug, Clone)]
pub struct Applied {
    /// The object as stored now.
    pub stored: Versioned,
    /// What was done.
    pub outcome: Outcome,
}

/// The values of a secret by their names.
pub type Secret = std::collections::BTreeMap<String, Vec<u8>>;

/// A secret of Kubernetes with what a write of it takes.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretObject {
    /// Its values.
    pub data: Secret,
    /// Its annotations.
    pub annotations: std::collections::BTreeMap<String, String>,
    /// As of which it is.
    pub revision: Revision,
}

/// The values stay out of logs.
impl std::fmt::Debug for SecretObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretObject")
            .field("names", &self.data.keys())
            .field("annotations", &self.annotations)
            .field("revision", &self.revision)
            .finish()
    }
}

/// Something about an object that whoever owns it should hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The object.
    pub about: Key,
    /// Who says it: the name of the node.
    pub node: String,
    /// One word in CamelCase.
    pub reason: &'static str,
    /// For people.
    pub note: String,
}

/// A store of resources with revisions.
///
/// Every write is atomic, is validated against the rules of its kind (and, for IP pools, against the other pools) and
/// gets the defaults of its kind. Deleting and creating an object again gives it a new `uid`.
#[async_trait]
pub trait Datastore: Send + Sync {
    /// Reads one object.
    async fn get(&self, key: &Key) -> Result<Versioned, Error>;

    /// Reads all objects of a kind, in one namespace or in all of them, as of one instant.
    async fn list(&self, kind: Kind, namespace: Option<&str>) -> Result<List, Error>;

    /// Reads a part of a list, of at most `limit` objects and fewer where that is better for the store, for readers that do not keep all of it; `after` is none at first, and
    /// then what the page before says.
    ///
    /// All pages together show every object that stands all the while exactly once. Of what is written while they are
    /// read, etcd and the API server show nothing as long as they still have the first page's instant; the embedded store, and they
    /// after that, show it where the list has not come to yet.
    async fn list_page(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        after: Option<&PageToken>,
        limit: usize,
    ) -> Result<Page, Error> {
        let _ = (after, limit);
        let list = self.list(kind, namespace).await?;
        Ok(Page {
            items: list.items,
            undecodable: list.undecodable,
            revision: list.revision,
            next: None,
        })
    }

    /// Creates an object; `metadata.resourceVersion` must be empty.
    async fn create(&self, object: AnyResource) -> Result<Versioned, Error>;

    /// Replaces an object if its stored revision is still `metadata.resourceVersion`.
    async fn update(&self, object: AnyResource) -> Result<Versioned, Error>;

    /// Deletes an object, if given only at this revision, and returns what was deleted.
    async fn delete(&self, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error>;

    /// Follows the changes of these kinds after `from`, which is a revision of a list, an event or an object. The order
    /// is that of the commits for each kind; who resumes from an event must have asked for one kind only.
    async fn watch(&self, kinds: &[Kind], from: &Revision) -> Result<WatchStream, Error>;

    /// [`Self::list`] of the pods that are bound to this node.
    async fn list_pods(&self, node: &str) -> Result<List, Error> {
        let mut list = self.list(Kind::K8sPod, None).await?;
        list.items.retain(|item| {
            matches!(item.object.as_ref(), AnyResource::K8sPod(pod) if pod.spec.node_name.as_deref() == Some(node))
        });
        Ok(list)
    }

    /// [`Self::watch`] of the pods that are bound to this node; a store may tell of those of other nodes, too.
    async fn watch_pods(&self, _node: &str, from: &Revision) -> Result<WatchStream, Error> {
        self.watch(&[Kind::K8sPod], from).await
    }

    /// False for kinds that this store only shows as views of native objects: they can be read, but a stream follows
    /// the native objects and converts them itself.
    fn is_stored(&self, _kind: Kind) -> bool {
        true
    }

    /// Reads a secret of Kubernetes; `None` if there is none, and always in stores that keep none.
    async fn secret(&self, _namespace: &str, _name: &str) -> Result<Option<Secret>, Error> {
        Ok(None)
    }

    /// [`Self::secret`] with what a write of it takes.
    async fn secret_object(
        &self,
        _namespace: &str,
        _name: &str,
    ) -> Result<Option<SecretObject>, Error> {
        Ok(None)
    }

    /// Writes the values of a secret that is there, all of them, and these annotations beside others, if its revision is still the given
    /// one; false if it is not, and always in stores that keep no secrets.
    async fn replace_secret(
        &self,
        _namespace: &str,
        _name: &str,
        _new: &SecretObject,
    ) -> Result<bool, Error> {
        Ok(false)
    }

    /// Shows a warning beside an object, where the store has a place for it (Events of Kubernetes); in others nothing
    /// happens. The same warning again is the same event, seen once more.
    async fn warn(&self, _warning: &Warning) -> Result<(), Error> {
        Ok(())
    }

    /// Says on a node's own object whether its network serves pods (the condition `NetworkUnavailable` of Kubernetes); in
    /// stores that have no place for it nothing happens.
    async fn tell_network(&self, _node: &str, _serves: bool) -> Result<(), Error> {
        Ok(())
    }

    /// Creates the object or replaces what stands there, whatever its revision.
    ///
    /// What other writers own is kept: `status` where the given object has none, and on native Kubernetes objects the
    /// annotations of Calico (a pod's address survives that its manifest is applied again).
    async fn apply(&self, object: AnyResource) -> Result<Applied, Error> {
        const ATTEMPTS: usize = 32;
        let key = object.key();
        let mut attempt = 0;
        loop {
            attempt += 1;
            let result = match self.get(&key).await {
                Err(Error::NotFound { .. }) => {
                    let fresh = stored::without_revision(&object)?;
                    self.create(fresh).await.map(|stored| Applied {
                        stored,
                        outcome: Outcome::Created,
                    })
                }
                Err(e) => return Err(e),
                Ok(old) => match stored::merged(&old, &object)? {
                    None => {
                        return Ok(Applied {
                            stored: old,
                            outcome: Outcome::Unchanged,
                        });
                    }
                    Some(new) => self.update(new).await.map(|stored| Applied {
                        stored,
                        outcome: Outcome::Updated,
                    }),
                },
            };
            match result {
                Err(
                    Error::Conflict { .. } | Error::AlreadyExists { .. } | Error::NotFound { .. },
                ) if attempt < ATTEMPTS => {}
                other => return other,
            }
        }
    }
}
