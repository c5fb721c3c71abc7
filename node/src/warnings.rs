//! What this node cannot enforce, told where the object's owner looks: as a warning beside the object in the datastore.
//!
//! [`Warnings`] decides what is due; it is bounded, and a warning that lasts is told again before the API server forgets it
//! (`--event-ttl`, an hour unless set). Status, log and metrics tell the same on the node itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::Key;
use cali_datastore::{Datastore, Warning};
use felix::dataplane::State;
use tokio::sync::watch;

/// A warning that still holds is told again after this time.
const AGAIN: Duration = Duration::from_secs(50 * 60);
/// Objects that are warned of at once; the others get their turn with the next [`PAUSE`].
const AT_ONCE: usize = 20;
/// Time between two turns, also after a failure.
const PAUSE: Duration = Duration::from_secs(10);

/// What is wrong, by object.
type Wrong = BTreeMap<Key, (&'static str, String)>;

/// Objects with a reason and a note.
fn wrong(state: &State) -> Wrong {
    let unusable = state.unusable.iter();
    let mut wrong: Wrong = unusable
        .map(|(key, problems)| (key.clone(), ("NotUsable", problems.join("; "))))
        .collect();
    let policies = state.endpoints.values().flat_map(|e| &e.policies);
    for (key, refused) in policies.flat_map(|key| state.refused.iter().map(move |r| (key, r))) {
        if felix::compile::is_chain_of(&refused.object, key) {
            let note = format!("the kernel refused {}: {}", refused.object, refused.reason);
            wrong.entry(key.clone()).or_insert(("NotEnforced", note));
        }
    }
    wrong
}

/// Which warnings were told, and when.
#[derive(Debug, Default)]
struct Warnings {
    told: BTreeMap<Key, (String, Instant)>,
}

impl Warnings {
    /// What is to be told now, at most [`AT_ONCE`]; and when to ask again, if ever.
    fn due(&mut self, wrong: &Wrong, now: Instant) -> (Vec<Key>, Option<Instant>) {
        self.told
            .retain(|key, (note, _)| wrong.get(key).is_some_and(|(_, n)| n == note));
        let ends = |key: &Key| self.told.get(key).map(|(_, at)| *at + AGAIN);
        let mut due: Vec<Key> = Vec::new();
        let mut next: Option<Instant> = None;
        for key in wrong.keys() {
            match ends(key).filter(|end| *end > now) {
                Some(end) => next = Some(next.map_or(end, |n| n.min(end))),
                None if due.len() < AT_ONCE => due.push(key.clone()),
                None => next = Some(now + PAUSE),
            }
        }
        (due, next)
    }

    fn told(&mut self, key: Key, note: String, now: Instant) {
        self.told.insert(key, (note, now));
    }
}

/// Tells until the dataplane ends.
pub async fn run(
    datastore: Arc<dyn Datastore>,
    node: String,
    mut state: watch::Receiver<Arc<State>>,
) -> String {
    let mut warnings = Warnings::default();
    let mut again: Option<Instant> = None;
    loop {
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return "the dataplane has ended".to_owned();
            },
            () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now).into()), if again.is_some() => {}
        }
        let wrong = wrong(&state.borrow_and_update().clone());
        let (due, next) = warnings.due(&wrong, Instant::now());
        again = next;
        let something = !due.is_empty();
        for key in due {
            let Some((reason, note)) = wrong.get(&key).cloned() else {
                continue;
            };
            let warning = Warning {
                about: key.clone(),
                node: node.clone(),
                reason,
                note: note.clone(),
            };
            match datastore.warn(&warning).await {
                Ok(()) => warnings.told(key, note, Instant::now()),
                Err(error) => {
                    tracing::warn!(%error, cause = crate::cause(&error), object = %key, "cannot show a warning beside an object; trying again");
                    again = Some(Instant::now() + PAUSE);
                    break;
                }
            }
        }
        if something {
            // Whatever changes meanwhile is told in one go.
            tokio::time::sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::Kind;
    use felix::dataplane::{EndpointState, Refused};

    fn policy(name: &str) -> Key {
        Key::namespaced(Kind::NetworkPolicy, "a", name)
    }

    #[test]
    fn a_refused_chain_is_its_policys() {
        let endpoint = EndpointState {
            interface: "cali1".into(),
            addresses: Vec::new(),
            policies: vec![policy("good"), policy("bad")],
            problem: None,
        };
        let state = State {
            endpoints: [(Key::namespaced(Kind::WorkloadEndpoint, "a", "w"), endpoint)].into(),
            refused: vec![Refused {
                object: "chain cali-pi-np/a/bad".to_owned(),
                reason: "EINVAL".to_owned(),
            }],
            unusable: [(policy("worse"), vec!["no selector".to_owned()])].into(),
            ..State::default()
        };
        let wrong = wrong(&state);
        assert_eq!(
            wrong.keys().cloned().collect::<Vec<_>>(),
            [policy("bad"), policy("worse")]
        );
        assert_eq!(wrong[&policy("bad")].0, "NotEnforced");
        assert!(wrong[&policy("bad")].1.contains("EINVAL"));
    }

    #[test]
    fn a_warning_is_told_once_while_it_is_fresh_and_anew_when_it_changes_or_ages() {
        let (mut warnings, start) = (Warnings::default(), Instant::now());
        let mut wrong: Wrong = [(policy("bad"), ("NotUsable", "one".to_owned()))].into();
        assert_eq!(warnings.due(&wrong, start), (vec![policy("bad")], None));
        warnings.told(policy("bad"), "one".to_owned(), start);
        assert_eq!(
            warnings.due(&wrong, start),
            (Vec::new(), Some(start + AGAIN))
        );
        assert_eq!(warnings.due(&wrong, start + AGAIN).0, [policy("bad")]);
        wrong.insert(policy("bad"), ("NotUsable", "two".to_owned()));
        assert_eq!(warnings.due(&wrong, start).0, [policy("bad")]);
        warnings.due(&Wrong::new(), start);
        assert!(warnings.told.is_empty(), "what is mended is forgotten");
    }

    #[test]
    fn many_take_turns() {
        let (mut warnings, now) = (Warnings::default(), Instant::now());
        let wrong: Wrong = (0..AT_ONCE + 5)
            .map(|at| {
                (
                    policy(&format!("p{at:02}")),
                    ("NotUsable", "bad".to_owned()),
                )
            })
            .collect();
        let (first, next) = warnings.due(&wrong, now);
        assert_eq!((first.len(), next), (AT_ONCE, Some(now + PAUSE)));
        for key in first {
            warnings.told(key, "bad".to_owned(), now);
        }
        assert_eq!(warnings.due(&wrong, now).0.len(), 5);
    }
}
