//! What this node tells the others about its reception, in its Node resource: the ways in which it receives (the barrier
//! of a pool's edit) and its WireGuard keys.
//!
//! [`word`] decides. A way is told only once the running pods' MTU fits it: whoever hears of it may send with it at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::v3::Node;
use cali_api::{Key, Kind};
use cali_datastore::{Datastore, Error as DatastoreError, edit};
use felix::dataplane::State;
use ipip_vxlan::{
    IPIP_DEVICE, RECEIVES_ANNOTATION, Receives, TunnelState, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE,
};
use tokio::sync::watch;

/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// How long an orderly end may wait for the datastore.
const AT_THE_END: Duration = Duration::from_secs(3);

/// The node's word.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Word {
    /// Ways of reception.
    pub receives: Receives,
    /// Public keys for IPv4 and IPv6; empty for none.
    pub keys: [String; 2],
}

/// What may be told: `pods` is the largest MTU that any running pod has.
#[must_use]
pub fn word(tunnels: &TunnelState, pods: u32, wireguard: &[String; 2]) -> Word {
    let fits = |device: &str| tunnels.mtus.get(device).is_some_and(|mtu| pods <= *mtu);
    let has = tunnels.receives;
    let receives = Receives {
        direct: has.direct,
        ipip: has.ipip && fits(IPIP_DEVICE),
        vxlan_v4: has.vxlan_v4 && fits(VXLAN_V4_DEVICE),
        vxlan_v6: has.vxlan_v6 && fits(VXLAN_V6_DEVICE),
    };
    let key = |at: usize| {
        let key = tunnels.keys[at].filter(|_| fits(&wireguard[at]));
        key.map(|key| key.to_string()).unwrap_or_default()
    };
    Word {
        receives,
        keys: [key(0), key(1)],
    }
}

/// Puts the word into the resource; false if it is there already.
pub fn tell(node: &mut Node, word: &Word) -> bool {
    let before = (node.metadata.annotations.clone(), node.status.clone());
    node.metadata
        .annotations
        .insert(RECEIVES_ANNOTATION.into(), word.receives.to_string());
    let mut status = node.status.clone().unwrap_or_default();
    status.wireguard_public_key.clone_from(&word.keys[0]);
    status.wireguard_public_key_v6.clone_from(&word.keys[1]);
    node.status = (node.status.is_some() || status != Default::default()).then_some(status);
    before != (node.metadata.annotations.clone(), node.status.clone())
}

/// The task's parts.
pub struct Teller {
    /// For the Node resource.
    pub datastore: Arc<dyn Datastore>,
    /// This node.
    pub node: String,
    /// What stands.
    pub state: watch::Receiver<Arc<State>>,
    /// The running pods' MTU, once it is known.
    pub pods: watch::Receiver<Option<u32>>,
}

impl Teller {
    /// Runs until the dataplane ends.
    pub async fn run(mut self) -> String {
        let mut told: Option<Word> = None;
        let mut again: Option<Instant> = None;
        loop {
            tokio::select! {
                changed = self.state.changed() => if changed.is_err() {
                    return "the dataplane has ended".to_owned();
                },
                changed = self.pods.changed() => if changed.is_err() {
                    return "nobody follows the pods' MTU".to_owned();
                },
                () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now).into()), if again.is_some() => {}
            }
            again = None;
            let Some(new) = self.now() else { continue };
            if told.as_ref() == Some(&new) {
                continue;
            }
            match self.write(&new).await {
                Ok(()) => {
                    tracing::info!(receives = %new.receives, keys = ?new.keys, "told what this node receives");
                    told = Some(new);
                }
                Err(error) => {
                    tracing::warn!(%error, cause = crate::cause(&error), "cannot tell what this node receives; trying again");
                    again = Some(Instant::now() + RETRY);
                }
            }
        }
    }

    fn now(&mut self) -> Option<Word> {
        let state = self.state.borrow_and_update().clone();
        let pods = *self.pods.borrow_and_update();
        // Before the first step nothing is known: the former word stays.
        if !state.ready {
            return None;
        }
        Some(word(&state.tunnels, pods?, &state.wireguard_devices))
    }

    async fn write(&self, word: &Word) -> Result<(), DatastoreError> {
        let key = Key::cluster(Kind::Node, self.node.clone());
        edit(&*self.datastore, &key, |node: &mut Node| tell(node, word)).await?;
        Ok(())
    }
}

/// Says on the node's object that its network serves pods, once rules and routes stand. Kubernetes keeps pods away from a
/// node that says otherwise. Ends only when the dataplane ends.
pub async fn tell_network(
    datastore: Arc<dyn Datastore>,
    node: String,
    mut state: watch::Receiver<Arc<State>>,
) -> String {
    if state.wait_for(|state| state.ready).await.is_ok() {
        while let Err(error) = datastore.tell_network(&node, true).await {
            tracing::warn!(%error, cause = crate::cause(&error), "cannot say that the network serves pods; trying again");
            tokio::time::sleep(RETRY).await;
        }
        while state.changed().await.is_ok() {}
    }
    "the dataplane has ended".to_owned()
}

/// Says that the network is about to be without a keeper. Best effort, and bounded: whoever stops this daemon waits.
pub async fn tell_shutdown(datastore: &dyn Datastore, node: &str) {
    let told = tokio::time::timeout(AT_THE_END, datastore.tell_network(node, false)).await;
    match told {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, cause = crate::cause(&error), "cannot say that this node's network stops")
        }
        Err(_) => tracing::warn!("cannot say in time that this node's network stops"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::v3::NodeSpec;

    const DEVICES: [&str; 2] = ["wireguard.cali", "wg-v6.cali"];

    fn tunnels() -> TunnelState {
        TunnelState {
            mtus: [
                (VXLAN_V4_DEVICE.to_owned(), 1450),
                (DEVICES[0].to_owned(), 1440),
            ]
            .into(),
            receives: "direct,vxlan".parse().unwrap(),
            keys: [
                "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=".parse().ok(),
                None,
            ],
            ..TunnelState::default()
        }
    }

    #[test]
    fn a_way_is_told_only_when_the_pods_fit_it() {
        let said = |pods| {
            let word = word(&tunnels(), pods, &DEVICES.map(str::to_owned));
            (word.receives.to_string(), !word.keys[0].is_empty())
        };
        assert_eq!(said(1500), ("direct".into(), false));
        assert_eq!(said(1450), ("direct,vxlan".into(), false));
        assert_eq!(said(1440), ("direct,vxlan".into(), true));
    }

    #[test]
    fn telling_twice_changes_nothing_and_a_key_can_be_taken_back() {
        let mut node = Node::named("n", NodeSpec::default());
        let word = word(&tunnels(), 1400, &DEVICES.map(str::to_owned));
        assert!(tell(&mut node, &word));
        assert!(!tell(&mut node, &word));
        assert!(tell(&mut node, &Word::default()));
        assert_eq!(node.status.unwrap().wireguard_public_key, "");
    }
}
