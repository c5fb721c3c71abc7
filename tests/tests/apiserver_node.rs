//! A node on a real API server, from `kubectl apply` to packets: the built programs under the accounts and roles of the manifests, for either
//! group of Calico's kinds. What the roles allow is what the programs ask for, and nothing is denied them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use cali_api::schema::Group;
use cali_datastore::testing::{Asked, Right};
use cali_netlink::testing::{TestNs, eventually};
use cali_tests::cluster::{ACCOUNTS, Cluster, NODE, user};
use cali_tests::cni::told;
use cali_tests::traffic;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// What a user writes before there are pods.
const WORLD: &str = r#"
{apiVersion: v1, kind: ServiceAccount, metadata: {name: guest, namespace: shop, labels: {trust: low}}}
---
{apiVersion: API, kind: IPPool, metadata: {name: pods}, spec: {cidr: 10.65.0.0/24, blockSize: 28, ipipMode: Never, vxlanMode: Never}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}, annotations: {cni.projectcalico.org/ipv4pools: '["pods"]'}},
 spec: {nodeName: node1, containers: [{name: c, image: i, ports: [{name: http, containerPort: 80}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, namespace: shop, labels: {app: client}, annotations: {cni.projectcalico.org/ipv4pools: '["pods"]'}},
 spec: {nodeName: node1, serviceAccountName: guest, containers: [{name: c, image: i}]}}
"#;

/// Policy of Kubernetes that lets nobody in who is not of another team.
const KUBERNETES_POLICY: &str = r#"
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: shop},
 spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress], ingress: [{from: [{namespaceSelector: {matchLabels: {team: other}}}]}]}}
"#;

/// Policy of Calico: port 80, by its name, is not for accounts that are trusted little; everything else is as it was.
const GLOBAL_POLICY: &str = r#"
{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: guests}, spec: {order: 10, selector: "app == 'web'", types: [Ingress], ingress: [
 {action: Deny, protocol: TCP, source: {serviceAccounts: {selector: "trust == 'low'"}}, destination: {ports: [http]}}, {action: Allow}]}}
"#;

/// Selectors have a grammar that no schema knows; the node says what is wrong, beside the object.
const BAD_SELECTOR: &str = r#"
{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: unreadable}, spec: {selector: "app = 'web'", types: [Ingress]}}
"#;

/// Manifests that the API server refuses, and what it has to say of each.
const REFUSED: &[(&str, &[&str])] = &[
    (
        "{apiVersion: API, kind: IPPool, metadata: {name: bad}, spec: {cidr: 10.66.0.0/40}}",
        &["spec.cidr", "must be a CIDR such as 10.0.0.0/16"],
    ),
    (
        "{apiVersion: API, kind: IPPool, metadata: {name: pods}, spec: {cidr: 10.66.0.0/16, blockSize: 28}}",
        &["spec.cidr", "cannot be changed"],
    ),
    (
        "{apiVersion: API, kind: IPPool, metadata: {name: bad}, spec: {cidr: 10.66.0.0/16, ipipMode: Always, vxlanMode: Always}}",
        &["spec", "ipipMode and vxlanMode exclude each other"],
    ),
    (
        "{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {ingress: [{action: Allow, protocol: TCP, destination: {ports: [80, 70000]}}]}}",
        &["spec.ingress[0].destination.ports[1]", "65535"],
    ),
    (
        "{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {ingress: [{action: Allow, protocol: TCP, destination: {ports: ['80:http']}}]}}",
        &["spec.ingress[0].destination.ports[0]"],
    ),
    (
        "{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {ingress: [{action: Allow, destination: {ports: [80]}}]}}",
        &["spec.ingress[0]", "ports need protocol TCP, UDP or SCTP"],
    ),
    (
        "{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {egress: [{action: Allow, destination: {nets: [10.0.0.0/33]}}]}}",
        &[
            "spec.egress[0].destination.nets[0]",
            "must be an address or a CIDR",
        ],
    ),
    (
        "{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {ingress: [{action: Perhaps}]}}",
        &["spec.ingress[0].action", "Perhaps"],
    ),
    (
        "{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {selector: [all()]}}",
        &["spec.selector"],
    ),
    (
        "{apiVersion: API, kind: GlobalNetworkPolicy, metadata: {name: bad}, spec: {order: soon}}",
        &["spec.order"],
    ),
    (
        "{apiVersion: API, kind: HostEndpoint, metadata: {name: bad}, spec: {interfaceName: eth0}}",
        &["spec", "node is needed"],
    ),
];

