//! Connections inside one process, for tests on virtual time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::{Mutex as AsyncMutex, mpsc};

use super::{Connection, Listener, Target, Transport};
use crate::wire::Prefix;

/// Bytes that one end may be ahead of the other.
const WINDOW: usize = 64 * 1024;

type Listeners = BTreeMap<SocketAddr, mpsc::Sender<Connection>>;

/// A network that joins speakers of one process.
#[derive(Debug, Clone, Default)]
pub struct Network {
    listeners: Arc<Mutex<Listeners>>,
}

impl Network {
    /// The transport of the speaker with these addresses.
    #[must_use]
    pub fn host(&self, addresses: &[IpAddr]) -> Host {
        Host {
            network: self.clone(),
            addresses: addresses.to_vec(),
        }
    }

    fn listeners(&self) -> std::sync::MutexGuard<'_, Listeners> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One speaker's access to a [`Network`].
#[derive(Debug, Clone)]
pub struct Host {
    network: Network,
    addresses: Vec<IpAddr>,
}

#[async_trait]
impl Transport for Host {
    async fn dial(&self, target: &Target) -> io::Result<Connection> {
        let same_family = |a: &&IpAddr| a.is_ipv4() == target.remote.is_ipv4();
        let source = target
            .source
            .or_else(|| self.addresses.iter().find(same_family).copied());
        let local = SocketAddr::new(source.ok_or(io::ErrorKind::AddrNotAvailable)?, 40000);
        let listener = self.network.listeners().get(&target.remote).cloned();
        let listener = listener.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (near, far) = tokio::io::duplex(WINDOW);
        let accepted = Connection {
            stream: Box::new(far),
            local: target.remote,
            remote: local,
        };
        listener
            .send(accepted)
            .await
            .map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Connection {
            stream: Box::new(near),
            local,
            remote: target.remote,
        })
    }

    async fn listen(&self, address: SocketAddr) -> io::Result<Box<dyn Listener>> {
        let (sender, receiver) = mpsc::channel(64);
        for ip in self
            .addresses
            .iter()
            .filter(|ip| ip.is_ipv4() == address.is_ipv4())
        {
            self.network
                .listeners()
                .insert(SocketAddr::new(*ip, address.port()), sender.clone());
        }
        Ok(Box::new(MemoryListener {
            address,
            receiver: AsyncMutex::new(receiver),
        }))
    }
}

struct MemoryListener {
    address: SocketAddr,
    receiver: AsyncMutex<mpsc::Receiver<Connection>>,
}

#[async_trait]
impl Listener for MemoryListener {
    async fn accept(&self) -> io::Result<Connection> {
        let mut receiver = self.receiver.lock().await;
        receiver
            .recv()
            .await
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn set_key(&self, _peer: IpAddr, _password: Option<&str>) -> io::Result<()> {
        Ok(())
    }

    fn set_key_of_prefix(&self, _peers: Prefix, _password: Option<&str>) -> io::Result<()> {
        Ok(())
    }

    fn local(&self) -> SocketAddr {
        self.address
    }
}
