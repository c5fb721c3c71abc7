//! What `get -o` can print.

mod gotemplate;
mod jsonpath;

use crate::columns::{self, Column};
use anyhow::{Context, Result, bail};
use cali_api::Kind;
use jsonpath::Template;
use serde_json::Value;
use std::str::FromStr;

/// A value of `-o`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Format {
    /// The kind's columns.
    Ps,
    /// More of them.
    Wide,
    Yaml,
    Json,
    /// `kind/name` lines, for scripts.
    Name,
    Custom(Vec<Custom>),
    JsonPath(Template),
    GoTemplate(gotemplate::Template),
}

/// One column of `custom-columns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Custom {
    /// `NAME`: one of the kind's own, as `calicoctl` has it.
    Known(String),
    /// `HEADING:.path`, as kubectl has it.
    Path(String, Template),
}

impl FromStr for Format {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (word, argument) = match text.split_once('=') {
            Some((word, argument)) => (word, Some(argument)),
            None => (text, None),
        };
        Ok(match (word, argument) {
            ("ps", None) => Self::Ps,
            ("wide", None) => Self::Wide,
            ("yaml", None) => Self::Yaml,
            ("json", None) => Self::Json,
            ("name", None) => Self::Name,
            ("custom-columns", Some(columns)) => Self::Custom(customs(columns)?),
            ("jsonpath", Some(template)) => Self::JsonPath(Template::parse(template)?),
            ("jsonpath-file", Some(file)) => Self::JsonPath(Template::parse(&template_in(file)?)?),
            ("go-template", Some(template)) => {
                Self::GoTemplate(gotemplate::Template::parse(template)?)
            }
            ("go-template-file", Some(file)) => {
                Self::GoTemplate(gotemplate::Template::parse(&template_in(file)?)?)
            }
            (
                "custom-columns" | "jsonpath" | "jsonpath-file" | "go-template"
                | "go-template-file",
                None,
            ) => {
                bail!("{word} needs a value: -o {word}=…")
            }
            _ => bail!(
                "it is ps, wide, yaml, json, name, custom-columns=NAME,…, custom-columns=HEADING:.path,…, jsonpath=TEMPLATE, \
                 jsonpath-file=FILE, go-template=TEMPLATE or go-template-file=FILE"
            ),
        })
    }
}

fn template_in(file: &str) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("cannot read the template {file}"))
}

fn customs(text: &str) -> Result<Vec<Custom>> {
    let customs = text.split(',').filter(|column| !column.is_empty());
    let customs: Vec<Custom> = customs
        .map(|column| match column.split_once(':') {
            Some((heading, path)) => Ok(Custom::Path(heading.to_owned(), Template::parse(path)?)),
            None => Ok(Custom::Known(column.to_uppercase())),
        })
        .collect::<Result<_>>()?;
    if customs.is_empty() {
        bail!("custom-columns names no column");
    }
    Ok(customs)
}

impl Format {
    /// Columns and how their cells are read, for the formats that are tables. An unknown heading is refused with those that
    /// there are.
    pub(crate) fn table(&self, kind: Kind) -> Result<Option<Table>> {
        let (own, custom) = match self {
            Self::Ps => (columns::of(kind, false), None),
            Self::Wide => (columns::of(kind, true), None),
            Self::Custom(custom) => (columns::of(kind, true), Some(custom)),
            _ => return Ok(None),
        };
        let Some(custom) = custom else {
            return Ok(Some(Table(own.into_iter().map(Cells::Own).collect())));
        };
        let known: Vec<&str> = own.iter().map(|column| column.heading).collect();
        let known = known.join(", ");
        let mut cells = Vec::with_capacity(custom.len());
        for column in custom {
            cells.push(match column {
                Custom::Path(heading, path) => Cells::Path(heading.clone(), path.clone()),
                Custom::Known(heading) => own
                    .iter()
                    .find(|column| column.heading == heading)
                    .map(|column| Cells::Own(*column))
                    .with_context(|| format!("{kind} has no column {heading} (it has {known}); any field: custom-columns=HEADING:.path"))?,
            });
        }
        Ok(Some(Table(cells)))
    }

    /// The whole document in the formats that are none.
    pub(crate) fn document(&self, document: &Value) -> Result<String> {
        Ok(match self {
            Self::Json => serde_json::to_string_pretty(document)? + "\n",
            Self::JsonPath(template) => template.render(document)?,
            Self::GoTemplate(template) => template.render(document)?,
            _ => serde_saphyr::to_string(document).context("cannot write YAML")?,
        })
    }
}

/// The columns that are printed.
pub(crate) struct Table(Vec<Cells>);

enum Cells {
    Own(Column),
    Path(String, Template),
}

impl Table {
    pub(crate) fn headings(&self) -> Vec<&str> {
        self.0
            .iter()
            .map(|cells| match cells {
                Cells::Own(column) => column.heading,
                Cells::Path(heading, _) => heading.as_str(),
            })
            .collect()
    }

    pub(crate) fn row(&self, object: &Value) -> Result<Vec<String>> {
        let cell = |cells: &Cells| match cells {
            Cells::Own(column) => Ok(column.cell(object)),
            Cells::Path(_, path) => path.render(object),
        };
        self.0.iter().map(cell).collect()
    }
}
