//! Real servers for tests: started on loopback, ended (by process id) when dropped.

mod etcd;
mod process;

pub use self::etcd::{Etcd, Tls};
