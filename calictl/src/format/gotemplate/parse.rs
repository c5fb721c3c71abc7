//! From words to a tree. Unknown functions and variables are found here, not at the first object.

use std::iter::Peekable;
use std::vec::IntoIter;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Number, Value};

use super::functions;
use super::lex::{Piece, Token, pieces};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    Text(String),
    /// Prints its value, unless that goes into a variable.
    Print(Pipeline),
    If(Branch),
    With(Branch),
    Range {
        /// `$i, $e := …`; with one name it is the element.
        names: Vec<String>,
        branch: Branch,
    },
}

/// A value that decides, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Branch {
    pub(super) over: Pipeline,
    pub(super) then: Vec<Node>,
    pub(super) otherwise: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pipeline {
    /// The variable that takes the value.
    pub(super) into: Option<Target>,
    /// The value of each is the last argument of the next.
    pub(super) commands: Vec<Command>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    Declare(String),
    Assign(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    Value(Operand),
    Call(String, Vec<Operand>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Operand {
    Literal(Value),
    /// Of the dot.
    Field(Vec<String>),
    Variable(String, Vec<String>),
    Inner(Box<Pipeline>, Vec<String>),
    /// A function without arguments.
    Call(String),
}

pub(super) fn template(text: &str) -> Result<Vec<Node>> {
    let mut parser = Parser {
        pieces: pieces(text)?.into_iter(),
        variables: vec!["$".to_owned()],
    };
    let (nodes, end) = parser.nodes()?;
    match end {
        End::Text => Ok(nodes),
        End::Word(word, _) => {
            bail!("{{{{{word}}}}} without {{{{if}}}}, {{{{range}}}} or {{{{with}}}}")
        }
    }
}

struct Parser {
    pieces: IntoIter<Piece>,
    /// Names in scope.
    variables: Vec<String>,
}

/// Why a list of nodes ended: the text did, or `end` or `else` came, with the words behind it.
enum End {
    Text,
    Word(String, Vec<Token>),
}

impl Parser {
    fn nodes(&mut self) -> Result<(Vec<Node>, End)> {
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.next() {
            let tokens = match piece {
                Piece::Text(text) => {
                    nodes.push(Node::Text(text));
                    continue;
                }
                Piece::Action(tokens) => tokens,
            };
            let keyword = match tokens.first() {
                Some(Token::Word(word)) => word.clone(),
                _ => String::new(),
            };
            let rest = || tokens[1..].to_vec();
            match keyword.as_str() {
                "if" | "with" | "range" => {
                    let node = self.block(&keyword, rest())?;
                    nodes.push(node);
                }
                "end" | "else" => return Ok((nodes, End::Word(keyword, rest()))),
                "define" | "template" | "block" | "break" | "continue" => {
                    bail!("{{{{{keyword}}}}} is not supported")
                }
                _ => nodes.push(Node::Print(self.pipeline(tokens)?)),
            }
        }
        Ok((nodes, End::Text))
    }

    fn block(&mut self, keyword: &str, mut tokens: Vec<Token>) -> Result<Node> {
        let scope = self.variables.len();
        let mut names = Vec::new();
        if keyword == "range"
            && let Some(at) = tokens.iter().position(|token| *token == Token::Declare)
        {
            for token in &tokens[..at] {
                match token {
                    Token::Variable(name, fields) if fields.is_empty() => names.push(name.clone()),
                    Token::Comma => {}
                    _ => bail!("{{{{range}}}} declares variables: $i, $e := …"),
                }
            }
            ensure!(
                names.len() <= 2,
                "{{{{range}}}} declares at most two variables"
            );
            tokens.drain(..=at);
        }
        let over = self.pipeline(tokens)?;
        self.variables.extend(names.iter().cloned());
        let (then, end) = self.nodes()?;
        let otherwise = match end {
            End::Text => bail!("a {{{{{keyword}}}}} has no {{{{end}}}}"),
            End::Word(word, _) if word == "end" => Vec::new(),
            End::Word(_, behind) => self.otherwise(keyword, behind)?,
        };
        self.variables.truncate(scope);
        let branch = Branch {
            over,
            then,
            otherwise,
        };
        Ok(match keyword {
            "if" => Node::If(branch),
            "with" => Node::With(branch),
            _ => Node::Range { names, branch },
        })
    }

    /// After `else`: a chain (`else if …`), or up to `end`.
    fn otherwise(&mut self, keyword: &str, behind: Vec<Token>) -> Result<Vec<Node>> {
        match behind.first() {
            None => {}
            Some(Token::Word(next)) if next == keyword && keyword != "range" => {
                // Its `end` is ours.
                return Ok(vec![self.block(keyword, behind[1..].to_vec())?]);
            }
            Some(_) => bail!("{{{{else}}}} is followed by nothing, or by {keyword} again"),
        }
        match self.nodes()? {
            (nodes, End::Word(word, _)) if word == "end" => Ok(nodes),
            (_, End::Word(..)) => bail!("a second {{{{else}}}}"),
            (_, End::Text) => bail!("a {{{{{keyword}}}}} has no {{{{end}}}}"),
        }
    }

    fn pipeline(&mut self, mut tokens: Vec<Token>) -> Result<Pipeline> {
        let into = match &tokens[..] {
            [
                Token::Variable(name, fields),
                how @ (Token::Declare | Token::Assign),
                ..,
            ] if fields.is_empty() => Some(if *how == Token::Declare {
                Target::Declare(name.clone())
            } else {
                self.known(name)?;
                Target::Assign(name.clone())
            }),
            _ => None,
        };
        let skipped = if into.is_some() { 2 } else { 0 };
        let mut rest = tokens.split_off(skipped).into_iter().peekable();
        let commands = self.commands(&mut rest)?;
        if let Some(token) = rest.next() {
            bail!("unexpected {token:?}");
        }
        if let Some(Target::Declare(name)) = &into {
            self.variables.push(name.clone());
        }
        Ok(Pipeline { into, commands })
    }

    fn known(&self, name: &str) -> Result<()> {
        ensure!(
            self.variables.iter().any(|known| known == name),
            "there is no variable {name}"
        );
        Ok(())
    }

    /// Up to the end, or up to a closing parenthesis, which stays.
    fn commands(&self, rest: &mut Peekable<IntoIter<Token>>) -> Result<Vec<Command>> {
        let mut commands = Vec::new();
        loop {
            commands.push(self.command(rest, !commands.is_empty())?);
            if rest.next_if_eq(&Token::Pipe).is_none() {
                return Ok(commands);
            }
        }
    }

    fn command(&self, rest: &mut Peekable<IntoIter<Token>>, piped: bool) -> Result<Command> {
        let mut operands = Vec::new();
        while let Some(token) =
            rest.next_if(|token| !matches!(token, Token::Pipe | Token::Close(_)))
        {
            operands.push(self.operand(token, rest)?);
        }
        let mut operands = operands.into_iter();
        let first = operands.next().context("a value is missing")?;
        let arguments: Vec<Operand> = operands.collect();
        match first {
            Operand::Call(name) => Ok(Command::Call(name, arguments)),
            value => {
                ensure!(
                    arguments.is_empty() && !piped,
                    "only a function takes arguments"
                );
                Ok(Command::Value(value))
            }
        }
    }

    fn operand(&self, token: Token, rest: &mut Peekable<IntoIter<Token>>) -> Result<Operand> {
        Ok(match token {
            Token::Field(names) => Operand::Field(names),
            Token::Variable(name, fields) => {
                self.known(&name)?;
                Operand::Variable(name, fields)
            }
            Token::Text(text) => Operand::Literal(text.into()),
            Token::Number(written) => Operand::Literal(number(&written)?),
            Token::Word(word) => match word.as_str() {
                "true" => Operand::Literal(true.into()),
                "false" => Operand::Literal(false.into()),
                "nil" => Operand::Literal(Value::Null),
                name => {
                    ensure!(
                        functions::exists(name),
                        "there is no function {name:?}; there are {}",
                        functions::names()
                    );
                    Operand::Call(word)
                }
            },
            Token::Open => {
                let commands = self.commands(rest)?;
                match rest.next() {
                    Some(Token::Close(fields)) => Operand::Inner(
                        Box::new(Pipeline {
                            into: None,
                            commands,
                        }),
                        fields,
                    ),
                    _ => bail!("a \")\" is missing"),
                }
            }
            other => bail!("unexpected {other:?}"),
        })
    }
}

fn number(written: &str) -> Result<Value> {
    if let Ok(whole) = written.parse::<i64>() {
        return Ok(whole.into());
    }
    written
        .parse()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .with_context(|| format!("{written:?} is no number"))
}
