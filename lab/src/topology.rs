//! The containerlab topology format, as far as a lab of namespaces can mean it.
//!
//! Unknown keys are errors with their place, except those that only matter to containers ([`IGNORED_NODE_KEYS`]).

use serde::Deserialize;
use serde_saphyr::Spanned;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Node keys of containerlab that have no meaning for namespaces and are accepted silently.
pub const IGNORED_NODE_KEYS: &[&str] = &[
    "auto-remove",
    "certificate",
    "config",
    "cpu",
    "cpu-set",
    "dns",
    "enforce-startup-config",
    "extras",
    "group",
    "healthcheck",
    "image-pull-policy",
    "license",
    "memory",
    "mgmt-ipv6",
    "network-mode",
    "ports",
    "position",
    "restart-policy",
    "runtime",
    "shm-size",
    "stages",
    "startup-config",
    "startup-delay",
    "sysctls",
    "type",
    "user",
    "wait-for",
];

/// A mistake in a topology file.
#[derive(Debug, thiserror::Error)]
#[error("{}:{line}:{column}: {message}", file.display())]
pub struct Error {
    pub file: PathBuf,
    pub line: u64,
    pub column: u64,
    pub message: String,
}

/// A topology, checked: every link names nodes that exist, every interface is used once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    pub name: String,
    /// Folder of the file; relative `binds` start here.
    pub folder: PathBuf,
    pub mgmt: Mgmt,
    /// In the order of their names.
    pub nodes: BTreeMap<String, Node>,
    pub links: Vec<Link>,
}

/// The management network: every node's `eth0`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mgmt {
    pub address: Ipv4Addr,
    pub prefix_len: u8,
}

/// What a node's image means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `cali/node`: `cali-node` and its child `bgpd`.
    CaliNode,
    /// `cali/typha`.
    CaliTypha,
    /// `cali/bgpd`: a router that runs `bgpd` alone, from `/etc/cali/bgpd.toml`.
    CaliBgpd,
    /// `frr`, from `/etc/frr/frr.conf`.
    Frr,
    /// `bird`, from `/etc/bird/bird.conf`.
    Bird,
    /// `gobgp`, from `/etc/gobgp/gobgpd.toml` (or `.conf`).
    Gobgp,
    /// Only its `exec` lines.
    Plain,
}

