//! From words to the syntax tree, by recursive descent.

use std::collections::BTreeSet;

use super::Node;
use super::lexer::{Lexer, MAX_LABEL, Token, Word};

/// Depth of parentheses and negations beyond which an expression is refused. The longest legal
/// expression could nest 500 deep; nobody writes that, and the descent must not exhaust the stack.
const MAX_DEPTH: usize = 100;

/// Why an expression is no selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at character {position}: expected {expected}, found {found}")]
pub struct SelectorError {
    /// The character at which it goes wrong, counted from 1.
    pub position: usize,
    /// What could stand there.
    pub expected: String,
    /// What does stand there.
    pub found: String,
}

pub(super) fn parse(source: &str) -> Result<Node, SelectorError> {
    let mut lexer = Lexer::new(source);
    let ahead = lexer.next();
    if ahead.word == Word::End {
        return Ok(Node::All);
    }
    let mut parser = Parser {
        source,
        lexer,
        ahead,
        depth: 0,
    };
    let node = parser.or()?;
    match parser.ahead.word {
        Word::End => Ok(node),
        _ => Err(parser.expected("\"&&\", \"||\" or the end")),
    }
}

struct Parser<'a> {
    source: &'a str,
    lexer: Lexer<'a>,
    ahead: Token<'a>,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn advance(&mut self) -> Token<'a> {
        let next = self.lexer.next();
        std::mem::replace(&mut self.ahead, next)
    }

    fn expected(&self, expected: &str) -> SelectorError {
        self.expected_at(self.ahead, expected)
    }

    fn expected_at(&self, token: Token<'_>, expected: &str) -> SelectorError {
        let found = match token.word {
            Word::End => "the end".to_owned(),
            Word::OpenText => "a text whose quote is never closed".to_owned(),
            _ => {
                let rest = &self.source[token.position..];
                let label = rest.find(|c: char| !(c.is_alphanumeric() || "_./-".contains(c)));
                let length = match token.word {
                    Word::Label(name) | Word::Has(name) => {
                        label.unwrap_or(rest.len()).min(name.len() + 4)
                    }
                    Word::Text(text) => text.len() + 2,
                    Word::Stray(text) => text.len(),
                    Word::And | Word::Or | Word::Equal | Word::NotEqual => 2,
                    Word::Open
                    | Word::Close
                    | Word::OpenSet
                    | Word::CloseSet
                    | Word::Comma
                    | Word::Not => 1,
                    _ => label.unwrap_or(rest.len()),
                };
                let shown: String = rest[..length.min(rest.len())].chars().take(40).collect();
                format!("{shown:?}")
            }
        };
        let position = self.source[..token.position].chars().count() + 1;
        SelectorError {
            position,
            expected: expected.to_owned(),
            found,
        }
    }

    fn or(&mut self) -> Result<Node, SelectorError> {
        let mut operands = vec![self.and()?];
        while self.ahead.word == Word::Or {
            self.advance();
            operands.push(self.and()?);
        }
        Ok(Node::or(operands))
    }

    fn and(&mut self) -> Result<Node, SelectorError> {
        let mut operands = vec![self.operation()?];
        while self.ahead.word == Word::And {
            self.advance();
            operands.push(self.operation()?);
        }
        Ok(Node::and(operands))
    }

    fn operation(&mut self) -> Result<Node, SelectorError> {
        let mut negative = false;
        while self.ahead.word == Word::Not {
            self.advance();
            negative = !negative;
        }
        let atom = self.atom()?;
        Ok(if negative { Node::negate(atom) } else { atom })
    }

    fn atom(&mut self) -> Result<Node, SelectorError> {
        let token = self.ahead;
        match token.word {
            Word::Open => {
                if self.depth == MAX_DEPTH {
                    return Err(self.expected("fewer nested parentheses (100 at most)"));
                }
                self.advance();
                self.depth += 1;
                let inner = self.or()?;
                if self.ahead.word != Word::Close {
                    return Err(self.expected("\"&&\", \"||\" or \")\""));
                }
                self.advance();
                self.depth -= 1;
                Ok(inner)
            }
            Word::All => self.single(Node::All),
            Word::Global => self.single(Node::Global),
            Word::Has(label) => {
                self.check_label(token, label)?;
                self.single(Node::Has(label.into()))
            }
            Word::Label(label) => {
                self.check_label(token, label)?;
                self.advance();
                self.comparison(label)
            }
            _ => {
                Err(self
                    .expected("a label, \"has(label)\", \"all()\", \"global()\", \"!\" or \"(\""))
            }
        }
    }

    fn single(&mut self, node: Node) -> Result<Node, SelectorError> {
        self.advance();
        Ok(node)
    }

    fn check_label(&self, token: Token<'_>, label: &str) -> Result<(), SelectorError> {
        if label.len() > MAX_LABEL {
            return Err(self.expected_at(token, "a label of at most 512 characters"));
        }
        Ok(())
    }

    fn comparison(&mut self, label: &str) -> Result<Node, SelectorError> {
        let operator = self.ahead.word;
        let label: Box<str> = label.into();
        match operator {
            Word::In | Word::NotIn => {
                self.advance();
                let values = self.set()?;
                Ok(if operator == Word::In { Node::In(label, values) } else { Node::NotIn(label, values) })
            }
            Word::Equal | Word::NotEqual | Word::Contains | Word::StartsWith | Word::EndsWith => {
                self.advance();
                let value = self.text()?;
                Ok(match operator {
                    Word::Equal => Node::Equal(label, value),
                    Word::NotEqual => Node::NotEqual(label, value),
                    Word::Contains => Node::Contains(label, value),
                    Word::StartsWith => Node::StartsWith(label, value),
                    _ => Node::EndsWith(label, value),
                })
            }
            _ => Err(self.expected(
                "\"==\", \"!=\", \"in\", \"not in\", \"contains\", \"starts with\" or \"ends with\" after the label",
            )),
        }
    }

    fn text(&mut self) -> Result<Box<str>, SelectorError> {
        let Word::Text(text) = self.ahead.word else {
            return Err(self.expected("a text in quotes"));
        };
        self.advance();
        Ok(text.into())
    }

    fn set(&mut self) -> Result<BTreeSet<Box<str>>, SelectorError> {
        if self.ahead.word != Word::OpenSet {
            return Err(self.expected("\"{\""));
        }
        self.advance();
        let mut values = BTreeSet::new();
        if self.ahead.word == Word::CloseSet {
            self.advance();
            return Ok(values);
        }
        loop {
            values.insert(self.text()?);
            match self.advance_in_set()? {
                Word::Comma => {}
                _ => return Ok(values),
            }
        }
    }

    fn advance_in_set(&mut self) -> Result<Word<'a>, SelectorError> {
        match self.ahead.word {
            Word::Comma | Word::CloseSet => Ok(self.advance().word),
            _ => Err(self.expected("\",\" or \"}\"")),
        }
    }
}
