//! What the host must be able to do before a node starts, and what it does without otherwise.

use cali_api::v3::{EncapMode, IPPool};
use cali_netlink::probe::{Capability, Missing, probe};

/// Without these there is no node.
const ESSENTIAL: &[Capability] = &[
    Capability::Root,
    Capability::Namespaces,
    Capability::Veth,
    Capability::NfTables,
    Capability::Conntrack,
];

/// The host lacks something that cannot be done without. Prints one line for each.
#[derive(Debug, thiserror::Error)]
#[error("{}", lines(.0))]
pub struct Lacking(Vec<Missing>);

fn lines(missing: &[Missing]) -> String {
    let lines: Vec<String> = missing.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

/// Tries what every node needs.
pub async fn check_essential() -> Result<(), Lacking> {
    check(ESSENTIAL).await
}

/// Tries what these pools need.
pub async fn check_pools(pools: &[IPPool]) -> Result<(), Lacking> {
    check(&needed_by(pools)).await
}

/// The capabilities that the encapsulations of these pools need.
fn needed_by(pools: &[IPPool]) -> Vec<Capability> {
    let mut needed = Vec::new();
    if pools
        .iter()
        .any(|pool| pool.spec.vxlan() != EncapMode::Never)
    {
        needed.push(Capability::Vxlan);
    }
    if pools
        .iter()
        .any(|pool| pool.spec.ipip() != EncapMode::Never)
    {
        needed.push(Capability::IpIp);
    }
    needed
}

async fn check(wanted: &[Capability]) -> Result<(), Lacking> {
    let missing: Vec<Missing> = probe(wanted)
        .await
        .into_iter()
        .filter_map(|(_, result)| result.err())
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Lacking(missing))
    }
}

#[cfg(test)]
mod tests {
    use cali_api::v3::IPPoolSpec;

    use super::*;

    #[test]
    fn pools_need_what_they_encapsulate_with() {
        let pool = |vxlan, ipip| {
            let spec = IPPoolSpec::new("10.0.0.0/16".parse().unwrap());
            IPPool::named(
                "p",
                IPPoolSpec {
                    vxlan_mode: Some(vxlan),
                    ipip_mode: Some(ipip),
                    ..spec
                },
            )
        };
        let none = pool(EncapMode::Never, EncapMode::Never);
        assert_eq!(needed_by(std::slice::from_ref(&none)), []);
        assert_eq!(
            needed_by(&[none, pool(EncapMode::CrossSubnet, EncapMode::Never)]),
            [Capability::Vxlan]
        );
        assert_eq!(
            needed_by(&[pool(EncapMode::Never, EncapMode::Always)]),
            [Capability::IpIp]
        );
    }
}
