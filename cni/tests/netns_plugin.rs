//! The real executable against the server, with real namespaces: the obligations of the CNI specification, and what is
//! particular to Cali.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::net::IpAddr;

use cali_netlink::testing::TestNs;
use serde_json::{Value, json};
use support::{Call, NODE, Node, address, soon};

const POD_IP: &str = "cni.projectcalico.org/podIP";
const CONTAINER_ID: &str = "cni.projectcalico.org/containerID";

macro_rules! kernel_test {
    ($(async fn $name:ident() $body:block)+) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() $body
        )+
    };
}

kernel_test! {
    async fn a_pod_with_both_families_reaches_its_host_and_is_reached() {
        let node = Node::new("cniadd").await;
        let pod = TestNs::new("cnipod");
        node.host.ip("address add 192.0.2.1/32 dev lo");
        node.host.ip("-6 address add 2001:db8::1/128 dev lo nodad");
        node.pod("p", json!({})).await;
        std::fs::create_dir_all(node.state_dir()).unwrap();
        std::fs::write(node.state_dir().join("mtu"), "1430\n").unwrap();
        let add = Call::new("ADD", "p", "c1", pod.name())
            .with("ipam", json!({"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": "true"}));
        let result = node.call(&add).ok();
        let (four, six) = (address(&result, 0), address(&result, 1));
        let host_name = cali_api::kubernetes::interface_name("test", "p");
        assert_eq!(result["interfaces"][0]["name"], host_name.as_str());
        assert_eq!(result["interfaces"][1]["sandbox"], format!("/run/netns/{}", pod.name()));
        assert_eq!(result["interfaces"][1]["mtu"], 1430);
        assert!(four.is_ipv4() && six.is_ipv6(), "{result}");
        pod.run("ping", &["-c1", "-W5", "192.0.2.1"]);
        pod.run("ping", &["-6", "-c1", "-W5", "2001:db8::1"]);
        node.host.run("ping", &["-c1", "-W5", &four.to_string()]);
        node.host.run("ping", &["-6", "-c1", "-W5", &six.to_string()]);
        let link = node.host.ip(&format!("-d link show {host_name}"));
        assert!(link.contains("ee:ee:ee:ee:ee:ee") && link.contains("mtu 1430") && link.contains("alias c1/eth0"), "{link}");
        let neighbours = pod.ip("neigh show");
        assert!(neighbours.contains("169.254.1.1 dev eth0 lladdr ee:ee:ee:ee:ee:ee PERMANENT"), "{neighbours}");
        let routes = pod.ip("route show");
        assert!(routes.contains("default via 169.254.1.1 dev eth0") && routes.contains("169.254.1.1 dev eth0 scope link"), "{routes}");
        soon("the pod's annotation", async || {
            node.annotations("p").await.get(POD_IP) == Some(&format!("{four}/32"))
        }).await;
        assert_eq!(node.annotations("p").await.get(CONTAINER_ID).map(String::as_str), Some("c1"));
        let check = Call { command: "CHECK", ..add.clone() }.with("prevResult", result.clone());
        node.call(&check).ok();
        pod.ip("route del default");
        assert_eq!(node.call(&check).code(), 103, "CHECK sees that the default route is gone");
    }

    async fn repeated_add_gives_the_same_and_repeated_delete_succeeds() {
        let node = Node::new("cnirep").await;
        let pod = TestNs::new("cnipod");
        node.pod("p", json!({})).await;
        let add = Call::new("ADD", "p", "c1", pod.name());
        let del = Call::new("DEL", "p", "c1", pod.name());
        let first = node.call(&add).ok();
        assert_eq!(node.call(&add).ok(), first);
        assert_eq!(node.call(&del).ok(), Value::Null);
        assert!(!pod.ip("-br link").contains("eth0"));
        assert!(node.sink.up.lock().unwrap().is_empty());
        for netns in [pod.name(), "", "calitest-never-was"] {
            assert_eq!(node.call(&Call { netns, ..del.clone() }).ok(), Value::Null);
        }
        soon("the end of the annotation", async || !node.annotations("p").await.contains_key(POD_IP)).await;
        tokio::time::timeout(support::PATIENCE, node.keeper.settled()).await.unwrap().unwrap();
        let held = node.keeper.ready().await;
        assert!(held.iter().any(|h| h.address == address(&first, 0)), "the address is back in the reserve");
        assert!(node.keeper.attachments().await.is_empty());
    }

    async fn late_delete_of_an_old_sandbox_leaves_the_new_one_alone() {
        let node = Node::new("cnistale").await;
        let (old, new) = (TestNs::new("cniold"), TestNs::new("cninew"));
        node.host.ip("address add 192.0.2.1/32 dev lo");
        node.pod("p", json!({})).await;
        let before = node.call(&Call::new("ADD", "p", "c1", old.name())).ok();
        let after = node.call(&Call::new("ADD", "p", "c2", new.name())).ok();
        assert_ne!(address(&before, 0), address(&after, 0));
        node.call(&Call::new("DEL", "p", "c1", old.name())).ok();
        new.run("ping", &["-c1", "-W5", "192.0.2.1"]);
        assert_eq!(node.sink.up.lock().unwrap().len(), 1);
        soon("the new sandbox in the annotation", async || {
            node.annotations("p").await.get(CONTAINER_ID).map(String::as_str) == Some("c2")
        }).await;
        let handles: Vec<String> = node.keeper.attachments().await.into_iter().map(|(h, _)| h).collect();
        assert_eq!(handles, ["k8s-pod-network.c2"]);
    }

    async fn delete_without_the_server_removes_the_interface_and_is_completed_later() {
        let mut node = Node::new("cniaway").await;
        let pod = TestNs::new("cnipod");
        node.pod("p", json!({})).await;
        node.call(&Call::new("ADD", "p", "c1", pod.name())).ok();
        node.stop();
        let add = node.call(&Call::new("ADD", "q", "c2", pod.name()));
        assert_eq!(add.code(), 11, "ADD waits for the server");
        assert_eq!(node.call(&Call::new("STATUS", "", "", "")).code(), 50);
        let del = node.call(&Call::new("DEL", "p", "c1", pod.name()));
        assert!(del.stderr.contains("cali-node does not answer"), "{del:?}");
        del.ok();
        assert!(!pod.ip("-br link").contains("eth0"), "the interface is gone at once");
        assert_eq!(node.keeper.attachments().await.len(), 1, "the address is not given out yet");
        node.start();
        soon("the replay", async || node.keeper.attachments().await.is_empty()).await;
        soon("the end of the note", async || {
            std::fs::read_dir(node.state_dir().join("cni-tombstones")).unwrap().next().is_none()
        }).await;
        assert!(node.sink.up.lock().unwrap().is_empty());
    }

    async fn an_unknown_pod_is_waited_for_then_the_runtime_is_asked_to_try_again() {
        let node = Node::new("cniwait").await;
        let pod = TestNs::new("cnipod");
        assert_eq!(node.call(&Call::new("ADD", "late", "c1", pod.name())).code(), 11);
        assert!(node.keeper.attachments().await.is_empty());
        let (folder, name) = (node.folder().to_owned(), pod.name().to_owned());
        let adding = tokio::task::spawn_blocking(move || {
            let call = Call::new("ADD", "late", "c1", &name);
            support::run_in(&folder, &call)
        });
        node.pod("late", json!({})).await;
        adding.await.unwrap().ok();
    }

    async fn pools_and_addresses_follow_the_annotations() {
        let node = Node::new("cnipool").await;
        let inside = |ip: IpAddr, net: &str| net.parse::<cali_api::Cidr>().unwrap().contains(ip);
        let ask = async |name: &str, annotations: Value| {
            let pod = TestNs::new("cnipod");
            node.pod(name, annotations).await;
            node.call(&Call::new("ADD", name, name, pod.name()))
        };
        let routed = ask("a", json!({"cni.projectcalico.org/ipv4pools": "[\"routed\"]"})).await.ok();
        assert!(inside(address(&routed, 0), "10.66.0.0/24"), "{routed}");
        let overlay = ask("b", json!({"cni.projectcalico.org/ipv4pools": "[\"10.65.0.0/24\"]"})).await.ok();
        assert!(inside(address(&overlay, 0), "10.65.0.0/24"), "{overlay}");
        let exact = ask("c", json!({"cni.projectcalico.org/ipAddrs": "[\"10.66.0.200\"]"})).await.ok();
        assert_eq!(address(&exact, 0).to_string(), "10.66.0.200");
        let twice = ask("d", json!({"cni.projectcalico.org/ipAddrs": "[\"10.66.0.200\"]"})).await;
        assert_eq!(twice.code(), 101);
        assert!(twice.printed["details"].as_str().unwrap().contains("pod test/c"), "{twice:?}");
        assert_eq!(ask("e", json!({"cni.projectcalico.org/ipv4pools": "[\"none\"]"})).await.code(), 101);
        assert_eq!(ask("f", json!({"cni.projectcalico.org/ipv4pools": "routed"})).await.code(), 102);
    }

    async fn a_failed_add_leaves_nothing_and_a_failed_repetition_keeps_what_stood() {
        let node = Node::new("cnifail").await;
        let pod = TestNs::new("cnipod");
        node.pod("p", json!({})).await;
        let add = Call::new("ADD", "p", "c1", pod.name());
        *node.sink.refuses.lock().unwrap() = true;
        assert_eq!(node.call(&add).code(), 11);
        assert!(!pod.ip("-br link").contains("eth0"));
        assert!(!node.host.ip("-br link").contains("cali"));
        assert!(node.keeper.attachments().await.is_empty());
        *node.sink.refuses.lock().unwrap() = false;
        let result = node.call(&add).ok();
        *node.sink.refuses.lock().unwrap() = true;
        assert_eq!(node.call(&add).code(), 11);
        assert!(pod.ip("address show eth0").contains(&address(&result, 0).to_string()));
        assert_eq!(node.keeper.attachments().await.len(), 1);
    }

    async fn an_interface_that_cannot_be_removed_keeps_its_address_until_it_can() {
        let mut node = Node::new("cnikeep").await;
        let (old, new) = (TestNs::new("cniold"), TestNs::new("cninew"));
        let same = json!({"cni.projectcalico.org/ipAddrs": "[\"10.66.0.9\"]"});
        node.pod("a", same.clone()).await;
        node.pod("b", same).await;
        node.call(&Call::new("ADD", "a", "c1", old.name())).ok();
        let interface = cali_api::kubernetes::interface_name("test", "a");
        node.stop();
        node.start_unable_to_remove();
        // Without the namespace the plugin cannot remove it either.
        let del = Call::new("DEL", "a", "c1", "");
        let said = node.call(&del);
        assert!(said.stderr.contains("cannot be removed") && said.stderr.contains("Operation not permitted"), "{said:?}");
        said.ok();
        assert!(node.host.ip("-br link").contains(&interface));
        let add = Call::new("ADD", "b", "c2", new.name());
        let refused = node.call(&add);
        assert_eq!(refused.code(), 101);
        assert!(refused.printed["details"].as_str().unwrap().contains("pod test/a"), "{refused:?}");
        assert_eq!(node.keeper.attachments().await.len(), 1);
        // What DEL has left is done once it can be.
        node.stop();
        node.start();
        soon("the removal", async || node.keeper.attachments().await.is_empty()).await;
        assert!(!node.host.ip("-br link").contains(&interface));
        let result = node.call(&add).ok();
        assert_eq!(address(&result, 0).to_string(), "10.66.0.9");
    }

    async fn an_interface_name_in_use_is_refused() {
        let node = Node::new("cniused").await;
        let pod = TestNs::new("cnipod");
        pod.ip("link add eth0 type veth peer name other");
        node.pod("p", json!({})).await;
        assert_eq!(node.call(&Call::new("ADD", "p", "c1", pod.name())).code(), 100);
        assert!(pod.ip("-br link").contains("eth0"), "it is left alone");
    }

    async fn a_pair_that_was_half_made_gives_way() {
        let node = Node::new("cnihalf").await;
        let pod = TestNs::new("cnipod");
        node.pod("p", json!({})).await;
        let host_name = cali_api::kubernetes::interface_name("test", "p");
        // As it stands when the daemon is killed before the pair has its alias.
        node.host.ip(&format!("link add {host_name} type veth peer name eth0 netns {}", pod.name()));
        node.call(&Call::new("ADD", "p", "c1", pod.name())).ok();
        assert!(node.host.ip(&format!("-d link show {host_name}")).contains("alias c1/eth0"));
    }

    async fn garbage_collection_frees_what_has_no_interface_and_is_not_listed() {
        let node = Node::new("cnigc").await;
        let pods: Vec<TestNs> = (0..3).map(|_| TestNs::new("cnipod")).collect();
        for (number, pod) in pods.iter().enumerate() {
            let (name, container) = (format!("p{number}"), format!("c{number}"));
            node.pod(&name, json!({})).await;
            node.call(&Call::new("ADD", &name, &container, pod.name())).ok();
        }
        // Two sandboxes vanish without DEL; the runtime still knows one of them.
        pods[1].ip("link del eth0");
        pods[2].ip("link del eth0");
        let gc = Call::new("GC", "", "", "")
            .with("cni.dev/valid-attachments", json!([{"containerID": "c1", "ifname": "eth0"}]));
        node.call(&gc).ok();
        let handles: Vec<String> = node.keeper.attachments().await.into_iter().map(|(h, _)| h).collect();
        assert_eq!(handles, ["k8s-pod-network.c0", "k8s-pod-network.c1"], "c0 has its interface, c1 is listed");
    }

    async fn status_and_versions_are_told() {
        let node = Node::new("cnistat").await;
        let status = Call::new("STATUS", "", "", "");
        assert_eq!(node.call(&status).ok(), Value::Null);
        *node.sink.not_ready.lock().unwrap() = true;
        assert_eq!(node.call(&status).code(), 50);
        *node.sink.not_ready.lock().unwrap() = false;
        let versions = node.call(&Call::new("VERSION", "", "", "")).ok();
        assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!("1.1.0")), "{versions}");
        for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
            let call = Call::new(command, "p", "c1", "x").with("cniVersion", json!("9.9.9"));
            assert_eq!(node.call(&call).code(), 1, "{command}");
        }
        assert_eq!(node.call(&Call::new("ADD", "p", "../c1", "x")).code(), 4);
        for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let pod = TestNs::new("cnipod");
            let name = format!("v{}", version.replace('.', ""));
            node.pod(&name, json!({})).await;
            let result = node.call(&Call::new("ADD", &name, &name, pod.name()).with("cniVersion", json!(version))).ok();
            assert_eq!(result["cniVersion"], version);
        }
    }

    async fn status_says_when_no_address_is_to_be_had() {
        let node = Node::new("cnifull").await;
        let status = |pools: Value| Call::new("STATUS", "", "", "")
            .with("ipam", json!({"type": "calico-ipam", "ipv4_pools": pools}));
        node.store.create(support::object(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
            "metadata": {"name": "tiny"}, "spec": {"cidr": "10.67.0.0/30", "blockSize": 30}
        }))).await.unwrap();
        let add = |name: &'static str, pod: &TestNs| Call::new("ADD", name, name, Box::leak(pod.name().to_owned().into_boxed_str()))
            .with("ipam", json!({"type": "calico-ipam", "ipv4_pools": ["tiny"]}));
        assert_eq!(node.call(&status(json!(["tiny"]))).ok(), Value::Null);
        let pods: Vec<TestNs> = (0..5).map(|_| TestNs::new("cnipod")).collect();
        let names = ["a", "b", "c", "d", "e"];
        for (name, pod) in names.into_iter().zip(&pods).take(4) {
            node.pod(name, json!({})).await;
            node.call(&add(name, pod)).ok();
        }
        node.pod("e", json!({})).await;
        let refused = node.call(&add("e", &pods[4]));
        assert_eq!(refused.code(), 101, "{refused:?}");
        assert!(!pods[4].ip("-br link").contains("eth0"));
        let full = node.call(&status(json!(["tiny"])));
        assert_eq!(full.code(), 50, "{full:?}");
        assert_eq!(node.call(&status(json!(["overlay"]))).ok(), Value::Null);
        node.call(&Call { command: "DEL", ..add("a", &pods[0]) }).ok();
        assert_eq!(node.call(&status(json!(["tiny"]))).ok(), Value::Null);
    }

    async fn bad_input_is_answered_with_its_code_and_leaves_nothing() {
        let node = Node::new("cnibad").await;
        let pod = TestNs::new("cnipod");
        node.pod("p", json!({})).await;
        let add = Call::new("ADD", "p", "c1", pod.name());
        let broken = Call { config: Value::String("{\"cniVersion\": ".into()), ..add.clone() };
        assert_eq!(node.call(&broken).code(), 6);
        assert_eq!(node.call(&Call { config: json!([]), ..add.clone() }).code(), 6);
        assert_eq!(node.call(&Call { command: "", ..add.clone() }).code(), 4);
        assert_eq!(node.call(&Call { command: "PAUSE", ..add.clone() }).code(), 4);
        let nowhere = node.call(&Call { netns: "calitest-never-was", ..add.clone() });
        assert_eq!(nowhere.code(), 4);
        assert!(nowhere.printed["msg"].as_str().unwrap().contains("CNI_NETNS"), "{nowhere:?}");
        assert_eq!(node.call(&Call { netns: "", ..add.clone() }).code(), 4);
        assert_eq!(node.call(&Call { ifname: "a/b", ..add.clone() }).code(), 4);
        assert_eq!(node.call(&add.clone().with("ipam", json!({"type": "dhcp"}))).code(), 7);
        assert_eq!(node.call(&Call { command: "CHECK", ..add.clone() }).code(), 7, "without prevResult");
        assert_eq!(node.call(&Call::new("GC", "", "", "")).code(), 7, "without a list");
        assert!(node.keeper.attachments().await.is_empty());
        assert!(!pod.ip("-br link").contains("eth0"));
        assert!(!node.host.ip("-br link").contains("cali"));
        assert_eq!(node.call(&Call::new("DEL", "never", "never", "")).ok(), Value::Null, "DEL of the unknown");
    }

    async fn check_names_what_was_tampered_with() {
        let node = Node::new("cnicheck").await;
        let pod = TestNs::new("cnipod");
        node.pod("p", json!({})).await;
        let add = Call::new("ADD", "p", "c1", pod.name());
        let result = node.call(&add).ok();
        let own = address(&result, 0);
        let check = Call { command: "CHECK", ..add.clone() }.with("prevResult", result.clone());
        let details = || {
            let answer = node.call(&check);
            assert_eq!(answer.code(), 103);
            answer.printed["details"].as_str().unwrap().to_owned()
        };
        node.call(&check).ok();
        pod.ip(&format!("address del {own}/32 dev eth0"));
        assert!(details().contains(&own.to_string()));
        pod.ip(&format!("address add {own}/32 dev eth0"));
        pod.ip("link set eth0 down");
        assert!(details().contains("eth0 is down in the pod"));
        pod.ip("link del eth0");
        assert!(details().contains("eth0 is missing in the pod"));
        // The runtime asks for it once more: it stands again, with the same address.
        assert_eq!(address(&node.call(&add).ok(), 0), own);
        node.call(&check).ok();
    }

    async fn settings_of_the_container_reach_its_namespace() {
        let node = Node::new("cniset").await;
        let pods: Vec<TestNs> = (0..3).map(|_| TestNs::new("cnipod")).collect();
        for (name, annotations) in [
            ("plain", json!({})),
            ("router", json!({"cni.projectcalico.org/hwAddr": "0a:58:0a:00:00:07"})),
            ("bad", json!({"cni.projectcalico.org/hwAddr": "ff:ff:ff:ff:ff:ff"})),
        ] {
            node.pod(name, annotations).await;
        }
        node.call(&Call::new("ADD", "plain", "c0", pods[0].name())).ok();
        assert_eq!(pods[0].run("sysctl", &["-n", "net.ipv4.ip_forward"]).trim(), "0");
        let router = Call::new("ADD", "router", "c1", pods[1].name())
            .with("container_settings", json!({"allow_ip_forwarding": true}));
        let result = node.call(&router).ok();
        assert_eq!(pods[1].run("sysctl", &["-n", "net.ipv4.ip_forward"]).trim(), "1");
        assert_eq!(result["interfaces"][1]["mac"], "0a:58:0a:00:00:07");
        assert!(pods[1].ip("link show eth0").contains("0a:58:0a:00:00:07"));
        assert_eq!(node.call(&Call::new("ADD", "bad", "c2", pods[2].name())).code(), 102);
        assert_eq!(node.keeper.attachments().await.len(), 2);
    }

    async fn bandwidth_is_limited_in_both_directions() {
        const BYTES: usize = 1_500_000;
        let node = Node::new("cniband").await;
        let pod = TestNs::new("cnipod");
        node.host.ip("address add 192.0.2.1/32 dev lo");
        // 4 Mbit/s, and 64 KiB at once: all but that takes 2.8 s at least.
        node.pod("p", json!({"kubernetes.io/ingress-bandwidth": "4M", "kubernetes.io/egress-bandwidth": "4M"})).await;
        let result = node.call(&Call::new("ADD", "p", "c1", pod.name())).ok();
        let own = address(&result, 0);
        let floor = std::time::Duration::from_millis(2_500);
        let took = support::transfer(&node.host, &pod, own, BYTES);
        assert!(took > floor, "towards the pod: {took:?}\n{}", node.host.run("tc", &["-s", "qdisc"]));
        let took = support::transfer(&pod, &node.host, "192.0.2.1".parse().unwrap(), BYTES);
        assert!(took > floor, "from the pod: {took:?}\n{}", pod.run("tc", &["-s", "qdisc"]));
        assert!(pod.run("tc", &["qdisc"]).contains("tbf"));
        let free = TestNs::new("cnipod");
        node.pod("q", json!({})).await;
        node.call(&Call::new("ADD", "q", "c2", free.name())).ok();
        assert!(!free.run("tc", &["qdisc"]).contains("tbf"), "nobody else is held back");
        assert_eq!(node.host.run("tc", &["qdisc"]).matches("tbf").count(), 1);
    }

    async fn a_pod_of_the_same_name_that_is_gone_is_not_taken_for_the_new_one() {
        let node = Node::new("cniuid").await;
        let pod = TestNs::new("cnipod");
        node.pod("p", json!({})).await;
        let key = cali_api::Key::namespaced(cali_api::Kind::K8sPod, "test", "p");
        let uid = node.store.get(&key).await.unwrap().object.metadata().uid.clone().unwrap();
        let other = node.call(&Call::new("ADD", "p;K8S_POD_UID=of-another", "c1", pod.name()));
        assert_eq!(other.code(), 11, "{other:?}");
        assert!(other.printed["msg"].as_str().unwrap().contains("another one of the same name"), "{other:?}");
        let same = format!("p;K8S_POD_UID={uid}");
        node.call(&Call::new("ADD", &same, "c1", pod.name())).ok();
    }

    async fn address_plugin_gives_addresses_only() {
        let node = Node::new("cniipam").await;
        node.pod("p", json!({})).await;
        let pod = TestNs::new("cnipod");
        let add = Call { program: env!("CARGO_BIN_EXE_calico-ipam"), ..Call::new("ADD", "p", "c1", pod.name()) };
        let result = node.call(&add).ok();
        assert!(address(&result, 0).is_ipv4() && result.get("interfaces").is_none(), "{result}");
        assert!(!pod.ip("-br link").contains("eth0"));
        node.call(&Call { command: "CHECK", ..add.clone() }).ok();
        node.call(&Call { command: "DEL", ..add.clone() }).ok();
        assert!(node.keeper.attachments().await.is_empty());
    }

    async fn a_container_that_is_no_pod_gets_a_workload_endpoint() {
        let node = Node::new("cniplain").await;
        let pod = TestNs::new("cnipod");
        let result = node.call(&Call::new("ADD", "", "container-1", pod.name())).ok();
        let key = cali_api::Key::namespaced(cali_api::Kind::WorkloadEndpoint, "default", format!("{NODE}-cni-container--1-eth0"));
        soon("the endpoint", async || node.store.get(&key).await.is_ok()).await;
        let endpoint = node.store.get(&key).await.unwrap().object.to_json();
        assert_eq!(endpoint["spec"]["ipNetworks"][0], format!("{}/32", address(&result, 0)));
        node.call(&Call::new("DEL", "", "container-1", pod.name())).ok();
        soon("its end", async || node.store.get(&key).await.is_err()).await;
    }

    async fn many_adds_at_once_give_different_addresses() {
        const PODS: usize = 24;
        let node = Node::new("cnimany").await;
        let pods: Vec<TestNs> = (0..PODS).map(|_| TestNs::new("cnipod")).collect();
        for number in 0..PODS {
            node.pod(&format!("p{number}"), json!({})).await;
        }
        let mut calls = tokio::task::JoinSet::new();
        for (number, pod) in pods.iter().enumerate() {
            let (folder, netns) = (node.folder().to_owned(), pod.name().to_owned());
            calls.spawn_blocking(move || {
                let (name, container) = (format!("p{number}"), format!("c{number}"));
                support::run_in(&folder, &Call::new("ADD", &name, &container, &netns)).ok()
            });
        }
        let results = calls.join_all().await;
        let different: BTreeSet<IpAddr> = results.iter().map(|r| address(r, 0)).collect();
        assert_eq!(different.len(), PODS);
    }

    async fn a_restarted_server_publishes_what_was_answered_before() {
        let mut node = Node::new("cniresume").await;
        let pods = [TestNs::new("cnipod"), TestNs::new("cnipod")];
        // The addresses of one are not ours: only its interface and the route over it tell of it.
        node.pod("ours", json!({})).await;
        node.pod("theirs", json!({"cni.projectcalico.org/ipAddrsNoIpam": "[\"10.99.0.5\"]"})).await;
        let mut results = Vec::new();
        for (name, pod) in ["ours", "theirs"].into_iter().zip(&pods) {
            let container = format!("c-{name}");
            let call = Call::new("ADD", name, &container, pod.name())
                .with("feature_control", json!({"ip_addrs_no_ipam": true}));
            results.push(node.call(&call).ok());
            soon("the annotation", async || node.annotations(name).await.contains_key(POD_IP)).await;
        }
        assert_eq!(address(&results[1], 0), IpAddr::from([10, 99, 0, 5]));
        node.stop();
        // As if the daemon had died between the answer and the annotation.
        for name in ["ours", "theirs"] {
            let key = cali_api::Key::namespaced(cali_api::Kind::K8sPod, "test", name);
            let mut stored = node.store.get(&key).await.unwrap().object.as_ref().clone();
            let annotations = &mut stored.metadata_mut().annotations;
            annotations.retain(|name, _| name.ends_with("NoIpam"));
            node.store.update(stored).await.unwrap();
        }
        node.sink.up.lock().unwrap().clear();
        node.start();
        for (name, result) in ["ours", "theirs"].into_iter().zip(&results) {
            soon("the annotation", async || {
                node.annotations(name).await.get(POD_IP) == Some(&format!("{}/32", address(result, 0)))
            }).await;
        }
        soon("the endpoints", async || node.sink.up.lock().unwrap().len() == 2).await;
    }

    async fn what_an_earlier_run_left_half_made_is_left_to_the_next_add() {
        let mut node = Node::new("cnihalf").await;
        let pods = [TestNs::new("cnipod"), TestNs::new("cnipod")];
        for (name, pod) in ["half", "whole"].into_iter().zip(&pods) {
            node.pod(name, json!({})).await;
            node.call(&Call::new("ADD", name, &format!("c-{name}"), pod.name())).ok();
            soon("the annotation", async || node.annotations(name).await.contains_key(POD_IP)).await;
        }
        node.stop();
        for name in ["half", "whole"] {
            let key = cali_api::Key::namespaced(cali_api::Kind::K8sPod, "test", name);
            let mut stored = node.store.get(&key).await.unwrap().object.as_ref().clone();
            stored.metadata_mut().annotations.clear();
            node.store.update(stored).await.unwrap();
        }
        // As a daemon leaves it that dies before it has set the interface up.
        let half = cali_api::kubernetes::interface_name("test", "half");
        node.host.ip(&format!("link set {half} down"));
        node.sink.up.lock().unwrap().clear();
        node.start();
        // They are looked at in this order.
        soon("the annotation", async || node.annotations("whole").await.contains_key(POD_IP)).await;
        soon("the endpoint", async || !node.sink.up.lock().unwrap().is_empty()).await;
        assert_eq!(node.sink.up.lock().unwrap().len(), 1);
        assert!(!node.annotations("half").await.contains_key(POD_IP));
    }

    async fn as_loopback_it_looks_after_lo_without_the_server() {
        let mut node = Node::new("cnilo").await;
        node.stop();
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("loopback");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_calico"), &program).unwrap();
        let pod = TestNs::new("cnipod");
        pod.ip("link set lo down");
        let up = || pod.ip("link show lo").contains("LOWER_UP");
        // As containerd calls it.
        let call = |command| Call {
            program: program.to_str().unwrap(),
            ifname: "lo",
            config: json!({"cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback"}),
            ..Call::new(command, "p", "c1", pod.name())
        };
        assert_eq!(node.call(&call("CHECK")).code(), 103);
        let result = node.call(&call("ADD")).ok();
        assert_eq!(result["interfaces"][0]["sandbox"], format!("/run/netns/{}", pod.name()));
        assert_eq!(result["ips"][0]["address"], "127.0.0.1/8");
        assert!(up());
        pod.run("ping", &["-c1", "-W5", "127.0.0.1"]);
        node.call(&call("CHECK")).ok();
        let given = node.call(&call("ADD").with("prevResult", json!({"cniVersion": "0.3.1", "ips": []}))).ok();
        assert_eq!(given, json!({"cniVersion": "0.3.1", "ips": []}));
        node.call(&call("DEL")).ok();
        assert!(!up());
        node.call(&Call { netns: "calitest-gone", ..call("DEL") }).ok();
        node.call(&Call { netns: "", ..call("DEL") }).ok();
        assert_eq!(node.call(&Call { netns: "calitest-gone", ..call("ADD") }).code(), 4);
        assert_eq!(node.call(&call("VERSION")).ok()["supportedVersions"][6], "1.1.0");
    }
}
