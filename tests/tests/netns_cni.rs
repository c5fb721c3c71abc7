//! The plugin beside the whole daemon, both as built: killed in the middle of its work, and host ports under policy.

#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use cali_netlink::testing::{TestNs, eventually};
use cali_tests::cni::{LIMIT, Node, given};
use cali_tests::traffic;
use felix::conformance::{Answer, Probe, listen, probe};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_leaves_nothing_that_the_next_add_cannot_finish() {
    const ROUNDS: u64 = 8;
    let mut node = Node::new().await;
    let nothing = json!({});
    node.start();
    let warm = TestNs::new("cnipod");
    node.pod("warm").await;
    node.add("warm", &warm, &nothing);
    let mut pods = Vec::new();
    for round in 0..ROUNDS {
        let (name, pod) = (format!("p{round}"), TestNs::new("cnipod"));
        node.pod(&name).await;
        let cut = node.plugin("ADD", &name, &pod, &nothing);
        // From before the call has come in until after it has been answered.
        std::thread::sleep(Duration::from_millis(round * 6));
        node.kill();
        let first = given(&cut.wait_with_output().unwrap());
        node.start();
        let address = node.add(&name, &pod, &nothing);
        if let Some(first) = first {
            assert_eq!(first, address, "what was answered stays");
        }
        eventually(LIMIT, || {
            if node.host_reaches(address) {
                Ok(())
            } else {
                Err(format!("no answer from {address}\n{}", node.log()))
            }
        });
        pods.push((name, pod, address));
    }
    let mut addresses: Vec<IpAddr> = pods.iter().map(|(_, _, address)| *address).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), pods.len());
    node.is_consistent();
    let links = node.host.ip("-br link");
    assert_eq!(links.matches("cali").count(), pods.len() + 1, "{links}");
    for (name, pod, _) in &pods {
        node.runtime.del(name, pod);
    }
    let links = node.host.ip("-br link");
    assert_eq!(links.matches("cali").count(), 1, "{links}");
    node.is_consistent();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_port_obeys_the_policy_of_its_container() {
    let mut node = Node::new().await;
    node.start();
    let pod = TestNs::new("cnipod");
    node.pod("web").await;
    let ports = json!({"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}});
    node.add("web", &pod, &ports);
    traffic::greet(pod.netns(), 80);
    let to: SocketAddr = "192.0.2.1:8080".parse().unwrap();
    let becomes = |wanted: Option<&str>| {
        eventually(LIMIT, || {
            let seen = traffic::asked(node.outside.netns(), to);
            if seen.as_deref() == wanted {
                Ok(())
            } else {
                Err(format!("{seen:?} instead of {wanted:?}\n{}", node.log()))
            }
        });
    };
    becomes(Some("192.0.2.2"));
    let policy = |net: &str| {
        json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
            "metadata": {"name": "web", "namespace": "test"},
            "spec": {"selector": "app == 'web'", "ingress": [
                {"action": "Allow", "protocol": "TCP", "source": {"nets": [net]}, "destination": {"ports": [80]}}]}})
    };
    node.put(policy("198.51.100.0/24")).await;
    becomes(None);
    // The client's own address and the container's port are what policy sees.
    node.put(policy("192.0.2.2/32")).await;
    becomes(Some("192.0.2.2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_sctp_port_of_the_host_leads_to_its_container() {
    let mut node = Node::new().await;
    node.start();
    let pod = TestNs::new("cnipod");
    node.pod("web").await;
    let ports = json!({"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "sctp"}]}});
    node.add("web", &pod, &ports);
    // By hand: this needs no SCTP in the kernel but that of connection tracking.
    let _answering = listen(pod.netns(), Probe::Sctp(80));
    let host: IpAddr = "192.0.2.1".parse().unwrap();
    let becomes = |port: u16, wanted: &Answer| {
        eventually(LIMIT, || {
            let seen = probe(node.outside.netns(), host, Probe::Sctp(port), 0, true);
            if seen == *wanted {
                Ok(())
            } else {
                Err(format!(
                    "{port}: {seen:?} instead of {wanted:?}\n{}",
                    node.log()
                ))
            }
        });
    };
    becomes(8080, &Answer::Yes);
    let elsewhere = probe(node.outside.netns(), host, Probe::Sctp(8081), 0, true);
    assert_ne!(elsewhere, Answer::Yes, "only the port that was asked for");
    node.runtime.del("web", &pod);
    let gone = probe(node.outside.netns(), host, Probe::Sctp(8080), 0, true);
    assert_ne!(gone, Answer::Yes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_with_action_log_writes_a_line_with_the_words_that_are_set() {
    let mut node = Node::new().await;
    node.put(json!({"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration",
        "metadata": {"name": "default"}, "spec": {"logPrefix": "seen by %k %p", "logActionRateLimit": "1/hour", "logActionRateLimitBurst": 2}}))
    .await;
    node.put(
        json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": "test"},
        "spec": {"selector": "app == 'web'", "ingress": [
            {"action": "Deny", "protocol": "TCP", "destination": {"ports": [81]}},
            {"action": "Log", "protocol": "UDP", "destination": {"ports": [53]}}]}}),
    )
    .await;
    node.start();
    let pod = TestNs::new("cnipod");
    node.pod("web").await;
    let address = node.add("web", &pod, &json!({}));
    node.outside
        .ip(&format!("route add {address} via 192.0.2.1"));
    let send = move || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"a", (address, 53)).unwrap();
        socket.local_addr().unwrap().port()
    };
    let ports: Vec<u16> = (0..4)
        .map(|_| node.outside.netns().run(send).unwrap())
        .collect();
    let line = |port: u16| {
        format!(
            "seen by NetworkPolicy test/web policy=\"np/test/web\" direction=\"ingress\" rule=1 protocol=17 source=192.0.2.2 source_port={port} destination={address} destination_port=53"
        )
    };
    eventually(LIMIT, || {
        let log = node.log();
        let written = |port: &&u16| log.contains(&line(**port));
        if ports.iter().filter(written).count() == 2 {
            Ok(())
        } else {
            Err(format!("not two lines of {ports:?}\n{log}"))
        }
    });
    // The limit is for all packets of the rule; those beyond it are not written.
    assert_eq!(node.log().matches("seen by").count(), 2);
}
