//! `calictl version`: of this program, and of what runs in the cluster.

use crate::{connection, output};
use anyhow::{Context, Result};
use cali_api::{AnyResource, Key, Kind};
use clap::Args;
use std::time::Duration;

#[derive(Debug, Args)]
pub(crate) struct Version {
    /// Only this program's, without asking the datastore
    #[arg(long)]
    client: bool,
    /// Ask again after so many seconds, until it is ended
    #[arg(long, value_name = "SECONDS", conflicts_with = "client")]
    poll: Option<u64>,
}

/// What needs no datastore; nothing is started for it. The commit is that of `CALI_COMMIT` at build time, if any.
pub(crate) fn client() -> String {
    let mut text = format!("Client Version:    v{}\n", env!("CARGO_PKG_VERSION"));
    if let Some(commit) = option_env!("CALI_COMMIT").filter(|commit| !commit.is_empty()) {
        text.push_str(&format!("Git commit:        {commit}\n"));
    }
    text
}

impl Version {
    pub(crate) const fn needs_no_datastore(&self) -> bool {
        self.client
    }
}

pub(crate) async fn run(version: &Version) -> Result<()> {
    output::write(client());
    loop {
        output::write(cluster().await?);
        let Some(seconds) = version.poll else {
            return Ok(());
        };
        tokio::time::sleep(Duration::from_secs(seconds.max(1))).await;
    }
}

async fn cluster() -> Result<String> {
    let store = connection::open().await?;
    let key = Key::cluster(Kind::ClusterInformation, "default");
    let found = store
        .get(&key)
        .await
        .context("Unable to detect installed Calico version")?;
    let AnyResource::ClusterInformation(info) = &*found.object else {
        anyhow::bail!("Unable to detect installed Calico version: {key} is no ClusterInformation");
    };
    Ok(format!(
        "Cluster Version:   {}\nCluster Type:      {}\n",
        info.spec.calico_version, info.spec.cluster_type
    ))
}
