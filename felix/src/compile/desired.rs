//! The desired program, and which of its objects have changed since somebody last asked.

use std::sync::Arc;

use cali_netlink::nft::{Elem, Key};

use super::program::{ChainProgram, Program, SetProgram, Touched};

/// A program that remembers what was changed in it.
#[derive(Debug)]
pub(super) struct Desired {
    pub(super) program: Program,
    pub(super) touched: Touched,
}

impl Desired {
    pub(super) fn put_chain(&mut self, chain: ChainProgram) {
        let name = chain.chain.name.clone();
        let same = self.program.chains.get(&name).is_some_and(|old| {
            old.chain == chain.chain
                && old.rules.len() == chain.rules.len()
                && old.tags().eq(chain.tags())
        });
        if !same {
            self.touched.chains.insert(name.clone());
            self.program.chains.insert(name, chain);
        }
    }

    pub(super) fn remove_chain(&mut self, name: &Arc<str>) {
        if self.program.chains.remove(name).is_some() {
            self.touched.chains.insert(name.clone());
        }
    }

    pub(super) fn put_set(&mut self, set: SetProgram) {
        let name = set.set.name.clone();
        if self.program.sets.get(&name) != Some(&set) {
            self.touched.sets.insert(name.clone());
            self.program.sets.insert(name, set);
        }
    }

    pub(super) fn remove_set(&mut self, name: &Arc<str>) {
        if self.program.sets.remove(name).is_some() {
            self.touched.elements.remove(name);
            self.touched.sets.insert(name.clone());
        }
    }

    pub(super) fn put_element(&mut self, set: &str, elem: Elem) {
        let Some(program) = self.program.sets.get_mut(set) else {
            return;
        };
        let key = elem.key.clone();
        if program.elements.insert(elem) {
            self.touched.element(&program.set.name, &key);
        }
    }

    pub(super) fn remove_element(&mut self, set: &str, key: &Key) {
        let Some(program) = self.program.sets.get_mut(set) else {
            return;
        };
        if program.elements.remove(key) {
            self.touched.element(&program.set.name, key);
        }
    }
}
