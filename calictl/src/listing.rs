//! A list on its way to the screen: what comes in page by page is printed page by page, and not kept.
//!
//! A table's widths are those of its first rows, [`SETTLED`] of them; wider cells that come later widen the columns from there on. What
//! a template says can depend on all objects: for those formats, and for no other, everything is kept.

use std::sync::Arc;

use anyhow::Result;
use cali_api::{AnyResource, Kind};
use serde_json::{Value, json};

use crate::columns::Rows;
use crate::format::{Format, Table};
use crate::get::{Get, name_line, shown};
use crate::output;
use crate::programmed::Programmed;

/// How many rows of a table wait for the widths of its columns.
const SETTLED: usize = 5000;
/// Text that is gathered before it is written.
const CHUNK: usize = 1 << 16;

pub(crate) struct Listing<'a> {
    kind: Kind,
    get: &'a Get,
    form: Form<'a>,
    text: String,
}

enum Form<'a> {
    Names,
    Rows {
        table: &'a Table,
        programmed: Option<&'a Programmed>,
        rows: Rows,
    },
    /// The items of a document: what stands before and after them, and whether there was one.
    Items {
        around: Option<(String, String)>,
        some: bool,
    },
    Whole(Vec<Value>),
}

impl<'a> Listing<'a> {
    pub(crate) fn new(
        kind: Kind,
        table: Option<&'a Table>,
        programmed: Option<&'a Programmed>,
        get: &'a Get,
    ) -> Self {
        let form = match (&get.output, table) {
            (Format::Name, _) => Form::Names,
            (_, Some(table)) => {
                let mut headings = get.headings(kind, table);
                headings.extend(programmed.map(|_| "PROGRAMMED"));
                Form::Rows {
                    table,
                    programmed,
                    rows: Rows::new(&headings),
                }
            }
            (Format::Json | Format::Yaml, None) => Form::Items {
                around: None,
                some: false,
            },
            (_, None) => Form::Whole(Vec::new()),
        };
        Self {
            kind,
            get,
            form,
            text: String::new(),
        }
    }

    /// Takes some objects; prints what can be. `revision` is that of the list, where it is one.
    pub(crate) fn add(
        &mut self,
        objects: &[Arc<AnyResource>],
        revision: Option<&str>,
    ) -> Result<()> {
        self.begin(revision)?;
        for object in objects.iter().filter(|object| self.get.wants(object)) {
            match &mut self.form {
                Form::Names => self.text.push_str(&name_line(object)),
                Form::Rows {
                    table,
                    programmed,
                    rows,
                } => {
                    let mut cells = self.get.cells(self.kind, table, &object.to_json())?;
                    cells.extend(programmed.map(|programmed| programmed.cell(&object.key())));
                    if rows.push(cells) >= SETTLED {
                        rows.print_to(&mut self.text);
                    }
                }
                Form::Items { around, some } => {
                    if let (false, Some((head, _))) = (*some, around.as_ref()) {
                        self.text.push_str(head);
                    }
                    let object = shown(object, self.get.export);
                    item(&self.get.output, object, *some, &mut self.text)?;
                    *some = true;
                }
                Form::Whole(all) => all.push(shown(object, self.get.export)),
            }
            if self.text.len() >= CHUNK {
                output::write(std::mem::take(&mut self.text));
            }
        }
        Ok(())
    }

    /// Prints the rest.
    pub(crate) fn end(mut self) -> Result<()> {
        self.begin(None)?;
        match &mut self.form {
            Form::Names => {}
            Form::Rows { rows, .. } => rows.print_to(&mut self.text),
            Form::Items { some: false, .. } => {
                let empty = document(self.kind, Vec::new(), None);
                self.text = self.get.output.document(&empty)?;
            }
            Form::Items { around, .. } => {
                let tail = around.take().map(|(_, tail)| tail);
                self.text.push_str(&tail.unwrap_or_default());
            }
            Form::Whole(all) => {
                let all = document(self.kind, std::mem::take(all), None);
                self.text = self.get.output.document(&all)?;
            }
        }
        output::write(self.text);
        Ok(())
    }

    fn begin(&mut self, revision: Option<&str>) -> Result<()> {
        if let Form::Items { around, .. } = &mut self.form
            && around.is_none()
        {
            let revision = revision.filter(|_| !self.get.export);
            let empty = document(self.kind, Vec::new(), revision);
            *around = Some(halves(&self.get.output, &empty)?);
        }
        Ok(())
    }
}

/// A list as a document.
fn document(kind: Kind, items: Vec<Value>, revision: Option<&str>) -> Value {
    let metadata = revision.map_or_else(|| json!({}), |at| json!({"resourceVersion": at}));
    json!({"apiVersion": kind.api_version(), "kind": format!("{kind}List"), "metadata": metadata, "items": items})
}

/// What stands before the items of a list, and what after them.
fn halves(format: &Format, empty: &Value) -> Result<(String, String)> {
    let text = format.document(empty)?;
    let (mark, open, close) = match format {
        Format::Json => ("[]", "[\n", "\n  ]"),
        _ => (" []\n", "\n", ""),
    };
    let (head, tail) = text.split_once(mark).unwrap_or((&text, ""));
    Ok((format!("{head}{open}"), format!("{close}{tail}")))
}

/// One item as it stands in its list.
fn item(format: &Format, object: Value, follows: bool, text: &mut String) -> Result<()> {
    if *format == Format::Json {
        if follows {
            text.push_str(",\n");
        }
        let lines = format.document(&object)?;
        for (number, line) in lines.trim_end().lines().enumerate() {
            if number > 0 {
                text.push('\n');
            }
            text.push_str("    ");
            text.push_str(line);
        }
        return Ok(());
    }
    let alone = format.document(&json!({"items": [object]}))?;
    text.push_str(alone.split_once('\n').map_or("", |(_, item)| item));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_one_by_one_make_the_document() {
        let items = [
            json!({"a": {"b": ["x", "two\nlines\n", {}]}, "c": []}),
            json!({"a": "- no list: {}", "d": {"e": null, "f": [[1], [2]]}}),
        ];
        for format in [Format::Json, Format::Yaml] {
            for count in 1..=2 {
                let items = &items[..count];
                let whole = document(Kind::IPPool, items.to_vec(), Some("7"));
                let empty = document(Kind::IPPool, Vec::new(), Some("7"));
                let (mut text, tail) = halves(&format, &empty).unwrap();
                for (number, one) in items.iter().enumerate() {
                    item(&format, one.clone(), number > 0, &mut text).unwrap();
                }
                assert_eq!(text + &tail, format.document(&whole).unwrap());
            }
        }
    }
}