/// A cluster with two pods on its node.
struct Pods {
    cluster: Cluster,
    client: TestNs,
    web: TestNs,
    address: IpAddr,
}

impl Pods {
    async fn new(group: Group) -> Self {
        let mut cluster = Cluster::new(group).await;
        cluster.start_node();
        cluster.start("typha", "cali-typha", &[]);
        cluster.apply(WORLD);
        let (client, web) = (TestNs::new("kubepod"), TestNs::new("kubepod"));
        let add = |name: &str, pod: &TestNs| {
            cluster
                .runtime
                .add(name, pod, &json!({}), || cluster.log("cali-node"))
        };
        let address = add("web", &web);
        add("client", &client);
        // A pod that was not heard of is asked for.
        let early = cluster.runtime.call("ADD", "nobody", &client, &json!({}));
        let early = early.wait_with_output().expect("the end of the plugin");
        assert!(told(&early).contains("try again"), "{}", told(&early));
        for port in [80, 81] {
            traffic::greet(web.netns(), port);
        }
        Self {
            cluster,
            client,
            web,
            address,
        }
    }

    /// Waits until the client reaches the port, or does not.
    fn reaches(&self, port: u16, wanted: bool) {
        eventually(LIMIT, || {
            let to = SocketAddr::new(self.address, port);
            let seen = traffic::asked(self.client.netns(), to);
            if seen.is_some() == wanted {
                Ok(())
            } else {
                Err(format!(
                    "port {port}: {seen:?}\n{}",
                    self.cluster.log("cali-node")
                ))
            }
        });
    }

    /// Waits until an object is as it should be.
    fn shows(&self, words: &str, wanted: impl Fn(&Value) -> bool) {
        eventually(LIMIT, || {
            let object = self.cluster.get(words);
            if wanted(&object) {
                Ok(())
            } else {
                let logs = ["cali-node", "cali-controllers"].map(|name| self.cluster.log(name));
                Err(format!("{object:#}\n{}", logs.join("\n")))
            }
        });
    }
}

