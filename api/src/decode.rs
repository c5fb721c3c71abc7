//! Reading objects from their JSON form, with errors that name the field.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Kind, ObjectMeta, Resource, Spec};

mod words;

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

    /// The error of a part of an object, as one of the whole.
    pub(crate) fn within(mut self, prefix: &str) -> Self {
        self.path = join(prefix, &self.path);
        self
    }
}

/// The path of a field of a field.
pub(crate) fn join(outer: &str, inner: &str) -> String {
    match (outer.is_empty(), inner.is_empty()) {
        (true, _) => inner.to_owned(),
        (_, true) => outer.to_owned(),
        _ if inner.starts_with('[') => format!("{outer}{inner}"),
        _ => format!("{outer}.{inner}"),
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

/// The fields that serde would have accepted, out of its message.
fn quoted(message: &str) -> impl Iterator<Item = &str> {
    message.split('`').skip(1).step_by(2)
}

/// Lists longer than this do not help anybody.
const MAX_LISTED: usize = 12;

/// The known name that may have been meant: the shortest that begins so, or the one with the fewest letters wrong.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let begins = |candidate: &str| {
        let start = candidate.get(..name.len());
        name.len() >= 4 && start.is_some_and(|start| start.eq_ignore_ascii_case(name))
    };
    let typed = name.to_ascii_lowercase();
    let edits = |candidate: &str| strsim::osa_distance(&typed, &candidate.to_ascii_lowercase());
    known
        .map(|candidate| (!begins(candidate), edits(candidate), candidate))
        .min()
        .filter(|(other, edits, _)| !other || *edits <= 1 + name.len() / 4)
        .map(|(.., candidate)| candidate)
}

/// No kind has this name in this group and version.
pub(crate) fn unknown_kind(api_version: &str, kind: &str) -> DecodeError {
    let of = |wanted: &str| {
        let kinds = Kind::ALL.iter().filter(|known| known.name() == wanted);
        kinds.map(|known| known.api_version()).collect::<Vec<_>>()
    };
    let advice = match nearest(kind, Kind::ALL.iter().map(|known| known.name())) {
        Some(meant) if meant == kind => format!("; it is in {}", of(kind).join(" and ")),
        Some(meant) if of(meant).contains(&api_version) => format!("; did you mean {meant:?}?"),
        Some(meant) => {
            format!("; did you mean {meant:?} in {}?", of(meant).join(" or "))
        }
        None => String::new(),
    };
    let reason = format!("there is no kind {kind:?} in {api_version:?}{advice}");
    DecodeError::new("kind", reason)
}

pub(crate) fn unknown_field<'a>(
    path: &str,
    name: &str,
    known: impl Iterator<Item = &'a str>,
) -> DecodeError {
    let known: Vec<&str> = known.collect();
    let advice = match nearest(name, known.iter().copied()) {
        Some(candidate) => format!("; did you mean {candidate:?}?"),
        None if known.is_empty() || known.len() > MAX_LISTED => String::new(),
        None => format!("; known are {}", known.join(", ")),
    };
    let path = if path == name || path.ends_with(&format!(".{name}")) {
        path.to_owned()
    } else {
        join(path, name)
    };
    DecodeError::new(path, format!("unknown field {name:?}{advice}"))
}

fn part<T: DeserializeOwned>(prefix: &str, value: Value) -> Result<T, DecodeError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = match error.path().to_string() {
            path if path == "." => String::new(),
            path => path.trim_end_matches(".?").to_owned(),
        };
        let message = error.inner().to_string();
        if message.starts_with("unknown field") {
            let mut names = quoted(&message);
            let name = names.next().unwrap_or_default();
            unknown_field(&path, name, names).within(prefix)
        } else {
            DecodeError::new(path, words::plain(&message)).within(prefix)
        }
    })
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
            return Err(unknown_field(
                "",
                name,
                ["apiVersion", "kind", "metadata", "spec", "status"].into_iter(),
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

/// The first field of the input that is missing in what was read from it. Kubernetes' own types
/// ignore what they do not know; in a manifest that is a mistake.
pub(crate) fn ignored_field(input: &Value, output: &Value, path: &str) -> Option<DecodeError> {
    match (input, output) {
        (Value::Object(input), Value::Object(output)) => {
            input
                .iter()
                .find_map(|(name, value)| match output.get(name) {
                    Some(known) => ignored_field(value, known, &join(path, name)),
                    None if is_empty(value) => None,
                    None => Some(unknown_field(path, name, std::iter::empty())),
                })
        }
        (Value::Array(input), Value::Array(output)) => input
            .iter()
            .zip(output)
            .enumerate()
            .find_map(|(index, (input, output))| {
                ignored_field(input, output, &format!("{path}[{index}]"))
            }),
        _ => None,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(entries) => entries.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}
