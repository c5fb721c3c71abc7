//! The built program as a person uses it: what is typed, what is printed, how it ends; compared as a whole.

mod terminal;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use terminal::{Terminal, kinds};

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
fn resources_are_written_shown_changed_and_deleted() {
    let mut terminal = fresh();
    terminal
        .types("apply -f all.yaml --dry-run")
        .types("create -f all.yaml")
        .types("create -f all.yaml")
        .types("create -f all.yaml --skip-exists")
        .types("apply -f all.yaml --dry-run")
        .types("replace -f all.yaml")
        .types("label ippool v6 team=web")
        .types("label ippool v6 team=net")
        .types("label ippool v6 team=net --overwrite")
        .types("label ippool v6 team --remove")
        .types("label ippool v6 team --remove")
        .types("patch ippool v4 -p '{\"spec\":{\"natOutgoing\":false}}'")
        .types("patch ippool v4 -t json -p '[{\"op\":\"replace\",\"path\":\"/spec/vxlanMode\",\"value\":\"Sometimes\"}]'")
        .types("patch ippool v4 -p '{\"metadata\":{\"name\":\"other\"}}'")
        .types("get ippool v4 -o yaml --export")
        .types("delete ippool v6 v7")
        .types("delete ippool v7 -s")
        .types("delete -f all.yaml -s");
    insta::assert_snapshot!(terminal.transcript());
}

#[test]
fn get_prints_every_format_and_filters() {
    let mut terminal = fresh();
    terminal.types("apply -f all.yaml");
    terminal.transcript.clear();
    terminal
        .types("get ippools")
        .types("get pool -o wide")
        .types("get ippool v4 -o json --export")
        .types("get ippools -o name")
        .types("get ippools -o jsonpath='{range .items[*]}{.metadata.name}{\"\\t\"}{.spec.cidr}{\"\\n\"}{end}'")
        .types("get ippools -o custom-columns=name,nat")
        .types("get ippools -o custom-columns=POOL:.metadata.name,BLOCK:.spec.blockSize")
        .types("get ippools -o custom-columns=COLOUR")
        .types("get ippools -o go-template='{{range .items}}{{.metadata.name}} {{with .metadata.labels}}{{.team}}{{else}}-{{end}}{{\"\\n\"}}{{end}}'")
        .types("get ippools -o go-template='{{range .items}}'")
        .types("get ippools -o table")
        .types("get ippools -l team=net -o name")
        .types("get ippools -l 'team in {\"net\"}' -o name")
        .types("get ippools --field spec.vxlanMode=Never -o name")
        .types("get -f all.yaml")
        .types("get gnp -o wide")
        .types("get node n1 n2")
        .types("get ippolo");
    insta::assert_snapshot!(terminal.transcript());
}

