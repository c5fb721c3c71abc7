//! Removal of many devices at once.
//!
//! For every removal the kernel waits until no processor uses the device any more, tens of milliseconds, and lets nobody else
//! change devices meanwhile. Devices of one group that are removed by one request have one such wait together
//! (`rtnl_group_dellink`, `net/core/rtnetlink.c`).

use crate::{
    IfIndex, NetNs, Netlink,
    error::{Cause, Error, Result},
    rtnl::link,
    socket::Socket,
};
use nix::sys::socket::SockProtocol;

/// The group of the devices that are to go. Nobody else has a reason to use this number, and where somebody does, devices are
/// removed one by one.
const LEAVING: u32 = 0x4361_6c69;

/// Removes devices of one namespace, on a socket of its own: nobody waits for it who wants something else.
#[derive(Debug)]
pub struct LinkRemover {
    netlink: Netlink,
    socket: Socket,
}

impl LinkRemover {
    /// Opens the socket inside `netns`.
    pub fn open(netns: &NetNs) -> Result<Self> {
        Ok(Self {
            netlink: Netlink::open(netns)?,
            socket: netns.run(|| Socket::open(SockProtocol::NetlinkRoute))??,
        })
    }

    /// Removes these devices; says of each whether it was there.
    pub fn remove(&mut self, devices: &[IfIndex]) -> Vec<Result<bool>> {
        let mut results: Vec<Option<Result<bool>>> = vec![None; devices.len()];
        if devices.len() > 1 {
            self.remove_together(devices, &mut results);
        }
        let left: Vec<IfIndex> = devices
            .iter()
            .zip(&results)
            .filter_map(|(index, result)| result.is_none().then_some(*index))
            .collect();
        let mut one_by_one = self
            .socket
            .batch(left.len(), |writer, at, sequence| {
                link::write_removal(writer, left[at], sequence);
                Ok(())
            })
            .into_iter()
            .zip(&left)
            .map(|(result, index)| was_there(*index, result));
        results
            .into_iter()
            .map(|result| result.or_else(|| one_by_one.next()).unwrap_or(Ok(false)))
            .collect()
    }

    /// What this does not get done is left without a result.
    fn remove_together(&mut self, devices: &[IfIndex], results: &mut [Option<Result<bool>>]) {
        let grouped = self.socket.batch(devices.len(), |writer, at, sequence| {
            link::write_group(writer, devices[at], LEAVING, sequence);
            Ok(())
        });
        for ((result, grouped), index) in results.iter_mut().zip(grouped).zip(devices) {
            if let Ok(false) = was_there(*index, grouped) {
                *result = Some(Ok(false));
            }
        }
        let alone = self.netlink.dump_links().is_ok_and(|links| {
            let mut group = links.iter().filter(|link| link.group == LEAVING);
            group.all(|link| devices.contains(&link.index))
        });
        if !alone {
            return;
        }
        let removed = self.socket.batch(1, |writer, _, sequence| {
            link::write_group_removal(writer, LEAVING, sequence);
            Ok(())
        });
        if let Some(Ok(())) = removed.first() {
            for result in results {
                result.get_or_insert(Ok(true));
            }
        }
    }
}

fn was_there(index: IfIndex, result: Result<(), Cause>) -> Result<bool> {
    match result.map_err(|cause| Error::new("delete", format!("link #{index}"), cause)) {
        Ok(()) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}
