//! What can go wrong at the datastore, always naming the object or the operation.

use cali_api::{FieldError, Key, Revision};

/// The cause below an [`Error`], whatever the back end calls it.
pub type Cause = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Error of every [`crate::Datastore`] operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The object does not exist.
    #[error("{key} does not exist")]
    NotFound {
        /// The object that was asked for.
        key: Key,
    },
    /// `create` met an object of the same name.
    #[error("{key} exists already")]
    AlreadyExists {
        /// The object that stands there.
        key: Key,
    },
    /// Compare-and-swap failed: somebody else wrote in between.
    #[error(
        "{key} was changed by somebody else: revision {expected} was expected, {found} is stored"
    )]
    Conflict {
        /// The object that was to be written.
        key: Key,
        /// The revision the caller had read.
        expected: Revision,
        /// The revision that is stored now.
        found: Revision,
    },
    /// The object breaks a rule of its kind, or a rule between objects.
    #[error("{key} is not valid: {}", join(fields))]
    Invalid {
        /// The refused object.
        key: Key,
        /// Each broken rule with the path of its field.
        fields: Vec<FieldError>,
    },
    /// The operation was asked in a way that the datastore does not take.
    #[error("cannot {operation} {key}: {reason}")]
    Unsupported {
        /// `create`, `update` and so on.
        operation: &'static str,
        /// The object it was asked for.
        key: Key,
        /// What is wrong with the request.
        reason: &'static str,
    },
    /// The change log does not reach back that far (or the store is another one): list again.
    #[error("revision {revision} is no longer in the change log")]
    RevisionGone {
        /// The revision a watch was to start from.
        revision: Revision,
    },
    /// A stored object cannot be read as its kind.
    #[error("{key} cannot be decoded: {reason}")]
    Undecodable {
        /// The object.
        key: Key,
        /// Why not.
        reason: String,
    },
    /// The back end cannot be reached, or failed.
    #[error("datastore cannot {operation}")]
    Unavailable {
        /// What was tried.
        operation: String,
        /// The back end's own error.
        source: Cause,
    },
    /// The environment names no usable datastore.
    #[error("{variable}: {reason}")]
    Configuration {
        /// The environment variable.
        variable: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// True if the same call can succeed later without a change by the caller.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    pub(crate) fn unavailable(operation: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Unavailable {
            operation: operation.into(),
            source: source.into(),
        }
    }
}

fn join(fields: &[FieldError]) -> String {
    fields
        .iter()
        .map(|f| format!("{}: {}", f.path, f.message))
        .collect::<Vec<_>>()
        .join("; ")
}
