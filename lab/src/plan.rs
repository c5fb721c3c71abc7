//! What is to exist for a topology: namespaces, cables, addresses, programs. Pure; [`crate::bring_up`] makes it so.

use crate::topology::{Node, Role, Topology};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
    #[error("node {node} runs {daemon}, which is not unpacked under {folder}; run `make peers`")]
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
            env: environment(node, &home),
            hosts_pods: node.role == Role::CaliNode,
        };
        plan.processes
            .extend(process(node, &planned, &home, places)?);
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

fn process(
    node: &Node,
    planned: &PlannedNode,
    home: &Path,
    places: &Places,
) -> Result<Option<Process>, Error> {
    let ours = |name: &str| places.programs.join(name);
    let bound = |path: &'static str| {
        let file = node.host_path(path).ok_or(Error::MissingBind {
            node: node.name.clone(),
            path,
        })?;
        Ok::<_, Error>(file.display().to_string())
    };
    let run = |file: &str| home.join("run").join(file).display().to_string();
    // Unpacked packages bring their own libraries; `run` starts a program with them.
    let peer = |daemon: &'static str| {
        let program = places.peers.join(daemon).join("run");
        match program.exists() {
            true => Ok(program),
            false => Err(Error::MissingPeer {
                node: node.name.clone(),
                daemon,
                folder: places.peers.clone(),
            }),
        }
    };
    let (program, args) = match node.role {
        Role::Plain => return Ok(None),
        Role::CaliNode => (ours("cali-node"), vec![]),
        Role::CaliTypha => (ours("typha"), vec![]),
        Role::CaliBgpd => (
            ours("bgpd"),
            vec!["--config".to_owned(), bound("/etc/cali/bgpd.toml")?],
        ),
        Role::Bird => {
            let args = [
                "usr/sbin/bird",
                "-f",
                "-c",
                &bound("/etc/bird/bird.conf")?,
                "-s",
                &run("bird.ctl"),
            ]
            .map(str::to_owned);
            (peer("bird2")?, args.to_vec())
        }
        Role::Gobgp => {
            let args = [
                "usr/bin/gobgpd",
                "-f",
                &bound("/etc/gobgp/gobgpd.toml")?,
                "--api-hosts",
                &format!("unix://{}", run("gobgp.sock")),
            ];
            (peer("gobgpd")?, args.map(str::to_owned).to_vec())
        }
        Role::Frr => {
            // bgpd of FRR alone: the lab's routers forward with what the topology's exec lines set up.
            let args = [
                "usr/lib/frr/bgpd",
                "-n",
                "-f",
                &bound("/etc/frr/frr.conf")?,
                "-i",
                &run("frr-bgpd.pid"),
                "--vty_socket",
                &run(""),
            ];
            (peer("frr")?, args.map(str::to_owned).to_vec())
        }
    };
    let short = match node.role {
        Role::Bird => "bird".to_owned(),
        Role::Gobgp => "gobgpd".to_owned(),
        Role::Frr => "frr-bgpd".to_owned(),
        _ => program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
    };
    Ok(Some(Process {
        name: format!("{}/{short}", node.name),
        namespace: planned.namespace.clone(),
        log: home.join("log").join(format!("{short}.log")),
        program,
        args,
        env: planned.env.clone(),
    }))
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
