//! The repository's own files, for tests that hold one kind of them against another.

use std::path::{Path, PathBuf};

/// Beginnings of our metrics' names.
pub(crate) const METRICS: [&str; 5] = ["felix_", "typha_", "bgp_", "cali_", "ipam_"];

/// All files below a folder whose names end so.
pub(crate) fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|end| end == extension) {
            found.push(path);
        }
    }
    found
}
