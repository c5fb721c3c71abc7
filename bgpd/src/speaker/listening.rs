//! Listening sockets, each with a task that accepts.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{info, warn};

use super::State;
use super::admission::Verdict;
use crate::session::Command;
use crate::transport::{Connection, Listener};
use crate::wire::Prefix;

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
        let named = self.settings.neighbours.iter();
        let named: Vec<(IpAddr, Option<String>)> = named
            .map(|(peer, n)| (*peer, n.session.protection.password.clone()))
            .collect();
        for (peer, password) in named {
            self.change_key(peer, None, password.as_deref());
        }
        self.protect_ranges();
    }

    /// Changes a neighbour's key on all sockets of its family. The kernel refuses to remove a key that is not there.
    pub(super) fn change_key(&mut self, peer: IpAddr, old: Option<&str>, new: Option<&str>) {
        if old != new
            && let Some(host) = Prefix::new(peer, if peer.is_ipv4() { 32 } else { 128 })
        {
            self.protect(host, new, |listener| listener.set_key(peer, new));
        }
    }

    /// Changes the key of all addresses of a range.
    pub(super) fn change_key_of_range(&mut self, range: Prefix, new: Option<&str>) {
        self.protect(range, new, |listener| {
            listener.set_key_of_prefix(range, new)
        });
    }

    /// Where a key cannot be set, nothing more is accepted: it would not be protected.
    fn protect(
        &mut self,
        peers: Prefix,
        new: Option<&str>,
        set: impl Fn(&dyn Listener) -> std::io::Result<()>,
    ) {
        self.unprotected.remove(&peers);
        for socket in self
            .listening
            .iter()
            .filter(|l| l.address.is_ipv4() == peers.addr().is_ipv4())
        {
            if let Err(error) = set(&*socket.listener) {
                if new.is_some() {
                    self.unprotected.insert(peers);
                }
                warn!(%peers, %error, "cannot set the password on the listening socket");
            }
        }
    }

    /// Hands a connection to the neighbour that it comes from; others are closed.
    pub(super) fn on_accepted(&mut self, connection: Connection) {
        let peer = connection.remote.ip().to_canonical();
        let now = Instant::now();
        if self.unprotected.iter().any(|p| p.contains_addr(peer)) {
            if self.admission.stranger(now) == Verdict::Admit {
                warn!(%peer, "refused a connection: its password could not be set");
            }
            return;
        }
        if !self.neighbours.contains_key(&peer) && !self.welcome(peer) {
            match self.admission.stranger(now) {
                Verdict::Admit => warn!(%peer, "refused a connection: no such neighbour"),
                Verdict::Refuse => {
                    warn!(%peer, "refused many connections of addresses that are no neighbours; the next ones are not named");
                }
                Verdict::RefuseSilently => {}
            }
            return;
        }
        match self.admission.neighbour(peer, now) {
            Verdict::Admit => {}
            Verdict::Refuse => {
                warn!(%peer, "refused a connection: this neighbour opens too many; more of them are refused without a line here");
                return;
            }
            Verdict::RefuseSilently => return,
        }
        self.hand_over(peer, connection);
    }

    fn hand_over(&self, peer: IpAddr, connection: Connection) {
        let Some(running) = self.neighbours.get(&peer) else {
            return;
        };
        let session = &running.config.session;
        if let Some(interface) = &session.interface
            && !self.environment.transport.came_over(&connection, interface)
        {
            warn!(%peer, %interface, "refused a connection: it came over another interface");
            return;
        }
        let hops = session.protection.ttl_hops;
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
