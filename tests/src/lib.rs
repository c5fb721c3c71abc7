//! End-to-end tests: the built programs, driven as a person drives them, watched through the kernel's own tools.
//!
//! [`lab`] brings a topology up under a name of its own and takes it away again, also when a test fails;
//! [`kernel`] reads and compares a node's kernel state, [`table`] finds routes in it; [`traffic`] counts lost packets by
//! sequence number; [`wire`] looks at the frames of a link; [`soak`] kills simulated nodes that share a
//! cluster's addresses; [`cluster`] is a node on a real API server, [`cni`] calls the plugin as a container runtime does, [`relay`] lets a
//! namespace reach a server of loopback; [`container`] starts containers of the image as the manifests say;
//! [`k3s`] is a whole cluster of Kubernetes' own programs, laid out as k3s lays it out.

mod arrows;
pub mod bgp;
pub mod cluster;
pub mod cni;
pub mod container;
mod documentation;
pub mod k3s;
pub mod kernel;
pub mod lab;
mod observability;
mod references;
pub mod relay;
pub mod soak;
#[cfg(test)]
mod sources;
pub mod table;
pub mod traffic;
pub mod wire;

use std::time::{Duration, Instant};

pub use cali_netlink::testing::patient;

/// Waits until the condition yields a value, looking every 10 ms. The error is what the condition said last.
pub fn eventually<T>(
    limit: Duration,
    mut condition: impl FnMut() -> Result<T, String>,
) -> Result<(T, Duration), String> {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return Ok((value, start.elapsed())),
            Err(last) if start.elapsed() >= limit => {
                return Err(format!("not within {limit:?}: {last}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}
