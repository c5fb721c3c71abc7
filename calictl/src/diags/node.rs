//! `calictl node diags`: of the node that this runs on.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use cali_control::paths::{run_dir, state_dir};
use cali_control::status::{BgpRequest, BgpResponse, NodeRequest, NodeResponse};
use clap::Args;
use serde::Serialize;

use super::{Archive, PIECE_LIMIT, begin, commands, conclude, duration, mask};
use crate::sockets;

#[derive(Debug, Args)]
pub(crate) struct Diags {
    /// Folder with logs that belong to the archive
    #[arg(long, default_value = "/var/log/calico", value_name = "FOLDER")]
    log_dir: PathBuf,
    /// So many of its files, the newest first
    #[arg(long, default_value_t = 5, value_name = "COUNT")]
    max_logs: usize,
    /// Only logs of the last 90s, 30m, 2h, 3d
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    since: Option<Duration>,
    /// The archive, or the folder that it goes to; `-` is standard output
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
}

/// Configuration that says how this host came to be as it is. Folders: the files in them.
const FILES: [&str; 6] = [
    "/etc/calico",
    "/etc/cni/net.d",
    "/etc/os-release",
    "/proc/net/snmp",
    "/proc/net/softnet_stat",
    "/proc/sys/net/netfilter/nf_conntrack_count",
];

pub(crate) async fn run(diags: &Diags) -> Result<ExitCode> {
    let at = SystemTime::now();
    let (mut archive, target) = begin("diags", diags.output.as_deref(), at)?;
    fill(&mut archive, diags, at).await?;
    conclude(archive, &target)?;
    Ok(ExitCode::SUCCESS)
}

async fn fill<W: std::io::Write>(
    archive: &mut Archive<W>,
    diags: &Diags,
    at: SystemTime,
) -> Result<()> {
    archive.text("version.txt", &crate::version::client())?;
    daemons(archive).await?;
    for (name, line) in commands::OF_A_NODE {
        let result = commands::run(line).await;
        archive.result(name, result)?;
    }
    let journal = match diags.since {
        Some(since) => format!("--since=-{}s", since.as_secs()),
        None => "--lines=20000".to_owned(),
    };
    for unit in ["calico-node", "cali-node", "kubelet"] {
        let line = format!("journalctl --no-pager --quiet --unit={unit} {journal}");
        let result = commands::run(&line).await;
        archive.result(&format!("logs/journal-{unit}.txt"), result)?;
    }
    let state = ["mtu", "nodename"].map(|file| state_dir().join(file));
    for path in FILES.iter().map(PathBuf::from).chain(state) {
        file_or_folder(archive, &path)?;
    }
    logs(archive, diags, at)
}

/// What the daemons say, and with which settings they run.
async fn daemons<W: std::io::Write>(archive: &mut Archive<W>) -> Result<()> {
    let run_dir = run_dir();
    let mut processes = Vec::new();
    for (name, request) in [
        ("status/node.json", NodeRequest::Status),
        ("status/endpoints.json", NodeRequest::Endpoints),
        ("status/routes.json", NodeRequest::Routes),
    ] {
        let answer = sockets::node(&run_dir, request).await;
        if let Ok(NodeResponse::Status(status)) = &answer {
            processes.push(("cali-node", status.pid));
            processes.extend(status.bgpd_pid.map(|pid| ("bgpd", pid)));
        }
        archive.result(name, pretty(answer))?;
    }
    for (name, request) in [
        ("status/bgp.json", BgpRequest::Status),
        (
            "status/bgp-routes.json",
            BgpRequest::Routes { within: None },
        ),
    ] {
        let answer: Result<BgpResponse> = sockets::bgp(&run_dir, request).await;
        archive.result(name, pretty(answer))?;
    }
    for (program, pid) in processes {
        let name = format!("config/environment-{program}.txt");
        match std::fs::read(format!("/proc/{pid}/environ")) {
            Ok(octets) => archive.octets(&name, mask::environment(&octets).as_bytes())?,
            Err(error) => archive.lacks(&name, &format!("process {pid}: {error}")),
        }
    }
    Ok(())
}

fn pretty<T: Serialize>(answer: Result<T>) -> Result<String> {
    Ok(serde_json::to_string_pretty(&answer?)? + "\n")
}

fn file_or_folder<W: std::io::Write>(archive: &mut Archive<W>, path: &Path) -> Result<()> {
    if !path.is_dir() {
        return file(archive, "config", path);
    }
    match std::fs::read_dir(path) {
        Ok(entries) => {
            let mut files: Vec<PathBuf> = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.is_file())
                .collect();
            files.sort();
            for inner in files {
                file(archive, "config", &inner)?;
            }
        }
        Err(error) => archive.lacks(&path.display().to_string(), &error.to_string()),
    }
    Ok(())
}

/// A file with its path under `below`; only its last part if it is long.
fn file<W: std::io::Write>(archive: &mut Archive<W>, below: &str, path: &Path) -> Result<()> {
    let shown = path.display().to_string();
    let name = format!("{below}/{}", shown.trim_start_matches('/'));
    archive.result(&name, tail(path).map_err(anyhow::Error::from))
}

fn tail(path: &Path) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let limit = PIECE_LIMIT as u64;
    if length > limit {
        file.seek(SeekFrom::Start(length - limit))?;
    }
    let mut octets = Vec::new();
    file.take(limit).read_to_end(&mut octets)?;
    Ok(String::from_utf8_lossy(&octets).into_owned())
}

/// The newest files of the log folder and of the folders in it.
fn logs<W: std::io::Write>(archive: &mut Archive<W>, diags: &Diags, at: SystemTime) -> Result<()> {
    let oldest = diags.since.and_then(|since| at.checked_sub(since));
    let mut found = Vec::new();
    let mut folders = vec![(diags.log_dir.clone(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) => {
                archive.lacks(&format!("logs of {}", folder.display()), &error.to_string());
                continue;
            }
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            // What a link points to is not asked for.
            let Ok(metadata) = path.symlink_metadata() else {
                continue;
            };
            let changed = metadata.modified().unwrap_or(at);
            if metadata.is_dir() && depth < 3 {
                folders.push((path, depth + 1));
            } else if metadata.is_file() && oldest.is_none_or(|oldest| changed >= oldest) {
                found.push((changed, path));
            }
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    for (_, path) in found.iter().take(diags.max_logs) {
        file(archive, "logs", path)?;
    }
    Ok(())
}
