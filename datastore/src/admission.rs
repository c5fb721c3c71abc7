//! Rules between a write and what is stored: immutable fields and pools that must not overlap. Pure.
//!
//! A back end evaluates them in the same transaction as the write, so that two writers cannot both pass.

use cali_api::{AnyResource, FieldError, Key, Kind, Revision};

use crate::error::Error;

/// The key of an object that is to be created, and the object with its defaults.
pub(crate) fn for_create(mut object: AnyResource) -> Result<(Key, AnyResource), Error> {
    let key = named(&object, "create")?;
    if revision(&object).is_some() {
        return Err(Error::Unsupported {
            operation: "create",
            key,
            reason: "metadata.resourceVersion must be empty",
        });
    }
    cali_api::defaults(&mut object);
    Ok((key, object))
}

/// The key of an object that is to be replaced, the object with its defaults, and the revision it replaces.
pub(crate) fn for_update(mut object: AnyResource) -> Result<(Key, AnyResource, Revision), Error> {
    let key = named(&object, "update")?;
    let Some(expected) = revision(&object) else {
        return Err(Error::Unsupported {
            operation: "update",
            key,
            reason: "metadata.resourceVersion is needed",
        });
    };
    cali_api::defaults(&mut object);
    Ok((key, object, expected))
}

fn revision(object: &AnyResource) -> Option<Revision> {
    let revision = object.metadata().resource_version.clone()?;
    (!revision.as_str().is_empty()).then_some(revision)
}

fn named(object: &AnyResource, operation: &'static str) -> Result<Key, Error> {
    let key = object.key();
    let reason = if key.name.is_empty() {
        "metadata.name is needed"
    } else if key.kind.is_namespaced() && key.namespace.is_none() {
        "metadata.namespace is needed"
    } else if !key.kind.is_namespaced() && key.namespace.is_some() {
        "the kind has no namespaces"
    } else {
        return Ok(key);
    };
    Err(Error::Unsupported {
        operation,
        key,
        reason,
    })
}

/// True if writes of this kind must be compared with the other objects of the kind.
pub(crate) fn compares_with_others(kind: Kind) -> bool {
    kind == Kind::IPPool
}

/// Checks a write. `old` is what it replaces, `others` are all stored objects of the kind (if
/// [`compares_with_others`]), the replaced one included.
pub(crate) fn check(
    new: &AnyResource,
    old: Option<&AnyResource>,
    others: &[AnyResource],
) -> Result<(), Error> {
    let mut fields = cali_api::validate(new).err().unwrap_or_default();
    if let AnyResource::IPPool(pool) = new {
        if let Some(AnyResource::IPPool(old)) = old {
            for (path, same) in [
                ("spec.cidr", old.spec.cidr == pool.spec.cidr),
                (
                    "spec.blockSize",
                    old.spec.block_size == pool.spec.block_size,
                ),
            ] {
                if !same {
                    fields.push(field(
                        path,
                        "cannot be changed; create another pool and move to it",
                    ));
                }
            }
        }
        fields.extend(overlaps(&new.key(), pool, others));
    }
    if fields.is_empty() {
        Ok(())
    } else {
        Err(Error::Invalid {
            key: new.key(),
            fields,
        })
    }
}

fn overlaps(key: &Key, pool: &cali_api::v3::IPPool, others: &[AnyResource]) -> Vec<FieldError> {
    others
        .iter()
        .filter(|other| other.key() != *key)
        .filter_map(|other| match other {
            AnyResource::IPPool(other) if other.spec.cidr.overlaps(&pool.spec.cidr) => Some(field(
                "spec.cidr",
                format!(
                    "{} overlaps {} of IPPool({})",
                    pool.spec.cidr, other.spec.cidr, other.metadata.name
                ),
            )),
            _ => None,
        })
        .collect()
}

fn field(path: &str, message: impl Into<String>) -> FieldError {
    FieldError {
        path: path.to_owned(),
        message: message.into(),
    }
}
