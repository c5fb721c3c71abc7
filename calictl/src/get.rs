//! `calictl get`: what is stored, filtered, in the format that is wanted, once or as it changes.

use crate::format::{Format, Table};
use crate::listing::Listing;
use crate::programmed::Programmed;
use crate::resources::{Kinds, key, parse_kind};
use crate::{columns, connection, converted, datastore, manifests, output};
use anyhow::{Context, Result, anyhow, bail};
use cali_api::selector::Selector;
use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::Datastore;
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// Kind: `ippool`, `networkpolicy`, `gnp`, ...
    #[arg(required_unless_present = "filename", value_parser = Kinds, hide_possible_values = true)]
    kind: Option<String>,
    /// Names; none means all
    names: Vec<String>,
    /// The resources that a file, folder or `-` names
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with_all = ["kind", "watch"])]
    filename: Vec<PathBuf>,
    /// Read folders recursively
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Namespace of namespaced kinds; `default` without
    #[arg(short, long)]
    namespace: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long, visible_short_alias = 'a')]
    all_namespaces: bool,
    /// ps, wide, yaml, json, name, custom-columns=NAME,..., custom-columns=HEADING:.path,..., jsonpath=TEMPLATE,
    /// jsonpath-file=FILE, go-template=TEMPLATE, go-template-file=FILE
    ///
    /// Go templates have fields, variables, if, range, with, pipelines and the functions and, or, not, eq, ne, lt, le, gt, ge,
    /// len, index, slice, print, println, printf, join, exists, base64decode, urlquery; no define, template, block, break,
    /// continue.
    #[arg(short, long, default_value = "ps", value_name = "FORMAT")]
    pub(crate) output: Format,
    /// Only what has these labels: `app=web,tier!=db`, or a selector: `app in {'web', 'api'}`
    #[arg(short = 'l', long, value_name = "LABELS", value_parser = labels)]
    selector: Option<Selector>,
    /// Only what has this value in a field: `spec.node=n1` (repeatable)
    #[arg(long, value_name = "PATH=VALUE", value_parser = field)]
    field: Vec<Field>,
    /// Go on, and print what changes
    #[arg(short, long)]
    watch: bool,
    /// Leave out what belongs to this cluster only (uid, revision, creation time)
    #[arg(long)]
    pub(crate) export: bool,
}

/// A field as a JSON pointer, and the text that it is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    pointer: String,
    value: String,
}

fn field(text: &str) -> Result<Field> {
    let (path, value) = text
        .split_once('=')
        .context("it is PATH=VALUE, as in spec.node=n1")?;
    Ok(Field {
        pointer: format!("/{}", path.trim_start_matches('.').replace('.', "/")),
        value: value.trim_start_matches('=').to_owned(),
    })
}

/// kubectl's `a=b,c!=d,e,!f`, or an expression of Calico's selectors.
fn labels(text: &str) -> Result<Selector> {
    let is_word = |letter: char| letter.is_ascii_alphanumeric() || "-_./=!, ".contains(letter);
    if !text.chars().all(is_word) || text.contains(" in ") {
        return Selector::parse(text).map_err(anyhow::Error::from);
    }
    let mut all = Selector::parse("all()")?;
    for term in text
        .split(',')
        .map(str::trim)
        .filter(|term| !term.is_empty())
    {
        let one = if let Some((label, value)) = term.split_once("!=") {
            Selector::equals(label.trim(), value.trim()).negated()
        } else if let Some((label, value)) = term.split_once('=') {
            Selector::equals(label.trim(), value.trim_start_matches('=').trim())
        } else if let Some(label) = term.strip_prefix('!') {
            Selector::has(label.trim()).negated()
        } else {
            Selector::has(term)
        };
        all = all.and(one);
    }
    Ok(all)
}

pub(crate) async fn run(get: &Get) -> Result<()> {
    let store = connection::open().await?;
    let Some(kind) = &get.kind else {
        return of_files(store.as_ref(), get).await;
    };
    let kind = parse_kind(kind)?;
    let table = get.output.table(kind)?;
    if get.watch {
        return watch(store, kind, table.as_ref(), get).await;
    }
    let programmed = match get.output {
        Format::Wide => Programmed::ask(kind).await,
        _ => None,
    };
    if get.names.is_empty() {
        return list(store, kind, table.as_ref(), programmed.as_ref(), get).await;
    }
    let mut found = Vec::with_capacity(get.names.len());
    for name in &get.names {
        let key = key(kind, get.namespace.as_deref(), name);
        let one = converted::get(store.as_ref(), &key).await;
        found.push(one.context("failed to get resources")?);
    }
    print(kind, &found, table.as_ref(), programmed.as_ref(), get)
}

