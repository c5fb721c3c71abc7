//! Brings up containerlab topology files in network namespaces, without containers.
//!
//! A node is a network namespace; its image name decides which programs run in it ([`topology::Role`]): `cali/*`
//! starts our own, `frr`, `bird` and `gobgp` start Debian's daemons unpacked in the cache, everything else runs only
//! its `exec` lines. The file stays valid for containerlab itself. [`plan`] decides, without touching anything, what
//! is to exist; [`bring_up`] makes it so and is idempotent; [`supervise`] keeps the programs running.
//!
//! It does not emulate containers: there is one file system, and paths that a node names under one of its `binds` are
//! rewritten to where they are on the host.

pub mod bring_up;
pub mod plan;
pub mod pods;
pub mod probe;
pub mod state;
pub mod supervise;
pub mod topology;

/// How long something may take: `CALI_LAB_PATIENCE` times as long as on a usual machine, for one that is emulated.
#[must_use]
pub fn patient(limit: std::time::Duration) -> std::time::Duration {
    let factor = std::env::var("CALI_LAB_PATIENCE")
        .ok()
        .and_then(|text| text.parse().ok());
    limit * factor.unwrap_or(1)
}
