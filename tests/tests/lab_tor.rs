//! Two racks and two top-of-rack routers: eBGP, equal-cost paths, and a router that is taken out.

use anyhow::{Context, Result, ensure};
use cali_tests::eventually;
use cali_tests::lab::{Lab, checked, programs};
use cali_tests::table::{block_of, find, gateways, node_status, routes_v4};
use cali_tests::traffic::Ping;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);
/// Node, its address, its pod, the routers of its rack.
const NODES: [(&str, &str, &str, [&str; 2]); 3] = [
    (
        "node1",
        "10.0.1.1",
        "shop/web-1",
        ["10.0.1.251", "10.0.1.252"],
    ),
    (
        "node2",
        "10.0.1.2",
        "shop/web-2",
        ["10.0.1.251", "10.0.1.252"],
    ),
    (
        "node3",
        "10.0.2.3",
        "shop/web-3",
        ["10.0.2.251", "10.0.2.252"],
    ),
];

/// Cluster IP, external IP and load balancer IP of the service with `externalTrafficPolicy: Local`.
const LOCAL_ADDRESSES: [&str; 3] = ["10.96.0.10", "203.0.113.10", "198.51.100.10"];
const SERVICES: &str = "
apiVersion: projectcalico.org/v3
kind: BGPConfiguration
metadata:
  name: default
spec:
  nodeToNodeMeshEnabled: false
  serviceClusterIPs: [{cidr: 10.96.0.0/16}]
  serviceExternalIPs: [{cidr: 203.0.113.0/24}]
  serviceLoadBalancerIPs: [{cidr: 198.51.100.0/24}]
---
apiVersion: v1
kind: Service
metadata:
  name: web-local
  namespace: shop
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  externalIPs: [203.0.113.10]
  ports: [{port: 80, targetPort: 8080}]
status:
  loadBalancer:
    ingress: [{ip: 198.51.100.10}]
---
apiVersion: v1
kind: Service
metadata:
  name: web-anywhere
  namespace: shop
spec:
  type: ClusterIP
  clusterIP: 10.96.0.11
  clusterIPs: [10.96.0.11]
  externalIPs: [203.0.113.11]
  ports: [{port: 80, targetPort: 8080}]
";

#[test]
fn lab_tor() {
    let (lab, printed) = Lab::up("tor.clab.yml").unwrap_or_else(|error| panic!("{error:#}"));
    println!("{printed}");
    lab.check_all(&[
        ("nodes peer with the two routers of their rack", sessions),
        ("blocks are reached over both routers", both_routers),
        ("the routers have every block", routers),
        ("connections are as the policies say", |lab| {
            lab.show(12).map(drop)
        }),
        ("packets between the racks go over both routers", spread),
        (
            "a router has the addresses of services, and goes to the nodes with their pods",
            services,
        ),
        (
            "a router reaches a borrowed address over the pod's node",
            borrowed,
        ),
        (
            "a pod peers with its node, and what it announces is reached over it",
            workload_peer,
        ),
        (
            "a router whose peerings are deleted is left without a loss",
            one_router_less,
        ),
    ]);
}

fn sessions(lab: &Lab) -> Result<()> {
    for (node, _, _, routers) in NODES {
        let text = node_status(lab, node)?;
        for router in routers {
            ensure!(
                text.lines()
                    .any(|line| line.contains(&format!("| {router} "))
                        && line.contains("Established")),
                "{node} has no session with {router}\n{text}"
            );
        }
        ensure!(!text.contains("mesh"), "{node} has a mesh session\n{text}");
    }
    Ok(())
}

/// Every node reaches every other node's block over these of its rack's routers.
fn over(lab: &Lab, wanted: fn([&'static str; 2]) -> Vec<&'static str>) -> Result<()> {
    for (node, _, _, routers) in NODES {
        for (owner, _, pod, _) in NODES.iter().filter(|(owner, ..)| *owner != node) {
            let block = block_of(lab, pod)?;
            let check = || {
                let routes = routes_v4(lab, node).map_err(|error| format!("{error:#}"))?;
                find(&routes, &block, &[("protocol", "bird")])?;
                let seen = gateways(&routes, &block)?;
                if seen == wanted(routers) {
                    Ok(())
                } else {
                    Err(format!("{seen:?}"))
                }
            };
            eventually(LIMIT, check)
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("{node}: the block of {owner}"))?;
        }
    }
    Ok(())
}

fn both_routers(lab: &Lab) -> Result<()> {
    over(lab, |routers| routers.to_vec())
}

/// A router goes straight to the block's own node, never over another one.
fn routers(lab: &Lab) -> Result<()> {
    for router in ["tor1", "tor2"] {
        for (owner, address, pod, _) in NODES {
            let block = block_of(lab, pod)?;
            let check = || {
                let routes = routes_v4(lab, router).map_err(|error| format!("{error:#}"))?;
                let seen = gateways(&routes, &block)?;
                if seen == [address] {
                    Ok(())
                } else {
                    Err(format!("{seen:?}"))
                }
            };
            eventually(LIMIT, check)
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("{router}: the block of {owner}"))?;
        }
    }
    Ok(())
}

