//! Calico's etcdv3 layout: where an object lies and how its value is written. Pure.
//!
//! | object | key | value |
//! |---|---|---|
//! | `projectcalico.org/v3` kinds | `/calico/resources/v3/projectcalico.org/<plural>[/<namespace>]/<name>` | the object |
//! | IPAM block | `/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26` | its specification |
//! | block affinity | `/calico/ipam/v2/host/<node>/ipv4/block/10.0.0.0-26` (or `virtual/`) | `state`, `deleted` |
//! | handle | `/calico/ipam/v2/handle/<id>` | `block`, `deleted` |
//! | IPAM settings | `/calico/ipam/v2/config` | one object, in older spelling |
//! | native Kubernetes kinds (ours: Calico mirrors what it needs of them) | `/calico/resources/v3/kubernetes/<plural>[/<namespace>]/<name>` | the object |
//!
//! (libcalico-go, `lib/backend/model`.) The IPAM values carry no metadata: these objects have a name and a revision, but
//! no labels, `uid` or creation time.

use cali_api::v3::{affinity_name, block_name};
use cali_api::{Cidr, Key, Kind};
use serde_json::{Map, Value, json};

const RESOURCES: &str = "/calico/resources/v3/projectcalico.org/";
const NATIVE: &str = "/calico/resources/v3/kubernetes/";
const BLOCKS: &str = "/calico/ipam/v2/assignment/";
const HOSTS: &str = "/calico/ipam/v2/host/";
const VIRTUAL: &str = "/calico/ipam/v2/virtual/";
const HANDLES: &str = "/calico/ipam/v2/handle/";
const CONFIG: &str = "/calico/ipam/v2/config";
/// The one object of the kind has this name.
const CONFIG_NAME: &str = "default";

/// Settings whose spelling in etcd differs: there, and in the resource.
const RESPELLED: [(&str, &str); 2] = [
    ("strict_affinity", "strictAffinity"),
    ("auto_allocate_blocks", "autoAllocateBlocks"),
];

/// A range of keys, `start` included, `end` not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: String,
    pub(super) end: String,
}

impl Range {
    fn prefix(prefix: &str) -> Self {
        Self {
            start: prefix.to_owned(),
            end: after(prefix),
        }
    }

    /// The smallest range that covers both.
    fn join(self, other: Self) -> Self {
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }
}

/// The first key behind all that begin with `prefix`, which ends with an ASCII character below `~`.
fn after(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    let last = end.pop().map_or('0', |last| (last as u8 + 1) as char);
    end.push(last);
    end
}

/// The keys of a kind's objects. Other kinds' keys can lie between them.
pub(super) fn range(kind: Kind, namespace: Option<&str>) -> Range {
    match kind {
        Kind::IPAMBlock => Range::prefix(BLOCKS),
        // "host/" to "virtual/": nothing of Calico's lies between.
        Kind::BlockAffinity => Range::prefix(HOSTS).join(Range::prefix(VIRTUAL)),
        Kind::IPAMHandle => Range::prefix(HANDLES),
        Kind::IPAMConfiguration => Range {
            start: CONFIG.to_owned(),
            end: format!("{CONFIG}\0"),
        },
        _ => match namespace {
            Some(namespace) => Range::prefix(&format!("{}{namespace}/", folder(kind))),
            None => Range::prefix(&folder(kind)),
        },
    }
}

/// The keys of several kinds' objects.
pub(super) fn range_of_all(kinds: &[Kind]) -> Option<Range> {
    kinds
        .iter()
        .map(|kind| range(*kind, None))
        .reduce(Range::join)
}

fn folder(kind: Kind) -> String {
    let root = if kind.is_native() { NATIVE } else { RESOURCES };
    format!("{root}{}/", kind.plural())
}

/// The etcd keys under which the object may lie. More than one only for affinities, whose names do not tell where the
/// node's name ends; none if no object of the kind can have such a name.
pub(super) fn paths(key: &Key) -> Vec<String> {
    match key.kind {
        Kind::IPAMBlock => undashed(&key.name)
            .map(|cidr| block_path(&cidr))
            .into_iter()
            .collect(),
        Kind::BlockAffinity => owners(&key.name)
            .flat_map(|(node, cidr)| [HOSTS, VIRTUAL].map(|root| affinity_path(root, node, &cidr)))
            .collect(),
        Kind::IPAMHandle => vec![format!("{HANDLES}{}", key.name)],
        Kind::IPAMConfiguration if &*key.name == CONFIG_NAME => vec![CONFIG.to_owned()],
        Kind::IPAMConfiguration => Vec::new(),
        _ => vec![match &key.namespace {
            Some(namespace) => format!("{}{namespace}/{}", folder(key.kind), key.name),
            None => format!("{}{}", folder(key.kind), key.name),
        }],
    }
}

