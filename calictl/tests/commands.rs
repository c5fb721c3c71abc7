//! The built program as a person uses it: what is typed, what is printed, how it ends; compared as a whole.

mod terminal;

use std::path::Path;
use std::time::{Duration, Instant};

use terminal::{Terminal, kinds, suite};

const MANIFEST: &str = "\
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v4, labels: {team: net}}
spec: {cidr: 10.30.0.0/16, vxlanMode: CrossSubnet, natOutgoing: true}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v6}
spec: {cidr: 'fd00:30::/48'}
---
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: n1}
spec: {bgp: {ipv4Address: 10.0.1.1/24}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: deny-db}
spec: {selector: tier == 'db', types: [Ingress], ingress: [{action: Deny}]}
";

fn fresh() -> Terminal {
    let terminal = Terminal::new();
    terminal.file("all.yaml", MANIFEST);
    terminal
}

#[test]
fn every_command_prints_what_it_always_prints() {
    std::thread::scope(|scope| {
        for (name, case) in suite::ALL {
            let at_a_terminal = move || case(&mut Terminal::new());
            let thread = std::thread::Builder::new().name(name.to_owned());
            thread.spawn_scoped(scope, at_a_terminal).expect("a thread");
        }
    });
}

#[test]
fn fields_are_explained_from_the_schema() {
    let mut terminal = fresh();
    terminal
        .types("explain")
        .types("explain ippool")
        .types("explain ippool.spec")
        .types("explain bgppeer.spec.password")
        .types("explain ippool.spec.vxlan")
        .types("explain node");
    insta::assert_snapshot!(terminal.transcript());
}

#[test]
fn a_locked_datastore_gives_out_nothing_and_is_moved() {
    let mut terminal = fresh();
    terminal.types("apply -f all.yaml");
    terminal.gives_address("n1", "web");
    terminal
        .types("datastore export")
        .types("datastore lock")
        .types("get clusterinformation");
    let refused = terminal.tries_address("n1", "late");
    assert!(
        matches!(refused, Err(cali_ipam::Error::Locked)),
        "{refused:?}"
    );
    terminal
        .types("datastore migrate export > all.txt")
        .types("CALI_SQLITE_PATH=other.db datastore import -f all.yaml")
        .types("datastore import -f all.txt")
        .types("CALI_SQLITE_PATH=used.db apply -f all.yaml")
        .types("CALI_SQLITE_PATH=used.db delete ippool v4")
        .types("CALI_SQLITE_PATH=used.db datastore migrate import -f all.txt")
        .types("CALI_SQLITE_PATH=used.db get ippool -o name")
        .types("CALI_SQLITE_PATH=other.db datastore import -f all.txt")
        .types("CALI_SQLITE_PATH=other.db datastore import -f all.txt")
        .types("CALI_SQLITE_PATH=other.db datastore export > again.txt")
        .types("CALI_SQLITE_PATH=other.db datastore migrate unlock")
        .types("CALI_SQLITE_PATH=other.db datastore import -f all.txt")
        .types("CALI_SQLITE_PATH=other.db ipam show --show-blocks");
    let read = |name: &str| std::fs::read_to_string(terminal.path(name)).expect("a file");
    assert_eq!(read("all.txt"), read("again.txt"));
    assert!(read("all.txt").contains("k8s-pod-network.web"));
    let unlocked = read("all.txt").replace("\"datastoreReady\": false", "\"datastoreReady\": true");
    terminal.file("unlocked.txt", &unlocked);
    terminal.types("CALI_SQLITE_PATH=new.db datastore import -f unlocked.txt");
    insta::assert_snapshot!(terminal.transcript());
    let other = terminal.path("other.db").display().to_string();
    terminal.uses(&[("CALI_SQLITE_PATH", &other)]);
    terminal.gives_address("n1", "next");
}

#[test]
fn every_field_of_every_kind_comes_back() {
    kinds::come_back(&Terminal::new(), &[]);
    kinds::are_complete();
}

