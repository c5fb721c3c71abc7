//! A packet that must not pass, over time, where iptables enforces: the same promises as with nf_tables.

mod flow_lab;

use std::time::Duration;

use flow_lab::{Conversation, Host, address, closed, gone, is_cut, pod, run, set};

const VARIANTS: [&str; 2] = ["NFT", "Legacy"];

#[test]
fn an_established_flow_that_policy_forbids_stops_in_both_directions_until_it_is_allowed_again() {
    run(async {
        for variant in VARIANTS {
            let host = Host::new("flipt", 3).await;
            let mut all = host.everything();
            all.push(Host::backend("Disabled", variant));
            host.in_sync(all).await;
            let (mut tcp, mut udp) = (host.tcp(1, 2, 8000), host.udp(1, 2, 8001));
            let mut control = host.tcp(1, 3, 8000);
            tcp.goes_on();
            udp.goes_on();
            host.send(vec![set(&closed(2))]).await;
            host.settled().await;
            host.ended(1, 2).await;
            is_cut(&mut tcp, &mut control);
            is_cut(&mut udp, &mut control);
            assert_eq!(host.flows_of(address(2)), [], "{}", host.rules());
            host.send(vec![gone(&closed(2))]).await;
            host.settled().await;
            let heard = tcp.hear(false, Duration::from_secs(30));
            assert!(heard.starts_with(b"!"), "{heard:?}\n{}", host.rules());
            host.until("nothing held", || !host.holds_something()).await;
            udp.goes_on();
            control.goes_on();
        }
    });
}

#[test]
fn what_is_held_stays_held_over_a_restart_and_is_released_after_it() {
    run(async {
        for variant in VARIANTS {
            let mut host = Host::new("fliptagain", 3).await;
            let everything = |host: &Host| {
                let mut all = host.everything();
                all.push(Host::backend("Disabled", variant));
                all.push(set(&closed(2)));
                all
            };
            let mut all = everything(&host);
            all.pop();
            host.in_sync(all).await;
            let (mut flow, mut control) = (host.tcp(1, 2, 8000), host.tcp(1, 3, 8000));
            flow.goes_on();
            host.send(vec![set(&closed(2))]).await;
            host.settled().await;
            host.ended(1, 2).await;
            host.restart();
            is_cut(&mut flow, &mut control);
            host.in_sync(everything(&host)).await;
            host.settled().await;
            is_cut(&mut flow, &mut control);
            host.send(vec![gone(&closed(2))]).await;
            host.settled().await;
            let heard = flow.hear(false, Duration::from_secs(30));
            assert!(heard.starts_with(b"!"), "{heard:?}\n{}", host.rules());
        }
    });
}

#[test]
fn the_next_owner_of_an_address_suffers_from_nothing_that_is_held() {
    run(async {
        for variant in VARIANTS {
            let host = Host::new("fliptreuse", 3).await;
            let mut all = host.everything();
            all.push(Host::backend("Disabled", variant));
            host.in_sync(all).await;
            let mut flow = host.udp(1, 2, 8000);
            flow.goes_on();
            host.send(vec![set(&closed(2))]).await;
            host.settled().await;
            host.ended(1, 2).await;
            assert!(host.holds_something(), "{}", host.rules());
            host.send(vec![gone(&pod(2, 2))]).await;
            host.settled().await;
            host.until("nothing held", || !host.holds_something()).await;
            assert_eq!(host.flows_of(address(2)), [], "{}", host.rules());
        }
    });
}

#[test]
fn what_is_held_stays_held_when_the_backend_is_switched() {
    run(async {
        let host = Host::new("flswitch", 3).await;
        host.in_sync(host.everything()).await;
        let (mut flow, mut control) = (host.tcp(1, 2, 8000), host.tcp(1, 3, 8000));
        flow.goes_on();
        host.send(vec![set(&closed(2))]).await;
        host.settled().await;
        host.ended(1, 2).await;
        for (mode, variant, there, gone) in [
            ("Disabled", "NFT", "cali-held", "cali-held-prerouting"),
            ("Disabled", "Legacy", "cali-held", "cali-held-prerouting"),
            ("Auto", "Auto", "cali-held-prerouting", "cali40held-dst"),
        ] {
            host.send(vec![Host::backend(mode, variant)]).await;
            is_cut(&mut flow, &mut control);
            host.until("the other backend alone", || {
                let rules = host.rules();
                rules.contains(there) && !rules.contains(gone)
            })
            .await;
            is_cut(&mut flow, &mut control);
        }
        host.send(vec![gone(&closed(2))]).await;
        host.settled().await;
        let heard = flow.hear(false, Duration::from_secs(30));
        assert!(heard.starts_with(b"!"), "{heard:?}\n{}", host.rules());
    });
}

#[test]
fn without_ipv6_support_only_the_chains_of_ipv4_stand() {
    run(async {
        for variant in VARIANTS {
            let host = Host::new("flno6", 1).await;
            let settings = |ipv6: bool| {
                set(&format!(
                    r#"{{"apiVersion":"projectcalico.org/v3","kind":"FelixConfiguration","metadata":{{"name":"default"}},
                        "spec":{{"nftablesMode":"Disabled","iptablesBackend":"{variant}","ipv6Support":{ipv6}}}}}"#
                ))
            };
            let tool = variant.to_lowercase();
            let stands = |family: &str| {
                let listed = host.ns.output(&format!("{family}-{tool}-save"), &[]);
                String::from_utf8_lossy(&listed.stdout).contains(":cali-")
            };
            let mut all = host.everything();
            all.push(settings(false));
            host.in_sync(all).await;
            assert!(
                stands("iptables") && !stands("ip6tables"),
                "{}",
                host.rules()
            );
            host.send(vec![settings(true)]).await;
            host.until("both", || stands("iptables") && stands("ip6tables"))
                .await;
            host.send(vec![settings(false)]).await;
            host.until("IPv4 alone", || stands("iptables") && !stands("ip6tables"))
                .await;
        }
    });
}
