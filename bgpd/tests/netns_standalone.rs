//! The daemon alone, in real network namespaces with real TCP and kernel routes. Needs root.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(40);

fn ip(arguments: &str) -> String {
    let out = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// What a program prints in a namespace.
fn ip_netns(name: &str, program: &[&str]) -> String {
    ip(&format!("netns exec {name} {}", program.join(" ")))
}

/// Two namespaces joined by a veth pair; removed again in any case.
struct Pair {
    names: [String; 2],
    folder: tempfile::TempDir,
    daemons: [Option<Child>; 2],
}

impl Pair {
    fn new(label: &str) -> Self {
        let names = [1, 2].map(|n| format!("bgpd-{label}{n}-{}", std::process::id()));
        for name in &names {
            ip(&format!("netns add {name}"));
        }
        let pair = Self {
            names,
            folder: tempfile::tempdir().unwrap(),
            daemons: [None, None],
        };
        let [a, b] = &pair.names;
        ip(&format!(
            "-n {a} link add eth0 type veth peer name eth0 netns {b}"
        ));
        for (n, name) in pair.names.iter().enumerate() {
            let n = n + 1;
            ip(&format!("-n {name} address add 10.99.0.{n}/24 dev eth0"));
            ip(&format!(
                "-n {name} address add fd99::{n}/64 dev eth0 nodad"
            ));
            ip(&format!("-n {name} link set lo up"));
            ip(&format!("-n {name} link set eth0 up"));
        }
        pair
    }

    fn file(&self, end: usize) -> PathBuf {
        self.folder.path().join(format!("bgpd{end}.toml"))
    }

    fn configure(&self, end: usize, asn: [u32; 2], extra: &str, announced: &[&str]) {
        let (own, other) = (end + 1, 2 - end);
        let mut text = format!("router-id = \"10.99.0.{own}\"\nas = {}\n", asn[end]);
        for address in [format!("10.99.0.{other}"), format!("fd99::{other}")] {
            text += &format!(
                "[[neighbor]]\naddress = \"{address}\"\nas = {}\n{extra}\n",
                asn[1 - end]
            );
        }
        for prefix in announced {
            text += &format!("[[announce]]\nprefix = \"{prefix}\"\n");
        }
        std::fs::write(self.file(end), text).unwrap();
    }

    fn start(&mut self, end: usize) {
        let run = self.folder.path().join(format!("run{end}"));
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("log{end}")))
            .unwrap();
        let child = Command::new("ip")
            .args([
                "netns",
                "exec",
                &self.names[end],
                env!("CARGO_BIN_EXE_bgpd"),
                "--config",
            ])
            .arg(self.file(end))
            .env("CALI_RUN_DIR", run)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemons[end] = Some(child);
    }

    /// `ip netns exec` becomes the program, so the child is the daemon itself.
    fn signal(&self, end: usize, signal: &str) {
        let pid = self.daemons[end].as_ref().unwrap().id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    fn kill(&mut self, end: usize) {
        let mut child = self.daemons[end].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn routes(&self, end: usize) -> String {
        let name = &self.names[end];
        ip(&format!("-n {name} route show proto bgp"))
            + &ip(&format!("-n {name} -6 route show proto bgp"))
    }

    /// A counter of an end's TCP.
    fn counter(&self, end: usize, name: &str) -> u64 {
        let shown = ip_netns(&self.names[end], &["nstat", "-asz", name]);
        let line = shown.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        value.unwrap_or_else(|| panic!("no counter {name} in {shown}"))
    }

    fn log(&self, end: usize) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("log{end}"))).unwrap_or_default()
    }

    fn wait(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + LIMIT;
        while !condition() {
            if Instant::now() > end {
                for n in 0..2 {
                    println!(
                        "--- end {n}: routes\n{}--- log\n{}",
                        self.routes(n),
                        self.log(n)
                    );
                }
                panic!("{what}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn wait_routes(&self, end: usize, wanted: &[&str], unwanted: &[&str]) {
        self.wait(
            &format!("end {end}: waiting for {wanted:?} without {unwanted:?}"),
            || {
                let seen = self.routes(end);
                wanted.iter().all(|w| seen.contains(w))
                    && !unwanted.iter().any(|u| seen.contains(u))
            },
        );
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for child in self.daemons.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

#[test]
fn both_families_reach_the_kernel_and_are_withdrawn() {
    let mut pair = Pair::new("x");
    pair.configure(
        0,
        [65001, 65002],
        "",
        &["10.1.0.0/26", "10.1.1.0/26", "fd01::/122"],
    );
    pair.configure(1, [65001, 65002], "", &["10.2.0.0/26", "fd02::/122"]);
    pair.start(0);
    pair.start(1);
    pair.wait_routes(
        1,
        &[
            "10.1.0.0/26 via 10.99.0.1",
            "10.1.1.0/26",
            "fd01::/122 via fd99::1",
        ],
        &[],
    );
    pair.wait_routes(
        0,
        &["10.2.0.0/26 via 10.99.0.2", "fd02::/122 via fd99::2"],
        &[],
    );

    pair.configure(0, [65001, 65002], "", &["10.1.1.0/26", "fd01::/122"]);
    pair.signal(0, "-HUP");
    pair.wait_routes(1, &["10.1.1.0/26", "fd01::/122"], &["10.1.0.0/26"]);

    // What somebody else removes comes back.
    ip(&format!(
        "-n {} route del 10.1.1.0/26 proto bgp",
        pair.names[1]
    ));
    pair.wait_routes(1, &["10.1.1.0/26"], &[]);
}

#[test]
fn a_killed_daemon_costs_no_route_on_either_side() {
    let mut pair = Pair::new("k");
    pair.configure(0, [65001, 65001], "", &["10.1.0.0/26", "fd01::/122"]);
    pair.configure(
        1,
        [65001, 65001],
        "",
        &["10.2.0.0/26", "10.2.1.0/26", "fd02::/122"],
    );
    pair.start(0);
    pair.start(1);
    let of_one = ["10.2.0.0/26", "fd02::/122"];
    let of_two = ["10.1.0.0/26", "fd01::/122"];
    pair.wait_routes(0, &of_one, &[]);
    pair.wait_routes(1, &of_two, &[]);
    pair.wait("both restarts over", || {
        (0..2).all(|n| pair.log(n).matches("session up").count() == 2)
    });

    // A monitor sees every deletion in either kernel, however short.
    let monitor = |pair: &Pair, end: usize| {
        let out = std::fs::File::create(pair.folder.path().join(format!("monitor{end}"))).unwrap();
        let name = &pair.names[end];
        Command::new("ip")
            .args(["-n", name, "monitor", "route"])
            .stdout(out)
            .spawn()
            .unwrap()
    };
    let mut monitors = [monitor(&pair, 0), monitor(&pair, 1)];
    pair.kill(1);
    pair.wait("the loss is noticed", || {
        pair.log(0)
            .matches("keeping the neighbour's routes")
            .count()
            == 2
    });
    pair.configure(1, [65001, 65001], "", &["10.2.0.0/26", "fd02::/122"]);
    pair.start(1);
    pair.wait("sessions back", || {
        pair.log(1).matches("session up").count() == 4
    });
    // The route that the restarted daemon no longer announces goes, and only that one.
    pair.wait_routes(0, &of_one, &["10.2.1.0/26"]);
    pair.wait_routes(1, &of_two, &[]);
    for (end, monitor) in monitors.iter_mut().enumerate() {
        monitor.kill().unwrap();
        monitor.wait().unwrap();
        let seen =
            std::fs::read_to_string(pair.folder.path().join(format!("monitor{end}"))).unwrap();
        let lost: Vec<&str> = seen
            .lines()
            .filter(|l| l.starts_with("Deleted") && !l.contains("10.2.1.0/26"))
            .collect();
        assert!(lost.is_empty(), "end {end} lost routes: {lost:?}");
    }
}

#[test]
fn passwords_must_agree() {
    let mut pair = Pair::new("m");
    pair.configure(0, [65001, 65002], "password = \"secret\"", &["10.1.0.0/26"]);
    pair.configure(1, [65001, 65002], "password = \"other\"", &["10.2.0.0/26"]);
    pair.start(0);
    pair.start(1);
    // Each dial of either side, over each family, loses its SYN.
    pair.wait("segments are refused for their digest", || {
        (0..2).all(|end| pair.counter(end, "TcpExtTCPMD5Failure") >= 4)
    });
    assert_eq!(pair.routes(0), "", "a session with the wrong password");
    pair.configure(1, [65001, 65002], "password = \"secret\"", &["10.2.0.0/26"]);
    pair.signal(1, "-HUP");
    pair.wait_routes(0, &["10.2.0.0/26"], &[]);
    pair.wait_routes(1, &["10.1.0.0/26"], &[]);
}

#[test]
fn ttl_security_of_a_direct_neighbour_lets_the_session_up() {
    let mut pair = Pair::new("t");
    pair.configure(0, [65001, 65002], "ttl-security = 1", &["10.1.0.0/26"]);
    pair.configure(1, [65001, 65002], "ttl-security = 1", &["10.2.0.0/26"]);
    pair.start(0);
    pair.start(1);
    pair.wait_routes(0, &["10.2.0.0/26"], &[]);
}

/// RFC 5882 §4.3.2.2: a neighbour whose BFD shares fate with its control plane may only be restarting.
#[test]
fn a_silent_neighbour_is_noticed_by_bfd_and_its_routes_are_kept() {
    let mut pair = Pair::new("bfd");
    let watched = "bfd = { multihop = false, transmit-interval = 50, receive-interval = 50 }";
    pair.configure(0, [64601, 64602], watched, &[]);
    pair.configure(1, [64601, 64602], watched, &["203.0.113.0/24"]);
    pair.start(0);
    pair.start(1);
    pair.wait_routes(0, &["203.0.113.0/24"], &[]);
    let count = |pair: &Pair, text: &str| pair.log(0).matches(text).count();
    pair.wait("both families' paths and sessions come up", || {
        count(&pair, "to=Up") == 2 && count(&pair, "session up") == 2
    });
    pair.signal(1, "-STOP");
    let stopped = Instant::now();
    pair.wait("the session over IPv4 ends", || {
        count(&pair, "path to the peer lost (BFD)") == 2
    });
    let noticed = stopped.elapsed();
    // The hold time is 240 s: nothing but BFD can have ended the sessions.
    assert!(noticed < LIMIT, "{noticed:?}");
    pair.wait_routes(0, &["203.0.113.0/24"], &[]);
    pair.signal(1, "-CONT");
    pair.wait("the sessions come back", || count(&pair, "session up") == 4);
    pair.wait_routes(0, &["203.0.113.0/24"], &[]);
}

/// Everything that a link-local neighbour needs is its interface: IPv6 and IPv4 routes go over it (RFC 8950).
#[test]
fn link_local_neighbours_exchange_both_families_without_any_other_address() {
    let mut pair = Pair::new("ll");
    for (n, name) in pair.names.iter().enumerate() {
        ip(&format!("-n {name} address flush dev eth0 scope global"));
        // One that the test knows, without the wait of duplicate address detection.
        ip(&format!(
            "-n {name} address add fe80::{}/64 dev eth0 nodad",
            n + 1
        ));
        let (own, other) = (n + 1, 2 - n);
        let text = format!(
            "router-id = \"10.99.0.{own}\"\nas = 6500{own}\n[[neighbor]]\naddress = \"fe80::{other}\"\n\
             interface = \"eth0\"\nsource = \"fe80::{own}\"\nas = 6500{other}\nfamilies = [\"ipv4\", \"ipv6\"]\n\
             extended-next-hop = true\nttl-security = 1\n[[announce]]\nprefix = \"10.{own}.0.0/26\"\n\
             [[announce]]\nprefix = \"fd0{own}::/122\"\n"
        );
        std::fs::write(pair.file(n), text).unwrap();
    }
    pair.start(0);
    pair.start(1);
    pair.wait_routes(
        0,
        &[
            "10.2.0.0/26 via inet6 fe80::2 dev eth0",
            "fd02::/122 via fe80::2 dev eth0",
        ],
        &[],
    );
    pair.wait_routes(
        1,
        &[
            "10.1.0.0/26 via inet6 fe80::1 dev eth0",
            "fd01::/122 via fe80::1 dev eth0",
        ],
        &[],
    );
}

/// Neighbours of a range are known by their password only, which stands on the listening socket.
#[test]
fn neighbours_of_a_range_need_its_password() {
    let mut pair = Pair::new("r");
    let host = |password: &str| {
        format!(
            "router-id = \"10.99.0.1\"\nas = 65001\n[[range]]\nprefix = \"10.99.0.0/24\"\npassword = \"{password}\"\n\
             [[range]]\nprefix = \"fd99::/64\"\npassword = \"{password}\"\n[[announce]]\nprefix = \"10.1.0.0/26\"\n"
        )
    };
    std::fs::write(pair.file(0), host("other")).unwrap();
    pair.configure(
        1,
        [65001, 65002],
        "password = \"secret\"",
        &["10.2.0.0/26", "fd02::/122"],
    );
    pair.start(0);
    pair.start(1);
    pair.wait("the guest's segments are refused", || {
        pair.counter(0, "TcpExtTCPMD5Failure") >= 4
    });
    assert_eq!(pair.routes(0), "");
    std::fs::write(pair.file(0), host("secret")).unwrap();
    pair.signal(0, "-HUP");
    pair.wait_routes(0, &["10.2.0.0/26", "fd02::/122"], &[]);
    pair.wait_routes(1, &["10.1.0.0/26"], &[]);
}

/// Opens 1,000 connections from an address of a namespace and says on how many an answer came. Call in a thread of its own,
/// which stays in the namespace.
fn open_thousand(name: &str, from: &str, to: &str) -> usize {
    let space = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
    nix::sched::setns(space, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let from: std::net::IpAddr = from.parse().unwrap();
    let to: std::net::SocketAddr = to.parse().unwrap();
    let connect = |_| {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket
            .bind(&std::net::SocketAddr::new(from, 0).into())
            .unwrap();
        socket.connect(&to.into()).unwrap();
        std::net::TcpStream::from(socket)
    };
    let all: Vec<std::net::TcpStream> = (0..1000).map(connect).collect();
    let answered = |stream: &mut std::net::TcpStream| {
        // Those that are refused are at their end at once.
        stream
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        std::io::Read::read(stream, &mut [0; 64]).is_ok_and(|length| length > 0)
    };
    all.into_iter()
        .filter_map(|mut s| answered(&mut s).then_some(()))
        .count()
}

/// 1,000 connections at once, none of which says a word.
#[test]
fn a_neighbour_that_opens_a_thousand_connections_is_named_and_costs_the_other_nothing() {
    let mut pair = Pair::new("thousand");
    pair.configure(0, [65001, 65002], "", &["10.1.0.0/26"]);
    pair.configure(1, [65001, 65002], "", &["10.2.0.0/26"]);
    let second = "[[neighbor]]\naddress = \"10.99.0.77\"\nas = 65077\n";
    let text = std::fs::read_to_string(pair.file(0)).unwrap();
    std::fs::write(
        pair.file(0),
        text.replacen("[[announce]]", &format!("{second}[[announce]]"), 1),
    )
    .unwrap();
    pair.start(0);
    pair.start(1);
    pair.wait_routes(0, &["10.2.0.0/26"], &[]);
    pair.wait("both of the other sessions are up", || {
        pair.log(0).matches("session up").count() == 2
    });
    let name = pair.names[1].clone();
    ip(&format!("-n {name} address add 10.99.0.77/24 dev eth0"));
    let told = std::thread::spawn(move || open_thousand(&name, "10.99.0.77", "10.99.0.1:179"))
        .join()
        .unwrap();
    assert!(told <= 40, "{told} connections got an answer");
    pair.wait("the flood is named", || {
        let log = pair.log(0);
        log.lines()
            .any(|line| line.contains("opens too many") && line.contains("10.99.0.77"))
    });
    assert!(pair.log(0).lines().count() < 400, "the log is flooded");
    let log = pair.log(0);
    assert!(!log.contains("session down"), "the other sessions\n{log}");
    pair.wait_routes(0, &["10.2.0.0/26"], &[]);
}
