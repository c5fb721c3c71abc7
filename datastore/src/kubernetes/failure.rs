//! The API server's refusals as errors of the datastore.

use cali_api::{FieldError, Key, Kind, Revision};
use kube::core::Status;
use serde_json::Value;

use super::Failed;
use crate::error::Error;
use crate::stored;

/// Whether the server says that there is no such object or path.
pub(super) fn is_missing(error: &Failed) -> bool {
    matches!(error, Failed::Api(status) if status.code == 404)
}

/// That another revision stands than the one that was expected.
pub(super) fn conflict(key: &Key, expected: &Revision, now: &Value) -> Error {
    Error::Conflict {
        key: key.clone(),
        expected: expected.clone(),
        found: Revision::from(stored::revision_of(now).unwrap_or_default()),
    }
}

/// What a refused call on an object means.
pub(super) fn failure(verb: &'static str, key: &Key, error: Failed) -> Error {
    let status = match error {
        Failed::Api(status) => status,
        other => return other.unavailable(format!("{verb} {key}")),
    };
    match status.code {
        404 if names_namespace(&status, key) => Error::Unsupported {
            operation: verb,
            key: key.clone(),
            reason: "its namespace does not exist",
        },
        404 if verb == "create" => Error::Unsupported {
            operation: verb,
            key: key.clone(),
            reason: "the cluster does not serve this kind; apply the manifests in deploy/crds",
        },
        404 => Error::NotFound { key: key.clone() },
        409 if status.reason == "AlreadyExists" => Error::AlreadyExists { key: key.clone() },
        409 => Error::Conflict {
            key: key.clone(),
            expected: Revision::from(""),
            found: Revision::from(""),
        },
        400 | 422 => Error::Invalid {
            key: key.clone(),
            fields: fields(&status),
        },
        _ => Failed::Api(status).unavailable(format!("{verb} {key}")),
    }
}

fn names_namespace(status: &Status, key: &Key) -> bool {
    key.kind != Kind::K8sNamespace
        && status
            .details
            .as_ref()
            .is_some_and(|details| details.kind == "namespaces")
}

fn fields(status: &Status) -> Vec<FieldError> {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let mut fields: Vec<FieldError> = causes
        .map(|cause| FieldError {
            path: cause.field.clone(),
            message: cause.message.clone(),
        })
        .collect();
    if fields.is_empty() {
        fields.push(FieldError {
            path: String::new(),
            message: status.message.clone(),
        });
    }
    fields
}
