//! TCP connections of the network namespace that the process runs in.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;

use super::{Connection, Listener, Stream, Target, Transport};
use crate::bfd::monitor::{Monitor, Report};
use crate::wire::Prefix;

/// Pending connections that the kernel keeps: hundreds of nodes may come back at once.
const BACKLOG: i32 = 4096;
/// DSCP CS6, "internetwork control" (RFC 2474 §4.2.2.2, RFC 4594 §3.2).
const TOS_NETWORK_CONTROL: u32 = 0xc0;

/// The host's TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tcp;

fn new_socket(peer: &SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(*peer),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    set_ttl(&socket, peer.is_ipv4())?;
    if peer.is_ipv4() {
        socket.set_tos_v4(TOS_NETWORK_CONTROL)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_tclass_v6(TOS_NETWORK_CONTROL)?;
    }
    Ok(socket)
}

/// All packets leave with 255, so that any peer can tell how far we are (RFC 5082).
fn set_ttl(socket: &Socket, v4: bool) -> io::Result<()> {
    if v4 {
        socket.set_ttl_v4(255)
    } else {
        socket.set_unicast_hops_v6(255)
    }
}

fn guard_ttl(socket: impl AsFd, v4: bool, hops: u8) -> io::Result<()> {
    let minimum = 255 - hops.saturating_sub(1);
    cali_netlink::tcp::set_minimum_ttl(socket, v4, minimum).map_err(io::Error::other)
}

impl Stream for TcpStream {
    fn guard_ttl(&self, hops: u8) -> io::Result<()> {
        guard_ttl(self, self.peer_addr()?.is_ipv4(), hops)
    }
}

#[async_trait]
impl Transport for Tcp {
    async fn dial(&self, target: &Target) -> io::Result<Connection> {
        let socket = new_socket(&target.remote)?;
        let scope = target
            .interface
            .as_deref()
            .map(interface_index)
            .transpose()?;
        let remote = scoped(target.remote, scope);
        if let Some(source) = target.source {
            socket.bind(&scoped(SocketAddr::new(source, 0), scope).into())?;
        }
        if let Some(hops) = target.protection.ttl_hops {
            guard_ttl(&socket, target.remote.is_ipv4(), hops)?;
        }
        if let Some(password) = &target.protection.password {
            cali_netlink::tcp::set_md5_key(&socket, target.remote.ip(), Some(password.as_bytes()))
                .map_err(io::Error::other)?;
        }
        let socket = TcpSocket::from_std_stream(socket.into());
        let stream = socket.connect(remote).await?;
        connection(stream)
    }

    fn came_over(&self, connection: &Connection, interface: &str) -> bool {
        let SocketAddr::V6(remote) = connection.remote else {
            return true;
        };
        remote.scope_id() == 0 || interface_index(interface).is_ok_and(|i| i == remote.scope_id())
    }

    fn watch_paths(&self, seed: u64) -> io::Result<Option<(Monitor, mpsc::Receiver<Report>)>> {
        Monitor::start(seed).map(Some)
    }

    async fn listen(&self, address: SocketAddr) -> io::Result<Box<dyn Listener>> {
        let socket = new_socket(&address)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from_std(socket.into())?;
        let local = listener.local_addr()?;
        Ok(Box::new(Listening { listener, local }))
    }
}

/// The number that the kernel has for an interface now; it may be another one after the interface was made anew.
fn interface_index(name: &str) -> io::Result<u32> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|errno| io::Error::other(format!("interface {name:?}: {}", errno.desc())))
}

/// A link-local address with its interface; others need none.
fn scoped(address: SocketAddr, scope: Option<u32>) -> SocketAddr {
    match (address, scope) {
        (SocketAddr::V6(mut v6), Some(scope)) if v6.ip().is_unicast_link_local() => {
            v6.set_scope_id(scope);
            SocketAddr::V6(v6)
        }
        (other, _) => other,
    }
}

fn connection(stream: TcpStream) -> io::Result<Connection> {
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    Ok(Connection {
        stream: Box::new(stream),
        local,
        remote,
    })
}

struct Listening {
    listener: TcpListener,
    local: SocketAddr,
}

#[async_trait]
impl Listener for Listening {
    async fn accept(&self) -> io::Result<Connection> {
        let (stream, _) = self.listener.accept().await?;
        stream.set_nodelay(true)?;
        connection(stream)
    }

    fn set_key(&self, peer: IpAddr, password: Option<&str>) -> io::Result<()> {
        cali_netlink::tcp::set_md5_key(&self.listener, peer, password.map(str::as_bytes))
            .map_err(io::Error::other)
    }

    fn set_key_of_prefix(&self, peers: Prefix, password: Option<&str>) -> io::Result<()> {
        let peers = IpNetwork::new(peers.addr(), peers.len()).map_err(io::Error::other)?;
        cali_netlink::tcp::set_md5_key_of_prefix(&self.listener, peers, password.map(str::as_bytes))
            .map_err(io::Error::other)
    }

    fn local(&self) -> SocketAddr {
        self.local
    }
}
