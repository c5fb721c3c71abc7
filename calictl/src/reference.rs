//! What the pages of reference in `docs/` are made from: the command line's own definition, and the fields of a kind as
//! `calictl explain` knows them.

use anyhow::{Context, Result};
use cali_api::Kind;
use clap::{Arg, Command, CommandFactory};
use serde_json::Value;

use crate::{Arguments, explain};

/// A field of a kind's `spec`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name in manifests.
    pub name: String,
    /// `string`, `[]object`, `map[string]integer`.
    pub shape: String,
    /// What values are taken.
    pub limits: Vec<String>,
}

/// The fields of a kind's `spec`, in the order of their names.
///
/// # Errors
/// The kind has no definition of its own.
pub fn fields(kind: Kind) -> Result<Vec<Field>> {
    let whole = explain::schema(kind)?;
    let spec: &Value = whole.pointer("/properties/spec").context("no spec")?;
    let fields = explain::fields(spec).into_iter();
    Ok(fields
        .map(|(name, schema)| Field {
            name: name.clone(),
            shape: explain::shape(schema),
            limits: explain::limits(schema),
        })
        .collect())
}

/// Every command with its arguments, in Markdown; without a title.
#[must_use]
pub fn commands() -> String {
    let mut whole = Arguments::command();
    whole.build();
    let mut page = String::from("## Flags of every command\n\n");
    let global: Vec<&Arg> = whole
        .get_arguments()
        .filter(|one| one.is_global_set())
        .collect();
    table(&global, &mut page);
    for command in whole.get_subcommands_mut() {
        section(command, &mut page);
    }
    page
}

fn section(command: &mut Command, page: &mut String) {
    if command.is_hide_set() || command.get_name() == "help" {
        return;
    }
    let usage = command.render_usage().to_string();
    let about = command.get_long_about().or(command.get_about());
    let about = about.map(ToString::to_string).unwrap_or_default();
    let inner = command
        .get_subcommands()
        .any(|inner| inner.get_name() != "help");
    if !inner || command.get_arguments().any(is_own) {
        let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
        let usage = usage.trim_start_matches("Usage: ").trim();
        page.push_str(&format!(
            "\n## {name}\n\n{about}\n\n```text\n{usage}\n```\n"
        ));
        let own: Vec<&Arg> = command.get_arguments().filter(|one| is_own(one)).collect();
        if !own.is_empty() {
            page.push('\n');
            table(&own, page);
        }
    }
    for inner in command.get_subcommands_mut() {
        section(inner, page);
    }
}

/// True for what the command has beyond what every command has.
fn is_own(argument: &Arg) -> bool {
    let of_all = ["help", "version"].contains(&argument.get_id().as_str());
    !of_all && !argument.is_global_set() && !argument.is_hide_set()
}

fn table(arguments: &[&Arg], page: &mut String) {
    page.push_str("| argument | meaning |\n|---|---|\n");
    for argument in arguments {
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let mut meaning = vec![help];
        let defaults = argument.get_default_values().iter();
        let defaults: Vec<String> = defaults
            .filter(|value| !value.is_empty())
            .map(|value| format!("`{}`", value.to_string_lossy()))
            .collect();
        // A switch is off unless it is given; that need not be said.
        let takes = argument.get_action().takes_values();
        let values: Vec<String> = argument
            .get_possible_values()
            .iter()
            .filter(|value| takes && !value.is_hide_set())
            .map(|value| format!("`{}`", value.get_name()))
            .collect();
        // Kinds are listed by `calictl explain`.
        if !values.is_empty() && values.len() < 12 {
            meaning.push(format!("one of {}", values.join(", ")));
        }
        if takes && !defaults.is_empty() {
            meaning.push(format!("default {}", defaults.join(", ")));
        }
        let meaning = meaning.join("; ").replace('|', "\\|");
        let short = argument.get_short().filter(|_| !argument.is_positional());
        let short = short
            .map(|letter| format!("-{letter}, "))
            .unwrap_or_default();
        let name = format!("{short}{argument}").replace('|', "\\|");
        page.push_str(&format!("| `{name}` | {meaning} |\n"));
    }
}
