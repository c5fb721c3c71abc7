//! Makes a [`Plan`] so: namespaces, the management network, cables, `exec` lines. Every step looks first, so that a
//! second run changes nothing.

use crate::plan::{Cable, Plan, PlannedNode};
use crate::state::{Folder, Pid};
use cali_netlink::{
    Address, IpNetwork, LinkChange, NetNs, Netlink, NewLink, NewLinkKind, VethPeer,
};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Name of the bridge in the management namespace.
const MGMT_BRIDGE: &str = "mgmt";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation}")]
    Io {
        operation: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Kernel(#[from] cali_netlink::Error),
    #[error("node {node}: `{command}` failed: {output}")]
    Exec {
        node: String,
        command: String,
        output: String,
    },
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Host(Vec<cali_netlink::probe::Missing>),
    #[error("the supervisor of lab {lab} did not start; see {log}")]
    Supervisor { lab: String, log: String },
}

fn io_error(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let operation = operation.into();
    move |source| Error::Io { operation, source }
}

/// Whether this host can run a lab; said before anything is tried, everything that is missing at once.
pub fn check_host() -> Result<(), Error> {
    let needs = cali_netlink::probe::lab_needs();
    let missing: Vec<_> = needs.into_iter().filter_map(Result::err).collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Error::Host(missing))
    }
}

/// Creates the folders, files and namespaces that are missing. Returns how many namespaces were made.
pub async fn namespaces(plan: &Plan) -> Result<usize, Error> {
    let mut made = 0;
    for folder in plan.nodes.values().flat_map(|node| &node.folders) {
        std::fs::create_dir_all(folder)
            .map_err(io_error(format!("create {}", folder.display())))?;
    }
    for (file, text) in plan.nodes.values().flat_map(|node| &node.files) {
        std::fs::write(file, text).map_err(io_error(format!("write {}", file.display())))?;
    }
    let names = plan
        .nodes
        .values()
        .map(|node| node.namespace.as_str())
        .chain([plan.mgmt_namespace.as_str()]);
    for name in names {
        if NetNs::open(name).is_err() {
            NetNs::create(name)?;
            made += 1;
        }
        let netlink = Netlink::open(&NetNs::open(name)?)?;
        set_up(&netlink, "lo").await?;
    }
    Ok(made)
}

/// A veth whose peer does not exist yet cannot be up (`veth_open` answers ENOTCONN), so the far end is brought up from
/// its own side, afterwards.
const FAR_END_UP: bool = false;

/// The management network: a bridge in a namespace of its own, `eth0` in every node.
pub async fn management(plan: &Plan) -> Result<(), Error> {
    let mgmt = Netlink::open(&NetNs::open(&plan.mgmt_namespace)?)?;
    if mgmt.link_by_name(MGMT_BRIDGE)?.is_none() {
        mgmt.add_link(&NewLink::new(MGMT_BRIDGE, NewLinkKind::Bridge))
            .await?;
    }
    let Some(bridge) = mgmt.link_by_name(MGMT_BRIDGE)? else {
        return Err(io_error("find the management bridge")(
            io::ErrorKind::NotFound.into(),
        ));
    };
    for (position, (name, node)) in plan.nodes.iter().enumerate() {
        let namespace = NetNs::open(&node.namespace)?;
        let netlink = Netlink::open(&namespace)?;
        if netlink.link_by_name("eth0")?.is_none() {
            let end = VethPeer {
                name: "eth0".to_owned(),
                mac: None,
                mtu: None,
                netns: Some(namespace.fd()),
                up: FAR_END_UP,
            };
            let mut pair = NewLink::new(format!("m{position}"), NewLinkKind::Veth(end));
            pair.master = Some(bridge.index);
            mgmt.add_link(&pair).await?;
            set_up(&netlink, "eth0").await?;
        }
        assign(&netlink, name, node).await?;
    }
    Ok(())
}

async fn assign(netlink: &Netlink, name: &str, node: &PlannedNode) -> Result<(), Error> {
    let invalid = |error| io_error(format!("address node {name}"))(io::Error::other(error));
    let address =
        IpNetwork::new(node.mgmt_address.into(), node.mgmt_prefix_len).map_err(invalid)?;
    let Some(eth0) = netlink.link_by_name("eth0")? else {
        return Err(io_error(format!("find eth0 of node {name}"))(
            io::ErrorKind::NotFound.into(),
        ));
    };
    let addresses = netlink.dump_addresses(Some(eth0.index))?;
    if !addresses
        .iter()
        .any(|known| known.ifindex == eth0.index && known.address == address)
    {
        netlink
            .add_address(&Address::new(eth0.index, address))
            .await?;
    }
    Ok(())
}

/// The cables of the topology.
pub async fn cables(plan: &Plan) -> Result<usize, Error> {
    let mut made = 0;
    for cable in &plan.cables {
        made += usize::from(lay(cable).await?);
    }
    Ok(made)
}

