//! A pair of route reflectors instead of a mesh.

use anyhow::{Context, Result, ensure};
use cali_tests::eventually;
use cali_tests::lab::{Lab, checked};
use cali_tests::table::{block_of, find, node_status, routes_v4};
use cali_tests::traffic::Ping;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);
const NODES: [(&str, &str, &str); 3] = [
    ("node1", "10.0.1.1", "shop/web-1"),
    ("node2", "10.0.1.2", "shop/web-2"),
    ("node3", "10.0.1.3", "shop/web-3"),
];
const REFLECTORS: [&str; 2] = ["10.0.1.11", "10.0.1.12"];

#[test]
fn lab_rr() {
    let (lab, printed) = Lab::up("rr.clab.yml").unwrap_or_else(|error| panic!("{error:#}"));
    println!("{printed}");
    lab.check_all(&[
        ("nodes peer with the reflectors and nobody else", sessions),
        (
            "every node has every block, straight from its owner",
            routes,
        ),
        (
            "bringing it up again takes nothing from the nodes",
            up_again,
        ),
        ("connections are as the policies say", |lab| {
            lab.show(6).map(drop)
        }),
        (
            "a reflector that is killed costs no route and no packet",
            killed_reflector,
        ),
    ]);
}

/// The manifests name nodes without their addresses, which the nodes have written themselves.
fn up_again(lab: &Lab) -> Result<()> {
    let topology = lab.folder().join("../topology/rr.clab.yml");
    let output = lab
        .calictl(&["lab", "up", &topology.display().to_string()])
        .output()?;
    let said = checked(output, || "lab up, again".to_owned())?;
    ensure!(said.contains(" 0 objects created, 0 changed,"), "{said}");
    sessions(lab)
}

fn sessions(lab: &Lab) -> Result<()> {
    for (node, _, _) in NODES {
        let text = node_status(lab, node)?;
        for reflector in REFLECTORS {
            ensure!(
                text.contains(&format!("| {reflector} ")),
                "{node} does not peer with {reflector}\n{text}"
            );
        }
        ensure!(text.matches("Established").count() == 2, "{node}\n{text}");
        ensure!(!text.contains("mesh"), "{node} has a mesh session\n{text}");
    }
    for reflector in ["rr1", "rr2"] {
        let text = node_status(lab, reflector)?;
        ensure!(
            text.matches("Established").count() == 4,
            "{reflector}\n{text}"
        );
    }
    Ok(())
}

/// Every node, the reflectors too, reaches every block at the node that owns it: reflection keeps the next hop.
fn routes(lab: &Lab) -> Result<()> {
    for node in ["node1", "node2", "node3", "rr1", "rr2"] {
        for (owner, address, pod) in NODES {
            let block = block_of(lab, pod)?;
            let check = || {
                let routes = routes_v4(lab, node).map_err(|error| format!("{error:#}"))?;
                if owner == node {
                    find(
                        &routes,
                        &block,
                        &[("type", "blackhole"), ("protocol", "80")],
                    )?;
                    let pod = lab.pod_address(pod).map_err(|error| format!("{error:#}"))?;
                    find(&routes, &pod, &[("protocol", "80"), ("scope", "link")])?;
                } else {
                    find(
                        &routes,
                        &block,
                        &[("gateway", address), ("protocol", "bird")],
                    )?;
                }
                Ok(())
            };
            eventually(LIMIT, check)
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("{node}: the block of {owner}"))?;
        }
    }
    Ok(())
}

fn killed_reflector(lab: &Lab) -> Result<()> {
    let ping = Ping::start(lab, "shop/web-1", &lab.pod_address("shop/web-2")?)?;
    let victims = lab.pids_in("rr1", "bgpd")?;
    ensure!(!victims.is_empty(), "no bgpd in rr1");
    for pid in &victims {
        kill(Pid::from_raw(*pid), Signal::SIGKILL)?;
    }
    let back = || {
        let now = lab
            .pids_in("rr1", "bgpd")
            .map_err(|error| format!("{error:#}"))?;
        if now.is_empty() || now.iter().any(|pid| victims.contains(pid)) {
            return Err(format!("bgpd of rr1: {now:?}"));
        }
        sessions(lab).map_err(|error| format!("{error:#}"))
    };
    eventually(LIMIT, back).map_err(anyhow::Error::msg)?;
    routes(lab)?;
    let count = ping.stop()?;
    ensure!(count.sent > 10 && count.lost == 0, "{count:?}");
    Ok(())
}
