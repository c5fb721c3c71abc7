//! Passwords of a node's peers: from a folder, as Kubernetes mounts secrets, and from the cluster's secrets, read by
//! name. The folder counts first.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::warn;
use typha::secrets::{Found, Secrets};

/// How long a first configuration waits for secrets, so that sessions that could begin at once do.
const FIRST: Duration = Duration::from_secs(5);

/// A secret's name and a key in it.
pub type SecretKey = (String, String);

/// Where passwords come from.
#[derive(Debug)]
pub struct Passwords {
    folder: PathBuf,
    cluster: Option<Cluster>,
}

#[derive(Debug)]
struct Cluster {
    secrets: Secrets,
    news: watch::Receiver<Found>,
    /// Until when the first configuration waits.
    patience: Option<Instant>,
}

impl Passwords {
    /// Of a folder, as `FOLDER/SECRET/KEY`.
    #[must_use]
    pub const fn in_folder(folder: PathBuf) -> Self {
        Self {
            folder,
            cluster: None,
        }
    }

    /// Also of the cluster's secrets.
    #[must_use]
    pub fn with_cluster(mut self, secrets: Secrets) -> Self {
        self.cluster = Some(Cluster {
            news: secrets.watch(),
            secrets,
            patience: None,
        });
        self
    }

    /// What is known about these.
    pub(crate) fn read(&self, wanted: &BTreeSet<SecretKey>) -> BTreeMap<SecretKey, String> {
        let mut out = BTreeMap::new();
        let found = self.cluster.as_ref().map(|c| c.secrets.found());
        for of in wanted {
            let text = in_folder(&self.folder, of)
                .or_else(|| found.as_ref().and_then(|found| in_cluster(found, of)));
            if let Some(text) = text {
                out.insert(of.clone(), text.trim_end_matches('\n').to_owned());
            }
        }
        out
    }

    /// From now on the cluster's secrets of these names are followed, and no others. Whether there is nothing to wait
    /// for before a first configuration.
    pub(crate) fn want(&mut self, wanted: &BTreeSet<SecretKey>) -> bool {
        let Some(cluster) = &mut self.cluster else {
            return true;
        };
        let names = wanted.iter().map(|(name, _)| name.clone()).collect();
        cluster.secrets.want(names);
        let patience = *cluster
            .patience
            .get_or_insert_with(|| Instant::now() + FIRST);
        cluster.secrets.is_answered() || Instant::now() >= patience
    }

    /// Resolves when a secret of the cluster has changed; never where they are not followed.
    pub(crate) async fn changed(&mut self) {
        let ended = match &mut self.cluster {
            Some(cluster) => cluster.news.changed().await.is_err(),
            None => true,
        };
        if ended {
            std::future::pending::<()>().await;
        }
    }
}

fn in_folder(folder: &Path, (secret, key): &SecretKey) -> Option<String> {
    // Names come from resources; they must not lead out of the folder.
    let plain = |name: &str| !name.is_empty() && name != ".." && name != "." && !name.contains('/');
    if !plain(secret) || !plain(key) {
        return None;
    }
    match std::fs::read_to_string(folder.join(secret).join(key)) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            warn!(secret, key, %error, "cannot read a password");
            None
        }
    }
}

fn in_cluster(found: &Found, (secret, key): &SecretKey) -> Option<String> {
    let value = found.get(secret)?.as_ref()?.get(key)?;
    match std::str::from_utf8(value) {
        Ok(text) => Some(text.to_owned()),
        Err(error) => {
            warn!(secret, key, %error, "a password is not text");
            None
        }
    }
}
