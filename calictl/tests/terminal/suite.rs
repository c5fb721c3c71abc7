//! What each command that has to do with the datastore does and prints, word for word the same on every datastore: one snapshot
//! per case for all of them. What differs between datastores is a fault.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use super::Terminal;

/// A terminal with an empty datastore, and what happens at it.
pub(crate) type Case = fn(&mut Terminal);

pub(crate) const ALL: [(&str, Case); 11] = [
    ("written", written),
    ("formats", formats),
    ("bad_input", bad_input),
    ("configured", configured),
    ("split", split),
    ("locked", locked),
    ("released", released),
    ("watched", watched),
    ("elsewhere", elsewhere),
    ("versions", versions),
    ("traced", traced),
];

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
kind: BGPPeer
metadata: {name: tor}
spec: {peerIP: 10.0.0.254, asNumber: 64600}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: deny-db}
spec: {selector: tier == 'db', types: [Ingress], ingress: [{action: Deny}]}
";

/// The manifest as a file, and everything in it written.
fn filled(terminal: &mut Terminal) -> &mut Terminal {
    terminal.file("all.yaml", MANIFEST);
    terminal.prints("apply -f all.yaml");
    terminal
}

/// Compares the transcript with the case's snapshot.
fn compare(case: &str, terminal: &Terminal) {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_snapshot_path("../snapshots");
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(case, terminal.transcript()));
}

fn written(terminal: &mut Terminal) {
    terminal.file("all.yaml", MANIFEST);
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
    compare("written", terminal);
}

fn formats(terminal: &mut Terminal) {
    terminal.joins("n1");
    filled(terminal)
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
        .types("get node n1 -o wide")
        .types("get node n1 n2")
        .types("get ippolo");
    compare("formats", terminal);
}

fn bad_input(terminal: &mut Terminal) {
    terminal.file("all.yaml", MANIFEST);
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
    terminal.file(
        "type.yaml",
        "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p}\nspec:\n  cidr: 10.0.0.0/16\n  blockSize: large\n",
    );
    terminal.file(
        "scope.yaml",
        "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p, namespace: shop}\nspec: {cidr: 10.0.0.0/16}\n",
    );
    terminal.file("empty.yaml", "# nothing\n");
    terminal
        .types("apply -f syntax.yaml")
        .types("apply -f field.yaml")
        .types("apply -f several.yaml")
        .types("apply -f nameless.yaml")
        .types("apply -f type.yaml")
        .types("apply -f scope.yaml")
        .types("apply -f absent.yaml")
        .types("apply -f empty.yaml")
        .types("apply -f empty.yaml --skip-empty")
        .types("validate -f all.yaml")
        .types("get ippools -o name")
        .types("aply -f all.yaml")
        .types("apply --fil all.yaml");
    compare("bad_input", terminal);
}

fn configured(terminal: &mut Terminal) {
    filled(terminal)
        .types(
            "ipam configure --strictaffinity true --max-blocks-per-host 8 --ip-cooldown-seconds 30",
        )
        .types("ipam configure --kubevirt-ip-persistence Sometimes")
        .types("ipam configure")
        .types("ipam show --show-configuration")
        .types("ipam show")
        .types("ipam split 4 --name v4");
    compare("configured", terminal);
}

fn split(terminal: &mut Terminal) {
    terminal.joins("n1");
    filled(terminal).gives_address("n1", "web");
    terminal
        .types("ipam split 4 --name v4")
        .types("datastore lock")
        .types("ipam split 3 --name v4")
        .types("ipam split 4 --cidr 10.30.0.0/16")
        .types("datastore unlock")
        .types("get ippools -o wide")
        .types("ipam show --show-blocks")
        .types("ipam check --show-problem-ips");
    compare("split", terminal);
    terminal.gives_address("n1", "api");
}

fn locked(terminal: &mut Terminal) {
    terminal.joins("n1");
    filled(terminal).gives_address("n1", "web");
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
        .types("datastore import -f all.yaml")
        .types("datastore import -f all.txt")
        .types("delete ippool v6")
        .types("datastore migrate import -f all.txt")
        .types("get ippools -o name")
        .types("ipam show --show-blocks")
        .types("datastore migrate unlock")
        .types("datastore import -f all.txt");
    compare("locked", terminal);
    terminal.gives_address("n1", "next");
}

