//! Follows the host's addresses and subnets where the node's own are detected (`IP=autodetect`), so that the others send to the
//! new one. While nothing is found, as between two leases, the Node resource keeps what it has.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_datastore::Datastore;
use cali_netlink::Netlink;
use cali_netlink::events::{Event, EventStream, Group};
use ipnetwork::IpNetwork;

use super::settings::{AddressWish, Settings};
use super::{StartError, detect, host, read_host, write_node};

/// What belongs to a change of addresses: a host that is configured anew has none in between.
const SETTLE: Duration = Duration::from_secs(1);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(10);

/// What the notifications are about that [`follow`] needs.
pub const GROUPS: &[Group] = &[Group::Link, Group::Ipv4Address, Group::Ipv6Address];

/// An interface that may carry the node's address: name, whether it is up, addresses.
type Seen = Vec<(String, bool, Vec<IpNetwork>)>;

/// Whether the node's address depends on the host's interfaces after the start.
const fn depends(wish: &AddressWish) -> bool {
    matches!(
        wish,
        AddressWish::Detect(_)
            | AddressWish::Explicit {
                with_prefix: false,
                ..
            }
    )
}

/// Runs until the notifications end.
pub async fn follow(
    settings: Settings,
    datastore: Arc<dyn Datastore>,
    netlink: Netlink,
    mut events: EventStream,
) -> String {
    if !depends(&settings.ipv4) && !depends(&settings.ipv6) {
        return std::future::pending().await;
    }
    // What has changed since the start is found at once.
    let (mut seen, mut again) = (None, Some(Instant::now()));
    loop {
        tokio::select! {
            event = events.next() => match event {
                Ok(Event::Link(_) | Event::Address(_) | Event::Overflow) => {
                    again.get_or_insert(Instant::now() + SETTLE);
                }
                Ok(_) => {}
                Err(error) => return error.to_string(),
            },
            () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now).into()), if again.is_some() => {
                again = look(&settings, &datastore, &netlink, &mut seen)
                    .await
                    .err()
                    .map(|error| {
                        tracing::warn!(%error, cause = crate::cause(&error), "the node's address may be another now; it stays as published, trying again");
                        Instant::now() + RETRY
                    });
            }
        }
    }
}

async fn look(
    settings: &Settings,
    datastore: &Arc<dyn Datastore>,
    netlink: &Netlink,
    seen: &mut Option<Seen>,
) -> Result<(), StartError> {
    let interfaces = host::interfaces(netlink)?;
    let now: Seen = detect::published(&interfaces)
        .into_iter()
        .map(|one| (one.name.clone(), one.up, one.addresses.clone()))
        .collect();
    // Pods and tunnels come and go without a question to the datastore.
    if seen.as_ref() == Some(&now) {
        return Ok(());
    }
    let host = read_host(settings, datastore.as_ref(), netlink).await?;
    let node = write_node(settings, datastore.as_ref(), &host).await?;
    let show = |address: Option<IpNetwork>| address.map(|a| a.to_string()).unwrap_or_default();
    tracing::info!(
        ipv4 = show(node.spec.ipv4()),
        ipv6 = show(node.spec.ipv6()),
        "the host's interfaces; the node's addresses among them"
    );
    *seen = Some(now);
    Ok(())
}
