//! Objects that are named by their content, and shared by whoever needs the same: constants, the chains of ports, and
//! the maps that follow the members of several sets.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_netlink::nft::{Elem, Key, KeyType, Set, Verdict};

use super::collapse::Union;
use super::compiler::{Compiler, Needs};
use super::names;
use super::program::SetProgram;
use super::rule::{Rendered, address_type};
use crate::calc::{IpSetId, IpVersion, Member};

impl Compiler {
    /// Puts what is named by its content in place, unless it is there for somebody else.
    pub(super) fn put_shared(&mut self, rendered: &Rendered, needs: &mut Needs) {
        let names = rendered
            .literals
            .keys()
            .chain(rendered.chains.keys())
            .chain(rendered.unions.keys());
        for name in names {
            let users = self.shared_users.entry(name.clone()).or_default();
            *users += 1;
            needs.shared.insert(name.clone());
            if *users > 1 {
                continue;
            }
            if let Some(set) = rendered.literals.get(name) {
                self.desired.put_set(set.clone());
            }
            if let Some(chain) = rendered.chains.get(name) {
                self.desired.put_chain(chain.clone());
            }
            if let Some(union) = rendered.unions.get(name) {
                self.put_union(name, union);
            }
        }
    }

    pub(super) fn release_shared(&mut self, name: &Arc<str>) {
        let Some(users) = self.shared_users.get_mut(name) else {
            return;
        };
        *users -= 1;
        if *users > 0 {
            return;
        }
        self.shared_users.remove(name);
        self.desired.remove_set(name);
        self.desired.remove_chain(name);
        for (id, _) in self
            .unions
            .remove(name)
            .into_iter()
            .flat_map(|union| union.parts)
        {
            if let Some(unions) = self.set_unions.get_mut(&id) {
                unions.remove(name);
                if unions.is_empty() {
                    self.set_unions.remove(&id);
                }
            }
        }
    }

    fn put_union(&mut self, name: &Arc<str>, union: &Union) {
        let mut elements: BTreeMap<Key, Elem> = BTreeMap::new();
        for (id, chain) in &union.parts {
            self.set_unions
                .entry(id.clone())
                .or_default()
                .insert(name.clone());
            let set = names::exact_set(id, union.version);
            let members = self.desired.program.sets.get(&set);
            for key in members.into_iter().flat_map(|set| set.elements.keys()) {
                elements.entry(key.clone()).or_insert_with(|| {
                    Elem::new(key.clone()).verdict(Verdict::Goto(chain.clone()))
                });
            }
        }
        let key = KeyType::one(address_type(union.version));
        let map = SetProgram::new(Set::verdict_map(name.clone(), key));
        self.desired.put_set(map.with(elements.into_values()));
        self.unions.insert(name.clone(), union.clone());
    }

    /// Members of a set came or went: so do they in the maps that it is part of.
    pub(super) fn update_unions(&mut self, id: &IpSetId, added: &[Member], removed: &[Member]) {
        let Some(names) = self.set_unions.get(id) else {
            return;
        };
        for name in names {
            let Some(union) = self.unions.get(name) else {
                continue;
            };
            let hosts = added
                .iter()
                .chain(removed)
                .filter_map(|member| match member {
                    Member::Net(net) if net.is_host() => Some(net.addr()),
                    _ => None,
                });
            for addr in hosts.filter(|addr| IpVersion::of(*addr) == union.version) {
                let key = Key::ip(addr);
                let leads = union.parts.iter().find(|(id, _)| {
                    let set = names::exact_set(id, union.version);
                    let set = self.desired.program.sets.get(&set);
                    set.is_some_and(|set| set.elements.contains_key(&key))
                });
                match leads {
                    Some((_, chain)) => {
                        let elem = Elem::new(key).verdict(Verdict::Goto(chain.clone()));
                        self.desired.put_element(name, elem);
                    }
                    None => self.desired.remove_element(name, &key),
                }
            }
        }
    }
}
