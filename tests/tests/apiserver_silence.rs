//! Connections to a real API server that go silent, as when a firewall forgets them: nothing says that they are gone, but the kernel's probes
//! find out, and the stream of changes goes on over new ones without an object that only seems to be deleted.

use std::sync::Arc;
use std::time::Duration;

use cali_api::schema::{Group, defined, definition};
use cali_datastore::conformance;
use cali_datastore::kubernetes::{Kubernetes, Settings};
use cali_datastore::testing::ApiServer;
use cali_netlink::testing::{TestNs, patient};
use cali_tests::relay::Relay;

/// Without probes, a call on a silent connection takes 30 s, and a watch minutes.
const LIMIT: Duration = Duration::from_secs(60);

/// Packets of these ports are lost on their way in, so that neither end hears of the other.
const TABLE: &str = "add table inet silence
add set inet silence ports { type inet_service; }
add chain inet silence in { type filter hook input priority 0; }
add rule inet silence in tcp sport @ports drop
add rule inet silence in tcp dport @ports drop";

/// Silences the connections to a port that are there now; how many.
fn silence(ns: &TestNs, port: u16) -> usize {
    let open = ns.run(
        "ss",
        &["-Htn", "state", "established", &format!("dport = :{port}")],
    );
    let ours = open
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':'))
        .map(|(_, port)| format!("add element inet silence ports {{ {port} }}\n"));
    let ours: Vec<String> = ours.collect();
    ns.run("nft", &[&ours.concat()]);
    ours.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stream_survives_connections_that_go_silent() {
    let server = ApiServer::start().await;
    let definitions: Vec<_> = defined().map(|kind| definition(kind, Group::V3)).collect();
    server.define(&definitions).await;
    server.namespace("a").await;
    let ns = TestNs::new("silence");
    ns.run("nft", &[TABLE]);
    let port = server.port();
    let _relay = Relay::start(ns.netns(), port);
    let settings = Settings {
        probes: Some((Duration::from_secs(1), Duration::from_secs(1))),
        ..server.settings()
    };
    // Sockets are those of the namespace that the thread is in.
    let client = move || {
        ns.netns().clone().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.expect("a runtime").block_on(async {
                let store = Arc::new(Kubernetes::new(settings));
                let survival = conformance::stream_survives(store, 2, async |round| {
                    let silenced = silence(&ns, port);
                    // One of the watch, and one for the rest at least.
                    assert!(silenced >= 2, "round {round}: {silenced} connections");
                });
                let ended = tokio::time::timeout(patient(LIMIT), survival).await;
                ended.expect("probes find out at once");
            });
        })
    };
    let ended = tokio::task::spawn_blocking(client).await;
    ended
        .expect("the end of the client")
        .expect("the namespace");
}
