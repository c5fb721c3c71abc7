//! BGP daemons under load, side by side in one run.
//!
//! A run has two network namespaces joined by one veth pair: the daemon under test lives in one ([`daemon`]), all of
//! its neighbours in the other ([`generator`]). What is sent and what must arrive is a [`shape::Shape`]; what it
//! cost is read from `/proc` for all processes of the daemon's namespace ([`cost`]).
//!
//! Rules of a fair run: the daemon starts first with every neighbour passive, all sessions stand and have settled
//! before the clock starts, messages are encoded beforehand, and the clock stops when every measured neighbour
//! has seen every prefix once. Session setup is a measurement of its own.

pub mod cost;
pub mod daemon;
pub mod generator;
mod kernel;
pub mod round;
pub mod run;
pub mod scene;
pub mod shape;
pub mod table;
pub mod targets;
mod templates;
