//! `-o jsonpath=TEMPLATE`, with kubectl's template around the path: text, `{.a.b}`, `{range .items[*]}…{end}`, `{"\n"}`.
//!
//! Paths are RFC 9535's, except that a leading `$` may be left out and dots in names may be escaped (`.labels.app\.io/name`),
//! as kubectl has it.

use anyhow::{Context, Result, bail, ensure};
use jsonpath_rust::JsonPath;
use serde_json::Value;
use std::iter::Peekable;
use std::str::Chars;

/// A template, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    /// Values, with a space between.
    Path(String),
    Range(String, Vec<Self>),
}

impl Template {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        // kubectl takes a bare path, too.
        let braced = if text.contains('{') {
            text.to_owned()
        } else {
            format!("{{{text}}}")
        };
        let mut rest = braced.as_str();
        let parts = parts(&mut rest, false)?;
        Ok(Self(parts))
    }

    pub(crate) fn render(&self, value: &Value) -> Result<String> {
        let mut text = String::new();
        render(&self.0, value, &mut text)?;
        Ok(text)
    }
}

/// The parts up to the end, or up to `{end}` in a range.
fn parts(rest: &mut &str, in_range: bool) -> Result<Vec<Part>> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let Some(open) = rest.find('{') else {
            found.push(Part::Text(std::mem::take(rest).to_owned()));
            break;
        };
        if open > 0 {
            found.push(Part::Text(rest[..open].to_owned()));
        }
        let close = closing(&rest[open..])
            .with_context(|| format!("a '}}' is missing after {:?}", &rest[open..]))?;
        let inside = rest[open + 1..open + close].trim();
        *rest = &rest[open + close + 1..];
        if inside == "end" {
            ensure!(in_range, "{{end}} without {{range …}}");
            return Ok(found);
        }
        found.push(match inside.strip_prefix("range ") {
            Some(over) => Part::Range(path(over.trim())?, parts(rest, true)?),
            None => match inside.chars().next() {
                Some('"' | '\'') => Part::Text(literal(inside)?),
                _ => Part::Path(path(inside)?),
            },
        });
    }
    ensure!(!in_range, "a {{range …}} has no {{end}}");
    Ok(found)
}

/// Offset of the brace that closes the first one; braces in quotes do not count.
fn closing(text: &str) -> Option<usize> {
    let (mut quote, mut escaped) = (None, false);
    for (at, letter) in text.char_indices() {
        match (quote, letter) {
            _ if escaped => escaped = false,
            (_, '\\') => escaped = true,
            (None, '"' | '\'') => quote = Some(letter),
            (Some(open), close) if open == close => quote = None,
            (None, '}') => return Some(at),
            _ => {}
        }
    }
    None
}

fn literal(text: &str) -> Result<String> {
    let inner = text
        .strip_prefix(['"', '\''])
        .and_then(|text| text.strip_suffix(['"', '\'']))
        .with_context(|| format!("{text} is not closed"))?;
    let quoted = format!("\"{}\"", inner.replace('"', "\\\""));
    serde_json::from_str(&quoted).with_context(|| format!("{text} is no text"))
}

/// A path as RFC 9535 writes it. Wrong ones are found here, not at the first object.
fn path(text: &str) -> Result<String> {
    let body = text.strip_prefix(['$', '@']).unwrap_or(text);
    let dotted = match body.chars().next() {
        None | Some('.' | '[') => body.to_owned(),
        Some(_) => format!(".{body}"),
    };
    let mut path = String::from("$");
    let mut letters = dotted.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '.' if letters.next_if_eq(&'.').is_some() => name(&mut letters, "..", &mut path),
            '.' if letters.peek().is_none_or(|next| *next == '[') => {}
            '.' => name(&mut letters, ".", &mut path),
            '[' => bracket(&mut letters, &mut path)?,
            other => bail!("{text:?} is no path: unexpected {other:?}"),
        }
    }
    jsonpath_rust::parser::parse_json_path(&path)
        .map_err(|error| anyhow::anyhow!("{text:?} is no path: {error}"))?;
    Ok(path)
}