/// Packets that a router has sent into the rack of node3.
fn sent(lab: &Lab, router: &str) -> Result<u64> {
    let text = lab.exec(
        router,
        &["cat", "/sys/class/net/eth2/statistics/tx_packets"],
    )?;
    Ok(text.trim().parse()?)
}

/// The kernel spreads by addresses (`fib_multipath_hash_policy` 0), so several destinations are needed: every address
/// of the other node's block takes the same route, and its node refuses those that no pod has.
fn spread(lab: &Lab) -> Result<()> {
    let base: std::net::Ipv4Addr = block_of(lab, "shop/web-3")?
        .trim_end_matches("/26")
        .parse()?;
    let both = || {
        let count = || -> Result<[u64; 2]> { Ok([sent(lab, "tor1")?, sent(lab, "tor2")?]) };
        let before = count().map_err(|error| format!("{error:#}"))?;
        for offset in 0..32 {
            let to = std::net::Ipv4Addr::from(u32::from(base) + offset).to_string();
            // Most of them are not answered.
            let _ = lab.exec(
                "shop/web-1",
                &["ping", "-n", "-q", "-c", "1", "-W", "0.01", &to],
            );
        }
        let after = count().map_err(|error| format!("{error:#}"))?;
        let sent = [after[0] - before[0], after[1] - before[1]];
        if sent.iter().all(|packets| *packets >= 5) {
            Ok(sent)
        } else {
            Err(format!("sent {sent:?}"))
        }
    };
    let (sent, _) = eventually(LIMIT, both).map_err(anyhow::Error::msg)?;
    println!("     tor1 sent {} packets, tor2 {}", sent[0], sent[1]);
    Ok(())
}

/// The gateways of a destination at a router; none if there is no route.
fn reached(lab: &Lab, router: &str, destination: &str, wanted: &[&str]) -> Result<()> {
    let check = || {
        let routes = routes_v4(lab, router).map_err(|error| format!("{error:#}"))?;
        let here = routes.iter().any(|route| route["dst"] == destination);
        let seen = if here {
            gateways(&routes, destination)?
        } else {
            Vec::new()
        };
        if seen == wanted {
            Ok(())
        } else {
            Err(format!("{seen:?}, not {wanted:?}"))
        }
    };
    eventually(LIMIT, check)
        .map_err(anyhow::Error::msg)
        .with_context(|| format!("{router}: gateways of {destination}"))?;
    Ok(())
}

/// The service has one pod; its address and node are those of the slice.
fn slice(lab: &Lab, node: &str, pod: &str) -> Result<()> {
    let address = lab.pod_address(pod)?;
    lab.apply(&format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-local-1\n  namespace: shop\n  \
         labels:\n    kubernetes.io/service-name: web-local\naddressType: IPv4\nports:\n  - port: 8080\nendpoints:\n  \
         - addresses: [{address}]\n    nodeName: {node}\n    conditions:\n      ready: true\n"
    ))?;
    Ok(())
}

/// Ranges come from every node; with `externalTrafficPolicy: Local` the addresses of a service come from those alone
/// that have a pod of it.
fn services(lab: &Lab) -> Result<()> {
    lab.apply(SERVICES)?;
    slice(lab, "node1", "shop/web-1")?;
    for address in LOCAL_ADDRESSES {
        for router in ["tor1", "tor2"] {
            reached(lab, router, address, &["10.0.1.1"])?;
        }
    }
    for range in ["10.96.0.0/16", "203.0.113.0/24", "198.51.100.0/24"] {
        let told = || {
            let calictl = programs().join("calictl").display().to_string();
            let words = [
                "lab", "exec", "tor1", "--", &calictl, "bgp", "routes", "-o", "json",
            ];
            let output = lab.calictl(&words).output();
            let text = checked(output.map_err(|error| error.to_string())?, || {
                "calictl bgp routes".to_owned()
            });
            let text = text.map_err(|error| format!("{error:#}"))?;
            let routes: Vec<serde_json::Value> =
                serde_json::from_str(&text).map_err(|error| error.to_string())?;
            let mut from: Vec<&str> = routes
                .iter()
                .filter(|route| route["prefix"] == range)
                .filter_map(|route| route["next_hop"].as_str())
                .collect();
            from.sort_unstable();
            if from == ["10.0.1.1", "10.0.1.2", "10.0.2.3"] {
                Ok(())
            } else {
                Err(format!("paths over {from:?}"))
            }
        };
        eventually(LIMIT, told)
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("tor1: {range}"))?;
    }
    // No address of a service without `Local` is there by itself.
    reached(lab, "tor1", "203.0.113.11", &[])?;
    // The pod moves, then it is gone.
    slice(lab, "node3", "shop/web-3")?;
    for address in LOCAL_ADDRESSES {
        reached(lab, "tor1", address, &["10.0.2.3"])?;
    }
    let delete = ["delete", "endpointslice", "web-local-1", "-n", "shop"];
    let output = lab.calictl(&delete).output()?;
    checked(output, || "delete endpointslice".to_owned())?;
    for address in LOCAL_ADDRESSES {
        reached(lab, "tor1", address, &[])?;
    }
    Ok(())
}

