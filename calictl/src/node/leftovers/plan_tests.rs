use super::*;
use cali_netlink::nft::Family;
use cali_netlink::testing::link;
use cali_netlink::{Hop, IpIp, LinkKind, Vxlan};

fn vxlan() -> LinkKind {
    LinkKind::Vxlan(Vxlan {
        vni: 4096,
        port: 4789,
        local: None,
        device: None,
        learning: false,
        udp_csum: true,
    })
}

fn prefix(text: &str) -> IpNetwork {
    text.parse().expect("a prefix")
}

fn via(text: &str, protocol: u8, oif: IfIndex) -> Route {
    let hop = Hop::via("10.0.0.9".parse().expect("an address"), oif);
    Route::new(prefix(text), protocol, Target::Hop(hop))
}

fn wireguard_rule(table: u32, priority: u32) -> Rule {
    Rule {
        fwmark: Some((0x0010_0000, 0x0010_0000)),
        invert: true,
        ..Rule::new(false, priority, table)
    }
}

/// A Calico node: two pods, all tunnels, one of them somebody else's.
fn calico() -> Host {
    let eth0 = link(2, "eth0", LinkKind::Physical);
    Host {
        links: vec![
            eth0,
            link(3, "cali11111111111", LinkKind::Veth),
            link(4, "cali22222222222", LinkKind::Veth),
            link(5, "tunl0", LinkKind::IpIp(IpIp::default())),
            link(6, "vxlan.calico", vxlan()),
            link(7, "wireguard.cali", LinkKind::Wireguard),
            link(8, "vxlan-v6.calico", LinkKind::Bridge),
        ],
        addresses: vec![
            Address::new(5, prefix("192.168.0.1/32")),
            Address::new(2, prefix("10.0.0.1/24")),
        ],
        routes: vec![
            Route::blackhole(prefix("192.168.0.0/26"), 80),
            via("192.168.1.0/26", 12, 2),
            via("192.168.2.0/26", 80, 6),
            via("172.31.0.0/24", 12, 2),
            via("192.168.3.0/26", 4, 2),
            Route::on_device(prefix("192.168.0.7/32"), 80, 3),
            Route {
                table: 1,
                kind: RouteKind::Throw,
                target: Target::None,
                ..Route::blackhole(prefix("172.20.0.0/16"), 80)
            },
        ],
        rules: vec![
            wireguard_rule(1, 99),
            wireguard_rule(51820, 32764),
            Rule::new(false, 100, 1),
        ],
        nexthops: vec![],
        tables: vec![
            TableName::new(Family::Ip, "calico"),
            TableName::new(Family::Inet, "calico"),
            TableName::new(Family::Inet, "firewalld"),
        ],
        sets: vec!["cali40s:x".into()],
        files: ["", "/mtu", "/nodename", "/cali.db"]
            .map(|name| PathBuf::from(format!("/var/lib/calico{name}")))
            .into(),
        state_dir: "/var/lib/calico".into(),
        ..Host::default()
    }
}

fn known() -> Known {
    Known {
        ranges: vec![prefix("192.168.0.0/16")],
        pods: Ok(BTreeSet::from(["cali11111111111".to_owned()])),
    }
}

fn texts(plan: &Plan) -> Vec<String> {
    plan.steps.iter().map(ToString::to_string).collect()
}

fn reason<'a>(plan: &'a Plan, object: &str) -> &'a str {
    plan.kept
        .iter()
        .find(|kept| kept.object == object)
        .map_or("", |kept| &kept.reason)
}

#[test]
fn of_calico_everything_goes_but_a_running_pods_interface() {
    let plan = plan(Owner::Calico, &calico(), &known(), &Wish::default());
    assert_eq!(
        texts(&plan),
        [
            "device cali22222222222",
            "addresses of tunl0, and take it down (only its module can delete it)",
            "device vxlan.calico",
            "device wireguard.cali",
            "route blackhole 192.168.0.0/26 proto 80",
            "route 192.168.1.0/26 via 10.0.0.9 dev #2 proto 12",
            "route throw 172.20.0.0/16 table 1 proto 80",
            "rule 99: fwmark 0x100000/0x100000 lookup 1",
            "nf_tables table ip calico",
            "IP set cali40s:x",
            "/var/lib/calico/nodename",
            "/var/lib/calico/mtu",
        ]
    );
    assert!(reason(&plan, "device cali11111111111").starts_with("its pod runs"));
    assert_eq!(
        reason(&plan, "device vxlan-v6.calico"),
        "it is bridge, which Calico has none of"
    );
    let foreign = "route 172.31.0.0/24 via 10.0.0.9 dev #2 proto 12";
    assert!(reason(&plan, foreign).contains("--pool CIDR"));
    assert!(
        plan.notes[0].starts_with("No policy guards"),
        "{:?}",
        plan.notes
    );
}

