//! Reading and writing the stored objects of address management, typed.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::v3::{
    Affinity, AffinityType, BlockAffinitySpec, BlockAffinityState, IPAMBlockSpec,
    IPAMConfigurationSpec, IPAMHandleSpec,
};
use cali_api::{AnyResource, Cidr, Key, Kind, Net, ObjectMeta, Resource, Revision, Spec};
use cali_datastore::{Datastore, Error as StoreError, Versioned, WatchStream};

use crate::block::Block;
use crate::error::Error;
use crate::names;
use crate::pools::Pool;

/// A stored object with the revision for its compare-and-swap.
#[derive(Debug, Clone)]
pub(crate) struct Stored<T> {
    pub(crate) value: T,
    pub(crate) meta: ObjectMeta,
    pub(crate) revision: Revision,
}

/// The datastore, seen as the objects of this crate. Objects marked `deleted` (Calico's two-step deletion) are finished
/// off and count as absent.
#[derive(Clone)]
pub(crate) struct Objects {
    store: Arc<dyn Datastore>,
}

/// Outcome of a compare-and-swap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Swap {
    Done(Revision),
    /// Somebody else wrote, created or deleted the object in between.
    Raced,
}

fn swap(
    result: Result<Versioned, StoreError>,
    operation: impl Into<String>,
) -> Result<Swap, Error> {
    match result {
        Ok(stored) => Ok(Swap::Done(stored.revision)),
        Err(
            StoreError::Conflict { .. }
            | StoreError::NotFound { .. }
            | StoreError::AlreadyExists { .. },
        ) => Ok(Swap::Raced),
        Err(source) => Err(Error::datastore(operation)(source)),
    }
}

fn renewed(meta: &ObjectMeta, revision: &Revision) -> ObjectMeta {
    ObjectMeta {
        resource_version: Some(revision.clone()),
        ..meta.clone()
    }
}

impl Objects {
    pub(crate) fn new(store: Arc<dyn Datastore>) -> Self {
        Self { store }
    }

