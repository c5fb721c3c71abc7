//! Label selectors: the expressions by which policies, pools and peers pick objects.
//!
//! ```text
//! or    := and ( "||" and )*
//! and   := op ( "&&" op )*
//! op    := "!"* atom
//! atom  := "(" or ")" | "all()" | "global()" | "has(" label ")"
//!        | label ("==" | "!=" | "contains" | "starts with" | "ends with") text
//!        | label ("in" | "not in") "{" [ text ( "," text )* ] "}"
//! text  := '"' any* '"' | "'" any* "'"          (no escapes)
//! label := [A-Za-z0-9_./-]{1,512}
//! ```
//!
//! An empty expression selects everything. Blanks are spaces and tabs. `!=` and `not in` hold for
//! objects that lack the label, all other comparisons do not.
//!
//! The canonical text of a selector is the same for all ways of writing its blanks, parentheses,
//! quotes and set members. [`Selector::uid`] is derived from it and therefore stable across
//! processes and versions.

mod evaluate;
pub mod index;
mod lexer;
mod parser;
mod text;

use std::collections::BTreeSet;
use std::str::FromStr;

pub use evaluate::{Labels, Layered, Restriction};
pub use parser::SelectorError;

use crate::text::serde_as_text;

/// Longest expression that the API accepts.
pub const MAX_LENGTH: usize = 1024;

/// A parsed expression.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(Node);

/// The syntax tree. `And` and `Or` have at least two members and never hold their own kind;
/// `Not` never holds `Not`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Node {
    All,
    Global,
    Has(Box<str>),
    Equal(Box<str>, Box<str>),
    NotEqual(Box<str>, Box<str>),
    Contains(Box<str>, Box<str>),
    StartsWith(Box<str>, Box<str>),
    EndsWith(Box<str>, Box<str>),
    In(Box<str>, BTreeSet<Box<str>>),
    NotIn(Box<str>, BTreeSet<Box<str>>),
    Not(Box<Self>),
    And(Vec<Self>),
    Or(Vec<Self>),
}

impl Node {
    fn and(operands: impl IntoIterator<Item = Self>) -> Self {
        let mut members = Vec::new();
        for operand in operands {
            match operand {
                Self::And(inner) => members.extend(inner),
                other => members.push(other),
            }
        }
        if members.len() == 1 {
            members.remove(0)
        } else {
            Self::And(members)
        }
    }

    fn or(operands: impl IntoIterator<Item = Self>) -> Self {
        let mut members = Vec::new();
        for operand in operands {
            match operand {
                Self::Or(inner) => members.extend(inner),
                other => members.push(other),
            }
        }
        if members.len() == 1 {
            members.remove(0)
        } else {
            Self::Or(members)
        }
    }

    fn negate(operand: Self) -> Self {
        match operand {
            Self::Not(inner) => *inner,
            other => Self::Not(Box::new(other)),
        }
    }
}

impl Selector {
    /// Parses an expression; the error tells position, expectation and finding.
    pub fn parse(expression: &str) -> Result<Self, SelectorError> {
        parser::parse(expression).map(Self)
    }

    /// The selector of everything.
    #[must_use]
    pub const fn all() -> Self {
        Self(Node::All)
    }

