//! Real connections between pods: a server that answers, and a client that tries.

use cali_netlink::NetNs;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

/// What one attempt showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// The answer came back.
    Connected,
    /// Nothing came back within the limit.
    TimedOut,
    /// A reset or an ICMP error came back.
    Refused,
}

impl Outcome {
    pub fn is_connected(self) -> bool {
        self == Self::Connected
    }
}

/// Protocol of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// One attempt: from the namespace to an address.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub namespace: String,
    pub protocol: Protocol,
    pub to: SocketAddr,
}

/// Tries all attempts side by side; the results are in their order. An error is one of the tool, not of the network.
pub fn try_all(attempts: &[Attempt], limit: Duration) -> io::Result<Vec<Outcome>> {
    let mut results = Vec::with_capacity(attempts.len());
    // A bounded number of threads at a time.
    for some in attempts.chunks(64) {
        let outcomes: Vec<io::Result<Outcome>> = std::thread::scope(|scope| {
            let threads: Vec<_> = some
                .iter()
                .map(|attempt| scope.spawn(move || try_one(attempt, limit)))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(io::Error::other("the probe panicked")))
                })
                .collect()
        });
        for outcome in outcomes {
            results.push(outcome?);
        }
    }
    Ok(results)
}

fn try_one(attempt: &Attempt, limit: Duration) -> io::Result<Outcome> {
    let namespace = NetNs::open(&attempt.namespace).map_err(io::Error::other)?;
    let (protocol, to) = (attempt.protocol, attempt.to);
    namespace
        .run(move || match protocol {
            Protocol::Tcp => classify(tcp(to, limit)),
            Protocol::Udp => classify(udp(to, limit)),
        })
        .map_err(io::Error::other)?
}

fn tcp(to: SocketAddr, limit: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])
}

fn udp(to: SocketAddr, limit: Duration) -> io::Result<()> {
    let any: IpAddr = if to.is_ipv4() {
        IpAddr::from([0, 0, 0, 0])
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(limit))?;
    socket.connect(to)?;
    socket.send(b"?")?;
    socket.recv(&mut [0; 16]).map(drop)
}

fn classify(result: io::Result<()>) -> io::Result<Outcome> {
    use io::ErrorKind as Kind;
    match result {
        Ok(()) => Ok(Outcome::Connected),
        Err(error) => match error.kind() {
            Kind::TimedOut | Kind::WouldBlock => Ok(Outcome::TimedOut),
            Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::UnexpectedEof => Ok(Outcome::Refused),
            _ => Err(error),
        },
    }
}

/// Answers every connection and datagram on the ports, forever. Runs in the namespace it is started in.
pub fn answer(tcp: &[u16], udp: &[u16]) -> io::Result<()> {
    let any = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    let listeners = tcp
        .iter()
        .map(|port| TcpListener::bind((any, *port)))
        .collect::<io::Result<Vec<_>>>()?;
    let sockets = udp
        .iter()
        .map(|port| UdpSocket::bind((any, *port)))
        .collect::<io::Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(move || {
                listener
                    .incoming()
                    .flatten()
                    .for_each(|stream| drop(echo(stream)))
            });
        }
        for socket in &sockets {
            scope.spawn(move || {
                let mut buffer = [0; 1500];
                while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    // A sender that has gone is no reason to end.
                    let _ = socket.send_to(&buffer[..length], from);
                }
            });
        }
    });
    Ok(())
}

/// One short exchange; a client that sends nothing is dropped after a second.
fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)
}
