//! The built program as a person uses it: what is typed, what is printed, how it ends; compared as a whole.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

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

/// A datastore of its own, and what was typed and printed so far.
struct Terminal {
    folder: tempfile::TempDir,
    transcript: String,
}

impl Terminal {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        std::fs::write(folder.path().join("all.yaml"), MANIFEST).expect("write the manifest");
        Self {
            folder,
            transcript: String::new(),
        }
    }

    fn file(&self, name: &str, text: &str) {
        std::fs::write(self.folder.path().join(name), text).expect("write a file");
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_calictl"));
        command
            .args(args)
            .current_dir(self.folder.path())
            .env_clear()
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", self.folder.path().join("cali.db"));
        command
    }

    /// Types a line; words are separated by blanks, quotes keep them together.
    fn types(&mut self, line: &str) -> &mut Self {
        let words = words(line);
        let args: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = self.command(&args).output().expect("start calictl");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let _ = write!(self.transcript, "$ calictl {line}\n{said}");
        if let Some(code) = output.status.code().filter(|code| *code != 0) {
            let _ = writeln!(self.transcript, "[exit code {code}]");
        }
        self
    }

    /// The transcript without what differs from run to run.
    fn transcript(&self) -> String {
        let folder = self.folder.path().display().to_string();
        let lines = self.transcript.replace(&folder, "FOLDER");
        let changing = [
            "uid:",
            "resourceVersion:",
            "creationTimestamp:",
            "\"uid\":",
            "\"resourceVersion\":",
            "\"creationTimestamp\":",
        ];
        lines
            .lines()
            .filter(|line| {
                !changing
                    .iter()
                    .any(|word| line.trim_start().starts_with(word))
            })
            .map(|line| format!("{line}\n"))
            .collect()
    }
}

fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().expect("there is a word").push(letter),
        }
    }
    words
}

#[test]
fn resources_are_written_shown_changed_and_deleted() {
    let mut terminal = Terminal::new();
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
    let mut terminal = Terminal::new();
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
    let mut terminal = Terminal::new();
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
    let mut terminal = Terminal::new();
    terminal
        .types("explain ippool")
        .types("explain ippool.spec")
        .types("explain bgppeer.spec.password")
        .types("explain ippool.spec.vxlan")
        .types("explain node");
    insta::assert_snapshot!(terminal.transcript());
}

#[test]
fn addresses_are_configured_and_pools_split() {
    let mut terminal = Terminal::new();
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
fn a_watch_shows_what_is_there_and_each_change() {
    let mut terminal = Terminal::new();
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
    let terminal = Terminal::new();
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
    let terminal = Terminal::new();
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
