use super::*;
use crate::supplier::{Backend, ClusterRoutes};
use cali_netlink::MacAddr;
use ipip_vxlan::{Scope, Vtep};
use proptest::prelude::*;

const BLOCK2: &str = "192.168.2.0/26";
const BLOCK3: &str = "192.168.3.0/26";

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn endpoint(id: u8, subnet: u8) -> Endpoint {
    Endpoint {
        v4: Some(format!("10.{subnet}.0.{id}/24").parse().unwrap()),
        vtep_v4: Some(Vtep {
            addr: IpAddr::from([192, 168, id, 1]),
            mac: MacAddr([0x66, 0, 0, 0, 0, id]),
        }),
        ..Endpoint::named(NodeName::from(format!("node{id}")))
    }
}

fn pool(encap: Encap) -> Pool {
    Pool {
        name: "p".into(),
        cidr: cidr("192.168.0.0/16"),
        encap,
    }
}

fn affinity(node: &str) -> Candidate {
    Candidate::new(RouteSpec::Node(NodeName::from(node)), "BlockAffinity")
}

fn bgp(next_hop: &str) -> Candidate {
    Candidate::new(
        RouteSpec::NextHops(vec![NextHop::new(ip(next_hop))]),
        "peer",
    )
}

fn gateway(address: &str, device: &str) -> Gateway {
    Gateway {
        address: ip(address),
        device: device.into(),
    }
}

/// Local node1 and node2 on one subnet, node3 behind router 10.1.0.254; all blocks have their affinity.
fn table(encap: Encap) -> RouteTable {
    let mut table = RouteTable::new(NodeName::from("node1"));
    table.set_in_sync();
    for (id, subnet) in [(1, 1), (2, 1), (3, 2)] {
        table.set_node(endpoint(id, subnet));
    }
    table.set_pool(pool(encap));
    table.set(Source::BlockAffinity, cidr(BLOCK2), affinity("node2"));
    table.set(Source::BlockAffinity, cidr(BLOCK3), affinity("node3"));
    settle(&mut table);
    table
}

/// Answers all lookups as the underlay of [`table`] would.
fn settle(table: &mut RouteTable) {
    loop {
        table.take_changes();
        let open = table.unanswered_next_hops();
        if open.is_empty() {
            return;
        }
        for address in open {
            let on_link = cidr("10.1.0.0/24").contains(address);
            let reach = if on_link {
                Reach::OnLink {
                    device: "eth0".into(),
                }
            } else {
                Reach::Behind {
                    gateway: ip("10.1.0.254"),
                    device: "eth0".into(),
                }
            };
            table.set_reach(address, reach);
        }
    }
}

fn way(table: &RouteTable, prefix: &str) -> Option<(Source, Vec<Gateway>)> {
    let selected = table.selected(&cidr(prefix))?;
    match &selected.way {
        Way::Gateways(gateways) => Some((selected.source, gateways.clone())),
        other => panic!("{prefix} is {other:?}"),
    }
}

fn problem(table: &RouteTable, prefix: &str) -> Option<String> {
    let row = table.view().find(|row| row.prefix == cidr(prefix))?;
    row.problem.map(ToString::to_string)
}

const CROSS: Encap = Encap::Vxlan(Scope::CrossSubnet);
const ALWAYS: Encap = Encap::Vxlan(Scope::Always);

#[test]
fn cross_subnet_goes_direct_to_the_neighbour_and_tunnels_to_the_other_subnet() {
    let t = table(CROSS);
    assert_eq!(
        way(&t, BLOCK2),
        Some((Source::BlockAffinity, vec![gateway("10.1.0.2", "eth0")]))
    );
    assert_eq!(
        way(&t, BLOCK3),
        Some((
            Source::BlockAffinity,
            vec![gateway("192.168.3.1", "vxlan.calico")]
        ))
    );
}

#[test]
fn bgp_path_of_a_vxlan_pool_is_accepted_and_not_installed() {
    let mut t = table(ALWAYS);
    t.set(Source::Bgp, cidr(BLOCK2), bgp("10.1.0.2"));
    t.set(Source::Bgp, cidr("192.168.9.0/26"), bgp("10.1.0.2"));
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK2),
        Some((
            Source::BlockAffinity,
            vec![gateway("192.168.2.1", "vxlan.calico")]
        ))
    );
    assert_eq!(way(&t, "192.168.9.0/26"), None);
    assert!(
        problem(&t, "192.168.9.0/26")
            .unwrap()
            .contains("no block affinity")
    );
}

