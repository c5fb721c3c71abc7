//! Reading objects from their JSON form, with errors that name the field.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{ObjectMeta, Resource, Spec};

/// Why an object cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", if path.is_empty() { String::new() } else { format!("{path}: ") })]
pub struct DecodeError {
    /// The field, such as `spec.ingress[0].action`; empty for the object as a whole.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

impl DecodeError {
    pub(crate) fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: message.into(),
        }
    }
}

/// In Go's JSON a null is the same as an absent field; list entries stay.
fn drop_null_fields(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_null_fields);
        }
        Value::Array(entries) => entries.iter_mut().for_each(drop_null_fields),
        _ => {}
    }
}

fn part<T: DeserializeOwned>(path: &str, value: Value) -> Result<T, DecodeError> {
    serde_json::from_value(value).map_err(|error| DecodeError::new(path, error.to_string()))
}

pub(crate) fn resource<S: Spec>(
    mut fields: Map<String, Value>,
) -> Result<Resource<S>, DecodeError> {
    fields.remove("apiVersion");
    fields.remove("kind");
    let mut take = |name: &str| {
        let mut value = fields.remove(name).unwrap_or(Value::Null);
        drop_null_fields(&mut value);
        (!value.is_null()).then_some(value)
    };
    let metadata: ObjectMeta = take("metadata").map_or_else(
        || Ok(ObjectMeta::default()),
        |value| part("metadata", value),
    )?;
    let status = take("status")
        .map(|value| part("status", value))
        .transpose()?;
    let spec = if S::INLINE {
        let mut value = Value::Object(fields);
        drop_null_fields(&mut value);
        part("", value)?
    } else {
        let spec = take("spec").unwrap_or_else(|| Value::Object(Map::new()));
        if let Some(name) = fields.keys().next() {
            return Err(DecodeError::new(
                name,
                format!("unknown field `{name}`, expected `metadata`, `spec` or `status`"),
            ));
        }
        part("spec", spec)?
    };
    Ok(Resource {
        metadata,
        spec,
        status,
    })
}