#[test]
fn bad_input_is_refused_with_its_place_and_nothing_is_done() {
    let mut terminal = fresh();
    terminal.file(
        "syntax.yaml",
        "apiVersion: projectcalico.org/v3\nkind: [IPPool\n",
    );
    terminal.file(
        "field.yaml",
        "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p}\nspec: {cidr: 10.0.0.0/16, vxlanMod: Always}\n",
    );
    terminal.file(
        "several.yaml",
        "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: good}\nspec: {cidr: 10.1.0.0/16}\n---\n\
         apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: bad}\nspec: {cidr: 10.2.0.0/33}\n",
    );
    terminal.file(
        "nameless.yaml",
        "apiVersion: projectcalico.org/v3\nkind: IPPool\nspec: {cidr: 10.1.0.0/16}\n",
    );
    terminal.file("empty.yaml", "# nothing\n");
    terminal
        .types("apply -f syntax.yaml")
        .types("apply -f field.yaml")
        .types("apply -f several.yaml")
        .types("apply -f nameless.yaml")
        .types("apply -f absent.yaml")
        .types("apply -f empty.yaml")
        .types("apply -f empty.yaml --skip-empty")
        .types("validate -f all.yaml")
        .types("get ippools -o name")
        .types("aply -f all.yaml")
        .types("apply --fil all.yaml");
    insta::assert_snapshot!(terminal.transcript());
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
fn addresses_are_configured_and_pools_split() {
    let mut terminal = fresh();
    terminal.types("apply -f all.yaml");
    terminal.transcript.clear();
    terminal
        .types(
            "ipam configure --strictaffinity true --max-blocks-per-host 8 --ip-cooldown-seconds 30",
        )
        .types("ipam configure --kubevirt-ip-persistence Sometimes")
        .types("ipam configure")
        .types("ipam show --show-configuration")
        .types("ipam show")
        .types("ipam split 4 --name v4");
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
    let refused = terminal::gives_address(&terminal.path("cali.db"), "n1", "late");
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
    let other = terminal.path("other.db");
    terminal::gives_address(&other, "n1", "next").expect("addresses again");
}

#[test]
fn every_field_of_every_kind_comes_back() {
    kinds::come_back(&Terminal::new(), &[]);
    kinds::are_complete();
}

#[test]
fn a_pool_is_split_and_keeps_its_addresses() {
    let mut terminal = fresh();
    terminal.types("apply -f all.yaml");
    terminal.gives_address("n1", "web");
    terminal.transcript.clear();
    terminal
        .types("ipam split 4 --name v4")
        .types("datastore lock")
        .types("ipam split 3 --name v4")
        .types("ipam split 4 --cidr 10.30.0.0/16")
        .types("datastore unlock")
        .types("get ippools -o wide")
        .types("ipam show --show-blocks")
        .types("ipam check --show-problem-ips");
    insta::assert_snapshot!(terminal.transcript());
    terminal.gives_address("n1", "api");
}

#[test]
fn a_watch_shows_what_is_there_and_each_change() {
    let mut terminal = fresh();
    terminal.types("apply -f all.yaml");
    let mut watch = terminal
        .command(&["get", "ippool", "--watch", "-o", "custom-columns=NAME,NAT"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start the watch");
    let mut lines = BufReader::new(watch.stdout.take().expect("its output")).lines();
    let mut next = || lines.next().expect("a line").expect("text");
    let columns = |line: String| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(columns(next()), "EVENT NAME NAT");
    assert_eq!(columns(next()), "ADDED v4 true");
    assert_eq!(columns(next()), "ADDED v6 false");
    terminal.types("patch ippool v4 -p '{\"spec\":{\"natOutgoing\":false}}'");
    assert_eq!(columns(next()), "MODIFIED v4 false");
    terminal.types("delete ippool v6");
    assert_eq!(columns(next()), "DELETED v6 false");
    watch.kill().expect("end the watch");
    watch.wait().expect("its end");
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
fn a_node_that_does_not_run_says_so_and_one_elsewhere_is_waited_for() {
    let mut terminal = fresh();
    terminal.types("apply -f all.yaml");
    terminal.transcript.clear();
    terminal.file(
        "kept.yaml",
        "apiVersion: projectcalico.org/v3\nkind: CalicoNodeStatus\nmetadata: {name: kept}\n\
         spec: {node: n2, classes: [BGP], updatePeriodSeconds: 10}\n\
         status: {lastUpdated: '2026-01-01T00:00:00Z', bgp: {numberEstablishedV4: 1, peersV4: \
         [{peerIP: 10.0.1.1, type: NodeMesh, state: Established, since: '09:19:28'}]}}\n",
    );
    terminal.file(
        "n2.yaml",
        "{apiVersion: projectcalico.org/v3, kind: Node, metadata: {name: n2}, spec: {bgp: {ipv4Address: 10.0.1.2/24}}}",
    );
    terminal
        .types("CALI_RUN_DIR=run node status")
        .types("CALI_RUN_DIR=run node status -o json")
        .types("CALI_RUN_DIR=run routes")
        .types("CALI_RUN_DIR=run routes 10.0.1.0/33")
        .types("CALI_RUN_DIR=run routes --owner felix")
        .types("node status --node n1 --timeout 1")
        .types("node status --node n7")
        .types("apply -f n2.yaml")
        .types("apply -f kept.yaml")
        .types("node status --all --timeout 1")
        .types("node status --node n2 --timeout 1")
        .types("node status --node n1 -o json --timeout 1")
        .types("top --once --timeout 1")
        .types("get caliconodestatuses");
    insta::assert_snapshot!(terminal.transcript());
}

#[test]
fn another_version_is_worth_a_warning_and_an_unknown_level_an_error() {
    let mut terminal = fresh();
    terminal.file(
        "cluster.yaml",
        "{apiVersion: projectcalico.org/v3, kind: ClusterInformation, metadata: {name: default}, \
         spec: {calicoVersion: v0.9.0, clusterType: 'k8s,bgp', datastoreReady: true}}",
    );
    terminal
        .types("version --client")
        .types("version")
        .types("apply -f cluster.yaml")
        .types("get tiers -o name")
        .types("get tiers -o name --allow-version-mismatch")
        .types("version --allow-version-mismatch")
        .types("get tiers -o name --log-level loud");
    insta::assert_snapshot!(terminal.transcript());
    let output = terminal
        .command(&["get", "tiers", "-o", "name", "--log-level", "trace"])
        .output()
        .expect("start");
    let logged = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{logged}");
    assert!(String::from_utf8_lossy(&output.stdout).is_empty());
}

/// Names and texts of the pieces of an archive, without its folder.
fn unpacked(terminal: &Terminal, archive: &str) -> std::collections::BTreeMap<String, String> {
    let folder = terminal.path(&format!("{archive}.d"));
    std::fs::create_dir(&folder).expect("a folder");
    let done = std::process::Command::new("tar")
        .args(["--strip-components=1", "-xzf"])
        .arg(terminal.path(archive))
        .arg("-C")
        .arg(&folder)
        .status();
    assert!(done.expect("start tar").success());
    let mut found = std::collections::BTreeMap::new();
    let mut folders = vec![folder.clone()];
    while let Some(inner) = folders.pop() {
        for entry in std::fs::read_dir(inner).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text =
                String::from_utf8_lossy(&std::fs::read(&path).expect("a piece")).into_owned();
            let name = path.strip_prefix(&folder).expect("inside");
            found.insert(name.display().to_string(), text);
        }
    }
    found
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
    let found = unpacked(&terminal, "node.tar.gz");
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
    let found = unpacked(&terminal, "cluster.tar.gz");
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
