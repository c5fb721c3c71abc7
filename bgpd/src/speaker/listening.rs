//! Listening sockets, each with a task that accepts.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::State;
use crate::session::Command;
use crate::transport::{Connection, Listener};

/// Wait after a failed accept, so that a lack of descriptors does not become a busy loop.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// One listening socket.
pub(super) struct Listening {
    pub(super) address: SocketAddr,
    listener: Arc<dyn Listener>,
    task: JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: Arc<dyn Listener>, accepted: mpsc::Sender<Connection>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                if accepted.send(connection).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!(address = %listener.local(), %error, "cannot accept");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

impl State {
    /// Opens the sockets that the settings name and closes others. A socket that cannot be opened is tried
    /// again with the next settings; sessions that we dial do without.
    pub(super) async fn listen(&mut self) {
        let wanted = self.settings.listen.clone();
        self.listening.retain(|l| wanted.contains(&l.address));
        for address in wanted {
            if self.listening.iter().any(|l| l.address == address) {
                continue;
            }
            match self.environment.transport.listen(address).await {
                Ok(listener) => {
                    let listener: Arc<dyn Listener> = Arc::from(listener);
                    info!(%address, "listening");
                    let task = tokio::spawn(accept(Arc::clone(&listener), self.accepted.0.clone()));
                    self.listening.push(Listening {
                        address,
                        listener,
                        task,
                    });
                }
                Err(error) => warn!(%address, %error, "cannot listen"),
            }
        }
        for (peer, neighbour) in &self.settings.neighbours {
            self.change_key(
                *peer,
                None,
                neighbour.session.protection.password.as_deref(),
            );
        }
    }

    /// Changes a neighbour's key on all sockets of its family. The kernel refuses to remove a key that is not there.
    pub(super) fn change_key(&self, peer: IpAddr, old: Option<&str>, new: Option<&str>) {
        if old == new {
            return;
        }
        for socket in self
            .listening
            .iter()
            .filter(|l| l.address.is_ipv4() == peer.is_ipv4())
        {
            if let Err(error) = socket.listener.set_key(peer, new) {
                warn!(%peer, %error, "cannot set the password on the listening socket");
            }
        }
    }

    /// Hands a connection to the neighbour that it comes from; others are closed.
    pub(super) fn on_accepted(&mut self, connection: Connection) {
        let peer = connection.remote.ip().to_canonical();
        let Some(running) = self.neighbours.get(&peer) else {
            warn!(%peer, "refused a connection: no such neighbour");
            return;
        };
        let hops = running.config.session.protection.ttl_hops;
        if let Some(hops) = hops
            && let Err(error) = connection.stream.guard_ttl(hops)
        {
            warn!(%peer, %error, "refused a connection: its TTL cannot be guarded");
            return;
        }
        // A neighbour that does not keep up with its commands can do without one more connection.
        if running
            .commands
            .try_send(Command::Accepted(connection))
            .is_err()
        {
            warn!(%peer, "refused a connection: too many");
        }
    }
}
