//! `apply`, `create`, `replace`, `validate`, `delete`: resources of files into the datastore, and out of it.

use crate::change::change_stored;
use crate::manifests::{self, Document};
use crate::progress::Progress;
use crate::{connection, output};
use anyhow::{Context, Result, anyhow, bail};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::{Datastore, Error};
use clap::Args;
use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use std::ffi::OsStr;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct Files {
    /// File, folder, or `-` for standard input (repeatable)
    #[arg(short, long = "filename", required = true, value_name = "FILE")]
    filename: Vec<PathBuf>,
    /// Read folders recursively
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Namespace of namespaced resources that name none
    #[arg(short, long)]
    namespace: Option<String>,
    /// Files without resources are no error
    #[arg(long)]
    skip_empty: bool,
    /// Check everything, also against what is stored, and say what would be done, but write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    files: Files,
    /// Resources that exist are left as they are
    #[arg(long)]
    skip_exists: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Kind: `ippool`, `networkpolicy`, `gnp`, ...
    #[arg(required_unless_present = "filename", value_parser = Kinds, hide_possible_values = true)]
    kind: Option<String>,
    /// Names
    #[arg(required_unless_present = "filename")]
    names: Vec<String>,
    /// File, folder, or `-` with the resources to delete
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "kind")]
    filename: Vec<PathBuf>,
    /// Read folders recursively
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Namespace of namespaced kinds; `default` without
    #[arg(short, long)]
    namespace: Option<String>,
    /// A resource that does not exist is no error
    #[arg(short = 's', long)]
    skip_not_exists: bool,
}

/// What is done with the resources of files.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    Apply,
    Create {
        /// What exists is left alone.
        skip_exists: bool,
    },
    Replace,
    Validate,
}

impl Verb {
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Apply => ("apply", "applied"),
            Self::Create { .. } => ("create", "created"),
            Self::Replace => ("replace", "replaced"),
            Self::Validate => ("validate", "validated"),
        }
    }
}

/// `apply`, `create`, `replace`, `validate`: everything is checked before the first write.
pub(crate) async fn write(verb: Verb, files: &Files) -> Result<()> {
    let documents = manifests::read(&files.filename, files.recursive, files.namespace.as_deref())?;
    if documents.is_empty() {
        if files.skip_empty {
            return Ok(());
        }
        bail!("No resources specified");
    }
    let (infinitive, participle) = verb.words();
    let mut kinds = Vec::with_capacity(documents.len());
    if matches!(verb, Verb::Validate) {
        kinds.extend(documents.iter().map(|document| document.value.kind()));
    } else {
        let store = connection::open().await?;
        manifests::check(store.as_ref(), &documents).await?;
        if files.dry_run {
            return rehearse(store.as_ref(), verb, &documents).await;
        }
        let progress = Progress::of(documents.len(), "Writing resources");
        for (done, document) in documents.iter().enumerate() {
            progress.step();
            let written = write_one(store.as_ref(), verb, document.value.clone()).await;
            let written = written
                .map_err(|error| document.error(error))
                .with_context(|| {
                    let total = documents.len();
                    let key = document.value.key();
                    format!("failed to {infinitive} {key}; {done} of {total} were {participle}")
                })?;
            if written {
                kinds.push(document.value.kind());
            }
        }
    }
    output::line(success(participle, &kinds));
    Ok(())
}

/// `create`, but for its own flag.
pub(crate) async fn create(create: &Create) -> Result<()> {
    let skip_exists = create.skip_exists;
    write(Verb::Create { skip_exists }, &create.files).await
}

