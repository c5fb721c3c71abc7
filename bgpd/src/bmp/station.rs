//! The connection to a station: dialled, fed from a bounded queue, and dialled again after it has ended.

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::feed::{Feed, Queue};
use super::{Stage, message};
use crate::speaker::Speaker;

/// How long a connection may take to stand.
const CONNECT: Duration = Duration::from_secs(10);
/// How long the station may take nothing.
const STALL: Duration = Duration::from_secs(30);
/// How long the last word may take.
const GOODBYE: Duration = Duration::from_secs(1);
/// Waits between attempts, the first and the longest. A connection that lasted for the longest counts as a success.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How often the numbers of peers are sent.
const STATISTICS: Duration = Duration::from_secs(60);

/// Where a station is, and what it is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Station {
    /// Its address and port.
    pub address: SocketAddr,
    /// Before or after the import policy, or both.
    pub stages: Vec<Stage>,
    /// How often it gets the numbers of each peer.
    pub statistics: Duration,
}

impl Station {
    /// A station that is told routes as they were received.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            stages: vec![Stage::Before],
            statistics: STATISTICS,
        }
    }
}

/// `ADDRESS:PORT`, with `,before`, `,after` or `,both` behind it; without, before policy.
impl FromStr for Station {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, stages) = text.split_once(',').unwrap_or((text, "before"));
        let address = address
            .parse()
            .map_err(|_| format!("{address:?} is not ADDRESS:PORT"))?;
        let stages = match stages {
            "before" => vec![Stage::Before],
            "after" => vec![Stage::After],
            "both" => vec![Stage::Before, Stage::After],
            other => return Err(format!("{other:?} is not before, after or both")),
        };
        Ok(Self {
            stages,
            ..Self::new(address)
        })
    }
}

/// How a connection ended.
enum End {
    /// We shall end.
    Stopped,
    /// The speaker left the station, and has said why, or has ended itself.
    Left,
    /// The station closed the connection.
    Closed,
    /// The station takes nothing.
    Stalled,
    Failed(std::io::Error),
}

/// Tells the station about a speaker until that has ended, or `stop` says so.
pub(super) async fn run(station: Station, speaker: Speaker, mut stop: watch::Receiver<bool>) {
    let address = station.address;
    let mut wait = RETRY.0;
    while !*stop.borrow() {
        let dial = tokio::select! {
            dial = timeout(CONNECT, TcpStream::connect(address)) => dial,
            _ = stop.changed() => return,
        };
        match dial {
            Ok(Ok(stream)) => {
                info!(station = %address, "connected to a BMP station");
                let begin = Instant::now();
                let (feed, queue) = Feed::new();
                if speaker.monitor(station.clone(), feed).await.is_err() {
                    return;
                }
                match serve(stream, queue, &mut stop).await {
                    End::Stopped => return,
                    End::Left => {}
                    End::Closed => {
                        warn!(station = %address, "the BMP station closed its connection")
                    }
                    End::Stalled => warn!(
                        station = %address, seconds = STALL.as_secs(),
                        "the BMP station takes nothing: its connection is closed"
                    ),
                    End::Failed(error) => {
                        warn!(station = %address, %error, "the connection to a BMP station failed");
                    }
                }
                if begin.elapsed() >= RETRY.1 {
                    wait = RETRY.0;
                }
            }
            Ok(Err(error)) => warn!(station = %address, %error, "cannot reach a BMP station"),
            Err(_) => warn!(station = %address, "cannot reach a BMP station in time"),
        }
        tokio::select! {
            () = speaker.ended() => return,
            _ = stop.changed() => return,
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(RETRY.1),
        }
    }
}

async fn serve(stream: TcpStream, mut queue: Queue, stop: &mut watch::Receiver<bool>) -> End {
    if let Err(error) = stream.set_nodelay(true) {
        return End::Failed(error);
    }
    let (mut read, mut write) = stream.into_split();
    // A station says nothing (RFC 7854 §3.2): only the end of its stream is of interest.
    let mut ignored = [0; 512];
    loop {
        let message = tokio::select! {
            message = queue.next() => message,
            _ = stop.changed() => {
                goodbye(&mut write).await;
                return End::Stopped;
            }
            read = read.read(&mut ignored) => match read {
                Ok(0) => return End::Closed,
                Ok(_) => continue,
                Err(error) => return End::Failed(error),
            },
        };
        let Some(message) = message else {
            goodbye(&mut write).await;
            return End::Left;
        };
        match timeout(STALL, write.write_all(&message)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return End::Failed(error),
            Err(_) => return End::Stalled,
        }
    }
}

/// Whether the station learns that we end does not matter to us.
async fn goodbye(write: &mut OwnedWriteHalf) {
    let last = async {
        write.write_all(&message::termination()).await?;
        write.shutdown().await
    };
    let _ = timeout(GOODBYE, last).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_station_is_named_with_its_stages() {
        let stages = |text: &str| text.parse::<Station>().map(|s| s.stages);
        assert_eq!(stages("192.0.2.1:5000"), Ok(vec![Stage::Before]));
        assert_eq!(stages("[fd00::1]:5000,after"), Ok(vec![Stage::After]));
        assert_eq!(stages("192.0.2.1:5000,both").map(|s| s.len()), Ok(2));
        for text in ["192.0.2.1", "host:5000", "192.0.2.1:5000,twice"] {
            assert!(text.parse::<Station>().is_err(), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_station_that_takes_nothing_is_left_and_the_speaker_learns_it() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dial = TcpStream::connect(listener.local_addr().unwrap());
        let (stream, accepted) = tokio::join!(dial, listener.accept());
        let (_silent, _) = accepted.unwrap();
        let (feed, queue) = Feed::new();
        // More than both sockets hold.
        let piece = bytes::Bytes::from(vec![0; 1024 * 1024]);
        while feed.send(piece.clone()).is_ok() {}
        let (_go_on, mut stop) = watch::channel(false);
        let end = serve(stream.unwrap(), queue, &mut stop).await;
        assert!(matches!(end, End::Stalled));
        let refused = feed.send(bytes::Bytes::from_static(b"more"));
        assert_eq!(refused, Err(crate::bmp::feed::Refused::Gone));
    }
}
