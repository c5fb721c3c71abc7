//! `calictl`: the command line of Cali.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

mod bgp;
mod bgp_table;
mod columns;
mod conformance;
mod converted;
mod flow;
mod ipam;
mod lab;
mod manifests;
mod node;
mod output;
mod resources;
mod sockets;

use resources::Verb;

/// Look at and change a Cali cluster.
#[derive(Debug, Parser)]
#[command(name = "calictl", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create resources, or change those that exist
    Apply(resources::Files),
    /// Create resources that do not exist yet
    Create(resources::Files),
    /// Replace resources that exist
    Replace(resources::Files),
    /// Check resources without touching the datastore
    Validate(resources::Files),
    /// Delete resources
    Delete(resources::Delete),
    /// Show resources
    Get(resources::Get),
    /// Explain what happens to a flow: who allows or denies it, and the way it takes
    Trace(flow::Trace),
    /// Show which flows between pods a file would allow or deny, without applying it
    Diff(flow::Diff),
    /// Follow the flows of this node's pods: allowed or denied, and why
    Flows(flow::Flows),
    /// Look at this node
    #[command(subcommand)]
    Node(node::Command),
    /// Look at the BGP speaker of this node
    #[command(subcommand)]
    Bgp(bgp::Command),
    /// Look at addresses and who holds them
    #[command(subcommand)]
    Ipam(ipam::Command),
    /// Run policy cases with real packets, in network namespaces of their own
    Conformance(conformance::Conformance),
    /// Run a containerlab topology in network namespaces on this machine
    #[command(subcommand)]
    Lab(lab::Command),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    if let Command::Lab(command) = command {
        return lab::run(command);
    }
    if let Command::Conformance(arguments) = command {
        return conformance::run(&arguments);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(async {
        match command {
            Command::Apply(files) => resources::write(Verb::Apply, &files).await?,
            Command::Create(files) => resources::write(Verb::Create, &files).await?,
            Command::Replace(files) => resources::write(Verb::Replace, &files).await?,
            Command::Validate(files) => resources::write(Verb::Validate, &files).await?,
            Command::Delete(delete) => resources::delete(&delete).await?,
            Command::Get(get) => resources::get(&get).await?,
            Command::Trace(arguments) => return flow::trace(&arguments).await,
            Command::Diff(arguments) => return flow::diff(&arguments).await,
            Command::Flows(arguments) => return flow::flows(&arguments).await,
            Command::Node(command) => return node::run(&command).await,
            Command::Bgp(command) => bgp::run(&command).await?,
            Command::Ipam(command) => ipam::run(&command).await?,
            Command::Conformance(arguments) => return conformance::run(&arguments),
            Command::Lab(command) => return lab::run(command),
        }
        Ok(ExitCode::SUCCESS)
    })
}
