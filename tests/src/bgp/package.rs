//! Where the other daemons are: unpacked by `scripts/peers` into the cache, each with all its libraries.

use crate::lab::{checked, repository};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

/// Unpacking is done once, by one test.
static UNPACKING: Mutex<()> = Mutex::new(());

/// The folder of an unpacked daemon; `run` in it starts a program with the libraries beside it.
pub fn folder(name: &str) -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    let folder = cache.join("cali/peers").join(name);
    let _one = UNPACKING
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if !folder.join("run").is_file() {
        let script = repository().join("scripts/peers");
        let output = Command::new(&script)
            .arg(name)
            .output()
            .with_context(|| format!("cannot run {}", script.display()))?;
        checked(output, || format!("scripts/peers {name}"))?;
    }
    Ok(folder)
}
