//! What a consumer says of the workload endpoints that it needs: those of its node always, and those that its selectors select.
//!
//! The consumer numbers what it asks for; [`SyncEvent::Complete`](cali_api::update::SyncEvent::Complete) answers it in the stream of
//! changes, behind the endpoints themselves.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::watch;

use crate::wire::{MAX_SELECTOR_BYTES, MAX_SELECTORS};

/// Selectors in their canonical form.
pub type Selectors = Arc<BTreeSet<Arc<str>>>;

/// A longest selector that is sent as it is: several of them fit into one frame.
const MAX_SELECTOR: usize = 16 * 1024;

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Grows with each change. Zero: nothing has been said yet.
    pub number: u64,
    /// The selectors.
    pub selectors: Selectors,
}

impl Wanted {
    /// What a server is told: too many selectors, or one that is too long, become all endpoints.
    #[must_use]
    pub fn on_wire(&self) -> Selectors {
        on_wire(&self.selectors)
    }
}

pub(crate) fn on_wire(selectors: &Selectors) -> Selectors {
    let bytes: usize = selectors.iter().map(|selector| selector.len()).sum();
    let too_long = selectors
        .iter()
        .any(|selector| selector.len() > MAX_SELECTOR);
    if too_long || bytes > MAX_SELECTOR_BYTES || selectors.len() > MAX_SELECTORS {
        return Arc::new(BTreeSet::from([Arc::from("all()")]));
    }
    Arc::clone(selectors)
}

/// The consumer's end.
#[derive(Debug, Clone)]
pub struct Asker(watch::Sender<Wanted>);

impl Asker {
    /// Asks for these and no others.
    pub fn ask(&self, wanted: Wanted) {
        self.0.send_replace(wanted);
    }
}

/// The client's end.
#[derive(Debug, Clone)]
pub struct Listener {
    node: String,
    wanted: watch::Receiver<Wanted>,
}

/// Both ends, for the endpoints of this node to begin with.
#[must_use]
pub fn channel(node: &str) -> (Asker, Listener) {
    let (asker, wanted) = watch::channel(Wanted::default());
    let node = node.to_owned();
    (Asker(asker), Listener { node, wanted })
}

impl Listener {
    /// The node whose endpoints are asked for.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// What is asked for now.
    pub(crate) fn newest(&mut self) -> Wanted {
        self.wanted.borrow_and_update().clone()
    }

    /// Until something else is asked for; never, when the consumer has gone.
    pub(crate) async fn changed(&mut self) {
        if self.wanted.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_needs_too_many_selectors_asks_for_everything() {
        let wanted = |selectors: &mut dyn Iterator<Item = String>| Wanted {
            number: 1,
            selectors: Arc::new(selectors.map(Arc::from).collect()),
        };
        let few = wanted(&mut (0..100).map(|n| format!("app == 'a{n}'")));
        assert_eq!(few.on_wire(), few.selectors);
        let many = wanted(&mut (0..5000).map(|n| format!("app == 'a{n}'")));
        let long = wanted(&mut std::iter::once("a".repeat(20_000)));
        let large = wanted(&mut (0..100).map(|n| format!("{n}{}", "a".repeat(10_000))));
        for too_much in [many, long, large] {
            assert_eq!(
                too_much.on_wire().iter().map(|s| &**s).collect::<Vec<_>>(),
                ["all()"]
            );
        }
    }
}
