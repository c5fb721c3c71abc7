//! The devices of a namespace as notifications tell of them: read once, and again only after some were lost. For owners that
//! would have to read all devices at every change of one, on a host whose devices are many and come and go.

use std::collections::BTreeMap;

use crate::{Event, IfIndex, Link, Netlink, Notice, error::Result};

/// See the module's text. The owner has opened its stream of notifications before the first look.
#[derive(Debug, Default)]
pub struct FollowedLinks {
    /// None: to be read.
    known: Option<BTreeMap<IfIndex, Link>>,
}

impl FollowedLinks {
    /// Takes in a notification; true where it changes something.
    pub fn on_event(&mut self, event: &Event) -> bool {
        match (event, &mut self.known) {
            (Event::Overflow, known) => {
                *known = None;
                true
            }
            // They are read with the next look.
            (Event::Link(_), None) => true,
            (Event::Link(Notice::Present(link)), Some(known)) => {
                let same = known.get(&link.index) == Some(link);
                if !same {
                    known.insert(link.index, link.clone());
                }
                !same
            }
            (Event::Link(Notice::Gone(link)), Some(known)) => known.remove(&link.index).is_some(),
            _ => false,
        }
    }

    /// These are the devices.
    pub fn set(&mut self, links: impl IntoIterator<Item = Link>) {
        let all = links.into_iter().map(|link| (link.index, link));
        self.known = Some(all.collect());
    }

    /// The devices now.
    ///
    /// # Errors
    /// They have to be read and cannot be.
    pub fn look(&mut self, netlink: &Netlink) -> Result<&BTreeMap<IfIndex, Link>> {
        if self.known.is_none() {
            self.set(netlink.dump_links()?);
        }
        Ok(self.known.get_or_insert_default())
    }
}
