use std::sync::Arc;

use cali_api::Revision;
use ipip_vxlan::{Encap, Scope};

use super::*;

fn update(json: &str) -> Update {
    let value = AnyResource::from_slice(json.as_bytes()).unwrap();
    Update {
        key: value.key(),
        value: Some(Arc::new(value)),
        revision: Revision::from("1"),
    }
}

fn gone(mut update: Update) -> Update {
    update.value = None;
    update
}

fn affinity(node: &str, cidr: &str, state: &str) -> Update {
    update(&format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"BlockAffinity","metadata":{{"name":"{node}-x"}},
            "spec":{{"state":"{state}","node":"{node}","cidr":"{cidr}","deleted":false}}}}"#
    ))
}

fn fed(resources: &mut Resources, update: &Update) -> Vec<Input> {
    let mut out = Vec::new();
    resources.on_update(update, &mut out);
    out
}

fn resources() -> Resources {
    Resources::new(NodeName::from("node1"), Backend::Bgp)
}

#[test]
fn remote_block_leads_to_its_node_and_local_block_is_dropped() {
    let mut r = resources();
    let remote = fed(&mut r, &affinity("node2", "10.65.2.0/26", "confirmed"));
    assert!(
        matches!(&remote[..], [Input::Set(Source::BlockAffinity, _, Candidate { spec: RouteSpec::Node(node), .. })] if node.as_str() == "node2"),
        "{remote:?}"
    );
    let local = fed(&mut r, &affinity("node1", "10.65.1.0/26", "confirmed"));
    assert!(
        matches!(
            &local[..],
            [Input::Set(
                Source::LocalBlock,
                _,
                Candidate {
                    spec: RouteSpec::Blackhole,
                    ..
                }
            )]
        ),
        "{local:?}"
    );
}

#[test]
fn a_claim_that_is_not_confirmed_gives_no_route() {
    let mut r = resources();
    assert_eq!(
        fed(&mut r, &affinity("node2", "10.65.2.0/26", "pending")),
        []
    );
    fed(&mut r, &affinity("node2", "10.65.2.0/26", "confirmed"));
    let ended = fed(
        &mut r,
        &affinity("node2", "10.65.2.0/26", "pendingDeletion"),
    );
    assert_eq!(
        ended,
        [Input::Remove(
            Source::BlockAffinity,
            "10.65.2.0/26".parse().unwrap()
        )]
    );
    assert_eq!(
        fed(
            &mut r,
            &gone(affinity("node2", "10.65.2.0/26", "confirmed"))
        ),
        []
    );
}

#[test]
fn a_block_of_one_address_gets_no_blackhole() {
    assert_eq!(
        fed(
            &mut resources(),
            &affinity("node1", "10.65.1.7/32", "confirmed")
        ),
        []
    );
}

#[test]
fn a_borrowed_address_gets_its_own_route_until_it_is_returned() {
    let block = |allocations: &str| {
        update(&format!(
            r#"{{"apiVersion":"projectcalico.org/v3","kind":"IPAMBlock","metadata":{{"name":"10-65-2-0-30"}},
                "spec":{{"cidr":"10.65.2.0/30","affinity":"host:node2","allocations":{allocations},"unallocated":[],
                "attributes":[{{"secondary":{{"node":"node2"}}}},{{"secondary":{{"node":"node3"}}}}]}}}}"#
        ))
    };
    let mut r = resources();
    let out = fed(&mut r, &block("[0,1,null,null]"));
    assert!(
        matches!(&out[..], [Input::Set(Source::BlockAffinity, address, _)] if address.to_string() == "10.65.2.1/32"),
        "{out:?}"
    );
    let out = fed(&mut r, &block("[0,null,null,null]"));
    assert_eq!(
        out,
        [Input::Remove(
            Source::BlockAffinity,
            "10.65.2.1/32".parse().unwrap()
        )]
    );
}

#[test]
fn settings_choose_suppliers_once_and_say_what_is_inconsistent() {
    let mut r = resources();
    let mut out = Vec::new();
    let mut spec = FelixConfigurationSpec::default();
    r.on_settings(&spec, &mut out);
    assert_eq!(out, [Input::Suppliers(Suppliers::default())]);
    assert!(r.notices().is_empty());
    out.clear();
    spec.program_cluster_routes = Some(ProgramClusterRoutes::Enabled);
    spec.vxlan_vni = Some(77);
    r.on_settings(&spec, &mut out);
    assert_eq!(
        out,
        [],
        "both sides claim the unencapsulated pools: BGP keeps them, as before"
    );
    assert_eq!(r.notices().len(), 1, "{:?}", r.notices());
    assert_eq!(r.tunnels().vni, 77);
}

#[test]
fn pools_reach_table_and_tunnels_alike() {
    let mut r = resources();
    let pool = update(
        r#"{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"p"},
            "spec":{"cidr":"10.65.0.0/16","vxlanMode":"Always"}}"#,
    );
    assert!(
        matches!(&fed(&mut r, &pool)[..], [Input::Pool(pool)] if pool.encap == Encap::Vxlan(Scope::Always))
    );
    assert_eq!(r.resolver().pools().count(), 1);
    assert_eq!(fed(&mut r, &gone(pool)), [Input::PoolRemove("p".into())]);
    assert_eq!(r.resolver().pools().count(), 0);
}

#[test]
fn addresses_that_workloads_peer_with_are_local_while_they_are_set() {
    let with = |spec: &str| {
        update(&format!(
            r#"{{"apiVersion":"projectcalico.org/v3","kind":"BGPConfiguration","metadata":{{"name":"default"}},"spec":{spec}}}"#
        ))
    };
    let told = |inputs: Vec<Input>| -> Vec<String> {
        let text = |input: Input| match input {
            Input::Set(source, prefix, candidate) => {
                assert_eq!((source, candidate.spec), (Source::Static, RouteSpec::Local));
                Some(format!("+{prefix}"))
            }
            Input::Remove(Source::Static, prefix) => Some(format!("-{prefix}")),
            _ => None,
        };
        inputs.into_iter().filter_map(text).collect()
    };
    let mut r = resources();
    let both = with(
        r#"{"localWorkloadPeeringIPV4":"169.254.200.1","localWorkloadPeeringIPV6":"fd00:fefe::1"}"#,
    );
    assert_eq!(
        told(fed(&mut r, &both)),
        ["+169.254.200.1/32", "+fd00:fefe::1/128"]
    );
    assert_eq!(told(fed(&mut r, &both)), [""; 0]);
    let other = with(r#"{"localWorkloadPeeringIPV4":"169.254.200.2"}"#);
    assert_eq!(
        told(fed(&mut r, &other)),
        [
            "-169.254.200.1/32",
            "-fd00:fefe::1/128",
            "+169.254.200.2/32"
        ]
    );
    assert_eq!(told(fed(&mut r, &gone(other))), ["-169.254.200.2/32"]);
}
