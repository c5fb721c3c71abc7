//! While policies, sets, labels and settings change all the time, a denied probe stream never gets through and an
//! allowed one never fails. `CALI_GAP_CHANGES` sets how many changes there are.

mod flow_lab;

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cali_api::update::Update;
use flow_lab::{ANSWER, Conversation, Host, SetAtEnd, address, gone, pod, run, set};

const CHANGES: u32 = 300;
/// One change takes `iptables-restore` some 40 ms in an unoptimised build.
const CHANGES_OF_IPTABLES: u32 = 100;
const ALLOWED: u16 = 7000;
const ALWAYS: &str = r#"{"action":"Allow","protocol":"UDP","destination":{"ports":[7000]}}"#;
const DENIED: u16 = 7001;

/// SplitMix64: the same history every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((mixed >> 33) % u64::from(end)).unwrap_or(0)
    }
}

fn rule(dice: &mut Dice) -> String {
    let port = 80 + dice.below(12);
    let selector =
        ["pod == '1'", "color == 'red'", "color == 'blue'", "all()"][dice.below(4) as usize];
    let protocol = ["TCP", "UDP"][dice.below(2) as usize];
    format!(
        r#"{{"action":"Allow","protocol":"{protocol}","source":{{"selector":"{selector}"}},"destination":{{"ports":[{port}]}}}}"#
    )
}

/// A policy of pods 2 and 3; the first one always allows the one probe.
fn policy(number: u32, dice: &mut Dice) -> String {
    let mut rules: Vec<String> = (0..dice.below(12)).map(|_| rule(dice)).collect();
    if number == 0 {
        let place = dice.below(u32::try_from(rules.len()).unwrap_or(0) + 1) as usize;
        rules.insert(place, ALWAYS.to_owned());
    } else if dice.below(4) == 0 {
        rules.push(rule(dice).replace("Allow", "Log"));
    }
    policy_of(number, dice.below(5), &rules)
}

fn policy_of(number: u32, order: u32, rules: &[String]) -> String {
    format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{{"name":"default.p{number}"}},
        "spec":{{"order":{order},"selector":"pod in {{'2','3'}}","types":["Ingress"],"ingress":[{}]}}}}"#,
        rules.join(",")
    )
}

fn colored(number: u8, dice: &mut Dice) -> String {
    let color = ["red", "blue", "green"][dice.below(3) as usize];
    pod(number, number).replace(
        "\"labels\":{",
        &format!("\"labels\":{{\"color\":\"{color}\","),
    )
}

fn network_set(dice: &mut Dice) -> String {
    let nets: Vec<String> = (0..=dice.below(5))
        .map(|_| match dice.below(3) {
            0 => format!("\"192.168.1.{}/32\"", dice.below(200)),
            1 => "\"192.168.1.0/30\"".to_owned(),
            _ => format!("\"10.{}.0.0/16\"", dice.below(100)),
        })
        .collect();
    format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkSet",
        "metadata":{{"name":"nets","labels":{{"color":"red"}}}},"spec":{{"nets":[{}]}}}}"#,
        nets.join(",")
    )
}

fn change(dice: &mut Dice, backend: [&str; 2]) -> Update {
    let [mode, iptables] = backend;
    match dice.below(10) {
        0 => set(&colored(1, dice)),
        1 => set(&colored(2, dice)),
        2 => set(&colored(3, dice)),
        3 => set(&network_set(dice)),
        4 => {
            let action = ["Accept", "Drop"][dice.below(2) as usize];
            set(&format!(
                r#"{{"apiVersion":"projectcalico.org/v3","kind":"FelixConfiguration","metadata":{{"name":"default"}},
                "spec":{{"defaultEndpointToHostAction":"{action}","nftablesMode":"{mode}","iptablesBackend":"{iptables}"}}}}"#
            ))
        }
        5 => gone(&policy(1 + dice.below(12), dice)),
        _ => {
            let number = dice.below(13);
            set(&policy(number, dice))
        }
    }
}

#[test]
fn no_change_opens_what_is_denied_or_closes_what_is_allowed() {
    no_gap(["Enabled", "Auto"], CHANGES, change);
}

#[test]
fn nor_does_it_with_iptables_over_nf_tables() {
    no_gap(["Disabled", "NFT"], CHANGES_OF_IPTABLES, change);
}