#[test]
fn unencapsulated_pool_is_routed_by_bgp_with_recursive_next_hop() {
    let mut t = table(Encap::None);
    assert_eq!(
        way(&t, BLOCK3),
        None,
        "the affinity alone gives no route with BGP"
    );
    assert_eq!(
        problem(&t, BLOCK3).as_deref(),
        Some("waiting for a BGP path")
    );
    t.set(Source::Bgp, cidr(BLOCK3), bgp("10.2.0.3"));
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK3),
        Some((Source::Bgp, vec![gateway("10.1.0.254", "eth0")]))
    );
    assert_eq!(problem(&t, BLOCK3), None);
}

/// A node that starts again: bgpd knows a path before the datastore has told the pool, which has a tunnel.
#[test]
fn no_path_of_bgp_is_selected_before_the_pools_are_known() {
    for encap in [Encap::Vxlan(Scope::Always), Encap::None] {
        let mut table = RouteTable::new(NodeName::from("node1"));
        table.set(Source::Bgp, cidr(BLOCK2), bgp("10.1.0.2"));
        table.set(Source::BlockAffinity, cidr(BLOCK2), affinity("node2"));
        settle(&mut table);
        assert_eq!(way(&table, BLOCK2), None);
        assert_eq!(
            problem(&table, BLOCK2).unwrap(),
            "waiting for the datastore, which has not told all pools yet"
        );
        for (id, subnet) in [(1, 1), (2, 1)] {
            table.set_node(endpoint(id, subnet));
        }
        table.set_pool(pool(encap));
        table.set_in_sync();
        settle(&mut table);
        let (source, gateways) = way(&table, BLOCK2).unwrap();
        let expected = match encap {
            Encap::None => (Source::Bgp, gateway("10.1.0.2", "eth0")),
            _ => (
                Source::BlockAffinity,
                gateway("192.168.2.1", VXLAN_V4_DEVICE),
            ),
        };
        assert_eq!((source, gateways[0].clone()), expected);
    }
}

#[test]
fn prefix_outside_all_pools_is_routed_by_bgp() {
    let mut t = table(ALWAYS);
    t.set(Source::Bgp, cidr("172.16.0.0/24"), bgp("10.1.0.254"));
    settle(&mut t);
    assert_eq!(
        way(&t, "172.16.0.0/24"),
        Some((Source::Bgp, vec![gateway("10.1.0.254", "eth0")]))
    );
}

#[test]
fn without_bgp_an_unencapsulated_block_needs_an_on_link_node() {
    let mut t = table(Encap::None);
    let (suppliers, _) = Suppliers::decide(
        Backend::None,
        ClusterRoutes::Disabled,
        ClusterRoutes::Disabled,
    );
    t.set_suppliers(suppliers);
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK2),
        Some((Source::BlockAffinity, vec![gateway("10.1.0.2", "eth0")]))
    );
    assert_eq!(way(&t, BLOCK3), None);
    assert_eq!(
        problem(&t, BLOCK3).as_deref(),
        Some("node node3 is not on-link: its block needs BGP or encapsulation")
    );
}

#[test]
fn to_no_encapsulation_the_tunnel_carries_until_bgp_has_a_path() {
    let mut t = table(ALWAYS);
    t.set_pool(pool(Encap::None));
    settle(&mut t);
    let tunnel = Some((
        Source::BlockAffinity,
        vec![gateway("192.168.3.1", "vxlan.calico")],
    ));
    assert_eq!(way(&t, BLOCK3), tunnel, "make before break");
    assert_eq!(
        problem(&t, BLOCK3).as_deref(),
        Some("waiting for a BGP path")
    );
    t.set(Source::Bgp, cidr(BLOCK3), bgp("10.2.0.3"));
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK3),
        Some((Source::Bgp, vec![gateway("10.1.0.254", "eth0")]))
    );
}

#[test]
fn to_vxlan_the_underlay_carries_until_the_peer_publishes_its_endpoint() {
    let mut t = table(Encap::None);
    t.set(Source::Bgp, cidr(BLOCK3), bgp("10.2.0.3"));
    let mut silent = endpoint(3, 2);
    silent.vtep_v4 = None;
    t.set_node(silent);
    settle(&mut t);
    t.set_pool(pool(CROSS));
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK3),
        Some((Source::Bgp, vec![gateway("10.1.0.254", "eth0")]))
    );
    t.set_node(endpoint(3, 2));
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK3),
        Some((
            Source::BlockAffinity,
            vec![gateway("192.168.3.1", "vxlan.calico")]
        ))
    );
}

#[test]
fn a_held_route_goes_with_its_own_candidate() {
    let mut t = table(ALWAYS);
    t.set_pool(pool(Encap::None));
    settle(&mut t);
    t.remove(Source::BlockAffinity, &cidr(BLOCK3));
    assert_eq!(t.take_changes(), vec![(cidr(BLOCK3), None)]);
}

