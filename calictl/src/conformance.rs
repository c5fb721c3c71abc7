//! `calictl conformance`: policy cases as data, with real packets.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use felix::conformance::{self, Backend, Nftables, Report};

/// What to run.
#[derive(Debug, Args)]
pub(crate) struct Conformance {
    /// Folder with files of cases (*.yaml)
    folder: PathBuf,
    /// What enforces: nftables
    #[arg(long, default_value = "nftables")]
    backend: String,
}

/// Runs all files; fails if a case does.
pub(crate) fn run(arguments: &Conformance) -> Result<ExitCode> {
    if arguments.backend != "nftables" {
        bail!(
            "there is no backend {:?}; known is nftables",
            arguments.backend
        );
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let root = status
        .lines()
        .any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"));
    if !root {
        bail!("network namespaces need root; run it with sudo");
    }
    let folder = &arguments.folder;
    let files = conformance::files(folder)
        .with_context(|| format!("cannot read folder {}", folder.display()))?;
    if files.is_empty() {
        bail!("{} holds no *.yaml", folder.display());
    }
    let mut total = Report::default();
    for file in files {
        let made = conformance::run_file(&file, |netns| {
            let backend = Nftables::new(netns).map_err(|error| error.to_string())?;
            Ok(Box::new(backend) as Box<dyn Backend>)
        });
        let report = made.map_err(anyhow::Error::msg)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        println!(
            "{name}: {} cases, {} packets, {} failed",
            report.cases,
            report.probes,
            report.failures.len()
        );
        for (case, failures) in &report.failures {
            println!("  {case}");
            failures
                .iter()
                .for_each(|failure| println!("    {failure}"));
        }
        total.add(report);
    }
    println!(
        "{} cases, {} packets, {} failed",
        total.cases,
        total.probes,
        total.failures.len()
    );
    Ok(if total.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
