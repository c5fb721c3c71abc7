//! Durable notes of `DEL` calls that the server could not take: a file for each, replayed and removed by the server.

use std::io;
use std::path::{Path, PathBuf};

use cali_control::cni::Request;
use serde::{Deserialize, Serialize};

use crate::durable;

const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Tombstone {
    version: u32,
    request: Request,
}

/// The folder of the tombstones of a node.
pub fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join("cni-tombstones")
}

/// Leaves a tombstone. It is on the disk when this returns. The same call again replaces it.
pub fn leave(folder: &Path, request: &Request) -> io::Result<()> {
    let name = format!("{}_{}.json", request.container_id, request.ifname);
    let tombstone = Tombstone {
        version: VERSION,
        request: request.clone(),
    };
    durable::replace(folder, &name, &serde_json::to_vec(&tombstone)?)
}

/// A tombstone that was found.
#[derive(Debug)]
pub struct Found {
    path: PathBuf,
    /// The call; `None` if the file is not readable as one.
    pub request: Option<Request>,
}

impl Found {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The call has been carried out.
    pub fn remove(self) -> io::Result<()> {
        std::fs::remove_file(self.path)
    }
}

/// All tombstones.
pub fn all(folder: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for path in durable::files(folder)? {
        let text = std::fs::read(&path)?;
        let tombstone: Option<Tombstone> = serde_json::from_slice(&text).ok();
        let request = tombstone
            .filter(|t| t.version == VERSION)
            .map(|t| t.request);
        found.push(Found { path, request });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use cali_control::cni::{Command, Plugin};

    use super::*;

    #[test]
    fn a_tombstone_is_found_once_until_it_is_removed() {
        let state = tempfile::tempdir().unwrap();
        let folder = folder(state.path());
        assert!(all(&folder).unwrap().is_empty());
        let request = Request {
            plugin: Plugin::Network,
            command: Command::Del,
            container_id: "abc".into(),
            ifname: "eth0".into(),
            netns: String::new(),
            args: [("K8S_POD_NAME".to_owned(), "p".to_owned())].into(),
            config: serde_json::json!({"name": "n"}),
            delegated: None,
        };
        leave(&folder, &request).unwrap();
        leave(&folder, &request).unwrap();
        std::fs::write(folder.join("bad.json"), "{").unwrap();
        let mut found = all(&folder).unwrap();
        found.sort_by_key(|f| f.path().to_owned());
        assert_eq!(
            found
                .iter()
                .map(|f| f.request.is_some())
                .collect::<Vec<_>>(),
            [true, false]
        );
        assert_eq!(found[0].request.as_ref(), Some(&request));
        for one in found {
            one.remove().unwrap();
        }
        assert!(all(&folder).unwrap().is_empty());
    }
}
