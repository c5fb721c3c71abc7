//! The kernel's strict reverse path filter (`rp_filter=1`) drops packets that come in another way than answers would go out.
//! Between two nodes that is the normal case while they change from one encapsulation to another, one after the other.
//!
//! Our tunnel devices are set to loose (2) for good. The link that carries the node's address is not ours: it is set to
//! loose only while packets may come in more than one way, and gets back what it had. The kernel takes the larger of the
//! values for all devices and for the one.

use std::collections::BTreeMap;

use cali_netlink::{Netlink, sysctl};
use tracing::{info, warn};

const LOOSE: &str = "2";

fn key(device: &str) -> String {
    format!("ipv4/conf/{device}/rp_filter")
}

/// Links of the underlay that were set to loose, with their former value.
#[derive(Debug, Default)]
pub(crate) struct ReversePath {
    relaxed: BTreeMap<String, String>,
}

/// Whether the filter would drop what comes in on this device.
fn strict(netlink: &Netlink, device: &str) -> Option<String> {
    let read = |device: &str| sysctl::read(netlink.netns(), &key(device)).ok();
    let own = read(device)?;
    let effective = [read("all")?, own.clone()].into_iter().max()?;
    (effective == "1").then_some(own)
}

/// Makes one of our own devices loose.
pub(crate) fn loosen(netlink: &Netlink, device: &str) {
    if strict(netlink, device).is_some()
        && let Err(error) = sysctl::write_if_different(netlink.netns(), &key(device), LOOSE)
    {
        warn!(device, %error, "the reverse path filter cannot be set to loose: packets that come in this way may be dropped");
    }
}

impl ReversePath {
    /// Makes the underlay's links loose while `needed`, and strict again afterwards.
    pub(crate) fn underlay(&mut self, netlink: &Netlink, links: &[String], needed: bool) {
        if needed {
            for link in links {
                let Some(former) = strict(netlink, link) else {
                    continue;
                };
                match sysctl::write_if_different(netlink.netns(), &key(link), LOOSE) {
                    Ok(_) => {
                        info!(
                            link,
                            "the reverse path filter is loose while packets may come in several ways"
                        );
                        self.relaxed.insert(link.clone(), former);
                    }
                    Err(error) => warn!(
                        link, %error,
                        "the reverse path filter is strict and cannot be changed: packets may be dropped during a change of encapsulation"
                    ),
                }
            }
            return;
        }
        for (link, former) in std::mem::take(&mut self.relaxed) {
            // Whoever has changed it since knows better.
            let ours = sysctl::read(netlink.netns(), &key(&link)).is_ok_and(|now| now == LOOSE);
            if ours
                && let Err(error) =
                    sysctl::write_if_different(netlink.netns(), &key(&link), &former)
            {
                warn!(link, %error, "the reverse path filter cannot be set back");
            }
        }
    }
}
