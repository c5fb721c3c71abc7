//! How fast a container may send and receive. Pure.
//!
//! Each direction is limited where it begins: what goes to the container at the host's end of its interface pair, what
//! comes from it at its own end. So a sender is held back rather than its packets dropped, and no further device is
//! needed. A container that may administer its own network (`CAP_NET_ADMIN`) can lift its own limit.

use std::time::Duration;

use cali_api::v3::QoSControls;
use cali_netlink::qdisc::TokenBucket;

use crate::config::Bandwidth;

/// What would wait longer is dropped (as Kubernetes' bandwidth plugin has it).
const LATENCY: Duration = Duration::from_millis(25);
/// A burst that nobody asked for: so much of a second.
const BURST_SHARE: u64 = 10;
/// Calico's default, in bits, which its conversion of pods fills in: half a gigabyte would pass before any limit is felt.
const UNASKED_BURST: u64 = 1 << 32;
/// The smallest burst, in bytes: segments that are cut only by the device count as one packet.
const SMALLEST_BURST: u64 = 64 * 1024;

/// The limits of both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Buckets {
    /// Towards the container.
    pub ingress: Option<TokenBucket>,
    /// From the container.
    pub egress: Option<TokenBucket>,
}

/// What annotations say goes before what the runtime says.
pub fn buckets(controls: Option<&QoSControls>, runtime: Option<Bandwidth>) -> Buckets {
    let controls = controls.cloned().unwrap_or_default();
    let runtime = runtime.unwrap_or_default();
    let choose = |own: (u64, u64), other: (u64, u64)| bucket(if own.0 > 0 { own } else { other });
    Buckets {
        ingress: choose(
            (controls.ingress_bandwidth, controls.ingress_burst),
            (runtime.ingress_rate, runtime.ingress_burst),
        ),
        egress: choose(
            (controls.egress_bandwidth, controls.egress_burst),
            (runtime.egress_rate, runtime.egress_burst),
        ),
    }
}

/// From bits per second and bits.
fn bucket((rate, burst): (u64, u64)) -> Option<TokenBucket> {
    let rate = (rate > 0).then_some((rate / 8).max(1))?;
    let burst = match burst {
        0 | UNASKED_BURST => rate / BURST_SHARE,
        asked => asked / 8,
    };
    Some(TokenBucket {
        rate,
        burst: u32::try_from(burst.max(SMALLEST_BURST)).unwrap_or(u32::MAX),
        latency: LATENCY,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_become_bytes_and_annotations_go_first() {
        let controls = QoSControls {
            ingress_bandwidth: 80_000_000,
            ingress_burst: 8_000_000,
            ..QoSControls::default()
        };
        let runtime = Bandwidth {
            ingress_rate: 8,
            egress_rate: 80_000_000,
            ..Bandwidth::default()
        };
        let both = buckets(Some(&controls), Some(runtime));
        let (ingress, egress) = (both.ingress.unwrap(), both.egress.unwrap());
        assert_eq!((ingress.rate, ingress.burst), (10_000_000, 1_000_000));
        assert_eq!((egress.rate, egress.burst), (10_000_000, 1_000_000));
        assert_eq!(buckets(None, None), Buckets::default());
        let slow = buckets(
            None,
            Some(Bandwidth {
                egress_rate: 8_000,
                ..Bandwidth::default()
            }),
        );
        assert_eq!(
            slow.egress.unwrap().burst,
            64 * 1024,
            "never less than a packet"
        );
    }
}
