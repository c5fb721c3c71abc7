//! Names of the stored objects, as Calico forms them.

use cali_api::{Cidr, Key, Kind};

/// Kubernetes limits object names to 253 characters.
const MAX_NAME: usize = 253;

/// On a Node: its daemon keeps a journal of its addresses, so that the datastore alone does not say which are in use.
/// Nobody else may take them back while the Node exists.
pub const JOURNAL_ANNOTATION: &str = "projectcalico.org/address-journal";

/// `10.0.0.0/26` as `10-0-0-0-26`.
pub fn dashed(cidr: &Cidr) -> String {
    cidr.to_string().replace(['.', ':', '/'], "-")
}

/// The key of a block.
pub fn block(cidr: &Cidr) -> Key {
    Key::cluster(Kind::IPAMBlock, dashed(cidr))
}

/// The key of a node's affinity to a block. Names that would be too long are cut and get a digest.
pub fn affinity(node: &str, cidr: &Cidr) -> Key {
    let name = format!("{node}-{}", dashed(cidr));
    if name.len() < MAX_NAME {
        return Key::cluster(Kind::BlockAffinity, name);
    }
    let digest = digest(&name);
    let mut end = MAX_NAME - 1 - digest.len();
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    Key::cluster(Kind::BlockAffinity, format!("{}-{digest}", &name[..end]))
}

/// The key of a handle.
pub fn handle(handle: &str) -> Key {
    Key::cluster(Kind::IPAMHandle, sanitized_handle(handle))
}

/// Handles are stored in lower case.
pub fn sanitized_handle(handle: &str) -> String {
    handle.to_lowercase()
}

/// The one object with the settings of address management.
pub fn configuration() -> Key {
    Key::cluster(Kind::IPAMConfiguration, "default")
}

/// The handle of the addresses that a node holds ready.
pub fn reserve_handle(node: &str) -> String {
    sanitized_handle(&format!("cali-reserve-{node}"))
}

/// The first 11 hexadecimal digits of SHA-256.
fn digest(text: &str) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(text.as_bytes())
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .take(11)
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_named_as_calico_names_them() {
        let v4: Cidr = "10.244.1.0/26".parse().unwrap();
        let v6: Cidr = "fd00:1::/122".parse().unwrap();
        assert_eq!(&*block(&v4).name, "10-244-1-0-26");
        assert_eq!(&*block(&v6).name, "fd00-1---122");
        assert_eq!(&*affinity("node1", &v4).name, "node1-10-244-1-0-26");
        assert_eq!(&*handle("k8s-pod-network.ABC").name, "k8s-pod-network.abc");
    }

    #[test]
    fn long_names_are_cut_and_stay_apart() {
        let cidr: Cidr = "10.0.0.0/26".parse().unwrap();
        let node = "n".repeat(250);
        let (one, two) = (
            affinity(&format!("{node}1"), &cidr),
            affinity(&format!("{node}2"), &cidr),
        );
        assert!(one.name.len() <= 253);
        assert_ne!(one, two);
    }
}
