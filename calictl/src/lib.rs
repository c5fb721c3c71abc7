//! `calictl`: the command line of Cali. Its entrance is [`main`]; [`reference`] is for the documentation. What it finds out, it asks of the libraries.

use anyhow::{Context, Result};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::process::ExitCode;

mod bgp;
mod bgp_table;
mod change;
mod columns;
mod conformance;
mod connection;
mod converted;
mod datastore;
mod diags;
mod edit;
mod explain;
mod flow;
mod format;
mod get;
mod ipam;
mod lab;
mod listing;
mod manifests;
mod node;
mod output;
mod programmed;
mod progress;
pub mod reference;
mod resources;
mod routes;
mod shell;
mod sockets;
mod top;
mod version;

use resources::Verb;

/// Look at and change a Cali cluster.
#[derive(Debug, Parser)]
#[command(name = "calictl", version, propagate_version = true)]
struct Arguments {
    #[command(flatten)]
    connection: connection::Flags,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create resources, or change those that exist
    Apply(resources::Files),
    /// Create resources that do not exist yet
    Create(resources::Create),
    /// Replace resources that exist
    Replace(resources::Files),
    /// Check resources without touching the datastore
    Validate(resources::Files),
    /// Delete resources
    Delete(resources::Delete),
    /// Show resources
    Get(get::Get),
    /// Show the fields of a kind: types, values, rules
    Explain(explain::Explain),
    /// Set or remove a label of a resource
    Label(edit::Label),
    /// Change some fields of a resource
    Patch(edit::Patch),
    /// Explain what happens to a flow: who allows or denies it, and the way it takes
    Trace(flow::Trace),
    /// Show which flows between pods a file would allow or deny, without applying it
    Diff(flow::Diff),
    /// Follow the flows of this node's pods: allowed or denied, and why
    Flows(flow::Flows),
    /// Every route of this node, or of others, that is Cali's: where it leads, who owns it, from which resource it comes
    Routes(routes::Routes),
    /// Look at this node
    #[command(subcommand)]
    Node(node::Command),
    /// Look at the whole cluster
    #[command(subcommand)]
    Cluster(diags::cluster::Command),
    /// The nodes on one screen: sessions, denied packets, how long a change of policy takes
    Top(top::Top),
    /// Look at the BGP speaker of this node
    #[command(subcommand)]
    Bgp(bgp::Command),
    /// Look at addresses and who holds them
    #[command(subcommand)]
    Ipam(ipam::Command),
    /// Lock the datastore, and move what it holds to another one
    #[command(subcommand)]
    Datastore(datastore::Command),
    /// Run policy cases with real packets, in network namespaces of their own
    Conformance(conformance::Conformance),
    /// Run a containerlab topology in network namespaces on this machine
    #[command(subcommand)]
    Lab(lab::Command),
    /// The version of this program, and of the cluster
    Version(version::Version),
    /// A completion script for a shell
    Completion(shell::Completion),
    /// Write manual pages into a folder
    Man(shell::Man),
}

/// Runs the program with the arguments and the environment of the process.
#[must_use]
pub fn main() -> ExitCode {
    match parse().and_then(run) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

/// The command line; called by `kubectl`, the program goes by the name that was typed.
fn parse() -> Result<Command> {
    let mut command = Arguments::command();
    if connection::is_plugin() {
        command = command.bin_name("kubectl calico");
    }
    let arguments = command
        .try_get_matches()
        .and_then(|matches| Arguments::from_arg_matches(&matches))
        .unwrap_or_else(|error| leave(&error));
    log(&arguments.connection.log_level)?;
    connection::settle(arguments.connection);
    Ok(arguments.command)
}

/// Help and the version, or what is wrong with the line. Every failure ends with 1, as that of `calicoctl`.
fn leave(said: &clap::Error) -> ! {
    // Nothing can be done about a closed output.
    let _ = said.print();
    std::process::exit(i32::from(said.use_stderr()))
}

/// What the libraries log, on standard error. Calico's levels without a counterpart mean that nothing is logged.
fn log(level: &str) -> Result<()> {
    if matches!(level, "panic" | "fatal") {
        return Ok(());
    }
    let level: tracing_subscriber::filter::LevelFilter = level.parse().with_context(|| {
        format!("--log-level {level:?} is none of panic, error, warn, info, debug, trace")
    })?;
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

fn run(command: Command) -> Result<ExitCode> {
    // What needs neither a runtime nor a datastore.
    match command {
        Command::Lab(command) => return lab::run(command),
        Command::Conformance(arguments) => return conformance::run(&arguments),
        Command::Version(version) if version.needs_no_datastore() => {
            output::write(version::client())
        }
        Command::Completion(completion) => shell::completion(&completion, Arguments::command()),
        Command::Explain(arguments) => explain::run(&arguments)?,
        Command::Man(man) => shell::man(&man, &Arguments::command())?,
        other => return in_runtime(other),
    }
    Ok(ExitCode::SUCCESS)
}

fn in_runtime(command: Command) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(async {
        match command {
            Command::Apply(files) => resources::write(Verb::Apply, &files).await?,
            Command::Create(create) => resources::create(&create).await?,
            Command::Replace(files) => resources::write(Verb::Replace, &files).await?,
            Command::Validate(files) => resources::write(Verb::Validate, &files).await?,
            Command::Delete(delete) => resources::delete(&delete).await?,
            Command::Get(get) => get::run(&get).await?,
            Command::Trace(arguments) => return flow::trace(&arguments).await,
            Command::Diff(arguments) => return flow::diff(&arguments).await,
            Command::Flows(arguments) => return flow::flows(&arguments).await,
            Command::Routes(arguments) => return routes::run(&arguments).await,
            Command::Node(command) => return node::run(&command).await,
            Command::Top(arguments) => return top::run(&arguments).await,
            Command::Cluster(command) => diags::cluster::run(&command).await?,
            Command::Bgp(command) => bgp::run(&command).await?,
            Command::Ipam(command) => ipam::run(&command).await?,
            Command::Datastore(command) => datastore::run(&command).await?,
            Command::Label(arguments) => edit::label(&arguments).await?,
            Command::Patch(arguments) => edit::patch(&arguments).await?,
            Command::Version(version) => version::run(&version).await?,
            Command::Conformance(_)
            | Command::Lab(_)
            | Command::Completion(_)
            | Command::Explain(_)
            | Command::Man(_) => {}
        }
        Ok(ExitCode::SUCCESS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_command_gives_one_flag_two_meanings() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_word_that_can_be_typed_is_explained() {
        fn walk(command: &clap::Command, silent: &mut Vec<String>) {
            let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
            for argument in command.get_arguments() {
                if argument
                    .get_help()
                    .is_none_or(|help| help.to_string().is_empty())
                {
                    silent.push(format!("{name}: {}", argument.get_id()));
                }
            }
            if command.get_about().is_none() {
                silent.push(name.to_owned());
            }
            for inner in command
                .get_subcommands()
                .filter(|inner| !inner.is_hide_set())
            {
                walk(inner, silent);
            }
        }
        let mut command = Arguments::command();
        command.build();
        let mut silent = Vec::new();
        walk(&command, &mut silent);
        assert_eq!(silent, Vec::<String>::new());
    }
}
