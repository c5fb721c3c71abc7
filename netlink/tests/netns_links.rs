//! Removal of devices against the real kernel. Run as root.
#![allow(clippy::unwrap_used)]

use cali_netlink::{IfIndex, LinkRemover, testing::TestNs};

/// The number of the group in which the remover gathers what is to go.
const GROUP: u32 = 0x4361_6c69;

fn pairs(ns: &TestNs, count: usize) -> Vec<IfIndex> {
    for number in 0..count {
        ns.ip(&format!(
            "link add v{number} up type veth peer name p{number}"
        ));
    }
    let index = |number| ns.netlink().link_by_name(&format!("v{number}")).unwrap();
    (0..count)
        .map(|number| index(number).unwrap().index)
        .collect()
}

fn names(ns: &TestNs) -> Vec<String> {
    let mut names: Vec<String> = ns
        .netlink()
        .dump_links()
        .unwrap()
        .into_iter()
        .map(|link| link.name)
        .filter(|name| name != "lo")
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn many_devices_go_at_once_and_each_has_its_result() {
    let ns = TestNs::new("remove");
    let devices = pairs(&ns, 20);
    ns.ip("link add stays type bridge");
    let mut remover = LinkRemover::open(ns.netns()).unwrap();
    let mut asked = devices.clone();
    asked.push(99_999);
    let results: Vec<bool> = remover
        .remove(&asked)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let mut expected = vec![true; 20];
    expected.push(false);
    assert_eq!(results, expected);
    assert_eq!(names(&ns), ["stays"]);
    assert_eq!(remover.remove(&devices[..1]), [Ok(false)]);
    assert_eq!(remover.remove(&[]), []);
}

#[test]
fn a_foreign_device_in_the_same_group_stays() {
    let ns = TestNs::new("group");
    let devices = pairs(&ns, 3);
    ns.ip("link add foreign type bridge");
    ns.ip(&format!("link set foreign group {GROUP}"));
    let mut remover = LinkRemover::open(ns.netns()).unwrap();
    assert_eq!(remover.remove(&devices), [Ok(true), Ok(true), Ok(true)]);
    assert_eq!(names(&ns), ["foreign"]);
}
