//! What a person does with a real etcd as the datastore.

mod terminal;

use cali_datastore::testing::Etcd;
use terminal::{Terminal, kinds, suite};

/// A terminal whose datastore is this server.
fn terminal_of(server: &Etcd) -> Terminal {
    let mut terminal = Terminal::new();
    terminal.uses(&[
        ("DATASTORE_TYPE", "etcdv3"),
        ("ETCD_ENDPOINTS", &server.endpoint()),
    ]);
    terminal
}

#[test]
fn a_cluster_moves_to_etcd_and_back() {
    let server = Etcd::start();
    let endpoint = server.endpoint();
    let mut terminal = Terminal::new();
    terminal.fills("node1", "web");
    terminal.prints("datastore lock");
    let before = terminal.prints("datastore export > before.txt");
    terminal.uses(&[("DATASTORE_TYPE", "etcdv3"), ("ETCD_ENDPOINTS", &endpoint)]);
    terminal.prints("datastore import -f before.txt");
    let between = terminal.prints("datastore export > between.txt");
    assert_eq!(between, before);
    let path = terminal.path("after.db").display().to_string();
    terminal.uses(&[("DATASTORE_TYPE", "sqlite"), ("CALI_SQLITE_PATH", &path)]);
    terminal.prints("datastore import -f between.txt");
    assert_eq!(terminal.prints("datastore export"), before);
    assert!(before.contains("k8s-pod-network.web"), "{before}");
}

#[test]
fn a_session_is_the_same_on_etcd() {
    let server = Etcd::start();
    terminal::session(&mut terminal_of(&server));
}

#[test]
fn every_command_prints_on_etcd_what_it_always_prints() {
    let server = Etcd::start();
    for (name, case) in suite::ALL {
        println!("{name}");
        let mut terminal = terminal_of(&server);
        terminal.clears();
        case(&mut terminal);
    }
}

#[test]
fn every_field_of_every_kind_comes_back_from_etcd() {
    let server = Etcd::start();
    kinds::come_back(&terminal_of(&server), &[]);
}

#[test]
fn the_configuration_file_names_the_datastore() {
    let server = Etcd::start();
    let mut terminal = Terminal::new();
    terminal.file(
        "calicoctl.cfg",
        &format!(
            "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nmetadata:\nspec:\n  datastoreType: etcdv3\n  etcdEndpoints: {}\n",
            server.endpoint()
        ),
    );
    terminal.file(
        "tier.yaml",
        "{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: blue}, spec: {order: 5}}",
    );
    terminal
        .types("apply -f tier.yaml -c calicoctl.cfg")
        .types("get tier -o name")
        .types("--config calicoctl.cfg get tier -o name");
    insta::assert_snapshot!(terminal.transcript(), @r"
    $ calictl apply -f tier.yaml -c calicoctl.cfg
    Successfully applied 1 'Tier' resource(s)
    $ calictl get tier -o name
    $ calictl --config calicoctl.cfg get tier -o name
    tiers/blue
    ");
}
