//! The socket on which `bgpd` hands its best paths to the route table (`cali_control::routes`).
//!
//! One `bgpd` at a time: a new connection takes the place of the former one. The end of a connection removes nothing.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use cali_control::routes::{BestPath, Failed, Family, PROTOCOL, ToBgpd, ToNode, VERSION};
use cali_control::{Error, FrameReader, FrameWriter};
use cali_routes::{Candidate, Input, NextHop, RouteSpec, Source, Writer, WriterGone};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// Name and version in the hello.
const PROGRAM: &str = concat!("cali-node ", env!("CARGO_PKG_VERSION"));

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Socket(#[from] Error),
    #[error(transparent)]
    Writer(#[from] WriterGone),
}

/// Binds a unix socket in place of what an earlier process left, with the given mode.
pub fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Accepts `bgpd` until dropped by its owner.
pub async fn serve(listener: UnixListener, writer: Writer) {
    let mut session: Option<JoinHandle<()>> = None;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept bgpd");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        if let Some(former) = session.take() {
            // A session that has ended is not disturbed by this. One that runs must have ended before the new one begins.
            former.abort();
            let _ = former.await;
        }
        let writer = writer.clone();
        session = Some(tokio::spawn(async move {
            match converse(stream, &writer).await {
                Ok(()) => tracing::info!("bgpd has disconnected; its routes stay"),
                Err(error) => tracing::warn!(%error, "connection to bgpd lost; its routes stay"),
            }
        }));
    }
}

async fn converse(stream: UnixStream, writer: &Writer) -> Result<(), SessionError> {
    let (reader, sender) = stream.into_split();
    let mut reader = FrameReader::new(PROTOCOL, reader);
    let mut sender = FrameWriter::new(PROTOCOL, sender);
    let hello = reader.hello().await?;
    sender.hello(VERSION, PROGRAM).await?;
    tracing::info!(
        program = hello.program,
        version = hello.version,
        "bgpd has connected"
    );
    writer.send(vec![Input::BgpStarted]).await?;
    while let Some(message) = reader.next::<ToNode>().await? {
        match message {
            ToNode::Update {
                sequence,
                announced,
                withdrawn,
            } => {
                let withdrawn = withdrawn
                    .into_iter()
                    .map(|prefix| Input::Remove(Source::Bgp, prefix));
                let inputs = announced.into_iter().map(input).chain(withdrawn).collect();
                let failed = writer.apply(inputs).await?;
                let failed = failed
                    .into_iter()
                    .map(|f| Failed {
                        prefix: f.prefix,
                        reason: f.reason,
                    })
                    .collect();
                sender.send(&ToBgpd::Applied { sequence, failed }).await?;
            }
            ToNode::EndOfSync(family) => {
                writer
                    .send(vec![Input::BgpEndOfSync {
                        v4: family == Family::Ipv4,
                    }])
                    .await?;
            }
        }
    }
    Ok(())
}

fn input(path: BestPath) -> Input {
    let hops = path.next_hops.into_iter().map(|hop| NextHop {
        address: hop.address,
        interface: hop.interface.map(Into::into),
    });
    let candidate = Candidate::new(
        RouteSpec::NextHops(hops.collect()),
        format!("BGP peer {}", path.learned_from),
    );
    Input::Set(Source::Bgp, path.prefix, candidate)
}