/// Each kind of the files after the other.
async fn of_files(store: &dyn Datastore, get: &Get) -> Result<()> {
    let documents = manifests::read(&get.filename, get.recursive, get.namespace.as_deref())?;
    if documents.is_empty() {
        bail!("No resources specified");
    }
    let mut by_kind: BTreeMap<Kind, Vec<Arc<AnyResource>>> = BTreeMap::new();
    for document in &documents {
        let found = converted::get(store, &document.value.key())
            .await
            .context("failed to get resources")?;
        by_kind.entry(found.kind()).or_default().push(found);
    }
    if by_kind.len() > 1 && get.output.table(Kind::IPPool)?.is_none() && get.output != Format::Name
    {
        let objects: Vec<Value> = by_kind
            .values()
            .flatten()
            .filter(|object| get.wants(object))
            .map(|object| shown(object, get.export))
            .collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": objects});
        output::write(get.output.document(&list)?);
        return Ok(());
    }
    for (kind, objects) in by_kind {
        print(kind, &objects, get.output.table(kind)?.as_ref(), None, get)?;
    }
    Ok(())
}

impl Get {
    /// The namespace that is looked into; none for all, and for kinds that have none.
    fn within(&self, kind: Kind) -> Option<&str> {
        match (&self.namespace, self.all_namespaces) {
            (_, true) => None,
            (Some(namespace), false) => Some(namespace.as_str()),
            (None, false) => kind.is_namespaced().then_some("default"),
        }
    }

    fn has_namespace_column(&self, kind: Kind) -> bool {
        kind.is_namespaced() && (self.all_namespaces || self.namespace.is_some())
    }

    /// Whether the labels and fields are those that were asked for.
    pub(crate) fn wants(&self, object: &AnyResource) -> bool {
        let selected = self
            .selector
            .as_ref()
            .is_none_or(|selector| selector.matches(&object.metadata().labels));
        if !selected || self.field.is_empty() {
            return selected;
        }
        let value = object.to_json();
        self.field.iter().all(|field| {
            let found = value.pointer(&field.pointer);
            found.map(columns::text).unwrap_or_default() == field.value
        })
    }

    /// Whether a key is among what was asked for.
    fn names(&self, kind: Kind, key: &Key) -> bool {
        let within = self.within(kind);
        (within.is_none() || key.namespace.as_deref() == within)
            && (self.names.is_empty() || self.names.iter().any(|name| *name == *key.name))
    }

    pub(crate) fn cells(&self, kind: Kind, table: &Table, object: &Value) -> Result<Vec<String>> {
        let mut cells = table.row(object)?;
        if self.has_namespace_column(kind) {
            let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
            cells.insert(0, namespace.to_owned());
        }
        Ok(cells)
    }

    pub(crate) fn headings<'a>(&self, kind: Kind, table: &'a Table) -> Vec<&'a str> {
        let mut headings = table.headings();
        if self.has_namespace_column(kind) {
            headings.insert(0, "NAMESPACE");
        }
        headings
    }
}

/// What was asked for by name: one object as it is, several as a list.
fn print(
    kind: Kind,
    found: &[Arc<AnyResource>],
    table: Option<&Table>,
    programmed: Option<&Programmed>,
    get: &Get,
) -> Result<()> {
    let wanted: Vec<&Arc<AnyResource>> = found.iter().filter(|object| get.wants(object)).collect();
    if let ([one], None, true) = (
        wanted.as_slice(),
        table,
        get.names.len() + get.filename.len() == 1 && get.output != Format::Name,
    ) {
        output::write(get.output.document(&shown(one, get.export))?);
        return Ok(());
    }
    let mut listing = Listing::new(kind, table, programmed, get);
    listing.add(found, None)?;
    listing.end()
}

/// All objects of a kind, as they come in.
async fn list(
    store: Arc<dyn Datastore>,
    kind: Kind,
    table: Option<&Table>,
    programmed: Option<&Programmed>,
    get: &Get,
) -> Result<()> {
    let failed = "failed to get resources";
    let mut parts = converted::stream(store, kind, get.within(kind))
        .await
        .context(failed)?;
    let mut listing = Listing::new(kind, table, programmed, get);
    while let Some(part) = parts.recv().await {
        let part = part.context(failed)?;
        for bad in &part.undecodable {
            output::warning(format_args!("{} cannot be read: {}", bad.key, bad.reason));
        }
        listing.add(&part.objects, Some(part.revision.as_str()))?;
    }
    listing.end()
}

pub(crate) fn name_line(object: &AnyResource) -> String {
    format!("{}/{}\n", object.kind().plural(), object.metadata().name)
}

pub(crate) fn shown(object: &AnyResource, export: bool) -> Value {
    if !export {
        return object.to_json();
    }
    let mut value = datastore::portable(object);
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("namespace");
    }
    value
}

