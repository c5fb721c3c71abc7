//! A template cut into text and actions, and an action into words.

use anyhow::{Context, Result, bail};

/// Text, or what stands between `{{` and `}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    Action(Vec<Token>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// `if`, `range`, a function's name, `true`.
    Word(String),
    /// `.` alone, or `.a.b`: the names.
    Field(Vec<String>),
    /// `$`, `$x`, `$x.a`: the variable's name with its `$`, and the fields.
    Variable(String, Vec<String>),
    Text(String),
    /// As it was written.
    Number(String),
    Open,
    /// With the fields that follow: `(…).a`.
    Close(Vec<String>),
    Pipe,
    Comma,
    Declare,
    Assign,
}

pub(super) fn pieces(text: &str) -> Result<Vec<Piece>> {
    let mut found = Vec::new();
    let mut rest = text;
    let mut trim = false;
    while let Some(open) = rest.find("{{") {
        let (before, inside) = (&rest[..open], &rest[open + 2..]);
        let close = closing(inside)
            .with_context(|| format!("\"}}}}\" is missing after {:?}", shortened(&rest[open..])))?;
        let (mut action, after) = (&inside[..close], &inside[close + 2..]);
        let mut before = if trim { before.trim_start() } else { before };
        // The sign counts as one only with a space beside it: {{-3}} is a number.
        if let Some(trimmed) = action.strip_prefix('-')
            && trimmed.starts_with(char::is_whitespace)
        {
            action = trimmed;
            before = before.trim_end();
        }
        trim = false;
        if let Some(trimmed) = action.strip_suffix('-')
            && trimmed.ends_with(char::is_whitespace)
        {
            action = trimmed;
            trim = true;
        }
        if !before.is_empty() {
            found.push(Piece::Text(before.to_owned()));
        }
        let action = action.trim();
        let is_comment = action.starts_with("/*") && action.ends_with("*/");
        if !is_comment {
            found.push(Piece::Action(tokens(action)?));
        }
        rest = after;
    }
    let rest = if trim { rest.trim_start() } else { rest };
    if !rest.is_empty() {
        found.push(Piece::Text(rest.to_owned()));
    }
    Ok(found)
}

fn shortened(text: &str) -> String {
    text.chars().take(30).collect()
}

/// Offset of the `}}` that ends an action; those in quotes and comments do not count.
fn closing(text: &str) -> Option<usize> {
    let start = text.trim_start_matches('-').trim_start();
    if start.starts_with("/*") {
        let end = text.find("*/")?;
        return Some(end + text[end..].find("}}")?);
    }
    let (mut quote, mut escaped) = (None, false);
    for (at, letter) in text.char_indices() {
        match (quote, letter) {
            _ if escaped => escaped = false,
            (Some('"'), '\\') => escaped = true,
            (None, '"' | '`') => quote = Some(letter),
            (Some(open), close) if open == close => quote = None,
            (None, '}') if text[at..].starts_with("}}") => return Some(at),
            _ => {}
        }
    }
    // An open quote hides the end: the lexer says so if there is one at all.
    text.find("}}")
}

fn tokens(action: &str) -> Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = action;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            letter if letter.is_whitespace() => letter.len_utf8(),
            '(' => push(&mut tokens, Token::Open, 1),
            ')' => {
                let (names, length) = fields(&rest[1..]);
                push(&mut tokens, Token::Close(names), 1 + length)
            }
            '|' => push(&mut tokens, Token::Pipe, 1),
            ',' => push(&mut tokens, Token::Comma, 1),
            ':' if rest.starts_with(":=") => push(&mut tokens, Token::Declare, 2),
            '=' => push(&mut tokens, Token::Assign, 1),
            '"' | '`' => {
                let (text, length) = literal(rest, first)?;
                push(&mut tokens, Token::Text(text), length)
            }
            '.' if !rest[1..].starts_with(|next: char| next.is_ascii_digit()) => {
                let (names, length) = fields(rest);
                push(&mut tokens, Token::Field(names), length.max(1))
            }
            '$' => {
                let name = word(&rest[1..]);
                let (names, length) = fields(&rest[1 + name.len()..]);
                let token = Token::Variable(format!("${name}"), names);
                push(&mut tokens, token, 1 + name.len() + length)
            }
            digit if digit.is_ascii_digit() || matches!(digit, '-' | '+' | '.') => {
                let number = rest
                    .find(|next: char| !(next.is_ascii_alphanumeric() || "+-._".contains(next)))
                    .map_or(rest, |end| &rest[..end]);
                push(&mut tokens, Token::Number(number.to_owned()), number.len())
            }
            letter if letter.is_alphabetic() || letter == '_' => {
                let name = word(rest);
                push(&mut tokens, Token::Word(name.to_owned()), name.len())
            }
            other => bail!("unexpected {other:?} in {action:?}"),
        };
        rest = &rest[length..];
    }
    Ok(tokens)
}

fn push(tokens: &mut Vec<Token>, token: Token, length: usize) -> usize {
    tokens.push(token);
    length
}

fn word(text: &str) -> &str {
    let end = text.find(|letter: char| !(letter.is_alphanumeric() || letter == '_'));
    end.map_or(text, |end| &text[..end])
}

/// The names of `.a.b` and how long it is; a dot alone is not counted.
fn fields(text: &str) -> (Vec<String>, usize) {
    let (mut names, mut length) = (Vec::new(), 0);
    while let Some(after) = text[length..].strip_prefix('.') {
        let name = word(after);
        if name.is_empty() {
            break;
        }
        names.push(name.to_owned());
        length += 1 + name.len();
    }
    (names, length)
}

/// A quoted text and the length of how it is written.
fn literal(text: &str, quote: char) -> Result<(String, usize)> {
    let mut escaped = false;
    for (at, letter) in text.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if letter == '\\' && quote == '"' {
            escaped = true;
        } else if letter == quote {
            let written = &text[..=at];
            let value = if quote == '`' {
                text[1..at].to_owned()
            } else {
                serde_json::from_str(written).with_context(|| format!("{written} is no text"))?
            };
            return Ok((value, written.len()));
        }
    }
    bail!("{text} is not closed")
}
