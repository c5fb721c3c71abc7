//! Where connections come from: TCP in production, memory in tests.
//!
//! Everything above this module sees only [`Transport`], [`Listener`] and [`Connection`], so that speakers
//! can be run against each other in one process on virtual time.

pub mod memory;
pub mod tcp;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::bfd::monitor::{Monitor, Report};
use crate::wire::Prefix;

/// A byte stream between two speakers.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {
    /// From now on, takes only what comes from at most this many hops away (RFC 5082).
    fn guard_ttl(&self, hops: u8) -> io::Result<()>;
}

impl Stream for tokio::io::DuplexStream {
    fn guard_ttl(&self, _hops: u8) -> io::Result<()> {
        Ok(())
    }
}

/// An open connection and its ends.
pub struct Connection {
    /// The bytes.
    pub stream: Box<dyn Stream>,
    /// Our end.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} -> {})", self.local, self.remote)
    }
}

/// What a dial needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The peer.
    pub remote: SocketAddr,
    /// The source address to bind, if it is fixed.
    pub source: Option<IpAddr>,
    /// The interface of a link-local peer.
    pub interface: Option<Arc<str>>,
    /// How packets are protected.
    pub protection: Protection,
}

/// Protection of a peer's packets, the same on the dialled socket and on the listener.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Protection {
    /// TCP MD5 key (RFC 2385).
    pub password: Option<String>,
    /// Most hops to the peer, checked by TTL (RFC 5082).
    pub ttl_hops: Option<u8>,
}

impl std::fmt::Debug for Protection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Protection")
            .field("password", &self.password.as_ref().map(|_| "..."))
            .field("ttl_hops", &self.ttl_hops)
            .finish()
    }
}

/// Opens and awaits connections.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Dials a peer.
    async fn dial(&self, target: &Target) -> io::Result<Connection>;
    /// Starts to listen.
    async fn listen(&self, address: SocketAddr) -> io::Result<Box<dyn Listener>>;
    /// Whether a connection came in over the interface of this name.
    fn came_over(&self, connection: &Connection, interface: &str) -> bool {
        let _ = (connection, interface);
        true
    }
    /// Starts to watch paths by BFD, where this transport has paths that can be watched.
    fn watch_paths(&self, seed: u64) -> io::Result<Option<(Monitor, mpsc::Receiver<Report>)>> {
        let _ = seed;
        Ok(None)
    }
}

/// A listening socket.
#[async_trait]
pub trait Listener: Send + Sync {
    /// The next connection.
    async fn accept(&self) -> io::Result<Connection>;
    /// Sets the key that a peer must use; `None` takes it away. An error means that connections of this
    /// peer would not be protected, and must not be taken.
    fn set_key(&self, peer: IpAddr, password: Option<&str>) -> io::Result<()>;
    /// The same for all peers of a prefix that have no key of their own.
    fn set_key_of_prefix(&self, peers: Prefix, password: Option<&str>) -> io::Result<()>;
    /// The address that is listened on.
    fn local(&self) -> SocketAddr;
}
