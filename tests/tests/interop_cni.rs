//! The plugin beside Debian's own: addresses by `host-local`.

#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::net::IpAddr;

use cali_netlink::testing::{TestNs, eventually};
use cali_tests::bgp::package;
use cali_tests::cni::{LIMIT, NODE, Node, given, told};
use serde_json::{Value, json};

/// What the other plugin has given away, as it writes it down: a file for each address.
fn taken(node: &Node) -> Vec<String> {
    let folder = node.folder().join("networks/k8s-pod-network");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().into_string().unwrap());
    let mut addresses: Vec<String> = names
        .filter(|name| name.parse::<IpAddr>().is_ok())
        .collect();
    addresses.sort();
    addresses
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_may_come_from_another_plugin() {
    let mut node = Node::new().await;
    let plugins = package::folder("cni-plugins").unwrap().join("usr/lib/cni");
    node.runtime.look_for_plugins_in(plugins);
    node.put(
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
        "spec": {"podCIDR": "10.77.5.0/24", "podCIDRs": ["10.77.5.0/24", "fd77:5::/64"]}}),
    )
    .await;
    node.start();
    let local = json!({"ipam": {"type": "host-local", "dataDir": node.folder().join("networks"),
        "ranges": [[{"subnet": "usePodCidr"}], [{"subnet": "usePodCidrIPv6"}]]}});
    let pods = [("a", TestNs::new("cnipod")), ("b", TestNs::new("cnipod"))];
    let mut addresses = Vec::new();
    for (name, pod) in &pods {
        node.pod(name).await;
        addresses.push(node.add(name, pod, &local));
    }
    // It goes on from the last that it gave away: which ones these are, attempts before the daemon was ready say.
    let held: Vec<IpAddr> = taken(&node).iter().map(|a| a.parse().unwrap()).collect();
    let of = |v4: bool| held.iter().copied().filter(move |a| a.is_ipv4() == v4);
    assert_eq!(of(true).collect::<Vec<_>>(), addresses);
    assert!(
        addresses
            .iter()
            .all(|a| a.to_string().starts_with("10.77.5."))
    );
    let sixes: Vec<IpAddr> = of(false).collect();
    assert_eq!(sixes.len(), 2, "{held:?}");
    for address in &addresses {
        eventually(LIMIT, || match node.host_reaches(*address) {
            true => Ok(()),
            false => Err(format!("no answer from {address}\n{}", node.log())),
        });
    }
    let six = pods[0]
        .1
        .output("ping", &["-c1", "-W5", &sixes[1].to_string()]);
    assert!(six.status.success(), "{}\n{}", told(&six), node.log());

    // A second ADD of the same container is refused by the other plugin; what stands stays.
    let again = node.plugin("ADD", "a", &pods[0].1, &local);
    assert_eq!(given(&again.wait_with_output().unwrap()), None);
    assert!(node.host_reaches(addresses[0]));
    assert!(
        !node
            .calictl(&["ipam", "show", "--ip=10.65.0.0"])
            .contains("test")
    );

    // An ADD that fails after the address was given gives it back.
    let fails: Value = {
        let mut config = local.clone();
        config["runtimeConfig"] = json!({"mac": "01:00:00:00:00:01"});
        config
    };
    let (third, before) = (TestNs::new("cnipod"), taken(&node));
    node.pod("c").await;
    eventually(LIMIT, || {
        let output = node.plugin("ADD", "c", &third, &fails).wait_with_output();
        let said = told(&output.unwrap());
        if said.contains("runtimeConfig.mac") {
            Ok(())
        } else {
            Err(said)
        }
    });
    assert_eq!(taken(&node), before);

    // The daemon is away: what the other plugin gave is given back all the same, and the rest is done later.
    node.kill();
    for (name, pod) in &pods {
        node.runtime.del_with(name, pod, &local);
    }
    assert_eq!(taken(&node), Vec::<String>::new());
    node.runtime.del_with("a", &pods[0].1, &local);
    let links = node.host.ip("-br link");
    assert!(!links.contains("cali"), "{links}");
}