impl Role {
    /// The role that an image name stands for; registry, folder and tag do not matter for the peers' images.
    pub fn of_image(image: &str) -> Self {
        let untagged =
            image.rsplit_once(':').map_or(
                image,
                |(name, tag)| if tag.contains('/') { image } else { name },
            );
        let mut parts = untagged.rsplit('/');
        let last = parts.next().unwrap_or_default();
        match (parts.next(), last) {
            (Some("cali"), "node") => Self::CaliNode,
            (Some("cali"), "typha") => Self::CaliTypha,
            (Some("cali"), "bgpd") => Self::CaliBgpd,
            (_, "frr") => Self::Frr,
            (_, "bird" | "bird2" | "bird3") => Self::Bird,
            (_, "gobgp") => Self::Gobgp,
            _ => Self::Plain,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub image: String,
    pub role: Role,
    pub env: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    pub binds: Vec<Bind>,
    /// Program and arguments of each line, split as a shell would, but run without one.
    pub exec: Vec<Vec<String>>,
    pub mgmt_ipv4: Option<Ipv4Addr>,
}

impl Node {
    /// Where a path of the node is on the host, if it lies under one of its binds.
    pub fn host_path(&self, inside: &str) -> Option<PathBuf> {
        self.binds
            .iter()
            .filter_map(|bind| {
                Path::new(inside)
                    .strip_prefix(&bind.target)
                    .ok()
                    .map(|rest| (bind, rest))
            })
            .max_by_key(|(bind, _)| bind.target.len())
            .map(|(bind, rest)| {
                if rest.as_os_str().is_empty() {
                    bind.source.clone()
                } else {
                    bind.source.join(rest)
                }
            })
    }
}

/// `source:target[:options]`, the source made absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub source: PathBuf,
    pub target: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub ends: [End; 2],
    pub mtu: Option<u32>,
}

/// One end of a link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct End {
    pub node: String,
    pub interface: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawFile {
    name: Spanned<String>,
    #[serde(default, rename = "prefix")]
    _prefix: Option<String>,
    #[serde(default)]
    mgmt: Option<RawMgmt>,
    topology: RawTopology,
    #[serde(default, rename = "settings")]
    _settings: Option<serde_json::Value>,
    #[serde(default, rename = "debug")]
    _debug: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawMgmt {
    #[serde(default)]
    ipv4_subnet: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTopology {
    #[serde(default)]
    defaults: RawNode,
    #[serde(default)]
    kinds: BTreeMap<String, RawNode>,
    #[serde(default)]
    groups: BTreeMap<String, RawNode>,
    nodes: BTreeMap<String, Option<RawNode>>,
    #[serde(default)]
    links: Vec<RawLink>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(rename_all = "kebab-case")]
struct RawNode {
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    group: Option<String>,
    #[serde(default)]
    image: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    binds: Vec<Spanned<String>>,
    #[serde(default)]
    exec: Vec<Spanned<String>>,
    #[serde(default)]
    cmd: Option<String>,
    #[serde(default)]
    mgmt_ipv4: Option<Spanned<String>>,
    #[serde(flatten)]
    other: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLink {
    #[serde(default, rename = "type")]
    link_type: Option<Spanned<String>>,
    endpoints: Spanned<Vec<RawEnd>>,
    #[serde(default)]
    mtu: Option<u32>,
    #[serde(default, rename = "labels")]
    _labels: Option<serde_json::Value>,
    #[serde(default, rename = "vars")]
    _vars: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawEnd {
    Brief(String),
    Full {
        node: String,
        interface: String,
        #[serde(default, rename = "mac")]
        _mac: Option<String>,
    },
}

/// Reads and checks a topology file.
pub fn read(file: &Path) -> Result<Topology, Error> {
    let text = std::fs::read_to_string(file).map_err(|error| Error {
        file: file.to_owned(),
        line: 0,
        column: 0,
        message: format!("cannot read the file: {error}"),
    })?;
    parse(file, &text)
}

/// Checks a topology whose text is already at hand; `file` serves messages and relative binds.
pub fn parse(file: &Path, text: &str) -> Result<Topology, Error> {
    let source = Source { file, text };
    let raw: RawFile = serde_saphyr::from_str(text).map_err(|error| {
        let (line, column) = error
            .location()
            .map_or((0, 0), |place| (place.line(), place.column()));
        Error {
            file: file.to_owned(),
            line,
            column,
            message: first_line(&error.without_snippet().to_string()),
        }
    })?;
    let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let folder = absolute.parent().unwrap_or(Path::new("/")).to_owned();
    if !is_name(&raw.name.value, 20) {
        return Err(source.at(
            &raw.name,
            format!(
                "lab name {:?} is not 1 to 20 letters, digits or dashes",
                raw.name.value
            ),
        ));
    }
    let mgmt = source.mgmt(raw.mgmt.as_ref())?;
    let mut nodes = BTreeMap::new();
    for (name, own) in &raw.topology.nodes {
        let node = source.node(
            name,
            own.clone().unwrap_or_default(),
            &raw.topology,
            &folder,
        )?;
        nodes.insert(name.clone(), node);
    }
    if let Some((name, _)) = nodes.iter().find(|(name, _)| !is_name(name, 20)) {
        return Err(source.at_key(
            name,
            format!("node name {name:?} is not 1 to 20 letters, digits or dashes"),
        ));
    }
    let mut links = Vec::with_capacity(raw.topology.links.len());
    let mut used: BTreeMap<End, usize> = BTreeMap::new();
    for link in &raw.topology.links {
        let link_ = source.link(link, &nodes)?;
        for end in &link_.ends {
            if used.insert(end.clone(), links.len()).is_some() {
                return Err(source.at(
                    &link.endpoints,
                    format!("{}:{} is used by two links", end.node, end.interface),
                ));
            }
        }
        links.push(link_);
    }
    Ok(Topology {
        name: raw.name.value,
        folder,
        mgmt,
        nodes,
        links,
    })
}

/// The file at hand, for messages with a place.
struct Source<'a> {
    file: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn at<T>(&self, place: &Spanned<T>, message: String) -> Error {
        Error {
            file: self.file.to_owned(),
            line: place.referenced.line(),
            column: place.referenced.column(),
            message,
        }
    }

    /// For keys, whose place the parser does not keep: the first line that holds the key.
    fn at_key(&self, key: &str, message: String) -> Error {
        let found = self.text.lines().enumerate().find_map(|(index, line)| {
            let indent = line.len() - line.trim_start().len();
            let rest = line.trim_start().trim_start_matches(['"', '\'']);
            let after = rest.strip_prefix(key)?.trim_start_matches(['"', '\'']);
            after
                .trim_start()
                .starts_with(':')
                .then_some((index as u64 + 1, indent as u64 + 1))
        });
        let (line, column) = found.unwrap_or((0, 0));
        Error {
            file: self.file.to_owned(),
            line,
            column,
            message,
        }
    }

    fn mgmt(&self, raw: Option<&RawMgmt>) -> Result<Mgmt, Error> {
        let Some(subnet) = raw.and_then(|raw| raw.ipv4_subnet.as_ref()) else {
            // containerlab's own default.
            return Ok(Mgmt {
                address: Ipv4Addr::new(172, 20, 20, 0),
                prefix_len: 24,
            });
        };
        let parsed = subnet.value.split_once('/').and_then(|(address, len)| {
            Some((
                address.parse::<Ipv4Addr>().ok()?,
                len.parse::<u8>()
                    .ok()
                    .filter(|len| (8..=29).contains(len))?,
            ))
        });
        let Some((address, prefix_len)) = parsed else {
            return Err(self.at(
                subnet,
                format!(
                    "management subnet {:?} is not an IPv4 prefix of length 8 to 29",
                    subnet.value
                ),
            ));
        };
        let mask = u32::MAX << (32 - u32::from(prefix_len));
        Ok(Mgmt {
            address: Ipv4Addr::from(u32::from(address) & mask),
            prefix_len,
        })
    }

    fn node(
        &self,
        name: &str,
        own: RawNode,
        all: &RawTopology,
        folder: &Path,
    ) -> Result<Node, Error> {
        let kind = own
            .kind
            .clone()
            .or_else(|| all.defaults.kind.clone())
            .unwrap_or_else(|| "linux".to_owned());
        let nothing = RawNode::default();
        let of_kind = all.kinds.get(&kind).unwrap_or(&nothing);
        let of_group = own
            .group
            .as_ref()
            .and_then(|group| all.groups.get(group))
            .unwrap_or(&nothing);
        // containerlab's order of precedence: the node, its group, its kind, the defaults.
        let layers = [&all.defaults, of_kind, of_group, &own];
        for layer in layers {
            if let Some(key) = layer
                .other
                .keys()
                .find(|key| !IGNORED_NODE_KEYS.contains(&key.as_str()))
            {
                return Err(self.at_key(
                    key,
                    format!("unknown key {key:?} in the definition of node {name:?}"),
                ));
            }
        }
        let image = layers
            .iter()
            .rev()
            .find_map(|layer| layer.image.clone())
            .unwrap_or_default();
        let role = match kind.as_str() {
            "linux" => Role::of_image(&image),
            "bridge" => Role::Plain,
            other => {
                let message =
                    format!("node {name:?} is of kind {other:?}; the lab knows linux and bridge");
                return Err(self.at_key(name, message));
            }
        };
        let mut node = Node {
            name: name.to_owned(),
            image,
            role,
            env: BTreeMap::new(),
            labels: BTreeMap::new(),
            binds: Vec::new(),
            exec: Vec::new(),
            mgmt_ipv4: None,
        };
        for layer in layers {
            node.env.extend(layer.env.clone());
            node.labels.extend(layer.labels.clone());
            for bind in &layer.binds {
                node.binds.push(self.bind(bind, folder)?);
            }
            for line in &layer.exec {
                let words = split_words(&line.value).map_err(|reason| self.at(line, reason))?;
                node.exec.extend((!words.is_empty()).then_some(words));
            }
            if let Some(address) = &layer.mgmt_ipv4 {
                let parsed = address.value.parse();
                node.mgmt_ipv4 = Some(parsed.map_err(|_| {
                    self.at(
                        address,
                        format!("{:?} is not an IPv4 address", address.value),
                    )
                })?);
            }
        }
        if let Some(cmd) = own.cmd.filter(|_| role == Role::Plain) {
            let message =
                format!("node {name:?} has cmd {cmd:?}; a plain node runs only its exec lines");
            return Err(self.at_key("cmd", message));
        }
        Ok(node)
    }

    fn bind(&self, raw: &Spanned<String>, folder: &Path) -> Result<Bind, Error> {
        let mut parts = raw.value.split(':');
        match (parts.next(), parts.next()) {
            (Some(source), Some(target)) if !source.is_empty() && target.starts_with('/') => {
                Ok(Bind {
                    source: folder.join(source),
                    target: target.to_owned(),
                })
            }
            _ => Err(self.at(
                raw,
                format!(
                    "bind {:?} is not source:target[:options] with an absolute target",
                    raw.value
                ),
            )),
        }
    }

    fn link(&self, raw: &RawLink, nodes: &BTreeMap<String, Node>) -> Result<Link, Error> {
        if let Some(link_type) = raw
            .link_type
            .as_ref()
            .filter(|link_type| link_type.value != "veth")
        {
            return Err(self.at(
                link_type,
                format!(
                    "link type {:?} is not supported; the lab knows veth",
                    link_type.value
                ),
            ));
        }
        let mut ends = Vec::with_capacity(2);
        for end in &raw.endpoints.value {
            let end = match end {
                RawEnd::Full {
                    node, interface, ..
                } => End {
                    node: node.clone(),
                    interface: interface.clone(),
                },
                RawEnd::Brief(text) => match text.split_once(':') {
                    Some((node, interface)) => End {
                        node: node.to_owned(),
                        interface: interface.to_owned(),
                    },
                    None => {
                        return Err(self.at(
                            &raw.endpoints,
                            format!("endpoint {text:?} is not node:interface"),
                        ));
                    }
                },
            };
            if !nodes.contains_key(&end.node) {
                let known: Vec<&str> = nodes.keys().map(String::as_str).collect();
                let message = format!(
                    "link endpoint names node {:?}, which is not in the topology (nodes: {})",
                    end.node,
                    known.join(", ")
                );
                return Err(self.at(&raw.endpoints, message));
            }
            if end.interface == "eth0" {
                return Err(self.at(
                    &raw.endpoints,
                    format!(
                        "{}:eth0 is the management interface; links start at eth1",
                        end.node
                    ),
                ));
            }
            // IFNAMSIZ less the final zero, `include/uapi/linux/if.h`.
            if end.interface.is_empty() || end.interface.len() > 15 {
                return Err(self.at(
                    &raw.endpoints,
                    format!(
                        "interface name {:?} is not 1 to 15 characters",
                        end.interface
                    ),
                ));
            }
            ends.push(end);
        }
        let count = ends.len();
        let ends: [End; 2] = ends.try_into().map_err(|_| {
            self.at(
                &raw.endpoints,
                format!("a link has two endpoints, this one has {count}"),
            )
        })?;
        Ok(Link { ends, mtu: raw.mtu })
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn is_name(name: &str, longest: usize) -> bool {
    !name.is_empty()
        && name.len() <= longest
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !name.starts_with('-')
}

/// Splits a line into words as a shell does with quotes and backslashes, and nothing else of a shell.
fn split_words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (Some('"') | None, '\\') => {
                let next = characters
                    .next()
                    .ok_or_else(|| format!("{line:?} ends in a backslash"))?;
                word.get_or_insert_default().push(next);
            }
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None, space) if space.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(character),
        }
    }
    if let Some(open) = quote {
        return Err(format!("{line:?} has an opening {open} without its end"));
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<Topology, Error> {
        parse(Path::new("/lab/test.clab.yml"), text)
    }

    #[test]
    fn the_mesh_of_the_readme_parses() {
        let file = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../deploy/containerlab/mesh.clab.yml"
        ));
        let topology = read(file).unwrap();
        assert_eq!(topology.name, "mesh");
        assert_eq!(topology.nodes["node1"].role, Role::CaliNode);
        assert_eq!(topology.nodes["router"].role, Role::CaliBgpd);
        assert_eq!(topology.nodes["rack-a"].role, Role::Plain);
        assert_eq!(topology.links.len(), 4);
        assert_eq!(
            topology.nodes["node1"]
                .host_path("/var/lib/cali-datastore/cali.db")
                .unwrap(),
            Path::new("/var/lib/cali-lab/mesh/datastore/cali.db")
        );
    }