#[test]
fn shells_and_man_know_every_command() {
    let terminal = fresh();
    for shell in ["bash", "zsh", "fish"] {
        let output = terminal
            .command(&["completion", shell])
            .output()
            .expect("start");
        let script = String::from_utf8_lossy(&output.stdout);
        for word in ["apply", "skip-not-exists", "checksystem"] {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
    }
    let made = terminal.command(&["man", "pages"]).status().expect("start");
    assert!(made.success());
    let pages = terminal.folder.path().join("pages");
    for page in ["calictl.1", "calictl-get.1", "calictl-bgp-peers.1"] {
        assert!(Path::new(&pages.join(page)).exists(), "{page} is missing");
    }
}

#[test]
fn the_version_of_the_client_needs_nothing_and_no_time() {
    let terminal = fresh();
    let fastest = (0..5)
        .map(|_| {
            let start = Instant::now();
            let output = terminal
                .command(&["version", "--client"])
                .env("DATASTORE_TYPE", "no such store")
                .output()
                .expect("start");
            assert!(output.status.success());
            assert!(String::from_utf8_lossy(&output.stdout).starts_with("Client Version:    v"));
            start.elapsed()
        })
        .min();
    // The promise is 10 ms; this only notices that something is started which need not be.
    assert!(fastest < Some(Duration::from_secs(1)), "{fastest:?}");
}

#[test]
fn a_node_that_does_not_run_says_so() {
    let mut terminal = fresh();
    terminal
        .types("CALI_RUN_DIR=run node status")
        .types("CALI_RUN_DIR=run node status -o json")
        .types("CALI_RUN_DIR=run bgp peers")
        .types("CALI_RUN_DIR=run routes")
        .types("CALI_RUN_DIR=run routes 10.0.1.0/33")
        .types("CALI_RUN_DIR=run routes --owner felix");
    insta::assert_snapshot!(terminal.transcript());
}

#[test]
fn the_archive_of_a_node_has_its_network_and_logs_and_no_secrets() {
    let terminal = fresh();
    std::fs::create_dir(terminal.path("logs")).expect("a folder");
    for (name, text) in [
        ("old.log", "old\n"),
        ("new.log", "said password=hunter2 was wrong\n"),
    ] {
        terminal.file(&format!("logs/{name}"), text);
    }
    let old = std::fs::File::options()
        .append(true)
        .open(terminal.path("logs/old.log"));
    let before = std::time::SystemTime::now() - Duration::from_secs(7200);
    old.and_then(|file| file.set_modified(before))
        .expect("an old file");
    let line = "CALI_RUN_DIR=run PATH=/usr/sbin:/usr/bin:/sbin:/bin node diags --log-dir logs --since 1h --output node.tar.gz";
    assert!(
        terminal
            .prints(line)
            .starts_with("Diags saved to node.tar.gz\n")
    );
    let found = terminal.unpacks("node.tar.gz");
    assert!(found["network/routes-v4.txt"].starts_with("$ ip -4 route show table all\n"));
    assert_eq!(found["logs/logs/new.log"], "said password=*** was wrong\n");
    assert!(!found.contains_key("logs/logs/old.log"));
    let contents = &found["contents.txt"];
    assert!(
        contents.contains("status/node.json: NOT COLLECTED: "),
        "{contents}"
    );
    let again = terminal.output(line);
    assert!(!again.status.success(), "an archive is never overwritten");
}

#[test]
fn the_archive_of_a_cluster_has_its_resources() {
    let terminal = fresh();
    terminal.prints("apply -f all.yaml");
    terminal.prints("cluster diags --output cluster.tar.gz");
    let found = terminal.unpacks("cluster.tar.gz");
    assert!(found["resources/ippools.yaml"].contains("10.30.0.0/16"));
    assert!(found["resources/globalnetworkpolicies.yaml"].contains("deny-db"));
    assert!(
        !found["contents.txt"].contains("NOT COLLECTED"),
        "{}",
        found["contents.txt"]
    );
}

#[test]
fn a_session_is_the_same_on_every_datastore() {
    terminal::session(&mut Terminal::new());
}
