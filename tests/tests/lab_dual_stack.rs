//! IPv4 and IPv6 side by side: sessions, routes, tunnels and policies of both families, with real packets.

use anyhow::{Context, Result, ensure};
use cali_tests::eventually;
use cali_tests::kernel::Dump;
use cali_tests::lab::Lab;
use cali_tests::table::{Wanted, find, node_status, routes_v6};
use cali_tests::traffic::Ping;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::Ipv6Addr;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn lab_dual_stack() {
    let (lab, printed) = Lab::up("dual-stack.clab.yml").unwrap_or_else(|error| panic!("{error:#}"));
    println!("{printed}");
    lab.check_all(&[
        ("node status shows both families", status_of_both_families),
        ("IPv6 routes are as the pools say", routes_of_node1),
        (
            "connections of both families are as the policies say",
            connections_agree,
        ),
        ("a policy change holds for IPv6 at once", policy_changes),
        (
            "the IPv6 overlay changes its encapsulation under traffic",
            mode_changes,
        ),
        ("killed programs cost no IPv6 packet", kills),
    ]);
}

fn status_of_both_families(lab: &Lab) -> Result<()> {
    let text = node_status(lab, "node1")?;
    let (v4, v6) = text
        .split_once("IPv6 BGP status")
        .with_context(|| format!("no IPv6 table in\n{text}"))?;
    for (table, peers) in [
        (v4, ["10.0.1.2", "10.0.2.3", "10.0.1.254"]),
        (v6, ["fd00:0:0:1::2", "fd00:0:0:2::3", "fd00:0:0:1::254"]),
    ] {
        for peer in peers {
            ensure!(
                table.lines().any(
                    |line| line.contains(&format!("| {peer} ")) && line.contains("Established")
                ),
                "no established session with {peer} in\n{text}"
            );
        }
    }
    Ok(())
}

/// The /122 block that an address lies in, as routes name it.
fn block(address: Ipv6Addr) -> String {
    format!("{}/122", Ipv6Addr::from(u128::from(address) & !63))
}

fn routes_of_node1(lab: &Lab) -> Result<()> {
    let of = |pod: &str| lab.pod_address_v6(pod).map(block);
    let wanted: Vec<(String, Wanted)> = vec![
        (
            of("shop/web-2")?,
            &[
                ("gateway", "fd00:0:0:1::2"),
                ("dev", "eth1"),
                ("protocol", "bird"),
            ],
        ),
        (
            of("shop/web-3")?,
            &[
                ("gateway", "fd00:0:0:1::254"),
                ("dev", "eth1"),
                ("protocol", "bird"),
            ],
        ),
        (
            of("shop/db-2")?,
            &[
                ("gateway", "fd00:0:0:1::2"),
                ("dev", "eth1"),
                ("protocol", "80"),
            ],
        ),
        (
            of("shop/db-3")?,
            &[("dev", "vxlan-v6.calico"), ("protocol", "80")],
        ),
        (
            of("shop/web-1")?,
            &[("type", "blackhole"), ("protocol", "80")],
        ),
        (
            of("shop/db-1")?,
            &[("type", "blackhole"), ("protocol", "80")],
        ),
    ];
    let check = || {
        let routes = routes_v6(lab, "node1").map_err(|error| format!("{error:#}"))?;
        for (block, wanted) in &wanted {
            find(&routes, block, wanted)?;
        }
        for pod in ["shop/web-1", "shop/db-1"] {
            let address = lab
                .pod_address_v6(pod)
                .map_err(|error| format!("{error:#}"))?;
            let route = find(&routes, &address.to_string(), &[("protocol", "80")])?;
            if !route["dev"]
                .as_str()
                .unwrap_or_default()
                .starts_with("cali")
                || !route["gateway"].is_null()
            {
                return Err(format!("{pod}: {route}"));
            }
        }
        Ok(())
    };
    eventually(LIMIT, check).map_err(anyhow::Error::msg)?;
    let fdb = lab.exec(
        "node1",
        &["bridge", "fdb", "show", "dev", "vxlan-v6.calico"],
    )?;
    ensure!(
        fdb.contains("dst fd00:0:0:2::3"),
        "no FDB entry towards node3 in\n{fdb}"
    );
    Ok(())
}

fn connections_agree(lab: &Lab) -> Result<()> {
    let text = lab.show(30)?;
    println!("{text}");
    ensure!(
        text.matches("30 of 30 connections are as the policies say")
            .count()
            == 2,
        "{text}"
    );
    // Databases reach web pods by IPv4 and not by IPv6, so the two matrices must differ.
    let (v4, v6) = text
        .split_once("IPv6 connections")
        .context("no IPv6 matrix")?;
    let row = |matrix: &str| {
        let mut lines = matrix.lines().filter(|line| line.starts_with("db-1"));
        lines.next_back().map(|line| line.matches("allow").count())
    };
    ensure!(row(v4) == Some(3) && row(v6) == Some(0), "{text}");
    Ok(())
}

