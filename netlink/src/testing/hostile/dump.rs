//! What is on a host that is not ours, in a form that can be compared: no handles, no counters, no order that the
//! kernel chooses anew each time, nothing that comes and goes by itself.

use std::{collections::BTreeMap, ops::RangeInclusive};

use ipnetwork::IpNetwork;

use super::TestNs;

/// How to tell ours from theirs.
#[derive(Debug, Clone)]
pub struct Ours {
    /// nf_tables tables, as `family name`.
    pub tables: Vec<String>,
    /// Device names, or their beginnings where they end in `*`.
    pub devices: Vec<String>,
    /// A route is ours if it has one of these protocols (as `ip` prints them) and its destination is in a pool.
    pub protocols: Vec<String>,
    /// See `protocols`.
    pub pools: Vec<IpNetwork>,
    /// Ids of our nexthop objects.
    pub nexthops: RangeInclusive<u32>,
    /// In the tables of iptables, chains `cali-*`, rules that carry a hash of ours, and IP sets `cali40*` and `cali60*`
    /// are ours.
    pub iptables: bool,
}

impl Default for Ours {
    /// The kernel contract's names, and the pools 192.168.0.0/16 and fd00:192::/32.
    fn default() -> Self {
        let own = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        Self {
            tables: own(&["inet calico", "arp calico"]),
            devices: own(&[
                "cali*",
                "vxlan.calico",
                "vxlan-v6.calico",
                "tunl0",
                "wireguard.cali",
                "wg-v6.cali",
            ]),
            protocols: own(&["80", "bird"]),
            pools: ["192.168.0.0/16", "fd00:192::/32"]
                .iter()
                .map(|text| text.parse().expect("a prefix"))
                .collect(),
            nexthops: 0x0ca1_0000..=0x0ca1_ffff,
            iptables: false,
        }
    }
}

impl Ours {
    /// The names of the kernel contract where policy is enforced by iptables.
    pub fn with_iptables() -> Self {
        Self {
            iptables: true,
            ..Self::default()
        }
    }

    /// A line of `iptables-save`. Tables and chains that the kernel has by itself come into being with our first rule.
    fn rule(&self, line: &str) -> bool {
        let chain = line.trim_start_matches([':', '-', 'A']).trim_start();
        let builtin = line.starts_with(':') && line.ends_with(" ACCEPT");
        self.iptables
            && (line.starts_with('*')
                || line == "COMMIT"
                || builtin
                || chain.starts_with("cali-")
                || line.contains("--comment \"cali:"))
    }

    fn set(&self, line: &str) -> bool {
        let name = line.split(' ').nth(1).unwrap_or_default();
        self.iptables && (name.starts_with("cali40") || name.starts_with("cali60"))
    }

    /// A table of nf_tables that the programs of iptables keep, which say more of it.
    fn translated(&self, table: &str) -> bool {
        let (family, name) = table.split_once(' ').unwrap_or_default();
        self.iptables
            && matches!(family, "ip" | "ip6")
            && matches!(name, "raw" | "mangle" | "nat" | "filter")
    }

    fn device(&self, name: &str) -> bool {
        self.devices
            .iter()
            .any(|ours| match ours.strip_suffix('*') {
                Some(start) => name.starts_with(start),
                None => name == ours,
            })
    }

    fn route(&self, words: &[&str]) -> bool {
        if after(words, "dev").is_some_and(|device| self.device(device)) {
            return true;
        }
        let protocol = after(words, "proto")
            .is_some_and(|protocol| self.protocols.iter().any(|ours| ours == protocol));
        let destination = words
            .iter()
            .take(2)
            .find_map(|word| word.parse::<IpNetwork>().ok());
        protocol
            && destination.is_some_and(|destination| {
                self.pools.iter().any(|pool| {
                    pool.contains(destination.ip()) && pool.prefix() <= destination.prefix()
                })
            })
    }
}

fn after<'a>(words: &[&'a str], keyword: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| *word == keyword)?;
    words.get(at + 1).copied()
}

/// What is there that is not ours: by kind, the lines of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign(BTreeMap<String, Vec<String>>);

impl Foreign {
    /// Panics with the lines that are new or gone.
    pub fn assert_same(&self, after: &Self) {
        let mut differences = Vec::new();
        let kinds = self.0.keys().chain(after.0.keys());
        let kinds: std::collections::BTreeSet<_> = kinds.collect();
        for kind in kinds {
            let none = Vec::new();
            let (before, now) = (
                self.0.get(kind).unwrap_or(&none),
                after.0.get(kind).unwrap_or(&none),
            );
            if before == now {
                continue;
            }
            differences.push(format!("{kind}:"));
            let gone = missing(before, now).into_iter();
            differences.extend(gone.map(|line| format!("  gone: {line}")));
            let new = missing(now, before).into_iter();
            differences.extend(new.map(|line| format!("  new:  {line}")));
            if differences.last().is_some_and(|line| line.ends_with(':')) {
                differences.push("  the same lines in another order".to_owned());
            }
        }
        assert!(
            differences.is_empty(),
            "what belongs to others has changed:\n{}",
            differences.join("\n")
        );
    }

    /// The lines of one kind (`ip route`, `inet firewalld`, ...), for a test of the dump itself.
    pub fn lines(&self, kind: &str) -> &[String] {
        self.0.get(kind).map_or(&[], Vec::as_slice)
    }
}

