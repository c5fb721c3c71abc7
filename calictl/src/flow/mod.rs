//! `calictl trace`, `diff` and `flows`: what policy does with flows, explained.

mod diff;
mod explain;
mod flows;
mod query;
mod rule_text;
mod trace;
mod world;

pub(crate) use diff::{Diff, diff};
pub(crate) use flows::{Flows, flows};
pub(crate) use trace::{Trace, trace};

/// Three pods on two nodes, a closed namespace and a staged policy: for tests.
#[cfg(test)]
const SHOP: &str = r#"[
{"apiVersion":"projectcalico.org/v3","kind":"Tier","metadata":{"name":"default"},"spec":{"order":1000000}},
{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"pods"},"spec":{"cidr":"10.65.0.0/16","vxlanMode":"Always","natOutgoing":true}},
{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"n1"},"spec":{"bgp":{"ipv4Address":"172.16.0.1/24"},"ipv4VXLANTunnelAddr":"10.65.1.0"}},
{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"n2"},"spec":{"bgp":{"ipv4Address":"172.16.0.2/24"},"ipv4VXLANTunnelAddr":"10.65.2.0"}},
{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop"}},
{"apiVersion":"v1","kind":"Pod","metadata":{"namespace":"shop","name":"client","labels":{"app":"client"}},
 "spec":{"nodeName":"n1","containers":[{"name":"c"}]},"status":{"phase":"Running","podIP":"10.65.1.1","podIPs":[{"ip":"10.65.1.1"}]}},
{"apiVersion":"v1","kind":"Pod","metadata":{"namespace":"shop","name":"web","labels":{"app":"web"}},
 "spec":{"nodeName":"n1","containers":[{"name":"c","ports":[{"containerPort":80}]}]},"status":{"phase":"Running","podIP":"10.65.1.2","podIPs":[{"ip":"10.65.1.2"}]}},
{"apiVersion":"v1","kind":"Pod","metadata":{"namespace":"shop","name":"db","labels":{"app":"db"}},
 "spec":{"nodeName":"n2","containers":[{"name":"c"}]},"status":{"phase":"Running","podIP":"10.65.2.1","podIPs":[{"ip":"10.65.2.1"}]}},
{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"namespace":"shop","name":"db"},
 "spec":{"podSelector":{"matchLabels":{"app":"db"}},"policyTypes":["Ingress"],
 "ingress":[{"from":[{"podSelector":{"matchLabels":{"app":"web"}}}],"ports":[{"port":5432}]}]}},
{"apiVersion":"projectcalico.org/v3","kind":"StagedGlobalNetworkPolicy","metadata":{"name":"default.inside"},
 "spec":{"order":1,"selector":"app == 'client'","types":["Egress"],"egress":[{"action":"Allow","destination":{"nets":["10.0.0.0/8"]}}]}}
]"#;

#[cfg(test)]
fn objects_of(manifests: &str) -> Vec<cali_api::AnyResource> {
    let list: Vec<serde_json::Value> = serde_json::from_str(manifests).expect("JSON");
    let read = |manifest: serde_json::Value| {
        cali_api::AnyResource::from_json(manifest.clone())
            .unwrap_or_else(|error| panic!("{error}: {manifest}"))
    };
    list.into_iter().map(read).collect()
}

#[cfg(test)]
fn world_of(manifests: &str) -> world::World {
    let mut world = world::World::default();
    for object in objects_of(manifests) {
        let resources = if object.kind().is_native() {
            cali_api::kubernetes::convert(&object).resources
        } else {
            vec![object]
        };
        for resource in resources {
            world
                .objects
                .insert(resource.key(), std::sync::Arc::new(resource));
        }
    }
    world
}
