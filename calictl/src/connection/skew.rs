//! Whether this program and the cluster are of different versions. A warning, never a refusal: the datastore checks every
//! write, and a program that knows a field too few says so.

use std::time::Duration;

use cali_datastore::Datastore;

use crate::datastore;

/// A datastore that does not answer in this time is left to the command itself, which tells why.
const LIMIT: Duration = Duration::from_secs(2);

/// What is to be said about the cluster's version, if anything.
pub(super) async fn of(store: &dyn Datastore) -> Option<String> {
    let found = tokio::time::timeout(LIMIT, datastore::information(store)).await;
    let information = found.ok()?.ok()??;
    warning(env!("CARGO_PKG_VERSION"), &information.calico_version)
}

/// Patch releases are alike. Calico's own versions (3 and up) say nothing about ours.
fn warning(ours: &str, cluster: &str) -> Option<String> {
    let number = |text: &str| -> Option<(u32, u32)> {
        let mut parts = text.trim_start_matches('v').split(['.', '-', '+']);
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    let (mine, theirs) = (number(ours)?, number(cluster)?);
    if mine == theirs || (theirs.0 >= 3 && mine.0 < 3) {
        return None;
    }
    let (cluster, older) = (
        cluster.trim_start_matches('v'),
        if mine < theirs {
            "this program"
        } else {
            "the cluster"
        },
    );
    Some(format!(
        "the cluster runs version {cluster}, this is {ours}: fields that {older} does not know are refused or not shown \
         (--allow-version-mismatch says nothing about it)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_release_of_ours_is_worth_a_warning() {
        for (cluster, warned) in [
            ("0.1.0", false),
            ("v0.1.7", false),
            ("0.2.0", true),
            ("v1.0.0-rc1", true),
            ("v3.32.1", false),
            ("", false),
            ("master", false),
        ] {
            assert_eq!(warning("0.1.0", cluster).is_some(), warned, "{cluster}");
        }
        let text = warning("0.1.0", "0.2.0").expect("a warning");
        assert!(text.contains("this program does not know"), "{text}");
    }
}
