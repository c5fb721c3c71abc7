//! Rules between a write and what is stored: immutable fields and pools that must not overlap. Pure.
//!
//! A back end evaluates them in the same transaction as the write, so that two writers cannot both pass.

use cali_api::{AnyResource, FieldError, Key, Kind};

use crate::error::Error;

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
