//! Names of the stored objects, as Calico forms them.

use cali_api::{Cidr, Key, Kind, v3};

/// On a Node: its daemon keeps a journal of its addresses, so that the datastore alone does not say which are in use.
/// Nobody else may take them back while the Node exists.
pub const JOURNAL_ANNOTATION: &str = "projectcalico.org/address-journal";

/// Calico's virtual node, whose blocks serve LoadBalancer services.
pub const LOAD_BALANCER: &str = "load-balancer";

/// `10.0.0.0/26` as `10-0-0-0-26`.
pub fn dashed(cidr: &Cidr) -> String {
    v3::block_name(cidr)
}

/// The key of a block.
pub fn block(cidr: &Cidr) -> Key {
    Key::cluster(Kind::IPAMBlock, dashed(cidr))
}

/// The key of a node's affinity to a block.
pub fn affinity(node: &str, cidr: &Cidr) -> Key {
    Key::cluster(Kind::BlockAffinity, v3::affinity_name(node, cidr))
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

/// The one object that says whether the datastore is locked.
pub fn cluster_information() -> Key {
    Key::cluster(Kind::ClusterInformation, "default")
}

/// The handle of the addresses that a node holds ready.
pub fn reserve_handle(node: &str) -> String {
    sanitized_handle(&format!("cali-reserve-{node}"))
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
