//! What a shell and `man` know of this program: completion scripts and manual pages, made from the command line's own
//! definition.

use crate::output;
use anyhow::{Context, Result};
use clap::{Args, Command};
use clap_complete::Shell;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct Completion {
    /// The shell: `calictl completion bash > /etc/bash_completion.d/calictl`
    shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct Man {
    /// Where the pages go, one per command
    #[arg(default_value = ".")]
    folder: PathBuf,
}

pub(crate) fn completion(completion: &Completion, mut command: Command) {
    let mut script = Vec::new();
    clap_complete::generate(completion.shell, &mut command, "calictl", &mut script);
    output::write(String::from_utf8_lossy(&script));
}

pub(crate) fn man(man: &Man, command: &Command) -> Result<()> {
    std::fs::create_dir_all(&man.folder)
        .with_context(|| format!("cannot make the folder {}", man.folder.display()))?;
    let mut command = command.clone();
    command.build();
    pages(&man.folder, &command)
}

fn pages(folder: &Path, command: &Command) -> Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone())
        .render(&mut page)
        .context("cannot write a manual page")?;
    // With those of the commands above it: `calictl-bgp-peers`.
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name());
    let file = folder.join(format!("{name}.1"));
    std::fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))?;
    for inner in command
        .get_subcommands()
        .filter(|inner| inner.get_name() != "help")
    {
        pages(folder, inner)?;
    }
    Ok(())
}