/// The etcd key under which this object is to be written.
pub(super) fn path_of(key: &Key, object: &Value) -> Option<String> {
    if key.kind != Kind::BlockAffinity {
        return paths(key).into_iter().next();
    }
    let text = |name: &str| object.pointer(&format!("/spec/{name}"))?.as_str();
    let root = if text("type") == Some("virtual") {
        VIRTUAL
    } else {
        HOSTS
    };
    Some(affinity_path(
        root,
        text("node")?,
        &text("cidr")?.parse().ok()?,
    ))
}

fn with_dash(cidr: &Cidr) -> String {
    cidr.to_string().replace('/', "-")
}

fn family(cidr: &Cidr) -> &'static str {
    if cidr.to_string().contains(':') {
        "ipv6"
    } else {
        "ipv4"
    }
}

fn block_path(cidr: &Cidr) -> String {
    format!("{BLOCKS}{}/block/{}", family(cidr), with_dash(cidr))
}

fn affinity_path(root: &str, node: &str, cidr: &Cidr) -> String {
    format!("{root}{node}/{}/block/{}", family(cidr), with_dash(cidr))
}

/// `10-0-0-0-26` as `10.0.0.0/26`; the inverse of [`block_name`].
fn undashed(name: &str) -> Option<Cidr> {
    let (address, length) = name.rsplit_once('-')?;
    let [v4, v6] = [".", ":"].map(|mark| format!("{}/{length}", address.replace('-', mark)));
    v4.parse().or_else(|_| v6.parse()).ok()
}

/// Each way to read an affinity's name as a node and a block.
fn owners(name: &str) -> impl Iterator<Item = (&str, Cidr)> {
    name.match_indices('-').filter_map(|(at, _)| {
        let (node, block) = (&name[..at], &name[at + 1..]);
        (!node.is_empty()).then_some(())?;
        undashed(block).map(|cidr| (node, cidr))
    })
}

/// Which object lies at an etcd key, and what its key says beyond its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Located {
    pub(super) key: Key,
    /// Node, block, and whether the owner is virtual.
    affinity: Option<(String, Cidr, bool)>,
}

/// The object at an etcd key; `None` if the key is not one of ours.
pub(super) fn locate(path: &str) -> Option<Located> {
    let plain = |key| {
        Some(Located {
            key,
            affinity: None,
        })
    };
    if path == CONFIG {
        return plain(Key::cluster(Kind::IPAMConfiguration, CONFIG_NAME));
    }
    if let Some(id) = path.strip_prefix(HANDLES) {
        return plain(Key::cluster(Kind::IPAMHandle, id));
    }
    if let Some(rest) = path.strip_prefix(BLOCKS) {
        let cidr = block_in(rest)?.1;
        return plain(Key::cluster(Kind::IPAMBlock, block_name(&cidr)));
    }
    for (root, is_virtual) in [(HOSTS, false), (VIRTUAL, true)] {
        if let Some(rest) = path.strip_prefix(root) {
            let (node, rest) = rest.split_once('/')?;
            let cidr = block_in(rest)?.1;
            return Some(Located {
                key: Key::cluster(Kind::BlockAffinity, affinity_name(node, &cidr)),
                affinity: Some((node.to_owned(), cidr, is_virtual)),
            });
        }
    }
    for (root, native) in [(RESOURCES, false), (NATIVE, true)] {
        if let Some(rest) = path.strip_prefix(root) {
            let (plural, rest) = rest.split_once('/')?;
            let kind = Kind::ALL
                .iter()
                .copied()
                .find(|kind| kind.is_native() == native && kind.plural() == plural)?;
            return plain(match (kind.is_namespaced(), rest.split_once('/')) {
                (true, Some((namespace, name))) => Key::namespaced(kind, namespace, name),
                (false, None) => Key::cluster(kind, rest),
                _ => return None,
            });
        }
    }
    None
}

/// `ipv4/block/10.0.0.0-26`.
fn block_in(rest: &str) -> Option<(&str, Cidr)> {
    let (family, block) = rest.split_once("/block/")?;
    let (address, length) = block.rsplit_once('-')?;
    Some((family, format!("{address}/{length}").parse().ok()?))
}

