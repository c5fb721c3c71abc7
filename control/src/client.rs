//! One question to a daemon of this node, over its local socket.

use std::path::Path;
use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::frame::{Error, FrameReader, FrameWriter};

/// Connects, exchanges the hello frames, sends the request and reads one answer, all within `limit`.
///
/// # Errors
/// Nobody listens ([`Error::Unreachable`]), the other side speaks another protocol, or it does not answer in time
/// ([`Error::NoAnswer`]).
pub async fn ask<Q: Serialize + Sync, A: DeserializeOwned>(
    protocol: &'static str,
    version: u32,
    program: &str,
    socket: &Path,
    request: &Q,
    limit: Duration,
) -> Result<A, Error> {
    let conversation = async {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| Error::Unreachable {
                socket: socket.to_owned(),
                source,
            })?;
        let (read, write) = stream.into_split();
        let mut reader = FrameReader::new(protocol, read);
        let mut writer = FrameWriter::new(protocol, write);
        writer.hello(version, program).await?;
        reader.hello().await?;
        writer.send(request).await?;
        reader.expect().await
    };
    tokio::time::timeout(limit, conversation)
        .await
        .unwrap_or_else(|_| {
            Err(Error::NoAnswer {
                socket: socket.to_owned(),
                limit,
            })
        })
}
