//! What is to exist for a topology: namespaces, cables, addresses, programs. Pure; [`crate::bring_up`] makes it so.

use crate::topology::{Node, Role, Topology};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Where labs keep their folders; `CALI_LAB_DIR` moves it.
pub const DEFAULT_ROOT: &str = "/var/lib/cali-lab";

/// Everything that a lab consists of, in the order in which it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub lab: String,
    /// The lab's own folder.
    pub folder: PathBuf,
    /// Namespace that holds the management bridge and nothing else.
    pub mgmt_namespace: String,
    /// By node name.
    pub nodes: BTreeMap<String, PlannedNode>,
    pub cables: Vec<Cable>,
    pub processes: Vec<Process>,
    /// Folders of manifests to apply to the datastore before the programs start, and the datastore's environment.
    pub manifests: Vec<PathBuf>,
    pub datastore_env: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedNode {
    pub namespace: String,
    pub mgmt_address: Ipv4Addr,
    pub mgmt_prefix_len: u8,
    /// Commands to run once, after the cables are in.
    pub exec: Vec<Vec<String>>,
    /// Folders that must exist before a program starts.
    pub folders: Vec<PathBuf>,
    /// Files that must exist before a program starts, with their content.
    #[serde(default)]
    pub files: BTreeMap<PathBuf, String>,
    /// Environment of programs started in this node (also of `calictl lab exec`).
    pub env: BTreeMap<String, String>,
    /// Runs a `cali-node`, so pods can be placed on it.
    pub hosts_pods: bool,
}

/// A veth pair between two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cable {
    pub ends: [CableEnd; 2],
    pub mtu: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CableEnd {
    pub namespace: String,
    pub interface: String,
}

/// A program that the lab's supervisor keeps running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Unique in the lab, for example `node1/cali-node`.
    pub name: String,
    pub namespace: String,
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub log: PathBuf,
    /// Files that it finds in other places than the host has them.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// It is started once this file exists: the socket of another program that it uses.
    #[serde(default)]
    pub after: Option<PathBuf>,
}

/// A file of the host, and where a program finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub source: PathBuf,
    pub target: String,
}

/// Why a topology cannot be run here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("node {node} needs {path} (bind a file to it)")]
    MissingBind { node: String, path: &'static str },
    #[error("the management network has no address left for node {node}")]
    MgmtFull { node: String },
    #[error(
        "management address {address} of node {node} is taken, or outside the management network"
    )]
    MgmtAddress { node: String, address: Ipv4Addr },
    #[error(
        "node {node} runs {daemon}, which is not unpacked under {folder}; run `scripts/peers {daemon}`"
    )]
    MissingPeer {
        node: String,
        daemon: &'static str,
        folder: PathBuf,
    },
}

/// Where programs are found.
#[derive(Debug, Clone)]
pub struct Places {
    /// Parent of all labs' folders.
    pub root: PathBuf,
    /// Folder of our own executables.
    pub programs: PathBuf,
    /// Folder under which the peers' packages are unpacked, one folder each (`bird2`, `frr`, `gobgpd`).
    pub peers: PathBuf,
}

/// Name of the network namespace of a pod.
pub fn pod_namespace(lab: &str, namespace: &str, name: &str) -> String {
    format!("{lab}_{namespace}_{name}")
}

/// Decides what is to exist.
pub fn plan(topology: &Topology, places: &Places) -> Result<Plan, Error> {
    let folder = places.root.join(&topology.name);
    let addresses = mgmt_addresses(topology)?;
    let mut plan = Plan {
        lab: topology.name.clone(),
        folder: folder.clone(),
        mgmt_namespace: format!("{}_mgmt", topology.name),
        nodes: BTreeMap::new(),
        cables: Vec::new(),
        processes: Vec::new(),
        manifests: Vec::new(),
        datastore_env: BTreeMap::new(),
    };
    for (name, node) in &topology.nodes {
        let home = folder.join(name);
        let planned = PlannedNode {
            namespace: namespace(topology, name),
            mgmt_address: addresses[name],
            mgmt_prefix_len: topology.mgmt.prefix_len,
            exec: node.exec.clone(),
            folders: folders(node, &home),
            files: files(node, &home),
            env: environment(node, &home),
            hosts_pods: node.role == Role::CaliNode,
        };
        plan.processes
            .extend(processes(node, &planned, &home, places)?);
        if let Some(path) = node.labels.get(MANIFESTS_LABEL) {
            plan.manifests.push(topology.folder.join(path));
            plan.datastore_env = datastore_env(&planned.env);
        }
        plan.nodes.insert(name.clone(), planned);
    }
    // The cache starts before its clients: nothing breaks otherwise, but the first connection succeeds at once.
    plan.processes
        .sort_by_key(|process| !process.name.ends_with("/typha"));
    plan.cables = topology
        .links
        .iter()
        .map(|link| Cable {
            ends: link.ends.clone().map(|end| CableEnd {
                namespace: namespace(topology, &end.node),
                interface: end.interface,
            }),
            mtu: link.mtu,
        })
        .collect();
    Ok(plan)
}

