//! What a daemon tells the outside over HTTP: Prometheus metrics, liveness and readiness with reasons, and pages.
//!
//! [`Health`] is the judgement: named parts report, and the two answers follow from the last reports and the time that is
//! given. [`Endpoint`] is the edge that serves it. Neither knows what the parts do.
//!
//! The number of connections and the time that a client may take for its request are bounded.

mod endpoint;
mod health;

pub use endpoint::{Endpoint, Page, Serving};
pub use health::{Answer, Expectation, Health, PartState, Reporter};
pub use prometheus::Registry;
