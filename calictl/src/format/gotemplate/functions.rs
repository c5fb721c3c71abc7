//! The functions of Go's templates, those that `kubectl` adds (`exists`, `base64decode`), and `calicoctl`'s `join`.

use std::cmp::Ordering;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use serde_json::Value;

const NAMES: [&str; 19] = [
    "and",
    "or",
    "not",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "len",
    "index",
    "slice",
    "print",
    "println",
    "printf",
    "join",
    "exists",
    "base64decode",
    "urlquery",
];

pub(super) fn exists(name: &str) -> bool {
    NAMES.contains(&name)
}

pub(super) fn names() -> String {
    NAMES.join(", ")
}

static NOTHING: Value = Value::Null;

/// A field of a field; nothing where there is none. A name that differs only in case counts where no other is there.
pub(super) fn field<'a>(value: &'a Value, names: &[String]) -> &'a Value {
    names.iter().fold(value, |value, name| {
        let Some(map) = value.as_object() else {
            return &NOTHING;
        };
        map.get(name)
            .or_else(|| {
                // `calicoctl` has Go's struct.
                let name = if name == "ObjectMeta" {
                    "metadata"
                } else {
                    name
                };
                map.iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value)
            })
            .unwrap_or(&NOTHING)
    })
}

/// Go's idea of true: neither zero nor empty.
pub(super) fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(is) => *is,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// As Go's `%v` prints it.
pub(super) fn printed(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(printed).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(map) => {
            let mut pairs: Vec<(&String, &Value)> = map.iter().collect();
            pairs.sort_by_key(|(key, _)| *key);
            let pairs: Vec<String> = pairs
                .into_iter()
                .map(|(key, value)| format!("{key}:{}", printed(value)))
                .collect();
            format!("map[{}]", pairs.join(" "))
        }
        other => other.to_string(),
    }
}

pub(super) const fn described(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub(super) fn call(name: &str, values: &[Value]) -> Result<Value> {
    let at_least = |count: usize| {
        ensure!(
            values.len() >= count,
            "{name} takes at least {count} arguments, not {}",
            values.len()
        );
        Ok(())
    };
    Ok(match name {
        "and" | "or" => {
            at_least(1)?;
            let decides = |value: &&Value| truth(value) == (name == "or");
            let decided = values.iter().find(decides).or(values.last());
            decided.cloned().unwrap_or_default()
        }
        "not" => {
            at_least(1)?;
            (!truth(&values[0])).into()
        }
        "eq" => {
            at_least(2)?;
            let mut equal = false;
            for other in &values[1..] {
                equal |= same(&values[0], other);
            }
            equal.into()
        }
        "ne" => {
            at_least(2)?;
            (!same(&values[0], &values[1])).into()
        }
        "lt" | "le" | "gt" | "ge" => {
            at_least(2)?;
            let order = compare(&values[0], &values[1])?;
            match name {
                "lt" => order.is_lt(),
                "le" => order.is_le(),
                "gt" => order.is_gt(),
                _ => order.is_ge(),
            }
            .into()
        }
        "len" => {
            at_least(1)?;
            length(&values[0])?.into()
        }
        "index" => {
            at_least(1)?;
            let mut value = &values[0];
            for at in &values[1..] {
                value = index(value, at)?;
            }
            value.clone()
        }
        "slice" => {
            at_least(1)?;
            slice(&values[0], &values[1..])?
        }
        "print" => print(values).into(),
        "println" => {
            let words: Vec<String> = values.iter().map(printed).collect();
            format!("{}\n", words.join(" ")).into()
        }
        "printf" => {
            at_least(1)?;
            let format = values[0].as_str().context("printf's format is no text")?;
            printf(format, &values[1..]).into()
        }
        "join" => {
            at_least(2)?;
            let items = values[0].as_array().map_or(&[][..], Vec::as_slice);
            let words: Vec<String> = items.iter().map(printed).collect();
            words.join(&printed(&values[1])).into()
        }
        "exists" => {
            at_least(1)?;
            let mut value = Ok(&values[0]);
            for at in &values[1..] {
                value = value.and_then(|value| index(value, at));
            }
            value.is_ok_and(|value| !value.is_null()).into()
        }
        "base64decode" => {
            at_least(1)?;
            let decoded = base64::engine::general_purpose::STANDARD
                .decode(printed(&values[0]))
                .context("base64decode")?;
            String::from_utf8_lossy(&decoded).into_owned().into()
        }
        "urlquery" => query(&print(values)).into(),
        other => bail!("there is no function {other:?}"),
    })
}

/// Numbers are equal by value, everything else as it is.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

fn compare(a: &Value, b: &Value) -> Result<Ordering> {
    match (a, b) {
        (Value::String(a), Value::String(b)) => Ok(a.cmp(b)),
        (Value::Number(first), Value::Number(second)) => first
            .as_f64()
            .partial_cmp(&second.as_f64())
            .context("cannot compare these numbers"),
        _ => bail!("cannot compare {} with {}", described(a), described(b)),
    }
}

fn length(value: &Value) -> Result<usize> {
    Ok(match value {
        Value::Null => 0,
        Value::String(text) => text.len(),
        Value::Array(items) => items.len(),
        Value::Object(map) => map.len(),
        other => bail!("len of {}", described(other)),
    })
}

fn index<'a>(value: &'a Value, at: &Value) -> Result<&'a Value> {
    match (value, at) {
        (Value::Null, _) => Ok(&NOTHING),
        (Value::Object(map), Value::String(key)) => Ok(map.get(key).unwrap_or(&NOTHING)),
        (Value::Array(items), Value::Number(number)) => number
            .as_u64()
            .and_then(|at| items.get(usize::try_from(at).ok()?))
            .with_context(|| format!("index {number} of {}", items.len())),
        _ => bail!("index of {} by {}", described(value), described(at)),
    }
}