/// Prints everything, then each change. In a table the first column says what happened, and widths only grow.
async fn watch(
    store: Arc<dyn Datastore>,
    kind: Kind,
    table: Option<&Table>,
    get: &Get,
) -> Result<()> {
    let mut events = cali_datastore::sync::start(store, &[kind]);
    let mut watched = Watched {
        kind,
        table,
        get,
        shown: BTreeMap::new(),
        in_sync: false,
        widths: Vec::new(),
    };
    while let Some(event) = events.recv().await {
        match event {
            SyncEvent::Status(SyncStatus::InSync) => watched.begin()?,
            SyncEvent::Status(_) | SyncEvent::Complete(_) => {}
            SyncEvent::Updates(updates) => {
                for update in updates {
                    watched.on_update(update.key, update.value)?;
                }
            }
        }
    }
    Err(anyhow!("the datastore's stream of changes ended"))
}

struct Watched<'a> {
    kind: Kind,
    table: Option<&'a Table>,
    get: &'a Get,
    /// What was printed last of each object that is wanted.
    shown: BTreeMap<Key, Arc<AnyResource>>,
    in_sync: bool,
    widths: Vec<usize>,
}

impl Watched<'_> {
    fn on_update(&mut self, key: Key, value: Option<Arc<AnyResource>>) -> Result<()> {
        if key.kind != self.kind || !self.get.names(self.kind, &key) {
            return Ok(());
        }
        let wanted = value.filter(|object| self.get.wants(object));
        let (word, object) = match (wanted, self.shown.remove(&key)) {
            (None, None) => return Ok(()),
            (None, Some(gone)) => ("DELETED", gone),
            (Some(object), before) => {
                self.shown.insert(key, Arc::clone(&object));
                match before {
                    Some(before) if before == object => return Ok(()),
                    Some(_) => ("MODIFIED", object),
                    None => ("ADDED", object),
                }
            }
        };
        if self.in_sync {
            self.print(word, &object)?;
        }
        Ok(())
    }

    /// What is there at the beginning, once it is complete.
    fn begin(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.in_sync, true) {
            return Ok(());
        }
        if let Some(table) = self.table {
            let headings: Vec<String> = std::iter::once("EVENT")
                .chain(self.get.headings(self.kind, table))
                .map(str::to_owned)
                .collect();
            self.widths = vec![8; headings.len()];
            for object in self.shown.values() {
                let cells = self.get.cells(self.kind, table, &object.to_json())?;
                for (width, cell) in self.widths[1..].iter_mut().zip(&cells) {
                    *width = (*width).max(cell.chars().count());
                }
            }
            self.line(&headings);
        }
        let all: Vec<Arc<AnyResource>> = self.shown.values().cloned().collect();
        for object in all {
            self.print("ADDED", &object)?;
        }
        Ok(())
    }

    fn print(&mut self, word: &str, object: &AnyResource) -> Result<()> {
        let value = shown(object, self.get.export);
        if let Some(table) = self.table {
            let mut cells = self.get.cells(self.kind, table, &value)?;
            cells.insert(0, word.to_owned());
            self.line(&cells);
            return Ok(());
        }
        match &self.get.output {
            Format::Name => output::write(name_line(object)),
            // A line each, as kubectl's `--output-watch-events` has them.
            Format::Json => output::line(json!({"type": word, "object": value})),
            Format::Yaml => output::write(format!(
                "---\n# {word}\n{}",
                self.get.output.document(&value)?
            )),
            other => output::line(other.document(&value)?),
        }
        Ok(())
    }

    fn line(&mut self, cells: &[String]) {
        let mut text = String::new();
        for (width, cell) in self.widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
            text.push_str(&format!("{cell:<0$}", *width + 3));
        }
        output::line(text.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_may_be_written_as_kubectl_or_as_calico_has_them() {
        let web = BTreeMap::from([("app".to_owned(), "web"), ("a.io/tier".to_owned(), "front")]);
        for (text, wanted) in [
            ("app=web", true),
            ("app==web,a.io/tier!=db", true),
            ("app=api", false),
            ("app,!gone", true),
            ("!app", false),
            ("app == 'web'", true),
            ("app in {'web', 'api'} && has(a.io/tier)", true),
        ] {
            assert_eq!(labels(text).expect(text).matches(&web), wanted, "{text}");
        }
        assert!(labels("app == ").is_err() || labels("app in {").is_err());
    }

    #[test]
    fn a_field_is_a_path_and_its_value() {
        assert_eq!(
            field("spec.node=n1").expect("a field"),
            Field {
                pointer: "/spec/node".into(),
                value: "n1".into()
            }
        );
        assert!(field("spec.node").is_err());
    }
}