fn manifests_reach_the_kernel(pods: &mut Pods) {
    assert!(
        pods.address.to_string().starts_with("10.65.0."),
        "{}",
        pods.address
    );
    let annotation = format!("{}/32", pods.address);
    pods.shows("-n shop pod web", |pod| {
        pod["metadata"]["annotations"]["cni.projectcalico.org/podIP"] == annotation.as_str()
    });
    pods.shows(&format!("node {NODE}"), |node| {
        let conditions = node["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten();
        let serves = conditions
            .filter(|one| one["type"] == "NetworkUnavailable" && one["status"] == "False");
        serves.count() == 1
            && node["metadata"]["annotations"]["projectcalico.org/IPv4Address"] == "192.0.2.1/24"
    });
    pods.reaches(80, true);
    pods.cluster.apply(KUBERNETES_POLICY);
    pods.reaches(80, false);
    pods.cluster.kubectl(
        &[
            "-n",
            "shop",
            "delete",
            "networkpolicies.networking.k8s.io",
            "web",
        ],
        "",
    );
    pods.reaches(80, true);
    pods.cluster.apply(GLOBAL_POLICY);
    pods.reaches(80, false);
    pods.reaches(81, true);
}

/// `SIGKILL` for the API server: what is in force stays, and what is changed when it is back counts. What was asked until then.
async fn policy_outlives_the_api_server(pods: &mut Pods) -> Vec<Asked> {
    let to = SocketAddr::new(pods.address, 80);
    let asked = pods.cluster.server.asked();
    pods.cluster.server.stop();
    for _ in 0..3 {
        pods.reaches(81, true);
        assert_eq!(traffic::asked(pods.client.netns(), to), None);
    }
    pods.cluster.server.restart().await;
    // Until it is ready it knows neither accounts nor roles, and says so to whoever asks too early.
    pods.cluster.server.asked();
    assert_eq!(traffic::asked(pods.client.netns(), to), None);
    let delete = ["delete", "globalnetworkpolicies", "guests"];
    pods.cluster.kubectl(&delete, "");
    pods.reaches(80, true);
    asked
}

/// What else a node's account is for: warnings, reports, passwords of BGP peers, and addresses that go back.
fn the_node_tells_and_gives_back(pods: &mut Pods) {
    pods.cluster.apply(BAD_SELECTOR);
    let warned = |times: u64| {
        move |events: &Value| {
            let about = |event: &&Value| event["involvedObject"]["name"] == "unreadable";
            let all = events["items"].as_array().into_iter().flatten();
            let mut ours = all.filter(about);
            ours.any(|event| {
                let message = event["message"].as_str().unwrap_or_default();
                event["count"].as_u64() >= Some(times) && message.contains("selector")
            })
        }
    };
    pods.shows("-n default events", warned(1));
    pods.cluster.apply(REPORTS);
    pods.shows("caliconodestatus own", |report| {
        report["status"]["agent"]["birdV4"]["state"].is_string()
    });
    pods.reaches(80, true);
    pods.cluster.runtime.del("client", &pods.client);
    pods.cluster.runtime.del("web", &pods.web);
    for words in [
        "-n shop delete pods --all --force --grace-period=0",
        "delete ippool pods",
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        pods.cluster.kubectl(&words, "");
    }
    let of_the_pool = |blocks: &Value| -> Vec<Value> {
        let all = blocks["items"].as_array().into_iter().flatten();
        let within = |block: &&Value| {
            block["spec"]["cidr"]
                .as_str()
                .is_some_and(|c| c.starts_with("10.65.0."))
        };
        all.filter(within).cloned().collect()
    };
    // The reserve goes first; then, at the next comparison with the datastore (as at a start), the block.
    pods.shows("ipamblocks", |blocks| {
        let held = |block: &Value| {
            block["spec"]["allocations"]
                .as_array()
                .is_some_and(|all| !all.iter().all(Value::is_null))
        };
        !of_the_pool(blocks).iter().any(held)
    });
    pods.cluster.kill("cali-node");
    pods.cluster.start_node();
    pods.shows("-n default events", warned(2));
    pods.shows("ipamblocks", |blocks| of_the_pool(blocks).is_empty());
}

const REPORTS: &str = r#"
{apiVersion: v1, kind: Secret, metadata: {name: tor, namespace: kube-system}, stringData: {password: secret}}
---
{apiVersion: API, kind: BGPPeer, metadata: {name: tor}, spec: {peerIP: 192.0.2.2, asNumber: 64512, password: {secretKeyRef: {name: tor, key: password}}}}
---
{apiVersion: API, kind: CalicoNodeStatus, metadata: {name: own}, spec: {node: node1, classes: [Agent, BGP], updatePeriodSeconds: 5}}
"#;

const SERVICES: &str = r#"
{apiVersion: API, kind: KubeControllersConfiguration, metadata: {name: default}, spec: {controllers: {node: {leakGracePeriod: 2s, hostEndpoint: {autoCreate: Enabled}}}}}
---
{apiVersion: API, kind: IPPool, metadata: {name: lb}, spec: {cidr: 203.0.113.0/28, blockSize: 28, allowedUses: [LoadBalancer], ipipMode: Never, vxlanMode: Never}}
---
{apiVersion: v1, kind: Service, metadata: {name: first, namespace: shop, annotations: {projectcalico.org/loadBalancerIPs: '["203.0.113.9"]'}}, spec: {type: LoadBalancer, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Node, metadata: {name: node2, annotations: {projectcalico.org/IPv4Address: 192.0.2.3/24}}}
---
{apiVersion: API, kind: BlockAffinity, metadata: {name: node2-10-66-0-0-30}, spec: {node: node2, cidr: 10.66.0.0/30, state: confirmed, type: host, deleted: LIVES}}
---
{apiVersion: API, kind: IPAMBlock, metadata: {name: 10-66-0-0-30}, spec: {cidr: 10.66.0.0/30, affinity: "host:node2", allocations: [null, 0, null, null],
 unallocated: [0, 2, 3], attributes: [{handle_id: ghost, secondary: {namespace: shop, pod: ghost, node: node2}}], strictAffinity: false, deleted: false}}
---
{apiVersion: API, kind: IPAMHandle, metadata: {name: ghost}, spec: {handleID: ghost, block: {10.66.0.0/30: 1}, deleted: false}}
---
{apiVersion: API, kind: IPAMHandle, metadata: {name: left}, spec: {handleID: left, block: {10.66.0.0/30: 1, 10.66.0.4/30: 1}, deleted: false}}
"#;

const LATE: &str = r#"
{apiVersion: v1, kind: Service, metadata: {name: late, namespace: shop, annotations: {projectcalico.org/loadBalancerIPs: '["203.0.113.9"]'}}, spec: {type: LoadBalancer, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Node, metadata: {name: node2, labels: {rack: b}, annotations: {projectcalico.org/IPv4Address: 192.0.2.3/24}}}
"#;

/// What the controllers' account is for.
fn the_controllers_look_after_the_cluster(pods: &mut Pods) {
    let has_address =
        |service: &Value| service["status"]["loadBalancer"]["ingress"][0]["ip"] == "203.0.113.9";
    pods.cluster.apply(SERVICES);
    pods.cluster.start_controllers();
    pods.shows("-n shop service first", has_address);
    pods.shows("hostendpoints", |all| {
        all.to_string().contains("node2-auto-hep")
    });
    pods.cluster.apply(LATE);
    let warned = |times: u64| {
        move |events: &Value| {
            let all = events["items"].as_array().into_iter().flatten();
            let mut about = all.filter(|event| event["involvedObject"]["name"] == "late");
            about.any(|event| event["count"].as_u64() >= Some(times))
        }
    };
    pods.shows("-n shop events", warned(1));
    // The pod is gone and has left its address; of the other handle nothing is left but its name.
    pods.shows("ipamhandles", |all| {
        let all = all.to_string();
        !all.contains("ghost") && !all.contains("left")
    });
    pods.shows("hostendpoint node2-auto-hep", |endpoint| {
        endpoint["metadata"]["labels"]["rack"] == "b"
    });
    pods.cluster.kill("cali-controllers");
    pods.cluster.start_controllers();
    pods.shows("-n shop events", warned(2));
    pods.cluster.kubectl(&["delete", "node", "node2"], "");
    pods.cluster
        .kubectl(&["-n", "shop", "delete", "service", "--all"], "");
    pods.shows("hostendpoints", |all| !all.to_string().contains("node2"));
    pods.shows("ipamblocks", |all| {
        let all = all.to_string();
        !all.contains("203.0.113.") && !all.contains("10.66.0.")
    });
}

/// What the bindings of the manifests give to an account, but for the group that is not served.
fn granted(cluster: &Cluster, account: &str, group: Group) -> BTreeSet<String> {
    let other = Group::ALL.into_iter().find(|other| *other != group);
    let other = other.map_or("", |other| other.parts().0);
    let mut rights = BTreeSet::new();
    for (scope, role) in [
        ("clusterrolebindings", "clusterrole"),
        ("-n kube-system rolebindings", "-n kube-system role"),
    ] {
        let bindings = cluster.get(scope);
        for binding in bindings["items"].as_array().into_iter().flatten() {
            let subjects = binding["subjects"].as_array().into_iter().flatten();
            if subjects.into_iter().any(|one| one["name"] == account) {
                let name = binding["roleRef"]["name"].as_str().unwrap_or_default();
                rights.extend(Right::of_role(&cluster.get(&format!("{role} {name}"))));
            }
        }
    }
    rights.retain(|right| right.group != other);
    rights.iter().map(ToString::to_string).collect()
}

async fn scenario(group: Group) {
    let mut pods = Pods::new(group).await;
    for (manifest, words) in REFUSED {
        let said = pods.cluster.tries(manifest).expect_err(manifest);
        for word in *words {
            assert!(said.contains(word), "{manifest}: {said}");
        }
    }
    manifests_reach_the_kernel(&mut pods);
    let mut asked = policy_outlives_the_api_server(&mut pods).await;
    the_node_tells_and_gives_back(&mut pods);
    the_controllers_look_after_the_cluster(&mut pods);
    asked.extend(pods.cluster.server.asked());
    // Each has run until now.
    for program in ["typha", "cali-controllers", "cali-node"] {
        pods.cluster.kill(program);
    }
    let rights = |asked: &mut dyn Iterator<Item = &Asked>| -> BTreeSet<String> {
        let told = asked.filter_map(|one| Some(one.right.as_ref()?.to_string()));
        told.collect()
    };
    let mut wrong = Vec::new();
    for account in ACCOUNTS {
        let own = || asked.iter().filter(|one| one.user == user(account));
        let denied = rights(&mut own().filter(|one| one.is_denied()));
        let used = rights(&mut own());
        let granted = granted(&pods.cluster, account, group);
        let idle: Vec<&String> = granted.difference(&used).collect();
        if !denied.is_empty() || !idle.is_empty() {
            wrong.push(format!("{account}: denied {denied:#?}, not used {idle:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_the_group_that_users_write() {
    scenario(Group::V3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_the_group_that_calicos_manifests_install() {
    scenario(Group::V1).await;
}