/// A name after one dot or two, quoted where RFC 9535 wants it so.
fn name(letters: &mut Peekable<Chars<'_>>, dots: &str, path: &mut String) {
    let mut name = String::new();
    while let Some(letter) = letters.next_if(|letter| !matches!(letter, '.' | '[')) {
        if letter == '\\' {
            name.extend(letters.next());
        } else {
            name.push(letter);
        }
    }
    let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    if name == "*"
        || name.chars().all(is_word) && !name.starts_with(|first: char| first.is_ascii_digit())
    {
        path.push_str(dots);
        path.push_str(&name);
    } else {
        path.push_str(if dots == ".." { ".." } else { "" });
        path.push_str(&format!("['{}']", name.replace('\'', "\\'")));
    }
}

/// Up to the bracket that closes this one, as it is.
fn bracket(letters: &mut Peekable<Chars<'_>>, path: &mut String) -> Result<()> {
    path.push('[');
    let (mut depth, mut quote) = (1, None);
    for letter in letters {
        path.push(letter);
        match (quote, letter) {
            (None, '\'' | '"') => quote = Some(letter),
            (Some(open), close) if open == close => quote = None,
            (None, '[') => depth += 1,
            (None, ']') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Ok(());
        }
    }
    bail!("a ']' is missing")
}

fn render(parts: &[Part], value: &Value, text: &mut String) -> Result<()> {
    for part in parts {
        match part {
            Part::Text(literal) => text.push_str(literal),
            Part::Path(path) => {
                let found: Vec<String> = values(path, value)?.into_iter().map(word).collect();
                text.push_str(&found.join(" "));
            }
            Part::Range(path, inner) => {
                for one in values(path, value)? {
                    render(inner, one, text)?;
                }
            }
        }
    }
    Ok(())
}

fn values<'a>(path: &str, value: &'a Value) -> Result<Vec<&'a Value>> {
    value
        .query(path)
        .map_err(|error| anyhow::anyhow!("cannot follow {path}: {error}"))
}

fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn shown(template: &str) -> String {
        let list = json!({"items": [
            {"metadata": {"name": "a", "labels": {"app.io/tier": "db"}}, "spec": {"ports": [1, 2]}},
            {"metadata": {"name": "b", "labels": {}}, "spec": {"ports": [], "on": true}},
        ]});
        Template::parse(template)
            .and_then(|template| template.render(&list))
            .unwrap_or_else(|error| panic!("{template}: {error:#}"))
    }

    #[test]
    fn templates_of_kubectl_give_what_kubectl_gives() {
        assert_eq!(shown("{.items[*].metadata.name}"), "a b");
        assert_eq!(shown(".items[1].spec.on"), "true");
        assert_eq!(shown("{$.items[0].spec.ports}"), "[1,2]");
        assert_eq!(
            shown(r#"{range .items[*]}{.metadata.name}{"\t"}{.spec.ports[*]}{"\n"}{end}"#),
            "a\t1 2\nb\t\n"
        );
        assert_eq!(shown(r"{.items[*].metadata.labels.app\.io/tier}"), "db");
        assert_eq!(shown("{.items[?(@.metadata.name=='b')].spec.on}"), "true");
        assert_eq!(shown("{..name}"), "a b");
        assert_eq!(shown("names: {items[*].metadata.name}!"), "names: a b!");
        assert_eq!(shown("{.items[*].nothing}"), "");
    }

    #[test]
    fn what_is_no_template_is_refused_with_its_reason() {
        for (template, reason) in [
            ("{.a", "'}' is missing"),
            ("{range .items[*]}x", "no {end}"),
            ("{end}", "without {range"),
            ("{.a[}", "']' is missing"),
            (r#"{"x}"#, "is missing"),
        ] {
            let error = Template::parse(template).expect_err(template).to_string();
            assert!(error.contains(reason), "{template}: {error}");
        }
    }
}
