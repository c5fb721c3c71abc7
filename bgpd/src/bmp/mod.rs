//! BMP (RFC 7854): a copy of what peers say, for monitoring stations, each of which is dialled and dialled again.
//!
//! [`message`] is the codec; [`feed`] the bounded queue to a station; [`station`] the connection; [`stations`] starts
//! and ends them as the configuration says. What is told when is decided by the speaker's monitor. Nothing here delays
//! a speaker: a station that does not keep up is left, and gets everything again on its next connection.

pub mod feed;
pub mod message;
pub mod station;
pub mod stations;

pub use feed::Feed;
pub use message::{PeerHeader, PeerStatistics, Stage};
pub use station::Station;
pub use stations::Stations;
