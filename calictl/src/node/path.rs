//! Black holes: a path to another node that carries less than the link here promises. Tunnels take their overhead from the
//! link's MTU, so every full packet of a pod disappears there.
//!
//! [`judge`] decides with a dozen questions; [`try_path`] asks them with real packets.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use cali_netlink::echo::{Echo, Fate};
use cali_netlink::{Netlink, RouteKind};

/// What every path has to carry: RFC 791 §3.2 and RFC 8200 §5.
const SMALLEST: [u32; 2] = [576, 1280];
/// Attempts per size. One lost packet is no black hole.
const ATTEMPTS: u32 = 3;
/// Wait for the answer to one attempt.
const WAIT: Duration = Duration::from_millis(400);

/// What is known of the way to one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// It is this host.
    Own,
    /// Packets of the link's MTU arrive.
    Whole(u32),
    /// Only packets up to `carries` arrive, where the link promises `link`; `told` if somebody on the way says so.
    Narrow { link: u32, carries: u32, told: bool },
    /// Not even small packets are answered; perhaps nobody answers pings there.
    Silent,
    /// This host has no route.
    NoRoute,
}

/// Finds out how much a path carries, by asking what becomes of sizes: at most 15 times for any link.
fn judge(link: u32, smallest: u32, mut fate_of: impl FnMut(u32) -> Result<Fate>) -> Result<Path> {
    // The small one first: it may have to wait until a neighbour is known, which is no matter of size.
    let mut carries = smallest.min(link);
    if fate_of(carries)? != Fate::Answered {
        return Ok(Path::Silent);
    }
    let whole = fate_of(link)?;
    if whole == Fate::Answered {
        return Ok(Path::Whole(link));
    }
    let mut too_big = link;
    while too_big - carries > 1 {
        let middle = carries.midpoint(too_big);
        if fate_of(middle)? == Fate::Answered {
            carries = middle;
        } else {
            too_big = middle;
        }
    }
    Ok(Path::Narrow {
        link,
        carries,
        told: whole == Fate::TooBig,
    })
}

/// Tries the way to an address. Blocking, at most some 20 s.
pub(super) fn try_path(netlink: &Netlink, to: IpAddr, ident: u16) -> Result<Path> {
    let decision = match netlink.lookup_route(to) {
        Ok(decision) => decision,
        Err(error) if error.is_unreachable() => return Ok(Path::NoRoute),
        Err(error) => return Err(error.into()),
    };
    if decision.kind == RouteKind::Local {
        return Ok(Path::Own);
    }
    let smallest = SMALLEST[usize::from(to.is_ipv6())];
    let device = match decision.oif {
        Some(index) => netlink.link_by_index(index)?,
        None => None,
    };
    let link = device.map_or(smallest, |device| device.mtu);
    let mut echo = Echo::open(to, ident)?;
    judge(link, smallest, |size| {
        let mut fate = Fate::Lost;
        for _ in 0..ATTEMPTS {
            fate = echo.send(size as usize, WAIT)?;
            if fate != Fate::Lost {
                break;
            }
        }
        Ok(fate)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_that_carries(carries: u32, link: u32, says: Fate) -> (Path, u32) {
        let mut asked = 0;
        let path = judge(link, 576, |size| {
            asked += 1;
            Ok(if size <= carries {
                Fate::Answered
            } else {
                says
            })
        });
        (path.expect("no I/O"), asked)
    }

    #[test]
    fn the_largest_packet_that_arrives_is_found_with_few_questions() {
        for (says, told) in [(Fate::Lost, false), (Fate::TooBig, true)] {
            for (carries, link) in [(576, 1500), (1280, 1500), (1499, 1500), (1500, 9000)] {
                let (path, asked) = path_that_carries(carries, link, says);
                assert_eq!(
                    path,
                    Path::Narrow {
                        link,
                        carries,
                        told
                    }
                );
                assert!(asked <= 16, "{asked}");
            }
        }
    }

    #[test]
    fn whole_and_silent_paths_are_known_at_once() {
        assert_eq!(
            path_that_carries(1500, 1500, Fate::Lost),
            (Path::Whole(1500), 2)
        );
        assert_eq!(path_that_carries(0, 1500, Fate::Lost), (Path::Silent, 1));
    }
}
