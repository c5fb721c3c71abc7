//! Flows past the rules: they take the short cut only while policy allows them.
//!
//! A kernel without flowtables says so and goes on without; one that has them shows the short cut. Which of the two is
//! looked at, the host decides; the virtual machine has flowtables.

mod flow_lab;

use std::time::Duration;

use cali_api::update::Update;
use cali_netlink::probe::{Capability, blocking};
use flow_lab::{Conversation, Host, closed, gone, is_cut, pod, run, set};

fn offload(mode: &str) -> Update {
    set(&format!(
        r#"{{"apiVersion":"projectcalico.org/v3","kind":"FelixConfiguration","metadata":{{"name":"default"}},
            "spec":{{"nftablesFlowTableOffload":"{mode}"}}}}"#
    ))
}

/// The table of the short cuts, as `nft` lists it.
fn table(host: &Host) -> String {
    let listed = host
        .ns
        .output("nft", &["list", "table", "inet", "calico-offload"]);
    String::from_utf8_lossy(&listed.stdout).into_owned()
}

/// Flows of the conntrack table that take the short cut.
fn offloaded(host: &Host) -> String {
    let listed = host.ns.output("conntrack", &["-L"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let short = listed.lines().filter(|line| line.contains("[OFFLOAD]"));
    short.collect::<Vec<_>>().join("\n")
}

/// Talks until connection tracking says that the flow takes the short cut.
fn takes_the_short_cut(host: &Host, flow: &mut impl Conversation, port: u16) {
    let port = format!("dport={port} ");
    for _ in 0..500 {
        flow.goes_on();
        if offloaded(host).contains(&port) {
            return;
        }
    }
    panic!(
        "{port}is not offloaded\n{}\n{}",
        table(host),
        offloaded(host)
    );
}

#[test]
fn an_offloaded_flow_that_policy_forbids_stops_in_both_directions() {
    run(async {
        let host = Host::new("floff", 4).await;
        let mut all = host.everything();
        // Every packet of pod 4 has to be counted.
        let limited = pod(4, 4).replace(
            "\"profiles\"",
            "\"qosControls\":{\"ingressPacketRate\":100000},\"profiles\"",
        );
        all.extend([offload("All"), set(&limited)]);
        host.in_sync(all).await;
        let (mut flow, mut control) = (host.tcp(1, 2, 8000), host.tcp(1, 3, 8001));
        let has = blocking(&[Capability::Flowtable]);
        if has.iter().any(|(_, has)| has.is_err()) {
            host.until("a notice", || {
                let state = host.handle().state();
                let notices = state.borrow().notices.join("\n");
                notices.contains("nftablesFlowTableOffload")
                    && notices.contains("nf_flow_table_inet")
            })
            .await;
            flow.goes_on();
            host.send(vec![set(&closed(2))]).await;
            host.settled().await;
            host.ended(1, 2).await;
            return is_cut(&mut flow, &mut control);
        }
        host.until("the table", || table(&host).contains("cali1"))
            .await;
        takes_the_short_cut(&host, &mut flow, 8000);
        takes_the_short_cut(&host, &mut control, 8001);
        let mut datagrams = host.udp(1, 2, 8002);
        takes_the_short_cut(&host, &mut datagrams, 8002);
        let mut counted = host.udp(1, 4, 8003);
        for _ in 0..20 {
            counted.goes_on();
        }
        assert!(
            !offloaded(&host).contains("dport=8003"),
            "{}",
            offloaded(&host)
        );

        host.send(vec![set(&closed(2))]).await;
        host.settled().await;
        host.ended(1, 2).await;
        is_cut(&mut flow, &mut control);
        is_cut(&mut datagrams, &mut control);
        takes_the_short_cut(&host, &mut control, 8001);

        host.send(vec![gone(&closed(2))]).await;
        host.settled().await;
        let heard = flow.hear(false, Duration::from_secs(30));
        assert!(heard.starts_with(b"!"), "{heard:?}\n{}", host.rules());

        // Somebody else takes it away, and it is back.
        host.ns
            .run("nft", &["delete", "table", "inet", "calico-offload"]);
        host.until("the table", || table(&host).contains("cali1"))
            .await;
        takes_the_short_cut(&host, &mut control, 8001);

        host.send(vec![offload("Disabled")]).await;
        host.until("no table", || table(&host).is_empty()).await;
        control.goes_on();
    });
}
