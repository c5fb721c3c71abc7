//! Run and state folders. `CALI_RUN_DIR` and `CALI_STATE_DIR` move them, so that many nodes fit on one machine.

use std::path::PathBuf;

/// Sockets and other files that do not outlive a boot: `CALI_RUN_DIR`, by default `/var/run/calico`.
pub fn run_dir() -> PathBuf {
    from_env("CALI_RUN_DIR", "/var/run/calico")
}

/// Files that outlive a boot (journal, MTU, node name): `CALI_STATE_DIR`, by default `/var/lib/calico`.
pub fn state_dir() -> PathBuf {
    from_env("CALI_STATE_DIR", "/var/lib/calico")
}

/// The last state of the resources that a program was told by a Typha server, for a start while none answers.
pub fn kept_updates(program: &str) -> PathBuf {
    state_dir().join(format!("updates-{program}.db"))
}

/// Status of `cali-node` ([`crate::status`]).
pub fn node_socket() -> PathBuf {
    run_dir().join("node.sock")
}

/// Status and control of `bgpd` ([`crate::status`]).
pub fn bgpd_socket() -> PathBuf {
    run_dir().join("bgpd.sock")
}

/// Best paths from `bgpd` to `cali-node` ([`crate::routes`]).
pub fn routes_socket() -> PathBuf {
    run_dir().join("routes.sock")
}

/// The CNI server of `cali-node` ([`crate::cni`]); mode 0600.
pub fn cni_socket() -> PathBuf {
    run_dir().join("cni.sock")
}

fn from_env(name: &str, default: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(value) if !value.is_empty() => PathBuf::from(value),
        _ => PathBuf::from(default),
    }
}