fn released(terminal: &mut Terminal) {
    terminal.joins("n1");
    filled(terminal).gives_address("n1", "web");
    terminal.gives_address("n1", "api");
    terminal
        .types("ipam show --ip 10.30.52.128")
        .types("ipam show --ip 10.30.7.7")
        .types("ipam show --show-borrowed")
        .types("ipam check --show-all-ips -o report.json")
        .types("ipam release --ip 10.30.52.128")
        .types("ipam release --ip 10.30.52.128")
        .types("ipam release --ip 10.99.0.1")
        .types("ipam release --from-report report.json")
        .types("datastore lock")
        .types("ipam check -o report.json")
        .types("ipam release --from-report report.json")
        .types("ipam check");
    compare("released", terminal);
}

fn watched(terminal: &mut Terminal) {
    filled(terminal);
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
    terminal.prints("patch ippool v4 -p '{\"spec\":{\"natOutgoing\":false}}'");
    assert_eq!(columns(next()), "MODIFIED v4 false");
    terminal.prints("delete ippool v6");
    assert_eq!(columns(next()), "DELETED v6 false");
    watch.kill().expect("end the watch");
    watch.wait().expect("its end");
}

fn elsewhere(terminal: &mut Terminal) {
    terminal.joins("n1");
    terminal.file(
        "kept.yaml",
        "apiVersion: projectcalico.org/v3\nkind: CalicoNodeStatus\nmetadata: {name: kept}\n\
         spec: {node: n2, classes: [BGP], updatePeriodSeconds: 10}\n\
         status: {lastUpdated: '2026-01-01T00:00:00Z', bgp: {numberEstablishedV4: 1, peersV4: \
         [{peerIP: 10.0.1.1, type: NodeMesh, state: Established, since: '09:19:28'}]}}\n",
    );
    terminal
        .types("node status --node n1 --timeout 1")
        .types("node status --node n7")
        .types("routes --node n1 --timeout 1")
        .types("routes --node n7 --all");
    terminal.joins("n2");
    terminal
        .types("apply -f kept.yaml")
        .types("node status --all --timeout 1")
        .types("node status --node n2 --timeout 1")
        .types("node status --node n1 -o json --timeout 1")
        .types("routes 10.0.0.0/8 --all --timeout 1")
        .types("routes --node n1 -o json --timeout 1")
        .types("top --once --timeout 1")
        .types("get caliconodestatuses");
    compare("elsewhere", terminal);
}

fn versions(terminal: &mut Terminal) {
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
    compare("versions", terminal);
    let output = terminal.output("get tiers -o name --log-level trace");
    let logged = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{logged}");
    assert!(String::from_utf8_lossy(&output.stdout).is_empty());
}

fn traced(terminal: &mut Terminal) {
    terminal.joins("n1");
    terminal.joins("n2");
    for (pod, node, address) in [("api", "n1", "10.30.1.1"), ("db", "n2", "10.30.2.1")] {
        terminal.runs(pod, node, address);
    }
    terminal.file(
        "policy.yaml",
        "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: default}\nspec: {order: 1000000}\n---\n\
         apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: db, namespace: shop}\n\
         spec: {selector: app == 'db', types: [Ingress], ingress: [{action: Allow, protocol: TCP, \
         source: {selector: app == 'api'}, destination: {ports: [5432]}}]}\n",
    );
    filled(terminal)
        .types("get workloadendpoints -n shop")
        .types("trace shop/api shop/db:5432")
        .types("diff -f policy.yaml")
        .types("apply -f policy.yaml")
        .types("diff -f policy.yaml")
        .types("trace shop/api shop/db:5432")
        .types("trace shop/api shop/db:80")
        .types("trace 192.0.2.9 shop/db:5432 -v")
        .types("trace shop/gone shop/db:80")
        .types("diff --delete -f policy.yaml");
    compare("traced", terminal);
}
