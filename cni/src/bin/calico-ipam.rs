//! The address plugin, for use below another network plugin.

use std::process::ExitCode;

fn main() -> ExitCode {
    cali_cni::plugin::run(cali_control::cni::Plugin::Ipam)
}