fn pings(lab: &Lab, from: &str, to: &str) -> bool {
    lab.exec(from, &["ping", "-n", "-q", "-c", "1", "-W", "1", to])
        .is_ok()
}

fn policy_changes(lab: &Lab) -> Result<()> {
    let to = lab.pod_address_v6("shop/web-1")?.to_string();
    ensure!(
        !pings(lab, "shop/web-3", &to),
        "a pod in quarantine reaches {to}"
    );
    let policy = |action: &str| {
        format!(
            "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata:\n  name: quarantine\nspec:\n  \
             order: 10\n  selector: quarantine == 'true'\n  types: [Egress]\n  egress:\n    - action: {action}\n"
        )
    };
    for (action, reached) in [("Allow", true), ("Deny", false)] {
        lab.apply(&policy(action))?;
        let as_wanted = || {
            if pings(lab, "shop/web-3", &to) == reached {
                Ok(())
            } else {
                Err(format!("{action}: a ping to {to} is not {reached}"))
            }
        };
        eventually(LIMIT, as_wanted).map_err(anyhow::Error::msg)?;
    }
    Ok(())
}

fn mode_changes(lab: &Lab) -> Result<()> {
    let pool = |mode: &str| {
        format!(
            "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata:\n  name: overlay-v6\nspec:\n  \
             cidr: fd00:20::/48\n  blockSize: 122\n  vxlanMode: {mode}\n"
        )
    };
    let tunnelled: Wanted = &[("dev", "vxlan-v6.calico"), ("protocol", "80")];
    let direct: Wanted = &[("gateway", "fd00:0:0:1::2"), ("protocol", "80")];
    let by_bgp: Wanted = &[("gateway", "fd00:0:0:1::2"), ("protocol", "bird")];
    let by_router: Wanted = &[("gateway", "fd00:0:0:1::254"), ("protocol", "bird")];
    let (near, far) = (
        lab.pod_address_v6("shop/db-2")?,
        lab.pod_address_v6("shop/db-3")?,
    );
    let back = block(lab.pod_address_v6("shop/db-1")?);
    for (mode, same_subnet, other_subnet) in [
        ("Always", tunnelled, tunnelled),
        ("Never", by_bgp, by_router),
        ("CrossSubnet", direct, tunnelled),
    ] {
        let pings = [near, far].map(|to| Ping::start(lab, "shop/web-1", &to.to_string()));
        lab.apply(&pool(mode))?;
        let switched = || {
            let routes = |node| routes_v6(lab, node).map_err(|error| format!("{error:#}"));
            let own = routes("node1")?;
            find(&own, &block(near), same_subnet)?;
            find(&own, &block(far), other_subnet)?;
            // node3 is across the border for both of the others.
            let device = if mode == "Never" {
                "eth1"
            } else {
                "vxlan-v6.calico"
            };
            find(&routes("node3")?, &back, &[("dev", device)])?;
            Ok(())
        };
        let ((), time) = eventually(LIMIT, switched)
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("mode {mode}"))?;
        for (ping, (to, tolerated)) in pings.into_iter().zip([(near, 0), (far, 2)]) {
            let count = ping?.stop()?;
            println!(
                "     {mode}: {} ms, {to}: lost {} of {}",
                time.as_millis(),
                count.lost,
                count.sent
            );
            ensure!(
                count.sent > 0 && count.lost <= tolerated,
                "mode {mode}: {count:?} to {to}"
            );
        }
    }
    Ok(())
}

fn kills(lab: &Lab) -> Result<()> {
    let before = Dump::of(lab, "node1")?;
    let pings = ["shop/web-2", "shop/web-3", "shop/db-3"].map(|to| {
        Ok::<_, anyhow::Error>((
            to,
            Ping::start(lab, "shop/web-1", &lab.pod_address_v6(to)?.to_string())?,
        ))
    });
    let mut victims = lab.pids_in("node1", "bgpd")?;
    victims.push(lab.pid("node1/cali-node")?);
    for pid in &victims {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).context("cannot kill it")?;
    }
    let back = || {
        let new = lab
            .pids_in("node1", "bgpd")
            .map_err(|error| format!("{error:#}"))?;
        if new.is_empty() || new.iter().any(|pid| victims.contains(pid)) {
            return Err(format!("bgpd of node1: {new:?}"));
        }
        status_of_both_families(lab).map_err(|error| format!("{error:#}"))?;
        let now = Dump::of(lab, "node1").map_err(|error| format!("{error:#}"))?;
        let difference = before.difference(&now);
        if difference.is_empty() {
            Ok(())
        } else {
            Err(difference)
        }
    };
    eventually(LIMIT, back).map_err(anyhow::Error::msg)?;
    for ping in pings {
        let (to, ping) = ping?;
        let count = ping.stop()?;
        ensure!(count.sent > 10 && count.lost == 0, "{to}: {count:?}");
    }
    Ok(())
}
