//! The rate at which a device sends: a token bucket filter as its root queueing discipline
//! (`include/uapi/linux/pkt_sched.h`, `tc-tbf(8)`).

use std::time::Duration;

use crate::{
    error::{Error, Result},
    link::IfIndex,
    netlink::Netlink,
    rtnl::{AF_UNSPEC, REPLACE},
    wire::Writer,
};

const RTM_NEWQDISC: u16 = 36;
/// `TC_H_ROOT`.
const ROOT: u32 = u32::MAX;
/// Handle `1:`.
const HANDLE: u32 = 1 << 16;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`.
const ETHERNET: u8 = 1;

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    /// Bytes per second; not 0.
    pub rate: u64,
    /// Bytes at once; at least one packet of the device.
    pub burst: u32,
    /// What would wait longer is dropped.
    pub latency: Duration,
}

impl TokenBucket {
    /// Bytes that may wait.
    fn limit(&self) -> u32 {
        let waiting = u128::from(self.rate) * self.latency.as_micros() / 1_000_000;
        u32::try_from(waiting.saturating_add(u128::from(self.burst))).unwrap_or(u32::MAX)
    }

    /// `struct tc_tbf_qopt`: rate, peak rate, limit, buffer, mtu. The buffer is left to [`TCA_TBF_BURST`].
    fn parameters(&self) -> Vec<u8> {
        // `struct tc_ratespec`: cell_log, linklayer, overhead, cell_align, mpu, rate.
        let mut bytes = vec![0, ETHERNET, 0, 0, 0, 0, 0, 0];
        let rate = u32::try_from(self.rate).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&rate.to_ne_bytes());
        bytes.extend_from_slice(&[0; 12]);
        bytes.extend_from_slice(&self.limit().to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes
    }

    fn write(&self, writer: &mut Writer, ifindex: IfIndex, sequence: u32) {
        writer.begin(RTM_NEWQDISC, REPLACE, sequence);
        // `struct tcmsg`: family, padding, index, handle, parent, info.
        writer.raw(&[AF_UNSPEC, 0, 0, 0]);
        for word in [ifindex, HANDLE, ROOT, 0] {
            writer.raw(&word.to_ne_bytes());
        }
        writer.text(TCA_KIND, "tbf");
        let options = writer.nest(TCA_OPTIONS);
        writer.attr(TCA_TBF_PARMS, &self.parameters());
        writer.attr(TCA_TBF_RATE64, &self.rate.to_ne_bytes());
        writer.u32(TCA_TBF_BURST, self.burst);
        writer.end(options);
        writer.finish();
    }
}

impl Netlink {
    /// Limits what a device sends; a limit that it has is replaced. A kernel without `sch_tbf` says not found.
    pub fn limit_rate(&self, ifindex: IfIndex, bucket: &TokenBucket) -> Result<()> {
        let results = self.socket().batch(1, |writer, _, sequence| {
            bucket.write(writer, ifindex, sequence);
            Ok(())
        });
        let result = results.into_iter().next().unwrap_or(Ok(()));
        result.map_err(|cause| Error::new("limit", format!("rate of device {ifindex}"), cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structure_has_its_size_and_the_limit_is_what_may_wait() {
        let bucket = TokenBucket {
            rate: 1_000_000,
            burst: 50_000,
            latency: Duration::from_millis(25),
        };
        assert_eq!(bucket.parameters().len(), 36);
        assert_eq!(bucket.limit(), 75_000);
        let fast = TokenBucket {
            rate: u64::MAX,
            ..bucket
        };
        assert_eq!(fast.limit(), u32::MAX);
    }
}
