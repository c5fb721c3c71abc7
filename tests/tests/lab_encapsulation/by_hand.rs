//! A VXLAN peer that knows nothing of Cali: device, entries and routes by `ip` and `bridge`, in Calico's conventions.

use super::{LIMIT, NODES, VXLAN, addresses, mtu, settle};
use anyhow::{Context, Result, ensure};
use cali_tests::lab::Lab;
use cali_tests::{eventually, patient};

pub(crate) fn peer(lab: &Lab) -> Result<()> {
    lab.apply(&VXLAN.manifest())?;
    settle(lab, VXLAN)?;
    let hand = lab.netns("hand");
    let run = |words: &str| -> Result<String> {
        let words: Vec<&str> = words.split_whitespace().collect();
        let output = std::process::Command::new(words[0])
            .args(&words[1..])
            .output()?;
        cali_tests::lab::checked(output, || words.join(" "))
    };
    let _gone = Namespace(hand.clone());
    run(&format!("ip netns add {hand}"))?;
    let rack = lab.netns("rack-a");
    run(&format!(
        "ip -n {hand} link add eth1 type veth peer name hand0 netns {rack}"
    ))?;
    run(&format!("ip -n {rack} link set hand0 master br0 up"))?;
    for words in [
        "link set lo up",
        "link set eth1 up",
        "addr add 10.0.1.77/24 dev eth1",
        "addr add fd00:0:0:1::77/64 dev eth1 nodad",
        // `printf hand | sha1sum`, and the same of `hand-v6`.
        "link add vxlan.calico address MAC4 type vxlan id 4096 local 10.0.1.77 dev eth1 dstport 4789 nolearning",
        "link add vxlan-v6.calico address MAC6 type vxlan id 4096 local fd00:0:0:1::77 dev eth1 dstport 4789 nolearning",
        "addr add 10.30.200.1/32 dev vxlan.calico",
        "addr add fd00:30::c800/128 dev vxlan-v6.calico nodad",
        "link set vxlan.calico mtu 1450 up",
        "link set vxlan-v6.calico mtu 1430 up",
    ] {
        let words = words
            .replace("MAC4", &derived_mac("hand")?)
            .replace("MAC6", &derived_mac("hand-v6")?);
        run(&format!("ip -n {hand} {words}"))?;
    }
    lab.apply(
        "apiVersion: projectcalico.org/v3\nkind: Node\nmetadata:\n  name: hand\nspec:\n  bgp:\n    ipv4Address: 10.0.1.77/24\n    \
         ipv6Address: fd00:0:0:1::77/64\n  ipv4VXLANTunnelAddr: 10.30.200.1\n  ipv6VXLANTunnelAddr: fd00:30::c800\n---\n\
         apiVersion: projectcalico.org/v3\nkind: BlockAffinity\nmetadata:\n  name: hand-10-30-200-0-26\nspec:\n  state: confirmed\n  \
         node: hand\n  cidr: 10.30.200.0/26\n  deleted: \"false\"\n---\napiVersion: projectcalico.org/v3\nkind: BlockAffinity\n\
         metadata:\n  name: hand-fd00-30--c800-122\nspec:\n  state: confirmed\n  node: hand\n  cidr: fd00:30::c800/122\n  \
         deleted: \"false\"\n",
    )?;
    for (v4, device) in [(true, "vxlan.calico"), (false, "vxlan-v6.calico")] {
        let text = lab.exec("node1", &["ip", "-j", "addr", "show", device])?;
        let link: serde_json::Value = serde_json::from_str(&text)?;
        let mac = link[0]["address"].as_str().context("no MAC")?;
        ensure!(
            mac == derived_mac(if v4 { "node1" } else { "node1-v6" })?,
            "{device} has {mac}"
        );
        let family = if v4 { "inet" } else { "inet6" };
        let vtep = link[0]["addr_info"]
            .as_array()
            .and_then(|all| {
                all.iter()
                    .find(|one| one["family"] == family && one["scope"] == "global")
            })
            .and_then(|one| one["local"].as_str())
            .context("no tunnel address")?;
        let node = if v4 { NODES[0].1 } else { NODES[0].2 };
        let to = addresses(lab, v4)?[0];
        run(&format!(
            "bridge -n {hand} fdb add {mac} dev {device} dst {node} self permanent"
        ))?;
        run(&format!(
            "ip -n {hand} neigh add {vtep} lladdr {mac} dev {device} nud permanent"
        ))?;
        if v4 {
            run(&format!(
                "ip -n {hand} route add {to} via {vtep} dev {device} onlink"
            ))?;
        } else {
            run(&format!("ip -n {hand} route add {vtep} dev {device}"))?;
            run(&format!(
                "ip -n {hand} route add {to} via {vtep} dev {device}"
            ))?;
        }
        let (device_mtu, headers) = if v4 { (1450, 28) } else { (1430, 48) };
        let size = mtu(lab, 0)?.min(device_mtu) - headers;
        let source = if v4 { "10.30.200.1" } else { "fd00:30::c800" };
        let answered = || {
            run(&format!(
                "ip netns exec {hand} ping -n -c 1 -W 2 -M do -s {size} -I {source} {to}"
            ))
            .map_err(|error| format!("{error:#}"))
        };
        eventually(patient(LIMIT), answered).map_err(anyhow::Error::msg)?;
        println!("     {device}: packets of {size} bytes go both ways");
    }
    Ok(())
}

struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip")
            .args(["netns", "del", &self.0])
            .output();
    }
}

/// `66` and five bytes of SHA-1, by the system's own tool.
fn derived_mac(name: &str) -> Result<String> {
    let script = format!("printf %s {name} | sha1sum");
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .output()?;
    let text = cali_tests::lab::checked(output, || script.clone())?;
    let hash = text.get(..10).context("sha1sum printed no hash")?;
    let bytes: Vec<&str> = (0..5).map(|at| &hash[at * 2..at * 2 + 2]).collect();
    Ok(format!("66:{}", bytes.join(":")))
}
