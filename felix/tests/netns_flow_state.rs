//! A packet that must not pass, over time: what became of flows whose right to exist has ended.
//!
//! Where nothing may arrive, a control flow that stays allowed is used in the same time, so that "nothing came" means
//! that packets were on the way and did not pass.

mod flow_lab;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus};
use flow_lab::{Conversation, Host, SILENCE, address, closed, gone, is_cut, pod, run, set};

#[test]
fn an_established_tcp_flow_that_policy_forbids_stops_in_both_directions() {
    run(async {
        let host = Host::new("fltcp", 3).await;
        host.in_sync(host.everything()).await;
        let (mut flow, mut control) = (host.tcp(1, 2, 8000), host.tcp(1, 3, 8000));
        flow.goes_on();
        control.goes_on();
        host.send(vec![set(&closed(2))]).await;
        host.settled().await;
        host.ended(1, 2).await;
        is_cut(&mut flow, &mut control);
        assert_eq!(host.flows_of(address(2)), [], "{}", host.rules());

        // Allowed again, it goes on: TCP has repeated itself all the time.
        host.send(vec![gone(&closed(2))]).await;
        host.settled().await;
        let heard = flow.hear(false, Duration::from_secs(30));
        assert!(heard.starts_with(b"!"), "{heard:?}\n{}", host.rules());
        host.until("nothing held", || !host.holds_something()).await;
        control.goes_on();
    });
}

#[test]
fn an_established_udp_flow_that_policy_forbids_stops_in_both_directions() {
    run(async {
        let host = Host::new("fludp", 3).await;
        host.in_sync(host.everything()).await;
        let (mut flow, mut control) = (host.udp(1, 2, 8000), host.udp(1, 3, 8000));
        flow.goes_on();
        control.goes_on();
        host.send(vec![set(&closed(2))]).await;
        host.settled().await;
        host.ended(1, 2).await;
        is_cut(&mut flow, &mut control);
        assert_eq!(host.flows_of(address(2)), [], "{}", host.rules());
    });
}

#[test]
fn a_flow_ends_when_its_peer_leaves_the_set_that_allowed_it() {
    run(async {
        let host = Host::new("flset", 3).await;
        let only_friends = r#"{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"friends"},
            "spec":{"selector":"pod == '2'","types":["Ingress"],
            "ingress":[{"action":"Allow","source":{"selector":"friend == 'yes'"}}]}}"#;
        let friend =
            |number| pod(number, number).replace("\"labels\":{", "\"labels\":{\"friend\":\"yes\",");
        let mut all = host.everything();
        all.extend([set(only_friends), set(&friend(1)), set(&friend(3))]);
        host.in_sync(all).await;
        let (mut flow, mut control) = (host.tcp(1, 2, 8000), host.tcp(3, 2, 8001));
        flow.goes_on();
        control.goes_on();
        // Pod 1 is no friend any more.
        host.send(vec![set(&pod(1, 1))]).await;
        host.settled().await;
        host.ended(1, 2).await;
        is_cut(&mut flow, &mut control);
    });
}

#[test]
fn the_next_owner_of_an_address_inherits_no_flow() {
    run(async {
        let host = Host::new("flreuse", 3).await;
        let mut all = host.everything();
        all.push(set(&closed(3)));
        host.in_sync(all).await;
        let mut flow = host.udp(1, 2, 8000);
        flow.goes_on();
        host.send(vec![gone(&pod(2, 2)), gone(&pod(3, 3))]).await;
        host.settled().await;
        assert_eq!(
            host.flows_of(address(2)),
            [],
            "the address could be given out again"
        );

        // Pod 3 gets the address; nobody may talk to it.
        host.pods[2].ip("addr add 192.168.1.2/32 dev eth0");
        let heir = host.inside(3, || UdpSocket::bind(SocketAddr::new(address(2), 8000)));
        heir.set_read_timeout(Some(SILENCE)).unwrap();
        host.send(vec![set(&pod(3, 2))]).await;
        let key = Host::key(3);
        host.handle()
            .programmed(&key, flow_lab::PATIENCE)
            .await
            .unwrap();
        for _ in 0..15 {
            flow.say(true, b'!');
            assert!(heir.recv(&mut [0; 8]).is_err(), "{}", host.rules());
        }
        // The way is there: without the policy the same packets arrive.
        host.send(vec![gone(&closed(3))]).await;
        host.until("words at the next owner", || {
            host.inside(1, || flow.client.send(b"?").map(|_| ()));
            heir.recv(&mut [0; 8]).is_ok()
        })
        .await;
    });
}

