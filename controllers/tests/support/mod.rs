//! The real program over the embedded store.

use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A running replica; killed when dropped.
pub(crate) struct Replica(Child);

impl Replica {
    pub(crate) fn start(database: &Path, name: &str) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_cali-controllers"))
            .args(["--name", name, "--lease-seconds", "1"])
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", database)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
