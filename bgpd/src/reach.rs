//! Whether a next hop can be reached (RFC 4271 §9.1.2.1).

use std::time::Duration;

use cali_netlink::Netlink;
use nix::errno::Errno;
use tracing::{debug, warn};

use crate::rib::{Gateway, NextHopState};

/// How often watched next hops are looked at again.
pub const RECHECK: Duration = Duration::from_secs(2);

/// Answers for single next hops.
pub trait Reach: Send {
    /// The state of a next hop now.
    fn state(&mut self, gateway: Gateway) -> NextHopState;
}

/// Everything is reachable at the same cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Anywhere;

impl Reach for Anywhere {
    fn state(&mut self, _gateway: Gateway) -> NextHopState {
        NextHopState::Reachable { metric: 0 }
    }
}

/// What the kernel's route lookup says.
#[derive(Clone)]
pub struct Kernel {
    netlink: Netlink,
}

impl Kernel {
    /// Asks this namespace.
    #[must_use]
    pub const fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }
}

impl Reach for Kernel {
    fn state(&mut self, gateway: Gateway) -> NextHopState {
        if gateway.scope != 0 {
            return NextHopState::Reachable { metric: 0 };
        }
        match self.netlink.lookup_route(gateway.addr) {
            Ok(_) => NextHopState::Reachable { metric: 0 },
            // A lookup that fails for any other reason says nothing about the gateway.
            Err(error) if !says_unreachable(&error) => {
                warn!(gateway = %gateway.addr, %error, "cannot tell whether a next hop is reachable");
                NextHopState::Reachable { metric: 0 }
            }
            Err(error) => {
                debug!(gateway = %gateway.addr, %error, "next hop is not reachable");
                NextHopState::Unreachable
            }
        }
    }
}

/// What a lookup answers when there is no route, or one that refuses (`fib_props`, `net/ipv4/fib_semantics.c`;
/// a blackhole answers EINVAL).
fn says_unreachable(error: &cali_netlink::Error) -> bool {
    matches!(
        error.code(),
        Some(
            Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::EINVAL | Errno::ESRCH
        )
    )
}
