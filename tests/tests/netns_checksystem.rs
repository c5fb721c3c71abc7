//! `calictl node checksystem` on a path that carries less than the link promises, with and without somebody who says so.

use cali_netlink::testing::{TestNs, eventually};
use cali_tests::lab::programs;
use std::time::Duration;

const NODES: &str = "\
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: near}
spec: {bgp: {ipv4Address: 10.0.1.1/24, ipv6Address: 'fd00:1::1/64'}}
---
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: far}
spec: {bgp: {ipv4Address: 10.0.2.2/24, ipv6Address: 'fd00:2::2/64'}}
---
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: nowhere}
spec: {bgp: {ipv4Address: 10.9.9.9/24}}
";

/// near - router - far.
struct Path {
    near: TestNs,
    router: TestNs,
    far: TestNs,
    folder: tempfile::TempDir,
}

impl Path {
    fn new() -> Self {
        let [near, router, far] = ["near", "router", "far"].map(TestNs::new);
        for (end, subnet, host) in [(&near, 1, 1), (&far, 2, 2)] {
            router.ip(&format!(
                "link add to{subnet} type veth peer name eth0 netns {}",
                end.name()
            ));
            router.ip(&format!("addr add 10.0.{subnet}.254/24 dev to{subnet}"));
            router.ip(&format!(
                "addr add fd00:{subnet}::254/64 dev to{subnet} nodad"
            ));
            router.ip(&format!("link set to{subnet} up"));
            end.ip(&format!("addr add 10.0.{subnet}.{host}/24 dev eth0"));
            end.ip(&format!("addr add fd00:{subnet}::{host}/64 dev eth0 nodad"));
            end.ip("link set eth0 up");
            let other = 3 - subnet;
            end.ip(&format!(
                "route add 10.0.{other}.0/24 via 10.0.{subnet}.254"
            ));
            end.ip(&format!(
                "route add fd00:{other}::/64 via fd00:{subnet}::254"
            ));
        }
        router.run("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
        router.run("sysctl", &["-qw", "net.ipv6.conf.all.forwarding=1"]);
        // Each refusal is to be heard, however many there were before.
        router.run("sysctl", &["-qw", "net.ipv4.icmp_ratelimit=0"]);
        router.run("sysctl", &["-qw", "net.ipv6.icmp.ratelimit=0"]);
        for to in ["10.0.2.2", "fd00:2::2"] {
            eventually(Duration::from_secs(20), || {
                let output = near.output("ping", &["-c", "1", "-W", "1", to]);
                if output.status.success() {
                    Ok(())
                } else {
                    Err(format!("no answer from {to}"))
                }
            });
        }
        let path = Self {
            near,
            router,
            far,
            folder: tempfile::tempdir().expect("make a folder"),
        };
        let file = path.folder.path().join("nodes.yaml");
        std::fs::write(&file, NODES).expect("write the nodes");
        let (said, code) = path.calictl(&["apply", "-f", &file.display().to_string()]);
        assert_eq!(code, Some(0), "{said}");
        path
    }

    fn calictl(&self, args: &[&str]) -> (String, Option<i32>) {
        let output = self
            .near
            .command(
                programs()
                    .join("calictl")
                    .to_str()
                    .expect("a path in UTF-8"),
            )
            .args(args)
            .env("DATASTORE_TYPE", "sqlite")
            .env("CALI_SQLITE_PATH", self.folder.path().join("cali.db"))
            .env("NO_COLOR", "1")
            .output()
            .expect("start calictl");
        let text = [output.stdout, output.stderr].concat();
        (
            String::from_utf8_lossy(&text).into_owned(),
            output.status.code(),
        )
    }

    fn set_mtu(&self, mtu: u32) {
        self.router.ip(&format!("link set to2 mtu {mtu}"));
        self.far.ip(&format!("link set eth0 mtu {mtu}"));
    }

    fn checked(&self, lines: &[&str], code: i32) {
        let (said, ended) = self.calictl(&["node", "checksystem"]);
        for line in lines {
            assert!(said.contains(line), "{line:?} is not in\n{said}");
        }
        assert!(!said.contains("near (10"), "it tried itself:\n{said}");
        assert_eq!(ended, Some(code), "{said}");
    }
}

#[test]
fn a_path_that_carries_less_than_the_link_is_found_and_named() {
    let path = Path::new();
    path.checked(
        &[
            "OK    nf_tables",
            "OK    far (10.0.2.2): packets of 1500 bytes arrive",
            "OK    far (fd00:2::2): packets of 1500 bytes arrive",
            "FAIL  nowhere (10.9.9.9): this host has no route to it",
        ],
        1,
    );

    path.set_mtu(1400);
    let told =
        "the link here promises 1500 bytes, a router on the way carries only 1400 and says so";
    path.checked(
        &[
            &format!("FAIL  far (10.0.2.2): {told}"),
            &format!("FAIL  far (fd00:2::2): {told}"),
        ],
        1,
    );

    let silenced = "add table inet silence; add chain inet silence out { type filter hook output priority 0; }; \
                    add rule inet silence out icmp type destination-unreachable drop; \
                    add rule inet silence out icmpv6 type packet-too-big drop";
    path.router.run("nft", &[silenced]);
    let silent = "black hole: the link here promises 1500 bytes, packets of more than 1400 disappear on the way";
    path.checked(
        &[
            &format!("FAIL  far (10.0.2.2): {silent}"),
            &format!("FAIL  far (fd00:2::2): {silent}"),
        ],
        1,
    );

    path.set_mtu(1500);
    let (said, code) = path.calictl(&["delete", "node", "nowhere"]);
    assert_eq!(code, Some(0), "{said}");
    path.checked(&["System meets minimum system requirements"], 0);
}
