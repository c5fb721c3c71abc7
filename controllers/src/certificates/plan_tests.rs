//! Rotations by the clock of the test, with real keys: what the two ends hold is verified as rustls verifies it.

use std::collections::BTreeMap;
use std::time::Duration;

use cali_api::Revision;
use cali_datastore::{Secret, SecretObject};
use proptest::prelude::*;

use super::pair::{Pair, certificates};
use super::plan::{Decision, Step, carry_out, decide, secret_of};
use super::{AUTHORITY, CERTIFICATE, End, KEY, Lifetimes, State, TRUSTED};

const NOW: i64 = 1_800_000_000;
const LIFE: Lifetimes = Lifetimes {
    certificate: Duration::from_secs(4_000),
    authority: Duration::from_secs(20_000),
    settle: Duration::from_secs(400),
};

fn empty() -> SecretObject {
    SecretObject {
        data: Secret::new(),
        annotations: BTreeMap::new(),
        revision: Revision::from("1"),
    }
}

/// As the manifests lay them down.
fn laid_down() -> State {
    State {
        authority: Some(empty()),
        typha: Some(empty()),
        node: Some(empty()),
    }
}

impl State {
    fn slot(&mut self, name: &str) -> &mut Option<SecretObject> {
        match name {
            AUTHORITY => &mut self.authority,
            name if name == End::Typha.secret() => &mut self.typha,
            _ => &mut self.node,
        }
    }

    /// Takes at most so many steps; what they were.
    fn steps(&mut self, now: i64, most: usize) -> Vec<Step> {
        let mut taken = Vec::new();
        while taken.len() < most
            && let Some(step) = decide(self, &LIFE, now).step
        {
            let new = carry_out(step, self, &LIFE, now).unwrap();
            *self.slot(secret_of(step)) = Some(new);
            taken.push(step);
        }
        taken
    }

    fn put(&mut self, name: &str, values: &[(&str, &str)]) {
        let secret = self.slot(name).as_mut().unwrap();
        for (key, value) in values {
            secret
                .data
                .insert((*key).to_owned(), value.as_bytes().to_vec());
        }
    }

    /// What an end has mounted: its pair, and whom it trusts.
    fn mounted(&self, end: End) -> (Pair, Vec<rustls::pki_types::CertificateDer<'static>>) {
        let data = &self.of(end).unwrap().data;
        let text = |key: &str| String::from_utf8(data[key].clone()).unwrap();
        let pair = Pair {
            certificate: text(CERTIFICATE),
            key: text(KEY),
        };
        (pair, certificates(&data[TRUSTED]).unwrap())
    }
}

/// Whether the two ends accept each other, each with what it has mounted.
fn accept(typha: &State, node: &State, now: i64) -> Result<(), String> {
    let (server, of_server) = typha.mounted(End::Typha);
    let (client, of_client) = node.mounted(End::Node);
    server.check_end(End::Typha, &of_client, now)?;
    client.check_end(End::Node, &of_server, now)
}

#[test]
fn empty_secrets_are_filled_and_then_there_is_nothing_to_do() {
    let mut state = laid_down();
    let steps = state.steps(NOW, 9);
    assert_eq!(
        steps,
        [Step::Make, Step::Issue(End::Typha), Step::Issue(End::Node)]
    );
    accept(&state, &state, NOW).unwrap();
    assert_eq!(decide(&state, &LIFE, NOW), Decision::default());
    let swapped = State {
        node: state.typha.clone(),
        ..state.clone()
    };
    let refused = accept(&state, &swapped, NOW).unwrap_err();
    assert!(refused.contains("typha-server"), "{refused}");
}

#[test]
fn a_secret_that_is_missing_is_named() {
    let state = State {
        node: None,
        ..laid_down()
    };
    let decision = decide(&state, &LIFE, NOW);
    assert_eq!(decision.step, None);
    assert!(
        decision.notes[0].contains("node-certs is not there"),
        "{decision:?}"
    );
}

#[test]
fn an_authority_that_was_lost_is_followed_by_one_that_trusts_it() {
    let mut state = laid_down();
    state.steps(NOW, 9);
    let before = state.clone();
    state.authority = Some(empty());
    let steps = state.steps(NOW + 1, 9);
    assert_eq!(
        steps,
        [Step::Make, Step::Issue(End::Typha), Step::Issue(End::Node)]
    );
    let (client, _) = before.mounted(End::Node);
    let (_, trusted) = state.mounted(End::Typha);
    client.check_end(End::Node, &trusted, NOW + 1).unwrap();
    // And no longer than things take to settle.
    let late = NOW + 1 + 400;
    assert_eq!(state.steps(late, 9)[0], Step::Drop);
    let (_, trusted) = state.mounted(End::Typha);
    client.check_end(End::Node, &trusted, late).unwrap_err();
}