#[test]
fn nor_does_it_with_the_legacy_tables() {
    no_gap(["Disabled", "Legacy"], CHANGES_OF_IPTABLES, change);
}

/// Other rules, in any order, beside the one that allows the probe.
fn changed_maps(dice: &mut Dice, _: [&str; 2]) -> Update {
    let mut rules: Vec<String> = (0..8 + dice.below(24)).map(|_| rule(dice)).collect();
    let place = dice.below(u32::try_from(rules.len()).unwrap_or(0)) as usize;
    rules.insert(place, ALWAYS.to_owned());
    set(&policy_of(0, 0, &rules))
}

/// So many Allow rules become lookups in maps, and each change makes new ones in the place of the former.
#[test]
fn nor_does_a_change_of_the_maps_that_allow() {
    no_gap(["Enabled", "Auto"], CHANGES, changed_maps);
}

fn no_gap(backend: [&str; 2], changes: u32, change: impl Fn(&mut Dice, [&str; 2]) -> Update) {
    run(async {
        let changes = std::env::var("CALI_GAP_CHANGES")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(changes);
        let host = Host::new("flgap", 3).await;
        let mut dice = Dice(20);
        let mut all = host.everything();
        all.push(set(&policy(0, &mut dice)));
        all.push(Host::backend(backend[0], backend[1]));
        host.in_sync(all).await;
        let (allowed, denied) = (host.listens(2, ALLOWED), host.listens(3, DENIED));
        let mut established = host.tcp(2, 1, 7002);
        let (over, done, probes, answered, leaked) = (
            AtomicBool::new(false),
            AtomicBool::new(false),
            AtomicU32::new(0),
            AtomicU32::new(0),
            AtomicU32::new(0),
        );
        std::thread::scope(|scope| {
            let _end = SetAtEnd([&over, &done]);
            // Answers what the allowed stream says.
            scope.spawn(|| {
                let mut data = [0; 8];
                while !done.load(Ordering::Relaxed) {
                    if let Ok((len, from)) = allowed.recv_from(&mut data) {
                        // The prober says if an answer is missing.
                        let _ = allowed.send_to(&data[..len], from);
                    }
                    let _ = denied.set_nonblocking(true);
                    while denied.recv(&mut data).is_ok() {
                        leaked.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            let pods = &host.pods;
            let prober = scope.spawn(|| {
                let probing = || {
                    while !over.load(Ordering::Relaxed) {
                        // Every probe is a new flow.
                        let socket = UdpSocket::bind((address(1), 0))?;
                        socket.set_read_timeout(Some(ANSWER))?;
                        socket.send_to(b"x", SocketAddr::new(address(3), DENIED))?;
                        socket.send_to(b"o", SocketAddr::new(address(2), ALLOWED))?;
                        probes.fetch_add(1, Ordering::Relaxed);
                        let mut data = [0; 8];
                        // A denied probe may be refused with a message; that is not an answer.
                        if socket.recv(&mut data).is_ok() {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Ok::<_, std::io::Error>(())
                };
                pods[0].netns().run(probing)
            });
            tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(async {
                    for _ in 0..changes {
                        host.send(vec![change(&mut dice, backend)]).await;
                        host.settled().await;
                        established.goes_on();
                    }
                });
            });
            over.store(true, Ordering::Relaxed);
            prober
                .join()
                .expect("the prober")
                .expect("its namespace")
                .expect("its sockets");
        });
        let (probes, answered) = (probes.into_inner(), answered.into_inner());
        println!(
            "{backend:?}: {changes} changes, {probes} probes of each kind, {answered} answered"
        );
        assert!(
            probes > changes,
            "too few probes to show something: {probes}"
        );
        assert_eq!(
            leaked.into_inner(),
            0,
            "denied probes got through\n{}",
            host.rules()
        );
        assert_eq!(answered, probes, "answers and probes\n{}", host.rules());
        // The denied stream could have been seen.
        let opening = r#"{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"default.open"},
            "spec":{"order":0,"selector":"pod == '3'","types":["Ingress"],"ingress":[{"action":"Allow"}]}}"#;
        host.send(vec![set(opening)]).await;
        host.until("the opened stream", || {
            host.inside(1, || {
                let socket = UdpSocket::bind((address(1), 0))?;
                socket.send_to(b"x", SocketAddr::new(address(3), DENIED))
            });
            denied.recv(&mut [0; 8]).is_ok()
        })
        .await;
    });
}