    async fn read(&self, key: &Key) -> Result<Option<Versioned>, Error> {
        match self.store.get(key).await {
            Ok(found) => Ok(Some(found)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(source) => Err(Error::datastore(format!("read {key}"))(source)),
        }
    }

    pub(crate) async fn all(&self, kind: Kind) -> Result<Vec<Versioned>, Error> {
        let list = self.store.list(kind, None).await;
        Ok(list
            .map_err(Error::datastore(format!("list {}", kind.plural())))?
            .items)
    }

    async fn write(&self, object: AnyResource) -> Result<Swap, Error> {
        let operation = format!("write {}", object.key());
        swap(self.store.update(object).await, operation)
    }

    async fn make(&self, object: AnyResource) -> Result<Swap, Error> {
        let operation = format!("create {}", object.key());
        swap(self.store.create(object).await, operation)
    }

    pub(crate) async fn remove(&self, key: &Key, revision: &Revision) -> Result<Swap, Error> {
        swap(
            self.store.delete(key, Some(revision)).await,
            format!("delete {key}"),
        )
    }

    /// Whether the datastore is locked: then nothing may be given out.
    pub(crate) async fn is_locked(&self) -> Result<bool, Error> {
        let found = self.read(&names::cluster_information()).await?;
        Ok(found.is_some_and(|found| {
            matches!(&*found.object, AnyResource::ClusterInformation(information) if information.spec.is_locked())
        }))
    }

    pub(crate) async fn configuration(&self) -> Result<IPAMConfigurationSpec, Error> {
        let spec = match self.read(&names::configuration()).await? {
            Some(found) => match found.object.as_ref() {
                AnyResource::IPAMConfiguration(c) => c.spec.clone(),
                _ => IPAMConfigurationSpec::default(),
            },
            None => IPAMConfigurationSpec::default(),
        };
        if !spec.strict_affinity && !spec.auto_allocates() {
            return Err(Error::Configuration(
                "strictAffinity false needs autoAllocateBlocks true",
            ));
        }
        Ok(spec)
    }

    /// Tells every change of what decides about pools, and of the lock.
    pub(crate) async fn watch_settings(&self) -> Result<WatchStream, Error> {
        let from = self
            .store
            .list(Kind::IPPool, None)
            .await
            .map_err(Error::datastore("list ippools"))?
            .revision;
        let kinds = [
            Kind::IPPool,
            Kind::IPAMConfiguration,
            Kind::IPReservation,
            Kind::ClusterInformation,
        ];
        self.store
            .watch(&kinds, &from)
            .await
            .map_err(Error::datastore("watch ippools"))
    }

    pub(crate) async fn pools(&self) -> Result<Vec<Pool>, Error> {
        let found = self.all(Kind::IPPool).await?;
        Ok(found
            .iter()
            .filter_map(|v| match v.object.as_ref() {
                AnyResource::IPPool(p) => Some(Pool {
                    name: p.metadata.name.clone(),
                    spec: p.spec.clone(),
                }),
                _ => None,
            })
            .collect())
    }

    pub(crate) async fn reservations(&self) -> Result<Vec<Net>, Error> {
        let found = self.all(Kind::IPReservation).await?;
        Ok(found
            .iter()
            .filter_map(|v| match v.object.as_ref() {
                AnyResource::IPReservation(r) => Some(r.spec.reserved_cidrs.clone()),
                _ => None,
            })
            .flatten()
            .collect())
    }

    /// Labels of a node: Calico's object over Kubernetes' one.
    pub(crate) async fn node_labels(&self, node: &str) -> Result<BTreeMap<String, String>, Error> {
        let mut labels = BTreeMap::new();
        for kind in [Kind::K8sNode, Kind::Node] {
            if let Some(found) = self.read(&Key::cluster(kind, node)).await? {
                labels.extend(found.object.labels().clone());
            }
        }
        Ok(labels)
    }

    pub(crate) async fn block(&self, cidr: &Cidr) -> Result<Option<Stored<Block>>, Error> {
        let key = names::block(cidr);
        let Some(found) = self.read(&key).await? else {
            return Ok(None);
        };
        let AnyResource::IPAMBlock(block) = found.object.as_ref() else {
            return Ok(None);
        };
        if block.spec.deleted {
            self.remove(&key, &found.revision).await?;
            return Ok(None);
        }
        Ok(Some(stored(block, &found.revision, Block::from_spec)))
    }

    pub(crate) async fn blocks(&self) -> Result<Vec<Block>, Error> {
        Ok(self.blocks_and_unreadable().await?.0)
    }

    /// The blocks, and the names of block objects that exist and cannot be read.
    pub(crate) async fn blocks_and_unreadable(&self) -> Result<(Vec<Block>, Vec<String>), Error> {
        let list = self
            .store
            .list(Kind::IPAMBlock, None)
            .await
            .map_err(Error::datastore("list ipamblocks"))?;
        let blocks = list.items.iter().filter_map(|v| match v.object.as_ref() {
            AnyResource::IPAMBlock(b) if !b.spec.deleted => Some(Block::from_spec(b.spec.clone())),
            _ => None,
        });
        let unreadable = list.undecodable.iter().map(|u| u.key.name.to_string());
        Ok((blocks.collect(), unreadable.collect()))
    }

    pub(crate) async fn create_block(&self, block: Block) -> Result<Swap, Error> {
        let key = names::block(&block.cidr());
        self.make(resource(&key, block.into_spec()).into()).await
    }

    pub(crate) async fn update_block(
        &self,
        old: &Stored<Block>,
        block: Block,
    ) -> Result<Swap, Error> {
        let spec: IPAMBlockSpec = block.into_spec();
        let metadata = renewed(&old.meta, &old.revision);
        self.write(Resource::new(metadata, spec).into()).await
    }

    pub(crate) async fn affinity(
        &self,
        node: &str,
        cidr: &Cidr,
    ) -> Result<Option<Stored<BlockAffinitySpec>>, Error> {
        let key = names::affinity(node, cidr);
        let Some(found) = self.read(&key).await? else {
            return Ok(None);
        };
        let AnyResource::BlockAffinity(affinity) = found.object.as_ref() else {
            return Ok(None);
        };
        if affinity.spec.deleted {
            self.remove(&key, &found.revision).await?;
            return Ok(None);
        }
        Ok(Some(stored(affinity, &found.revision, |spec| spec)))
    }

    /// The blocks that an owner has, or is about to have, an affinity to, in the order of their names.
    pub(crate) async fn affinities(&self, of: &Affinity) -> Result<Vec<BlockAffinitySpec>, Error> {
        let found = self.all(Kind::BlockAffinity).await?;
        Ok(found
            .iter()
            .filter_map(|v| match v.object.as_ref() {
                AnyResource::BlockAffinity(a)
                    if a.spec.node == of.name
                        && !a.spec.deleted
                        && a.spec.type_.unwrap_or(AffinityType::Host) == of.owner =>
                {
                    Some(a.spec.clone())
                }
                _ => None,
            })
            .collect())
    }

    pub(crate) async fn announce(&self, owner: &Affinity, cidr: &Cidr) -> Result<Swap, Error> {
        let key = names::affinity(&owner.name, cidr);
        let spec = BlockAffinitySpec {
            state: BlockAffinityState::Pending,
            node: owner.name.clone(),
            type_: Some(owner.owner),
            cidr: *cidr,
            deleted: false,
        };
        self.make(resource(&key, spec).into()).await
    }

    pub(crate) async fn set_state(
        &self,
        old: &Stored<BlockAffinitySpec>,
        state: BlockAffinityState,
    ) -> Result<Swap, Error> {
        let mut spec = old.value.clone();
        spec.state = state;
        let metadata = renewed(&old.meta, &old.revision);
        self.write(Resource::new(metadata, spec).into()).await
    }

    pub(crate) async fn handle(
        &self,
        handle: &str,
    ) -> Result<Option<Stored<IPAMHandleSpec>>, Error> {
        let key = names::handle(handle);
        let Some(found) = self.read(&key).await? else {
            return Ok(None);
        };
        let AnyResource::IPAMHandle(object) = found.object.as_ref() else {
            return Ok(None);
        };
        if object.spec.deleted {
            self.remove(&key, &found.revision).await?;
            return Ok(None);
        }
        Ok(Some(stored(object, &found.revision, |spec| spec)))
    }

    pub(crate) async fn write_handle(
        &self,
        old: Option<&Stored<IPAMHandleSpec>>,
        spec: IPAMHandleSpec,
    ) -> Result<Swap, Error> {
        let key = names::handle(&spec.handle_id);
        match old {
            None => self.make(resource(&key, spec).into()).await,
            Some(old) if spec.block.is_empty() => self.remove(&key, &old.revision).await,
            Some(old) => {
                let metadata = renewed(&old.meta, &old.revision);
                self.write(Resource::new(metadata, spec).into()).await
            }
        }
    }
}

fn resource<S: Spec>(key: &Key, spec: S) -> Resource<S> {
    Resource::named(&*key.name, spec)
}

fn stored<S: Spec, T>(
    resource: &Resource<S>,
    revision: &Revision,
    value: impl FnOnce(S) -> T,
) -> Stored<T> {
    Stored {
        value: value(resource.spec.clone()),
        meta: resource.metadata.clone(),
        revision: revision.clone(),
    }
}

/// The affinity of a node, as written into its blocks.
pub(crate) fn host(node: &str) -> Affinity {
    Affinity::host(node)
}
