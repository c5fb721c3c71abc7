//! Real servers for tests: started on loopback, ended (by process id) when dropped.

mod apiserver;
mod etcd;
mod process;

pub use self::apiserver::ApiServer;
pub use self::etcd::{Etcd, Tls};