/// Reads what is there that is not ours: nf_tables, legacy iptables, ipsets, routes, rules, nexthop objects, devices
/// with their addresses, and the settings that matter to forwarding.
pub fn dump(ns: &TestNs, ours: &Ours) -> Foreign {
    let mut all = BTreeMap::new();
    for table in lines(&ns.run("nft", &["list", "tables"])) {
        let name = table.strip_prefix("table ").unwrap_or(&table);
        if ours.tables.iter().any(|own| own == name) || ours.translated(name) {
            continue;
        }
        let mut args = vec!["-s", "list", "table"];
        args.extend(name.split(' '));
        all.insert(name.to_owned(), table_lines(&ns.run("nft", &args)));
    }
    for program in [
        "iptables-nft-save",
        "ip6tables-nft-save",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
    ] {
        let mut lines = rules(ns, program);
        lines.retain(|line| !ours.rule(line));
        all.insert(program.to_owned(), lines);
    }
    let mut sets = lines(&ns.run("ipset", &["save"]));
    sets.retain(|line| !ours.set(line));
    sets.sort_unstable();
    all.insert("ipset".to_owned(), sets);
    for (kind, args) in [
        ("ip route", "-d route show table all"),
        ("ip -6 route", "-d -6 route show table all"),
    ] {
        let mut routes: Vec<_> = rows(&ns.ip(args))
            .iter()
            .filter_map(|line| route(line, ours))
            .collect();
        routes.sort_unstable();
        all.insert(kind.to_owned(), routes);
    }
    for (kind, args) in [("ip rule", "rule"), ("ip -6 rule", "-6 rule")] {
        all.insert(kind.to_owned(), lines(&ns.ip(args)));
    }
    all.insert("ip nexthop".to_owned(), nexthops(ns, ours));
    all.insert("ip address".to_owned(), addresses(ns, ours));
    let settings = ns.run(
        "cat",
        &[
            "/proc/sys/net/ipv4/conf/all/rp_filter",
            "/proc/sys/net/ipv4/conf/default/rp_filter",
        ],
    );
    all.insert("rp_filter".to_owned(), lines(&settings));
    Foreign(all)
}

/// Lines of `here` that `there` has not, or not as often.
fn missing<'a>(here: &'a [String], there: &'a [String]) -> Vec<&'a str> {
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for line in there {
        *count.entry(line).or_default() += 1;
    }
    let mut missing = Vec::new();
    for line in here {
        match count.get_mut(line.as_str()) {
            Some(left) if *left > 0 => *left -= 1,
            _ => missing.push(line.as_str()),
        }
    }
    missing
}

/// `nft -s list table`, each line with the chain or set that it stands in.
fn table_lines(text: &str) -> Vec<String> {
    let mut block = String::new();
    let mut all = Vec::new();
    for line in text.lines().map(str::trim_end) {
        let indented = line.starts_with("\t\t");
        let line = line.trim();
        if let (false, Some(head)) = (indented, line.strip_suffix(" {")) {
            head.clone_into(&mut block);
            all.push(block.clone());
        } else if !line.is_empty() && line != "}" {
            all.push(format!("{block}: {line}"));
        }
    }
    all
}

fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.trim_end().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

/// `ip -d route`: one line for each row, with the hops of a multipath route behind it; what it tells of nexthop objects
/// is left out, they are listed on their own.
fn rows(text: &str) -> Vec<String> {
    let mut rows: Vec<String> = Vec::new();
    for line in lines(text) {
        match (line.strip_prefix('\t'), rows.last_mut()) {
            (Some(more), _) if more.starts_with("nh_info") => {}
            (Some(more), Some(row)) => row.push_str(&format!(" {}", more.trim())),
            _ => rows.push(line),
        }
    }
    rows
}

/// `iptables-save` without its dates and counters (`:INPUT ACCEPT [12:3456]`). Nothing where the kernel lacks it.
fn rules(ns: &TestNs, program: &str) -> Vec<String> {
    let output = ns.output(program, &[]);
    lines(&String::from_utf8_lossy(&output.stdout))
        .into_iter()
        .filter(|line| !line.starts_with('#'))
        .map(|line| match line.rsplit_once(" [") {
            Some((chain, _)) if line.starts_with(':') => chain.to_owned(),
            _ => line,
        })
        .collect()
}

/// One row, unless it is ours or the kernel's own for IPv6 (which follow duplicate address detection).
fn route(line: &str, ours: &Ours) -> Option<String> {
    let words: Vec<_> = line
        .split_whitespace()
        .filter(|word| !matches!(*word, "linkdown" | "dead"))
        .collect();
    let kernel = after(&words, "proto") == Some("kernel");
    let v6 = words.iter().take(3).any(|word| word.contains(':'));
    let skipped = (kernel && v6) || ours.route(&words);
    (!skipped).then(|| words.join(" "))
}

fn nexthops(ns: &TestNs, ours: &Ours) -> Vec<String> {
    lines(&ns.ip("-d nexthop"))
        .into_iter()
        .filter(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let id = after(&words, "id").and_then(|id| id.parse().ok());
            !id.is_some_and(|id| ours.nexthops.contains(&id))
        })
        .map(|line| line.replace(" linkdown", "").replace(" dead", ""))
        .collect()
}

/// Devices with their IPv4 addresses.
fn addresses(ns: &TestNs, ours: &Ours) -> Vec<String> {
    lines(&ns.ip("-br -4 address"))
        .into_iter()
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let name = words.first()?.split('@').next()?;
            // The operational state in between follows the carrier.
            (!ours.device(name))
                .then(|| format!("{name} {}", words.get(2..).unwrap_or_default().join(" ")))
        })
        .collect()
}
