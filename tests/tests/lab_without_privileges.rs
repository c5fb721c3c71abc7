//! A host or a user that lacks what is needed is told what, and nothing is begun.

use cali_tests::lab::{programs, repository};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

/// Runs a program of ours as user 65534 (nobody), who may read a copy of it.
fn as_nobody(program: &str, args: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join(program);
    std::fs::copy(programs().join(program), &copy).expect("a copy of the program");
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).expect("permissions");
    Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&copy)
        .args(args)
        .env("NODENAME", "nobody")
        .env("CALI_RUN_DIR", folder.path().join("run"))
        .env("CALI_STATE_DIR", folder.path().join("lib"))
        .env("CALI_SQLITE_PATH", folder.path().join("cali.db"))
        .env("CALI_LAB_DIR", folder.path().join("lab"))
        .current_dir("/")
        .output()
        .expect("setpriv")
}

#[test]
fn without_root_the_node_and_the_lab_say_what_is_missing() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).expect("permissions");
    let topology = folder.path().join("mesh.clab.yml");
    let text = std::fs::read_to_string(repository().join("deploy/containerlab/mesh.clab.yml"));
    let text = text
        .expect("the topology")
        .replace("cali.lab/manifests", "other/label");
    std::fs::write(&topology, text.replace("mesh/router.toml", "/dev/null"))
        .expect("a copy of the topology");
    let topology = topology.display().to_string();
    let runs = [
        as_nobody("cali-node", &[]),
        as_nobody("calictl", &["lab", "up", &topology]),
    ];
    for output in runs {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("lacks root privileges"), "{said}");
        assert!(said.contains("run it as root"), "{said}");
        assert_eq!(said.lines().count(), 1, "one thing is missing: {said}");
    }
}
