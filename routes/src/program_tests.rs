use super::*;
use crate::candidate::Source;
use crate::nexthops::FIRST_ID;
use crate::render::network;
use crate::table::{Gateway, Way};

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn devices() -> Devices {
    [("eth0", 2), ("cali1", 9)]
        .map(|(name, index)| (Arc::from(name), index))
        .into()
}

fn via(gateway: &str) -> Selected {
    let gateway = Gateway {
        address: gateway.parse().unwrap(),
        device: "eth0".into(),
    };
    Selected {
        source: Source::Bgp,
        because: "peer".into(),
        way: Way::Gateways(vec![gateway]),
    }
}

fn workload() -> Selected {
    let way = Way::Device {
        device: "cali1".into(),
        source: None,
    };
    Selected {
        source: Source::Workload,
        because: "wep".into(),
        way,
    }
}

/// A kernel that does what it is told and keeps a log of the order.
#[derive(Debug, Default)]
struct Kernel {
    routes: BTreeMap<RouteKey, Route>,
    nexthops: BTreeMap<u32, Nexthop>,
    log: Vec<String>,
}

impl Kernel {
    fn turn(&mut self, program: &mut Program, now: Instant) {
        self.nexthop_turn(program, now);
        for (op, step) in program.plan_routes(now) {
            let result = match &step {
                Step::Add(route) if self.routes.contains_key(&route.key()) => {
                    Err(format!("{route} exists"))
                }
                Step::Add(route) | Step::Replace(route) => {
                    if let Target::Nexthop(id) = route.target {
                        assert!(
                            self.nexthops.contains_key(&id),
                            "route {route} before its object"
                        );
                    }
                    self.log.push(format!("set {route}"));
                    self.routes.insert(route.key(), route.clone());
                    Ok(())
                }
                Step::Delete(route) => {
                    self.log.push(format!("delete {route}"));
                    self.routes.remove(&route.key());
                    Ok(())
                }
                Step::Refuse(found) => Err(format!("foreign route {found}")),
            };
            program.on_route_result(&op, result, now);
        }
        program.retire_nexthops();
        self.nexthop_turn(program, now);
    }

    fn nexthop_turn(&mut self, program: &mut Program, now: Instant) {
        for op in program.plan_nexthops(now) {
            match &op {
                Op::Set { key, value, .. } => {
                    self.log.push(format!("set {value}"));
                    self.nexthops.insert(*key, value.clone());
                }
                Op::Delete { key, .. } => {
                    let used = self
                        .routes
                        .values()
                        .any(|route| route.target == Target::Nexthop(*key));
                    assert!(!used, "object {key} removed under its routes");
                    self.log.push(format!("delete {key}"));
                    self.nexthops.remove(key);
                }
            }
            program.on_nexthop_result(&op, Ok::<(), String>(()), now);
        }
    }

    fn dump(&self) -> (Vec<Route>, Vec<Nexthop>) {
        (
            self.routes.values().cloned().collect(),
            self.nexthops.values().cloned().collect(),
        )
    }
}

fn started(kernel: &Kernel) -> Program {
    let mut program = Program::new(KernelSettings::default());
    program.set_devices(devices());
    let (routes, nexthops) = kernel.dump();
    program.adopt(routes, nexthops, Instant::now());
    program.set_prefixes(vec![cidr("192.168.0.0/16")]);
    program
}

#[test]
fn object_comes_before_its_route_and_goes_after_it() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    program.place(cidr("192.168.2.0/26"), Some(via("10.1.0.2")));
    kernel.turn(&mut program, now);
    assert_eq!(program.state_of(&cidr("192.168.2.0/26")), Ok(()));
    program.place(cidr("192.168.2.0/26"), None);
    kernel.turn(&mut program, now);
    let verbs: Vec<&str> = kernel.log.iter().map(|line| line.split_at(9).0).collect();
    assert_eq!(
        verbs,
        ["set nexth", "set 192.1", "delete 19", "delete 21"],
        "{:#?}",
        kernel.log
    );
    assert!(kernel.routes.is_empty() && kernel.nexthops.is_empty());
}

#[test]
fn routes_to_one_node_share_one_object() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    for block in 0..20 {
        program.place(
            cidr(&format!("192.168.{block}.0/26")),
            Some(via("10.1.0.2")),
        );
    }
    kernel.turn(&mut program, now);
    assert_eq!((kernel.routes.len(), kernel.nexthops.len()), (20, 1));
    program.place(cidr("192.168.3.0/26"), None);
    kernel.turn(&mut program, now);
    assert_eq!((kernel.routes.len(), kernel.nexthops.len()), (19, 1));
}

#[test]
fn restart_changes_nothing_in_the_kernel() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    program.place(cidr("192.168.2.0/26"), Some(via("10.1.0.2")));
    program.place(cidr("192.168.1.5/32"), Some(workload()));
    kernel.turn(&mut program, now);
    kernel.log.clear();

    let mut program = started(&kernel);
    assert_eq!(program.held(), 2);
    kernel.turn(&mut program, now);
    program.place(cidr("192.168.1.5/32"), Some(workload()));
    program.release(Hold::Datastore);
    kernel.turn(&mut program, now);
    program.place(cidr("192.168.2.0/26"), Some(via("10.1.0.2")));
    program.release(Hold::Bgp { v4: true });
    kernel.turn(&mut program, now);
    assert_eq!(kernel.log, Vec::<String>::new());
}

