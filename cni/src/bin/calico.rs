//! The network plugin: interface, addresses, policy. Called as `loopback` it is that plugin.

use std::process::ExitCode;

use cali_cni::{loopback, plugin};

fn main() -> ExitCode {
    if std::env::args()
        .next()
        .is_some_and(|name| loopback::is_called(&name))
    {
        return loopback::run();
    }
    plugin::run(cali_control::cni::Plugin::Network)
}