fn slice(value: &Value, bounds: &[Value]) -> Result<Value> {
    let size = length(value)?;
    let bound = |at: usize, otherwise: usize| {
        bounds.get(at).map_or(Some(otherwise), |bound| {
            usize::try_from(bound.as_u64()?).ok()
        })
    };
    let range = bound(0, 0).zip(bound(1, size));
    let range = range.filter(|(from, to)| from <= to && *to <= size);
    let (from, to) = range.with_context(|| format!("slice reaches beyond {size}"))?;
    match value {
        Value::String(text) => {
            let cut = text.get(from..to).context("slice cuts a letter")?;
            Ok(cut.into())
        }
        Value::Array(items) => Ok(items[from..to].into()),
        other => bail!("slice of {}", described(other)),
    }
}

/// As Go's `fmt.Sprint`: a blank between two that are no texts.
fn print(values: &[Value]) -> String {
    let mut text = String::new();
    for (at, value) in values.iter().enumerate() {
        if at > 0 && !value.is_string() && !values[at - 1].is_string() {
            text.push(' ');
        }
        text.push_str(&printed(value));
    }
    text
}

fn query(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for octet in text.bytes() {
        match octet {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(octet));
            }
            b' ' => escaped.push('+'),
            other => escaped.push_str(&format!("%{other:02X}")),
        }
    }
    escaped
}

/// `%s %v %d %t %q %f %g %x %c`-like verbs with flags `-`, `0`, `+`, width and precision. What does not fit is printed as Go
/// prints it: `%!d(string=x)`.
fn printf(format: &str, values: &[Value]) -> String {
    let mut text = String::new();
    let mut values = values.iter();
    let mut letters = format.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        let mut flags = String::new();
        while let Some(flag) = letters.next_if(|next| "-+0# ".contains(*next)) {
            flags.push(flag);
        }
        let mut digits = || {
            let mut digits = String::new();
            while let Some(digit) = letters.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            // Nobody pads to more: a slip must not fill the memory.
            digits
                .parse::<usize>()
                .ok()
                .map(|number| number.min(10_000))
        };
        let width = digits().unwrap_or(0);
        let precision = letters.next_if_eq(&'.').map(|_| {
            let mut digits = String::new();
            while let Some(digit) = letters.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            digits.parse::<usize>().unwrap_or(0).min(100)
        });
        let Some(verb) = letters.next() else {
            text.push_str("%!(NOVERB)");
            break;
        };
        if verb == '%' {
            text.push('%');
            continue;
        }
        let Some(value) = values.next() else {
            text.push_str(&format!("%!{verb}(MISSING)"));
            continue;
        };
        let word = formatted(verb, &flags, precision, value);
        text.push_str(&padded(&word, &flags, width, value.is_number()));
    }
    let extra: Vec<String> = values
        .map(|value| format!("{}={}", go_type(value), printed(value)))
        .collect();
    if !extra.is_empty() {
        text.push_str(&format!("%!(EXTRA {})", extra.join(", ")));
    }
    text
}

fn formatted(verb: char, flags: &str, precision: Option<usize>, value: &Value) -> String {
    let signed = |text: String| {
        if flags.contains('+') && !text.starts_with('-') {
            format!("+{text}")
        } else {
            text
        }
    };
    match (verb, value) {
        ('v', value) => printed(value),
        ('s', Value::String(text)) => match precision {
            Some(count) => text.chars().take(count).collect(),
            None => text.clone(),
        },
        ('q', Value::String(_)) => value.to_string(),
        ('x', Value::String(text)) => text.bytes().map(|octet| format!("{octet:02x}")).collect(),
        ('t', Value::Bool(is)) => is.to_string(),
        ('d', Value::Number(number)) if !number.is_f64() => signed(number.to_string()),
        ('x', Value::Number(number)) if number.is_i64() => {
            format!("{:x}", number.as_i64().unwrap_or_default())
        }
        ('f' | 'F', Value::Number(number)) if number.is_f64() => signed(format!(
            "{:.*}",
            precision.unwrap_or(6),
            number.as_f64().unwrap_or_default()
        )),
        ('g', Value::Number(number)) if number.is_f64() => signed(number.to_string()),
        ('s', Value::Array(_) | Value::Object(_)) => printed(value),
        (verb, Value::Null) => format!("%!{verb}(<nil>)"),
        (verb, value) => format!("%!{verb}({}={})", go_type(value), printed(value)),
    }
}

fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

fn padded(word: &str, flags: &str, width: usize, is_number: bool) -> String {
    if flags.contains('-') {
        return format!("{word:<width$}");
    }
    if flags.contains('0') && is_number {
        let (sign, digits) = match word.strip_prefix(['-', '+']) {
            Some(digits) => (&word[..1], digits),
            None => ("", word),
        };
        let rest = width.saturating_sub(sign.len());
        return format!("{sign}{digits:0>rest$}");
    }
    format!("{word:>width$}")
}