/// The value that is written for an object, given as its JSON.
pub(super) fn encode(kind: Kind, mut object: Value) -> Value {
    let spec = object.get_mut("spec").map_or(Value::Null, Value::take);
    match kind {
        Kind::IPAMBlock => spec,
        Kind::BlockAffinity => json!({
            "state": spec.get("state").cloned().unwrap_or_else(|| json!("confirmed")),
            "deleted": spec.get("deleted").cloned().unwrap_or(json!(false)),
        }),
        Kind::IPAMHandle => json!({
            "block": spec.get("block").cloned().unwrap_or_else(|| json!({})),
            "deleted": spec.get("deleted").cloned().unwrap_or(json!(false)),
        }),
        Kind::IPAMConfiguration => {
            let mut config = respell(spec, |(there, here)| (here, there));
            // Absent it would be read as false, here and by Go.
            if let Some(fields) = config.as_object_mut() {
                fields
                    .entry("auto_allocate_blocks")
                    .or_insert(Value::Bool(true));
            }
            config
        }
        _ => {
            if let Some(slot) = object.get_mut("spec") {
                *slot = spec;
            }
            object
        }
    }
}

fn respell(
    spec: Value,
    direction: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Value {
    let Value::Object(mut fields) = spec else {
        return json!({});
    };
    for pair in RESPELLED {
        let (from, to) = direction(pair);
        if let Some(value) = fields.remove(from) {
            fields.insert(to.to_owned(), value);
        }
    }
    Value::Object(fields)
}

/// The JSON of the object whose value was found at a place. The inverse of [`encode`].
pub(super) fn decode(located: &Located, value: Value) -> Value {
    let kind = located.key.kind;
    let spec = match kind {
        Kind::IPAMBlock => block_spec(value),
        Kind::BlockAffinity => {
            let mut spec = value;
            if let (Value::Object(fields), Some((node, cidr, is_virtual))) =
                (&mut spec, &located.affinity)
            {
                fields.insert("node".to_owned(), json!(node));
                fields.insert("cidr".to_owned(), json!(cidr.to_string()));
                let owner = if *is_virtual { "virtual" } else { "host" };
                fields.insert("type".to_owned(), json!(owner));
            }
            spec
        }
        Kind::IPAMHandle => {
            let mut spec = value;
            if let Value::Object(fields) = &mut spec {
                fields.insert("handleID".to_owned(), json!(&*located.key.name));
            }
            spec
        }
        Kind::IPAMConfiguration => {
            let mut spec = respell(value, |pair| pair);
            // Go leaves out what is false; the resource takes an absent value as true.
            spec.as_object_mut().map(|fields| {
                fields
                    .entry("autoAllocateBlocks")
                    .or_insert(Value::Bool(false))
            });
            spec
        }
        _ => return value,
    };
    json!({
        "apiVersion": kind.api_version(), "kind": kind.name(),
        "metadata": {"name": &*located.key.name}, "spec": spec,
    })
}

/// Blocks of old versions name their node in a field of its own.
fn block_spec(mut value: Value) -> Value {
    if let Value::Object(fields) = &mut value
        && let Some(host) = fields.remove("hostAffinity")
        && fields.get("affinity").is_none_or(Value::is_null)
        && let Some(host) = host.as_str().filter(|host| !host.is_empty())
    {
        fields.insert("affinity".to_owned(), json!(format!("host:{host}")));
    }
    value
}

/// Whether objects of the kind are stored with their metadata.
pub(super) fn keeps_metadata(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::IPAMBlock | Kind::BlockAffinity | Kind::IPAMHandle | Kind::IPAMConfiguration
    )
}