/// A label on any node: a folder of manifests, relative to the topology, that the lab applies.
pub const MANIFESTS_LABEL: &str = "cali.lab/manifests";

fn namespace(topology: &Topology, node: &str) -> String {
    format!("{}_{node}", topology.name)
}

fn mgmt_addresses(topology: &Topology) -> Result<BTreeMap<String, Ipv4Addr>, Error> {
    let first = u32::from(topology.mgmt.address);
    // Without the network itself, the bridge (first) and the broadcast address.
    let usable = first + 2..first + (1 << (32 - u32::from(topology.mgmt.prefix_len))) - 1;
    let mut taken = BTreeMap::new();
    for (name, node) in &topology.nodes {
        if let Some(address) = node.mgmt_ipv4 {
            let free = usable.contains(&u32::from(address))
                && !taken.values().any(|other| *other == address);
            if !free {
                return Err(Error::MgmtAddress {
                    node: name.clone(),
                    address,
                });
            }
            taken.insert(name.clone(), address);
        }
    }
    for name in topology.nodes.keys() {
        if !taken.contains_key(name) {
            let free = usable
                .clone()
                .map(Ipv4Addr::from)
                .find(|address| !taken.values().any(|other| other == address));
            taken.insert(
                name.clone(),
                free.ok_or_else(|| Error::MgmtFull { node: name.clone() })?,
            );
        }
    }
    Ok(taken)
}

/// Values that are paths inside the node become the paths on the host that its binds say.
fn environment(node: &Node, home: &Path) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = node
        .env
        .iter()
        .map(|(key, value)| {
            let moved = value
                .starts_with('/')
                .then(|| node.host_path(value))
                .flatten();
            (
                key.clone(),
                moved.map_or_else(|| value.clone(), |path| path.display().to_string()),
            )
        })
        .collect();
    env.insert("NODENAME".to_owned(), node.name.clone());
    env.insert(
        "CALI_RUN_DIR".to_owned(),
        home.join("run").display().to_string(),
    );
    env.insert(
        "CALI_STATE_DIR".to_owned(),
        home.join("lib").display().to_string(),
    );
    env
}

fn datastore_env(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let wanted = [
        "DATASTORE_TYPE",
        "CALI_SQLITE_PATH",
        "ETCD_ENDPOINTS",
        "KUBECONFIG",
    ];
    env.iter()
        .filter(|(key, _)| wanted.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn folders(node: &Node, home: &Path) -> Vec<PathBuf> {
    let mut folders = vec![home.join("run"), home.join("lib"), home.join("log")];
    if let Some(parent) = node
        .env
        .get("CALI_SQLITE_PATH")
        .and_then(|path| node.host_path(path))
        .as_deref()
        .and_then(Path::parent)
    {
        folders.push(parent.to_owned());
    }
    folders
}

/// Files of the peers' programs that no topology binds.
fn files(node: &Node, home: &Path) -> BTreeMap<PathBuf, String> {
    let files = match node.role {
        // FRR insists on the group that the package's installation would have made.
        Role::Frr => vec![
            ("frr-group", "root:x:0:\nfrrvty:x:59999:root\n"),
            ("frr-zebra.conf", ""),
        ],
        _ => Vec::new(),
    };
    files
        .into_iter()
        .map(|(name, text)| (home.join("lib").join(name), text.to_owned()))
        .collect()
}

impl Role {
    /// The unpacked package that it needs.
    fn peer(self) -> Option<&'static str> {
        match self {
            Self::Bird => Some("bird2"),
            Self::Gobgp => Some("gobgpd"),
            Self::Frr => Some("frr"),
            Self::CaliNode | Self::CaliTypha | Self::CaliBgpd | Self::Plain => None,
        }
    }
}

/// Packages that the topology's routers need and that are not unpacked.
#[must_use]
pub fn missing_peers(topology: &Topology, places: &Places) -> BTreeSet<&'static str> {
    let needed = topology.nodes.values().filter_map(|node| node.role.peer());
    needed
        .filter(|daemon| !peer_program(places, daemon).exists())
        .collect()
}