#[test]
fn local_objects_win_over_anything_learned() {
    let mut t = table(Encap::None);
    let pod = cidr("192.168.1.5/32");
    let device = RouteSpec::Device {
        device: "cali1".into(),
        source: None,
    };
    t.set(Source::Bgp, pod, bgp("10.1.0.2"));
    t.set(
        Source::Workload,
        pod,
        Candidate::new(device, "WorkloadEndpoint"),
    );
    t.set(Source::Bgp, cidr("192.168.1.0/26"), bgp("10.1.0.2"));
    t.set(
        Source::LocalBlock,
        cidr("192.168.1.0/26"),
        Candidate::new(RouteSpec::Blackhole, "block"),
    );
    settle(&mut t);
    assert_eq!(t.selected(&pod).unwrap().source, Source::Workload);
    assert_eq!(
        t.selected(&cidr("192.168.1.0/26")).unwrap().way,
        Way::Blackhole
    );
    t.remove(Source::Workload, &pod);
    settle(&mut t);
    assert_eq!(t.selected(&pod).unwrap().source, Source::Bgp);
}

#[test]
fn equal_cost_paths_use_the_reachable_next_hops() {
    let mut t = table(Encap::None);
    let hops = ["10.1.0.2", "10.1.0.7", "10.1.0.2"].map(|hop| NextHop::new(ip(hop)));
    t.set(
        Source::Bgp,
        cidr(BLOCK2),
        Candidate::new(RouteSpec::NextHops(hops.to_vec()), "peers"),
    );
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK2).unwrap().1,
        [gateway("10.1.0.2", "eth0"), gateway("10.1.0.7", "eth0")]
    );
    t.set_reach(ip("10.1.0.7"), Reach::Unreachable);
    settle(&mut t);
    assert_eq!(way(&t, BLOCK2).unwrap().1, [gateway("10.1.0.2", "eth0")]);
    t.set_reach(ip("10.1.0.2"), Reach::Unreachable);
    settle(&mut t);
    assert_eq!(way(&t, BLOCK2), None);
    assert!(problem(&t, BLOCK2).unwrap().contains("unreachable"));
}

#[test]
fn bgpd_restart_removes_only_what_was_not_said_again() {
    let mut t = table(Encap::None);
    t.set(Source::Bgp, cidr(BLOCK2), bgp("10.1.0.2"));
    t.set(Source::Bgp, cidr(BLOCK3), bgp("10.2.0.3"));
    settle(&mut t);
    t.bgp_started();
    t.set(Source::Bgp, cidr(BLOCK2), bgp("10.1.0.2"));
    assert_eq!(
        t.take_changes(),
        Vec::new(),
        "nothing moves before the end of sync"
    );
    t.bgp_end_of_sync(false);
    assert_eq!(
        t.take_changes(),
        Vec::new(),
        "the other family's end means nothing here"
    );
    t.bgp_end_of_sync(true);
    assert_eq!(t.take_changes(), vec![(cidr(BLOCK3), None)]);
}

#[test]
fn a_route_stays_while_its_new_next_hop_is_being_looked_up() {
    let mut t = table(Encap::None);
    t.set(Source::Bgp, cidr(BLOCK2), bgp("10.1.0.2"));
    settle(&mut t);
    t.set(Source::Bgp, cidr(BLOCK2), bgp("10.1.0.9"));
    t.take_changes();
    assert_eq!(way(&t, BLOCK2).unwrap().1, [gateway("10.1.0.2", "eth0")]);
    settle(&mut t);
    assert_eq!(way(&t, BLOCK2).unwrap().1, [gateway("10.1.0.9", "eth0")]);
    let needed: Vec<_> = t.needed_next_hops().collect();
    assert_eq!(
        needed,
        [ip("10.1.0.9")],
        "the former next hop is no longer watched"
    );
}

#[test]
fn ipip_routes_by_bgp_go_through_the_tunnel_device() {
    let mut t = table(Encap::Ipip(Scope::Always));
    let (suppliers, _) = Suppliers::decide(
        Backend::Bgp,
        ClusterRoutes::Disabled,
        ClusterRoutes::Enabled,
    );
    t.set_suppliers(suppliers);
    t.set(Source::Bgp, cidr(BLOCK3), bgp("10.2.0.3"));
    settle(&mut t);
    assert_eq!(
        way(&t, BLOCK3),
        Some((Source::Bgp, vec![gateway("10.2.0.3", "tunl0")]))
    );
}

#[derive(Debug, Clone)]
enum Input {
    Pool(Encap),
    Node(u8, u8),
    Affinity(u8, bool),
    Bgp(u8, bool),
}