    #[test]
    fn an_unknown_node_in_a_link_is_refused_with_its_line() {
        let error = parse_text("name: t\ntopology:\n  nodes:\n    a:\n      kind: linux\n  links:\n    - endpoints: [\"a:eth1\", \"b:eth1\"]\n").unwrap_err();
        assert_eq!(error.line, 7, "{error}");
        assert!(error.to_string().contains("\"b\""), "{error}");
        assert!(
            error.to_string().starts_with("/lab/test.clab.yml:7:"),
            "{error}"
        );
    }

    #[test]
    fn an_interface_used_twice_is_refused() {
        let error = parse_text("name: t\ntopology:\n  nodes: {a: , b: }\n  links:\n  - endpoints: [a:eth1, b:eth1]\n  - endpoints: [a:eth1, b:eth2]\n").unwrap_err();
        assert!(error.to_string().contains("two links"), "{error}");
        assert_eq!(error.line, 6, "{error}");
    }

    #[test]
    fn an_unknown_key_is_refused_by_name_and_place() {
        let error =
            parse_text("name: t\ntopology:\n  nodes:\n    a:\n      imagee: x\n").unwrap_err();
        assert!(error.to_string().contains("imagee"), "{error}");
        assert_eq!(error.line, 5, "{error}");
        let error = parse_text("name: t\ntopology:\n  nodes: {}\n  linkz: []\n").unwrap_err();
        assert!(error.to_string().contains("linkz"), "{error}");
        assert_eq!(error.line, 4, "{error}");
    }

