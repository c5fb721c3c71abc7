//! One question to a daemon of a node, over its local socket.

use anyhow::{Context, Result};
use cali_control::frame::{FrameReader, FrameWriter};
use cali_control::status::{
    BGP_PROTOCOL, BgpRequest, BgpResponse, NODE_PROTOCOL, NodeRequest, NodeResponse, VERSION,
};
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Asks `cali-node`.
pub(crate) async fn node(run_dir: &Path, request: NodeRequest) -> Result<NodeResponse> {
    ask(NODE_PROTOCOL, &run_dir.join("node.sock"), &request).await
}

/// Asks `bgpd`.
pub(crate) async fn bgp(run_dir: &Path, request: BgpRequest) -> Result<BgpResponse> {
    ask(BGP_PROTOCOL, &run_dir.join("bgpd.sock"), &request).await
}

async fn ask<Q: Serialize, A: DeserializeOwned>(
    protocol: &'static str,
    socket: &Path,
    request: &Q,
) -> Result<A> {
    let conversation = async {
        let stream = UnixStream::connect(socket)
            .await
            .with_context(|| format!("cannot reach {}", socket.display()))?;
        let (read, write) = stream.into_split();
        let (mut reader, mut writer) = (
            FrameReader::new(protocol, read),
            FrameWriter::new(protocol, write),
        );
        writer
            .hello(VERSION, concat!("calictl ", env!("CARGO_PKG_VERSION")))
            .await?;
        reader.hello().await?;
        writer.send(request).await?;
        Ok(reader.expect().await?)
    };
    tokio::time::timeout(cali_lab::patient(LIMIT), conversation)
        .await
        .with_context(|| {
            format!(
                "no answer from {} within {} s",
                socket.display(),
                LIMIT.as_secs()
            )
        })?
}
