//! All that a graph has said so far, as one value.
//!
//! A consumer that missed batches starts from a snapshot; tests compare two histories by it. Taking
//! a batch in checks the promises of the output's order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::v3::FelixConfigurationSpec;
use cali_api::{Cidr, Key};

use super::output::{
    Batch, Delta, Endpoint, HostEndpoint, IpSetId, IpSetKind, Member, PoolNat, Rules, TunnelPeers,
};

/// A delta that cannot follow what was said before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A batch is missing or out of order.
    #[error("batch {found} follows batch {last}")]
    Sequence {
        /// The batch before.
        last: u64,
        /// This one.
        found: u64,
    },
    /// Something refers to what is not there.
    #[error("{user} uses {missing}, which does not exist")]
    Missing {
        /// What refers.
        user: String,
        /// To what.
        missing: String,
    },
    /// Something goes or is created although it is there, or in use.
    #[error("{what} is created twice or removed while {user} uses it")]
    InUse {
        /// What goes.
        what: String,
        /// What still refers to it.
        user: String,
    },
}

/// The state after all batches so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// Number of the last batch.
    pub sequence: u64,
    /// Node settings.
    pub settings: Option<Arc<FelixConfigurationSpec>>,
    /// IP pools.
    pub pools: Vec<PoolNat>,
    /// Networks of service addresses.
    pub service_nets: Vec<Cidr>,
    /// Senders of encapsulated packets.
    pub tunnel_peers: Arc<TunnelPeers>,
    /// IP sets with their members.
    pub sets: BTreeMap<IpSetId, (IpSetKind, BTreeSet<Member>)>,
    /// Active policies.
    pub policies: BTreeMap<Key, Arc<Rules>>,
    /// Active profiles.
    pub profiles: BTreeMap<Arc<str>, Arc<Rules>>,
    /// Local endpoints.
    pub endpoints: BTreeMap<Key, Arc<Endpoint>>,
    /// Host endpoints of this node.
    pub hosts: BTreeMap<Key, Arc<HostEndpoint>>,
}

impl Snapshot {
    /// Takes a batch in. After an error the snapshot is of no further use.
    pub fn apply(&mut self, batch: &Batch) -> Result<(), Violation> {
        if batch.sequence != self.sequence + 1 {
            return Err(Violation::Sequence {
                last: self.sequence,
                found: batch.sequence,
            });
        }
        self.sequence = batch.sequence;
        batch
            .deltas
            .iter()
            .try_for_each(|delta| self.apply_delta(delta))
    }

