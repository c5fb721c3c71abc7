//! Real servers for tests: started on loopback, ended (by process id) when dropped; and a store that can be taken away.

mod apiserver;
pub mod audit;
mod etcd;
mod process;
mod switched;

pub use self::apiserver::{ApiServer, certificates};
pub use self::audit::{Asked, Right};
pub use self::etcd::{Etcd, Tls};
pub use self::process::{Process, script, told};
pub use self::switched::Switched;
