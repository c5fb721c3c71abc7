//! Why an address could not be given, kept or returned.

use std::net::IpAddr;

use cali_api::Cidr;

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
    /// Somebody else kept writing the same object.
    #[error("cannot {operation}: gave up after {attempts} conflicting writes")]
    Contention {
        /// What was tried.
        operation: String,
        /// How often.
        attempts: usize,
    },
    /// No pool may be used for this request.
    #[error("no {family} pool can be used{reason}")]
    NoPool {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// Which rules excluded the pools.
        reason: String,
    },
    /// The pools that may be used are full, or the node has reached its limit of blocks.
    #[error("no free {family} address in {pools}{reason}")]
    Exhausted {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// Names of the pools.
        pools: String,
        /// What else stood in the way.
        reason: String,
    },
    /// A pool named by an annotation or the configuration does not exist.
    #[error("pool {name:?} does not exist or does not hold {family} addresses")]
    UnknownPool {
        /// The name or CIDR as given.
        name: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// The address lies in no pool.
    #[error("{address} is in no enabled pool")]
    NotInPool {
        /// The address.
        address: IpAddr,
    },
    /// The address belongs to somebody else.
    #[error("{address} is in use by {holder}")]
    InUse {
        /// The address.
        address: IpAddr,
        /// The handle, or what else is known of the owner.
        holder: String,
    },
    /// The block belongs to another node and addresses may not be borrowed.
    #[error("{address} lies in block {block} of {owner}, and strictAffinity forbids to borrow it")]
    ForeignBlock {
        /// The address.
        address: IpAddr,
        /// Its block.
        block: Cidr,
        /// The block's owner.
        owner: String,
    },
    /// Somebody has locked the datastore, to move or to mend it.
    #[error(
        "the datastore is locked (ClusterInformation default, datastoreReady: false), no addresses are given out until it is unlocked: calictl datastore unlock"
    )]
    Locked,
    /// The configuration contradicts itself.
    #[error("IPAMConfiguration(default): {0}")]
    Configuration(&'static str),
    /// The journal of the node's reserve cannot be read or written.
    #[error("cannot {operation} the address journal {path}")]
    Journal {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The journal was written by another program or a newer version.
    #[error("the address journal {path} is not usable: {reason}")]
    ForeignJournal {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The daemon is stopping.
    #[error("address management is shutting down")]
    Closed,
}

impl Error {
    /// True if the same request can succeed a little later: the datastore is away, or others are writing.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Datastore { source, .. } => source.is_transient(),
            Self::Contention { .. } | Self::Closed | Self::Locked => true,
            _ => false,
        }
    }

    pub(crate) fn datastore(
        operation: impl Into<String>,
    ) -> impl FnOnce(cali_datastore::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Datastore { operation, source }
    }
}

pub(crate) fn family(v4: bool) -> &'static str {
    if v4 { "IPv4" } else { "IPv6" }
}
