//! What a shell and `man` know of this program: completion scripts and manual pages, made from the command line's own
//! definition.

use crate::output;
use anyhow::{Context, Result};
use clap::{Arg, Args, Command};
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
    if completion.shell == Shell::Fish {
        output::write(fish_values(&command));
    }
}

/// The values of arguments that are no flags (the kinds), which the generated script leaves out for fish.
fn fish_values(command: &Command) -> String {
    let mut script = String::new();
    for inner in command.get_subcommands() {
        let condition = format!("__fish_calictl_using_subcommand {}", inner.get_name());
        script.push_str(&fish_line(inner, &condition));
        for innermost in inner.get_subcommands() {
            let condition = format!(
                "{condition}; and __fish_seen_subcommand_from {}",
                innermost.get_name()
            );
            script.push_str(&fish_line(innermost, &condition));
        }
    }
    script
}

fn fish_line(command: &Command, condition: &str) -> String {
    let values: Vec<String> = command
        .get_positionals()
        .flat_map(Arg::get_possible_values)
        .map(|value| value.get_name().to_owned())
        .collect();
    if values.is_empty() {
        return String::new();
    }
    format!(
        "complete -c calictl -n \"{condition}\" -f -a \"{}\"\n",
        values.join(" ")
    )
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
