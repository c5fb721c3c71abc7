//! Manifests: YAML files (or JSON, which is YAML) with any number of objects.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::{Budget, Location, Spanned};

use crate::AnyResource;
use crate::decode::{self, DecodeError, join};
use crate::validate::FieldError;

/// What is wrong with a manifest, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: {message}")]
pub struct ManifestError {
    /// The file as it was named.
    pub file: String,
    /// Counted from 1; 0 where no place can be told.
    pub line: u64,
    /// Counted from 1; 0 where no place can be told.
    pub column: u64,
    /// The field and the reason.
    pub message: String,
}

/// An object and where it stands.
#[derive(Debug, Clone)]
pub struct Located<T> {
    /// The object.
    pub value: T,
    /// The file as it was named.
    pub file: Arc<str>,
    /// The line of its first field.
    pub line: u64,
    /// The column of its first field.
    pub column: u64,
    /// Path of the object within its document: empty, or `items[n]` in a list.
    prefix: String,
    places: Arc<Places>,
}

impl<T> Located<T> {
    /// An error about a field of the object, such as [`crate::validate`] finds.
    #[must_use]
    pub fn field_error(&self, error: &FieldError) -> ManifestError {
        self.places.error(
            &self.file,
            &join(&self.prefix, &error.path),
            error.to_string(),
        )
    }

    /// An error about the object as a whole.
    #[must_use]
    pub fn error(&self, message: impl fmt::Display) -> ManifestError {
        ManifestError {
            file: self.file.to_string(),
            line: self.line,
            column: self.column,
            message: message.to_string(),
        }
    }
}

/// Where each field of a document stands, by path.
#[derive(Debug, Default)]
struct Places(HashMap<String, (u64, u64)>);

impl Places {
    /// The place of a field, or of the nearest one around it.
    fn of(&self, path: &str) -> (u64, u64) {
        let mut path = path;
        loop {
            if let Some(place) = self.0.get(path) {
                return *place;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None if path.is_empty() => return (0, 0),
                None => path = "",
            }
        }
    }

    fn error(&self, file: &str, path: &str, message: String) -> ManifestError {
        let (line, column) = self.of(path);
        ManifestError {
            file: file.to_owned(),
            line,
            column,
            message,
        }
    }
}

