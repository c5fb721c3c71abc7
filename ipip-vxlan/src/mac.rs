//! MAC addresses of VXLAN tunnel endpoints.

use cali_netlink::MacAddr;
use sha1::{Digest, Sha1};

/// The MAC address that a node's tunnel endpoint has when its Node resource names none: `66` followed by
/// the first five bytes of SHA-1 over the node name (with `-v6` appended for IPv6), as Calico derives it.
#[must_use]
pub fn vtep_mac(node: &str, v6: bool) -> MacAddr {
    let mut hash = Sha1::new();
    hash.update(node.as_bytes());
    if v6 {
        hash.update(b"-v6");
    }
    let digest = hash.finalize();
    MacAddr([0x66, digest[0], digest[1], digest[2], digest[3], digest[4]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_mac_is_f_then_sha1_of_the_name() {
        // `printf abc | sha1sum` prints a9993e3647...
        assert_eq!(
            vtep_mac("abc", false).0[..6],
            [0x66, 0xa9, 0x99, 0x3e, 0x36, 0x47]
        );
        assert_ne!(vtep_mac("abc", false), vtep_mac("abc", true));
    }
}