    /// Whether everything is selected by its form (not by logic).
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.0 == Node::All
    }

    /// `label == 'value'`.
    #[must_use]
    pub fn equals(label: &str, value: &str) -> Self {
        Self(Node::Equal(label.into(), value.into()))
    }

    /// `label in {'a', 'b'}`.
    #[must_use]
    pub fn is_in<'a>(label: &str, values: impl IntoIterator<Item = &'a str>) -> Self {
        Self(Node::In(
            label.into(),
            values.into_iter().map(Into::into).collect(),
        ))
    }

    /// `label not in {'a', 'b'}`.
    #[must_use]
    pub fn is_not_in<'a>(label: &str, values: impl IntoIterator<Item = &'a str>) -> Self {
        Self(Node::NotIn(
            label.into(),
            values.into_iter().map(Into::into).collect(),
        ))
    }

    /// `has(label)`.
    #[must_use]
    pub fn has(label: &str) -> Self {
        Self(Node::Has(label.into()))
    }

    /// Both must hold. `all()` disappears.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self.0, other.0) {
            (Node::All, kept) | (kept, Node::All) => Self(kept),
            (a, b) => Self(Node::and([a, b])),
        }
    }

    /// One of them must hold. `all()` swallows the other.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        match (self.0, other.0) {
            (Node::All, _) | (_, Node::All) => Self::all(),
            (a, b) => Self(Node::or([a, b])),
        }
    }

    /// The contrary.
    #[must_use]
    pub fn negated(self) -> Self {
        Self(Node::negate(self.0))
    }

    /// The same expression over labels that carry this prefix. Namespace labels reach endpoints
    /// as `pcns.` labels, those of service accounts as `pcsa.` labels.
    #[must_use]
    pub fn with_label_prefix(&self, prefix: &str) -> Self {
        Self(self.0.with_label_prefix(prefix))
    }

    /// The expression that a rule's `namespaceSelector` means for endpoints: labels get the prefix
    /// `pcns.`; `all()` means anything in a namespace, `global()` anything outside.
    #[must_use]
    pub fn of_namespaces(&self) -> Self {
        match &self.0 {
            Node::All => Self::has(crate::kubernetes::LABEL_NAMESPACE),
            Node::Global => Self::has(crate::kubernetes::LABEL_NAMESPACE).negated(),
            node => Self(node.with_label_prefix(crate::kubernetes::NAMESPACE_LABEL_PREFIX)),
        }
    }

    /// Whether `global()` occurs, which is legal only in a rule's `namespaceSelector`.
    #[must_use]
    pub fn uses_global(&self) -> bool {
        self.0.any(&mut |node| matches!(node, Node::Global))
    }
}

impl Node {
    fn with_label_prefix(&self, prefix: &str) -> Self {
        let label = |label: &str| -> Box<str> { format!("{prefix}{label}").into() };
        match self {
            Self::All => Self::All,
            Self::Global => Self::Global,
            Self::Has(l) => Self::Has(label(l)),
            Self::Equal(l, v) => Self::Equal(label(l), v.clone()),
            Self::NotEqual(l, v) => Self::NotEqual(label(l), v.clone()),
            Self::Contains(l, v) => Self::Contains(label(l), v.clone()),
            Self::StartsWith(l, v) => Self::StartsWith(label(l), v.clone()),
            Self::EndsWith(l, v) => Self::EndsWith(label(l), v.clone()),
            Self::In(l, v) => Self::In(label(l), v.clone()),
            Self::NotIn(l, v) => Self::NotIn(label(l), v.clone()),
            Self::Not(inner) => Self::Not(Box::new(inner.with_label_prefix(prefix))),
            Self::And(members) => Self::And(
                members
                    .iter()
                    .map(|m| m.with_label_prefix(prefix))
                    .collect(),
            ),
            Self::Or(members) => Self::Or(
                members
                    .iter()
                    .map(|m| m.with_label_prefix(prefix))
                    .collect(),
            ),
        }
    }

    fn any(&self, test: &mut impl FnMut(&Self) -> bool) -> bool {
        test(self)
            || match self {
                Self::Not(inner) => inner.any(test),
                Self::And(members) | Self::Or(members) => {
                    members.iter().any(|member| member.any(test))
                }
                _ => false,
            }
    }
}

impl Default for Selector {
    fn default() -> Self {
        Self::all()
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(expression: &str) -> Result<Self, SelectorError> {
        Self::parse(expression)
    }
}

serde_as_text!(Selector, "a selector expression");

#[cfg(test)]
mod tests;
