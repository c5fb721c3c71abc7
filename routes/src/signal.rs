//! What notifications mean for the rows.

use std::collections::BTreeMap;
use std::time::Instant;

use cali_netlink::events::{Event, Notice};
use cali_netlink::route::TABLE_LOCAL;
use cali_netlink::{Link, Route, RouteKey, Target};
use tracing::{info, warn};

use crate::nexthops::is_ours;
use crate::writer::{Task, log_drift};

impl Task {
    /// Takes in notifications in their order. Of several about one row only the last counts: what we wrote ourselves
    /// in between is older than what we know.
    pub(crate) fn on_burst(&mut self, burst: Vec<Event>, now: Instant) {
        let mut last: BTreeMap<RouteKey, usize> = BTreeMap::new();
        for (position, event) in burst.iter().enumerate() {
            if let Event::Route(notice) = event {
                last.insert(notice.object().key(), position);
            }
        }
        for (position, event) in burst.into_iter().enumerate() {
            match event {
                Event::Route(notice) => {
                    let key = notice.object().key();
                    if [self.program.settings().table, TABLE_LOCAL].contains(&key.table) {
                        self.on_route(&key, notice, last.get(&key) == Some(&position), now);
                    }
                }
                Event::Link(notice) => self.on_link(notice),
                Event::Address(notice) => {
                    // The kernel removes routes that prefer a removed address as their source, without a word.
                    if let Notice::Gone(address) = &notice {
                        self.audit.devices.insert(address.ifindex);
                    }
                    self.audit.reach_all = true;
                }
                Event::Nexthop(notice) => {
                    let present = matches!(notice, Notice::Present(_));
                    let nexthop = notice.object().clone();
                    if !present && is_ours(nexthop.id) {
                        self.audit.nexthops = true;
                    }
                    if let Some(drift) = self.program.on_nexthop_event(nexthop, present, now) {
                        warn!(found = ?drift, "nexthop object was changed by somebody else; putting it right");
                    }
                }
                Event::Overflow => {
                    info!("notifications were lost; reading the kernel's routes again");
                    self.audit.all = true;
                    self.audit.reach_all = true;
                }
                _ => {}
            }
        }
    }

    fn on_route(&mut self, key: &RouteKey, notice: Notice<Route>, is_last: bool, now: Instant) {
        let ours = self.is_our_protocol(notice.object());
        if !ours {
            // The underlay changed: next hops inside the prefix may be reached another way. The answers decide.
            let within = |address: &std::net::IpAddr| key.prefix.contains(*address);
            let concerned: Vec<_> = self.table.needed_next_hops().filter(within).collect();
            self.audit.reach.extend(concerned);
        }
        let wanted = self.program.routes().desired(key).is_some();
        if !is_last || (!ours && !wanted) {
            return;
        }
        let (present, route) = match notice {
            Notice::Present(route) => (true, route),
            Notice::Gone(route) => (false, route),
        };
        if let Some(drift) = self.program.on_route_event(route, present, now) {
            log_drift(&drift);
        }
    }

    /// A link that goes down takes its routes and nexthop objects with it, without their own notifications.
    fn on_link(&mut self, notice: Notice<Link>) {
        let link = notice.object();
        let known = self.links.get(&link.index);
        let same = |known: &Link| {
            known.name == link.name && known.up == link.up && known.carrier == link.carrier
        };
        if matches!(notice, Notice::Present(_)) {
            if known.is_some_and(same) {
                return;
            }
            // A device that comes, or comes up, takes nothing away; only whether it is still so has to be asked.
            if link.up && !known.is_some_and(|known| known.up) {
                let index = link.index;
                if let Some(link) = self.fresh_link(index) {
                    self.on_fresh_link(link);
                }
                self.audit.reach_all = true;
                return;
            }
            if !link.up && known.is_none() {
                // Nothing goes over it yet.
                return;
            }
        }
        self.audit.links = true;
        self.audit.nexthops = true;
        self.audit.reach_all = true;
        self.audit.devices.insert(link.index);
    }

    fn is_our_protocol(&self, route: &Route) -> bool {
        let settings = self.program.settings();
        let object = matches!(route.target, Target::Nexthop(id) if is_ours(id));
        object || route.protocol == settings.protocol || route.protocol == settings.bgp_protocol
    }
}
