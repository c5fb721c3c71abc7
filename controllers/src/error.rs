//! Why the controllers could not do something.

/// Error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The datastore refused or failed.
    #[error("cannot {operation}")]
    Datastore {
        /// What was tried.
        operation: String,
        /// The datastore's error.
        source: cali_datastore::Error,
    },
    /// Address management failed.
    #[error("cannot {operation}")]
    Ipam {
        /// What was tried.
        operation: String,
        /// Its error.
        source: Box<cali_ipam::Error>,
    },
    /// The lock holds something that is no lease.
    #[error("the lock {lock} holds no lease: {reason}")]
    ForeignLease {
        /// The object.
        lock: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make what belongs into Secret {secret}: {reason}")]
    Certificate {
        /// Namespace and name.
        secret: String,
        /// What is wrong.
        reason: String,
    },
    /// A setting cannot be used.
    #[error("{name}: {reason}")]
    Setting {
        /// The environment variable or field.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    pub(crate) fn datastore(
        operation: impl Into<String>,
    ) -> impl FnOnce(cali_datastore::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Datastore { operation, source }
    }

    pub(crate) fn ipam(operation: impl Into<String>) -> impl FnOnce(cali_ipam::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Ipam {
            operation,
            source: Box::new(source),
        }
    }
}
