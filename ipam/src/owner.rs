//! Who holds an address: a handle, by which it is released, and attributes for people and garbage collection.

use std::collections::BTreeMap;
use std::fmt;

use cali_api::v3::AllocationAttribute;
use serde::{Deserialize, Serialize};

use crate::names;

/// Holder of an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    handle: Option<String>,
    attributes: BTreeMap<String, String>,
}

impl Owner {
    /// A holder by its handle. Handles are lower case, as Calico stores them.
    pub fn new(handle: &str) -> Self {
        Self {
            handle: Some(names::sanitized_handle(handle)),
            attributes: BTreeMap::new(),
        }
    }

    /// Adds an attribute (`node`, `pod`, `namespace`, `type`, `timestamp`).
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.attributes.insert(name.to_owned(), value.into());
        self
    }

    /// The handle; only addresses that another program assigned have none.
    pub fn handle(&self) -> Option<&str> {
        self.handle.as_deref()
    }

    /// Whether this is the holder's handle, in any case.
    pub fn has_handle(&self, handle: &str) -> bool {
        self.handle.as_deref() == Some(names::sanitized_handle(handle).as_str())
    }

    /// One attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    /// All attributes.
    pub fn attributes(&self) -> &BTreeMap<String, String> {
        &self.attributes
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (
            &self.handle,
            self.attribute("pod"),
            self.attribute("namespace"),
        ) {
            (_, Some(pod), Some(namespace)) => write!(f, "pod {namespace}/{pod}"),
            (Some(handle), ..) => write!(f, "handle {handle}"),
            (None, ..) => f.write_str("an owner without a handle"),
        }
    }
}

impl From<&AllocationAttribute> for Owner {
    fn from(attribute: &AllocationAttribute) -> Self {
        Self {
            handle: attribute.handle_id.as_deref().map(names::sanitized_handle),
            attributes: attribute.owner.clone().unwrap_or_default(),
        }
    }
}

impl From<&Owner> for AllocationAttribute {
    fn from(owner: &Owner) -> Self {
        Self {
            handle_id: owner.handle.clone(),
            owner: (!owner.attributes.is_empty()).then(|| owner.attributes.clone()),
            ..Self::default()
        }
    }
}
