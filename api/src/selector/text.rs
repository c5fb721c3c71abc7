//! The canonical text and the identity derived from it.

use std::fmt;

use sha2::{Digest, Sha224};

use super::{Node, Selector};

/// How tightly an operator binds; an operand that binds less needs parentheses.
#[derive(PartialEq, PartialOrd)]
enum Binding {
    Or,
    And,
    Not,
}

impl Node {
    fn binding(&self) -> Binding {
        match self {
            Self::Or(_) => Binding::Or,
            Self::And(_) => Binding::And,
            _ => Binding::Not,
        }
    }

    fn write_within(&self, f: &mut fmt::Formatter<'_>, outer: &Binding) -> fmt::Result {
        if self.binding() < *outer {
            write!(f, "({self})")
        } else {
            fmt::Display::fmt(self, f)
        }
    }
}

/// The value in whichever quotes it does not contain. No value contains both, for there are no
/// escapes by which it could have been written.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quote = if self.0.contains('"') { '\'' } else { '"' };
        write!(f, "{quote}{}{quote}", self.0)
    }
}

fn write_list<T>(
    f: &mut fmt::Formatter<'_>,
    items: impl IntoIterator<Item = T>,
    separator: &str,
    mut write_item: impl FnMut(&mut fmt::Formatter<'_>, T) -> fmt::Result,
) -> fmt::Result {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            f.write_str(separator)?;
        }
        write_item(f, item)?;
    }
    Ok(())
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all()"),
            Self::Global => f.write_str("global()"),
            Self::Has(label) => write!(f, "has({label})"),
            Self::Equal(label, value) => write!(f, "{label} == {}", Quoted(value)),
            Self::NotEqual(label, value) => write!(f, "{label} != {}", Quoted(value)),
            Self::Contains(label, value) => write!(f, "{label} contains {}", Quoted(value)),
            Self::StartsWith(label, value) => write!(f, "{label} starts with {}", Quoted(value)),
            Self::EndsWith(label, value) => write!(f, "{label} ends with {}", Quoted(value)),
            Self::In(label, values) | Self::NotIn(label, values) => {
                let operator = if matches!(self, Self::In(..)) {
                    "in"
                } else {
                    "not in"
                };
                write!(f, "{label} {operator} {{")?;
                write_list(f, values, ", ", |f, value| write!(f, "{}", Quoted(value)))?;
                f.write_str("}")
            }
            Self::Not(inner) => {
                f.write_str("!")?;
                inner.write_within(f, &Binding::Not)
            }
            Self::And(members) => write_list(f, members, " && ", |f, member| {
                member.write_within(f, &Binding::Not)
            }),
            Self::Or(members) => write_list(f, members, " || ", |f, member| {
                member.write_within(f, &Binding::And)
            }),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Selector {
    /// Identity of the selector: `s:` and the URL-safe base64 text of the SHA-224 digest of the
    /// canonical text, the form of Calico's selector identities. Equal for equal selectors.
    #[must_use]
    pub fn uid(&self) -> String {
        let digest = Sha224::digest(format!("s:{self}").as_bytes());
        let mut uid = String::with_capacity(40);
        uid.push_str("s:");
        push_base64(&mut uid, &digest);
        uid
    }
}

/// RFC 4648 §5 without padding.
fn push_base64(text: &mut String, bytes: &[u8]) {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for chunk in bytes.chunks(3) {
        let word = chunk
            .iter()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for index in 0..=chunk.len() {
            let six = word >> (18 - 6 * index) & 0x3f;
            text.push(char::from(ALPHABET[six as usize]));
        }
    }
}