/// Says for each resource what would become of it.
async fn rehearse(store: &dyn Datastore, verb: Verb, documents: &[Document]) -> Result<()> {
    let mut refused = 0;
    for document in documents {
        let key = document.value.key();
        let stored = match store.get(&key).await {
            Ok(found) => Some(found.object),
            Err(Error::NotFound { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let mut wanted = document.value.clone();
        cali_api::defaults(&mut wanted);
        let would = match (verb, stored) {
            (Verb::Apply | Verb::Create { .. }, None) => "would be created",
            (Verb::Create { skip_exists: true }, Some(_)) => "exists and would be left alone",
            (Verb::Create { .. }, Some(_)) => {
                refused += 1;
                "would be refused: it exists"
            }
            (Verb::Replace, None) => {
                refused += 1;
                "would be refused: it does not exist"
            }
            (_, Some(stored)) if stored.to_json()["spec"] == wanted.to_json()["spec"] => {
                "is so already"
            }
            (_, Some(_)) => "would be changed",
            (Verb::Validate, None) => "is valid",
        };
        output::line(format!("{key} {would} (dry run)"));
    }
    if refused > 0 {
        bail!(
            "{refused} of {} resources would be refused",
            documents.len()
        );
    }
    Ok(())
}

/// Whether anything was done.
async fn write_one(store: &dyn Datastore, verb: Verb, object: AnyResource) -> Result<bool, Error> {
    match verb {
        Verb::Validate => Ok(true),
        Verb::Apply => store.apply(object).await.map(|_| true),
        Verb::Create { skip_exists } => match store.create(object).await {
            Err(Error::AlreadyExists { .. }) if skip_exists => Ok(false),
            other => other.map(|_| true),
        },
        Verb::Replace => change_stored(store, &object.key(), |_| Ok(object.clone()))
            .await
            .map(|()| true),
    }
}

/// `Successfully applied 2 'IPPool' resource(s)`; without the kind where there are several.
fn success(participle: &str, kinds: &[Kind]) -> String {
    match kinds {
        [first, rest @ ..] if rest.iter().all(|kind| kind == first) => {
            format!(
                "Successfully {participle} {} '{first}' resource(s)",
                kinds.len()
            )
        }
        _ => format!("Successfully {participle} {} resource(s)", kinds.len()),
    }
}

pub(crate) async fn delete(delete: &Delete) -> Result<()> {
    let keys: Vec<Key> = match &delete.kind {
        Some(kind) => {
            let kind = parse_kind(kind)?;
            delete
                .names
                .iter()
                .map(|name| key(kind, delete.namespace.as_deref(), name))
                .collect()
        }
        None => {
            let namespace = delete.namespace.as_deref();
            let documents = manifests::read(&delete.filename, delete.recursive, namespace)?;
            documents
                .iter()
                .map(|document| document.value.key())
                .collect()
        }
    };
    let store = connection::open().await?;
    let mut deleted = Vec::new();
    let progress = Progress::of(keys.len(), "Deleting resources");
    // What others refer to goes last: files list it first.
    for key in keys.iter().rev() {
        progress.step();
        match store.delete(key, None).await {
            Ok(_) => deleted.push(key.kind),
            Err(Error::NotFound { .. }) if delete.skip_not_exists => {}
            Err(error) => {
                return Err(anyhow!(error).context(format!(
                    "Failed to delete '{}' resource; {} of {} were deleted",
                    key.kind,
                    deleted.len(),
                    keys.len()
                )));
            }
        }
    }
    drop(progress);
    output::line(success("deleted", &deleted));
    Ok(())
}

/// Takes any word as a kind, so that [`parse_kind`] can say what may have been meant; a shell completes it to those there are.
#[derive(Debug, Clone)]
pub(crate) struct Kinds;

impl TypedValueParser for Kinds {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let mut names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.plural()).collect();
        names.sort_unstable();
        // Of Kubernetes' and Calico's kinds of one name, Calico's is meant.
        names.dedup();
        Some(Box::new(names.into_iter().map(PossibleValue::new)))
    }
}

pub(crate) fn parse_kind(text: &str) -> Result<Kind> {
    Kind::parse(text).ok_or_else(|| {
        let near = near(text);
        let hint = if near.is_empty() {
            "; `calictl explain` names them".to_owned()
        } else {
            format!("; did you mean {}?", near.join(" or "))
        };
        anyhow!("there is no kind {text:?}{hint}")
    })
}

/// The kinds that may have been meant, at most three: those that begin so, or those with the fewest letters wrong in a name.
fn near(text: &str) -> Vec<&'static str> {
    let text = text.to_lowercase();
    let distance = |kind: &Kind| {
        let name = kind.name().to_lowercase();
        let words = [kind.plural(), name.as_str()].into_iter();
        let typed = words.map(|word| match word.starts_with(&text) && text.len() > 2 {
            true => 0,
            false => strsim::osa_distance(word, &text),
        });
        typed.min().unwrap_or(usize::MAX)
    };
    // A short word has nothing in common with another one of the same length.
    let allowed = (text.chars().count() / 3).min(3);
    let mut near: Vec<(usize, &str)> = Kind::ALL
        .iter()
        .map(|kind| (distance(kind), kind.plural()))
        .filter(|(distance, _)| *distance <= allowed)
        .collect();
    near.sort_unstable();
    near.dedup();
    let fewest = near.first().map(|(distance, _)| *distance);
    near.retain(|(distance, _)| Some(*distance) == fewest);
    near.truncate(3);
    near.into_iter().map(|(_, plural)| plural).collect()
}

pub(crate) fn key(kind: Kind, namespace: Option<&str>, name: &str) -> Key {
    if kind.is_namespaced() {
        Key::namespaced(kind, namespace.unwrap_or("default"), name)
    } else {
        Key::cluster(kind, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_names_the_kind_where_there_is_one() {
        assert_eq!(
            success("applied", &[Kind::IPPool, Kind::IPPool]),
            "Successfully applied 2 'IPPool' resource(s)"
        );
        assert_eq!(
            success("applied", &[Kind::IPPool, Kind::Tier]),
            "Successfully applied 2 resource(s)"
        );
    }

    #[test]
    fn an_unknown_kind_is_answered_with_the_near_ones() {
        for (typed, meant) in [
            ("ippolo", "; did you mean ippools?"),
            ("nertworkpolicy", "; did you mean networkpolicies?"),
            (
                "globalnetworkpolices",
                "; did you mean globalnetworkpolicies?",
            ),
            ("bgpc", "; did you mean bgpconfigurations?"),
            ("xyzzy", "; `calictl explain` names them"),
            ("q", "; `calictl explain` names them"),
        ] {
            let error = parse_kind(typed).unwrap_err().to_string();
            assert!(error.contains(meant), "{error}");
        }
    }
}
