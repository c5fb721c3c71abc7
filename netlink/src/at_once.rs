//! Changes of links and addresses that the calling thread asks of the kernel itself, instead of over a runtime
//! ([`crate::link_change`]): for a sequence of changes that somebody waits for, where every turn of the runtime between two of
//! them is time lost. They block for as long as the kernel takes, so they are no work for a thread of the runtime.

use nix::errno::Errno;
use rtnetlink::packet_core::Emitable as _;
use rtnetlink::packet_route::link::LinkMessage;

use crate::{
    Address, Change, IfIndex, LinkChange, Netlink, NewLink, NewLinkKind,
    error::{Error, Result},
    link_change::{change_message, check_name, new_link_message},
    rtnl::{ADD, RTM_NEWLINK, link},
    wire::{NLM_F_ACK, NLM_F_REQUEST, Writer},
};

fn write_link(writer: &mut Writer, message: &LinkMessage, flags: u16, sequence: u32) {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    writer.begin(RTM_NEWLINK, flags, sequence);
    writer.raw(&bytes);
    writer.finish();
}

impl Netlink {
    /// Sends what `write` writes, with the sequence number that it is given.
    fn at_once(
        &self,
        operation: &'static str,
        object: impl FnOnce() -> String,
        write: impl Fn(&mut Writer, u32),
    ) -> Result<()> {
        let done = self.socket().batch(1, |writer, _, sequence| {
            write(writer, sequence);
            Ok(())
        });
        match done.into_iter().next() {
            Some(Err(cause)) => Err(Error::new(operation, object(), cause)),
            _ => Ok(()),
        }
    }

    /// Makes a device, and returns its index. The far end of a pair stays down.
    pub fn add_link_at_once(&self, new: &NewLink) -> Result<IfIndex> {
        check_name(new)?;
        let object = || format!("link {}", new.name);
        if matches!(&new.kind, NewLinkKind::Veth(peer) if peer.up) {
            return Err(Error::invalid(
                "add",
                object(),
                "the far end cannot be up at once",
            ));
        }
        let message = new_link_message(new);
        self.at_once("add", object, |writer, sequence| {
            write_link(writer, &message, ADD, sequence);
        })?;
        self.link_by_name(&new.name)?
            .map(|made| made.index)
            .ok_or_else(|| Error::errno("add", object(), Errno::ENODEV))
    }

    /// Changes a device.
    pub fn change_link_at_once(&self, index: IfIndex, change: &LinkChange) -> Result<()> {
        let message = change_message(index, change);
        let object = || format!("link #{index}");
        self.at_once("change", object, |writer, sequence| {
            write_link(writer, &message, NLM_F_REQUEST | NLM_F_ACK, sequence);
        })
    }

    /// Removes a device.
    pub fn delete_link_at_once(&self, index: IfIndex) -> Result<()> {
        let object = || format!("link #{index}");
        self.at_once("delete", object, |writer, sequence| {
            link::write_removal(writer, index, sequence);
        })
    }

    /// Changes addresses in order; one result each.
    pub fn apply_addresses(&self, changes: &[Change<Address>]) -> Vec<Result<()>> {
        self.apply(changes, link::write_address)
    }
}
