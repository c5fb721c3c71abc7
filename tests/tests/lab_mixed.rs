//! Nodes beside FRR, BIRD and GoBGP: what each announces is in the nodes' kernels, the nodes' blocks are in each
//! router's table, and packets go between pods and the hosts behind the routers.

use anyhow::{Context, Result, ensure};
use cali_tests::bgp::package;
use cali_tests::eventually;
use cali_tests::lab::{Lab, checked};
use cali_tests::table::{block_of, find, gateways, node_status, routes_v4};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);
const NODES: [(&str, &str, &str); 2] = [
    ("node1", "10.0.1.1", "shop/web-1"),
    ("node2", "10.0.1.2", "shop/web-2"),
];

#[test]
fn lab_mixed() {
    let (lab, printed) = Lab::up("mixed.clab.yml").unwrap_or_else(|error| panic!("{error:#}"));
    println!("{printed}");
    lab.check_all(&[
        ("nodes peer with each other and with every router", sessions),
        (
            "FRR and BIRD have the nodes' blocks, nodes have their networks",
            kernel_routes,
        ),
        (
            "GoBGP has the nodes' blocks, nodes have what it announces",
            gobgp,
        ),
        ("connections are as the policies say", |lab| {
            lab.show(2).map(drop)
        }),
        (
            "packets go between pods and the hosts behind the routers",
            packets,
        ),
    ]);
}

fn sessions(lab: &Lab) -> Result<()> {
    for (node, _, _) in NODES {
        let text = node_status(lab, node)?;
        for router in ["10.0.1.11", "10.0.1.12", "10.0.1.13"] {
            ensure!(
                text.lines()
                    .any(|line| line.contains(&format!("| {router} "))
                        && line.contains("Established")),
                "{node} has no session with {router}\n{text}"
            );
        }
        ensure!(text.contains("node-to-node mesh"), "{node}\n{text}");
    }
    Ok(())
}

fn kernel_routes(lab: &Lab) -> Result<()> {
    let check = || {
        for (node, address, pod) in NODES {
            let block = block_of(lab, pod).map_err(|error| format!("{error:#}"))?;
            for (router, protocol) in [("frr", "bgp"), ("bird", "bird")] {
                let routes = routes_v4(lab, router).map_err(|error| format!("{error:#}"))?;
                find(&routes, &block, &[("protocol", protocol)])?;
                let seen = gateways(&routes, &block)?;
                if seen != [address] {
                    return Err(format!(
                        "{router} reaches the block of {node} over {seen:?}"
                    ));
                }
            }
            let routes = routes_v4(lab, node).map_err(|error| format!("{error:#}"))?;
            for (network, gateway) in [
                ("172.31.11.0/24", "10.0.1.11"),
                ("172.31.12.0/24", "10.0.1.12"),
            ] {
                find(
                    &routes,
                    network,
                    &[("gateway", gateway), ("protocol", "bird")],
                )?;
            }
        }
        Ok(())
    };
    eventually(LIMIT, check)
        .map(drop)
        .map_err(anyhow::Error::msg)
}

fn gobgp(lab: &Lab) -> Result<()> {
    let package = package::folder("gobgpd")?.join("run").display().to_string();
    let socket = lab.folder().join("gobgp/run/gobgp.sock");
    let target = format!("unix://{}", socket.display());
    let ask = |words: &[&str]| {
        let all = [
            &[package.as_str(), "usr/bin/gobgp", "--target", &target],
            words,
        ]
        .concat();
        lab.exec("gobgp", &all)
    };
    let blocks = || {
        let table = ask(&["global", "rib"]).map_err(|error| format!("{error:#}"))?;
        for (node, address, pod) in NODES {
            let block = block_of(lab, pod).map_err(|error| format!("{error:#}"))?;
            let best = |line: &str| {
                let mut words = line.split_whitespace();
                words.next() == Some("*>")
                    && words.next() == Some(&block)
                    && words.next() == Some(address)
            };
            if !table.lines().any(best) {
                return Err(format!(
                    "the best path to the block of {node} is not over it\n{table}"
                ));
            }
        }
        Ok(())
    };
    eventually(LIMIT, blocks).map_err(anyhow::Error::msg)?;
    let announced = |wanted: bool| {
        let check = || {
            for (node, _, _) in NODES {
                let routes = routes_v4(lab, node).map_err(|error| format!("{error:#}"))?;
                let found = find(
                    &routes,
                    "172.31.13.0/24",
                    &[("gateway", "10.0.1.13"), ("protocol", "bird")],
                );
                if found.is_ok() != wanted {
                    return Err(format!("{node}: {found:?}"));
                }
            }
            Ok(())
        };
        eventually(LIMIT, check)
            .map(drop)
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("announced: {wanted}"))
    };
    announced(false)?;
    for (word, wanted) in [("add", true), ("del", false)] {
        ask(&[
            "global",
            "rib",
            word,
            "172.31.13.0/24",
            "nexthop",
            "10.0.1.13",
        ])?;
        announced(wanted)?;
    }
    Ok(())
}

fn packets(lab: &Lab) -> Result<()> {
    let ping = |from: &str, to: &str| {
        lab.command(from, &["ping", "-n", "-q", "-c", "1", "-W", "2", to])
            .output()
    };
    for host in ["172.31.11.2", "172.31.12.2"] {
        checked(ping("shop/web-1", host)?, || format!("web-1 to {host}"))?;
        // The other pod is in quarantine.
        ensure!(
            !ping("shop/web-2", host)?.status.success(),
            "web-2 reaches {host}"
        );
    }
    for host in ["host-frr", "host-bird"] {
        for (_, _, pod) in NODES {
            checked(ping(host, &lab.pod_address(pod)?)?, || {
                format!("{host} to {pod}")
            })?;
        }
    }
    Ok(())
}
