//! Routes in the kernel: how many there are, and how fast a program could write them that does nothing else.

use std::io::IoSlice;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cali_netlink::NetNs;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendmsg,
    socket,
};

use super::shape::Shape;

/// Least time between two looks at the kernel.
const LOOK: Duration = Duration::from_millis(10);
/// A look walks the whole table: so many times what it took passes until the next one, so that looking costs the one who
/// writes little.
const SPARING: u32 = 9;
/// Messages in one send. More of them make it no faster.
const BATCH: usize = 256;

/// Measures the time from now until there are so many routes in a namespace, to a tenth of it at a hundred thousand routes.
pub(super) fn watch(
    namespace: &NetNs,
    count: u32,
    limit: Duration,
) -> JoinHandle<Result<Duration>> {
    let (namespace, start) = (namespace.clone(), Instant::now());
    std::thread::spawn(move || {
        namespace.run(|| {
            loop {
                let look = Instant::now();
                let there = routes()?;
                if there >= count {
                    return Ok(start.elapsed());
                }
                ensure!(
                    start.elapsed() < limit,
                    "{there} of {count} routes are in the kernel"
                );
                std::thread::sleep(LOOK.max(look.elapsed() * SPARING));
            }
        })?
    })
}

/// IPv4 prefixes of the main table (`/proc/net/fib_triestat`, `net/ipv4/fib_trie.c`).
fn routes() -> Result<u32> {
    let text = std::fs::read_to_string("/proc/thread-self/net/fib_triestat")?;
    let line = text
        .lines()
        .skip_while(|l| !l.starts_with("Main:"))
        .find_map(|l| l.trim().strip_prefix("Prefixes:"));
    line.and_then(|l| l.trim().parse().ok())
        .context("no number of prefixes in fib_triestat")
}

const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE`: what a daemon has to say that may have been there before.
const FLAGS: u16 = 0x1 | 0x400 | 0x100;
const NLM_F_ACK: u16 = 0x4;

/// Writes all routes of the load in as few sends as possible, each answered once, and returns the time that it took, watched
/// as a daemon is. Messages are made beforehand.
pub(super) fn write(namespace: &NetNs, shape: &Shape, limit: Duration) -> Result<Duration> {
    namespace.run(|| {
        let device = nix::net::if_::if_nametoindex("bb0")?;
        let mut batches = Vec::new();
        let mut batch = Vec::new();
        for neighbour in &shape.neighbours {
            for number in neighbour.sends.clone() {
                let IpAddr::V4(destination) = shape.layout.prefix(number).addr() else {
                    bail!("only IPv4");
                };
                let last = batch.len() / MESSAGE == BATCH - 1 || number + 1 == shape.prefixes;
                let prefix = (destination.octets(), shape.layout.prefix(number).len());
                put(&mut batch, prefix, neighbour.id.octets(), device, last);
                if last {
                    batches.push(std::mem::take(&mut batch));
                }
            }
        }
        let watched = watch(namespace, shape.prefixes, limit);
        send_all(&batches)?;
        watched.join().map_err(|_| anyhow!("the watch failed"))?
    })?
}

fn send_all(batches: &[Vec<u8>]) -> Result<()> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let mut answer = [0; 8192];
    for batch in batches {
        let slices = [IoSlice::new(batch)];
        let kernel = NetlinkAddr::new(0, 0);
        sendmsg(
            fd.as_raw_fd(),
            &slices,
            &[],
            MsgFlags::empty(),
            Some(&kernel),
        )?;
        // The last message of a batch asks for an answer; an error before it would come first.
        let len = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let kind = u16::from_ne_bytes([answer[4], answer[5]]);
        let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        ensure!(
            len >= 20 && kind == NLMSG_ERROR && error == 0,
            "the kernel refused a route: {error}"
        );
    }
    Ok(())
}

/// Octets of one message.
const MESSAGE: usize = 16 + 12 + 3 * 8;

/// ```text
/// struct nlmsghdr (16) | struct rtmsg (12) | RTA_DST (8) | RTA_GATEWAY (8) | RTA_OIF (8)
/// ```
fn put(out: &mut Vec<u8>, (to, len): ([u8; 4], u8), via: [u8; 4], device: u32, last: bool) {
    let flags = if last { FLAGS | NLM_F_ACK } else { FLAGS };
    out.extend((MESSAGE as u32).to_ne_bytes());
    out.extend(RTM_NEWROUTE.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]);
    // AF_INET, no source, main table, RTPROT_STATIC, universe, RTN_UNICAST, no flags.
    out.extend([2, len, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0]);
    for (kind, value) in [(1_u16, to), (5, via), (4, device.to_ne_bytes())] {
        out.extend(8_u16.to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend(value);
    }
}
