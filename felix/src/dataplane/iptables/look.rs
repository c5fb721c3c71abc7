//! What the tables hold, and how it differs from what was believed.

use cali_netlink::nft::Changed;
use cali_netlink::{Error, NetNs};

use super::tools::{Failure, Tools, Variant};
use crate::calc::IpVersion;
use crate::iptables::Observed;

pub(super) fn concerns_us(object: &Changed) -> bool {
    match object {
        Changed::Table => true,
        Changed::Chain(name) | Changed::Rule(name, _) => {
            name.starts_with("cali-")
                || matches!(
                    &**name,
                    "PREROUTING" | "INPUT" | "FORWARD" | "OUTPUT" | "POSTROUTING"
                )
        }
        Changed::Set(_) | Changed::Elements(_) | Changed::Other => false,
    }
}

pub(super) fn read(tools: &Tools, versions: &[IpVersion]) -> Result<[Observed; 2], Failure> {
    let mut seen = <[Observed; 2]>::default();
    for version in versions {
        seen[*version as usize] = tools.save(*version)?;
    }
    Ok(seen)
}

/// IPv6 may be switched off in the kernel.
pub(super) fn versions(netns: &NetNs) -> Vec<IpVersion> {
    let has_v6 = netns.run(|| std::path::Path::new("/proc/thread-self/net/if_inet6").exists());
    match has_v6 {
        Ok(false) => vec![IpVersion::V4],
        _ => vec![IpVersion::V4, IpVersion::V6],
    }
}

pub(super) fn unreadable(variant: Variant, failure: Failure) -> Error {
    Error::new(
        "read",
        format!("tables of {variant}"),
        cali_netlink::Cause::Invalid(failure.reason),
    )
}

/// In words, what of ours differs.
pub(super) fn differences(before: &Observed, after: &Observed) -> Vec<String> {
    let mut found = Vec::new();
    for (key, chain) in &before.chains {
        match after.chains.get(key) {
            None => found.push(format!("chain {} of {} is gone", key.1, key.0)),
            Some(other) if other.hashes != chain.hashes => {
                found.push(format!("chain {} of {} has other rules", key.1, key.0));
            }
            Some(_) => {}
        }
    }
    let new = after
        .chains
        .keys()
        .filter(|key| !before.chains.contains_key(*key));
    found.extend(new.map(|key| format!("chain {} of {} appeared", key.1, key.0)));
    found
}
