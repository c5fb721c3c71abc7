//! The fuzz targets without a fuzzer: every seed as it is, and a bounded number of damaged ones, `FUZZ_FACTOR` times as
//! many where that is set (`make fuzz`). `UPDATE_SEEDS=1` records the seeds anew.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/fuzz_targets/targets.rs"]
mod targets;

mod seeds;

use proptest::prelude::*;
use proptest::sample::Index;

use seeds::{Seed, frames};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_and_a_client_say_what_the_seeds_hold() {
    let said = seeds::record().await;
    if std::env::var_os("UPDATE_SEEDS").is_some() {
        for seed in &said {
            std::fs::write(seeds::folder().join(&seed.name), &seed.octets).unwrap();
        }
    }
    let names = |seeds: &[Seed]| {
        seeds
            .iter()
            .map(|seed| seed.name.clone())
            .collect::<Vec<_>>()
    };
    let kept = seeds::kept();
    assert_eq!(names(&kept), names(&said));
    // Revisions and batches differ from one run to the next, what is talked about does not.
    for (kept, said) in kept.iter().zip(&said) {
        assert_eq!(
            seeds::gist(&kept.octets),
            seeds::gist(&said.octets),
            "{}: UPDATE_SEEDS=1",
            kept.name
        );
    }
}

#[test]
fn what_real_peers_say_is_read_and_upsets_nobody() {
    for Seed { name, octets } in seeds::kept() {
        println!("{name}: {} octets", octets.len());
        targets::to_client(&octets);
        targets::to_server(&octets);
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

/// What happens to frames as wholes, and then to octets.
#[derive(Debug, Clone)]
enum Damage {
    Swap(Index, Index),
    Repeat(Index, usize),
    Drop(Index),
    /// One that the other side, or this one on another connection, said.
    Insert(Index, Vec<u8>),
    Length(Index, u32),
    Flags(Index, u8),
    Put(Index, u8),
    Flip(Index, u8),
    Cut(Index, usize),
    Double(Index, usize),
    Truncate(Index),
}

fn damage(foreign: Vec<Vec<u8>>) -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    let length = prop_oneof![
        Just(0),
        Just(u32::MAX),
        1_u32..20,
        60_000_u32..70_000,
        any::<u32>()
    ];
    prop_oneof![
        (at(), at()).prop_map(|(one, other)| Damage::Swap(one, other)),
        (at(), 1..40_usize).prop_map(|(at, times)| Damage::Repeat(at, times)),
        at().prop_map(Damage::Drop),
        (at(), prop::sample::select(foreign)).prop_map(|(at, frame)| Damage::Insert(at, frame)),
        (at(), length).prop_map(|(at, length)| Damage::Length(at, length)),
        (at(), any::<u8>()).prop_map(|(at, flags)| Damage::Flags(at, flags)),
        (at(), any::<u8>()).prop_map(|(at, value)| Damage::Put(at, value)),
        (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (at(), 1..300_usize).prop_map(|(at, count)| Damage::Cut(at, count)),
        (at(), 1..300_usize).prop_map(|(at, count)| Damage::Double(at, count)),
        at().prop_map(Damage::Truncate),
    ]
}

impl Damage {
    fn to_frames(&self, frames: &mut Vec<Vec<u8>>) {
        if frames.is_empty() {
            return;
        }
        let count = frames.len();
        match self {
            Self::Swap(one, other) => frames.swap(one.index(count), other.index(count)),
            Self::Repeat(at, times) => {
                let at = at.index(count);
                let copies = vec![frames[at].clone(); *times];
                frames.splice(at..at, copies);
            }
            Self::Drop(at) => drop(frames.remove(at.index(count))),
            Self::Insert(at, frame) => frames.insert(at.index(count), frame.clone()),
            Self::Length(at, length) => {
                frames[at.index(count)][..4].copy_from_slice(&length.to_be_bytes());
            }
            Self::Flags(at, flags) => frames[at.index(count)][4] = *flags,
            _ => {}
        }
    }

    fn to_octets(&self, octets: &mut Vec<u8>) {
        if octets.is_empty() {
            return;
        }
        let length = octets.len();
        let piece =
            |at: &Index, count: usize| at.index(length)..(at.index(length) + count).min(length);
        match self {
            Self::Put(at, value) => octets[at.index(length)] = *value,
            Self::Flip(at, bit) => octets[at.index(length)] ^= 1 << bit,
            Self::Cut(at, count) => drop(octets.drain(piece(at, *count))),
            Self::Double(at, count) => {
                let copy = octets[piece(at, *count)].to_vec();
                octets.splice(at.index(length)..at.index(length), copy);
            }
            Self::Truncate(at) => octets.truncate(at.index(length)),
            _ => {}
        }
    }
}

/// A seed whose name begins so, damaged.
fn damaged(side: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let kept = seeds::kept();
    let all: Vec<Vec<u8>> = kept.iter().flat_map(|seed| frames(&seed.octets)).collect();
    let of_side: Vec<Vec<u8>> = kept
        .into_iter()
        .filter(|seed| seed.name.starts_with(side))
        .map(|seed| seed.octets)
        .collect();
    let changes = prop::collection::vec(damage(all), 1..6);
    (prop::sample::select(of_side), changes).prop_map(|(octets, changes)| {
        let mut frames = frames(&octets);
        changes
            .iter()
            .for_each(|change| change.to_frames(&mut frames));
        let mut octets = frames.concat();
        changes
            .iter()
            .for_each(|change| change.to_octets(&mut octets));
        octets
    })
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn damaged_words_of_a_server_change_nothing_that_the_next_one_does_not_put_right(octets in damaged("server")) {
        targets::to_client(&octets);
    }

    #[test]
    fn damaged_words_of_a_client_end_its_connection_at_most(octets in damaged("client")) {
        targets::to_server(&octets);
    }
}
