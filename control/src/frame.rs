//! Framing: a big-endian `u32` length, then that many bytes of JSON.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +---------------------------------------------------------------+
//! |                     length of the body (bytes)                |
//! +---------------------------------------------------------------+
//! |                     JSON document ...                         |
//! +---------------------------------------------------------------+
//! ```
//!
//! The first frame in each direction is a [`Hello`]; a side that reads another protocol name or an older version
//! than it can serve closes the connection with an error that names both.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest body that is read or written, in bytes. A route update of 64 Ki prefixes stays well below it.
pub const MAX_FRAME: usize = 16 << 20;

/// First frame of each direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Hello {
    /// Name of the protocol, for example `cali-routes`.
    pub protocol: String,
    /// Version that the sender speaks. Peers use the lower of the two.
    pub version: u32,
    /// Program and its version, for logs and `calictl version`.
    #[serde(default)]
    pub program: String,
}

/// What can go wrong on a local socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation} on the {protocol} socket")]
    Io {
        operation: &'static str,
        protocol: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("a frame of {length} bytes on the {protocol} socket is over the limit of {MAX_FRAME}")]
    TooLarge {
        protocol: &'static str,
        length: usize,
    },
    #[error("a frame on the {protocol} socket is not what was expected")]
    Malformed {
        protocol: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error(
        "the other side of the {expected} socket speaks {found}; check that both programs are of one release"
    )]
    OtherProtocol {
        expected: &'static str,
        found: String,
    },
    #[error("the {protocol} socket was closed by the other side")]
    Closed { protocol: &'static str },
    #[error("cannot reach {}", socket.display())]
    Unreachable {
        socket: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("no answer from {} within {} s", socket.display(), limit.as_secs())]
    NoAnswer { socket: PathBuf, limit: Duration },
}

/// Encodes one value as a whole frame.
pub fn encode<T: Serialize>(protocol: &'static str, value: &T) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, value)
        .map_err(|source| Error::Malformed { protocol, source })?;
    let length = bytes.len() - 4;
    let prefix = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_FRAME)
        .ok_or(Error::TooLarge { protocol, length })?;
    bytes[..4].copy_from_slice(&prefix.to_be_bytes());
    Ok(bytes)
}

/// Reads one frame from a blocking stream, for programs that are too small for a runtime (the CNI plugin).
pub fn read_blocking<T: DeserializeOwned>(
    protocol: &'static str,
    stream: &mut impl std::io::Read,
) -> Result<T, Error> {
    use std::io::Read as _;
    let io = |source| Error::Io {
        operation: "read",
        protocol,
        source,
    };
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).map_err(io)?;
    let length = u32::from_be_bytes(prefix) as usize;
    if length > MAX_FRAME {
        return Err(Error::TooLarge { protocol, length });
    }
    let mut body = Vec::with_capacity(length.min(64 << 10));
    stream
        .take(length as u64)
        .read_to_end(&mut body)
        .map_err(io)?;
    if body.len() < length {
        return Err(Error::Closed { protocol });
    }
    serde_json::from_slice(&body).map_err(|source| Error::Malformed { protocol, source })
}

/// Reads frames of one protocol.
#[derive(Debug)]
pub struct FrameReader<R> {
    protocol: &'static str,
    inner: R,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub fn new(protocol: &'static str, inner: R) -> Self {
        Self { protocol, inner }
    }