/// Unpacked packages bring their own libraries; `run` starts a program with them.
fn peer_program(places: &Places, daemon: &str) -> PathBuf {
    places.peers.join(daemon).join("run")
}

/// What a node runs, in the order in which it starts.
fn processes(
    node: &Node,
    planned: &PlannedNode,
    home: &Path,
    places: &Places,
) -> Result<Vec<Process>, Error> {
    let bound = |path: &'static str| {
        let file = node.host_path(path).ok_or(Error::MissingBind {
            node: node.name.clone(),
            path,
        })?;
        Ok::<_, Error>(file.display().to_string())
    };
    let run = |file: &str| home.join("run").join(file).display().to_string();
    let own = |file: &str| home.join("lib").join(file);
    let start = |short: &str, program: PathBuf, args: &[&str]| Process {
        name: format!("{}/{short}", node.name),
        namespace: planned.namespace.clone(),
        log: home.join("log").join(format!("{short}.log")),
        program,
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: planned.env.clone(),
        mounts: Vec::new(),
        after: None,
    };
    let ours = |name: &str, args: &[&str]| start(name, places.programs.join(name), args);
    if let Some(daemon) = node.role.peer()
        && !peer_program(places, daemon).exists()
    {
        return Err(Error::MissingPeer {
            node: node.name.clone(),
            daemon,
            folder: places.peers.clone(),
        });
    }
    let peer = |short: &str, args: &[&str]| {
        let daemon = node.role.peer().unwrap_or_default();
        start(short, peer_program(places, daemon), args)
    };
    Ok(match node.role {
        Role::Plain => vec![],
        Role::CaliNode => vec![ours("cali-node", &[])],
        Role::CaliTypha => vec![ours("typha", &[])],
        Role::CaliBgpd => vec![ours("bgpd", &["--config", &bound("/etc/cali/bgpd.toml")?])],
        Role::Bird => {
            let (file, control, pid) = (
                bound("/etc/bird/bird.conf")?,
                run("bird.ctl"),
                run("bird.pid"),
            );
            let args = [
                "usr/sbin/bird",
                "-f",
                "-c",
                &file,
                "-s",
                &control,
                "-P",
                &pid,
            ];
            vec![peer("bird", &args)]
        }
        Role::Gobgp => {
            let file = bound("/etc/gobgp/gobgpd.toml")?;
            let api = format!("unix://{}", run("gobgp.sock"));
            let args = ["usr/bin/gobgpd", "-f", &file, "--api-hosts", &api];
            vec![peer("gobgpd", &args)]
        }
        Role::Frr => {
            let daemon = |name: &str, file: &str| {
                let (program, pid) = (
                    format!("usr/lib/frr/{name}"),
                    run(&format!("frr-{name}.pid")),
                );
                let (zebra, terminal) = (run("zserv.api"), run(""));
                let mut process = peer(
                    &format!("frr-{name}"),
                    &[
                        &program,
                        "-f",
                        file,
                        "-i",
                        &pid,
                        "-z",
                        &zebra,
                        "--vty_socket",
                        &terminal,
                        "-P",
                        "0",
                        "-u",
                        "root",
                        "-g",
                        "root",
                        "--log",
                        "stdout",
                    ],
                );
                process.mounts.push(Mount {
                    source: own("frr-group"),
                    target: "/etc/group".to_owned(),
                });
                process
            };
            let zebra = daemon("zebra", &own("frr-zebra.conf").display().to_string());
            // A bgpd that does not find zebra asks again after ten seconds only.
            let bgpd = Process {
                after: Some(home.join("run/zserv.api")),
                ..daemon("bgpd", &bound("/etc/frr/frr.conf")?)
            };
            vec![zebra, bgpd]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology;

    fn places() -> Places {
        Places {
            root: "/lab".into(),
            programs: "/bin".into(),
            peers: "/nowhere".into(),
        }
    }

    fn plan_text(text: &str) -> Result<Plan, Error> {
        plan(
            &topology::parse(Path::new("/t/x.clab.yml"), text).unwrap(),
            &places(),
        )
    }

    #[test]
    fn frr_is_zebra_and_then_bgpd_with_a_group_file_of_their_own() {
        let peers = tempfile::tempdir().unwrap();
        std::fs::create_dir(peers.path().join("frr")).unwrap();
        std::fs::write(peers.path().join("frr/run"), "").unwrap();
        let text = "name: x\ntopology:\n  nodes:\n    r:\n      kind: linux\n      image: quay.io/frrouting/frr:8.4.2\n      \
                    binds: [\"frr.conf:/etc/frr/frr.conf\"]\n";
        let topology = topology::parse(Path::new("/t/x.clab.yml"), text).unwrap();
        let places = Places {
            peers: peers.path().to_owned(),
            ..places()
        };
        assert!(missing_peers(&topology, &places).is_empty());
        let plan = plan(&topology, &places).unwrap();
        let [zebra, bgpd] = &plan.processes[..] else {
            panic!("{:?}", plan.processes);
        };
        assert_eq!(
            (zebra.name.as_str(), bgpd.name.as_str()),
            ("r/frr-zebra", "r/frr-bgpd")
        );
        assert_eq!(
            bgpd.after.as_deref(),
            Some(Path::new("/lab/x/r/run/zserv.api"))
        );
        assert!(bgpd.args.contains(&"/t/frr.conf".to_owned()));
        assert!(plan.nodes["r"].files.contains_key(&zebra.mounts[0].source));
    }

    #[test]
    fn a_router_whose_package_is_not_unpacked_is_refused_with_the_command_that_helps() {
        let text = "name: x\ntopology:\n  nodes:\n    r:\n      kind: linux\n      image: bird\n      \
                    binds: [\"bird.conf:/etc/bird/bird.conf\"]\n";
        let topology = topology::parse(Path::new("/t/x.clab.yml"), text).unwrap();
        assert_eq!(missing_peers(&topology, &places()), ["bird2"].into());
        let error = plan_text(text).unwrap_err().to_string();
        assert!(error.ends_with("run `scripts/peers bird2`"), "{error}");
    }

    #[test]
    fn the_mesh_starts_typha_first_and_three_nodes() {
        let file = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../deploy/containerlab/mesh.clab.yml"
        ));
        let plan = plan(&topology::read(file).unwrap(), &places()).unwrap();
        let names: Vec<&str> = plan
            .processes
            .iter()
            .map(|process| process.name.as_str())
            .collect();
        assert_eq!(
            names,
            [
                "typha/typha",
                "node1/cali-node",
                "node2/cali-node",
                "node3/cali-node",
                "router/bgpd"
            ]
        );
        assert_eq!(
            plan.nodes["typha"].mgmt_address,
            Ipv4Addr::new(172, 20, 20, 10)
        );
        assert_eq!(
            plan.nodes["node1"].env["CALI_SQLITE_PATH"],
            "/var/lib/cali-lab/mesh/datastore/cali.db"
        );
        assert_eq!(plan.datastore_env["DATASTORE_TYPE"], "sqlite");
        assert!(plan.processes[4].args[1].ends_with("deploy/containerlab/mesh/router.toml"));
    }

    #[test]
    fn management_addresses_are_given_once() {
        let plan = plan_text("name: t\nmgmt: {ipv4-subnet: 10.9.0.0/29}\ntopology: {nodes: {a: , b: {mgmt-ipv4: 10.9.0.2}, c: }}\n").unwrap();
        let mut addresses: Vec<Ipv4Addr> =
            plan.nodes.values().map(|node| node.mgmt_address).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 3);
    }

    #[test]
    fn a_full_management_network_is_refused() {
        let error = plan_text("name: t\nmgmt: {ipv4-subnet: 10.9.0.0/29}\ntopology: {nodes: {a: , b: , c: , d: , e: , f: }}\n").unwrap_err();
        assert!(matches!(error, Error::MgmtFull { .. }), "{error}");
    }

    #[test]
    fn a_router_without_its_file_is_refused() {
        let error = plan_text("name: t\ntopology: {nodes: {r: {image: cali/bgpd}}}\n").unwrap_err();
        assert_eq!(
            error,
            Error::MissingBind {
                node: "r".into(),
                path: "/etc/cali/bgpd.toml"
            }
        );
    }
}