#[test]
fn a_spoofed_source_on_an_established_tuple_does_not_pass() {
    run(async {
        let host = Host::new("flspoof", 3).await;
        host.in_sync(host.everything()).await;
        let mut flow = host.udp(1, 2, 8000);
        flow.goes_on();
        // Pod 3 takes the address of pod 1 and sends on its tuple.
        host.pods[2].ip("addr add 192.168.1.1/32 dev eth0");
        let spoofer = host.inside(3, || UdpSocket::bind(flow.client.local_addr()?));
        let server = flow.server.local_addr().unwrap();
        for _ in 0..15 {
            host.inside(3, || spoofer.send_to(b"x", server).map(|_| ()));
            flow.say(true, b'c');
            let heard = flow.hear(false, Duration::from_secs(20));
            assert_eq!(heard, b"c", "{}", host.rules());
        }
    });
}

#[test]
fn a_restarted_dataplane_ends_what_is_forbidden_by_now_and_nothing_else() {
    run(async {
        let mut host = Host::new("flagain", 3).await;
        host.in_sync(host.everything()).await;
        let (mut flow, mut control) = (host.tcp(1, 2, 8000), host.tcp(1, 3, 8000));
        flow.goes_on();
        // While nobody looks, pod 2 is closed.
        host.stop();
        flow.goes_on();
        host.restart();
        let mut all = host.everything();
        all.push(set(&closed(2)));
        host.in_sync(all).await;
        host.settled().await;
        host.ended(1, 2).await;
        is_cut(&mut flow, &mut control);
        // And what is held stays held over the next restart, and is released after it.
        host.restart();
        is_cut(&mut flow, &mut control);
        let mut all = host.everything();
        all.push(set(&closed(2)));
        host.in_sync(all).await;
        host.settled().await;
        host.ended(1, 2).await;
        is_cut(&mut flow, &mut control);
        host.send(vec![gone(&closed(2))]).await;
        host.settled().await;
        let heard = flow.hear(false, Duration::from_secs(30));
        assert!(heard.starts_with(b"!"), "{heard:?}\n{}", host.rules());
    });
}

#[test]
fn nothing_is_opened_or_cut_while_sets_are_still_filling() {
    run(async {
        let mut host = Host::new("flfill", 3).await;
        let not_from_bad = r#"{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkPolicy","metadata":{"name":"bad"},
            "spec":{"selector":"pod == '2'","types":["Ingress"],"ingress":[
            {"action":"Deny","source":{"selector":"bad == 'yes'"}},
            {"action":"Allow","source":{"selector":"good == 'yes'"}}]}}"#;
        let network = |name: &str, label: &str, net: &str| {
            format!(
                r#"{{"apiVersion":"projectcalico.org/v3","kind":"GlobalNetworkSet",
                "metadata":{{"name":"{name}","labels":{{"{label}":"yes"}}}},"spec":{{"nets":["{net}"]}}}}"#
            )
        };
        let sets = [
            set(&network("good", "good", "192.168.1.0/24")),
            set(&network("bad", "bad", "192.168.1.3/32")),
        ];
        let mut all = host.everything();
        all.push(set(not_from_bad));
        all.extend(sets.clone());
        host.in_sync(all).await;
        let (mut good, mut other) = (host.tcp(1, 2, 8000), host.tcp(3, 1, 8000));
        let bad_probe = host.udp(3, 2, 9000);
        // The next dataplane hears of the policy first, and of its sets late.
        host.restart();
        let mut first = host.everything();
        first.push(set(not_from_bad));
        host.send(first).await;
        host.settled().await;
        for _ in 0..10 {
            good.goes_on();
            other.goes_on();
            bad_probe.client.send(b"x").unwrap();
        }
        // Half of the sets: the one that allows.
        host.send(sets[..1].to_vec()).await;
        host.settled().await;
        for _ in 0..10 {
            good.goes_on();
            bad_probe.client.send(b"x").unwrap();
        }
        host.send(sets[1..].to_vec()).await;
        host.updates
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        host.settled().await;
        for _ in 0..10 {
            good.goes_on();
            other.goes_on();
            bad_probe.client.send(b"x").unwrap();
        }
        bad_probe.server.set_read_timeout(Some(SILENCE)).unwrap();
        assert!(
            bad_probe.server.recv(&mut [0; 8]).is_err(),
            "{}",
            host.rules()
        );
        // And then a gap on purpose: the control that the probe could have been heard.
        host.send(vec![gone(not_from_bad)]).await;
        host.until("the probe", || {
            bad_probe.client.send(b"x").unwrap();
            bad_probe.server.recv(&mut [0; 8]).is_ok()
        })
        .await;
    });
}