    /// The next frame, or `None` when the other side closed between two frames.
    ///
    /// Not cancel safe: a reader inside `select!` belongs into a task of its own.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let protocol = self.protocol;
        let io = |source| Error::Io {
            operation: "read",
            protocol,
            source,
        };
        let mut prefix = [0; 4];
        match self.inner.read(&mut prefix[..1]).await.map_err(io)? {
            0 => return Ok(None),
            _ => self.inner.read_exact(&mut prefix[1..]).await.map_err(io)?,
        };
        let length = u32::from_be_bytes(prefix) as usize;
        if length > MAX_FRAME {
            return Err(Error::TooLarge { protocol, length });
        }
        // `take` lets the buffer grow with what really arrives, not with what the prefix promises.
        let mut body = Vec::with_capacity(length.min(64 << 10));
        (&mut self.inner)
            .take(length as u64)
            .read_to_end(&mut body)
            .await
            .map_err(io)?;
        if body.len() < length {
            return Err(Error::Closed { protocol });
        }
        serde_json::from_slice(&body)
            .map(Some)
            .map_err(|source| Error::Malformed { protocol, source })
    }

    /// The next frame; the end of the stream is an error.
    pub async fn expect<T: DeserializeOwned>(&mut self) -> Result<T, Error> {
        self.next().await?.ok_or(Error::Closed {
            protocol: self.protocol,
        })
    }

    /// Reads the other side's [`Hello`] and refuses another protocol.
    pub async fn hello(&mut self) -> Result<Hello, Error> {
        let hello: Hello = self.expect().await?;
        if hello.protocol != self.protocol {
            return Err(Error::OtherProtocol {
                expected: self.protocol,
                found: hello.protocol,
            });
        }
        Ok(hello)
    }
}

/// Writes frames of one protocol.
#[derive(Debug)]
pub struct FrameWriter<W> {
    protocol: &'static str,
    inner: W,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub fn new(protocol: &'static str, inner: W) -> Self {
        Self { protocol, inner }
    }

    pub async fn send<T: Serialize>(&mut self, value: &T) -> Result<(), Error> {
        let protocol = self.protocol;
        let bytes = encode(protocol, value)?;
        let io = |source| Error::Io {
            operation: "write",
            protocol,
            source,
        };
        self.inner.write_all(&bytes).await.map_err(io)?;
        self.inner.flush().await.map_err(io)
    }

    /// Sends our [`Hello`].
    pub async fn hello(&mut self, version: u32, program: &str) -> Result<(), Error> {
        let hello = Hello {
            protocol: self.protocol.to_owned(),
            version,
            program: program.to_owned(),
        };
        self.send(&hello).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frame_arrives_as_it_was_sent() {
        let (a, b) = tokio::io::duplex(64);
        let mut writer = FrameWriter::new("test", a);
        let mut reader = FrameReader::new("test", b);
        let send = async {
            writer.hello(1, "unit test").await.unwrap();
            writer.send(&vec!["x".repeat(1000)]).await.unwrap();
            drop(writer);
        };
        let receive = async {
            assert_eq!(reader.hello().await.unwrap().version, 1);
            assert_eq!(reader.expect::<Vec<String>>().await.unwrap()[0].len(), 1000);
            assert!(reader.next::<Vec<String>>().await.unwrap().is_none());
        };
        tokio::join!(send, receive);
    }

    #[tokio::test]
    async fn an_oversized_length_is_refused_before_any_memory_is_spent() {
        let mut reader = FrameReader::new("test", &b"\xff\xff\xff\xff"[..]);
        assert!(matches!(
            reader.next::<()>().await,
            Err(Error::TooLarge { .. })
        ));
    }

    #[tokio::test]
    async fn a_stream_that_ends_inside_a_frame_is_an_error() {
        let mut reader = FrameReader::new("test", &b"\0\0\0\x09[1,2"[..]);
        assert!(matches!(
            reader.next::<Vec<u8>>().await,
            Err(Error::Closed { .. })
        ));
    }

    #[tokio::test]
    async fn another_protocol_is_refused_by_name() {
        let bytes = encode(
            "other",
            &Hello {
                protocol: "other".into(),
                version: 1,
                program: String::new(),
            },
        )
        .unwrap();
        let error = FrameReader::new("test", &bytes[..])
            .hello()
            .await
            .unwrap_err();
        assert!(error.to_string().contains("speaks other"), "{error}");
    }
}
