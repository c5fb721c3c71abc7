//! The chains of workload endpoints, and the maps by which packets find them.

use std::collections::BTreeSet;
use std::sync::Arc;

use cali_api::Key as ObjectKey;
use cali_netlink::nft::{Chain, Elem, Expr, Key, Rule as NftRule, Verdict, ct_state};

use super::compiler::{Compiler, DIRECTIONS, KnownEndpoint};
use super::expr::{self, counter};
use super::program::ChainProgram;
use super::stack::{Place, Stack, comment};
use super::{base, limits, names};
use crate::calc::{Direction, Endpoint, Limit};

impl Compiler {
    pub(super) fn put_endpoint(&mut self, id: &ObjectKey, endpoint: &Arc<Endpoint>) {
        let stacks = DIRECTIONS.map(|direction| {
            self.acquire_stack(Stack {
                place: Place::Endpoint,
                direction,
                tiers: endpoint.tiers(direction).to_vec(),
                profiles: endpoint.profiles.clone(),
            })
        });
        let known = KnownEndpoint {
            endpoint: endpoint.clone(),
            stacks,
        };
        let former = self.endpoints.insert(id.clone(), known);
        if let Some(former) = &former {
            self.claim(id, &former.endpoint.addresses, false);
        }
        self.interfaces
            .entry(endpoint.interface.clone())
            .or_default()
            .insert(id.clone());
        if let Some(former) = former {
            let same_policy = former.endpoint.profiles == endpoint.profiles
                && DIRECTIONS.iter().all(|direction| {
                    former.endpoint.tiers(*direction) == endpoint.tiers(*direction)
                });
            if !same_policy {
                let addresses = &endpoint.addresses;
                addresses.iter().for_each(|net| self.suspects.add(*net));
            }
            if former.endpoint.interface != endpoint.interface {
                self.leave_interface(id, &former.endpoint.interface);
            }
            former
                .stacks
                .iter()
                .for_each(|name| self.release_stack(name));
        }
        self.put_interface(&endpoint.interface);
        self.claim(id, &endpoint.addresses, true);
    }

    pub(super) fn remove_endpoint(&mut self, id: &ObjectKey) {
        let Some(former) = self.endpoints.remove(id) else {
            return;
        };
        self.claim(id, &former.endpoint.addresses, false);
        self.leave_interface(id, &former.endpoint.interface);
        former
            .stacks
            .iter()
            .for_each(|name| self.release_stack(name));
    }

    fn leave_interface(&mut self, id: &ObjectKey, interface: &Arc<str>) {
        if let Some(owners) = self.interfaces.get_mut(interface) {
            owners.remove(id);
            if owners.is_empty() {
                self.interfaces.remove(interface);
            }
        }
        self.put_interface(interface);
    }

    /// The chains of an interface and the way to them.
    pub(super) fn put_interface(&mut self, interface: &Arc<str>) {
        let owner = self
            .interfaces
            .get(interface)
            .and_then(BTreeSet::first)
            .cloned();
        let limits = owner.as_ref().and_then(|id| self.endpoints.get(id));
        self.put_limits(interface, limits.map(|known| known.endpoint.limits));
        for (direction, map) in [
            (Direction::Ingress, names::TO_WORKLOAD),
            (Direction::Egress, names::FROM_WORKLOAD),
        ] {
            let name = names::endpoint_chain(interface, direction);
            let key = Key::ifname(interface);
            match owner
                .as_ref()
                .and_then(|id| Some((id, self.endpoints.get(id)?)))
            {
                Some((id, known)) => {
                    let stack = known.stacks[direction as usize].clone();
                    let limit = known.endpoint.limits.of(direction);
                    let chain = self.endpoint_chain(&name, id, direction, limit, stack);
                    self.desired.put_chain(chain);
                    self.desired
                        .put_element(map, Elem::new(key).verdict(Verdict::Goto(name)));
                }
                None => {
                    self.desired.remove_chain(&name);
                    self.desired.remove_element(map, &key);
                }
            }
        }
        self.put_sources(interface);
    }

    fn endpoint_chain(
        &self,
        name: &Arc<str>,
        id: &ObjectKey,
        direction: Direction,
        limit: Limit,
        stack: Arc<str>,
    ) -> ChainProgram {
        let mut rules = Vec::new();
        let drop = [counter(), Expr::Verdict(Verdict::Drop)];
        if self.settings.drop_invalid {
            let exprs = [expr::ct_state_any(ct_state::INVALID).as_slice(), &drop].concat();
            rules.push(NftRule::new(exprs).comment("invalid"));
        }
        rules.extend(limit.connections.map(limits::connections));
        if direction == Direction::Egress {
            if !self.settings.allow_vxlan_from_workloads {
                let to_port = base::udp_to(self.settings.vxlan_port);
                let exprs = [to_port.as_slice(), &drop].concat();
                rules.push(NftRule::new(exprs).comment("VXLAN from a workload"));
            }
            if !self.settings.allow_ipip_from_workloads {
                let exprs = [expr::protocol(4, false).as_slice(), &drop].concat();
                rules.push(NftRule::new(exprs).comment("IPIP from a workload"));
            }
        }
        rules.push(NftRule::new([Expr::Verdict(Verdict::Goto(stack))]));
        let chain = Chain {
            comment: Some(comment(&id.to_string())),
            ..Chain::regular(name.clone())
        };
        ChainProgram::new(chain, rules)
    }
}
