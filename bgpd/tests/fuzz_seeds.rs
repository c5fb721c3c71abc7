//! The fuzz targets without a fuzzer: every seed as it is, and a bounded number of damaged ones, `FUZZ_FACTOR` times as
//! many where that is set (`make fuzz`).
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/fuzz_targets/targets.rs"]
mod targets;

use std::path::Path;

use proptest::prelude::*;

/// What peers said from their OPEN on.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let mut seeds: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect();
    seeds.sort();
    assert!(seeds.len() >= 6, "seeds of all peers are there");
    seeds
}

#[test]
fn what_real_peers_say_is_read_and_upsets_nobody() {
    for (name, octets) in seeds() {
        println!("{name}: {} octets", octets.len());
        targets::message(&octets);
        targets::session(&octets);
    }
}

fn cases(usual: u32) -> ProptestConfig {
    let factor = std::env::var("FUZZ_FACTOR").map_or(1, |text| text.parse().unwrap());
    ProptestConfig {
        cases: usual.saturating_mul(factor),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// A seed, or two one after the other, with octets changed, cut out and doubled.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let seeds: Vec<Vec<u8>> = seeds().into_iter().map(|(_, octets)| octets).collect();
    let seed = proptest::sample::select(seeds);
    let changes = proptest::collection::vec(
        (any::<proptest::sample::Index>(), any::<u8>(), 0..4_u8),
        1..8,
    );
    (seed, changes).prop_map(|(mut octets, changes)| {
        for (at, value, how) in changes {
            if octets.is_empty() {
                break;
            }
            let at = at.index(octets.len());
            match how {
                0 => octets[at] = value,
                1 => octets[at] ^= 1 << (value % 8),
                2 => {
                    octets.drain(at..(at + usize::from(value)).min(octets.len()));
                }
                _ => {
                    let piece = octets[at..(at + usize::from(value)).min(octets.len())].to_vec();
                    octets.splice(at..at, piece);
                }
            }
        }
        octets
    })
}

proptest! {
    #![proptest_config(cases(4096))]
    #[test]
    fn damaged_messages_are_read_or_refused(octets in damaged()) {
        targets::message(&octets);
    }
}

proptest! {
    #![proptest_config(cases(128))]
    #[test]
    fn damaged_streams_end_one_session_at_most(octets in damaged()) {
        targets::session(&octets);
    }
}
