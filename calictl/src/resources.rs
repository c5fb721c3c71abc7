//! `apply`, `create`, `replace`, `delete`, `get`: resources in files and in the datastore.

use crate::{columns, converted, manifests, output};
use anyhow::{Context, Result, anyhow, bail};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::{Datastore, Error};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;

/// Attempts of an update that meets another writer.
const ATTEMPTS: usize = 5;

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
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// Kind: `ippool`, `networkpolicy`, `gnp`, ...
    kind: String,
    /// Names; none means all
    names: Vec<String>,
    #[arg(short, long)]
    namespace: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long, visible_short_alias = 'a')]
    all_namespaces: bool,
    #[arg(short, long, value_enum, default_value_t = Output::Ps)]
    output: Output,
    /// Leave out what belongs to this cluster only (uid, revision, creation time)
    #[arg(long)]
    export: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Kind and names
    #[arg(required_unless_present = "filename")]
    kind: Option<String>,
    #[arg(required_unless_present = "filename")]
    names: Vec<String>,
    /// File, folder, or `-` with the resources to delete
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "kind")]
    filename: Vec<PathBuf>,
    #[arg(short = 'R', long)]
    recursive: bool,
    #[arg(short, long)]
    namespace: Option<String>,
    /// A resource that does not exist is no error
    #[arg(short = 's', long)]
    skip_not_exists: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Ps,
    Wide,
    Yaml,
    Json,
}

/// What is done with the resources of files.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    Apply,
    Create,
    Replace,
    Validate,
}

impl Verb {
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Apply => ("apply", "applied"),
            Self::Create => ("create", "created"),
            Self::Replace => ("replace", "replaced"),
            Self::Validate => ("validate", "validated"),
        }
    }
}

/// `apply`, `create`, `replace`, `validate`: everything is checked before the first write.
pub(crate) async fn write(verb: Verb, files: &Files) -> Result<()> {
    let documents = manifests::read(&files.filename, files.recursive, files.namespace.as_deref())?;
    if documents.is_empty() {
        bail!("No resources specified");
    }
    let (infinitive, participle) = verb.words();
    if !matches!(verb, Verb::Validate) {
        let store = cali_datastore::open_from_env()?;
        manifests::check(store.as_ref(), &documents).await?;
        for (done, document) in documents.iter().enumerate() {
            let written = write_one(store.as_ref(), verb, document.value.clone()).await;
            written
                .map_err(|error| document.error(error))
                .with_context(|| {
                    let total = documents.len();
                    let key = document.value.key();
                    format!("failed to {infinitive} {key}; {done} of {total} were {participle}")
                })?;
        }
    }
    let kinds: Vec<Kind> = documents
        .iter()
        .map(|document| document.value.kind())
        .collect();
    output::line(success(participle, &kinds));
    Ok(())
}

async fn write_one(store: &dyn Datastore, verb: Verb, object: AnyResource) -> Result<(), Error> {
    match verb {
        Verb::Validate => Ok(()),
        Verb::Apply => store.apply(object).await.map(drop),
        Verb::Create => store.create(object).await.map(drop),
        Verb::Replace => {
            let key = object.key();
            for attempt in 1.. {
                let found = store.get(&key).await?;
                let mut object = object.clone();
                if object.metadata().resource_version.is_none() {
                    object.metadata_mut().resource_version = Some(found.revision.clone());
                }
                match store.update(object).await {
                    Err(Error::Conflict { .. }) if attempt < ATTEMPTS => {}
                    other => return other.map(drop),
                }
            }
            Ok(())
        }
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
    let store = cali_datastore::open_from_env()?;
    let mut deleted = Vec::new();
    // What others refer to goes last: files list it first.
    for key in keys.iter().rev() {
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
    output::line(success("deleted", &deleted));
    Ok(())
}

pub(crate) async fn get(get: &Get) -> Result<()> {
    let kind = parse_kind(&get.kind)?;
    let store = cali_datastore::open_from_env()?;
    let found = find(store.as_ref(), kind, get)
        .await
        .context("failed to get resources")?;
    let objects: Vec<Value> = found.iter().map(|found| shown(found, get.export)).collect();
    match get.output {
        Output::Json => output::line(serde_json::to_string_pretty(&document(kind, objects, get))?),
        Output::Yaml => output::write(
            serde_saphyr::to_string(&document(kind, objects, get)).context("cannot write YAML")?,
        ),
        Output::Ps | Output::Wide => {
            let with_namespace =
                kind.is_namespaced() && (get.all_namespaces || get.namespace.is_some());
            let columns = columns::of(kind, get.output == Output::Wide);
            let headings: Vec<&str> = with_namespace
                .then_some("NAMESPACE")
                .into_iter()
                .chain(columns.iter().map(|column| column.heading))
                .collect();
            let rows: Vec<Vec<String>> = objects
                .iter()
                .map(|object| {
                    let namespace = with_namespace.then(|| {
                        object["metadata"]["namespace"]
                            .as_str()
                            .unwrap_or_default()
                            .to_owned()
                    });
                    namespace
                        .into_iter()
                        .chain(columns.iter().map(|column| column.cell(object)))
                        .collect()
                })
                .collect();
            output::write(columns::render(&headings, &rows));
        }
    }
    Ok(())
}

async fn find(
    store: &dyn Datastore,
    kind: Kind,
    get: &Get,
) -> Result<Vec<Arc<AnyResource>>, Error> {
    if get.names.is_empty() {
        let namespace = match (&get.namespace, get.all_namespaces) {
            (_, true) => None,
            (Some(namespace), false) => Some(namespace.as_str()),
            (None, false) => kind.is_namespaced().then_some("default"),
        };
        return converted::list(store, kind, namespace).await;
    }
    let mut found = Vec::with_capacity(get.names.len());
    for name in &get.names {
        found.push(converted::get(store, &key(kind, get.namespace.as_deref(), name)).await?);
    }
    Ok(found)
}

/// One object as it is, several as a list.
fn document(kind: Kind, mut objects: Vec<Value>, get: &Get) -> Value {
    if get.names.len() == 1 && objects.len() == 1 {
        return objects.remove(0);
    }
    json!({"apiVersion": kind.api_version(), "kind": format!("{kind}List"), "metadata": {}, "items": objects})
}

fn shown(object: &AnyResource, export: bool) -> Value {
    let mut value = object.to_json();
    if export && let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in ["uid", "resourceVersion", "creationTimestamp", "namespace"] {
            metadata.remove(field);
        }
    }
    value
}

fn parse_kind(text: &str) -> Result<Kind> {
    Kind::parse(text).ok_or_else(|| {
        let lower = text.to_lowercase();
        let near = Kind::ALL
            .iter()
            .map(|kind| kind.plural())
            .filter(|plural| plural.starts_with(&lower[..lower.len().min(3)]));
        let near: Vec<&str> = near.collect();
        let hint = if near.is_empty() {
            String::new()
        } else {
            format!("; did you mean {}?", near.join(" or "))
        };
        anyhow!("there is no kind {text:?}{hint}")
    })
}

fn key(kind: Kind, namespace: Option<&str>, name: &str) -> Key {
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
        let error = parse_kind("ippolo").unwrap_err().to_string();
        assert!(error.contains("ippools"), "{error}");
    }
}
