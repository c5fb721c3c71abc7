//! The status socket of `bgpd` ([`cali_control::status`]).

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cali_control::status::{BGP_PROTOCOL, BgpRequest, BgpResponse, VERSION};
use cali_control::{Error, FrameReader, FrameWriter};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::speaker::Speaker;

/// Connections served at once.
const CONNECTIONS: usize = 32;

/// Opens the socket, in place of one that an earlier process left. Its folder is made if it is not there.
/// Everybody may look; who may change something is decided by the folder's mode.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Requests whose answer has not been written yet.
#[derive(Debug, Clone, Default)]
pub struct Answers(Arc<watch::Sender<usize>>);

impl Answers {
    /// Waits until all are answered, a second at most: whoever drains this speaker is told that it was done.
    pub async fn given(&self) {
        let mut open = self.0.subscribe();
        let all = open.wait_for(|open| *open == 0);
        // Late: the asker does not read, and finds the socket closed.
        let _ = tokio::time::timeout(Duration::from_secs(1), all).await;
    }
}

/// Serves requests until dropped.
pub async fn serve(listener: UnixListener, speaker: Speaker, answers: Answers) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let (speaker, answers) = (speaker.clone(), answers.clone());
                connections.spawn(async move {
                    if let Err(error) = converse(stream, &speaker, &answers).await {
                        debug!(%error, "a status connection ended");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept on the status socket");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, speaker: &Speaker, answers: &Answers) -> Result<(), Error> {
    let (read, write) = stream.into_split();
    let mut reader = FrameReader::new(BGP_PROTOCOL, read);
    let mut writer = FrameWriter::new(BGP_PROTOCOL, write);
    writer
        .hello(VERSION, concat!("bgpd ", env!("CARGO_PKG_VERSION")))
        .await?;
    reader.hello().await?;
    while let Some(request) = reader.next::<BgpRequest>().await? {
        answers.0.send_modify(|open| *open += 1);
        let answer = speaker
            .ask(request)
            .await
            .unwrap_or_else(|e| BgpResponse::Error(e.to_string()));
        let sent = writer.send(&answer).await;
        answers.0.send_modify(|open| *open -= 1);
        sent?;
    }
    Ok(())
}
