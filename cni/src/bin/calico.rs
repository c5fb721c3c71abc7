//! The network plugin: interface, addresses, policy.

use std::process::ExitCode;

fn main() -> ExitCode {
    cali_cni::plugin::run(cali_control::cni::Plugin::Network)
}
