//! Fan-out of the datastore to many nodes: one watch of the datastore, one cache, many cheap clients.
//!
//! A client receives exactly the stream that `cali_datastore::sync` would give it (see [`cali_api::update`]), over TCP, with
//! reconnection hidden: after an outage it is sent what changed, and only what really is gone is reported deleted. The
//! server encodes each object once and compresses each delta and each page of the snapshot once for all clients.
//!
//! - [`wire`]: frames and messages;
//! - [`digest`]: how two sides find out what differs;
//! - [`cache`]: what the server holds, and what it shares between clients; [`scope`]: which endpoints a client is to have;
//! - [`interest`]: how a consumer says which endpoints it needs;
//! - [`server`], [`client`]: each a state machine without I/O (`conn`), and the tasks that move its bytes;
//! - [`config`]: the environment; [`source`]: the stream for a daemon, from a server or straight from the datastore;
//! - [`tls`]: who may be at the other end;
//! - [`secrets`]: what is never fanned out.
//!
//! It does not interpret objects, but for the labels of endpoints. The server keeps nothing on disk; a client may keep the last state there
//! ([`client::kept`]), for a start while no server answers.

pub mod cache;
pub mod client;
pub mod config;
pub mod digest;
pub mod interest;
pub mod program;
pub mod scope;
pub mod secrets;
pub mod server;
pub mod source;
pub mod tls;
pub mod wire;

/// An error with its causes on one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}
