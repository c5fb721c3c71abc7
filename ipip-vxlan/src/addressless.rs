//! Devices that stand before their address is known. Pure.
//!
//! While a device has no IPv4 address, the kernel's reverse path filter, also a loose one, drops what comes in through it
//! unless the answer would go the same way (`no_addr` in `__fib_validate_source`, net/ipv4/fib_frontend.c). So a node does not
//! say that it receives through such a device. Where no address comes, because no pool gives tunnels any, it says so after
//! [`GRACE`]: once both ends send that way, the filter lets it pass.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long an address is waited for. It takes two writes to the datastore, by a node that may be busy; meanwhile the others
/// send in the former way.
const GRACE: Duration = Duration::from_secs(60);

/// Since when each device has stood without an address.
#[derive(Debug, Default)]
pub(crate) struct Addressless(BTreeMap<String, Instant>);

impl Addressless {
    /// Takes in the devices that stand, and whether they have their address.
    pub(crate) fn see(&mut self, devices: impl IntoIterator<Item = (String, bool)>, now: Instant) {
        let former = std::mem::take(&mut self.0);
        let without = devices.into_iter().filter(|(_, has)| !has);
        self.0 = without
            .map(|(name, _)| {
                let since = former.get(&name).copied().unwrap_or(now);
                (name, since)
            })
            .collect();
    }

    /// The device has its address, or none has come.
    pub(crate) fn receives(&self, device: &str, now: Instant) -> bool {
        self.0
            .get(device)
            .is_none_or(|since| now.saturating_duration_since(*since) >= GRACE)
    }

    /// When the next device is given up waiting for.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Instant> {
        let ends = self.0.values().map(|since| *since + GRACE);
        ends.filter(|end| *end > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_its_address_receives_nothing_until_none_is_to_be_expected() {
        let (mut waits, start) = (Addressless::default(), Instant::now());
        let see = |waits: &mut Addressless, has, now| {
            waits.see([("tunl0".to_owned(), has), ("other".to_owned(), true)], now);
            (waits.receives("tunl0", now), waits.receives("other", now))
        };
        assert_eq!(see(&mut waits, false, start), (false, true));
        assert_eq!(waits.next_due(start), Some(start + GRACE));
        assert_eq!(see(&mut waits, true, start), (true, true));
        assert_eq!(waits.next_due(start), None);
        // The time begins anew where the address was there in between.
        let later = start + Duration::from_secs(1);
        assert_eq!(see(&mut waits, false, later), (false, true));
        assert_eq!(see(&mut waits, false, start + GRACE), (false, true));
        assert_eq!(see(&mut waits, false, later + GRACE), (true, true));
        assert_eq!(waits.next_due(later + GRACE), None);
    }
}