/// A document with the places of its parts.
enum Tree {
    Scalar(Value),
    List(Vec<Spanned<Self>>),
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Tree;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
                Ok(Tree::Scalar(value.into()))
            }

            fn visit_unit<E>(self) -> Result<Tree, E> {
                Ok(Tree::Scalar(Value::Null))
            }

            fn visit_none<E>(self) -> Result<Tree, E> {
                Ok(Tree::Scalar(Value::Null))
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
                Tree::deserialize(deserializer)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
                let mut list = Vec::new();
                while let Some(entry) = entries.next_element()? {
                    list.push(entry);
                }
                Ok(Tree::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
                let mut map = Vec::new();
                while let Some(entry) = entries.next_entry()? {
                    map.push(entry);
                }
                Ok(Tree::Map(map))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

fn place(location: &Location) -> (u64, u64) {
    (location.line(), location.column())
}

/// The JSON form of a document; notes the places on the way.
fn flatten(tree: Tree, path: &str, places: &mut Places) -> Value {
    match tree {
        Tree::Scalar(value) => value,
        Tree::List(entries) => {
            let convert = |(index, entry): (usize, Spanned<Tree>)| {
                let path = format!("{path}[{index}]");
                places.0.insert(path.clone(), place(&entry.referenced));
                flatten(entry.value, &path, places)
            };
            Value::Array(entries.into_iter().enumerate().map(convert).collect())
        }
        Tree::Map(entries) => {
            let mut fields = Map::new();
            for (name, value) in entries {
                let path = join(path, &name.value);
                places.0.insert(path.clone(), place(&name.referenced));
                fields.insert(name.value, flatten(value.value, &path, places));
            }
            Value::Object(fields)
        }
    }
}

/// The objects of a document, which may be a list of objects; each with its path.
fn objects(document: Value) -> Vec<(String, Value)> {
    let kind = document
        .get("kind")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let Some(member_kind) = kind.strip_suffix("List").map(str::to_owned) else {
        return vec![(String::new(), document)];
    };
    let api_version = document.get("apiVersion").cloned().unwrap_or(Value::Null);
    let Value::Object(mut list) = document else {
        return Vec::new();
    };
    let Some(Value::Array(items)) = list.remove("items") else {
        return Vec::new();
    };
    let members = items.into_iter().enumerate().map(|(index, mut item)| {
        // Members of a list of one kind may leave their type to the list.
        if let Value::Object(fields) = &mut item
            && !member_kind.is_empty()
        {
            fields
                .entry("apiVersion")
                .or_insert_with(|| api_version.clone());
            fields
                .entry("kind")
                .or_insert_with(|| member_kind.clone().into());
        }
        (format!("items[{index}]"), item)
    });
    members.collect()
}

fn read(value: Value) -> Result<AnyResource, DecodeError> {
    let input = value.clone();
    let object = AnyResource::from_json(value)?;
    if object.kind().is_native()
        && let Some(error) = decode::ignored_field(&input, &object.to_json(), "")
    {
        return Err(error);
    }
    if object.metadata().name.is_empty() && object.metadata().generate_name.is_none() {
        return Err(DecodeError::new("metadata.name", "is missing"));
    }
    Ok(object)
}

/// Reads all objects of a manifest, or tells everything that is wrong with it. `file` is only
/// named in errors. Documents may hold an object, a list of objects, or nothing.
pub fn parse(file: &str, text: &str) -> Result<Vec<Located<AnyResource>>, Vec<ManifestError>> {
    let parsed = objects_of(file, text).map_err(|error| vec![error])?;
    if parsed.errors.is_empty() {
        Ok(parsed.objects)
    } else {
        Err(parsed.errors)
    }
}

/// What a text of so many octets may hold. Without aliases it holds no more than it is long, so a whole cluster's resources may stand
/// in one; what aliases make of a short one stays bounded as the parser bounds it.
fn budget(length: usize) -> Option<Budget> {
    let mut budget = Budget::default();
    for (limit, of_text) in [
        (&mut budget.max_events, length.saturating_mul(2)),
        (&mut budget.max_nodes, length),
        (&mut budget.max_documents, length),
        (&mut budget.max_total_scalar_bytes, length),
    ] {
        *limit = of_text.max(*limit);
    }
    Some(budget)
}

/// What a manifest holds, good and bad.
#[derive(Debug, Default)]
pub struct Parsed {
    /// The objects that can be read, in their order.
    pub objects: Vec<Located<AnyResource>>,
    /// One for each object that cannot.
    pub errors: Vec<ManifestError>,
}

/// As [`parse`], object by object, so that the good ones can be checked further beside the bad ones.
///
/// # Errors
/// The text is not YAML: no object of it is known.
pub fn objects_of(file: &str, text: &str) -> Result<Parsed, ManifestError> {
    let options = serde_saphyr::options! { strict_booleans: true, budget: budget(text.len()) };
    let documents: Vec<Spanned<Tree>> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| {
            let (line, column) = error.location().as_ref().map_or((0, 0), place);
            let message = de_message(error.without_snippet());
            ManifestError {
                file: file.to_owned(),
                line,
                column,
                message,
            }
        })?;
    let file: Arc<str> = file.into();
    let mut parsed = Parsed::default();
    for document in documents {
        let start = place(&document.referenced);
        let mut places = Places::default();
        places.0.insert(String::new(), start);
        let value = flatten(document.value, "", &mut places);
        if value.is_null() {
            continue;
        }
        let places = Arc::new(places);
        for (prefix, value) in objects(value) {
            match read(value) {
                Ok(value) => {
                    let (line, column) = places.of(&prefix);
                    let (file, places) = (Arc::clone(&file), Arc::clone(&places));
                    parsed.objects.push(Located {
                        value,
                        file,
                        line,
                        column,
                        prefix,
                        places,
                    });
                }
                Err(error) => {
                    let error = error.within(&prefix);
                    let error = places.error(&file, &error.path, error.to_string());
                    parsed.errors.push(error);
                }
            }
        }
    }
    Ok(parsed)
}

/// The first line of the YAML parser's message, without the place, which we tell ourselves.
fn de_message(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    let line = text
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or_default();
    let line = line.trim_start_matches("error: ");
    let line = line
        .split_once(": ")
        .filter(|(head, _)| head.starts_with("line "))
        .map_or(line, |(_, tail)| tail);
    format!("not valid YAML: {line}")
}
