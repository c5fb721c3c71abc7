//! What the host must be able to do before a node starts. What a pool's encapsulation needs is not among it: without its
//! module that pool waits, which the tunnels report, and all others work.

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