#[test]
fn a_certificate_that_was_brought_is_never_written_over() {
    let mut made = laid_down();
    made.steps(NOW, 9);
    for end in End::ALL {
        // In an empty Secret, and in place of ours.
        for mut state in [laid_down(), made.clone()] {
            state.put(end.secret(), &[(CERTIFICATE, "mine"), (KEY, "mine")]);
            for now in [NOW, NOW + 3_900, NOW + 100_000] {
                let decision = decide(&state, &LIFE, now);
                assert_eq!(decision.step, None, "{end:?}");
                let told = decision.notes.join("\n");
                assert!(
                    told.contains(end.secret()) && told.contains("bring both"),
                    "{told}"
                );
            }
        }
    }
    // Renewal by somebody else: told before it ends.
    let authority = Pair::authority(NOW, LIFE.authority).unwrap();
    let mut state = laid_down();
    for end in End::ALL {
        let own = authority.issue(end, NOW, LIFE.certificate).unwrap();
        state.put(
            end.secret(),
            &[
                (CERTIFICATE, &own.certificate),
                (KEY, &own.key),
                (TRUSTED, &authority.certificate),
            ],
        );
    }
    let told = |now| decide(&state, &LIFE, now).notes.join("\n");
    assert!(told(NOW).contains("left as it is"), "{}", told(NOW));
    let late = told(NOW + 3_500);
    assert!(late.contains("renew it where it was made"), "{late}");
}

#[test]
fn an_authority_that_was_brought_signs_and_is_never_changed() {
    let former = Pair::authority(NOW - 10, LIFE.authority).unwrap();
    let own = Pair::authority(NOW, LIFE.authority).unwrap();
    let mut state = laid_down();
    let chain = format!("{}{}", own.certificate, former.certificate);
    state.put(AUTHORITY, &[(CERTIFICATE, &chain), (KEY, &own.key)]);
    let brought = state.authority.clone();
    let steps = state.steps(NOW, 9);
    assert_eq!(steps, [Step::Issue(End::Typha), Step::Issue(End::Node)]);
    accept(&state, &state, NOW).unwrap();
    let old = former.issue(End::Node, NOW, LIFE.certificate).unwrap();
    let (_, trusted) = state.mounted(End::Typha);
    old.check_end(End::Node, &trusted, NOW).unwrap();
    let mut now = NOW;
    while now < NOW + 19_000 {
        now += 200;
        state.steps(now, 9);
        accept(&state, &state, now).unwrap();
    }
    assert_eq!(state.authority, brought);
    let told = decide(&state, &LIFE, now).notes.join("\n");
    assert!(told.contains("bring its successor"), "{told}");
    // What it signs ends with it, and is not made again and again for that.
    assert!(decide(&state, &LIFE, NOW + 20_100).step.is_none());

    let mut useless = laid_down();
    useless.put(AUTHORITY, &[(CERTIFICATE, "mine"), (KEY, "mine")]);
    let decision = decide(&useless, &LIFE, NOW);
    assert!(decision.step.is_none() && decision.notes[0].contains("cannot be used"));
}

#[test]
fn certificates_of_one_age_are_not_renewed_at_one_time() {
    let first_renewals: std::collections::BTreeSet<i64> = (0..6)
        .map(|_| {
            let mut state = laid_down();
            state.steps(NOW, 9);
            let mut times = (2_000..3_000).step_by(10);
            let due = times.find(|s| decide(&state, &LIFE, NOW + s).step.is_some());
            due.unwrap()
        })
        .collect();
    assert!(first_renewals.len() > 3, "{first_renewals:?}");
    // Its life begins a tenth before it is made.
    let (first, last) = (4_400 * 2 / 3 - 440 - 400, 4_400 * 2 / 3 - 400);
    assert!(
        first_renewals
            .iter()
            .all(|s| (first - 1..last + 10).contains(s)),
        "{first_renewals:?}"
    );
}

#[test]
fn lifetimes_that_leave_a_gap_are_refused() {
    assert!(LIFE.check().is_ok() && Lifetimes::default().check().is_ok());
    for wrong in [
        Lifetimes {
            settle: Duration::ZERO,
            ..LIFE
        },
        Lifetimes {
            settle: LIFE.certificate / 3,
            ..LIFE
        },
        Lifetimes {
            authority: LIFE.certificate * 3,
            ..LIFE
        },
    ] {
        assert!(wrong.check().is_err(), "{wrong:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3, ..ProptestConfig::default() })]

    /// However the controllers are interrupted, two ends that are behind by less than things take to settle accept each other at any
    /// time; and every authority is followed by another.
    #[test]
    fn ends_that_are_behind_accept_each_other_throughout(
        looks in prop::collection::vec((60i64..100, 0usize..7, 0i64..400, 0i64..400), 320..350),
    ) {
        let mut state = laid_down();
        state.steps(NOW, 9);
        let mut authorities = std::collections::BTreeSet::new();
        let mut history = vec![(NOW, state.clone())];
        let mut now = NOW;
        for (pause, most, typha_behind, node_behind) in looks {
            now += pause;
            state.steps(now, most);
            authorities.insert(state.authority.as_ref().unwrap().data[CERTIFICATE].clone());
            history.push((now, state.clone()));
            let at = |behind: i64| {
                let seen = history.iter().rev().find(|(at, _)| *at <= now - behind);
                &seen.unwrap_or(&history[0]).1
            };
            let accepted = accept(at(typha_behind), at(node_behind), now);
            prop_assert!(accepted.is_ok(), "{:?} after {} s, behind by {typha_behind} and {node_behind}", accepted, now - NOW);
            let rest = history.iter().position(|(at, _)| *at > now - 800).unwrap_or(0);
            history.drain(..rest.saturating_sub(1));
        }
        // Each lives for some 12,000 s before the next takes over.
        prop_assert!(authorities.len() >= 2, "{} authorities in {} s", authorities.len(), now - NOW);
    }
}
