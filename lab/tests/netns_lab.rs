//! A topology of plain nodes, in real namespaces: made, made again, taken away.

use cali_lab::plan::{Places, plan};
use cali_lab::state::Folder;
use cali_lab::{bring_up, topology};
use cali_netlink::{NetNs, Netlink};
use std::path::Path;
use std::process::Command;

const TOPOLOGY: &str = "\
name: NAME
mgmt: {ipv4-subnet: 172.20.21.0/24}
topology:
  nodes:
    a: {exec: ['ip addr add 10.0.0.1/24 dev eth1']}
    b: {exec: ['ip addr add 10.0.0.2/24 dev eth1', \"sh -c 'echo b > FOLDER/ran'\"]}
  links:
    - endpoints: ['a:eth1', 'b:eth1']
      mtu: 1400
";

fn ping(namespace: &str, address: &str) -> bool {
    let command = || {
        Command::new("ping")
            .args(["-c1", "-W2", address])
            .output()
            .is_ok_and(|output| output.status.success())
    };
    NetNs::open(namespace).is_ok_and(|namespace| namespace.run(command).unwrap_or(false))
}

#[tokio::test]
async fn a_lab_is_made_once_and_leaves_nothing() {
    let name = format!("l{}", std::process::id());
    let root = tempfile::tempdir().unwrap();
    let text = TOPOLOGY
        .replace("NAME", &name)
        .replace("FOLDER", &root.path().display().to_string());
    let topology = topology::parse(Path::new("/t/l.clab.yml"), &text).unwrap();
    let places = Places {
        root: root.path().into(),
        programs: "/bin".into(),
        peers: "/nowhere".into(),
    };
    let plan = plan(&topology, &places).unwrap();
    let folder = Folder::new(root.path(), &name);
    folder.save_plan(&plan).unwrap();
    let guard = Guard(folder.clone());

    assert_eq!(bring_up::namespaces(&plan).await.unwrap(), 3);
    bring_up::management(&plan).await.unwrap();
    assert_eq!(bring_up::cables(&plan).await.unwrap(), 1);
    assert_eq!(bring_up::exec(&plan, &folder).unwrap(), 3);

    let a = format!("{name}_a");
    assert!(ping(&a, "10.0.0.2"), "over the cable");
    assert!(
        ping(&a, &plan.nodes["b"].mgmt_address.to_string()),
        "over the management network"
    );
    let eth1 = Netlink::open(&NetNs::open(&a).unwrap())
        .unwrap()
        .link_by_name("eth1")
        .unwrap()
        .unwrap();
    assert_eq!(eth1.mtu, 1400);
    assert_eq!(
        std::fs::read_to_string(root.path().join("ran")).unwrap(),
        "b\n"
    );

    assert_eq!(
        bring_up::namespaces(&plan).await.unwrap(),
        0,
        "a second run makes nothing"
    );
    bring_up::management(&plan).await.unwrap();
    assert_eq!(bring_up::cables(&plan).await.unwrap(), 0);
    assert_eq!(bring_up::exec(&plan, &folder).unwrap(), 0);

    drop(guard);
    assert!(!folder.path().exists());
    let left: Vec<String> = NetNs::names()
        .unwrap()
        .into_iter()
        .filter(|other| other.starts_with(&format!("{name}_")))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

struct Guard(Folder);

impl Drop for Guard {
    fn drop(&mut self) {
        let ended = bring_up::down(&self.0);
        assert!(ended.is_ok(), "{ended:?}");
    }
}
