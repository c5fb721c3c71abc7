//! The definitions of Calico's kinds for the Kubernetes API server (`CustomResourceDefinition`), made from the types that
//! read manifests ([`probe`]) and a table of rules in CEL ([`rules`]). Pure.
//!
//! Two groups: `projectcalico.org/v3`, and `crd.projectcalico.org/v1`, which Calico's own manifests install. Node, Profile
//! and WorkloadEndpoint have none: in Kubernetes they are views of its own objects.
//! What a schema does not check: selectors and other texts with a grammar; writers check those (`crate::validate`).

mod probe;
mod rules;

use serde_json::{Map, Value, json};

use self::probe::{Found, Shape, Step};
pub(crate) use self::probe::{Probe, Stop};
use crate::Kind;
use crate::any::{probe_spec, probe_status};

/// The group of a definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// `projectcalico.org/v3`.
    V3,
    /// `crd.projectcalico.org/v1`.
    V1,
}

impl Group {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V3, Self::V1];

    /// Group and version.
    #[must_use]
    pub const fn parts(self) -> (&'static str, &'static str) {
        match self {
            Self::V3 => ("projectcalico.org", "v3"),
            Self::V1 => ("crd.projectcalico.org", "v1"),
        }
    }
}

/// The kinds that have a definition.
pub fn defined() -> impl Iterator<Item = Kind> {
    let views = [Kind::Node, Kind::Profile, Kind::WorkloadEndpoint];
    Kind::ALL
        .iter()
        .copied()
        .filter(move |kind| !kind.is_native() && !views.contains(kind))
}

/// Short names, without those that Kubernetes' own kinds have.
fn short_names(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::BGPConfiguration => &["bgpconfig", "bgpconfigs"],
        Kind::BlockAffinity => &["affinity", "affinities"],
        Kind::ClusterInformation => &["clusterinfo", "clusterinfos"],
        Kind::FelixConfiguration => &["felixconfig", "felixconfigs"],
        Kind::GlobalNetworkPolicy => &["gnp", "cgnp"],
        Kind::GlobalNetworkSet => &["gns"],
        Kind::HostEndpoint => &["hep", "heps"],
        Kind::IPAMConfiguration => &["ipamconfig"],
        Kind::KubeControllersConfiguration => &["kcc", "kccs"],
        Kind::NetworkPolicy => &["cnp", "caliconetworkpolicy"],
        Kind::StagedGlobalNetworkPolicy => &["sgnp"],
        Kind::StagedKubernetesNetworkPolicy => &["sknp"],
        Kind::StagedNetworkPolicy => &["scnp", "snp"],
        _ => &[],
    }
}

/// The definition of a kind.
#[must_use]
pub fn definition(kind: Kind, group: Group) -> Value {
    let (group_name, version) = group.parts();
    let (name, plural) = match (kind, group) {
        (Kind::IPAMConfiguration, Group::V1) => ("IPAMConfig", "ipamconfigs"),
        _ => (kind.name(), kind.plural()),
    };
    let singular = name.to_ascii_lowercase();
    let mut names = json!({"kind": name, "listKind": format!("{name}List"), "plural": plural, "singular": singular});
    let short: Vec<&str> = short_names(kind)
        .iter()
        .copied()
        .filter(|short| group == Group::V3 && *short != singular)
        .collect();
    if !short.is_empty() {
        names["shortNames"] = json!(short);
    }
    let status = Tree {
        kind,
        group,
        part: "status",
    }
    .schema();
    let mut properties = json!({
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": Tree { kind, group, part: "spec" }.schema(),
    });
    let mut served = json!({"name": version, "served": true, "storage": true});
    if status["properties"]
        .as_object()
        .is_some_and(|fields| !fields.is_empty())
    {
        properties["status"] = status;
        // Calico's internal definitions keep the status in the object.
        if group == Group::V3 {
            served["subresources"] = json!({"status": {}});
        }
    }
    let mut whole = json!({"type": "object", "properties": properties});
    if !whole["properties"]["spec"]["required"].is_null() {
        whole["required"] = json!(["spec"]);
    }
    rules::add(kind, "", &mut whole);
    served["schema"] = json!({"openAPIV3Schema": whole});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{group_name}")},
        "spec": {
            "group": group_name,
            "names": names,
            "scope": if kind.is_namespaced() { "Namespaced" } else { "Cluster" },
            "versions": [served],
        },
    })
}

