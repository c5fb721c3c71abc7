//! One connection: the byte that says whether a namespace comes along, the greeting, the call, the answer.

use std::io;
use std::time::Duration;

use cali_control::cni::{PROTOCOL, Request, Response, VERSION, WITH_NAMESPACE, WITHOUT_NAMESPACE};
use cali_control::{FrameReader, FrameWriter};
use cali_netlink::{NetNs, fdpass};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::calls::Calls;

/// How long the plugin may take to say what it wants.
const TO_ASK: Duration = Duration::from_secs(10);
const PROGRAM: &str = concat!("cali-node ", env!("CARGO_PKG_VERSION"));

pub(super) async fn serve(stream: UnixStream, calls: &Calls) {
    if let Err(error) = try_serve(stream, calls).await {
        tracing::warn!(error = %error, "a call of the CNI plugin could not be served");
    }
}

async fn try_serve(
    stream: UnixStream,
    calls: &Calls,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (_, uid, _) = fdpass::peer(&stream)?;
    if uid != 0 && uid != own_uid()? {
        return Err(format!("the caller has user id {uid}; only root may call").into());
    }
    let ask = async {
        let netns = namespace(&stream).await?;
        let (reader, writer) = stream.into_split();
        let (mut reader, mut writer) = (
            FrameReader::new(PROTOCOL, reader),
            FrameWriter::new(PROTOCOL, writer),
        );
        reader.hello().await?;
        writer.hello(VERSION, PROGRAM).await?;
        let request: Request = reader.expect().await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>((netns, request, writer))
    };
    let (netns, request, mut writer) = tokio::time::timeout(TO_ASK, ask).await??;
    let started = std::time::Instant::now();
    let result = calls.handle(&request, netns).await;
    let took = started.elapsed();
    match &result {
        Ok(_) => {
            tracing::info!(command = ?request.command, container = request.container_id, interface = request.ifname, ?took, "CNI call served")
        }
        Err(f) => {
            tracing::warn!(command = ?request.command, container = request.container_id, interface = request.ifname, ?took, code = f.code, error = f.msg, details = f.details, "CNI call failed")
        }
    }
    let response = match result {
        Ok(value) => Response::Ok(value),
        Err(failure) => Response::Err(failure),
    };
    writer.send(&response).await?;
    Ok(())
}

/// The user of this process, as the owner of its own entry below `/proc`.
fn own_uid() -> io::Result<u32> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata("/proc/self")?.uid())
}

/// Reads the first byte, and the descriptor that travels with it.
async fn namespace(stream: &UnixStream) -> io::Result<Option<NetNs>> {
    let mut byte = [0];
    let (length, fds) = loop {
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || {
            fdpass::receive(stream, &mut byte).map_err(|e| match e.code() {
                Some(errno) => io::Error::from_raw_os_error(errno as i32),
                None => io::Error::other(e),
            })
        });
        match received {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => break other?,
        }
    };
    let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match (byte[0], fds.into_iter().next()) {
        (WITH_NAMESPACE, Some(fd)) => Ok(Some(NetNs::from_fd(fd))),
        (WITH_NAMESPACE, None) => Err(bad("a namespace was announced and did not come")),
        (WITHOUT_NAMESPACE, _) => Ok(None),
        _ => Err(bad("the first byte is not of this protocol")),
    }
}
