//! A way from a network namespace to a server on the loopback of the test's own one: under the same address and port, so that neither
//! certificates nor configurations know of it.

use std::net::{Ipv4Addr, SocketAddr};

use cali_netlink::NetNs;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Connections are handed on as long as it is there; then they break.
#[derive(Debug)]
pub struct Relay(JoinHandle<()>);

impl Relay {
    /// Listens on a port of the namespace's loopback. Inside a runtime.
    ///
    /// # Panics
    /// If the port is taken there.
    pub fn start(namespace: &NetNs, port: u16) -> Self {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        // A socket stays in the namespace in which it was made.
        let listener = namespace.run(move || std::net::TcpListener::bind(at));
        let listener = listener.expect("the namespace").expect("a free port");
        listener
            .set_nonblocking(true)
            .expect("a socket that waits for nobody");
        let listener = TcpListener::from_std(listener).expect("a runtime");
        Self(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                connections.spawn(async move {
                    // Where nobody listens, the connection is closed, too.
                    if let Ok(mut far) = TcpStream::connect(at).await {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        }))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.abort();
    }
}
