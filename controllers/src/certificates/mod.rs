//! Certificates between Typha and the nodes: made, renewed, and their authority rotated, in Secrets that the manifests lay down empty.
//!
//! | Secret | where | what |
//! |---|---|---|
//! | `cali-ca-private` | a namespace of its own, which only the controllers may read | the authority: `tls.crt`, `tls.key`; while it changes, `next.crt`, `next.key`, `previous.crt` |
//! | `typha-certs`, `node-certs` | beside the daemons | `tls.crt`, `tls.key`, and `ca.crt`: every authority that is trusted |
//!
//! The names of the latter two and of the subjects (`typha-server`, `typha-client`) are those of Calico's operator.
//!
//! - [`plan`] decides, from what the Secrets hold and the time, which single step comes next; it knows no clock and no network.
//! - [`pair`] makes and reads certificates. [`keep`] reads the Secrets, takes steps and writes by compare-and-swap.
//!
//! Invariants:
//! - **Overlap.** A new authority is trusted by both sides for [`Lifetimes::settle`] before anything is signed with it, and the former
//!   one is trusted for as long after nothing of it is in use. So two ends that are at most `settle` behind always accept each other.
//! - **What a user brought stays.** Everything that is written carries a digest of itself as annotation. Values that do not fit their
//!   digest are somebody else's, and are never written over.
//!
//! What it does not do: hand certificates to the daemons. They mount the Secrets, and read files that have changed (`typha::tls`).

pub mod keep;
mod pair;
pub mod plan;

use std::time::Duration;

use cali_datastore::SecretObject;
use sha2::{Digest, Sha256};

/// The Secret of the authority.
pub const AUTHORITY: &str = "cali-ca-private";
/// Digest of the values that we wrote.
const DIGEST: &str = "projectcalico.org/made-by-cali-controllers";
/// When we wrote them, in seconds since 1970.
const WRITTEN: &str = "projectcalico.org/written-at";

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const TRUSTED: &str = "ca.crt";
const NEXT: (&str, &str) = ("next.crt", "next.key");
const PREVIOUS: &str = "previous.crt";

/// Whose certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// Servers.
    Typha,
    /// Their clients: `cali-node` and its `bgpd`.
    Node,
}

impl End {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Typha, Self::Node];

    /// Name of its Secret.
    #[must_use]
    pub const fn secret(self) -> &'static str {
        match self {
            Self::Typha => "typha-certs",
            Self::Node => "node-certs",
        }
    }

    /// Common name of its certificate.
    #[must_use]
    pub const fn common_name(self) -> &'static str {
        match self {
            Self::Typha => "typha-server",
            Self::Node => "typha-client",
        }
    }
}

/// How long things hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    /// Of a certificate; it is renewed after two thirds, or up to a tenth of it earlier.
    pub certificate: Duration,
    /// Of an authority; its successor is introduced likewise. At least four times that of a certificate.
    pub authority: Duration,
    /// How long a Secret may take to reach every daemon (the kubelet needs a minute or two), with what a node may be cut off.
    /// At most a quarter of a certificate's.
    pub settle: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            certificate: 90 * day,
            authority: 365 * day,
            settle: day,
        }
    }
}

impl Lifetimes {
    /// Whether one can be followed by the other without a gap.
    ///
    /// # Errors
    /// Why not.
    pub fn check(self) -> Result<Self, String> {
        if self.settle.is_zero() || self.settle > self.certificate / 4 {
            return Err(format!(
                "settling for {} s must be more than 0 and at most a quarter of a certificate's {} s",
                self.settle.as_secs(),
                self.certificate.as_secs()
            ));
        }
        if self.authority < self.certificate * 4 {
            return Err(format!(
                "an authority's {} s must be at least four times a certificate's {} s",
                self.authority.as_secs(),
                self.certificate.as_secs()
            ));
        }
        Ok(self)
    }
}

/// What the Secrets hold; `None` for one that is not there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// [`AUTHORITY`].
    pub authority: Option<SecretObject>,
    /// That of [`End::Typha`].
    pub typha: Option<SecretObject>,
    /// That of [`End::Node`].
    pub node: Option<SecretObject>,
}

impl State {
    /// The Secret of an end.
    #[must_use]
    pub const fn of(&self, end: End) -> Option<&SecretObject> {
        match end {
            End::Typha => self.typha.as_ref(),
            End::Node => self.node.as_ref(),
        }
    }
}

/// Who wrote the values of a Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// It has none.
    Nobody,
    /// They are as we wrote them.
    Us,
    /// Somebody else.
    User,
}

fn owner(secret: &SecretObject) -> Owner {
    if secret.data.values().all(Vec::is_empty) {
        Owner::Nobody
    } else if secret.annotations.get(DIGEST) == Some(&digest(&secret.data)) {
        Owner::Us
    } else {
        Owner::User
    }
}

/// Of all values with their names and lengths.
fn digest(data: &cali_datastore::Secret) -> String {
    let mut hash = Sha256::new();
    for (name, value) in data {
        for part in [name.as_bytes(), value] {
            hash.update(part.len().to_be_bytes());
            hash.update(part);
        }
    }
    hash.finalize()
        .iter()
        .map(|octet| format!("{octet:02x}"))
        .collect()
}

#[cfg(test)]
mod plan_tests;
