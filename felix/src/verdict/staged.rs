//! What staged policies would do.

use std::sync::Arc;

use cali_api::v3::StagedAction;
use cali_api::{AnyResource, Key, Kind, Resource, kubernetes};

use super::Model;

impl Model {
    /// The model as it would be if all staged policies were committed: `Set` puts the policy in the place of the
    /// enforced one of the same name, `Delete` takes that one away, `Learn` and `Ignore` change nothing. Which
    /// staged policy decided shows in the verdict, as the policy that it would become.
    #[must_use]
    pub fn committed(&self) -> Self {
        let mut model = self.clone();
        for (key, object) in &self.objects {
            match &**object {
                AnyResource::StagedNetworkPolicy(staged) => {
                    let (action, spec) = staged.spec.committed();
                    let policy = Resource::new(staged.metadata.clone(), spec);
                    model.commit(Kind::NetworkPolicy, key, action, Some(policy.into()));
                }
                AnyResource::StagedGlobalNetworkPolicy(staged) => {
                    let (action, spec) = staged.spec.committed();
                    let policy = Resource::new(staged.metadata.clone(), spec);
                    model.commit(Kind::GlobalNetworkPolicy, key, action, Some(policy.into()));
                }
                AnyResource::StagedKubernetesNetworkPolicy(staged) => {
                    let action = staged.spec.staged_action.unwrap_or(StagedAction::Set);
                    // What cannot be converted grants nothing, here as in an enforced policy.
                    let policy = kubernetes::staged_network_policy(staged, &mut Vec::new());
                    let name = format!("{}{}", kubernetes::NETWORK_POLICY_PREFIX, key.name);
                    let key = Key {
                        name: name.into(),
                        ..key.clone()
                    };
                    model.commit(Kind::NetworkPolicy, &key, action, policy.map(Into::into));
                }
                _ => {}
            }
        }
        model
    }

    /// Whether there is any staged policy.
    #[must_use]
    pub fn has_staged(&self) -> bool {
        self.objects.keys().any(|key| {
            matches!(
                key.kind,
                Kind::StagedNetworkPolicy
                    | Kind::StagedGlobalNetworkPolicy
                    | Kind::StagedKubernetesNetworkPolicy
            )
        })
    }

    fn commit(&mut self, kind: Kind, key: &Key, action: StagedAction, policy: Option<AnyResource>) {
        let key = Key {
            kind,
            ..key.clone()
        };
        match (action, policy) {
            (StagedAction::Set, Some(policy)) => {
                self.objects.insert(key, Arc::new(policy));
            }
            (StagedAction::Delete, _) => {
                self.objects.remove(&key);
            }
            _ => {}
        }
    }
}
