//! Generic netlink: a family's number by its name (`include/uapi/linux/genetlink.h`), and the header of its messages.

use crate::{
    error::Cause,
    socket::Socket,
    wire::{Attrs, NLM_F_REQUEST, Writer},
};

/// `GENL_ID_CTRL`.
const CONTROL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// `struct genlmsghdr`: command u8, version u8, reserved u16.
pub(crate) const HEADER: usize = 4;

/// Starts a message of a family; version 1 is the only one that any family here has.
pub(crate) fn begin(writer: &mut Writer, family: u16, command: u8, flags: u16, sequence: u32) {
    writer.begin(family, flags, sequence);
    writer.raw(&[command, 1, 0, 0]);
}

/// The number that the kernel gave to a family; `ENOENT` while no module has registered it.
pub(crate) fn family(socket: &mut Socket, name: &str) -> Result<u16, Cause> {
    socket.query(
        |writer, sequence| {
            begin(writer, CONTROL, CTRL_CMD_GETFAMILY, NLM_F_REQUEST, sequence);
            writer.text(CTRL_ATTR_FAMILY_NAME, name);
            writer.finish();
        },
        |message| {
            Attrs::after(message.payload, HEADER)
                .find(CTRL_ATTR_FAMILY_ID)?
                .get_u16()
        },
    )
}
