use super::*;
use cali_api::AnyResource;
use cali_api::v3::IPPoolSpec;
use serde_json::{Value, json};

fn service(spec: Value, annotations: Value, shown: &[&str]) -> Service {
    let ingress: Vec<Value> = shown.iter().map(|ip| json!({"ip": ip})).collect();
    let object = AnyResource::from_json(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop", "uid": "u1", "annotations": annotations},
        "spec": spec, "status": {"loadBalancer": {"ingress": ingress}},
    }));
    match object.expect("a service") {
        AnyResource::K8sService(service) => *service,
        other => panic!("{other:?}"),
    }
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts
        .iter()
        .map(|text| text.parse().expect("an address"))
        .collect()
}

fn wanted(spec: Value, annotations: Value, shown: &[&str]) -> Wish {
    wish(&service(spec, annotations, shown), AssignIPs::AllServices)
        .expect("one of ours")
        .expect("a wish")
}

fn pool(name: &str, cidr: &str, uses: &[AllowedUse]) -> Pool {
    let mut spec = IPPoolSpec::new(cidr.parse().expect("a prefix"));
    spec.allowed_uses = uses.to_vec();
    Pool {
        name: name.to_owned(),
        spec,
    }
}

fn pools() -> Vec<Pool> {
    vec![
        pool("a", "203.0.113.0/26", &[AllowedUse::LoadBalancer]),
        pool("b", "203.0.113.64/26", &[AllowedUse::LoadBalancer]),
        pool("pods", "10.0.0.0/16", &[]),
    ]
}

#[test]
fn the_type_the_class_and_the_setting_say_which_services_are_ours() {
    let all = AssignIPs::AllServices;
    let requested = AssignIPs::RequestedServicesOnly;
    let asks = json!({"projectcalico.org/ipv4pools": "[\"a\"]"});
    for (spec, annotations, assign, ours) in [
        (json!({"type": "LoadBalancer"}), json!({}), all, true),
        (json!({"type": "LoadBalancer"}), json!({}), requested, false),
        (
            json!({"type": "LoadBalancer"}),
            asks.clone(),
            requested,
            true,
        ),
        (
            json!({"type": "LoadBalancer", "loadBalancerClass": "calico"}),
            json!({}),
            requested,
            true,
        ),
        (
            json!({"type": "LoadBalancer", "loadBalancerClass": "other"}),
            asks.clone(),
            all,
            false,
        ),
        (json!({"type": "ClusterIP"}), asks, all, false),
    ] {
        let seen = wish(&service(spec.clone(), annotations, &[]), assign).is_some();
        assert_eq!(seen, ours, "{spec} {assign}");
    }
}

#[test]
fn the_handle_is_calicos() {
    let key = Key::namespaced(cali_api::Kind::K8sService, "shop", "web");
    assert_eq!(
        handle(&key, "u1"),
        "lb-db95decab57c1a2abe7ddf1bc57e4d08a39c3473e148dbb93b7489f4e2ba6305"
    );
}

#[test]
fn annotations_that_cannot_be_used_are_named() {
    let spec = json!({"type": "LoadBalancer"});
    for (annotations, reason) in [
        (
            json!({"projectcalico.org/ipv4pools": "a"}),
            "annotation projectcalico.org/ipv4pools: no JSON list of texts",
        ),
        (
            json!({"projectcalico.org/loadBalancerIPs": "[\"203.0.113.300\"]"}),
            "annotation projectcalico.org/loadBalancerIPs: \"203.0.113.300\" is no address",
        ),
        (
            json!({"projectcalico.org/loadBalancerIPs": "[\"203.0.113.3\", \"203.0.113.4\"]"}),
            "annotation projectcalico.org/loadBalancerIPs: more than one address of a family",
        ),
    ] {
        let seen = wish(
            &service(spec.clone(), annotations, &[]),
            AssignIPs::AllServices,
        );
        let seen = seen.expect("one of ours").expect_err("it cannot be used");
        assert!(seen.starts_with(reason), "{seen}");
    }
}

#[test]
fn one_address_of_each_family_is_kept_the_shown_one_first() {
    let spec = json!({"type": "LoadBalancer", "ipFamilies": ["IPv4", "IPv6"]});
    let wish = wanted(spec, json!({}), &["203.0.113.9"]);
    let held = BTreeSet::from_iter(addresses(&["203.0.113.5", "203.0.113.9"]));
    let work = plan(&wish, &held, &pools());
    assert_eq!(work.keep, addresses(&["203.0.113.9"]));
    assert_eq!(work.release, addresses(&["203.0.113.5"]));
    assert_eq!(work.any, [false, true]);
    assert!(work.take.is_empty());
}

#[test]
fn what_the_annotations_no_longer_ask_for_goes() {
    let spec = json!({"type": "LoadBalancer", "ipFamilies": ["IPv4"]});
    let held = BTreeSet::from_iter(addresses(&["203.0.113.5"]));
    let other_pool = wanted(
        spec.clone(),
        json!({"projectcalico.org/ipv4pools": "[\"b\"]"}),
        &["203.0.113.5"],
    );
    let work = plan(&other_pool, &held, &pools());
    assert_eq!((work.release.len(), work.any), (1, [true, false]));
    let exact = wanted(
        spec.clone(),
        json!({"projectcalico.org/loadBalancerIPs": "[\"203.0.113.70\"]"}),
        &[],
    );
    let work = plan(&exact, &held, &pools());
    assert_eq!(work.release, addresses(&["203.0.113.5"]));
    assert_eq!(work.take, addresses(&["203.0.113.70"]));
    assert_eq!(work.any, [false, false]);
    // By CIDR as well as by name; and a pool is not asked for twice.
    let same = wanted(
        spec,
        json!({"projectcalico.org/ipv4pools": "[\"203.0.113.0/26\"]"}),
        &[],
    );
    let work = plan(&same, &held, &pools());
    assert_eq!(
        (work.keep, work.any),
        (addresses(&["203.0.113.5"]), [false, false])
    );
}

#[test]
fn addresses_of_other_pools_are_refused() {
    let of = |text: &str| refusal(text.parse().expect("an address"), &pools());
    assert_eq!(of("203.0.113.7"), None);
    assert_eq!(
        of("10.0.0.7").as_deref(),
        Some("10.0.0.7 is in IP pool pods, whose allowedUses has no LoadBalancer")
    );
    assert_eq!(
        of("192.0.2.1").as_deref(),
        Some("192.0.2.1 is in no IP pool")
    );
}

#[test]
fn handles_without_a_service_are_abandoned() {
    let wish = wanted(json!({"type": "LoadBalancer"}), json!({}), &[]);
    let held: BTreeMap<String, BTreeSet<IpAddr>> = [wish.handle.clone(), "lb-gone".to_owned()]
        .map(|handle| (handle, BTreeSet::new()))
        .into();
    let wanted = BTreeSet::from([wish.handle]);
    assert_eq!(abandoned(&held, &wanted).collect::<Vec<_>>(), ["lb-gone"]);
}
