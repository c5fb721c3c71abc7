//! From an interface's name to its chain, by a tree of prefixes.
//!
//! A chain compares its rules one after the other, so none holds more than [`WIDTH`] interfaces: more are told apart by
//! the next character behind what all have in common, each group in a chain of its own. Every chain ends with a denial.

use std::sync::Arc;

use super::names;

/// Interfaces that are compared one by one.
const WIDTH: usize = 16;

/// An interface and the chain of its endpoint.
pub(super) type Entry = (Arc<str>, Arc<str>);

/// The chains of a tree below `root`; `option` is `-i` or `-o`, `entries` are sorted by name.
pub(super) fn chains(root: &str, option: &str, entries: &[Entry]) -> Vec<(Arc<str>, Vec<String>)> {
    let mut all = Vec::new();
    grow(root, root.into(), option, entries, &mut all);
    all
}

fn grow(
    root: &str,
    name: Arc<str>,
    option: &str,
    entries: &[Entry],
    all: &mut Vec<(Arc<str>, Vec<String>)>,
) {
    let direct = |(interface, chain): &Entry| format!("{option} {interface} -g {chain}");
    let mut rules = Vec::new();
    if entries.len() <= WIDTH {
        rules.extend(entries.iter().map(direct));
    } else {
        let common = common_prefix(entries);
        for group in entries.chunk_by(|(a, _), (b, _)| next(a, common) == next(b, common)) {
            match group {
                [one] => rules.push(direct(one)),
                several => {
                    let beginning = &several[0].0[..=common];
                    let child = names::dispatch_chain(root, beginning);
                    rules.push(format!("{option} {beginning}+ -g {child}"));
                    grow(root, child, option, several, all);
                }
            }
        }
    }
    rules.push("-m comment --comment \"interface without policy\" -j DROP".to_owned());
    all.push((name, rules));
}

/// Names are ASCII ([`usable`]).
fn next(interface: &str, at: usize) -> Option<u8> {
    interface.as_bytes().get(at).copied()
}

fn common_prefix(entries: &[Entry]) -> usize {
    let (Some((first, _)), Some((last, _))) = (entries.first(), entries.last()) else {
        return 0;
    };
    // Sorted: what first and last have in common, all have.
    first
        .bytes()
        .zip(last.bytes())
        .take_while(|(a, b)| a == b)
        .count()
}

/// Whether iptables can match this very interface: the kernel's limit of 15 bytes, and no character that means something
/// to iptables.
pub(super) fn usable(interface: &str) -> bool {
    let plain =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'@' | b':');
    (1..=15).contains(&interface.len())
        && interface.bytes().all(plain)
        && !interface.starts_with('-')
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn entries(count: u32) -> Vec<Entry> {
        let mut all: Vec<Entry> = (0..count)
            .map(|number| {
                let name = format!(
                    "cali{:011x}",
                    u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
                );
                (name.as_str().into(), format!("to-{name}").into())
            })
            .collect();
        all.sort();
        all
    }

    /// Where a packet of the interface ends, and how many rules it meets.
    fn walk(chains: &BTreeMap<Arc<str>, Vec<String>>, interface: &str) -> (String, usize) {
        let (mut at, mut met) = (Arc::from("root"), 0);
        loop {
            let Some(rules) = chains.get(&at) else {
                return (at.to_string(), met);
            };
            let mut target = "DROP".to_owned();
            for rule in rules {
                met += 1;
                let words: Vec<&str> = rule.split(' ').collect();
                let matches = words[0] == "-i"
                    && match words[1].strip_suffix('+') {
                        Some(beginning) => interface.starts_with(beginning),
                        None => interface == words[1],
                    };
                if matches {
                    target = words[3].to_owned();
                    break;
                }
            }
            if target == "DROP" {
                return (target, met);
            }
            at = target.into();
        }
    }

    #[test]
    fn every_interface_is_found_and_a_stranger_is_dropped() {
        for count in [0, 1, 16, 17, 200, 3000] {
            let entries = entries(count);
            let chains: BTreeMap<_, _> = chains("root", "-i", &entries).into_iter().collect();
            let mut most = 0;
            for (interface, chain) in &entries {
                let (end, met) = walk(&chains, interface);
                assert_eq!(end, **chain);
                most = most.max(met);
            }
            assert!(most <= 64, "{count} interfaces: {most} rules");
            assert_eq!(walk(&chains, "calix").0, "DROP");
            assert!(chains.keys().all(|name| name.len() <= 28));
        }
    }

    #[test]
    fn an_interface_that_begins_as_others_is_found() {
        let entries: Vec<Entry> = std::iter::once("cali".to_owned())
            .chain((0..20).map(|number| format!("cali{number}")))
            .map(|name| (name.as_str().into(), format!("to-{name}").into()))
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect();
        let chains: BTreeMap<_, _> = chains("root", "-i", &entries).into_iter().collect();
        for (interface, chain) in &entries {
            assert_eq!(walk(&chains, interface).0, **chain);
        }
    }

    #[test]
    fn a_name_that_iptables_reads_otherwise_is_not_used() {
        assert!(usable("cali0123456789a") && usable("eth0.5"));
        for bad in ["", "cali+", "calia b", "cali\"", "cali0123456789ab", "-j"] {
            assert!(!usable(bad), "{bad:?}");
        }
    }
}