/// Removes the metadata that a kind cannot keep, so that a reader sees what the next one will see.
pub(super) fn strip_metadata(kind: Kind, object: &mut Value) {
    if keeps_metadata(kind) {
        return;
    }
    let name = object.pointer("/metadata/name").cloned();
    let mut metadata = Map::new();
    if let Some(name) = name {
        metadata.insert("name".to_owned(), name);
    }
    object["metadata"] = Value::Object(metadata);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_of(text: &str) -> Key {
        Key::cluster(Kind::IPAMBlock, block_name(&text.parse().unwrap()))
    }

    #[test]
    fn objects_lie_where_calico_puts_them() {
        for (key, path) in [
            (
                Key::cluster(Kind::IPPool, "p"),
                "/calico/resources/v3/projectcalico.org/ippools/p",
            ),
            (
                Key::namespaced(Kind::NetworkPolicy, "ns", "default.web"),
                "/calico/resources/v3/projectcalico.org/networkpolicies/ns/default.web",
            ),
            (
                block_of("10.0.0.0/26"),
                "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26",
            ),
            (
                block_of("fd00:1::/122"),
                "/calico/ipam/v2/assignment/ipv6/block/fd00:1::-122",
            ),
            (
                block_of("1:2::4:0/112"),
                "/calico/ipam/v2/assignment/ipv6/block/1:2::4:0-112",
            ),
            (
                Key::cluster(Kind::IPAMHandle, "k8s-pod-network.1"),
                "/calico/ipam/v2/handle/k8s-pod-network.1",
            ),
            (
                Key::cluster(Kind::IPAMConfiguration, "default"),
                "/calico/ipam/v2/config",
            ),
            (
                Key::cluster(Kind::K8sNode, "n1"),
                "/calico/resources/v3/kubernetes/nodes/n1",
            ),
        ] {
            assert_eq!(paths(&key), [path]);
            assert_eq!(locate(path).unwrap().key, key);
            let range = range(key.kind, key.namespace.as_deref());
            assert!(
                range.start.as_str() <= path && path < range.end.as_str(),
                "{range:?} {path}"
            );
        }
        assert!(paths(&Key::cluster(Kind::IPAMBlock, "nonsense")).is_empty());
        assert_eq!(
            locate("/calico/resources/v3/projectcalico.org/ippools/a/b"),
            None
        );
        assert_eq!(locate("/registry/pods/a/b"), None);
    }

    #[test]
    fn affinities_are_found_by_name_whatever_the_node_is_called() {
        for (node, cidr) in [
            ("node-1", "10.0.0.0/26"),
            ("10-0-0-1", "10.0.0.64/26"),
            ("abc", "fd00:1::/122"),
            ("n1.example.org", "fd00::/122"),
        ] {
            let cidr: Cidr = cidr.parse().unwrap();
            let key = Key::cluster(Kind::BlockAffinity, affinity_name(node, &cidr));
            let path = affinity_path(HOSTS, node, &cidr);
            assert!(
                paths(&key).contains(&path),
                "{path} among {:?}",
                paths(&key)
            );
            assert_eq!(locate(&path).unwrap().key, key);
        }
    }

    #[test]
    fn values_are_calicos() {
        let affinity = json!({
            "apiVersion": "projectcalico.org/v3", "kind": "BlockAffinity", "metadata": {"name": "n1-10-0-0-0-26"},
            "spec": {"state": "pending", "node": "n1", "cidr": "10.0.0.0/26"}
        });
        let key = Key::cluster(Kind::BlockAffinity, "n1-10-0-0-0-26");
        let path = path_of(&key, &affinity).unwrap();
        assert_eq!(path, "/calico/ipam/v2/host/n1/ipv4/block/10.0.0.0-26");
        let value = encode(Kind::BlockAffinity, affinity.clone());
        assert_eq!(value, json!({"state": "pending", "deleted": false}));
        let back = decode(&locate(&path).unwrap(), value);
        assert_eq!(back["spec"]["node"], "n1");
        assert_eq!(back["spec"]["cidr"], "10.0.0.0/26");

        let config = locate(CONFIG).unwrap();
        let read = decode(&config, json!({"strict_affinity": true}));
        assert_eq!(
            read["spec"],
            json!({"strictAffinity": true, "autoAllocateBlocks": false})
        );
        assert_eq!(
            encode(Kind::IPAMConfiguration, read),
            json!({"strict_affinity": true, "auto_allocate_blocks": false})
        );

        let unsaid = json!({"apiVersion": "projectcalico.org/v3", "kind": "IPAMConfiguration",
            "metadata": {"name": "default"}, "spec": {"strictAffinity": true}});
        assert_eq!(
            encode(Kind::IPAMConfiguration, unsaid),
            json!({"strict_affinity": true, "auto_allocate_blocks": true})
        );

        let block = locate("/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-26").unwrap();
        let old = json!({"cidr": "10.0.0.0/26", "affinity": null, "hostAffinity": "n1"});
        assert_eq!(decode(&block, old)["spec"]["affinity"], "host:n1");
    }
}