async fn lay(cable: &Cable) -> Result<bool, Error> {
    let [a, b] = &cable.ends;
    let here = Netlink::open(&NetNs::open(&a.namespace)?)?;
    let there = NetNs::open(&b.namespace)?;
    if here.link_by_name(&a.interface)?.is_some()
        && Netlink::open(&there)?.link_by_name(&b.interface)?.is_some()
    {
        return Ok(false);
    }
    let end = VethPeer {
        name: b.interface.clone(),
        mac: None,
        mtu: cable.mtu,
        netns: Some(there.fd()),
        up: FAR_END_UP,
    };
    let mut pair = NewLink::new(&a.interface, NewLinkKind::Veth(end));
    pair.mtu = cable.mtu;
    here.add_link(&pair).await?;
    set_up(&Netlink::open(&there)?, &b.interface).await?;
    Ok(true)
}

async fn set_up(netlink: &Netlink, name: &str) -> Result<(), Error> {
    if let Some(link) = netlink.link_by_name(name)?.filter(|link| !link.up) {
        netlink
            .change_link(
                link.index,
                &LinkChange {
                    up: Some(true),
                    ..LinkChange::default()
                },
            )
            .await?;
    }
    Ok(())
}

/// Runs the `exec` lines of every node that has not had them yet (a marker file in the node's folder says so).
pub fn exec(plan: &Plan, folder: &Folder) -> Result<usize, Error> {
    let mut ran = 0;
    for (name, node) in &plan.nodes {
        let marker = folder.path().join(name).join("exec.done");
        if std::fs::read_to_string(&marker).is_ok_and(|done| done == marker_text(node)) {
            continue;
        }
        for words in &node.exec {
            run(name, node, words)?;
            ran += 1;
        }
        std::fs::create_dir_all(folder.path().join(name))
            .map_err(io_error("create a node's folder"))?;
        std::fs::write(&marker, marker_text(node))
            .map_err(io_error(format!("write {}", marker.display())))?;
    }
    Ok(ran)
}

/// The marker names the namespace's inode: a namespace that was made anew has had no `exec`.
fn marker_text(node: &PlannedNode) -> String {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(Path::new("/run/netns").join(&node.namespace))
        .map_or(0, |file| file.ino());
    format!("{inode} {:?}\n", node.exec)
}

fn run(name: &str, node: &PlannedNode, words: &[String]) -> Result<(), Error> {
    let Some((program, args)) = words.split_first() else {
        return Ok(());
    };
    let command = words.join(" ");
    let namespace = NetNs::open(&node.namespace)?;
    let output = namespace
        .run(|| {
            Command::new(program)
                .args(args)
                .envs(&node.env)
                .stdin(Stdio::null())
                .output()
        })?
        .map_err(io_error(format!("run `{command}` in node {name}")))?;
    if output.status.success() {
        return Ok(());
    }
    let output = String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
        .trim()
        .to_owned();
    Err(Error::Exec {
        node: name.to_owned(),
        command,
        output,
    })
}

/// Starts the supervisor (`calictl lab supervise LAB`) unless it runs, and waits until it has taken over.
pub fn supervisor(plan: &Plan, folder: &Folder, calictl: &Path) -> Result<Pid, Error> {
    use std::os::unix::process::CommandExt;
    if let Some(pid) = folder.supervisor() {
        return Ok(pid);
    }
    let log = folder.path().join("supervisor.log");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(io_error("open the supervisor's log"))?;
    let copy = file
        .try_clone()
        .map_err(io_error("open the supervisor's log"))?;
    let mut command = Command::new(calictl);
    command
        .args(["lab", "supervise", &plan.lab])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(copy)
        .stderr(file)
        .process_group(0);
    // Dropping the handle leaves it running, as it should.
    let mut child = command.spawn().map_err(io_error("start the supervisor"))?;
    let limit = Instant::now() + crate::patient(Duration::from_secs(5));
    while Instant::now() < limit {
        if let Some(pid) = folder.supervisor() {
            return Ok(pid);
        }
        if child
            .try_wait()
            .map_err(io_error("watch the supervisor"))?
            .is_some()
        {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(Error::Supervisor {
        lab: plan.lab.clone(),
        log: log.display().to_string(),
    })
}

/// Takes the lab away: programs, namespaces, folder. What is gone already is no error. Returns the number of
/// processes that were ended.
pub fn down(folder: &Folder) -> Result<usize, Error> {
    let plan = match folder.plan() {
        Ok(plan) => plan,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(io_error("read the lab's plan")(error)),
    };
    let mut pids: Vec<Pid> = folder.supervisor().into_iter().collect();
    // The supervisor first: it would start the others again.
    crate::supervise::end_all(&pids);
    let running = folder
        .running()
        .map_err(io_error("read the list of processes"))?;
    let programs: Vec<Pid> = running
        .pids
        .into_values()
        .filter(|pid| pid.alive())
        .collect();
    crate::supervise::end_all(&programs);
    pids.extend(programs);
    let prefix = format!("{}_", plan.lab);
    for name in NetNs::names()?
        .into_iter()
        .filter(|name| name.starts_with(&prefix))
    {
        pids.extend(crate::supervise::in_namespace(&name));
        NetNs::delete(&name)?;
    }
    std::fs::remove_dir_all(folder.path())
        .map_err(io_error(format!("remove {}", folder.path().display())))?;
    Ok(pids.len())
}