    fn apply_delta(&mut self, delta: &Delta) -> Result<(), Violation> {
        match delta {
            Delta::Settings(settings) => self.settings = Some(settings.clone()),
            Delta::Pools(pools) => self.pools = pools.to_vec(),
            Delta::ServiceNets(nets) => self.service_nets = nets.to_vec(),
            Delta::TunnelPeers(peers) => self.tunnel_peers = peers.clone(),
            Delta::IpSetCreate {
                id, kind, members, ..
            } => {
                let set = (*kind, members.iter().copied().collect());
                if self.sets.insert(id.clone(), set).is_some() {
                    return Err(in_use(id, &"itself"));
                }
            }
            Delta::IpSetChange { id, added, removed } => {
                let Some((_, members)) = self.sets.get_mut(id) else {
                    return Err(missing(&"a change", id));
                };
                for member in removed {
                    if !members.remove(member) {
                        return Err(missing(id, &format!("{member:?}")));
                    }
                }
                for member in added {
                    if !members.insert(*member) {
                        return Err(in_use(&format!("{member:?}"), id));
                    }
                }
            }
            Delta::Policy { id, rules } => {
                self.check_sets(id, rules)?;
                self.policies.insert(id.clone(), rules.clone());
            }
            Delta::Profile { name, rules } => {
                self.check_sets(name, rules)?;
                self.profiles.insert(name.clone(), rules.clone());
            }
            Delta::Endpoint { id, endpoint } => {
                let policies = endpoint
                    .ingress
                    .iter()
                    .chain(&endpoint.egress)
                    .flat_map(|tier| &tier.policies);
                for policy in policies {
                    if !self.policies.contains_key(policy) {
                        return Err(missing(id, policy));
                    }
                }
                if let Some(profile) = endpoint
                    .profiles
                    .iter()
                    .find(|name| !self.profiles.contains_key(*name))
                {
                    return Err(missing(id, profile));
                }
                self.endpoints.insert(id.clone(), endpoint.clone());
            }
            Delta::HostEndpoint { id, endpoint } => {
                if let Some(policy) = endpoint
                    .policies()
                    .find(|policy| !self.policies.contains_key(*policy))
                {
                    return Err(missing(id, policy));
                }
                if let Some(profile) = endpoint
                    .profiles
                    .iter()
                    .find(|name| !self.profiles.contains_key(*name))
                {
                    return Err(missing(id, profile));
                }
                self.hosts.insert(id.clone(), endpoint.clone());
            }
            Delta::EndpointRemove { id } => {
                self.endpoints
                    .remove(id)
                    .ok_or_else(|| missing(&"a removal", id))?;
            }
            Delta::HostEndpointRemove { id } => {
                self.hosts
                    .remove(id)
                    .ok_or_else(|| missing(&"a removal", id))?;
            }
            Delta::ProfileRemove { name } => {
                if let Some((user, _)) = self
                    .endpoints
                    .iter()
                    .find(|(_, endpoint)| endpoint.profiles.contains(name))
                {
                    return Err(in_use(name, user));
                }
                let hosts = &self.hosts;
                if let Some((user, _)) = hosts.iter().find(|(_, host)| host.profiles.contains(name))
                {
                    return Err(in_use(name, user));
                }
                self.profiles
                    .remove(name)
                    .ok_or_else(|| missing(&"a removal", name))?;
            }
            Delta::PolicyRemove { id } => {
                let uses = |endpoint: &Endpoint| {
                    endpoint
                        .ingress
                        .iter()
                        .chain(&endpoint.egress)
                        .any(|tier| tier.policies.contains(id))
                };
                if let Some((user, _)) = self.endpoints.iter().find(|(_, endpoint)| uses(endpoint))
                {
                    return Err(in_use(id, user));
                }
                let used = |host: &HostEndpoint| host.policies().any(|policy| policy == id);
                if let Some((user, _)) = self.hosts.iter().find(|(_, host)| used(host)) {
                    return Err(in_use(id, user));
                }
                self.policies
                    .remove(id)
                    .ok_or_else(|| missing(&"a removal", id))?;
            }
            Delta::IpSetRemove { id } => {
                let policies = self
                    .policies
                    .iter()
                    .map(|(key, rules)| (key.to_string(), rules));
                let profiles = self
                    .profiles
                    .iter()
                    .map(|(name, rules)| (name.to_string(), rules));
                if let Some((user, _)) = policies
                    .chain(profiles)
                    .find(|(_, rules)| rules.set_ids().any(|used| used == id))
                {
                    return Err(in_use(id, &user));
                }
                self.sets
                    .remove(id)
                    .ok_or_else(|| missing(&"a removal", id))?;
            }
        }
        Ok(())
    }

    fn check_sets(&self, user: &dyn ToString, rules: &Rules) -> Result<(), Violation> {
        match rules.set_ids().find(|id| !self.sets.contains_key(id)) {
            Some(id) => Err(missing(user, id)),
            None => Ok(()),
        }
    }
}

fn missing(user: &dyn ToString, missing: &dyn ToString) -> Violation {
    Violation::Missing {
        user: user.to_string(),
        missing: missing.to_string(),
    }
}

fn in_use(what: &dyn ToString, user: &dyn ToString) -> Violation {
    Violation::InUse {
        what: what.to_string(),
        user: user.to_string(),
    }
}
