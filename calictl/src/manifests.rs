//! Manifests from files, checked as far as that is possible without the datastore.

use anyhow::{Context, Result, bail};
use cali_api::manifest::{self, Located};
use cali_api::{AnyResource, defaults, validate};
use cali_datastore::{Datastore, Error, preflight};
use std::io::Read;
use std::path::{Path, PathBuf};

/// An object with the place it was read from.
pub(crate) type Document = Located<AnyResource>;

/// Reads every document of every file; all mistakes of all files are reported at once, each with its place.
pub(crate) fn read(
    files: &[PathBuf],
    recursive: bool,
    namespace: Option<&str>,
) -> Result<Vec<Document>> {
    let mut all = Vec::new();
    for file in files {
        all.extend(texts(file, recursive)?);
    }
    parse(&all, namespace)
}

/// As [`read`], of texts and the names they go by.
pub(crate) fn parse(texts: &[(String, String)], namespace: Option<&str>) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    let mut mistakes = Vec::new();
    let mut unread = 0;
    for (name, text) in texts {
        match manifest::objects_of(name, text) {
            Ok(parsed) => {
                documents.extend(parsed.objects);
                unread += parsed.errors.len();
                mistakes.extend(parsed.errors);
            }
            Err(error) => {
                mistakes.push(error);
                unread += count(text);
            }
        }
    }
    for document in &mut documents {
        let object = &mut document.value;
        if object.kind().is_namespaced() && object.metadata().namespace.is_none() {
            object.metadata_mut().namespace = Some(namespace.unwrap_or("default").to_owned());
        }
        let mut complete = object.clone();
        defaults(&mut complete);
        if let Err(fields) = validate(&complete) {
            mistakes.extend(fields.iter().map(|field| document.field_error(field)));
        }
    }
    mistakes.sort_by(|a, b| (&a.file, a.line, a.column).cmp(&(&b.file, b.line, b.column)));
    refuse(&mistakes, documents.len() + unread)?;
    Ok(documents)
}

/// How many documents a text has that cannot be read.
fn count(text: &str) -> usize {
    let mut count = 0;
    let mut has_content = false;
    for line in text.lines() {
        if line.starts_with("---") {
            has_content = false;
        } else if !has_content && !line.trim().is_empty() && !line.trim_start().starts_with('#') {
            has_content = true;
            count += 1;
        }
    }
    count
}

/// Asks the datastore whether it would take all of them, before the first is written.
pub(crate) async fn check(store: &dyn Datastore, documents: &[Document]) -> Result<()> {
    let objects: Vec<AnyResource> = documents
        .iter()
        .map(|document| document.value.clone())
        .collect();
    let mut mistakes = Vec::new();
    for refused in preflight::check(store, &objects).await? {
        let document = &documents[refused.position];
        match &refused.source {
            Error::Invalid { fields, .. } => {
                mistakes.extend(fields.iter().map(|field| document.field_error(field)));
            }
            other => mistakes.push(document.error(other)),
        }
    }
    refuse(&mistakes, documents.len())
}

fn refuse(mistakes: &[manifest::ManifestError], resources: usize) -> Result<()> {
    if mistakes.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    let these = if mistakes.len() == 1 { "this" } else { "these" };
    let whole = match resources {
        0 | 1 => String::new(),
        count => format!(" with any of the {count} resources"),
    };
    bail!(
        "{}\nnothing was done{whole}: mend {these} and run the command again",
        lines.join("\n")
    )
}

/// Name and text of a file, of standard input, or of the manifests of a folder in the order of their names.
pub(crate) fn texts(file: &Path, recursive: bool) -> Result<Vec<(String, String)>> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("cannot read standard input")?;
        return Ok(vec![("<stdin>".to_owned(), text)]);
    }
    if !file.is_dir() {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        return Ok(vec![(file.display().to_string(), text)]);
    }
    let entries =
        std::fs::read_dir(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        let is_manifest = path
            .extension()
            .is_some_and(|found| ["yaml", "yml", "json"].iter().any(|known| found == *known));
        if is_manifest || (recursive && path.is_dir()) {
            all.extend(texts(&path, recursive)?);
        }
    }
    Ok(all)
}
