//! One object: metadata, specification and status.

use std::fmt::Debug;

use serde::de::DeserializeOwned;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::{Key, Kind, ObjectMeta};

/// A specification and what belongs to its kind.
pub trait Spec: Clone + Debug + PartialEq + Serialize + DeserializeOwned {
    /// The kind of objects that have this specification.
    const KIND: Kind;
    /// Whether the fields stand beside `metadata` instead of within `spec`.
    const INLINE: bool = false;
    /// What the object reports.
    type Status: Clone + Debug + PartialEq + Serialize + DeserializeOwned;
}

/// The status of kinds that have none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoStatus {}

/// An object.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource<S: Spec> {
    /// Name, labels and the like.
    pub metadata: ObjectMeta,
    /// What is wanted.
    pub spec: S,
    /// What is reported.
    pub status: Option<S::Status>,
}

impl<S: Spec> Resource<S> {
    /// An object without status.
    #[must_use]
    pub fn new(metadata: ObjectMeta, spec: S) -> Self {
        Self {
            metadata,
            spec,
            status: None,
        }
    }

    /// A cluster-scoped object with nothing but a name.
    #[must_use]
    pub fn named(name: impl Into<String>, spec: S) -> Self {
        Self::new(ObjectMeta::named(name), spec)
    }

    /// The object's kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        S::KIND
    }

    /// The object's key. A namespace is only part of it for namespaced kinds.
    #[must_use]
    pub fn key(&self) -> Key {
        let namespace = self
            .metadata
            .namespace
            .as_deref()
            .filter(|_| S::KIND.is_namespaced());
        Key {
            kind: S::KIND,
            namespace: namespace.map(Into::into),
            name: self.metadata.name.as_str().into(),
        }
    }
}

impl<S: Spec> Serialize for Resource<S> {
    fn serialize<Z: Serializer>(&self, serializer: Z) -> Result<Z::Ok, Z::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("apiVersion", S::KIND.api_version())?;
        map.serialize_entry("kind", S::KIND.name())?;
        map.serialize_entry("metadata", &self.metadata)?;
        if S::INLINE {
            let fields = serde_json::to_value(&self.spec).map_err(serde::ser::Error::custom)?;
            for (name, value) in fields.as_object().into_iter().flatten() {
                map.serialize_entry(name, value)?;
            }
        } else {
            map.serialize_entry("spec", &self.spec)?;
        }
        if let Some(status) = &self.status {
            map.serialize_entry("status", status)?;
        }
        map.end()
    }
}

impl<'de, S: Spec> Deserialize<'de> for Resource<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Map::<String, Value>::deserialize(deserializer)?;
        crate::decode::resource(fields).map_err(serde::de::Error::custom)
    }
}