/// All definitions of a group as one file for `kubectl apply --server-side`.
///
/// # Panics
/// Never: what is written is plain JSON.
#[must_use]
pub fn manifest(group: Group) -> String {
    let (name, version) = group.parts();
    let mut text = format!(
        "# The resources of {name}/{version}, made from Cali's types; `cargo test -p cali-api --test crds` compares,\n# CALI_UPDATE=1 rewrites.\n"
    );
    for kind in defined() {
        text.push_str("---\n");
        let document =
            serde_saphyr::to_string(&definition(kind, group)).expect("plain JSON is YAML");
        text.push_str(document.trim_end());
        text.push('\n');
    }
    text
}

/// The specification or the status of a kind.
struct Tree {
    kind: Kind,
    group: Group,
    part: &'static str,
}

impl Tree {
    fn schema(&self) -> Value {
        self.at(&mut Vec::new(), self.part)
    }

    fn probe(&self, path: &[Step]) -> (Option<Found>, Result<(), Stop>) {
        let mut found = None;
        let probe = Probe::new(path, &mut found);
        let result = match self.part {
            "spec" => probe_spec(self.kind, probe),
            _ => probe_status(self.kind, probe),
        };
        (found, result)
    }

    /// The schema of what lies at `path`; `name` is the path as rules write it.
    fn at(&self, path: &mut Vec<Step>, name: &str) -> Value {
        let Some(found) = self.probe(path).0 else {
            return json!({"x-kubernetes-preserve-unknown-fields": true});
        };
        let mut schema = match found.shape {
            Shape::Bool => json!({"type": "boolean"}),
            Shape::Number => json!({"type": "number"}),
            Shape::Integer(least, most) => integer(least, most),
            Shape::Enum(texts) => json!({"type": "string", "enum": texts}),
            Shape::Text(expected) => text(&expected),
            // Read as either; which one is written depends on the group.
            Shape::Any if name.ends_with(".deleted") => {
                json!({"type": if self.group == Group::V1 { "string" } else { "boolean" }})
            }
            Shape::Any => json!({"x-kubernetes-int-or-string": true}),
            Shape::List => {
                path.push(Step::Item);
                let items = self.at(path, &format!("{name}[]"));
                path.pop();
                json!({"type": "array", "items": items})
            }
            Shape::Map => {
                path.push(Step::Value);
                let values = self.at(path, &format!("{name}{{}}"));
                path.pop();
                json!({"type": "object", "additionalProperties": values})
            }
            Shape::Struct(fields) => self.structure(path, name, fields),
        };
        let in_list = matches!(path.last(), Some(Step::Item));
        if found.optional && in_list {
            schema["nullable"] = json!(true);
        }
        rules::add(self.kind, name, &mut schema);
        schema
    }

    fn structure(
        &self,
        path: &mut Vec<Step>,
        name: &str,
        fields: &'static [&'static str],
    ) -> Value {
        let mut properties = Map::new();
        for field in fields
            .iter()
            .copied()
            .filter(|field| !rules::is_alias(field))
        {
            path.push(Step::Field(field));
            properties.insert(field.to_owned(), self.at(path, &format!("{name}.{field}")));
            path.pop();
        }
        let mut schema = json!({"type": "object", "properties": properties});
        // serde names the first field that it cannot do without.
        if let Some(field) = self.probe(path).0.and_then(|found| found.missing) {
            schema["required"] = json!([field]);
        }
        schema
    }
}

fn integer(least: i64, most: Option<i64>) -> Value {
    let fits = most.is_some_and(|most| most <= i64::from(i32::MAX)) && least >= i64::from(i32::MIN);
    let format = if fits { "int32" } else { "int64" };
    let mut schema = json!({"type": "integer", "format": format});
    if least == 0 {
        schema["minimum"] = json!(0);
    }
    if let Some(most) = most.filter(|most| *most <= i64::from(u32::MAX)) {
        schema["maximum"] = json!(most);
    }
    schema
}

/// A text; types that are enumerations say so in what they expect.
fn text(expected: &str) -> Value {
    match expected.strip_prefix("one of ") {
        Some(texts) => json!({"type": "string", "enum": texts.split(' ').collect::<Vec<_>>()}),
        None if expected.contains("string") => json!({"type": "string"}),
        None => json!({"type": "string", "description": expected}),
    }
}
