//! One question to a daemon of a node, over its local socket.

use anyhow::Result;
use cali_control::client;
use cali_control::status::{
    BGP_PROTOCOL, BgpRequest, BgpResponse, NODE_PROTOCOL, NodeRequest, NodeResponse, VERSION,
};
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;
use std::time::Duration;

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

async fn ask<Q: Serialize + Sync, A: DeserializeOwned>(
    protocol: &'static str,
    socket: &Path,
    request: &Q,
) -> Result<A> {
    let answer = client::ask(
        protocol,
        VERSION,
        concat!("calictl ", env!("CARGO_PKG_VERSION")),
        socket,
        request,
        cali_lab::patient(LIMIT),
    );
    Ok(answer.await?)
}

/// Nobody listens: the daemon does not run (as opposed to: it does not answer).
pub(crate) fn nobody_listens(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind as Kind;
    let kinds = [Kind::NotFound, Kind::ConnectionRefused];
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|error| kinds.contains(&error.kind()))
}
