//! `calictl lab`: a containerlab topology in network namespaces.

mod expect;
mod show;
mod up;

use crate::output::{self, Style};
use anyhow::{Context, Result, bail};
use cali_lab::plan::{DEFAULT_ROOT, Places};
use cali_lab::pods::Runtime;
use cali_lab::state::Folder;
use cali_lab::{bring_up, probe, supervise, topology};
use cali_netlink::NetNs;
use clap::{Args, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring a topology up; what is there already is left as it is
    Up {
        /// Topology file (containerlab's format)
        file: PathBuf,
        /// Then show node status, routes and the matrix of connections
        #[arg(long)]
        show: bool,
    },
    /// What runs in a lab
    Status(LabName),
    /// Node status, routes and the matrix of connections, measured now
    Show(LabName),
    /// Run a command in a node (or pod, as NAMESPACE/NAME) of the lab
    Exec {
        #[command(flatten)]
        lab: LabName,
        /// Node, or pod as namespace/name
        target: String,
        /// The command and its arguments, after `--`
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Take a lab away: programs, namespaces, files
    Down {
        /// Topology file or name of the lab (default: the only one)
        lab: Option<String>,
    },
    /// Keep a lab's programs running (started by `up`)
    #[command(hide = true)]
    Supervise { lab: String },
    /// Answer probes (runs in each pod)
    #[command(hide = true)]
    Answer {
        #[arg(long)]
        tcp: Vec<u16>,
        #[arg(long)]
        udp: Vec<u16>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct LabName {
    /// Name of the lab (default: the only one)
    #[arg(long = "lab", value_name = "NAME")]
    name: Option<String>,
}

impl LabName {
    fn open(&self) -> Result<Folder> {
        open(self.name.as_deref())
    }
}

pub(crate) fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up { file, show } => up::run(&file, show).map(|()| ExitCode::SUCCESS),
        Command::Status(name) => status(&name.open()?).map(|()| ExitCode::SUCCESS),
        Command::Show(name) => show::run(&name.open()?),
        Command::Exec {
            lab,
            target,
            command,
        } => exec(&lab.open()?, &target, &command),
        Command::Down { lab } => down(lab.as_deref()).map(|()| ExitCode::SUCCESS),
        Command::Supervise { lab } => supervise_lab(&lab).map(|()| ExitCode::SUCCESS),
        Command::Answer { tcp, udp } => {
            probe::answer(&tcp, &udp).context("cannot answer probes")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Parent folder of all labs.
pub(crate) fn root() -> PathBuf {
    std::env::var_os("CALI_LAB_DIR").map_or_else(|| PathBuf::from(DEFAULT_ROOT), PathBuf::from)
}

/// Our own executables lie beside this one.
pub(crate) fn programs() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find my own executable")?;
    let own = own
        .to_string_lossy()
        .trim_end_matches(" (deleted)")
        .to_owned();
    Ok(Path::new(&own)
        .parent()
        .map(Path::to_owned)
        .unwrap_or_default())
}

fn places() -> Result<Places> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    Ok(Places {
        root: root(),
        programs: programs()?,
        peers: cache
            .unwrap_or_else(|| "/var/cache".into())
            .join("cali/peers"),
    })
}

/// The lab of that name, or the only one there is.
fn open(name: Option<&str>) -> Result<Folder> {
    let root = root();
    if let Some(name) = name {
        let folder = Folder::new(&root, name);
        if !folder.exists() {
            bail!(
                "there is no lab {name:?} in {}; bring one up with `calictl lab up FILE`",
                root.display()
            );
        }
        return Ok(folder);
    }
    let mut labs: Vec<String> = std::fs::read_dir(&root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| Folder::new(&root, name).exists())
        .collect();
    labs.sort();
    match labs.as_slice() {
        [only] => Ok(Folder::new(&root, only)),
        [] => bail!("no lab is up; bring one up with `calictl lab up FILE`"),
        several => bail!(
            "several labs are up ({}); choose one with --lab NAME",
            several.join(", ")
        ),
    }
}

fn status(folder: &Folder) -> Result<()> {
    let plan = folder.plan().context("cannot read the lab's plan")?;
    let running = folder
        .running()
        .context("cannot read the list of processes")?;
    let supervisor = folder
        .supervisor()
        .map_or("not running".to_owned(), |pid| format!("pid {}", pid.pid));
    output::line(format_args!(
        "{} {} (supervisor {supervisor})",
        Style::TITLE.paint("lab"),
        plan.lab
    ));
    let mut processes = plan.processes.clone();
    processes.extend(folder.extra().context("cannot read the list of servers")?);
    let width = processes
        .iter()
        .map(|process| process.name.len())
        .max()
        .unwrap_or(0);
    for process in &processes {
        let state = match running.pids.get(&process.name).filter(|pid| pid.alive()) {
            Some(pid) => Style::GOOD.paint(format_args!("pid {:<8}", pid.pid)),
            None => Style::BAD.paint("not running "),
        };
        output::line(format_args!(
            "  {:<width$}  {state}  {}",
            process.name,
            Style::DIM.paint(process.log.display())
        ));
    }
    let programs = programs()?;
    let runtime = Runtime {
        plan: &plan,
        folder,
        programs: &programs,
    };
    for pod in runtime.list().context("cannot read the lab's pods")? {
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        output::line(format_args!(
            "  pod {}/{} on {}: {}",
            pod.pod.namespace,
            pod.pod.name,
            pod.pod.node,
            addresses.join(", ")
        ));
    }
    Ok(())
}

fn exec(folder: &Folder, target: &str, command: &[String]) -> Result<ExitCode> {
    let plan = folder.plan().context("cannot read the lab's plan")?;
    let (namespace, env) = match target.split_once('/') {
        Some((namespace, name)) => (
            cali_lab::plan::pod_namespace(&plan.lab, namespace, name),
            Default::default(),
        ),
        None => {
            let node = plan.nodes.get(target).with_context(|| {
                let known: Vec<&str> = plan.nodes.keys().map(String::as_str).collect();
                format!(
                    "lab {} has no node {target:?}; it has {}",
                    plan.lab,
                    known.join(", ")
                )
            })?;
            (node.namespace.clone(), node.env.clone())
        }
    };
    let (program, args) = command.split_first().context("no command given")?;
    let path = with_own_folder(
        std::env::var_os("PATH").unwrap_or_default(),
        std::env::current_exe()
            .ok()
            .as_deref()
            .and_then(Path::parent),
    );
    let opened = NetNs::open(&namespace).with_context(|| format!("{target} does not run"))?;
    let status = opened
        .run(|| {
            std::process::Command::new(program)
                .args(args)
                .env("PATH", path)
                .envs(env)
                .status()
        })?
        .with_context(|| format!("cannot run {program:?} in {target}"))?;
    Ok(ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(1),
    ))
}

/// Where programs are looked for: in a node stands what an image would hold, so `calictl` itself and its sisters, too.
fn with_own_folder(path: OsString, folder: Option<&Path>) -> OsString {
    let all = std::env::split_paths(&path).chain(folder.map(Path::to_owned));
    std::env::join_paths(all).unwrap_or(path)
}

fn down(lab: Option<&str>) -> Result<()> {
    let folder = match lab {
        // A topology file, as `up` takes it; its lab may be down already.
        Some(file) if Path::new(file).is_file() => {
            Folder::new(&root(), &topology::read(Path::new(file))?.name)
        }
        name => match open(name) {
            Ok(folder) => folder,
            Err(error) if name.is_none() && error.to_string().starts_with("no lab is up") => {
                output::line("no lab is up");
                return Ok(());
            }
            Err(error) => return Err(error),
        },
    };
    let ended = bring_up::down(&folder)?;
    output::line(format_args!(
        "lab is down: {ended} processes ended, namespaces and files removed"
    ));
    Ok(())
}

fn supervise_lab(lab: &str) -> Result<()> {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let folder = Folder::new(&root(), lab);
    supervise::run(&folder).context("the supervisor ends")
}
