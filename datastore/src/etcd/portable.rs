//! Objects as etcd keys and values, without an etcd: the form in which Calico's export of a datastore holds addresses. Pure.

use cali_api::AnyResource;
use serde_json::Value;

use super::layout;
use crate::error::Error;
use crate::stored;

/// The key and the value of an object; `None` where Calico's layout has no place for it.
pub fn entry(object: &AnyResource) -> Option<(String, Value)> {
    let key = object.key();
    let json = object.to_json();
    let path = layout::path_of(&key, &json)?;
    Some((path, layout::encode(key.kind, json)))
}

/// The object of a key and a value; `None` if the key is none of Calico's.
pub fn object(path: &str, value: Value) -> Option<Result<AnyResource, Error>> {
    let located = layout::locate(path)?;
    let json = layout::decode(&located, value);
    Some(stored::from_value(&located.key, json))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_calico_exports_is_read_and_written_alike() {
        for (path, value) in [
            (
                "/calico/ipam/v2/host/n1/ipv4/block/10.0.0.0-26",
                json!({"state": "confirmed", "deleted": false}),
            ),
            (
                "/calico/ipam/v2/handle/k8s-pod-network.1",
                json!({"block": {"10.0.0.0/26": 1}, "deleted": false}),
            ),
            (
                "/calico/ipam/v2/config",
                json!({"strict_affinity": false, "auto_allocate_blocks": true}),
            ),
        ] {
            let found = object(path, value.clone())
                .expect("one of Calico's")
                .expect("readable");
            assert_eq!(entry(&found), Some((path.to_owned(), value)));
        }
        assert!(object("/registry/pods/a", json!({})).is_none());
        let broken = object("/calico/ipam/v2/handle/x", json!({"block": 1}));
        assert!(
            matches!(broken, Some(Err(Error::Undecodable { .. }))),
            "{broken:?}"
        );
    }
}
