//! The two namespaces of a run. They are removed when the scene is dropped, with everything that runs in them.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cali_netlink::NetNs;

use super::shape::{DEVICE, NETWORK_LEN, NETWORK_V6_LEN, v6_of};

/// Both namespaces, joined.
pub struct Scene {
    /// Where the daemon runs.
    pub device: NetNs,
    /// Where its neighbours are.
    pub load: NetNs,
    names: [String; 2],
}

impl Scene {
    /// Makes the namespaces and gives the load's end all these addresses.
    pub fn new(addresses: impl Iterator<Item = Ipv4Addr>) -> Result<Self> {
        let names = ["d", "l"].map(|end| format!("cali-bench-{}{end}", std::process::id()));
        let scene = Self {
            device: NetNs::create(&names[0])?,
            load: NetNs::create(&names[1])?,
            names,
        };
        let [device, load] = &scene.names;
        ip(&format!(
            "-n {device} link add bb0 type veth peer name bb1 netns {load}"
        ))?;
        ip(&format!(
            "-n {device} addr add {DEVICE}/{NETWORK_LEN} dev bb0"
        ))?;
        ip(&format!(
            "-n {device} addr add {}/{NETWORK_V6_LEN} dev bb0 nodad",
            v6_of(DEVICE)
        ))?;
        for (name, link) in [(device, "bb0"), (load, "bb1")] {
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set {link} up"))?;
        }
        let mut batch = tempfile::NamedTempFile::new()?;
        for address in addresses {
            use std::io::Write;
            writeln!(batch, "addr add {address}/{NETWORK_LEN} dev bb1")?;
            let address = v6_of(address);
            writeln!(batch, "addr add {address}/{NETWORK_V6_LEN} dev bb1 nodad")?;
        }
        ip(&format!("-n {load} -batch {}", batch.path().display()))?;
        Ok(scene)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(error) = NetNs::delete(name) {
                eprintln!("{error}");
            }
        }
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("cannot run ip")?;
    ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
