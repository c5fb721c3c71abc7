//! Namespaces, settings and commands against the real kernel. Run as root.

#![allow(clippy::unwrap_used)]

use std::os::unix::process::CommandExt;

use cali_netlink::{
    NetNs,
    command::{Bind, Isolation},
    sysctl,
    testing::TestNs,
};

#[test]
fn ip_netns_and_we_see_each_other() {
    let ns = TestNs::new("see");
    let listed = std::process::Command::new("ip")
        .args(["netns", "list"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&listed.stdout).contains(ns.name()));
    assert!(NetNs::names().unwrap().contains(&ns.name().to_owned()));
    assert_ne!(
        NetNs::current().unwrap().id().unwrap(),
        ns.netns().id().unwrap()
    );
    let inside = ns
        .netns()
        .run(|| NetNs::current().unwrap().id().unwrap())
        .unwrap();
    assert_eq!(inside, ns.netns().id().unwrap());
}

#[test]
fn a_name_is_taken_once_and_goes_on_drop() {
    let ns = TestNs::new("once");
    let name = ns.name().to_owned();
    assert!(NetNs::create(&name).unwrap_err().is_exists());
    drop(ns);
    assert!(NetNs::open(&name).unwrap_err().is_not_found());
}

#[test]
fn settings_are_of_the_namespace_and_written_only_on_difference() {
    let ns = TestNs::new("sysctl");
    let key = "ipv4/conf/all/forwarding";
    assert_eq!(sysctl::write_if_different(ns.netns(), key, "1"), Ok(true));
    assert_eq!(sysctl::write_if_different(ns.netns(), key, "1"), Ok(false));
    assert_eq!(sysctl::read(ns.netns(), key).unwrap(), "1");
    assert_eq!(sysctl::write_if_different(ns.netns(), key, "0"), Ok(true));
    let error = sysctl::read(ns.netns(), "ipv4/conf/nosuch/forwarding").unwrap_err();
    assert!(
        error.is_not_found() && error.to_string().contains("ipv4/conf/nosuch"),
        "{error}"
    );
}

#[test]
fn a_command_runs_inside() {
    let ns = TestNs::new("cmd");
    ns.ip("link add inside0 type bridge");
    assert!(ns.run("ip", &["-br", "link"]).contains("inside0"));
}

#[test]
fn an_isolated_command_has_its_own_mounts_and_name() {
    let ns = TestNs::new("iso");
    ns.ip("link add inside0 type bridge");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("seen"), "bound").unwrap();
    let target = tempfile::tempdir().unwrap();
    let isolation = Isolation {
        binds: vec![Bind {
            source: dir.path().into(),
            target: target.path().into(),
            read_only: true,
        }],
        sysfs: true,
        hostname: Some("node-x".into()),
        ..Isolation::default()
    };
    let script = "cat $0/seen && hostname && ls /sys/class/net && ! touch $0/new 2>/dev/null";
    let output = ns
        .netns()
        .isolated_command("sh", &isolation)
        .unwrap()
        .arg0("sh")
        .args(["-c", script])
        .arg(target.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.starts_with("boundnode-x"), "{text}");
    assert!(text.contains("inside0"), "{text}");
    assert!(
        !target.path().join("seen").exists(),
        "the mount is not seen outside"
    );
}