/// A pod of node1 makes a block node1's; one of node2 has an address out of it.
fn borrowed(lab: &Lab) -> Result<()> {
    let block = block_of(lab, "shop/lender")?;
    ensure!(
        block == block_of(lab, "shop/loan")?,
        "the addresses are of two blocks"
    );
    reached(lab, "tor1", &block, &["10.0.1.1"])?;
    let address = lab.pod_address("shop/loan")?;
    for router in ["tor1", "tor2"] {
        reached(lab, router, &address, &["10.0.1.2"])?;
    }
    lab.exec("tor1", &["ping", "-n", "-c", "1", "-W", "5", &address])?;
    Ok(())
}

/// Workloads peer with an address that every node has, whatever its own are.
const PEERING: &str = "169.254.200.1";
/// What the pod announces.
const ANNOUNCED: &str = "192.0.2.0/24";
const WORKLOAD_PEERS: &str = "
apiVersion: projectcalico.org/v3
kind: BGPConfiguration
metadata:
  name: default
spec:
  nodeToNodeMeshEnabled: false
  localWorkloadPeeringIPV4: 169.254.200.1
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata:
  name: router-pods
spec:
  node: node2
  localWorkloadSelector: projectcalico.org/namespace == 'shop'
  asNumber: 65200
---
apiVersion: projectcalico.org/v3
kind: BGPFilter
metadata:
  name: from-pods
spec:
  exportV4: [{cidr: 192.0.2.0/24, matchOperator: Equal, action: Accept}]
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata:
  name: rack-a-tor1
spec:
  nodeSelector: rack == 'a'
  peerIP: 10.0.1.251
  asNumber: 65000
  filters: [from-pods]
---
apiVersion: projectcalico.org/v3
kind: FelixConfiguration
metadata:
  name: default
spec:
  defaultEndpointToHostAction: Accept
";

/// A speaker in a pod dials the node's peering address. Its prefix leads to the pod on its node, over the node elsewhere.
fn workload_peer(lab: &Lab) -> Result<()> {
    lab.apply(WORKLOAD_PEERS)?;
    let pod = lab.pod_address("shop/web-2")?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("bgpd.toml");
    std::fs::write(
        &file,
        format!(
            "router-id = \"{pod}\"\nas = 65200\n[[neighbor]]\naddress = \"{PEERING}\"\nas = 65102\nrestart-time = 0\n\
             [[announce]]\nprefix = \"{ANNOUNCED}\"\n"
        ),
    )?;
    let bgpd = programs().join("bgpd").display().to_string();
    let run = format!("CALI_RUN_DIR={}", folder.path().display());
    let file = file.display().to_string();
    let mut speaker = lab.spawn("shop/web-2", &["env", &run, &bgpd, "--config", &file])?;
    let checked = speaks(lab, &pod);
    speaker.kill()?;
    let said = speaker.wait_with_output()?;
    checked.with_context(|| String::from_utf8_lossy(&said.stderr).into_owned())?;
    // The session is gone, and what came over it.
    reached(lab, "node2", ANNOUNCED, &[])?;
    // Without the setting the address is nobody's.
    lab.apply(&WORKLOAD_PEERS.replace("  localWorkloadPeeringIPV4: 169.254.200.1\n", ""))?;
    let gone = || match local_addresses(lab) {
        Ok(text) if !text.contains(PEERING) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    eventually(LIMIT, gone).map_err(anyhow::Error::msg)?;
    Ok(())
}

fn local_addresses(lab: &Lab) -> Result<String> {
    lab.exec("node2", &["ip", "route", "show", "table", "local"])
}

fn speaks(lab: &Lab, pod: &str) -> Result<()> {
    reached(lab, "node2", ANNOUNCED, &[pod])?;
    reached(lab, "tor1", ANNOUNCED, &["10.0.1.2"])?;
    let local = local_addresses(lab)?;
    ensure!(
        local.contains(&format!("local {PEERING} dev lo proto 80")),
        "{local}"
    );
    let status = node_status(lab, "node2")?;
    ensure!(status.contains(pod), "{status}");
    Ok(())
}

/// Both of a router's peerings are deleted, as before maintenance; the router itself forwards on.
fn one_router_less(lab: &Lab) -> Result<()> {
    let ping = Ping::start(lab, "shop/web-1", &lab.pod_address("shop/web-3")?)?;
    for peer in ["rack-a-tor2", "rack-b-tor2"] {
        let output = lab.calictl(&["delete", "bgppeer", peer]).output()?;
        checked(output, || format!("delete bgppeer {peer}"))?;
    }
    over(lab, |routers| vec![routers[0]])?;
    let count = ping.stop()?;
    ensure!(count.sent > 0 && count.lost == 0, "{count:?}");
    Ok(())
}