#[test]
fn a_pod_of_which_nobody_speaks_stays_unless_it_is_asked_for() {
    let known = Known {
        pods: Err("refused".to_owned()),
        ..known()
    };
    let with = |pods| {
        let wish = Wish {
            pods,
            ..Wish::default()
        };
        let plan = plan(Owner::Calico, &calico(), &known, &wish);
        let cut = texts(&plan)
            .into_iter()
            .filter(|text| text.contains("device cali"));
        (
            cut.count(),
            reason(&plan, "device cali22222222222").to_owned(),
        )
    };
    let (cut, reason) = with(false);
    assert_eq!(cut, 0);
    assert!(reason.contains("refused"), "{reason}");
    assert_eq!(with(true).0, 2);
}

#[test]
fn what_cali_has_adopted_stays_while_it_runs() {
    let host = Host {
        cali_runs: true,
        ..calico()
    };
    let plan = plan(Owner::Calico, &host, &known(), &Wish::default());
    assert_eq!(
        texts(&plan),
        ["nf_tables table ip calico", "IP set cali40s:x"]
    );
    assert!(reason(&plan, "device vxlan.calico").contains("adopted"));
    assert!(plan.notes.is_empty(), "{:?}", plan.notes);
}

#[test]
fn chains_of_one_are_not_taken_for_the_others() {
    let saved = |chain: &str| {
        format!("*filter\n:{chain} - [0:0]\n-A FORWARD -j {chain}\n-A {chain} -j ACCEPT\nCOMMIT\n")
    };
    let host = Host {
        iptables: BTreeMap::from([
            ("iptables-legacy", saved("cali-FORWARD")),
            ("iptables-nft", saved(CALI_CHAIN)),
        ]),
        sets: vec!["cali40s:x".into()],
        ..Host::default()
    };
    let of = |owner| {
        let plan = plan(owner, &host, &known(), &Wish::default());
        (texts(&plan), plan.kept.len())
    };
    let line = |program| format!("{program}: 1 chains, and 1 rules in chains of others");
    assert_eq!(of(Owner::Calico), (vec![line("iptables-legacy")], 2));
    assert_eq!(of(Owner::Cali), (vec![line("iptables-nft")], 2));
}

#[test]
fn of_cali_the_datastore_stays_unless_it_is_asked_for() {
    let of = |datastore| {
        let wish = Wish {
            pods: true,
            datastore,
        };
        let host = Host {
            nexthops: vec![
                Nexthop {
                    id: *NEXTHOPS.start(),
                    protocol: 80,
                    target: cali_netlink::NexthopTarget::Blackhole { v6: false },
                },
                Nexthop {
                    id: 77,
                    protocol: 4,
                    target: cali_netlink::NexthopTarget::Blackhole { v6: false },
                },
            ],
            ..calico()
        };
        texts(&plan(Owner::Cali, &host, &known(), &wish))
    };
    let kept = of(false);
    assert!(!kept.contains(&"/var/lib/calico/cali.db".to_owned()));
    assert!(!kept.contains(&"/var/lib/calico".to_owned()));
    assert!(kept.contains(&"nf_tables table inet calico".to_owned()));
    assert!(!kept.contains(&"nf_tables table ip calico".to_owned()));
    let nexthops = kept.iter().filter(|text| text.starts_with("nexthop"));
    assert_eq!(nexthops.count(), 1, "{kept:?}");
    let all = of(true);
    let files = ["nodename", "mtu", "cali.db"].map(|name| format!("/var/lib/calico/{name}"));
    let last: Vec<String> = files
        .into_iter()
        .chain(["/var/lib/calico".to_owned()])
        .collect();
    assert_eq!(all[all.len() - 4..], last);
}

#[test]
fn flannels_bridge_stays_while_pods_are_connected() {
    let mut port = link(4, "veth0", LinkKind::Veth);
    port.master = Some(3);
    let host = Host {
        links: vec![
            link(2, "flannel.1", vxlan()),
            link(3, "cni0", LinkKind::Bridge),
            port,
            link(5, "veth1", LinkKind::Veth),
        ],
        routes: vec![
            via("10.244.2.0/24", 3, 9),
            via("10.99.0.0/24", 3, 9),
            Route::on_device(prefix("10.244.9.0/24"), 3, 9),
        ],
        files: [
            "/run/flannel",
            "/run/flannel/subnet.env",
            "/var/lib/cni/networks/cbr0/10.244.1.2",
        ]
        .map(PathBuf::from)
        .into(),
        ..Host::default()
    };
    let known = Known {
        ranges: vec![prefix("10.244.0.0/16")],
        pods: Err(String::new()),
    };
    let of = |pods| {
        let wish = Wish {
            pods,
            ..Wish::default()
        };
        texts(&plan(Owner::Flannel, &host, &known, &wish))
    };
    assert_eq!(
        of(false),
        [
            "device flannel.1",
            "route 10.244.2.0/24 via 10.0.0.9 dev #9 proto 3",
            "/run/flannel/subnet.env",
            "/run/flannel",
        ]
    );
    let all = of(true);
    assert_eq!(
        all[..3],
        ["device veth0", "device flannel.1", "device cni0"]
    );
    assert!(all.contains(&"/var/lib/cni/networks/cbr0/10.244.1.2".to_owned()));
}