fn any_input() -> impl Strategy<Value = Input> {
    let encap = prop_oneof![
        Just(Encap::None),
        Just(CROSS),
        Just(ALWAYS),
        Just(Encap::Ipip(Scope::CrossSubnet))
    ];
    prop_oneof![
        encap.prop_map(Input::Pool),
        (1u8..5, 1u8..3).prop_map(|(id, subnet)| Input::Node(id, subnet)),
        (2u8..5, any::<bool>()).prop_map(|(id, on)| Input::Affinity(id, on)),
        (2u8..5, any::<bool>()).prop_map(|(id, on)| Input::Bgp(id, on)),
    ]
}

fn feed(table: &mut RouteTable, input: &Input) {
    let block = |id: u8| cidr(&format!("192.168.{id}.0/26"));
    match *input {
        Input::Pool(encap) => table.set_pool(pool(encap)),
        Input::Node(id, subnet) => table.set_node(endpoint(id, subnet)),
        Input::Affinity(id, true) => {
            table.set(
                Source::BlockAffinity,
                block(id),
                affinity(&format!("node{id}")),
            );
        }
        Input::Affinity(id, false) => table.remove(Source::BlockAffinity, &block(id)),
        Input::Bgp(id, true) => table.set(Source::Bgp, block(id), bgp(&format!("10.1.0.{id}"))),
        Input::Bgp(id, false) => table.remove(Source::Bgp, &block(id)),
    }
}

/// The barrier of a pool's edit: the former route stays until both ends have said that they receive the new way.
#[test]
fn a_route_changes_its_way_only_after_both_ends_receive_the_new_one() {
    let mut table = table(Encap::Vxlan(Scope::Always));
    let say = |table: &mut RouteTable, id, word: &str| {
        let mut node = endpoint(id, if id == 3 { 2 } else { 1 });
        node.receives = Some(word.parse().unwrap());
        table.set_node(node);
        settle(table);
        let row = table.row(&cidr(BLOCK2)).unwrap();
        let device = row.selected.map(|selected| match &selected.way {
            Way::Gateways(gateways) => gateways[0].device.to_string(),
            other => format!("{other:?}"),
        });
        (
            device.unwrap_or_default(),
            row.problem.map(ToString::to_string).unwrap_or_default(),
        )
    };
    for id in [1, 2, 3] {
        say(&mut table, id, "vxlan");
    }
    table.set_pool(pool(Encap::Ipip(Scope::Always)));
    let (device, problem) = say(&mut table, 1, "ipip,vxlan");
    assert_eq!(device, "vxlan.calico");
    assert!(problem.contains("node2 has not said"), "{problem}");
    assert_eq!(
        say(&mut table, 2, "ipip,vxlan"),
        ("tunl0".into(), String::new())
    );
    // To no encapsulation, where BGP supplies the route.
    table.set(Source::Bgp, cidr(BLOCK2), bgp("10.1.0.2"));
    table.set_pool(pool(Encap::None));
    assert_eq!(say(&mut table, 1, "direct,ipip").0, "tunl0");
    assert_eq!(say(&mut table, 2, "direct,ipip").0, "eth0");
}

proptest! {
    /// Incremental work ends where a table that was told everything at once ends, but for routes that are held.
    #[test]
    fn incremental_and_fresh_tables_agree(inputs in prop::collection::vec(any_input(), 1..40)) {
        let mut incremental = table(Encap::None);
        let mut fresh = RouteTable::new(NodeName::from("node1"));
        fresh.set_in_sync();
        for (id, subnet) in [(1, 1), (2, 1), (3, 2)] {
            fresh.set_node(endpoint(id, subnet));
        }
        fresh.set_pool(pool(Encap::None));
        fresh.set(Source::BlockAffinity, cidr(BLOCK2), affinity("node2"));
        fresh.set(Source::BlockAffinity, cidr(BLOCK3), affinity("node3"));
        for input in &inputs {
            feed(&mut incremental, input);
            settle(&mut incremental);
            feed(&mut fresh, input);
        }
        settle(&mut fresh);
        let fresh_rows: BTreeMap<_, _> = fresh.all_selected().map(|(p, s)| (p, s.clone())).collect();
        for row in incremental.view() {
            match fresh_rows.get(&row.prefix) {
                Some(wanted) => prop_assert_eq!(row.selected, Some(wanted), "{}", row.prefix),
                None => prop_assert!(row.selected.is_none() || row.problem.is_some(), "{:?}", row),
            }
        }
        let changed: Vec<_> = incremental.take_changes();
        prop_assert!(changed.is_empty());
    }
}