    #[test]
    fn kinds_and_defaults_are_inherited_and_overridden() {
        let topology = parse_text("name: t\ntopology:\n  defaults: {env: {A: 1, B: x}}\n  kinds: {linux: {image: 'frr:10'}}\n  nodes:\n    a: {env: {B: y}}\n    b: {image: cali/node}\n").unwrap();
        assert_eq!(topology.nodes["a"].env["A"], "1");
        assert_eq!(topology.nodes["a"].env["B"], "y");
        assert_eq!(topology.nodes["a"].role, Role::Frr);
        assert_eq!(topology.nodes["b"].role, Role::CaliNode);
    }

    #[test]
    fn image_names_keep_their_role_with_registry_and_tag() {
        assert_eq!(
            Role::of_image("registry.example:5000/cali/node:v1"),
            Role::CaliNode
        );
        assert_eq!(Role::of_image("quay.io/frrouting/frr:10.1.0"), Role::Frr);
        assert_eq!(Role::of_image("alpine"), Role::Plain);
    }

    #[test]
    fn words_are_split_as_a_shell_does() {
        assert_eq!(
            split_words(r#"sh -c 'a "b" c' d\ e "f g""#).unwrap(),
            ["sh", "-c", "a \"b\" c", "d e", "f g"]
        );
        assert!(split_words("sh -c 'open").is_err());
    }
}