#[test]
fn bgp_routes_of_an_earlier_life_stay_until_the_end_of_sync() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    program.place(cidr("192.168.2.0/26"), Some(via("10.1.0.2")));
    kernel.turn(&mut program, now);
    let mut program = started(&kernel);
    program.release(Hold::Datastore);
    program.release(Hold::Bgp { v4: false });
    kernel.turn(&mut program, now);
    assert_eq!(kernel.routes.len(), 1);
    program.release(Hold::Bgp { v4: true });
    kernel.turn(&mut program, now);
    assert_eq!((kernel.routes.len(), kernel.nexthops.len()), (0, 0));
}

#[test]
fn bgp_routes_of_an_earlier_life_stay_until_the_datastore_is_in_sync_as_well() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    program.place(cidr("192.168.2.0/26"), Some(via("10.1.0.2")));
    kernel.turn(&mut program, now);
    kernel.log.clear();
    let mut program = started(&kernel);
    program.release(Hold::Bgp { v4: true });
    kernel.turn(&mut program, now);
    assert_eq!(kernel.log, Vec::<String>::new());
    program.release(Hold::Datastore);
    kernel.turn(&mut program, now);
    assert_eq!((kernel.routes.len(), kernel.nexthops.len()), (0, 0));
}

#[test]
fn foreign_routes_are_never_touched() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let foreign = [
        // Our protocol number, but neither in a pool nor over an object of ours.
        Route::on_device(network(&cidr("172.16.0.0/24")), 80, 2),
        // Another BIRD on this host.
        Route::blackhole(network(&cidr("172.17.0.0/24")), 12),
        // In our pool, but the administrator's.
        Route::blackhole(network(&cidr("192.168.77.0/26")), 4),
    ];
    for route in &foreign {
        kernel.routes.insert(route.key(), route.clone());
    }
    let mut program = started(&kernel);
    program.place(cidr("192.168.77.0/26"), Some(via("10.1.0.2")));
    for hold in [Hold::Datastore, Hold::Bgp { v4: true }] {
        program.release(hold);
        kernel.turn(&mut program, now);
    }
    for route in &foreign {
        assert_eq!(kernel.routes.get(&route.key()), Some(route));
    }
    let reason = program.state_of(&cidr("192.168.77.0/26")).unwrap_err();
    assert!(reason.contains("192.168.77.0/26"), "{reason}");
}

#[test]
fn deleted_object_brings_itself_and_its_routes_back() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    for block in 0..5 {
        program.place(
            cidr(&format!("192.168.{block}.0/26")),
            Some(via("10.1.0.2")),
        );
    }
    kernel.turn(&mut program, now);
    let object = kernel.nexthops.remove(&FIRST_ID).unwrap();
    kernel.routes.clear();
    let drift = program.on_nexthop_event(object, false, now);
    assert_eq!(drift, Some(Drift::Missing { key: FIRST_ID }));
    kernel.turn(&mut program, now);
    assert_eq!((kernel.routes.len(), kernel.nexthops.len()), (5, 1));
}

#[test]
fn device_that_goes_and_comes_brings_its_routes_back_under_the_new_index() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    program.place(cidr("192.168.1.5/32"), Some(workload()));
    kernel.turn(&mut program, now);
    kernel.routes.clear();
    program.set_devices([(Arc::from("eth0"), 2)].into());
    program.on_device_dump(9, Vec::new(), now);
    kernel.turn(&mut program, now);
    assert!(kernel.routes.is_empty());
    assert!(
        program
            .state_of(&cidr("192.168.1.5/32"))
            .unwrap_err()
            .contains("cali1")
    );
    program.set_devices([(Arc::from("eth0"), 2), (Arc::from("cali1"), 14)].into());
    kernel.turn(&mut program, now);
    let row = kernel.routes.values().next().unwrap();
    assert_eq!(row.target, Target::Hop(cali_netlink::Hop::device(14)));
}

#[test]
fn link_down_rewrites_rows_although_the_device_is_back_before_we_look() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    program.place(cidr("192.168.1.5/32"), Some(workload()));
    program.place(cidr("192.168.2.0/26"), Some(via("10.1.0.2")));
    kernel.turn(&mut program, now);
    kernel.routes.clear();
    kernel.nexthops.clear();
    program.on_nexthop_dump(Vec::new(), now);
    let drifts = program.on_device_dump(2, Vec::new(), now);
    assert_eq!(
        drifts.len(),
        1,
        "only the row over eth0 is concerned: {drifts:?}"
    );
    program.on_device_dump(9, Vec::new(), now);
    kernel.turn(&mut program, now);
    assert_eq!((kernel.routes.len(), kernel.nexthops.len()), (2, 1));
}

#[test]
fn a_kernel_without_objects_gets_plain_routes() {
    let (mut kernel, now) = (Kernel::default(), Instant::now());
    let mut program = started(&kernel);
    program.place(cidr("192.168.2.0/26"), Some(via("10.1.0.2")));
    for op in program.plan_nexthops(now) {
        program.on_nexthop_result(&op, Err("not supported"), now);
    }
    program.do_without_nexthop_objects();
    kernel.turn(&mut program, now);
    let row = kernel.routes.values().next().unwrap();
    assert!(matches!(row.target, Target::Hop(_)), "{row}");
    assert!(kernel.nexthops.is_empty());
}
